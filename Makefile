# make demo and make test do all the set-up on a fresh machine, in a virtual environment of their own.
#
#   PYTHON  the Python to make the environment with (3.10 or newer)
#   TORCH   what to give pip for torch, for example
#           TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test check examples sanitize docs links format bench gpu models clean

demo: $(VENV)/.built
	$(BIN)/neumuter demo --out demo-out

test: $(VENV)/.built $(VENV)/.quantised
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --durations 15

check: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python -m bench report --check
	$(MAKE) examples sanitize

# Each script of examples/, as its user runs it.
examples: $(VENV)/.built
	$(BIN)/python -m pytest -q tests/repo/test_examples.py

# The CPU ops under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: $(VENV)/.built
	$(BIN)/python -m tests.sanitizers

# The site, in build/docs. A link to a page, a heading or a file that is not there is an error.
docs: $(VENV)/.built
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/docs

# Links to other sites; needs a network, so continuous integration leaves it out.
links: $(VENV)/.built
	$(BIN)/python -m sphinx -q -b linkcheck -c docs . build/links

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.built
	$(BIN)/python -m bench all
	$(BIN)/python -m bench report

# The GPU queue, by PYTHON as it is: no virtual environment, no network. A second run goes on.
#   WHEELS   a folder of wheels to use; RESULTS  the folder of the results
#   SECONDS  of the whole run at most; STEPS  some steps alone; FRESH=1  measures all anew
#   COMMIT   what is measured, where the copy has no git history
gpu:
	$(if $(COMMIT),NEUMUTER_COMMIT=$(COMMIT)) $(PYTHON) -m bench.gpu $(STEPS) $(if $(WHEELS),--wheels $(WHEELS)) \
	  $(if $(RESULTS),--out $(RESULTS)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(FRESH),--fresh)

models: $(VENV)/.built $(VENV)/.quantised
	$(BIN)/python -m pytest --junitxml build/models.xml tests/neumuter/test_families.py tests/neumuter/test_loading.py tests/neumuter/test_distributed.py
	$(BIN)/python -m tests.models_table build/models.xml

clean:
	rm -rf build dist demo-out neumuter_kernels/_C*.so *.egg-info python/*.egg-info $(VENV)/.built

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	@echo "Compiling the kernels and installing what the package needs into $(VENV): a few minutes"
	$(BIN)/python -m pip install --no-build-isolation --editable '.[dev,docs]'
	touch $@

# What only the tests load: transformers imports these wherever they are installed.
$(VENV)/.quantised: $(VENV)/.built
	@echo "Installing what only the tests need into $(VENV)"
	$(BIN)/python -m pip install torchao bitsandbytes lm_eval kernels hydra-core 'transformers[serving]' openai playwright
	touch $@

$(VENV)/.torch:
	@echo "Making $(VENV) and downloading torch into it: a few minutes, depending on the network"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --quiet 'setuptools>=77' cmake ninja pybind11
	touch $@
