"""Evaluations of images without labels: predictions and agreement as with labels, and no accuracy."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from scatterbrain.errors import UserError
from src.evaluation.comparison import compare_runs
from src.evaluation.comparison_figure import comparison_figure
from src.evaluation.comparison_files import print_comparison, write_comparison
from src.evaluation.predictions import read_predictions
from src.evaluation.results import read_results
from src.tasks.evaluate import evaluate
from src.tasks.image_records import ImageRecords
from src.utils.labels import NO_LABEL
from tests.src.tasks.setup import stop_evaluation_at

ACCURACY = ("top1", "top5", "loss", "top1_std")


@pytest.fixture
def unlabelled(evaluation):
    def build(folder: str, **changes: object):
        return evaluation("t2t_vit_t_14", folder, datamodule__labels="none", **changes)

    return build


def test_no_accuracy_is_reported(unlabelled, evaluation, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    results, objects = evaluate(unlabelled("plain", logger="csv"))
    shown = capsys.readouterr().out
    content = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert [content[name] for name in ACCURACY] == 4 * [None]
    assert content["top1_per_seed"] == []
    assert read_results(tmp_path / "plain") == results
    assert results.published is None
    assert "accuracy" in shown
    assert "left out: the images have no labels" in " ".join(shown.split())
    assert "top-1" not in shown
    assert "accuracy and loss are left out" in caplog.text
    assert "top-1" not in objects.task.progress_so_far()
    # nothing for the logger
    assert not any("test/" in path.read_text() for path in (tmp_path / "plain").rglob("metrics.csv"))

    # the images are the same, and so are the predictions
    labelled = evaluate(evaluation("t2t_vit_t_14", "labelled"))[0]
    assert labelled.top1 is not None
    ours, theirs = (read_predictions(tmp_path / name) for name in ("plain", "labelled"))
    assert ours.images == theirs.images
    assert (ours.targets == NO_LABEL).all()
    np.testing.assert_array_equal(ours.classes, theirs.classes)
    np.testing.assert_array_equal(ours.probabilities, theirs.probabilities)
    with open(tmp_path / "plain" / "predictions.csv") as file:
        assert {row["target"] for row in csv.DictReader(file)} == {""}


def test_agreement_needs_no_labels(unlabelled, evaluation, tmp_path, capsys):
    attentions = {"eval__attentions": "[full,sblocal]", "eval__num_seeds": 2}
    evaluate(unlabelled("plain", **attentions))
    shown = capsys.readouterr().out
    evaluate(evaluation("t2t_vit_t_14", "labelled", **attentions))
    plain, labelled = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("plain", "labelled"))
    for ours, theirs in zip(plain["runs"], labelled["runs"], strict=True):
        need_labels = {*ACCURACY, "top1_difference"}
        assert [ours[name] for name in need_labels] == 5 * [None]
        for name in ours.keys() - need_labels - {"images_per_second", "speedup"}:
            assert ours[name] == theirs[name], name
    text = (tmp_path / "plain" / "comparison.md").read_text()
    assert "accuracy is left out: the images have no labels." in text
    assert "top-1" not in text
    assert "accuracy is left out: the images have no labels" in shown
    panels = [axes.get_xlabel() for axes in comparison_figure(_compared(tmp_path / "plain")).axes]
    assert len(panels) == 3
    assert not any("top-1" in panel for panel in panels)


def _compared(folder: Path):
    return compare_runs([folder / "0", folder / "1"])


def test_runs_with_and_without_labels_in_one_comparison(unlabelled, evaluation, tmp_path, capsys):
    evaluate(evaluation("t2t_vit_t_14", "labelled", model___t2tattn_cfg="full"))
    evaluate(unlabelled("plain", model___t2tattn_cfg="local"))
    comparison = compare_runs([tmp_path / "labelled", tmp_path / "plain"])
    print_comparison(comparison, write_comparison(tmp_path, comparison))
    assert [row.top1_difference for row in comparison.rows] == [0, None]
    assert comparison.rows[1].agreement is not None
    assert "| local | - | - |" in (tmp_path / "comparison.md").read_text()


def test_an_interrupted_evaluation_resumes(unlabelled, tmp_path, monkeypatch):
    evaluate(unlabelled("whole"))
    with monkeypatch.context() as patch:
        stop_evaluation_at(patch, 1)
        with pytest.raises(SystemExit):
            evaluate(unlabelled("parts"))
    partial = read_results(tmp_path / "parts")
    assert (partial.complete, partial.top1) == (False, None)
    evaluate(unlabelled("parts", eval__resume="true"))
    assert (tmp_path / "parts" / "predictions.csv").read_bytes() == (
        tmp_path / "whole" / "predictions.csv"
    ).read_bytes()
    assert read_results(tmp_path / "parts").top1 is None


def test_records_without_labels_have_no_accuracy_on_the_way():
    records = ImageRecords(num_images=3, num_classes=5)
    assert float(records.top1_so_far()) == 0
    records.update(0, torch.tensor([0, 1]), torch.randn(2, 5), torch.full((2,), NO_LABEL))
    assert math.isnan(float(records.top1_so_far()))


@pytest.mark.parametrize("name", ["top1", "top5", "loss"])
def test_results_that_lack_one_number_are_damaged(unlabelled, tmp_path, name):
    evaluate(unlabelled("plain"))
    path = tmp_path / "plain" / "results.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {name: 1.0}))
    with pytest.raises(UserError, match="must be a number, got None"):
        read_results(path.parent)
