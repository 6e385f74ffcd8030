# Every target sets up what it needs by itself: an environment in .venv with the
# versions that constraints/ pins for its Python. A second call installs nothing; a
# change of pyproject.toml or constraints/ does.

PYTHON ?= python3
VENV   ?= .venv
PEERS  ?= $(VENV)-peers
EXTRAS ?=
CONFIG ?= configs/gpt_tiny.py
BENCH  ?= $(sort $(wildcard benchmarks/*.py))
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help train test test-all lint format bench docs e2e constraints clean
# One after the other, also under `make -j`: two pips in one folder spoil it.
.NOTPARALLEL:

# An environment is ready for a purpose when its stamp is newer than these.
SOURCES := pyproject.toml $(wildcard constraints/*.txt)
comma   := ,
RUN     := $(VENV)/.ready-run$(addprefix -,$(EXTRAS))
DEV     := $(VENV)/.ready-dev$(addprefix -,$(EXTRAS))
DOCS    := $(VENV)/.ready-docs
PEER    := $(PEERS)/.ready-peers$(addprefix -,$(EXTRAS))
setup    = @PYTHON='$(PYTHON)' sh scripts/setup.sh $(1) '$(2)' && touch $@

$(RUN): $(SOURCES)
	$(call setup,$(VENV),$(EXTRAS))

$(DEV): $(SOURCES)
	$(call setup,$(VENV),dev$(addprefix $(comma),$(EXTRAS)))

$(DOCS): $(SOURCES)
	$(call setup,$(VENV),docs)

$(PEER): $(SOURCES)
	$(call setup,$(PEERS),dev$(comma)peers$(comma)cluster$(addprefix $(comma),$(EXTRAS)))

help:  ## list the targets
	@echo "make TARGET [PYTHON=python3.12] [VENV=.venv] [EXTRAS=gpu] [ARGS='...']"
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1|/p' Makefile \
	  | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'

train: $(RUN)  ## train a language model on real text (CONFIG=configs/gpt_tiny.py)
	$(VENV)/bin/python scripts/train.py $(CONFIG) $(ARGS)

test: $(DEV)  ## run the tests (ARGS='-k mesh'); says which it skips, and why
	$(VENV)/bin/python -m pytest $(ARGS)

test-all: $(PEER)  ## run the tests with the peers that they compare with
	$(PEERS)/bin/python -m pytest $(ARGS)

lint: $(DEV)  ## check style (ruff) and types (pyright)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(DEV)  ## format the code and mend what ruff can mend
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# The peers' plugins for absent chips complain at start unless JAX is told its platform.
bench: export JAX_PLATFORMS ?= $(if $(EXTRAS),,cpu)
bench: $(PEER)  ## run the benchmarks (BENCH=benchmarks/data.py); each prints JSON
	@test -n '$(BENCH)' || { echo 'benchmarks/ holds none yet' >&2; exit 1; }
	@failed=; for script in $(BENCH); do \
	  echo "$$script" >&2; \
	  $(PEERS)/bin/python $$script $(ARGS) || failed="$$failed $$script"; done; \
	  test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

docs: $(DOCS)  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

e2e: $(RUN)  ## the whole program once: train, kill -9, resume, compare
	$(VENV)/bin/python tests/end_to_end.py $(ARGS)

constraints:  ## pin the newest versions there are for PYTHON in constraints/
	rm -rf .venv-pins
	PYTHON='$(PYTHON)' PINS=constraints/no-cuda.txt \
	  sh scripts/setup.sh .venv-pins dev,docs,peers,cluster
	@set -e; cd .venv-pins; \
	pins=$$(bin/python -c 'import sys; print("py%d%d.txt" % sys.version_info[:2])'); \
	bin/python -m pip freeze --all --exclude-editable --exclude pip > pins; \
	{ echo '# Tested together. Made by `make constraints`.'; \
	  sed 's/+cpu$$//' pins; } > ../constraints/$$pins; \
	echo "wrote constraints/$$pins"
	rm -rf .venv-pins

clean:  ## remove environments, caches and site/ (runs/ stays)
	rm -rf $(VENV) $(PEERS) site build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +
