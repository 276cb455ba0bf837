#!/usr/bin/env bash
# Makes .venv and installs TurboServe into it (editable). `setup.sh dev` adds what the tests need.
# Runs again in seconds when nothing changed. Never pulls a CUDA build of torch where no GPU is and a CPU wheel is at hand.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "TurboServe needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version 2>&1 || echo missing). Try: make setup PYTHON=python3.12"
    exit 1
fi
if [ ! -x .venv/bin/python ]; then
    say "making .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv .venv || {
        say "venv failed; on Debian: apt-get install python3-venv"
        exit 1
    }
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

extra=""
stamp=.venv/.ready
if [ "${1:-}" = dev ]; then
    extra="[dev]"
    stamp=.venv/.dev
fi
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null; then
    say "no C++ compiler here: the frame ring will run in Python (slower, same results); apt-get install g++ makes it native"
fi
say "installing TurboServe$extra (the first time takes a minute or two)"
# --prefer-binary and the constraints file keep pip at the wheels this was tested with.
log=.venv/pip.log
if ! pip install --prefer-binary -c constraints.txt -e ".$extra" >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    say "pip failed; the whole log is in $log"
    exit 1
fi
if [ ! -e /proc/driver/nvidia/version ]; then
    .venv/bin/python - <<'PY'
import importlib.metadata, sys

version = importlib.metadata.version("torch")
names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
if any(name and name.startswith("nvidia-") for name in names):
    print(f"note: torch {version} came with CUDA libraries (some GB) though this machine has no GPU; "
          "a CPU wheel was not at hand", file=sys.stderr)
PY
fi
touch .venv/.ready "$stamp" # what the tests need contains what the server needs
