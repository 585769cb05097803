"""Text, Image and Pathfinder of the Long Range Arena: the documented commands on tiny data."""

import sys

import pytest

import run
from src.evaluation.sequence_summary import read_summary
from tests.hydra_helpers import hydra_restored
from tests.src.datamodules.sequences.setup import write_images, write_reviews

SMALL = ["model.dim=16", "model.depth=1", "model.heads=2", "model.qkv_dim=16", "model.mlp_dim=16"]
SMALL += ["trainer.accelerator=cpu", "callbacks.progress_bar=null", "logger=none", "datamodule.batch_size=4"]
SMALL += ["train.steps=2", "train.eval_steps=1"]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Function that runs a training of one attention in `tmp_path` and returns the exit status."""
    monkeypatch.chdir(tmp_path)

    def call(experiment, *options):
        arguments = [f"experiment={experiment}", *SMALL, "model/attention=local", "hydra.run.dir=here", *options]
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        with hydra_restored():
            return run.run(sys.argv)

    return call


@pytest.mark.parametrize(
    ("experiment", "write", "options", "sizes"),
    [
        ("lra-text", write_reviews, ["datamodule.length=40"], (18, 2, 8)),
        ("lra-image", write_images, [], (18, 2, 8)),
    ],
)
def test_data_in_folders(experiment, write, options, sizes, command, tmp_path):
    write(tmp_path / "data")
    folder, cache = "datamodule.read.data_dir=data", "datamodule.read.cache=cache.safetensors"
    assert command(experiment, folder, cache, *options) == 0
    summary = read_summary(tmp_path / "here" / "sequence_training.json")
    assert (summary.task, summary.attention, summary.metric) == (experiment, "local", "accuracy")
    assert summary.complete
    assert tuple(summary.data[f"num_{part}"] for part in ("train", "validation", "test")) == sizes
    assert summary.data["baselines"]["majority class"] > 0
    # the same from the cache alone
    assert command(experiment, "datamodule.read.data_dir=null", cache, *options, "hydra.run.dir=again") == 0
    again = read_summary(tmp_path / "again" / "sequence_training.json")
    assert (again.data, again.test) == (summary.data, summary.test)


@pytest.mark.parametrize("experiment", ["lra-text", "lra-image"])
def test_missing_data_is_one_message(experiment, command, capsys):
    assert command(experiment, "datamodule.read.data_dir=nowhere") == 1
    error = capsys.readouterr().err
    assert "nowhere does not exist. Give the folder with train/ and test/" in error
    assert "datamodule.read.data_dir" in error
    assert "Traceback" not in error


def test_drawn_images_are_kept(command, tmp_path):
    sizes = [f"datamodule.read.num_{part}={size}" for part, size in (("train", 8), ("validation", 4), ("test", 4))]
    options = [*sizes, "paths.log_dir=kept"]
    assert command("lra-pathfinder", *options) == 0
    summary = read_summary(tmp_path / "here" / "sequence_training.json")
    assert (summary.data["num_train"], summary.data["num_test"]) == (8, 4)
    assert [path.name for path in (tmp_path / "kept" / "pathfinder").iterdir()] == ["8-4-4-0.safetensors"]
    assert command("lra-pathfinder", *options, "hydra.run.dir=again") == 0
    assert read_summary(tmp_path / "again" / "sequence_training.json").test == summary.test
