#!/usr/bin/env bash
# `make gpu`: every GPU test and bench within 8 minutes; rows go to bench/results/. Needs a GPU and says so without one.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON_BIN:-.venv/bin/python}
OUT=${OUT:-bench/results/}
LIMIT_S=${LIMIT_S:-480}
unset TRITON_INTERPRET
export TURBOSERVE_ON_GPU=1 # tests/conftest.py turns the interpreter on elsewhere

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "make gpu needs an NVIDIA GPU that torch can use; here is none. Nothing was tested or measured." >&2
    "$PYTHON" -m turboserve doctor --device cuda 2>&1 | grep -A2 -E "^failed +(torch|driver|triton|nccl)" >&2
    exit 1
fi

started=$SECONDS
failed=()
# Runs one step in what is left of the time; a step that fails or finds no time left is named at the end.
step() {
    local name=$1 most=$2 left=$((LIMIT_S - (SECONDS - started)))
    shift 2
    if ((left < 5)); then
        failed+=("$name (no time left)")
        return
    fi
    echo "== $name" >&2
    timeout --kill-after=5 "$((most < left ? most : left))" "$@" || failed+=("$name (exit $?)")
}

# -p no:cacheprovider: the checkout may be read-only. GPU tests run apart from those that need Triton's interpreter.
step "kernel and model tests" 200 "$PYTHON" -m pytest -m "gpu and not multi_gpu" -p no:cacheprovider tests/gpu
step "engine and pool tests" 60 "$PYTHON" -m pytest -m "gpu and not multi_gpu" -p no:cacheprovider tests/runtime
if (($("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') > 1)); then
    step "tests of several GPUs" 60 "$PYTHON" -m pytest -m multi_gpu -p no:cacheprovider tests
fi
step "bench kernels" 150 "$PYTHON" -m turboserve bench kernels --device cuda --out "$OUT"
step "bench coalescing" 60 "$PYTHON" -m turboserve bench coalescing --device cuda --sessions 1,4,16 --out "$OUT"
step "bench wan" 90 "$PYTHON" -m turboserve bench wan --device cuda --rounds 5 --out "$OUT"
for name in offload migrate; do
    step "bench $name" 45 "$PYTHON" -m turboserve bench "$name" --out "$OUT"
done
echo "make gpu took $((SECONDS - started)) s" >&2
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
