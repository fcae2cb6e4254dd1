# make demo   the main job, on real clinical text (a CPU is enough)
# make test   everything that is quick
# make prove  everything that is too long for that
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: demo test lint prove clean

demo: .venv/demo
	$(BIN)/python -m tokenmill.bench.demo --output runs/demo

test: .venv/test
	$(BIN)/python -m pytest -m "not slow"

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

prove: .venv/test
	$(BIN)/python -m pytest

# One environment; the marker file is the extra that was installed, and when.
.venv/%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	rm -rf build/names && mkdir -p build/names/tokenmill
	ln -s ../../../kernels ../../../trainer ../../../data ../../../bench ../../../csrc/_C.pyi build/names/tokenmill
	touch $@

clean:
	rm -rf .venv build runs
