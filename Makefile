# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
EXAMPLE := examples/resnet20_cifar10

.PHONY: demo test lint fuzz bench bench-gpu clean

demo: .venv/installed ## convert a trained model, print the table, write demo/report.html
	mkdir -p demo
	$(BIN)/gkp-convert $(EXAMPLE)/grouped.pt --baseline $(EXAMPLE)/dense.pt --target cpu --threads 1 --dynamic-batch \
		-o demo/grouped --force --report demo/report.html
	$(BIN)/gkp verify $(EXAMPLE)/grouped.pt demo/grouped

test: .venv/installed ## every test; OpenMP threads pinned, because the machine may be shared
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest

lint: .venv/installed ## ruff, mypy and the import contract
	$(BIN)/ruff check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/check_types.py

fuzz: .venv/installed ## mutate real checkpoints 10,000 times: nothing may run, every failure is a GkpError
	$(BIN)/python tools/fuzz.py --runs 10000

bench: .venv/installed ## the standard suite; CHECKPOINTS=DIR adds the published checkpoints
	$(BIN)/gkp bench --suite cpu $(if $(CHECKPOINTS),--checkpoints $(CHECKPOINTS))

bench-gpu: ## the GPU suite, by PYTHON with torch (nothing is installed); under 8 minutes; JSON=FILE
	$(PYTHON) tools/bench_gpu.py $(or $(JSON),bench-gpu.json)

.venv/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv demo build *.egg-info
