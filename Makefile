# `make serve` and `make test` work on a fresh clone: each makes .venv first, and again only when its inputs changed.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
PORT ?= 8000
MODEL ?= shapes
ARGS ?=
BIN := .venv/bin

# One compute thread a process: two collapse on a busy machine, and OpenBLAS breaks the Triton interpreter's timing.
export OMP_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1

SCHEDULES ?= 10000
SEEDS ?= 1000
FAULTS ?= 100
JOBS ?= $(shell nproc)

MINUTES ?= 20
.PHONY: soak simnet mutants soak-worker-kill soak-migrate soak-controller-kill soak-gateway-kill soak-drain help setup serve test gpu lint format bench score screenshots demo-video clean sanitize

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.ready  ## .venv with TurboServe in it, nothing else

INPUTS := pyproject.toml setup.py constraints.txt scripts/setup.sh $(wildcard csrc/*)

.venv/.ready: $(INPUTS)
	@PYTHON="$(PYTHON)" bash scripts/setup.sh

.venv/.dev: $(INPUTS)
	@PYTHON="$(PYTHON)" bash scripts/setup.sh dev

serve: setup  ## start the server with the embedded model: make serve PORT=8000 MODEL=shapes ARGS="--workers 2"
	@exec $(BIN)/turboserve serve $(MODEL) --port $(PORT) $(ARGS)

test: .venv/.dev  ## set up, then lint, types, import rules and the whole test suite
	@bash scripts/test.sh $(ARGS)

gpu: .venv/.dev  ## every GPU test and bench within 8 minutes, on a machine that has a GPU
	@bash scripts/gpu.sh

lint: .venv/.dev  ## ruff, mypy, import rules
	@bash scripts/lint.sh

format: .venv/.dev  ## let ruff rewrite
	@$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .

bench: setup  ## the benches that run on this machine; rows go to bench/results/
	@$(BIN)/turboserve bench frame-ring --out bench/results/ $(ARGS)
	@$(BIN)/turboserve bench coalescing --out bench/results/ $(ARGS)
	@$(BIN)/turboserve bench offload --out bench/results/ $(ARGS)
	@$(BIN)/turboserve bench migrate --out bench/results/ $(ARGS)

sanitize:  ## csrc/ under the address, undefined-behaviour and thread sanitizers
	@csrc/sanitize.sh $(ARGS)

simnet: .venv/.dev  ## the real protocol code under a seeded network with faults: make simnet SCHEDULES=10000
	@$(BIN)/python tests/simnet/simnet.py --schedules $(SCHEDULES) --jobs $(JOBS) $(ARGS)

soak-worker-kill soak-migrate soak-controller-kill soak-gateway-kill soak-drain: soak-%: .venv/.dev  # real processes, FAULTS faults
	@$(BIN)/python tests/reliability/faults.py $* --count $(FAULTS) --out bench/results/reliability.$*.json $(ARGS)

soak: .venv/.dev  ## every fault at random, MINUTES long (1440: a day and a night), the arena's ledger read after each
	@$(BIN)/python tests/reliability/soak.py --minutes $(MINUTES) --out bench/results/reliability.soak.json $(ARGS)

mutants: .venv/.dev  ## deliberate bugs in the protocol code: each must be caught within SEEDS schedules
	@$(BIN)/python tests/simnet/simnet.py --mutants --seeds $(SEEDS) --jobs $(JOBS) $(ARGS)

score: setup  ## score the embedded model's videos against their prompts (about 12 minutes of one core)
	@$(BIN)/turboserve score-shapes --full --out bench/results/shapes-score.$$(nproc)-core-$$(uname -m).json $(ARGS)

screenshots: .venv/.dev  ## take the README's pictures anew
	@$(BIN)/python docs/make_screenshots.py

demo-video: .venv/.dev  ## film "Pull the plug on a worker" on a real fleet: docs/images/plug.mp4 and its still
	@$(BIN)/python docs/make_demo_video.py $(ARGS)

clean:  ## remove what the build made
	rm -rf .venv build *.egg-info turboserve/*.so .pytest_cache .mypy_cache .ruff_cache
