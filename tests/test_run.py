"""The command line: exit status, one message on stderr, and what a run and a multirun leave."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run
import src.datamodules.dataset as dataset
from src.distributed.folder_lock import locked_folder
from src.evaluation.results import read_results
from src.tasks.evaluate import evaluate
from tests.hydra_helpers import hydra_restored
from tests.src.tasks.conftest import make_shallow, make_tiny
from tests.src.tasks.setup import (
    assert_same_evaluation,
    compose_config,
    make_checkpoint,
    make_images,
    overrides,
    stop_at,
    stop_evaluation_at,
    training_overrides,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Images, the weights of two shallow variants, and what a user may take for a checkpoint or for images."""
    folder = tmp_path_factory.mktemp("inputs")
    make_images(make_images(folder / "data", 6), 8, "train")
    with pytest.MonkeyPatch.context() as patch:
        make_shallow(patch)
        for variant in ("t2t_vit_7", "t2t_vit_t_14"):
            make_checkpoint(folder / f"{variant}.pth", variant)
    whole = (folder / "t2t_vit_7.pth").read_bytes()
    (folder / "empty.pth").touch()
    (folder / "page.pth").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": Malicious(folder / "ran")}, folder / "code.pth")
    (folder / "without_val" / "train").mkdir(parents=True)
    (folder / "empty_val" / "val").mkdir(parents=True)
    make_images(folder / "damaged", 6)
    (folder / "damaged" / "val" / "c2" / "002.png").write_text("no image")
    return folder


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def run_py(tmp_path, monkeypatch, capsys):
    """`run_py(arguments)`: exit status, stdout and stderr of run.py in this process."""
    make_shallow(monkeypatch)
    make_tiny(monkeypatch)
    monkeypatch.setenv("LOG_DIR", str(tmp_path / "logs"))
    for name in ("DATA_DIR", "CHECKPOINT", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)

    def call(arguments: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        status = run.run(sys.argv)
        return status, *capsys.readouterr()

    with hydra_restored():
        yield call


@pytest.fixture
def command_line(inputs, run_py):
    """`command_line(*arguments, variant=..., **changes)`: exit status, stdout and stderr of an evaluation."""

    def call(*arguments: str, variant: str = "t2t_vit_7", **changes: object) -> tuple[int, str, str]:
        changes = {
            name: str(value).replace("INPUTS", str(inputs)) if value is not None else None
            for name, value in changes.items()
        }
        options = overrides(inputs / "data", inputs / f"{variant}.pth", variant, **changes)
        return run_py([*arguments, *options])

    return call


def results_of(folder: Path) -> list[Path]:
    return sorted(folder.rglob("results.json"))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        # checkpoints
        ({"eval__ckpt": None}, ["No checkpoint given", "eval.ckpt=", "CHECKPOINT="]),
        ({"eval__ckpt": "INPUTS/no.pth"}, ["no.pth does not exist"]),
        ({"eval__ckpt": "INPUTS/empty.pth"}, ["empty.pth is empty"]),
        ({"eval__ckpt": "INPUTS/page.pth"}, ["page.pth is a web page"]),
        ({"eval__ckpt": "INPUTS/cut.pth"}, ["cut.pth", "truncated or damaged"]),
        ({"eval__ckpt": "INPUTS/code.pth"}, ["code.pth contains code", "not run"]),
        ({"eval__ckpt": "INPUTS/t2t_vit_t_14.pth"}, ["t2t_vit_t_14.pth holds t2t_vit_t_14", "model/t2tmodel="]),
        # data
        ({"datamodule__data_dir": None}, ["No data folder given", "datamodule.data_dir=", "DATA_DIR="]),
        ({"datamodule__data_dir": "INPUTS/no"}, ["/no does not exist"]),
        ({"datamodule__data_dir": "INPUTS/without_val"}, ["No folder 'val' in", "train"]),
        ({"datamodule__data_dir": "INPUTS/empty_val"}, ["empty_val/val is empty"]),
        (
            {"datamodule__data_dir": "INPUTS/damaged"},
            ["Cannot decode the image", "damaged/val/c2/002.png", "datamodule.on_error=skip"],
        ),
        ({"model__num_classes": 7}, ["5 class folders", "model.num_classes=5"]),
        # names
        ({"model___t2tattn_cfg": "sblocl"}, ["model/t2tattn_cfg=sblocl", "Did you mean 'sblocal'"]),
        ({"model___t2tattn_cfg": "sblocal"}, ["t2t_vit_7 takes no attention", "t2t_vit_t_14"]),
        ({"experiment": "imagenet-t2tvit"}, ["experiment=imagenet-t2tvit", "'imagenet-t2tvit-eval'"]),
        ({"model___t2tmodel": "t2t_vit_t14"}, ["model/t2tmodel=t2t_vit_t14", "'t2t_vit_t_14'"]),
        ({"model___t2tmodl": "x"}, ["There is no group 'model/t2tmodl'"]),
        ({"mode": "trian"}, ["There is no mode=trian", "Did you mean 'train'"]),
        ({"mode": "train"}, ["There is no option 'eval'", "train"]),
        ({"datamodule__batchsize": 4}, ["'datamodule.batchsize'", "Did you mean 'batch_size'?"]),
        ({"trainer__foo": 1}, ["'trainer.foo'", "Choose one of: accelerator"]),
        ({"evl__ckpt": "x"}, ["There is no option 'evl'", "'eval'"]),
        ({"model__t2tattn1_cfg__local_context": 4}, ["'model.t2tattn1_cfg' is not set"]),
        ({"+trainer__foo": 1}, ["trainer cannot be built", "'foo'"]),
        # values
        ({"datamodule__batch_size": -1}, ["datamodule.batch_size=-1"]),
        ({"eval__num_seeds": 0}, ["eval.num_seeds=0", "at least 1"]),
        ({"eval__num_seeds": 1.5}, ["eval.num_seeds=1.5"]),
        ({"eval__compile": "maybe"}, ["eval.compile='maybe'", "true or false"]),
        ({"seed": "abc"}, ["seed=abc", "whole number from 0"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"model__image_size": 100}, ["image_size=100", "multiple of 16"]),
        ({"model__image_size": "big"}, ["model.image_size=big"]),
        ({"model__num_classes": -1}, ["model.num_classes=-1"]),
        ({"model__drop_rate": -1}, ["'model'", "-1"]),
        ({"trainer__precision": 3}, ["trainer cannot be built", "Precision 3"]),
        ({"trainer__devices": 0}, ["trainer cannot be built", "devices=0"]),
        ({"trainer__devices": 1000}, ["trainer.devices=1000", "cores"]),
        ({"trainer__num_nodes": 2}, ["trainer.num_nodes=2", "on one machine alone", "torchrun or srun"]),
        ({"+trainer__gradient_clip_val": "nan"}, ["trainer.gradient_clip_val=nan", "finite number"]),
        ({"model__drop_rate": "inf"}, ["model.drop_rate=inf", "finite number"]),
        ({"datamodule__data_dir": 3}, ["datamodule.data_dir=3", "Give a path"]),
        ({"eval__ckpt": "[a]"}, ["eval.ckpt=['a']", "Give a path"]),
        ({"eval": "null"}, ["eval=None", "eval.NAME=VALUE"]),
        ({"mode": "null"}, ["mode=null: a group cannot be null", "--help"]),
        ({"datamodule": 3}, ["datamodule=3: a group cannot be null, a number", "--help"]),
        ({"eval__ckpt": "a=b.pth"}, ["Cannot read 'eval.ckpt=a=b.pth'", "quote", "spaces or =:"]),
        ({"trainer__accelerator": "gpuu"}, ["trainer cannot be built", "gpuu"]),
        ({"trainer__accelerator": "tpu"}, ["trainer.accelerator=tpu", "no such device", "trainer.accelerator=auto"]),
        ({"paths__log_dir": "INPUTS/empty.pth/logs"}, ["empty.pth/logs", "cannot be used"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_mistake_is_one_message(command_line, inputs, tmp_path, changes, parts):
    status, _, errors = command_line(**changes)
    assert status == 1
    assert errors.startswith("Error: ")
    assert errors.count("\n") == 1, errors
    for part in parts:
        assert part in errors
    assert not results_of(tmp_path)
    assert not (inputs / "ran").exists()


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is an accelerator")
def test_no_gpu(command_line):
    status, _, errors = command_line(trainer__accelerator="gpu")
    assert status == 1
    assert errors == (
        "Error: trainer.accelerator=gpu, but PyTorch finds no such device on this machine. Use "
        "trainer.accelerator=auto, which takes what there is.\n"
    )


def test_an_error_of_the_file_system_is_one_message(command_line, monkeypatch):
    """Within the task too, where Hydra would print a line of its own first."""

    def fail(config):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("src.tasks.evaluate.evaluate", fail)
    status, _, errors = command_line()
    assert status == 1
    assert errors == (
        "Error: A file or connection cannot be used (No space left on device). HYDRA_FULL_ERROR=1 shows which, with "
        "the traceback.\n"
    )


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "SLURM_PROCID", "MASTER_PORT"])
def test_variables_of_launchers_that_are_no_numbers(command_line, monkeypatch, name):
    monkeypatch.setenv(name, "abc")
    status, _, errors = command_line()
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"Error: The environment variable {name}='abc' is not a whole number. Unset it, or")


def test_values_that_hold_interpolations_are_resolved_once(command_line, inputs, tmp_path, monkeypatch):
    """A path may look like an interpolation: it is read as it is, and the environment stays out of it."""
    monkeypatch.setenv("SECRET", "secret")
    data = tmp_path / "${oc.env:SECRET}"
    data.mkdir()
    (data / "images").symlink_to(inputs / "data")
    (data / "weights.pth").symlink_to(inputs / "t2t_vit_7.pth")
    monkeypatch.setenv("DATA_DIR", str(data / "images"))
    monkeypatch.setenv("CHECKPOINT", str(data / "weights.pth"))
    status, output, errors = command_line(datamodule__data_dir=None, eval__ckpt=None)
    assert (status, errors) == (0, "")
    assert "secret" not in output
    (path,) = results_of(tmp_path / "logs" / "runs")
    assert read_results(path.parent).data["dir"] == str(data / "images")
    assert read_results(path.parent).checkpoint["path"] == str(data / "weights.pth")


def test_a_terminal_without_the_characters_of_the_table(command_line, monkeypatch, tmp_path):
    streams = [io.TextIOWrapper(io.BytesIO(), "latin-1", write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert command_line(callbacks="default")[0] == 0, streams[1].buffer.getvalue()
    assert len(results_of(tmp_path)) == 1
    assert b"6 images of val" in streams[0].buffer.getvalue()


def test_a_window_of_nothing(command_line):
    status, _, errors = command_line(
        variant="t2t_vit_t_14", model___t2tattn_cfg="local", model__t2tattn1_cfg__local_context=0
    )
    assert status == 1
    assert errors.startswith("Error: ")
    assert "local_context" in errors


@pytest.mark.parametrize("argument", ["foo", "=3", "model.t2tattn1_cfg.local_context=[1"])
def test_an_argument_that_is_no_option(command_line, argument):
    status, _, errors = command_line(argument)
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"Error: Cannot read '{argument}'. Give options as option=value")


def test_an_unknown_flag(command_line):
    status, _, errors = command_line("--foo")
    assert status == 1
    assert errors.endswith("error: unrecognized arguments: --foo\n")


def test_the_yaml_ending_is_accepted_and_paths_come_from_the_environment(command_line, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(inputs / "data"))
    monkeypatch.setenv("CHECKPOINT", str(inputs / "t2t_vit_7.pth"))
    status, output, errors = command_line(
        experiment="imagenet-t2tvit-eval.yaml", datamodule__data_dir=None, eval__ckpt=None
    )
    assert (status, errors) == (0, "")
    assert "6 images of val" in output
    (path,) = results_of(tmp_path / "logs" / "runs")
    results = read_results(path.parent)
    assert results.data["dir"] == str(inputs / "data")
    assert results.command.startswith("run.py experiment=imagenet-t2tvit-eval ")
    assert {"predictions.csv", "csv", ".hydra", "run.log"} <= {entry.name for entry in path.parent.iterdir()}


def test_a_folder_that_holds_results(command_line, tmp_path):
    folder = tmp_path / "fixed"
    assert command_line(hydra__run__dir=folder)[0] == 0
    status, _, errors = command_line(hydra__run__dir=folder)
    assert status == 1
    assert errors.startswith(f"Error: {folder} holds the results of an earlier run.")


def test_a_multirun_continues_after_a_failed_run(command_line, tmp_path):
    status, output, errors = command_line(
        "-m",
        variant="t2t_vit_t_14",
        experiment="imagenet-t2tvit-eval.yaml",
        model___t2tattn_cfg="full,local,sblocal",
        **{"+model__t2tattn2_cfg__nb_features": 2},
    )
    assert status == 1
    assert [line[:15] for line in errors.splitlines()] == ["Error in run 0:", "Error in run 1:"]
    assert "nb_features" in errors
    (sweep,) = (tmp_path / "logs" / "multiruns").glob("*/*")
    assert results_of(sweep) == [sweep / "2" / "results.json"]
    comparison = json.loads((sweep / "comparison.json").read_text())
    assert [row["attention"] for row in comparison["runs"]] == ["sblocal"]
    assert comparison["failed"] == ["0", "1"]
    assert str(sweep / "comparison.md") in output
    # a later command in the same process starts afresh
    assert command_line()[0] == 0


def test_a_multirun_is_compared(command_line, tmp_path):
    status, output, errors = command_line(
        "-m", variant="t2t_vit_t_14", model___t2tattn_cfg="full,local,performer,sblocal"
    )
    assert (status, errors) == (0, "")
    (sweep,) = (tmp_path / "logs" / "multiruns").glob("*/*")
    assert [path.parent.name for path in results_of(sweep)] == ["0", "1", "2", "3"]
    rows = json.loads((sweep / "comparison.json").read_text())["runs"]
    assert [row["attention"] for row in rows] == ["full", "local", "performer", "sblocal"]
    assert rows[0]["agreement"] == 100.0
    for name in ("comparison.md", "comparison.png"):
        assert (sweep / name).stat().st_size > 0
        assert str(sweep / name) in output


def test_two_multiruns_in_one_folder(command_line, tmp_path):
    sweep = tmp_path / "sweep"
    options = {"variant": "t2t_vit_t_14", "hydra__sweep__dir": sweep, "model___t2tattn_cfg": "full,local"}
    with locked_folder(sweep):
        status, _, errors = command_line("-m", **options)
    assert status == 1
    assert [line.split(" is in use")[0] for line in errors.splitlines()] == [
        f"Error in run {number}: {sweep}" for number in range(2)
    ]
    assert not results_of(sweep)
    assert command_line("-m", **options)[0] == 0
    assert not list(sweep.rglob(".lock"))


def without_measurements(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("images_per_second", "speedup")}


def test_several_attentions_in_one_pass_leave_what_a_multirun_leaves(command_line, tmp_path):
    options, names = {"variant": "t2t_vit_t_14", "eval__num_seeds": 2}, "local,performer,sblocal"
    memory = {"model__t2tattn1_cfg__memory_fraction": 0.125}
    # Hydra composes a sweep without its attentions first
    forced = {f"++{name}": value for name, value in memory.items()}
    assert command_line("-m", model___t2tattn_cfg=names, **options, **forced)[::2] == (0, "")
    (sweep,) = (tmp_path / "logs" / "multiruns").glob("*/*")
    status, output, errors = command_line(eval__attentions=f"[{names}]", **options, **memory)
    assert (status, errors) == (0, "")
    (folder,) = (tmp_path / "logs" / "runs").glob("*/*")
    for number in range(3):
        theirs, ours = (read_results(parent / str(number)) for parent in (sweep, folder))
        assert ours.attention_options == theirs.attention_options
        assert (ours.top1_per_seed, ours.loss) == (theirs.top1_per_seed, theirs.loss)
        theirs, ours = (parent / str(number) / "predictions.csv" for parent in (sweep, folder))
        assert ours.read_bytes() == theirs.read_bytes()
    theirs, ours = (json.loads((parent / "comparison.json").read_text()) for parent in (sweep, folder))
    assert list(map(without_measurements, ours["runs"])) == list(map(without_measurements, theirs["runs"]))
    assert ours["common"] == theirs["common"]
    assert str(folder / "comparison.png") in output
    assert re.search(r"one pass over 6 images with 3 attentions \(5 forward passes of each image\) took", output)


@pytest.mark.parametrize(
    ("arguments", "changes", "parts"),
    [
        ([], {"eval__attentions": "[full,sblocl]"}, ["'sblocl'", "Did you mean 'sblocal'"]),
        ([], {"model__t2tattn1_cfg__local_contxt": 4}, ["local_contxt", "Did you mean 'local_context'"]),
        (["-m"], {}, [" in run 0", "Leave out -m, or sweep over model/t2tattn_cfg=full,sblocal"]),
    ],
)
def test_a_mistake_with_several_attentions_is_one_message(command_line, tmp_path, arguments, changes, parts):
    status, _, errors = command_line(
        *arguments, variant="t2t_vit_t_14", **{"eval__attentions": "[full,sblocal]", **changes}
    )
    assert (status, errors.count("\n")) == (1, 1), errors
    for part in ["Error", *parts]:
        assert part in errors
    assert not results_of(tmp_path)


@pytest.mark.parametrize("attentions", ["", "eval.attentions=null", "eval.attentions=[]"])
def test_options_of_a_stage_stay_as_they_are_with_one_attention(attentions):
    arguments = [attentions, "model.t2tattn1_cfg.local_context=4"]
    assert run._with_options_of_attentions(arguments) == arguments


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_an_evaluation_that_is_interrupted_and_resumed(command_line, monkeypatch, tmp_path, number, status):
    folder, options = tmp_path / "fixed", {"datamodule__batch_size": 1}
    with monkeypatch.context() as patch:
        stop_evaluation_at(patch, 3, number)
        interrupted, output, errors = command_line(hydra__run__dir=folder, **options)
    assert (interrupted, errors) == (status, "")
    (line,) = (line for line in output.splitlines() if "stopped after" in line)
    assert f"after 3 of 6 images on request. The same command with eval.resume=true hydra.run.dir={folder}" in (line)
    assert "3 of 6 images of val" in output
    assert not read_results(folder).complete
    again, _, errors = command_line(hydra__run__dir=folder, **options)
    assert (again, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"Error: {folder} holds an unfinished evaluation. eval.resume=true resumes it")
    assert command_line(hydra__run__dir=folder, eval__resume="true", **options)[::2] == (0, "")
    assert read_results(folder).complete
    # once more, there is nothing to do
    status, output, errors = command_line(hydra__run__dir=folder, eval__resume="true", **options)
    assert (status, errors) == (0, "")
    assert f"{folder} holds this evaluation, and it is finished" in output
    assert "Evaluating" not in output


def test_a_multirun_that_is_interrupted_and_resumed(command_line, monkeypatch, tmp_path):
    options = {"variant": "t2t_vit_t_14", "model___t2tattn_cfg": "full,local,sblocal", "datamodule__batch_size": 1}
    sweep = tmp_path / "sweep"
    with monkeypatch.context() as patch:
        stop_evaluation_at(patch, 10, signal.SIGTERM)
        status, output, errors = command_line("-m", hydra__sweep__dir=sweep, **options)
    assert (status, errors) == (1, "")
    assert f"with eval.resume=true hydra.sweep.dir={sweep} resumes it" in output
    assert [read_results(path.parent).complete for path in results_of(sweep)] == [True, False]
    evaluated = sweep / "0" / "results.json"
    before = evaluated.stat().st_mtime_ns
    assert command_line("-m", hydra__sweep__dir=sweep, eval__resume="true", **options)[::2] == (0, "")
    assert evaluated.stat().st_mtime_ns == before
    assert [read_results(path.parent).complete for path in results_of(sweep)] == [True] * 3
    rows = json.loads((sweep / "comparison.json").read_text())["runs"]
    assert [row["label"] for row in rows] == ["full", "local", "sblocal"]


# Training


@pytest.fixture
def train_line(inputs, run_py, tmp_path):
    """`train_line(folder, **changes)`: exit status, stdout and stderr of a training into `tmp_path`/folder."""

    def call(folder: str = "trained", **changes: object) -> tuple[int, str, str]:
        data = changes.pop("data", inputs / "data")
        return run_py(training_overrides(data, **changes, hydra__run__dir=f"'{tmp_path / folder}'"))

    return call


@pytest.mark.parametrize(
    ("folder", "changes", "split"),
    [
        ("trained", {"model___t2tattn_cfg": "sblocal"}, "val"),
        ("a=b, c", {"model___t2tattn_cfg": "performer", "model__t2tattn2_cfg__nb_features": 4}, "val"),
        (
            "trained",
            {
                **{"model___t2tattn_cfg": "local", "model__t2tattn2_cfg__name": "full", "datamodule__crop_pct": 0.5},
                **{"datamodule__mean": "[0.5,0.4,0.3]", "datamodule__interpolation": "bilinear"},
            },
            "other split",
        ),
        ("trained", {"model___t2tmodel": "t2t_vit_7"}, "val"),
    ],
    ids=["plain", "options_of_a_stage", "two_attentions", "none"],
)
def test_a_training_ends_with_the_command_that_evaluates_it(
    train_line, run_py, inputs, tmp_path, folder, changes, split
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(inputs / "data" / "train")
    (tmp_path / "data" / split).symlink_to(inputs / "data" / "val")
    changes = {**changes, "datamodule__test_split": f"'{split}'", "data": tmp_path / "data"}
    status, output, errors = train_line(folder, **changes, train__epochs=2)
    assert (status, errors) == (0, "")
    (line,) = (line for line in output.splitlines() if "To evaluate it: " in line)
    command = shlex.split(line.partition("To evaluate it: ")[2])
    assert command[:3] == ["python", "run.py", "experiment=imagenet-t2tvit-eval"]
    status, _, errors = run_py([*command[2:], "trainer.accelerator=cpu", "callbacks=none", "datamodule.num_workers=0"])
    assert (status, errors) == (0, "")
    (path,) = results_of(tmp_path / "logs")
    results = read_results(path.parent)
    training = json.loads((tmp_path / folder / "training.json").read_text())
    last = training["history"][-1]
    assert (results.model, results.attention) == (training["model"], training["attention"])
    assert results.loss == pytest.approx(last["val_loss"], rel=1e-6)  # sums in float64 and in float32
    assert results.top1 == pytest.approx(last["val_top1"], rel=1e-6)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_training_that_is_interrupted_and_resumed(train_line, monkeypatch, tmp_path, number, status):
    with monkeypatch.context() as patch:
        stop_at(patch, 1, number)
        interrupted, output, errors = train_line()
    assert (interrupted, errors) == (status, "")
    folder = tmp_path / "trained"
    assert f"train.resume={folder / 'checkpoints' / 'last.ckpt'} resumes it" in output
    assert not json.loads((folder / "training.json").read_text())["complete"]
    again, _, errors = train_line()
    assert (again, errors.count("\n")) == (1, 1)
    assert f"Error: {folder} holds a training already. train.resume=true resumes it" in errors
    assert train_line(train__resume="true")[::2] == (0, "")
    assert json.loads((folder / "training.json").read_text())["complete"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"train__resume": "/missing/last.ckpt"}, ["There is no checkpoint /missing/last.ckpt"]),
        ({"train__resum": "true"}, ["There is no option 'train.resum'", "Did you mean 'resume'"]),
        ({"train__ckpt": "/missing.pth"}, ["/missing.pth does not exist"]),
        ({"optimizer__opt": "adamm"}, ["optimizer cannot be built", "adamm"]),
        ({"optimizer": "adamm"}, ["There is no optimizer=adamm", "Did you mean 'adamw'"]),
        ({"datamodule__train_split": "no"}, ["No folder 'no' in"]),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_mistake_in_a_training_is_one_message(train_line, tmp_path, changes, parts):
    status, _, errors = train_line(**changes)
    assert (status, errors.count("\n")) == (1, 1), errors
    assert errors.startswith("Error: ")
    for part in parts:
        assert part in errors
    assert not list(tmp_path.rglob("training.json"))


# What Hydra saves, where a run leaves the results of the folder as they were


def saved_config(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / ".hydra").iterdir()}


def test_a_refused_evaluation_leaves_the_saved_configuration(command_line, tmp_path):
    folder = tmp_path / "run"
    options = {"variant": "t2t_vit_t_14", "hydra__run__dir": folder, "model___t2tattn_cfg": "local"}
    assert command_line(**options)[0] == 0
    before = saved_config(folder)
    assert b"name: local" in before["config.yaml"]
    for changes, message in (
        ({"model___t2tattn_cfg": "full", "eval__resume": "true"}, "holds a finished evaluation with"),
        ({"eval__ckpt": "INPUTS/no.pth", "eval__resume": "true"}, "no.pth does not exist"),
        ({"eval__attentions": "[full]", "model___t2tattn_cfg": None, "eval__resume": "true"}, "other attentions"),
        ({"seed": 3}, "holds the results of an earlier run"),
    ):
        status, _, errors = command_line(**{**options, **changes})
        assert (status, message in errors) == (1, True), errors
        assert saved_config(folder) == before
    assert command_line(**options, eval__resume="true")[0] == 0
    assert saved_config(folder) == before  # of the run that wrote the results
    assert not (folder / "0").exists()


def test_a_run_in_a_folder_in_use_leaves_the_saved_configuration(command_line, tmp_path):
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("a: 1")
    with locked_folder(folder):
        status, _, errors = command_line(hydra__run__dir=folder)
    assert (status, "is in use by another run" in errors) == (1, True)
    assert (folder / ".hydra" / "config.yaml").read_text() == "a: 1"


def test_a_folder_without_results_has_the_configuration_of_the_last_run(command_line, tmp_path):
    folder = tmp_path / "run"
    for seed in (1, 2):
        assert command_line(hydra__run__dir=folder, eval__ckpt="INPUTS/no.pth", seed=seed)[0] == 1
        assert f"seed: {seed}\n".encode() in saved_config(folder)["config.yaml"]
    assert command_line(hydra__run__dir=folder, seed=3)[0] == 0
    assert b"seed: 3\n" in saved_config(folder)["config.yaml"]


def test_a_multirun_leaves_the_saved_configurations_of_refused_runs(command_line, tmp_path):
    options = {"variant": "t2t_vit_t_14", "hydra__sweep__dir": tmp_path / "sweep"}
    assert command_line("-m", **options, model___t2tattn_cfg="local,full")[0] == 0
    before = [saved_config(tmp_path / "sweep" / str(number)) for number in range(2)]
    status, _, errors = command_line("-m", **options, model___t2tattn_cfg="local,performer", eval__resume="true")
    assert (status, errors.count("holds a finished evaluation with")) == (1, 1)
    assert [saved_config(tmp_path / "sweep" / str(number)) for number in range(2)] == before


def test_a_refused_training_leaves_the_saved_configuration(train_line, tmp_path):
    assert train_line()[0] == 0
    before = saved_config(tmp_path / "trained")
    status, _, errors = train_line(seed=3, train__resume="true")
    assert (status, "was trained with seed=42 (now 3)" in errors) == (1, True)
    assert saved_config(tmp_path / "trained") == before
    assert train_line(train__epochs=4, train__resume="true")[0] == 0
    assert b"epochs: 4" in saved_config(tmp_path / "trained")["config.yaml"]


# In a process of its own


def start(*arguments: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    paths = ("DATA_DIR", "CHECKPOINT", "HYDRA_FULL_ERROR")
    inherited = {name: value for name, value in os.environ.items() if name not in paths}
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        cwd=tmp_path,
        env={**inherited, "LOG_DIR": str(tmp_path / "logs"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_explains_itself_and_imports_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = start("--help", tmp_path=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    for part in ("model/t2tattn_cfg=sblocal", "eval.num_seeds"):
        assert part in done.stdout
    (attentions,) = re.findall(r"model/t2tattn_cfg: ([a-z0-9, \n-]+)", done.stdout)
    assert {"full", "local", "performer", "sblocal", "pairedcluster"} <= set(re.findall(r"[a-z0-9-]+", attentions))


def test_cfg_job_shows_the_configuration(run_py, tmp_path):
    status, output, errors = run_py(["--cfg", "job", "model/t2tattn_cfg=local"])
    assert (status, errors) == (0, "")
    assert "name: local" in output
    assert not (tmp_path / "logs").exists()


def test_nothing_at_all(run_py):
    status, _, errors = run_py([])
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith("Error: No checkpoint given.")


def test_the_traceback_on_request(run_py, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    status, _, errors = run_py([])
    assert status == 1
    assert "Traceback" in errors
    assert errors.splitlines()[-1].startswith("Error: No checkpoint given.")


def test_several_processes_in_a_multirun_with_a_damaged_image(inputs, tmp_path):
    """Each run has its own processes, which do not start the sweep again; a failed one ends with its reason."""
    checkpoint = make_checkpoint(tmp_path / "weights.pth", "t2t_vit_7")
    arguments = overrides(inputs / "data", checkpoint, "t2t_vit_7", trainer__devices=2)
    arguments = [argument for argument in arguments if not argument.startswith("datamodule.data_dir")]
    sweep = f"datamodule.data_dir={inputs / 'damaged'},{inputs / 'data'}"
    done = start("-m", *arguments, sweep, tmp_path=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error in run 0: Cannot decode the image")
    assert done.stderr.count("\n") == 1, done.stderr
    (path,) = results_of(tmp_path)
    assert path.parent.name == "1"
    assert done.stdout.count("6 images of val") >= 1
    assert "Loaded t2t_vit_7" in (path.parent / "run.log").read_text()


def test_a_killed_evaluation_resumes_to_the_same_files(tmp_path):
    """SIGKILL in the middle; true depth, as the process reads the table of variants afresh."""
    data = make_images(tmp_path / "data", 100)
    checkpoint = make_checkpoint(tmp_path / "weights.pth", "t2t_vit_t_7")
    options = {"model___t2tattn_cfg": "sblocal", "datamodule__batch_size": 2, "eval__save_seconds": 0}
    arguments = overrides(data, checkpoint, "t2t_vit_t_7", **options)
    folder, saved = tmp_path / "killed", tmp_path / "killed" / "unfinished" / "process-0.records"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *arguments, f"hydra.run.dir={folder}"],
        cwd=tmp_path,
        # as many threads as here: sums are taken in another order by others
        env={**os.environ, "LOG_DIR": str(tmp_path / "logs"), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline, sizes = time.monotonic() + 120, set()
        # description and first batch are one write, so a second size is a second batch
        while len(sizes) < 2 and process.poll() is None and time.monotonic() < deadline:
            if saved.exists():
                sizes.add(saved.stat().st_size)
            time.sleep(0.002)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not results_of(tmp_path)
    assert len(sizes) == 2

    decoded = []
    decode = dataset.load_rgb
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "load_rgb", lambda source, *limits: decoded.append(source) or decode(source, *limits))
        evaluate(compose_config([*arguments, "eval.resume=true"], folder))
    assert 4 <= len(decoded) < 100
    evaluate(compose_config(arguments, tmp_path / "whole"))
    assert_same_evaluation(folder, tmp_path / "whole")
    assert not saved.parent.exists()
