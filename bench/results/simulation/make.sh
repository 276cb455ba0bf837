#!/bin/sh
# The simulations of this folder. TRACES: the folder with the recorded windows (no part of the project; names below).
# OUT keeps the rows: started again, the grid goes on where it stopped. The studies on recorded windows stand together on
# OUT/report.html; those on synthetic windows, with whole nodes and on modelled GPUs have folders of their own below OUT,
# for their rows would change the averages. A part can be run alone: make.sh cost latencies ...
set -eu
: "${TRACES:?the folder with the recorded windows}"
OUT=${OUT:-runs/simulation}
three="gentd_surge mooncake_chat_q25 azure_conv_p15"
few="$three hyb_azconv_gentd_p20"
small="$few gentd_evening gentd_falloff gentd_stack3 mooncake_chat_full"
big="azure_conv_full hyb_r1_trough hyb_flash_large hyb_r1_step hyb_r1_burst"
both="--profile k4 --profile compute4"
every="--provision-s 0 --provision-s 30 --provision-s 120"
fixed="--policy static-rr --policy static-least --policy static-least-resume --policy published --policy turboserve"
with() { for name in "$@"; do printf -- '--trace %s/%s.csv.gz ' "$TRACES" "$name"; done; }
drawn() { for file in "$OUT/$1"/*.csv.gz; do printf -- '--trace %s ' "$file"; done; }
compare() { into=$1; shift; turboserve compare --jobs "${JOBS:-2}" --out "$OUT$into" "$@"; }
service() { compare "" --study service --steps-floor 2 "$@"; }
latency() { compare "" --study latency "$@"; }

cost() { # Worker-hours at equal service: ours, HPA, the smallest static fleet (which knows no delay).
    service $both $every --seeds 5 $(with $small) --policy turboserve --policy hpa:target=0.7
    service $both --seeds 5 $(with $small) --policy static-least
    service $both $every --seeds 5 $(with $big) --policy turboserve
    service $both --seeds 1 $(with $big) --policy static-least --policy hpa:target=0.7
}
latencies() { # Chunk latency at equal fleets of ceil(peak / capacity) times 1.0, 1.3 and 1.6, full steps.
    latency $both --seeds 5 $(with $small) $fixed
    latency $both --factor 1.0 --seeds 5 $(with $big) $fixed
}
tuning() { # Every knob setting of every baseline that declares some.
    compare "" --study tune $every $both $(with $three)
}
baselines() { # The other ones that need a fleet found.
    service $both --seeds 1 $(with $small) --policy static-least-resume --policy static-memory --policy slack
}
others() { # Two settings of every other scaling one on the windows that tuning leaves out.
    service $both $every --seeds 1 $(with hyb_azconv_gentd_p20 gentd_evening gentd_falloff gentd_stack3 mooncake_chat_full) \
        --policy lcp:target=0.9 --policy lcp:target=0.7 --policy kpa:target=0.4 --policy kpa:target=0.6 \
        --policy llumnix:up=0.9,down=0.7 --policy llumnix:up=0.7,down=0.5 --policy published:rho=0.9 --policy published:rho=0.5
}
ablation() {
    compare "" --study ablation --steps-floor 2 --seeds 5 $(with $small)
}
audits() { # Held against every rule.
    service --audit $(with $few) --policy turboserve
    service --provision-s 0 --provision-s 120 --audit $(with $few) --policy turboserve
    service --profile compute4 --audit $(with $few) --policy turboserve --policy hpa:target=0.7
    latency --factor 1.0 --audit $(with $few) $fixed
}
units() { # Workers that come in nodes of eight.
    compare /units --study service --steps-floor 2 --unit-workers 8 --seeds 5 $(with $small) --policy turboserve \
        --policy hpa:target=0.7
}
sizes() { # Modelled GPUs and models.
    for model in 1.3b-h100 1.3b-h200 1.3b-b300 14b-h100x4 14b-h200x4 14b-b300; do
        compare /sizes --study service --steps-floor 2 --seeds 1 --profile $model $(with $few) --policy turboserve \
            --policy static-least --policy hpa:target=0.7
    done
}
sweep() { # Tail of the periods' lengths x swing of demand, synthetic.
    mkdir -p "$OUT/sweep"
    for tail in 1 2 4; do for swing in 1 2 4; do
        turboserve trace synth "$OUT/sweep/tail${tail}_swing$swing.csv.gz" --kind diurnal --mean-active 40 \
            --horizon-s 5400 --tail $tail --swing $swing --seed 1
    done; done
    compare /sweep --study latency --factor 1.0 --seeds 5 $(drawn sweep) --policy static-rr --policy static-least \
        --policy static-least-resume --policy turboserve
    compare /sweep --study service --steps-floor 2 --seeds 5 $(drawn sweep) --policy turboserve --policy static-least
}
fleets() { # Windows whose peak needs just 4, 8, 16, 32, 64 and about 256 workers, synthetic.
    mkdir -p "$OUT/fleets"
    for which in "4 6 2" "8 12 2" "16 28 3" "32 64 3" "64 126 23" "256 505 5"; do
        set -- $which
        turboserve trace synth "$OUT/fleets/fleet$1.csv.gz" --kind diurnal --mean-active "$2" --horizon-s 3600 --seed "$3"
    done
    compare /fleets --study latency --factor 1.0 $(drawn fleets) $fixed
    compare /fleets --study service --steps-floor 2 $(drawn fleets) --policy turboserve --policy hpa:target=0.7
}

for part in ${@:-cost latencies tuning baselines others ablation audits units sizes sweep fleets}; do $part; done
