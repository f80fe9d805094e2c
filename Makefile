# make demo: the main job on the bundled model. make test: the tests. Everything installs into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := out/fable-7m-3bit

.PHONY: setup demo test check slow bench-setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	rm -rf $(DEMO) $(DEMO).work
	$(BIN)/tersor compress examples/fable-7m $(DEMO) --rate 3

test: $(STAMP)
	$(BIN)/python -m pytest

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check src tests bench tools
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/check_house.py

bench-setup: $(STAMP)
	bash bench/setup.sh

clean:
	rm -rf .venv .venv-* out
