"""Evaluations by several processes on the CPU: the same results as by one, and strategies that are refused."""

from __future__ import annotations

import numpy as np
import pytest

from scatterbrain.errors import UserError
from src.evaluation.predictions import read_predictions
from src.evaluation.results import read_results
from src.tasks.evaluate import evaluate
from tests.src.tasks.conftest import NUM_IMAGES
from tests.src.tasks.setup import compose_config, make_checkpoint, overrides


def test_results_are_those_of_one_process(data, tmp_path, capfd):
    # of true depth: the processes read the table of variants afresh
    variant, num_processes = "t2t_vit_t_7", 3
    changes = {"model___t2tattn_cfg": "sblocal", "eval__num_seeds": 2}
    checkpoint = make_checkpoint(tmp_path / "weights.pth", variant)
    arguments = overrides(data, checkpoint, variant, datamodule__batch_size=2, **changes)
    one, _ = evaluate(compose_config(arguments, tmp_path / "one"))
    capfd.readouterr()
    config = compose_config([*arguments, f"trainer.devices={num_processes}"], tmp_path / "several")
    several, _ = evaluate(config)
    output, errors = capfd.readouterr()

    assert errors == ""
    assert output.count(f"{NUM_IMAGES} images of val") == 1
    assert several == read_results(tmp_path / "several")
    assert several.device.startswith(f"{num_processes} x cpu")
    assert several.data["num_images"] == NUM_IMAGES
    for name in ("top1", "top5", "top1_per_seed", "top1_std", "seeds"):
        assert getattr(several, name) == getattr(one, name), name
    assert several.loss == pytest.approx(one.loss, rel=1e-6)
    ours, theirs = (read_predictions(tmp_path / folder) for folder in ("several", "one"))
    assert ours.images == theirs.images
    np.testing.assert_array_equal(ours.classes, theirs.classes)
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_start_processes_of_their_own(evaluation, strategy):
    with pytest.raises(UserError, match=f"trainer.strategy={strategy} is not supported"):
        evaluate(evaluation(trainer__strategy=strategy, trainer__devices=2))
