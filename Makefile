# fastretina: every target sets up .venv by itself and can be called on a fresh machine.
PYTHON_IN := .venv/bin/python
SHELL     := /bin/bash

# Where the sample data set, its .beton files and the runs go; what the demo makes and trains. Tests make these small.
SAMPLE       := data/sample
DATA         := data
RUNS         := runs
SAMPLE_FLAGS :=
PACK_FLAGS   :=
DEMO_FLAGS   := --recipe fast
BENCH_FLAGS  :=
BENCH_EXTRAS := dev,bench

.PHONY: demo test test-faults bench setup data clean

setup:
	@bash tools/setup.sh

data: $(DATA)/train.beton $(DATA)/test.beton

# The lab layout's last file stands for the whole folder: it is written last.
$(SAMPLE)/test_label.csv: | setup
	$(PYTHON_IN) tools/make_sample.py --out $(SAMPLE) $(SAMPLE_FLAGS)

$(DATA)/%.beton: $(SAMPLE)/test_label.csv | setup
	$(PYTHON_IN) tools/write_beton.py --root $(SAMPLE) --split $* --out $@ $(PACK_FLAGS)

# Packed with its local contrast: in so short a training most lesions are found by that alone (docs/recipe.md). At 256 px: the demo
# looks at 160.
$(DATA)/%-local.beton: $(SAMPLE)/test_label.csv | setup
	$(PYTHON_IN) tools/write_beton.py --root $(SAMPLE) --split $* --contrast local --size 256 --out $@ $(PACK_FLAGS)

demo: $(DATA)/train-local.beton $(DATA)/test-local.beton
	$(PYTHON_IN) -m fastretina.train --train $(DATA)/train-local.beton --test $(DATA)/test-local.beton --out $(RUNS)/demo $(DEMO_FLAGS)

# One thread of torch for each process: with more than there are cores they spin and steal from each other. A file to a process, in the
# order of tests/conftest.py: what a file trains for all its tests is trained once.
test: export FASTRETINA_BROWSER := 1
test: setup
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .
	$(PYTHON_IN) -m mypy
	.venv/bin/lint-imports
	OMP_NUM_THREADS=1 $(PYTHON_IN) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Every fault of docs/reliability.md in full number: twelve to twenty minutes on two cores. `make test` tries a few of each. Then the
# loader's own sweeps in full number.
test-faults: setup
	OMP_NUM_THREADS=1 $(PYTHON_IN) -m pytest -n auto --maxprocesses 2 tests/faults -m "slow_faults or not tries"
	OMP_NUM_THREADS=1 $(PYTHON_IN) -m pytest -n auto --maxprocesses 2 tests/loading -m slow_faults

bench: data
	@FASTRETINA_EXTRAS=$(BENCH_EXTRAS) bash tools/setup.sh
	$(PYTHON_IN) benchmarks/throughput.py --data $(DATA)/train.beton --json $(RUNS)/throughput.json --chart $(RUNS)/throughput.png $(BENCH_FLAGS)

clean:
	rm -rf $(DATA) $(RUNS) .pytest_cache .mypy_cache .ruff_cache
