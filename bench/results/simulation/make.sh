#!/bin/sh
# The simulations of this folder. TRACES: the folder with the recorded windows (no part of the project; names below).
# OUT keeps the rows: started again, the grid goes on where it stopped. The studies on recorded windows stand together on
# OUT/report.html; those on synthetic windows and with whole nodes have folders of their own below OUT, for their rows
# would change the averages. A part can be run alone: make.sh cost latencies ...
# The parts up to `fleets` are what the committed rows are of; `more` names what was not run (see README.md).
set -eu
: "${TRACES:?the folder with the recorded windows}"
OUT=${OUT:-runs/simulation}
three="gentd_surge mooncake_chat_q25 azure_conv_p15"
few="$three hyb_azconv_gentd_p20"
seven="$few gentd_evening gentd_falloff gentd_stack3"
small="$seven mooncake_chat_full"
big="azure_conv_full hyb_r1_trough hyb_flash_large hyb_r1_step hyb_r1_burst"
with() { for name in "$@"; do printf -- '--trace %s/%s.csv.gz ' "$TRACES" "$name"; done; }
drawn() { for file in "$OUT/$1"/*.csv.gz; do printf -- '--trace %s ' "$file"; done; }
compare() { into=$1; shift; turboserve compare --jobs "${JOBS:-2}" --out "$OUT$into" "$@"; }
service() { compare "" --study service --steps-floor 2 "$@"; }
latency() { compare "" --study latency "$@"; }
fixed="--policy static-rr --policy static-least --policy static-least-resume --policy published --policy turboserve"

cost() { # Worker-hours at equal service, D = 30 s: ours, and the smallest static fleet.
    service --audit $(with $few) --policy turboserve
    service --seeds 5 $(with $small) --policy turboserve --policy static-least
    service --seeds 1 $(with $big) --policy turboserve
}
latencies() { # Chunk latency at equal fleets of ceil(peak / capacity), full steps.
    latency --factor 1.0 --seeds 5 $(with $seven) $fixed
    latency --factor 1.0 --seeds 1 $(with hyb_flash_large mooncake_chat_full) $fixed
}
room() { # The same with more workers than the peak needs.
    latency --factor 1.3 --factor 1.6 --seeds 1 $(with $three) $fixed
}
ablation() {
    compare "" --study ablation --steps-floor 2 --seeds 1 $(with $three)
    service --seeds 1 $(with hyb_azconv_gentd_p20) --policy turboserve:migrate=0
}
delays() {
    service --provision-s 0 --provision-s 120 --seeds 3 $(with $small) --policy turboserve
}
baselines() {
    service --seeds 1 $(with $small) --policy hpa:target=0.7
    service --seeds 1 $(with $three) --policy lcp:target=0.6 --policy kpa:target=0.5 --policy llumnix:up=0.6,down=0.4 \
        --policy published:rho=0.7 --policy lcp:target=0.7 --policy kpa:target=0.6 --policy llumnix:up=0.7,down=0.5 \
        --policy published:rho=0.5 --policy slack
    service --provision-s 0 --provision-s 120 --seeds 1 $(with $three) --policy hpa:target=0.7
}
compute4() {
    service --profile compute4 --seeds 1 $(with $small) --policy turboserve
    service --profile compute4 --seeds 1 $(with $seven) --policy static-least
    latency --profile compute4 --factor 1.0 --seeds 1 $(with $seven) $fixed
}
units() { # Workers that come in nodes of eight.
    compare /units --study service --steps-floor 2 --unit-workers 8 --seeds 1 $(with $three) --policy turboserve \
        --policy hpa:target=0.7
}
sweep() { # Tail of the periods' lengths x swing of demand, synthetic.
    mkdir -p "$OUT/sweep"
    for tail in 1 2 4; do for swing in 1 2 4; do
        turboserve trace synth "$OUT/sweep/tail${tail}_swing$swing.csv.gz" --kind diurnal --mean-active 40 \
            --horizon-s 5400 --tail $tail --swing $swing --seed 1
    done; done
    compare /sweep --study latency --factor 1.0 --seeds 1 $(drawn sweep) --policy static-rr --policy static-least \
        --policy static-least-resume --policy turboserve
    compare /sweep --study service --steps-floor 2 --seeds 1 $(drawn sweep) --policy turboserve
}
fleets() { # Windows whose peak needs just 4, 8, 16, 32 and 64 workers, synthetic.
    mkdir -p "$OUT/fleets"
    for which in "4 6 2" "8 12 2" "16 28 3" "32 64 3" "64 126 23"; do
        set -- $which
        turboserve trace synth "$OUT/fleets/fleet$1.csv.gz" --kind diurnal --mean-active "$2" --horizon-s 3600 --seed "$3"
    done
    compare /fleets --study latency --factor 1.0 $(drawn fleets) $fixed
    compare /fleets --study service --steps-floor 2 $(drawn fleets) --policy turboserve --policy hpa:target=0.7
}
more() { # Not run: five seeds everywhere, the large windows, every knob setting.
    compare "" --study tune $(with $three)
    latency --factor 1.0 --audit $(with $few) $fixed
    latency --seeds 5 $(with $small $big) $fixed
    latency --profile compute4 --seeds 5 $(with $small $big) $fixed
    for profile in k4 compute4; do
        service --profile $profile --provision-s 0 --provision-s 30 --provision-s 120 --seeds 5 $(with $small $big) \
            --policy turboserve --policy hpa:target=0.7
        service --profile $profile --seeds 5 $(with $small $big) --policy static-least
    done
    compare "" --study ablation --steps-floor 2 --seeds 5 $(with $small)
}

for part in ${@:-cost latencies room ablation delays baselines compute4 units sweep fleets}; do $part; done
