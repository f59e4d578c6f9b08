# Cohobate. `make demo` and `make test` are all you need; each prepares .venv by itself the first time.
#
#   make demo LOADER=dali-cpu         another image loader (auto, torch, dali-cpu, dali-gpu)
#   make demo RUN=runs/demo-...       goes on with a run that was interrupted; without it every demo is a new run
#   make test PYTHON=python3.12       another Python
#   make gpu-proof PROOF=--rest       goes on with what has not passed yet (PROOF=--list names the parts)
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                                     a CPU-only torch (on Linux the default one brings the CUDA libraries)

PYTHON      ?= python3
VENV        ?= .venv
LOADER      ?= auto
CACHE       ?= .cache
TORCH_INDEX ?=
PROOF       ?=
ifndef RUN
RUN         := runs/$(if $(filter demo-video,$(MAKECMDGOALS)),demo-video,demo)-$(shell date +%Y%m%d-%H%M%S)
endif

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.cohobate-installed
EXTRAS  := dev,fast-cpu,eval,hf,video
ifeq ($(shell uname -s),Linux)
EXTRAS  := $(EXTRAS),triton,dali
endif
PIP     := $(BIN)/python -m pip install -qq --disable-pip-version-check --progress-bar off -c constraints.txt
SECONDS = $$(( $$(date +%s) - start ))

.DEFAULT_GOAL := help
.PHONY: help demo demo-video test lint native bench bench-check gpu-proof figures clean distclean

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20

# torch goes first and alone: what follows then finds it installed and does not choose another build of it. timm, which
# only tests read, goes without its torchvision, which would.
$(STAMP): constraints.txt pyproject.toml setup.py
	@echo "preparing $(VENV) (once; a few minutes and about 2 GB)"
	@start=$$(date +%s); set -e; \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch; \
	$(PIP) setuptools wheel cmake ninja; \
	COHOBATE_NATIVE=0 $(PIP) --no-build-isolation -e '.[$(EXTRAS)]'; \
	$(PIP) --no-deps timm; \
	touch $@; echo "prepared $(VENV) in $(SECONDS) s"

native: $(STAMP) ## compile the C++ kernels into kernels/
	@$(BIN)/python setup.py --quiet build_native --inplace

demo: $(STAMP) native ## train the demo on generated JPEGs and write its report page
	@$(BIN)/cohobate data make $(CACHE)/demo-images
	@$(BIN)/cohobate train demo data.root=$(CACHE)/demo-images data.loader=$(LOADER) run=$(RUN)

demo-video: $(STAMP) native ## VideoMAE, then AMD, on generated videos, and a report page
	@$(BIN)/cohobate data make $(CACHE)/demo-videos --kind video
	@for part in train test; do $(BIN)/cohobate data shard $(CACHE)/demo-videos $(CACHE)/demo-shards --split $$part || exit; done
	@$(BIN)/cohobate train demo-video data.root=$(CACHE)/demo-shards data.loader=$(LOADER) run=$(RUN)

test: $(STAMP) native lint ## everything that can be proved here: style, types, tests, Triton's interpreter
	@echo "tests in Triton's interpreter"
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels
	@echo "tests"
	@$(BIN)/python -m pytest

# mypy does not follow editable installs, so it reads the tree through links that spell the installed names.
TYPING := build/typing/cohobate
lint: $(STAMP)   ## ruff and mypy
	@$(BIN)/ruff check .
	@rm -rf $(TYPING) && mkdir -p $(TYPING)
	@ln -s $(CURDIR)/engine/* $(CURDIR)/kernels $(CURDIR)/benchmarks $(TYPING)/
	@cd build/typing && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p cohobate

bench: $(STAMP) native ## time the kernels on this CPU
	@mkdir -p build
	@$(BIN)/cohobate bench kernels --device cpu --json build/bench-kernels.jsonl

bench-check: $(STAMP) native ## the same, and fail if one became slower than its stored row by a tenth
	@$(BIN)/cohobate bench kernels --device cpu --fail-if-slower 10

gpu-proof: $(STAMP) native ## on a machine with a GPU: its tests and timings, in ten minutes
	@$(BIN)/python -m cohobate.benchmarks.gpu_proof $(PROOF)

figures: $(STAMP) ## tables and figures of the documents, from the stored results
	@$(BIN)/python -m cohobate.benchmarks.report

clean:           ## remove what was built; keeps .venv, runs/ and the image cache
	@rm -rf build dist *.egg-info kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find engine kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv and the image cache
	@rm -rf $(VENV) $(CACHE)
