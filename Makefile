# On a fresh machine with Python 3.10 or newer, set-up included:
#   make demo          a small study on the CPU and its figure
#   make test          all tests
#   make test-oldest   those of the layer, the step and a study, on the oldest torch allowed; Python 3.10 to 3.12
#   make bench         times one training step on the CPU
#   make gpu           runs the tests of CUDA on this machine's GPU and times the study there; we expect 10 minutes.
#                      It prints a report. Please post it on this repository's issues page.
PYTHON ?= python3
BIN = .venv/bin
DEMO = --dataset synthetic --epochs 12 --splits 1 3 6 --cnn_lr 0.05 --lc_lr 0.01 --batch_size 25
OLDEST = tests/test_layers.py tests/test_fast.py tests/test_gpu.py tests/test_study.py

.PHONY: demo test test-oldest lint bench gpu
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/python experiments.py $(DEMO) --results_dir demo --keep last --device cpu
	$(BIN)/python plot.py demo/*/ --out demo/figure.png

test: lint
	$(BIN)/python -m pytest

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest $(OLDEST)

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

.venv-oldest/installed: tests/requirements-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --requirement tests/requirements-oldest.txt
	touch $@
