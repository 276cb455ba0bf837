#!/bin/sh
# Everything in this folder. TRACES: the folder with the recorded windows (not part of the project; the names are below).
# OUT: where rows are kept, so that an interrupted run goes on. Without TRACES only the synthetic sweep is made.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
OUT=${OUT:-runs/simulation}
JOBS=${JOBS:-2}
small="gentd_surge gentd_evening azure_conv_p15 mooncake_chat_q25"
more="gentd_falloff hyb_azconv_gentd_p20"
flags() { for name in "$@"; do printf -- '--trace %s/%s.csv.gz ' "$TRACES" "$name"; done; }
compare() { turboserve compare --profile k4 --jobs "$JOBS" "$@"; }
keep() { for file in summary.json report.html; do cp "$1/$file" "$here/$2.$file"; done; }

if [ -n "${TRACES:-}" ]; then
    # The baselines' knobs on four windows; the other two of the service study are new to them.
    compare --study tune $(flags $small) --out "$OUT/tune"
    cp "$OUT/tune/tuned.json" "$here/tuned.json"
    keep "$OUT/tune" tune
    compare --study service --steps-floor 2 --tuned "$OUT/tune/tuned.json" $(flags $small $more) \
        --policy static-least --policy static-least-resume --policy hpa --policy kpa --policy llumnix --policy lcp \
        --policy published --policy turboserve --audit --out "$OUT/service"
    keep "$OUT/service" service
    compare --study latency $(flags $small $more) --policy static-rr --policy static-least \
        --policy static-least-resume --policy published --policy turboserve --audit --out "$OUT/latency"
    keep "$OUT/latency" latency
fi

# Where the gain ends: synthetic windows with 1, 2 and 4 times the tail of period lengths and the demand's swing.
mkdir -p "$OUT/sweep"
sweep=""
for tail in 1 2 4; do
    for swing in 1 2 4; do
        file="$OUT/sweep/tail${tail}swing${swing}_synthetic.csv.gz"
        [ -f "$file" ] || turboserve trace synth "$file" --kind diurnal --horizon-s 3600 --mean-active 30 \
            --swing "$(echo "$swing * 0.35" | bc)" --tail "$tail" --seed 7
        sweep="$sweep --trace $file"
    done
done
# shellcheck disable=SC2086
compare --study service --steps-floor 2 $sweep --policy static-least --policy hpa --policy turboserve --out "$OUT/sweep"
keep "$OUT/sweep" sweep
