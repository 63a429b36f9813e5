# Every target first makes .venv where it is missing or half made, and brings it up to date where the requirements changed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format bench clean

demo: $(STAMP)
	$(BIN)/mbrl demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	@test -n "$(NAME)" || { echo "usage: make bench NAME=<a file of experiments/benches> [ARGS=...]" >&2; exit 2; }
	$(BIN)/python experiments/bench.py $(NAME) $(ARGS)

# torch goes first, by its exact pin, so that no other package's requirement chooses another build of it. The stamp comes
# last: an environment whose making was interrupted has none, and is made again from nothing.
$(STAMP): pyproject.toml constraints.txt
	test -e $@ || rm -rf .venv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=<its path>")'
	test -e $@ || $(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist runs .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
