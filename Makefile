# make demo   the main job, on real clinical text (a CPU is enough)
# make paper  what continued pre-training adds to tuning: every arm and strategy, four seeds (two cores, 20 minutes)
# make test   everything that is quick
# make prove  everything that is too long for that
PYTHON ?= python3
BIN := .venv/bin
# A process a core, each with the tests of one file after another; a test computes on one thread.
PYTEST := -m pytest -n $(shell env -u OMP_NUM_THREADS nproc) --dist loadfile
SOURCES := pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: demo paper test lint prove clean

demo: .venv/demo
	$(BIN)/python -m tokenmill.bench.demo --output runs/demo

paper: .venv/paper
	$(BIN)/python -m tokenmill.bench.paper --output runs/paper

test: .venv/test .venv/megablocks
	$(BIN)/python $(PYTEST) -m "not slow"

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The whole suite with the pinned torch; the quick one, which compiles every kernel too, and the rehearsal of a GPU visit
# with the oldest that is supported, whose build brings 5 GB of CUDA along.
prove: .venv/test .venv/megablocks .venv-oldest/test .venv-oldest/megablocks
	$(BIN)/python $(PYTEST)
	.venv-oldest/bin/python $(PYTEST) -m "not slow"
	.venv-oldest/bin/tokenmill bench gpu --rehearse --output build/rehearsal

# An environment: the marker file is the extra that was installed, and when.
.venv/%: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	rm -rf build/names && mkdir -p build/names/tokenmill
	ln -s ../../../kernels ../../../trainer ../../../data ../../../bench ../../../csrc/_C.pyi build/names/tokenmill
	touch $@

.venv-oldest/%: $(SOURCES)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt '.[$*]'
	touch $@

# MegaBlocks' own requirements name an old torch; of its package only the Python files are wanted.
.venv/megablocks .venv-oldest/megablocks: %/megablocks: %/test
	TORCH_CUDA_ARCH_LIST=9.0 $*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation -C--global-option=build_py -C--build-option=--skip-build \
		megablocks==0.10.0 stanford-stk==0.7.1
	touch $@

clean:
	rm -rf .venv .venv-oldest build runs
