#!/bin/sh
# Builds and runs the ring's stress test under the address + undefined-behaviour and the thread sanitizer.
# Usage: csrc/sanitize.sh [RECORDS]   (20000 takes about half a minute)
set -eu
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for sanitizer in address,undefined thread; do
  "${CXX:-g++}" -std=c++17 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion -Werror \
    "-fsanitize=$sanitizer" -fno-sanitize-recover=all stress_frame_ring.cpp frame_ring.cpp -pthread -o "$work/stress"
  echo "-fsanitize=$sanitizer:"
  # ThreadSanitizer of older compilers cannot live with much address randomisation.
  if [ "$sanitizer" = thread ] && setarch -R true 2>/dev/null; then
    setarch -R "$work/stress" "${1:-20000}"
  else
    "$work/stress" "${1:-20000}"
  fi
done
