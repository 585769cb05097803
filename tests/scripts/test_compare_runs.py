"""Accuracy and agreement of runs, as one file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts import compare_runs
from src.evaluation.predictions import write_predictions
from src.evaluation.records import Records, summarise
from src.evaluation.results import Results, write_results

IMAGES = ["a/1.jpg", "a/2.jpg", "b/3.jpg", "b/4.jpg"]
TARGETS = [0, 0, 1, 1]


def write_run(folder: Path, attention: str, predictions: list[list[int]], images=IMAGES, **changes) -> Path:
    """A run of one seed for each list of first predictions, of two classes."""
    folder.mkdir(parents=True)
    classes = np.array([[[first, 1 - first] for first in of_seed] for of_seed in predictions])
    records = Records(np.array(TARGETS), classes, np.full(classes.shape, 0.5), np.ones(classes.shape[:2]))
    write_predictions(folder, images, records)
    results = {
        **{"model": "t2t_vit_t_7", "attention": attention, "checkpoint": {"path": "x.pth", "sha256": "0" * 64}},
        "data": {"dir": "data", "split": "val", "num_images": 4, "num_classes": 2},
        **{"image_size": 32, "precision": "32-true", "device": "cpu", "seeds": list(range(len(predictions)))},
        **{"images_per_second": 3.0, "peak_memory_mib": None, "versions": {"torch": "2"}, "command": "run.py"},
        **summarise(records),
        **changes,
    }
    write_results(folder, Results(**results))
    return folder


@pytest.fixture
def sweep(tmp_path):
    write_run(tmp_path / "sweep" / "0", "full", [[0, 0, 1, 0]])
    write_run(tmp_path / "sweep" / "1", "sblocal", [[0, 1, 1, 0], [1, 1, 1, 0]])
    return tmp_path / "sweep"


def test_accuracy_and_agreement_without_speeds(sweep, tmp_path, capsys):
    assert compare_runs.main([str(sweep), "--output", str(tmp_path / "r.json")]) == 0
    content = json.loads((tmp_path / "r.json").read_text())
    full, sblocal = content["results"]
    assert (full["attention"], full["top1"], full["top1_std"], full["agreement"]) == ("full", 75, None, 100)
    assert (sblocal["num_seeds"], sblocal["top1"], sblocal["agreement"]) == (2, 37.5, 75)
    assert sblocal["top1_std"] == pytest.approx(np.std([50, 25], ddof=1))
    assert (content["data"]["num_images"], content["precision"]) == (4, "32-true")
    assert (content["commands"], content["versions"]) == (["run.py"], {"torch": "2"})
    text = (tmp_path / "r.json").read_text()
    assert "per_second" not in text
    assert "speedup" not in text
    shown = capsys.readouterr().out
    assert "37.50 ± 17.68 (2 seeds)" in shown
    assert "same" not in shown


def test_predictions_of_another_precision(sweep, tmp_path, capsys):
    other = tmp_path / "other"
    write_run(other / "0", "sblocal", [[0, 0, 1, 1]], precision="bf16-true")
    write_run(other / "1", "full", [[0, 0, 1, 0]], precision="bf16-true")
    arguments = [str(sweep), "--against", str(other), "--output", str(tmp_path / "r.json")]
    assert compare_runs.main(arguments) == 0
    content = json.loads((tmp_path / "r.json").read_text())
    assert [row["same_as_against"] for row in content["results"]] == [4, 2]
    assert content["against"] == {"precision": "bf16-true", "device": "cpu", "commands": ["run.py"]}
    # a long path is broken over lines
    assert f"thosein{other}" in "".join(capsys.readouterr().out.split())


def test_a_single_run(tmp_path, capsys):
    assert compare_runs.main([str(write_run(tmp_path / "run", "local", [[0, 0, 0, 0]]))]) == 0
    assert "50.00" in capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    assert compare_runs.main([str(argument) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_are_one_line(sweep, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds no finished evaluation" in refused(capsys, tmp_path / "empty")
    write_run(tmp_path / "one" / "0", "full", [[0, 0, 1, 0]])
    assert "has 0 runs with attention sblocal" in refused(capsys, sweep, "--against", tmp_path / "one")
    write_run(tmp_path / "one" / "1", "full", [[0, 0, 1, 0]])
    assert "has 2 runs with attention full" in refused(capsys, sweep, "--against", tmp_path / "one")
    others = [name.replace("jpg", "png") for name in IMAGES]
    write_run(tmp_path / "images" / "0", "full", [[0, 0, 1, 0]], images=others)
    assert "evaluated different images" in refused(capsys, sweep, "--against", tmp_path / "images")
