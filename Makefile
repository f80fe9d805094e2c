# make demo: the main job on the bundled model. make test: the tests. make docs: the site, in out/site.
# Everything installs into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := out/fable-7m-3bit
# what pip would compile one file at a time, and hardly anybody imports: it is compiled where it is imported
SELDOM := /tests/|/pip/|transformers/models/|ray/(serve|rllib|tune|train|data|air|dashboard|autoscaler|llm)/
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test check docs slow bench-setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '$(SELDOM)' .venv/lib || true
	touch $(STAMP)

demo: $(STAMP)
	rm -rf $(DEMO) $(DEMO).work
	$(BIN)/tersor compress examples/fable-7m $(DEMO) --rate 3

# two processes of one thread each; a file stays whole, so that what its tests share is made once; in the order of the
# folders, which has the long files first
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check src tests bench tools
	NODE_OPTIONS=--max-semi-space-size=128 $(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tools/check_house.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench-setup: $(STAMP)
	bash bench/setup.sh

clean:
	rm -rf .venv .venv-* out
