#!/bin/sh
# Builds and runs the stress programs under the address + undefined-behaviour and the thread sanitizer.
# Usage: csrc/sanitize.sh [ROUNDS [PROGRAM...]]   (20000 rounds take about a minute)
set -eu
cd "$(dirname "$0")"
rounds=${1:-20000}
[ $# -gt 0 ] && shift
programs=${*:-stress_frame_ring stress_arena stress_copy_engine}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sources="frame_ring.cpp pinned_arena.cpp checksum.cpp copy_engine.cpp cuda_runtime.cpp"
for sanitizer in address,undefined thread; do
  echo "-fsanitize=$sanitizer:"
  flags="-std=c++17 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror"
  flags="$flags -fsanitize=$sanitizer -fno-sanitize-recover=all"
  objects=""
  for source in $sources; do
    "${CXX:-g++}" $flags -c "$source" -o "$work/$source.o"
    objects="$objects $work/$source.o"
  done
  for program in $programs; do
    "${CXX:-g++}" $flags "$program.cpp" $objects -pthread -ldl -o "$work/$program"
    # ThreadSanitizer of older compilers cannot live with much address randomisation.
    if [ "$sanitizer" = thread ] && setarch -R true 2>/dev/null; then
      setarch -R "$work/$program" "$rounds"
    else
      "$work/$program" "$rounds"
    fi
  done
done
