"""`model.fast`: whether an evaluation runs the inference model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import src.tasks.forward as forward_module
from scatterbrain.errors import UserError
from src.evaluation.results import read_results
from src.tasks.evaluate import evaluate


@pytest.fixture
def built(monkeypatch) -> list[torch.dtype]:
    """Dtype of the model of every inference model that is built."""
    dtypes = []
    inference_model = forward_module.inference_model

    def record(model):
        dtypes.append(next(model.parameters()).dtype)
        return inference_model(model)

    monkeypatch.setattr(forward_module, "inference_model", record)
    return dtypes


@pytest.mark.parametrize(
    ("fast", "precision", "form"),
    [
        ("auto", "32-true", torch.float32),
        ("on", "bf16-true", torch.bfloat16),
        ("true", "32-true", torch.float32),
        ("off", "32-true", None),
        ("false", "32-true", None),
        ("auto", "bf16-mixed", None),
    ],
)
def test_results_say_which_model_ran(evaluation, built, tmp_path, fast, precision, form):
    options = {"model__fast": fast, "trainer__precision": precision}
    results, _ = evaluate(evaluation("t2t_vit_7", **options))
    assert built == ([] if form is None else [form])
    assert results.fast is (form is not None)
    assert read_results(tmp_path / "run").fast is results.fast


def test_both_models_give_the_same_results_for_every_seed(evaluation, built):
    options = {"model___t2tattn_cfg": "sblocal", "eval__num_seeds": 2}
    runs = [
        evaluate(evaluation("t2t_vit_t_14", fast, model__fast=fast, **options))[1].task.records[0]
        for fast in ("on", "off")
    ]
    assert len(built) == 1
    np.testing.assert_allclose(runs[0].losses, runs[1].losses, rtol=1e-5, atol=1e-5)
    assert not np.allclose(runs[0].losses[0], runs[0].losses[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__fast": "yes"}, "model.fast='yes' is not valid. Give auto, on or off."),
        ({"model__fast": 2}, "model.fast=2 is not valid"),
        ({"model__fast": "on", "trainer__precision": "bf16-mixed"}, "does not run under autocast .*=bf16-true"),
    ],
)
def test_refusals(evaluation, options, message):
    with pytest.raises(UserError, match=message):
        evaluate(evaluation(**options))
