# make demo, make test: on a fresh machine with Python 3.10 or newer, set-up included.
PYTHON ?= python3
BIN = .venv/bin
DEMO = --dataset synthetic --epochs 12 --splits 1 3 6 --cnn_lr 0.05 --lc_lr 0.01 --batch_size 25

.PHONY: demo test lint bench gpu
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python experiments.py $(DEMO) --results_dir demo --keep last --device cpu
	$(BIN)/python plot.py demo/*/ --out demo/figure.png

test: lint
	$(BIN)/python -m pytest

lint: .venv/installed-tests
	$(BIN)/ruff check .
	$(BIN)/shellcheck *.sh tests/*.sh .ci/run

bench: .venv/installed
	$(BIN)/python benchmarks/step.py

gpu: .venv/installed-tests
	$(BIN)/python benchmarks/gpu.py

.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-tests: .venv/installed tests/requirements.txt
	$(BIN)/pip install --quiet --requirement tests/requirements.txt
	touch $@
