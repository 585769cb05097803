# make setup   the environment in .venv           make test   the tests
# make demo    the main job on photographs        make lint   ruff
#
# PYTHON=python3.12 chooses the interpreter. CONSTRAINTS= (empty) takes the newest versions that requirements.txt
# admits, in place of the tested ones.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup test lint format demo clean

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
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The four attentions over twelve photographs, with a checkpoint in the published layout. Its weights are random:
# everything is as in a real evaluation but the accuracy, which means nothing.
DEMO_CHECKPOINT := demo/T2T_ViTt_14_random.pth.tar

demo: setup $(DEMO_CHECKPOINT)
	$(BIN)/python scripts/convert_checkpoint_t2t_vit.py $(DEMO_CHECKPOINT)
	$(BIN)/python run.py -m experiment=imagenet-t2tvit-eval model/t2tattn_cfg=full,local,performer,sblocal \
		datamodule.data_dir=data/flowers model.num_classes=5 eval.ckpt=$(DEMO_CHECKPOINT) eval.num_seeds=3 \
		datamodule.batch_size=4 paths.log_dir=demo/logs
	@echo "The weights are random: these accuracies mean nothing. The agreement with full attention and the speed do."

$(DEMO_CHECKPOINT): | setup
	$(BIN)/python scripts/make_random_checkpoint.py t2t_vit_t_14 --num-classes 5 --output $@

clean:
	rm -rf demo .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
