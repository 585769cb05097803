"""Several processes on the CPU: the same results as one, and a failure in one aborts all with its reason."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch

from scatterbrain.errors import UserError
from src.distributed.processes import ProcessError, run_processes
from src.evaluation.predictions import read_predictions
from src.evaluation.results import read_results
from src.tasks.evaluate import evaluate
from tests.src.distributed.process_functions import fail_in_one, report_rank
from tests.src.tasks.conftest import NUM_IMAGES
from tests.src.tasks.setup import compose_config, make_checkpoint, overrides


def test_rank_0_answers_and_the_environment_stays_as_it_was():
    before = dict(os.environ)
    word, rank, port, threads = run_processes(report_rank, 2, "hello")
    assert (word, rank, threads) == ("hello", "0", max(1, torch.get_num_threads() // 2))
    assert port.isdigit()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("user", UserError, "^image 7 is damaged.$"),
        ("late", UserError, "^image 7 is damaged.$"),
        ("killed", UserError, "Process 1 ended by SIGKILL .*Lower"),
        ("bug", ProcessError, "Process 1 of 2 failed:(.|\n)*fail_in_one(.|\n)*ZeroDivisionError: a bug"),
    ],
)
def test_one_failure_ends_all(kind, error, message):
    started = time.monotonic()
    with pytest.raises(error, match=message):
        run_processes(fail_in_one, 2, kind)
    assert time.monotonic() - started < 60


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
