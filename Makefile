# `make demo` and `make test` are all that a newcomer needs; both work from a fresh clone with Python 3.11 and its pip.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO := runs/demo

.PHONY: demo test test-slow test-real test-browser screenshots chromium test-wheel lint prose types docs figures notebooks bench bench-gpu sizing \
  example example-real support ci constraints clean check audit faults fuzz selftest soak mutants lock locked

demo: $(VENV)/installed-all
	$(BIN)/reasonscope demo --out $(DEMO)
	@echo "To look at it in the browser: $(BIN)/reasonscope app $(DEMO)"

test: $(VENV)/installed-all-test chromium
	REASONSCOPE_EXTRAS=all,test OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

test-slow: $(VENV)/installed-all-test chromium
	$(BIN)/python -m pytest -m slow

# What needs real weights: REASONSCOPE_REAL_MODEL=Qwen/Qwen2.5-0.5B-Instruct make test-real
test-real: $(VENV)/installed-all-test
	$(BIN)/python -m pytest -m 'slow or not slow' tests/real tests/probes/generation/test_real_thinking.py tests/probes/models/test_chat_rendering.py

test-browser: $(VENV)/installed-all-test chromium
	$(BIN)/python -m pytest -m 'slow or not slow' tests/app/pages/test_smoke.py tests/app/pages/test_chromium.py

# Every view of the app at both widths, for the README and the docs; look at them before you keep them.
screenshots: $(VENV)/installed-all-test chromium
	REASONSCOPE_SCREENSHOTS=docs/images $(BIN)/python -m pytest -m slow tests/app/pages/test_chromium.py -k fits
	$(BIN)/python docs/images/shrink.py docs/images/app-*.png

# The tests in the browser need Chromium. Root of a Debian gets it here; for anybody else they are skipped and say how to install it.
chromium:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null \
	  || { [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qq -y --no-install-recommends chromium; } > /dev/null 2>&1; } || true

# Every family of transformers on a tiny random model, by each engine: docs/support.md. Takes some minutes.
support: $(VENV)/installed-all
	$(BIN)/python -m reasonscope.probes.checks.all_families

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python .ci/prose.py

# How many phrases of .ci/prose.py each folder has; `.venv/bin/python .ci/prose.py data/text` lists those of a folder.
prose: $(BIN)/python
	$(BIN)/python .ci/prose.py --table

types: $(VENV)/installed-dev
	cd .types && ../$(BIN)/mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache

# The suite against the built wheel: an environment of its own that holds the wheel and borrows every dependency from the first.
# The borrowing is by a path file, whose folders Python searches without obeying the path files in them: the checkout, which the
# first environment knows through such a file, cannot be imported here.
test-wheel: $(VENV)/installed-all-test
	rm -rf build
	$(PIP) wheel --quiet --no-deps --wheel-dir build/dist .
	$(BIN)/python -m venv --without-pip build/venv
	$(PIP) --python build/venv/bin/python install --quiet --no-deps build/dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(build/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	mkdir build/elsewhere
	cd build/elsewhere && OMP_NUM_THREADS=1 REASONSCOPE_TEST_WHEEL=1 ../venv/bin/python -m pytest --numprocesses auto -c ../../pyproject.toml --rootdir ../.. ../../tests

# The site in build/site: it opens from the folder, and asks no other host for anything.
docs: $(VENV)/installed-dev
	$(BIN)/python -m typer reasonscope.app.cli utils docs --name reasonscope --title 'Command line' --output docs/cli.md
	$(BIN)/python docs/api.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	! grep -rE '<(script|link|img)[^>]*(src|href)="?https?:[^>]*' build/site --include='*.html'

# What the pages show of the example run; needs chromium.
figures: $(VENV)/installed-dev
	$(BIN)/python docs/images/draw.py

# Runs them and keeps no outputs.
notebooks: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --nbmake docs/notebooks

# Writes docs/benchmarks.md, in about forty minutes on two idle cores; BENCH=--small only tries the scripts (build/benchmarks.md), and
# BENCH='--only files suppression' measures these parts again and keeps the other sections. Every finished part is written at once.
# The scripts in docs/experiments measure findings, not speed; they take arguments and more time, as docs/analysis.md says.
bench: $(VENV)/installed-all-test chromium
	$(BIN)/python benchmarks/page.py $(BENCH)

# Says so without an accelerator; `make bench` keeps those rows open.
bench-gpu: $(VENV)/installed-all
	$(BIN)/python benchmarks/with_gpu.py

# The tables of docs/scale.md.
sizing: $(VENV)/installed-all
	$(BIN)/python docs/sizing.py

# The run that the app opens by default; record it again after training the organism again.
example: $(VENV)/installed-all
	$(BIN)/reasonscope organism example --out app/example

# The real example, from the folder of the study of a real model: make example-real STUDY=studies/gsm8k LICENCE=path/to/GSM8K/LICENSE
example-real: $(VENV)/installed-all
	$(BIN)/reasonscope study-example $(STUDY) --licence $(LICENCE) --out app

ci:
	.ci/run

# What a change has to pass, and what its dependencies are known for. pip-audit asks PyPI, so it needs the network; a package that it
# cannot look up is an error.
check: lint types test audit

audit: $(VENV)/installed-dev
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml data probes steering analysis app
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# Fifty readers of the app for five minutes.
soak: $(VENV)/installed-all-test
	REASONSCOPE_SOAK_SECONDS=300 $(BIN)/python -m pytest -m slow tests/app/server/test_sessions.py

# Minutes each, some of them tens of minutes: kills at 250 instants and every byte of a store; 100,000 hostile inputs; 1,000 simulated
# runs of every interval and p-value; a sample of mutants.
faults: $(VENV)/installed-all-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow or not slow' tests/faults

fuzz: $(VENV)/installed-all-test
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/faults/fuzz.py --inputs 100000

selftest: $(VENV)/installed-all-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/selftest/simulate.py --workers 2 --out docs/statistics.md

mutants: $(VENV)/installed-all-test
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py --out docs/mutants.md

# One file per set of extras says that they are installed; newer requirements or pins make it out of date.
$(VENV)/installed-all: EXTRAS := all
$(VENV)/installed-all-test: EXTRAS := all,test
$(VENV)/installed-dev: EXTRAS := dev
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; say which: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The newest versions that fit each other and this torch, from an environment made for the purpose. Run the tests before you keep them.
TORCH := torch==2.13.0
constraints:
	$(PYTHON) -m venv build/newest
	build/newest/bin/pip install '.[dev]' $(TORCH)
	head -n 2 constraints.txt > build/constraints.txt
	build/newest/bin/pip freeze --all --exclude reasonscope --exclude pip | sed 's/+cpu$$//' >> build/constraints.txt
	mv build/constraints.txt constraints.txt

# The same, with the hash of every file: see the head of requirements.lock.
lock: | $(BIN)/python
	mkdir -p build
	$(PIP) install --dry-run --ignore-installed --quiet --report build/report.json --constraint constraints.txt '.[dev]'
	$(BIN)/python .ci/lock.py build/report.json > requirements.lock

locked: | $(BIN)/python
	$(PIP) install --require-hashes --no-deps --extra-index-url https://download.pytorch.org/whl/cpu --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $(VENV)/installed-all $(VENV)/installed-all-test $(VENV)/installed-dev

clean:
	rm -rf $(VENV) build dist *.egg-info
