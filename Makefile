# Two commands do everything on a fresh machine: make demo, make test.
PYTHON ?= python3
BIN := .venv/bin
EXAMPLE := examples/resnet20_cifar10
SITE ?= build/site

.PHONY: demo demo-edge test lint fuzz soak bench bench-gpu docs wheel clean

demo: .venv/installed ## convert a trained model, print the table, write demo/report.html
	mkdir -p demo
	$(BIN)/gkp-convert $(EXAMPLE)/grouped.pt --baseline $(EXAMPLE)/dense.pt --target cpu --threads 1 --dynamic-batch \
		-o demo/grouped --force --report demo/report.html
	$(BIN)/gkp verify $(EXAMPLE)/grouped.pt demo/grouped
	$(BIN)/python tools/demo_int8.py $(EXAMPLE)/grouped.pt $(EXAMPLE)/dense.pt demo/int8

demo-edge: demo/grouped/manifest.json ## split that model over 2 devices, run them here, count the bytes, compare the answers
	$(BIN)/gkp split $(EXAMPLE)/grouped.pt --devices 2 --link loopback --mode branch -o demo/edge --force
	$(BIN)/python tools/demo_edge.py demo/edge demo/grouped
	$(BIN)/python tools/demo_slow.py

demo/grouped/manifest.json:
	$(MAKE) demo

test: .venv/installed ## every test, in one process more than cores (at most 4) with one OpenMP thread each; programs are compiled once
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: .venv/installed ## ruff, mypy and the import contract
	$(BIN)/ruff check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/check_types.py

fuzz: .venv/installed ## open 10,000 mutated and generated files: nothing may run, every failure is a GkpError; RUNS=N FIRST=N
	$(BIN)/python tools/fuzz.py --runs $(or $(RUNS),10000) --first $(or $(FIRST),0)

soak: demo/grouped/manifest.json ## 10 minutes of requests on 4 local workers: answers right, memory flat; SECONDS=N
	$(BIN)/gkp split $(EXAMPLE)/grouped.pt --devices 4 --link loopback --mode spatial -o demo/soak --force -q
	$(BIN)/python tools/soak.py demo/soak demo/grouped --seconds $(or $(SECONDS),600)

bench: .venv/installed ## the standard suite; CHECKPOINTS=DIR adds the published checkpoints
	$(BIN)/gkp bench --suite cpu $(if $(CHECKPOINTS),--checkpoints $(CHECKPOINTS))

bench-gpu: ## the GPU suite, by a PYTHON with gkp[torch,gpu,trt]; under 8 minutes; JSON=FILE
	$(PYTHON) tools/bench_gpu.py $(or $(JSON),bench-gpu.json)

docs: .venv/installed ## the documentation site; warnings are errors; SITE=DIR
	$(BIN)/python -m sphinx -q -W --keep-going -E -d $(SITE)/.doctrees -c docs . $(SITE)

wheel: .venv/installed ## sdist, and the wheel built from it, in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

.venv/installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true # as pip would, on all cores; files for other Pythons are passed over
	touch $@

clean:
	rm -rf .venv demo build dist *.egg-info
