#!/bin/sh
# Draws the windows of this folder again; every one is synthetic, and equal seeds give equal bytes.
set -eu
cd "$(dirname "$0")"
synth() { turboserve trace synth "$@"; }
synth synthetic_steady.csv.gz --kind steady --horizon-s 1800 --mean-active 20 --seed 1
synth synthetic_modulated.csv.gz --kind modulated --horizon-s 2400 --mean-active 30 --seed 2
synth synthetic_diurnal.csv.gz --kind diurnal --horizon-s 3600 --mean-active 30 --seed 3
synth synthetic_flash.csv.gz --kind flash --horizon-s 2400 --mean-active 25 --seed 4
synth synthetic_heavy_tail.csv.gz --kind modulated --lengths pareto --horizon-s 2400 --mean-active 30 --seed 5
synth synthetic_tenants.csv.gz --kind steady --horizon-s 1800 --mean-active 30 --tenant-loads 1,1,10 --seed 6
