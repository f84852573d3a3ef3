# fastretina: each target sets up .venv by itself and can be called on a fresh machine.
PYTHON_IN := .venv/bin/python
SAMPLE    := data/sample
SHELL     := /bin/bash

.PHONY: demo test bench setup data lint clean

setup:
	@bash tools/setup.sh

# The sample data set, made from a real photograph, packed as a user would pack the real one.
data: data/train.beton data/test.beton

$(SAMPLE)/test_label.csv: | setup
	$(PYTHON_IN) tools/make_sample.py --out $(SAMPLE)

data/%.beton: $(SAMPLE)/test_label.csv | setup
	$(PYTHON_IN) tools/write_beton.py --root $(SAMPLE) --split $* --out $@

demo: setup data
	$(PYTHON_IN) -m fastretina.train --arch resnet18 --resolution 128 --epochs 5 --batch-size 16 --amp --out runs/demo --resume never
	@echo "Open runs/demo/report.html in a browser."

test: setup
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .
	$(PYTHON_IN) -m mypy
	$(PYTHON_IN) -m pytest

bench: data
	@FASTRETINA_EXTRAS=dev,bench bash tools/setup.sh
	$(PYTHON_IN) benchmarks/throughput.py --data data/train.beton --json runs/throughput.json --chart runs/throughput.png

clean:
	rm -rf data runs .pytest_cache .mypy_cache .ruff_cache
