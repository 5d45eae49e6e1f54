# make run | stop | test | check | bench | crash | soak | fuzz | clean
# Everything is made in this folder: .venv (what is installed) and .run (what the demo writes). No cache outside is used.

PORT ?= 8642
PYTEST_ARGS ?=
VENV ?= .venv
# Candidates for the interpreter. PYTHON=/path/to/python says which one.
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)

bin := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_CACHE_DIR = 1
export PIP_ROOT_USER_ACTION = ignore

.PHONY: help run stop test check bench crash soak fuzz clean
.DELETE_ON_ERROR:

help:
	@echo "make run    install procman in $(VENV), start the demo (etc/demo), show its status and an answer of its site"
	@echo "make stop   stop the demo"
	@echo "make test   run the tests          (PYTEST_ARGS='-k logs' for some of them)"
	@echo "make check  ruff, mypy --strict, the test of the layers, and counts of what procman does beside those on record"
	@echo "make bench  measure, beside its peers: 30 minutes (BENCH_ARGS='--quick', 'boot status', '--json FILE')"
	@echo "make crash  let the supervisor die at every boundary that it crosses: minutes (CRASH_ARGS='--every 5')"
	@echo "make soak   make crash, kill it under load, 1,000 crash loops, and 100,000 restarts: minutes (SOAK_ARGS='--minutes 120' for hours)"
	@echo "make fuzz   feed hostile input to all that procman reads: minutes (FUZZ_ARGS='--seed 7 table', '--guided 60')"
	@echo "make clean  remove what all of these made"

run: $(VENV)/installed
	@$(bin)/python etc/demo/demo.py run --port $(PORT)

stop:
	@if [ -x $(bin)/python ]; then $(bin)/python etc/demo/demo.py stop; else echo "The demo does not run."; fi

test: $(VENV)/installed-dev
	$(bin)/python -m tests.shares $(PYTEST_ARGS)

check: $(VENV)/installed-dev
	$(bin)/ruff check
	$(bin)/mypy
	$(bin)/python -m pytest -q tests/test_layers.py
	$(bin)/python -m tests.guard

# The peers go to .run/bench, with a procman that is really installed. What can't be had is said and left out.
bench: $(VENV)/installed-dev
	$(bin)/python -m tests.bench.install
	$(bin)/python -m tests.bench --json .run/bench.json $(BENCH_ARGS)

crash: $(VENV)/installed-dev
	$(bin)/python -m tests.guarantees crash $(CRASH_ARGS)

soak: crash
	$(bin)/python -m tests.guarantees kill
	$(bin)/python -m tests.guarantees modes
	$(bin)/python -m tests.guarantees loops
	$(bin)/python -m tests.guarantees soak $(SOAK_ARGS)

# Fuzzing that coverage guides needs a wheel that only some systems have; without it, the run says what it leaves out.
fuzz: $(VENV)/installed-dev
	@$(bin)/python -c 'import atheris' 2>/dev/null \
	  || $(bin)/python -m pip install --quiet --only-binary=:all: --editable '.[fuzz]' >/dev/null 2>&1 || true
	$(bin)/python -m tests.guarantees fuzz $(FUZZ_ARGS)

# The demo must not outlive the folder that it runs from.
clean: stop
	@if [ -s .run/folder ]; then rm -rf "$$(cat .run/folder)"; fi
	rm -rf .run $(VENV) build dist procman.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: what is installed again only when pyproject.toml has changed. The development one holds the plain one.
$(VENV)/installed: pyproject.toml $(bin)/python
	$(bin)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(bin)/python
	$(bin)/python -m pip install --quiet --editable '.[dev]'
	@touch $(VENV)/installed $@

# A name on PATH is not enough: it may be a version manager's shim that only prints an error. So each one has to run.
$(bin)/python:
	@if [ -e $(VENV) ] && [ ! -w $(VENV) ]; then \
	  echo "$(VENV) belongs to another user, and its Python does not run for you: have it removed first" >&2; \
	  exit 1; \
	fi
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "procman needs Python 3.11 or newer. None of these runs and is new enough: $(PYTHONS)" >&2; \
	  echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; \
	  exit 1; \
	fi; \
	echo "$$("$$found" --version) makes $(VENV)"; \
	"$$found" -m venv --clear $(VENV) || { \
	  rm -rf $(VENV); \
	  echo "$$found cannot make a virtual environment. Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; \
	}
