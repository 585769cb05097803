"""The script that checks a run against float64, on real runs and on one that was tampered with."""

from __future__ import annotations

import csv

import pytest
import torch
from omegaconf import OmegaConf

from scripts import verify_predictions
from src.evaluation.predictions import PREDICTIONS_FILE
from src.tasks import verify
from src.tasks.evaluate import evaluate
from tests.src.datamodules import format_files as files
from tests.src.tasks.setup import make_checkpoint, make_images
from tests.src.tasks.test_evaluate import SYNTHETIC


def run_of(config, folder):
    evaluate(config)
    save_config(config, folder)
    return str(folder)


def save_config(config, folder):
    """As Hydra does, before the run begins."""
    (folder / ".hydra").mkdir(exist_ok=True)
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")


def edit_first_row(folder, edit):
    """Name of the first image of `predictions.csv`, whose row `edit` changes."""
    path = folder / PREDICTIONS_FILE
    with open(path, newline="") as file:
        header, first, *others = csv.reader(file)
    edit(first)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, first, *others])
    return first[0]


def printed(capsys):
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("attention", ["full", "sblocal"])
def test_a_run_agrees_with_float64(evaluation, tmp_path, capsys, attention):
    folder = run_of(evaluation("t2t_vit_t_14", model___t2tattn_cfg=attention), tmp_path / "run")
    assert verify_predictions.main([folder, "--device", "cpu"]) == 0
    assert "11 of 11 first predictions equal" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_prediction_is_found(evaluation, tmp_path, capsys):
    folder = run_of(evaluation(), tmp_path / "run")

    def swap(row):
        row[2], row[3] = row[3], row[2]

    image = edit_first_row(tmp_path / "run", swap)
    assert verify_predictions.main([folder, "--device", "cpu"]) == 1
    assert f"differs: {image}" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "status"), [(1e-5, 0), (1e-3, 1)])
def test_a_probability_that_float32_does_not_explain(evaluation, tmp_path, capsys, error, status):
    folder = run_of(evaluation(), tmp_path / "run")

    def change(row):
        row[-1] = str(float(row[-1]) + error)

    image = edit_first_row(tmp_path / "run", change)
    assert verify_predictions.main([folder, "--device", "cpu"]) == status
    text = printed(capsys)
    assert "11 of 11 first predictions equal" in text
    told = f"1 of 11 images have a probability that differs by more than float32 explains (1e-04): {image}"
    assert (told in text) == bool(status)


def test_an_attention_whose_choices_rounding_changes(evaluation, monkeypatch, tmp_path, capsys):
    """What float32 explains is measured then: by its effect on perturbed images."""
    folder = run_of(evaluation("t2t_vit_t_14", model___t2tattn_cfg="sbsmyrf"), tmp_path / "run")

    def change(row):
        row[-1] = str(float(row[-1]) + 1e-3)

    edit_first_row(tmp_path / "run", change)
    for factor, status in ((3, 1), (1e6, 0)):
        monkeypatch.setattr(verify, "PERTURBATION_FACTOR", factor)
        assert verify_predictions.main([folder, "--device", "cpu"]) == status
        assert ("explains" in printed(capsys)) == bool(status)


def test_a_lower_precision_has_larger_errors(evaluation, tmp_path, capsys):
    folder = run_of(evaluation(trainer__precision="bf16-true"), tmp_path / "run")
    verify_predictions.main([folder, "--device", "cpu"])
    assert "explains" not in printed(capsys)


@pytest.mark.parametrize("write", files.WRITERS, ids=lambda write: write.__name__)
def test_every_format(evaluation, tmp_path, capsys, write):
    if write is files.parquet:
        pytest.importorskip("pyarrow")
    checkpoint = make_checkpoint(tmp_path / "thousand.pth", "t2t_vit_7", 1000)
    write(tmp_path / "data", "val")
    config = evaluation(data=tmp_path / "data", eval__ckpt=checkpoint, model__num_classes=1000)
    assert verify_predictions.main([run_of(config, tmp_path / "run"), "--device", "cpu"]) == 0
    assert "8 of 8 first predictions equal" in printed(capsys)


def test_images_in_memory(evaluation, tmp_path, capsys):
    folder = run_of(evaluation(**SYNTHETIC), tmp_path / "run")
    assert verify_predictions.main([folder, "--device", "cpu"]) == 0
    assert "11 of 11 first predictions equal" in printed(capsys)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model___t2tattn_cfg": "local"}, "attention=sblocal (now local)"),
        ({"++model__t2tattn1_cfg__local_context": 5}, "attention_options=["),
        ({"seed": 3}, "seeds=[1111] (now [3])"),
        ({"datamodule__crop_pct": 0.5}, "datamodule.crop_pct=0.9 (now 0.5)"),
        ({"datamodule__batch_size": 3}, "datamodule.batch_size=4 (now 3)"),
        ({"trainer__precision": "bf16-mixed"}, "precision=32-true (now bf16-mixed), model.fast=True (now False)"),
        ({"data": "fewer"}, "data.num_images=11 (now 9)"),
        ({"eval__ckpt": "other.pth"}, "checkpoint.sha256="),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_configuration_of_another_evaluation(evaluation, checkpoints, tmp_path, capsys, changes, told):
    options = {"model___t2tattn_cfg": "sblocal"}
    folder = run_of(evaluation("t2t_vit_t_14", **options), tmp_path / "run")
    make_images(tmp_path / "fewer", 9)
    weights = torch.load(checkpoints["t2t_vit_t_14"], weights_only=True)
    weights["state_dict_ema"]["head.bias"] += 1
    torch.save(weights, tmp_path / "other.pth")
    changes = {name: tmp_path / x if x in ("fewer", "other.pth") else x for name, x in changes.items()}
    save_config(evaluation("t2t_vit_t_14", **{**options, **changes}), tmp_path / "run")
    assert verify_predictions.main([folder, "--device", "cpu"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"Error: {folder}/.hydra/config.yaml is not of the evaluation in results.json, which has ")
    assert told in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("content", ["a: [", "a: 1", "[]"])
def test_a_configuration_that_is_none(evaluation, tmp_path, capsys, content):
    folder = run_of(evaluation(), tmp_path / "run")
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text(content)
    assert verify_predictions.main([folder]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"Error: {folder}/.hydra/config.yaml ")
    assert errors.count("\n") == 1


def test_the_runs_of_one_pass(evaluation, tmp_path, capsys):
    run = tmp_path / "run"
    config = evaluation("t2t_vit_t_14", eval__attentions="[full,sblocal,performer]", eval__num_seeds=2)
    assert verify_predictions.main([run_of(config, run), "--device", "cpu"]) == 0
    text = capsys.readouterr().out.replace("\n", "")
    for number, attention in enumerate(("full", "sblocal", "performer")):
        assert f"{run / str(number)}:" in text
        assert f"attention {attention}: 11 of 11" in text

    def swap(row):
        row[2], row[3] = row[3], row[2]

    edit_first_row(run / "1", swap)
    assert verify_predictions.main([str(run), "--device", "cpu"]) == 1
    assert "attention sblocal: 10 of 11" in printed(capsys)
    # a run that is refused, and the one after it
    (run / "0" / ".hydra" / "config.yaml").unlink()
    assert verify_predictions.main([str(run), "--device", "cpu"]) == 1
    output, errors = capsys.readouterr()
    assert errors == f"Error: {run}/0/.hydra/config.yaml does not exist. Give the folder of a run of run.py.\n"
    assert "attention performer: 11 of 11" in " ".join(output.split())


def test_images_that_are_gone(evaluation, tmp_path, capsys):
    data = make_images(tmp_path / "data", 6)
    folder = run_of(evaluation(data=data), tmp_path / "run")
    edit_first_row(tmp_path / "run", lambda row: row.__setitem__(0, "c0/gone.png"))
    assert verify_predictions.main([folder, "--device", "cpu"]) == 1
    assert "has images that are not in" in (errors := capsys.readouterr().err)
    assert "c0/gone.png" in errors


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert verify_predictions.main([str(tmp_path)]) == 1
    assert "results.json does not exist" in capsys.readouterr().err
