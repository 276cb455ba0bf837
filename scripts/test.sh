#!/usr/bin/env bash
# Everything `make test` promises: lint, types, import rules, then the suite. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null && ! command -v google-chrome >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing chromium for the browser tests" >&2
        apt-get update -qq >/dev/null && apt-get install -y -qq chromium >/dev/null
    else
        echo "the browser tests need Chromium: apt-get install chromium (or your system's way)" >&2
        exit 1
    fi
fi
# Types and import rules take a minute of one core, tests of real processes mostly wait: beside each other.
.venv/bin/ruff check . || exit 1
lint_log=$(mktemp)
trap 'rm -f "$lint_log"' EXIT
bash scripts/lint.sh >"$lint_log" 2>&1 &
lint=$!
# Where there is a compiler the C++ frame ring must have been built; a test then fails instead of testing one twin only.
if command -v c++ >/dev/null || command -v g++ >/dev/null; then export TURBOSERVE_EXPECT_NATIVE=1; fi
tests=0
# Two files at a time. ARGS="-n 0" runs all in one process.
.venv/bin/python -m pytest -n 2 --dist loadfile "$@" || tests=$?
wait "$lint" || { cat "$lint_log" >&2; exit 1; }
cat "$lint_log"
exit "$tests"
