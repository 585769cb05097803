"""The files, the curves and the table of a training."""

import dataclasses
import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from scatterbrain.errors import UserError
from src.evaluation.training_summary import (
    TrainingSummary,
    best_epoch,
    median_rate,
    training_figure,
    training_table,
    write_training,
)


def make_history(top1=(10.0, 30.0, None, 30.0)):
    """Epochs with these accuracies; None is an epoch without validation."""
    history = []
    for epoch, accuracy in enumerate(top1, start=1):
        entry = {"epoch": epoch, "step": 5 * epoch, "lr": 0.1 / epoch, "train_loss": 4.0 / epoch}
        if accuracy is not None:
            entry |= {"val_loss": 5.0 / epoch, "val_top1": accuracy, "val_top5": 50.0}
        history.append({**entry, "images_per_second": 100.0 * epoch, "seconds": 2.0})
    return history


def make_summary(history=None, **changes):
    history = make_history() if history is None else history
    values = {
        "model": "t2t_vit_t_14",
        "attention": "sblocal",
        "started_from": {"path": None, "sha256": None},
        "data": {
            **{"dir": "/data", "train": "train", "num_train_images": 1_281_167},
            **{"validation": "val", "num_validation_images": 50_000, "num_classes": 1000},
        },
        "image_size": 224,
        "precision": "bf16-mixed",
        "device": "cpu",
        "seed": 42,
        "epochs": 4,
        "complete": True,
        "updates": 20,
        "images_per_update": 512,
        "learning_rate": 5e-4,
        "ema_decay": 0.99996,
        "best": best_epoch(history),
        "checkpoints": {"best": "/run/best.ckpt", "last": "/run/last.ckpt"},
        "images_per_second": median_rate(history),
        "seconds": 8.0,
        "peak_memory_mib": None,
        "versions": {"python": "3.11.7"},
        "command": "run.py",
        "history": history,
    }
    return TrainingSummary(**{**values, **changes})


def rows_of(table):
    labels, values = ([*column.cells] for column in table.columns)
    return dict(zip(labels, values, strict=True))


@pytest.mark.parametrize(
    ("top1", "expected"),
    [
        ((), None),
        ((None, None), None),
        ((10.0, 30.0, None, 30.0), {"epoch": 2, "top1": 30.0}),
        ((None, 0.0), {"epoch": 2, "top1": 0.0}),
    ],
)
def test_the_best_epoch_is_the_first_of_the_best(top1, expected):
    assert best_epoch(make_history(top1)) == expected


@pytest.mark.parametrize(("epochs", "expected"), [(0, None), (1, 100.0), (2, 200.0), (4, 300.0), (5, 350.0)])
def test_the_median_rate_leaves_the_first_epoch_out(epochs, expected):
    assert median_rate(make_history(epochs * (None,))) == expected


def test_the_file_has_the_fields_in_order(tmp_path):
    summary = make_summary()
    write_training(tmp_path, summary)
    content = json.loads((tmp_path / "training.json").read_text())
    assert content == dataclasses.asdict(summary)
    assert list(content) == [field.name for field in dataclasses.fields(TrainingSummary)]


def test_what_is_no_number_is_null(tmp_path):
    history = make_history()
    history[1]["train_loss"] = math.nan
    history[1]["val_loss"] = math.inf
    write_training(tmp_path, make_summary(history))
    entries = json.loads((tmp_path / "training.json").read_text(), parse_constant=pytest.fail)["history"]
    assert (entries[1]["train_loss"], entries[1]["val_loss"]) == (None, None)
    assert [entry["train_loss"] for entry in entries[::2]] == [4.0, 4.0 / 3]


@pytest.mark.parametrize("epochs", [1, 4])
def test_the_figure_is_an_image_with_curves(tmp_path, epochs):
    write_training(tmp_path, make_summary(make_history()[:epochs]))
    with Image.open(tmp_path / "training.png") as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (1350, 540))
        colours = {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours  # of the losses, the accuracy and the rate


def test_without_an_epoch_there_is_no_figure(tmp_path):
    write_training(tmp_path, make_summary([]))
    assert [path.name for path in tmp_path.iterdir()] == ["training.json"]


def test_a_later_summary_replaces_the_earlier_one(tmp_path):
    for updates in (5, 10):
        write_training(tmp_path, make_summary(updates=updates))
    assert json.loads((tmp_path / "training.json").read_text())["updates"] == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training.json", "training.png"]


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"training.json cannot be written"):
        write_training(tmp_path / "missing", make_summary())


@pytest.mark.parametrize(("ema_decay", "label"), [(None, "validation"), (0.99996, "validation, averaged weights")])
def test_the_curves_are_those_of_the_history(ema_decay, label):
    losses, accuracy, rate = training_figure(make_summary(ema_decay=ema_decay)).axes
    training, validation = losses.lines
    assert (training.get_label(), list(training.get_xdata())) == ("training", [1, 2, 3, 4])
    assert list(training.get_ydata()) == [4.0, 2.0, 4.0 / 3, 1.0]
    assert (validation.get_label(), list(validation.get_xdata())) == (label, [1, 2, 4])
    assert list(validation.get_ydata()) == [5.0, 2.5, 1.25]
    curve, best = accuracy.lines
    assert list(curve.get_ydata()) == [10.0, 30.0, 30.0]
    assert list(best.get_ydata()) == [30.0, 30.0]
    assert accuracy.get_title() == "Validation top-1: best 30.00 %, epoch 2"
    assert list(rate.lines[0].get_ydata()) == [0.1, 0.05, 0.1 / 3, 0.025]


def test_curves_without_validation():
    losses, accuracy, _ = training_figure(make_summary(make_history((None, None)))).axes
    assert [line.get_label() for line in losses.lines] == ["training"]
    assert not accuracy.lines


def test_the_table():
    table = training_table(make_summary())
    assert table.title == "1,281,167 images of train, 50,000 of val"
    assert rows_of(table) == {
        "model": "t2t_vit_t_14",
        "attention": "sblocal",
        "epochs": "4",
        "training loss": "1.0000",
        "validation loss": "1.2500",
        "validation top-1": "30.00 %",
        "best top-1": "30.00 % (epoch 2)",
        "images/s": "300.0",
        "best": "/run/best.ckpt",
        "last": "/run/last.ckpt",
    }


def test_the_table_of_a_training_that_was_stopped():
    history = make_history((10.0, None))
    table = training_table(
        make_summary(history, complete=False, attention=None, checkpoints={"last": "/run/last.ckpt"})
    )
    rows = rows_of(table)
    assert (rows["epochs"], rows["attention"]) == ("2 of 4", "its own")
    assert not rows.keys() & {"validation loss", "validation top-1"}  # not of the last epoch
    assert rows["best top-1"] == "10.00 % (epoch 1)"
    early = rows_of(training_table(make_summary([], complete=False, checkpoints={})))
    assert early == {"model": "t2t_vit_t_14", "attention": "sblocal", "epochs": "0 of 4"}


def test_long_paths_are_shown_in_full():
    path = "/a/long/path" * 20 + "/last.ckpt"
    output = io.StringIO()
    Console(file=output, width=60).print(training_table(make_summary(checkpoints={"last": path})))
    shown = "".join(line.strip("│ ").rpartition("│")[2].strip() for line in output.getvalue().splitlines())
    assert path in shown
