#!/usr/bin/env bash
# Style, types and import rules; each must be clean.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/ruff check .
.venv/bin/ruff format --check -q . || { echo "run: make format" >&2; exit 1; }
.venv/bin/mypy
.venv/bin/lint-imports --no-cache
