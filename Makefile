# Everything starts from Python >= 3.10, pip and make. `make` alone lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Two stamps: what running needs is installed; the developers' tools are, too
RUNS   := $(VENV)/.runs
READY  := $(VENV)/.installed
# Python compiles a module when it imports it for the first time; most of what is installed here never is
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# What is fetched, not what is unpacked: on Linux PyTorch brings NVIDIA's libraries along
SIZE    = $(shell [ "$$(uname -sm)" = 'Linux x86_64' ] && echo 'about 3.3 GB, of which PyTorch and libraries for NVIDIA GPUs are 3 GB' || echo 'about 0.4 GB')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test coverage mutants bench export clean readme docs preview hooks distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null || { echo 'There is no "$(PYTHON)" here: install Python 3.10 or newer, or name yours with "make PYTHON=/path/to/python3".' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3,10) else "fgsynth needs Python 3.10 or newer, but $(PYTHON) is %d.%d: name a newer one with \"make PYTHON=/path/to/python3\"." % v[:2])'
	@"$(PYTHON)" -m venv $(VENV)
	@$(PIP) 'pip>=22.3'

# Installed again whenever what it is made from changes
$(RUNS): settings.ini setup.py constraints.txt | $(BIN)/python
	@echo "Fetching what running needs into $(VENV): $(SIZE); this takes some minutes ..."
	@$(PIP) -c constraints.txt -e '.[lite]'
	@touch $@

install: $(READY)  ## create the environment in .venv (the other targets do so when they need it)

$(READY): $(RUNS)
	@echo "Fetching the developers' tools into $(VENV): about 0.2 GB more ..."
	@$(PIP) -c constraints.txt -e '.[dev]'
	@$(BIN)/python -W ignore -c 'import fgsynth.all' # compiled once, and not by each of the processes that test
	@touch $@

demo: $(RUNS)  ## the main job on drawn finches: a table, and pictures and report.html in runs/demo
	@$(BIN)/fgsynth_demo --out runs/demo --overwrite

# pytest and nbdev_test run at the same time, each in as many processes as there are cores, four at most; each process
# keeps to one core, and (on Linux) keeps memory that was freed for the next tensor, which saves a twentieth of the time
WORKERS := $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2); [ $$n -lt 4 ] && echo $$n || echo 4)
QUIETLY := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONWARNINGS=ignore MPLBACKEND=agg \
           MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=2000000000

test: $(READY)  ## run every notebook (nbdev_test) and tests/ (pytest); ends with "N passed, N failed"
	@$(QUIETLY) $(BIN)/python tools/together.py \
	  "$(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal -q -rs" \
	  "$(BIN)/nbdev_test --n_workers $(WORKERS) --timing"

coverage: $(READY)  ## how many lines of the modules tests/ runs
	@$(QUIETLY) $(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal -q --cov --cov-report=term:skip-covered

mutants: $(READY)  ## change the modules one operator at a time: which changes does no test notice? (hours)
	$(PIP) 'cosmic-ray>=8.4'
	@$(BIN)/python tools/mutants.py

bench: $(READY)  ## time everything, here and in other libraries (three quarters of an hour on two cores); keeps results/bench/*.json
	$(PIP) -c constraints.txt -r benchmarks/requirements.txt
	@for f in startup.py step.py "step.py --arch lite0 --bs 64 --out step_lite0" keep.py files.py evaluation.py growth.py; do $(BIN)/python -W ignore benchmarks/$$f || exit 1; done

export: $(READY)  ## write the modules from the notebooks, and what the commands accept
	$(BIN)/nbdev_export
	$(BIN)/python tools/commands.py

clean: $(READY)  ## strip the notebooks of what does not belong in git
	$(BIN)/nbdev_clean

readme: $(READY)  ## write README.md and CONTRIBUTING.md from their notebooks (needs no Quarto)
	$(BIN)/python tools/readme.py

docs: $(READY)  ## build the documentation into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo 'The documentation is built by Quarto, which is not installed: see https://quarto.org/docs/get-started/.' >&2; exit 1; }
	@touch README.md CONTRIBUTING.md # which nbdev_docs writes anew where they are older than their notebooks; see readme
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs

preview: $(READY)  ## build the documentation and watch the notebooks for changes (needs Quarto)
	@command -v quarto >/dev/null || { echo 'The documentation is built by Quarto, which is not installed: see https://quarto.org/docs/get-started/.' >&2; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_preview

hooks: $(READY)  ## install nbdev's git and Jupyter hooks for this clone
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_install_hooks

distclean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build *.egg-info _docs _proc .pytest_cache
