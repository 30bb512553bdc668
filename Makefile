# `make help` lists the targets. PYTHON chooses the interpreter that creates the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run sweep tables test test-slow methods sensitivity bench-hessian bench-quantize bench-cpu bench-decode bench-gpu parity claims audit home-ground wandb-sync dashboard lint format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY) ## Create .venv with the pinned dependencies

$(READY): pyproject.toml .constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("hawq-bench needs Python 3.11 or newer") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[dev]'
	@touch $@

run: $(READY) ## The default comparison: sweep, table in the terminal, results/tables, results/figures
	@$(BIN)/python -m harness experiment=default; status=$$?; $(BIN)/python -m harness.report table=comparison group=default && exit $$status

sweep: $(READY) ## Any sweep: make sweep ARGS="-m method=rtn,gptq budget=w3g128,w4g128"
	@$(BIN)/python -m harness $(ARGS)

tables: $(READY) ## Every table of conf/table, and figures, from records and committed CSV files alone
	@$(BIN)/python -m harness.report

test: $(READY) ## The tests that take seconds
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(READY) ## The tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

methods: $(READY) ## What there is: methods, their parts, metrics, solvers, formats
	@$(BIN)/python -m harness.catalogue

sensitivity: $(READY) ## Every sensitivity metric on a model: make sensitivity ARGS="model=tiny metrics=all"
	@$(BIN)/python -m harness.sensitivity $(ARGS)

bench-hessian: $(READY) ## Cost of sensitivity metrics against model size, and beside PyHessian
	@$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[bench]'
	@$(BIN)/python -m harness.bench hessian $(ARGS)

bench-quantize: $(READY) ## Seconds and memory of every method, and GPTQ beside its textbook form
	@$(BIN)/python -m harness.bench quantize $(ARGS)

bench-cpu: $(READY) ## CPU kernels beside torch, oneDNN and llama.cpp, against the speed of reading memory
	@$(BIN)/python -m harness.bench cpu $(ARGS)

bench-decode: $(READY) ## Tokens a second of packed models beside the same models unpacked
	@$(BIN)/python -m harness.bench decode $(ARGS)

bench-gpu: $(READY) ## Kernels and peers on a GPU; needs no more than torch, triton and numpy
	@$(BIN)/python -m kernels.bench.gpu $(ARGS)

parity: $(READY) ## Our methods beside the libraries that made them known, each in an environment of its own
	@$(BIN)/python -m harness.parity $(ARGS)

claims: $(READY) ## The survey's claims put to the test: runs what is missing; one of them: make claims ARGS="claim=C46"
	@$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[rl]'
	@$(BIN)/python -m harness.claims $(ARGS)

audit: $(READY) ## The survey's sentences about toolchains, put to the packages as published, version by version
	@$(BIN)/python -m harness.audit $(ARGS)

home-ground: $(READY) ## HAWQ where it comes from: a small CNN and a small bidirectional encoder
	@$(BIN)/python -m harness.home_ground $(ARGS)

wandb-sync: $(READY) ## Upload records, tables and figures to wandb; what is there already is skipped
	@$(BIN)/python -m harness.tracking $(ARGS)

dashboard: $(READY) ## A wandb report and workspace of the uploaded runs
	@$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[dashboard]'
	@$(BIN)/python -m harness.dashboard $(ARGS)

lint: $(READY) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove records, caches and logs; keeps .venv and committed tables
	rm -rf results/runs .cache outputs multirun wandb .pytest_cache .ruff_cache .mypy_cache
