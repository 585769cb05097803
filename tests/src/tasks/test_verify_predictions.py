"""The script that checks a run against float64, on real runs and on one that was tampered with."""

from __future__ import annotations

import csv

import pytest
from omegaconf import OmegaConf

from scripts import verify_predictions
from src.evaluation.predictions import PREDICTIONS_FILE
from src.tasks.evaluate import evaluate


def run_of(config, folder):
    evaluate(config)
    (folder / ".hydra").mkdir()
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    return str(folder)


@pytest.mark.parametrize("attention", ["full", "sblocal"])
def test_a_run_agrees_with_float64(evaluation, tmp_path, capsys, attention):
    folder = run_of(evaluation("t2t_vit_t_14", model___t2tattn_cfg=attention), tmp_path / "run")
    assert verify_predictions.main([folder, "--device", "cpu"]) == 0
    assert "11 of 11 first predictions equal" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_prediction_is_found(evaluation, tmp_path, capsys):
    folder = run_of(evaluation(), tmp_path / "run")
    path = tmp_path / "run" / PREDICTIONS_FILE
    with open(path, newline="") as file:
        header, first, *others = csv.reader(file)
    first[2], first[3] = first[3], first[2]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, first, *others])
    assert verify_predictions.main([folder, "--device", "cpu"]) == 1
    assert f"differs: {first[0]}" in capsys.readouterr().out


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert verify_predictions.main([str(tmp_path)]) == 1
    assert "results.json does not exist" in capsys.readouterr().err
