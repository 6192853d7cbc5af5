# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Small models gain nothing from many threads; the tests use processes instead.
ENVIRONMENT := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
WORKERS ?= 2

.PHONY: help install browser demo test lint format prove clean

help:
	@echo "make demo     install into $(VENV) and run the main job"
	@echo "make test     install, then ruff, type checker, import contract, tests"
	@echo "make browser  what the tests of the page need: playwright and, where it can, a Chromium"
	@echo "make prove    the long proofs (marker slow); output under results/"
	@echo "make lint     ruff, type checker and import contract only"
	@echo "make format   let ruff rewrite the sources"
	@echo "make clean    remove $(VENV) and caches"

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,offline]"
	touch $(STAMP)

install: $(STAMP)

browser: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[browser]"
	command -v chromium >/dev/null || test -n "$$KNOWLAB_CHROMIUM" \
	|| { apt-get update -qq && apt-get install -y -qq chromium; } \
	|| echo "no Chromium here: the tests of the page will be skipped"

demo: install
	$(BIN)/knowlab demo --out results/demo --force

lint: install
	$(BIN)/ruff check .
	$(BIN)/basedpyright --level error
	$(BIN)/lint-imports

test: lint
	$(ENVIRONMENT) $(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile

prove: install
	mkdir -p results
	$(ENVIRONMENT) $(BIN)/python -m pytest -q -m slow

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
