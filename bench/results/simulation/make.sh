#!/bin/sh
# The simulations of this folder. TRACES: the folder with the recorded windows (no part of the project; names below).
# OUT keeps the rows: started again, the grid goes on where it stopped. All studies stand on OUT/report.html.
set -eu
: "${TRACES:?the folder with the recorded windows}"
OUT=${OUT:-runs/simulation}
few="gentd_surge azure_conv_p15 mooncake_chat_q25"
small="$few gentd_evening"
all="$small gentd_falloff hyb_azconv_gentd_p20"
with() { for name in "$@"; do printf -- '--trace %s/%s.csv.gz ' "$TRACES" "$name"; done; }
compare() { turboserve compare --jobs "${JOBS:-2}" --out "$OUT" "$@"; }

# 1. The baselines' knobs (HPA, KPA, LCP, Llumnix-like, published).
compare --study tune $(with $small)
# 2. Cost at equal service, D = 30 s.
compare --study service --steps-floor 2 $(with $all) --policy turboserve --audit
compare --study service $(with $all) --policy static-least --policy static-least-resume --policy hpa:target=0.7 \
    --policy hpa:target=0.75 --policy hpa:target=0.8 --policy lcp:target=0.6 --policy lcp:target=0.7 \
    --policy llumnix:up=0.6,down=0.4 --policy llumnix:up=0.7,down=0.5
# 3. The same with random phases, five seeds.
compare --study service --steps-floor 2 --seeds 5 $(with $few) --policy turboserve --policy static-least \
    --policy hpa:target=0.7
# 4. Other delays, the other profile.
compare --study service --steps-floor 2 --provision-s 0 --provision-s 120 $(with $few) --policy turboserve \
    --policy hpa:target=0.7
compare --study service --steps-floor 2 --profile compute4 $(with $few) --policy turboserve --policy static-least \
    --policy hpa:target=0.7
# 5. Latency at equal fleets of 1.0, 1.3 and 1.6 times ceil(peak active / capacity).
compare --study latency $(with $small hyb_azconv_gentd_p20) --policy static-rr --policy static-least \
    --policy static-least-resume --policy published --policy turboserve --audit
