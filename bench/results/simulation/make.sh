#!/bin/sh
# The simulations of this folder. TRACES: the folder with the recorded windows (no part of the project; names below).
# OUT keeps the rows: started again, the grid goes on where it stopped. The studies on recorded windows stand together on
# OUT/report.html; those on synthetic windows and with whole nodes have folders of their own below OUT, for their rows
# would change the averages. A part can be run alone: make.sh cost|latencies|delays|baselines|compute4|room|more|ablation|units|sweep|fleets
set -eu
: "${TRACES:?the folder with the recorded windows}"
OUT=${OUT:-runs/simulation}
small="gentd_surge gentd_evening gentd_falloff gentd_stack3 azure_conv_p15 mooncake_chat_q25 mooncake_chat_full hyb_azconv_gentd_p20"
big="azure_conv_full hyb_r1_trough hyb_flash_large hyb_r1_step hyb_r1_burst"
three="gentd_surge azure_conv_p15 mooncake_chat_q25"
few="gentd_surge azure_conv_p15 mooncake_chat_q25 hyb_azconv_gentd_p20"
with() { for name in "$@"; do printf -- '--trace %s/%s.csv.gz ' "$TRACES" "$name"; done; }
compare() { into=$1; shift; turboserve compare --jobs "${JOBS:-2}" --out "$OUT$into" "$@"; }
service() { compare "" --study service --steps-floor 2 "$@"; }
latency() { compare "" --study latency "$@"; }
fixed="--policy static-rr --policy static-least --policy static-least-resume --policy published --policy turboserve"

cost() { # Worker-hours at equal service, D = 30 s: ours, and the smallest static fleet.
    service --audit $(with $few) --policy turboserve
    service --seeds 5 $(with $small) --policy turboserve
    service --seeds 1 $(with $big) --policy turboserve
    service --seeds 5 $(with $small) --policy static-least
    service --seeds 1 $(with $big) --policy static-least
}
latencies() { # Chunk latency at equal fleets of ceil(peak / capacity), full steps.
    latency --factor 1.0 --seeds 5 $(with $small) $fixed
    latency --factor 1.0 --audit $(with $few) $fixed
    latency --factor 1.0 --seeds 1 $(with $big) $fixed
}
delays() {
    service --provision-s 0 --provision-s 120 --seeds 2 $(with $small) --policy turboserve
    service --provision-s 0 --provision-s 120 --seeds 1 $(with $big) --policy turboserve
}
baselines() { # Every knob setting on one run of each of three windows; one that serves there on eight.
    compare "" --study tune $(with $three)
    service $(with $three) --policy static-least-resume --policy slack
    service --seeds 1 $(with $small) --policy hpa:target=0.7 --policy lcp:target=0.6
    service --provision-s 0 --provision-s 120 --seeds 1 $(with $small) --policy hpa:target=0.7
    service --seeds 1 $(with hyb_flash_large hyb_r1_trough azure_conv_full) --policy hpa:target=0.7
}
compute4() {
    service --profile compute4 --seeds 5 $(with $small) --policy turboserve
    latency --profile compute4 --factor 1.0 --seeds 1 $(with $small) $fixed
    service --profile compute4 --seeds 1 $(with $small) --policy static-least
    service --profile compute4 --seeds 1 $(with $big) --policy turboserve
    service --profile compute4 --provision-s 0 --provision-s 120 --seeds 1 $(with $small) --policy turboserve
}
room() { # The same with more workers than the peak needs.
    latency --factor 1.3 --factor 1.6 --seeds 2 $(with $small) $fixed
}
ablation() {
    compare "" --study ablation --steps-floor 2 --seeds 2 $(with $few)
}
more() { # More seeds on the large windows, and of the baselines.
    service --seeds 3 $(with $big) --policy turboserve
    service --seeds 5 $(with $small) --policy hpa:target=0.7
}
units() { # Workers that come in nodes of eight.
    compare /units --study service --steps-floor 2 --unit-workers 8 --seeds 1 $(with $small hyb_r1_trough) \
        --policy turboserve --policy hpa:target=0.7
}
sweep() { # Tail of the periods' lengths x swing of demand, synthetic.
    mkdir -p "$OUT/sweep"
    for tail in 1 2 4; do for swing in 1 2 4; do
        turboserve trace synth "$OUT/sweep/tail${tail}_swing$swing.csv.gz" --kind diurnal --mean-active 40 --horizon-s 5400 \
            --tail $tail --swing $swing --seed 1 > "$OUT/sweep/synth.json"
    done; done
    compare /sweep --study latency --factor 1.0 --seeds 2 $(for f in "$OUT"/sweep/tail*.csv.gz; do printf -- '--trace %s ' "$f"; done) \
        --policy static-rr --policy static-least --policy static-least-resume --policy turboserve
    compare /sweep --study service --steps-floor 2 --seeds 2 $(for f in "$OUT"/sweep/tail*.csv.gz; do printf -- '--trace %s ' "$f"; done) \
        --policy turboserve --policy static-least
}
fleets() { # Fleets of 4 to 64 workers, synthetic.
    mkdir -p "$OUT/fleets"
    for workers in 4 8 16 32 64; do
        turboserve trace synth "$OUT/fleets/fleet$workers.csv.gz" --kind diurnal --mean-active $((workers * 9 / 4)) \
            --horizon-s 3600 --seed 2 > "$OUT/fleets/synth.json"
    done
    compare /fleets --study latency --factor 1.0 --seeds 2 $(for f in "$OUT"/fleets/fleet*.csv.gz; do printf -- '--trace %s ' "$f"; done) $fixed
    compare /fleets --study service --steps-floor 2 --seeds 2 $(for f in "$OUT"/fleets/fleet*.csv.gz; do printf -- '--trace %s ' "$f"; done) \
        --policy turboserve --policy static-least
}

for part in ${@:-cost latencies ablation baselines delays compute4 room units sweep fleets more}; do $part; done
