# `make fit` and `make test` do everything on a fresh machine that has only Python 3.11 or later and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: fit test install check clean

fit: install  ## learn dense correspondence from unlabelled clips, on whatever machine this is
	$(BIN)/trackpl fit --config configs/crw_multiscale.yaml

test: install check  ## everything that CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy data_prep/trackpl_prep plugins/trackpl_crw plugins/trackpl_locotrack plugins/trackpl_cotracker

install: $(READY)

# torch goes first and by its exact version: a looser request may fetch a build with gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "trackpl needs Python 3.11 or later; call make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,wandb]"
	touch $@

clean:
	rm -rf $(VENV) runs
