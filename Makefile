# make demo   compress a real ImageNet network without data, and see what it says about photographs
# make docs   build the documentation; open build/site/index.html
# make test   style, types, documentation, tests, and the files of a release
# make clean  remove the environment and what the demo wrote
#
# PYTHON=python3.12 make demo picks another interpreter; everything is installed into .venv.

PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
EXE := .exe
else
BIN := $(VENV)/bin
endif
# Whatever is missing or stale fails: a page outside the navigation, a dead link, a name that is no more.
# Not --quiet: warnings that are not shown do not count as errors.
MAKE_SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Each of the many processes of the tests would compile what it imports, if an environment says to keep nothing.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: demo docs test style types tests browser clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

docs: $(VENV)/.docs
	$(MAKE_SITE)

# Side by side, because installing and checking types keep one core busy each.
test:
	$(MAKE) --no-print-directory --jobs=2 $(VENV)/.dev browser
	$(MAKE) --no-print-directory --jobs=2 types tests

style:
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(MAKE_SITE)

types:
	$(BIN)/pyright --pythonpath $(BIN)/python$(EXE)

tests: style
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# The tests look at the report in a real browser. Root on Debian gets one here; others install it themselves.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else false; fi || echo "no browser: the tests that look at the report need chromium, and are skipped"

clean:
	rm -rf $(VENV)
	if [ -f demo-out/lbyl.json ]; then rm -rf demo-out; fi

$(BIN)/python$(EXE):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: lbyl needs Python 3.10 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch and torchvision are named so that the resolver takes a pair that was built together.
# Nothing is compiled ahead, which takes as long as the rest: Python compiles what is imported, and keeps it.
# The stamp is written last: an interrupted installation is taken up again.
$(VENV)/.%: pyproject.toml | $(BIN)/python$(EXE)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet torch torchvision --editable '.[$*]'
	touch $@
