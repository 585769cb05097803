# make setup   the environment in .venv           make test   the tests
# make demo    the main job on photographs        make lint   ruff
# make notebooks   the experiments, run anew       make docs    the documentation as a site
# make wheel   the library as a package, in dist/
#
# PYTHON=python3.12 chooses the interpreter. CONSTRAINTS= (empty) takes the newest versions that requirements.txt
# admits, in place of the tested ones.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup test lint format demo notebooks docs wheel clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

setup: $(STAMP)

# made anew when the requirements or the interpreter's minor version change
$(STAMP): requirements.txt $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; choose one by PYTHON=python3.x" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
	@touch $@

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses=8

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The four published attentions and four with clusters, or those of ATTENTIONS=full,smyrf,..., and floors to compare them
# with, over 200 photographs, by a network that was trained on others (checkpoints/demo/README.md).
# Everything is as with ImageNet and a published checkpoint: conversion, one multirun, a table, figures.
DEMO_CHECKPOINT := demo/t2t_vit_t_7_flowers.pth
DEMO_RUN := demo/$(shell date +%Y-%m-%d_%H-%M-%S)
ATTENTIONS ?= full,local,performer,sblocal,cluster,sbcluster,pairedcluster,sbadaptive
FLOORS ?= zero,uniform,strided,random-keys,querycluster

demo: setup $(DEMO_CHECKPOINT)
	$(BIN)/python run.py -m experiment=flowers-t2tvit-eval model/t2tattn_cfg=$(ATTENTIONS),$(FLOORS) \
		eval.ckpt=$(DEMO_CHECKPOINT) hydra.sweep.dir=$(DEMO_RUN)
	$(BIN)/python scripts/compare_runs.py $(DEMO_RUN) --output $(DEMO_RUN)/demo.json >/dev/null
	$(BIN)/python scripts/plot_attention_maps.py --checkpoint $(DEMO_CHECKPOINT) --data-dir data/flowers \
		--attentions $(ATTENTIONS) --output $(DEMO_RUN)/attention_maps.png
	@echo
	@echo "Look at $(DEMO_RUN)/comparison.png and $(DEMO_RUN)/attention_maps.png; docs/demo.md explains them."

$(DEMO_CHECKPOINT): checkpoints/demo/t2t_vit_t_7_flowers.pth.tar | setup
	mkdir -p demo
	rm -f $@
	$(BIN)/python scripts/convert_checkpoint_t2t_vit.py $< --output $@

# The kernel is that of the environment; each notebook finds the repository's root by itself.
notebooks: setup
	$(BIN)/jupyter-execute --inplace --kernel_name=python3 notebooks/*.ipynb

# The site has the repository's pages and what they link to, under the same paths: see mkdocs.yml.
DOCS := build/docs
DOCS_STAMP := $(VENV)/.docs-installed

docs: $(DOCS_STAMP)
	rm -rf $(DOCS)
	mkdir -p $(DOCS)/source
	git ls-files -z -- '*.md' '*.png' '*.ipynb' 'configs/*.yaml' 'docs/*.json' 'docs/*.css' 'checkpoints/*.json' LICENSE CITATION.cff \
		| tar --null -cf - -T - | tar -xf - -C $(DOCS)/source
	$(BIN)/zensical build --clean --strict
	@echo "Open $(DOCS)/site/index.html, or serve it: python -m http.server -d $(DOCS)/site"

# Only what the site needs: docstrings are read, not imported, so PyTorch is not installed here.
$(DOCS_STAMP): docs/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# The library alone, built from a copy: setuptools would leave a folder build/ whose old files get into the next wheel.
wheel: setup
	rm -rf dist/build && mkdir -p dist/build
	cp -R scatterbrain pyproject.toml README.md LICENSE dist/build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-index --no-build-isolation \
		--wheel-dir dist dist/build
	rm -rf dist/build
	@ls dist/*.whl

clean:
	rm -rf demo build dist .cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
