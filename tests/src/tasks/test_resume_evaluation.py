"""Evaluations that are interrupted and resumed: the files of an uninterrupted one, and everything that is refused."""

from __future__ import annotations

import io
import json
import multiprocessing
import re
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

import src.datamodules.dataset as dataset
import src.evaluation.comparison_files as comparison_files
import src.tasks.resume_state as resume_state
from scatterbrain.errors import UserError
from src.distributed.processes import run_processes
from src.evaluation.comparison import OnePass, compare_runs
from src.evaluation.comparison_files import comparison_paths, is_written
from src.evaluation.predictions import read_predictions
from src.evaluation.results import read_results
from src.tasks.classification_evaluation import SeededClassifier
from src.tasks.evaluate import evaluate, with_runs
from src.tasks.image_records import ImageRecords
from src.tasks.resume_state import ResumeState
from tests.src.distributed.process_functions import evaluate_in_turn, kill_at_each_write
from tests.src.tasks.conftest import NUM_IMAGES
from tests.src.tasks.setup import assert_same_evaluation, make_images, stop_evaluation_at
from tests.src.tasks.test_evaluate import SYNTHETIC

ENDS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}
# six batches, the last of one image
OPTIONS = {"model___t2tattn_cfg": "performer", "datamodule__batch_size": 2}


@pytest.fixture
def interrupt(evaluation, monkeypatch):
    """`interrupt(batch, number=SIGTERM, **changes)`: an evaluation into the folder `run` that stops after a batch."""

    def run(batch: int, number: int = signal.SIGTERM, variant: str = "t2t_vit_t_14", **changes: object) -> None:
        config = evaluation(variant, **changes)
        with monkeypatch.context() as patch:
            stop_evaluation_at(patch, batch, number)
            with pytest.raises(ENDS[number]):
                evaluate(config)

    return run


@pytest.fixture
def resume(evaluation):
    def run(variant: str = "t2t_vit_t_14", **changes: object):
        return evaluate(evaluation(variant, eval__resume="true", **changes))

    return run


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the images decoded from here on."""
    names = []
    decode = dataset.load_rgb
    monkeypatch.setattr(dataset, "load_rgb", lambda path, *limits: names.append(path.name) or decode(path, *limits))
    return names


def records_file(folder: Path, rank: int = 0) -> Path:
    return folder / "unfinished" / f"process-{rank}.records"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_evaluation_resumes_to_the_same_files(
    evaluation, interrupt, resume, decoded, tmp_path, caplog, number
):
    options = {**OPTIONS, "eval__num_seeds": 2}
    ours, theirs = tmp_path / "run", tmp_path / "whole"
    handler = signal.getsignal(number)
    interrupt(3, number, **options)
    assert signal.getsignal(number) is handler
    assert f"stopped after 6 of {NUM_IMAGES} images" in caplog.text
    assert f"with eval.resume=true hydra.run.dir={ours} resumes it" in caplog.text
    evaluate(evaluation("t2t_vit_t_14", "whole", **options))

    # what there is of the images so far is right
    content = json.loads((ours / "results.json").read_text())
    assert (content["complete"], content["num_evaluated"], content["data"]["num_images"]) == (False, 6, NUM_IMAGES)
    lines, all_lines = ((folder / "predictions.csv").read_text().splitlines() for folder in (ours, theirs))
    assert len(lines) == 1 + 6
    assert set(lines) <= set(all_lines)
    part = read_predictions(ours)
    assert content["top1_per_seed"][0] == pytest.approx(100 * np.mean(part.classes[:, 0] == part.targets))
    assert not list(ours.rglob("metrics.csv"))

    decoded.clear()
    results, _ = resume(**options)
    assert len(decoded) == NUM_IMAGES - 6
    assert results.images_per_second > 0
    assert_same_evaluation(ours, theirs)
    content = json.loads((ours / "results.json").read_text())
    assert (content["complete"], content["num_evaluated"]) == (True, NUM_IMAGES)
    assert not (ours / "unfinished").exists()
    assert len(list(ours.rglob("metrics.csv"))) == 1


@pytest.mark.parametrize("batch", [1, 5])
def test_two_batches_at_least_are_evaluated(evaluation, interrupt, resume, decoded, tmp_path, batch):
    """The first fixes the size that the last one is filled up to."""
    evaluate(evaluation("t2t_vit_t_14", "whole", **OPTIONS))
    interrupt(batch, **OPTIONS)
    decoded.clear()
    resume(**OPTIONS)
    assert len(decoded) == max(3, NUM_IMAGES - 2 * batch)
    assert_same_evaluation(tmp_path / "run", tmp_path / "whole")


def test_several_interruptions(evaluation, interrupt, resume, tmp_path):
    evaluate(evaluation("t2t_vit_t_14", "whole", **OPTIONS))
    # the third leaves the batches before it as they are, for one is evaluated again
    for batch, expected in ((2, 4), (3, 10), (1, 10)):
        interrupt(batch, eval__resume="true" if expected > 4 else "false", **OPTIONS)
        assert read_results(tmp_path / "run").num_evaluated == expected
    resume(**OPTIONS)
    assert_same_evaluation(tmp_path / "run", tmp_path / "whole")


def test_several_attentions(evaluation, interrupt, resume, decoded, tmp_path):
    options = {"eval__attentions": "[full,sblocal]", "eval__num_seeds": 2, "datamodule__batch_size": 2}
    whole, run = tmp_path / "whole", tmp_path / "run"
    evaluate(evaluation("t2t_vit_t_14", "whole", **options))
    interrupt(2 * 3 - 1, signal.SIGINT, **options)  # in the first attention of the third batch
    for number in range(2):
        results = read_results(run / str(number))
        assert (results.complete, results.num_evaluated) == (False, 6)
    assert not (run / "comparison.json").exists()
    with pytest.raises(UserError, match=r"run holds an unfinished evaluation. eval.resume=true resumes it"):
        evaluate(evaluation("t2t_vit_t_14", **options))
    with pytest.raises(UserError, match=r"attention=\['full', 'sblocal'\] \(now \['full', 'local'\]\)"):
        resume(**options | {"eval__attentions": "[full,local]"})

    decoded.clear()
    results, _ = resume(**options)
    assert len(decoded) == NUM_IMAGES - 6
    for number in range(2):
        assert_same_evaluation(run / str(number), whole / str(number))
    ours, theirs = (json.loads((folder / "comparison.json").read_text())["runs"] for folder in (run, whole))
    assert [row["agreement"] for row in ours] == [row["agreement"] for row in theirs]
    assert not (run / "unfinished").exists()
    again, objects = resume(**options)
    assert not objects
    assert again == results
    for names, message in (
        ("[sblocal,full]", r"0 holds a finished evaluation with attention=full \(now sblocal\)"),
        ("[full]", r"of other attentions \(see .*1\), but eval.attentions=\['full'\]"),
        ("null", r"of other attentions \(see .*0\), but eval.attentions=None"),
    ):
        with pytest.raises(UserError, match=message):
            resume(**options | {"eval__attentions": names, "model___t2tattn_cfg": "full" if names == "null" else None})


@pytest.mark.parametrize("left", [1, 2], ids=["results", "comparison"])
def test_a_process_that_is_killed_while_it_writes(evaluation, resume, monkeypatch, tmp_path, left):
    """Between the results of two attentions, and in the comparison: what is missing is completed."""
    options = {"eval__attentions": "[full,sblocal]", "datamodule__batch_size": 4}
    whole, run = tmp_path / "whole", tmp_path / "run"
    evaluate(evaluation("t2t_vit_t_14", "whole", **options))
    shutil.copytree(whole, run)
    written = ["1/results.json", "comparison.json", "comparison.md", "comparison.png"]
    for name in written[left - 1 :]:
        (run / name).unlink()
    # as `atomic_write` names what it has not finished
    for name in (".comparison.png.0123456789ab.tmp", "1/.results.json.0123456789ab.tmp"):
        (run / name).write_text("half")
    if left == 2:
        (run / "unfinished").mkdir()
    results, _ = resume("t2t_vit_t_14", **options)
    assert [each.complete for each in results] == [True, True]
    for number in range(2):
        assert_same_evaluation(run / str(number), whole / str(number))
    assert {path.relative_to(run) for path in contents_of(run)} >= {
        path.relative_to(whole) for path in contents_of(whole)
    }
    assert not list(run.rglob("*.tmp"))
    assert not (run / "unfinished").exists()
    if left == 2:
        assert (run / "comparison.json").read_bytes() == (whole / "comparison.json").read_bytes()


def test_a_signal_that_ends_the_decoding_processes_too(evaluation, monkeypatch, resume, decoded, tmp_path, caplog):
    step = SeededClassifier.step
    steps = []

    def lose_workers(self, *batch):
        steps.append(batch)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
        step(self, *batch)

    config = evaluation("t2t_vit_t_14", **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(SeededClassifier, "step", lose_workers)
        with pytest.raises(SystemExit):
            evaluate(config)
    assert "stopped on request and is saved up to its last batch. The same command with" in caplog.text
    evaluate(evaluation("t2t_vit_t_14", "whole", **OPTIONS))
    decoded.clear()
    resume(**OPTIONS)
    assert len(decoded) == NUM_IMAGES - 6
    assert_same_evaluation(tmp_path / "run", tmp_path / "whole")


def test_images_in_memory(evaluation, interrupt, resume, tmp_path):
    options = {"model___t2tattn_cfg": "full", "datamodule__batch_size": 2, **SYNTHETIC}
    evaluate(evaluation("t2t_vit_t_14", "whole", **options))
    interrupt(3, **options)
    _, objects = resume(**options)
    assert len(objects.datamodule.test_dataloader()) == 6 - 3
    assert_same_evaluation(tmp_path / "run", tmp_path / "whole")


def test_a_file_that_is_cut_off_anywhere(evaluation, interrupt, resume, decoded, tmp_path):
    """As a crash while it is written leaves it: what is whole of it counts, and the rest is evaluated again."""
    options = {**OPTIONS, "eval__save_seconds": 0}
    evaluate(evaluation("t2t_vit_t_14", "whole", **options))
    interrupt(4, **options)
    whole = records_file(tmp_path / "run").read_bytes()
    ends = [end for _, end in resume_state._blocks(records_file(tmp_path / "run"))]
    assert ends[-1] == len(whole)
    # cut off within the description, before and within the first batch, within the head of the third and before the
    # last; and with zeros in place of what had not reached the disk
    cuts = [(ends[0] - 1, 0), (ends[0], 0), (ends[1] - 1, 0), (ends[2] + 5, 2), (ends[3], 3)]
    contents = [(whole[:left], batches) for left, batches in cuts]
    contents.append((whole[: ends[2] + 100].ljust(len(whole), b"\0"), 2))
    for content, batches in contents:
        shutil.rmtree(tmp_path / "run")
        records_file(tmp_path / "run").parent.mkdir(parents=True)
        records_file(tmp_path / "run").write_bytes(content)
        decoded.clear()
        resume(**options)
        assert len(decoded) == NUM_IMAGES - 2 * batches, len(content)
        assert_same_evaluation(tmp_path / "run", tmp_path / "whole")


def rename_one(data: Path) -> None:
    image = data / "val" / "c0" / "000.png"
    image.rename(image.with_name("0000.png"))


@pytest.mark.parametrize("attentions", [None, "[full,performer]"])
def test_a_process_that_is_killed_while_it_writes_results(evaluation, monkeypatch, tmp_path, attentions):
    """At each of its last changes of files: a resume leaves what an uninterrupted run leaves, and nothing else."""
    monkeypatch.setattr(comparison_files, "comparison_figure", lambda comparison: Figure(figsize=(1, 1)))
    options = {"datamodule__batch_size": 4, "eval__attentions": attentions, "eval__save_seconds": 0}
    config = evaluation("t2t_vit_t_14", **options)
    run, whole, killed = (tmp_path / name for name in ("run", "whole", "killed"))
    stale = [path.name for path in comparison_paths(whole)] if attentions else []
    for name in stale:  # of an earlier run, whose results were moved away
        (run / name).write_text("{}")
    killed.mkdir()
    process = multiprocessing.get_context("spawn").Process(
        target=kill_at_each_write, args=("evaluate", OmegaConf.to_container(config), killed)
    )
    process.start()
    process.join(120)
    assert process.exitcode == 0
    evaluate(evaluation("t2t_vit_t_14", "whole", **options))
    names = {path.relative_to(whole) for path in whole.rglob("*")}
    numbers = sorted(int(path.name) for path in killed.iterdir())
    # each file is killed twice: empty and complete under its temporary name
    left = [[path.name for path in (killed / str(number)).rglob("*")] for number in numbers]
    assert sum(any(name.endswith(".tmp") for name in files) for files in left) == 2 * (7 if attentions else 2)
    for number in numbers:
        folder = killed / str(number)
        evaluate(evaluation("t2t_vit_t_14", f"killed/{number}", **options, eval__resume="true"))
        assert {path.relative_to(folder) for path in folder.rglob("*")} == names
        runs = [folder / name for name in ("0", "1")] if attentions else [folder]
        for each in runs:
            assert_same_evaluation(each, whole / each.relative_to(folder))
        if attentions:
            comparison = compare_runs(runs, one_pass=OnePass(**read_results(runs[0]).one_pass))
            assert is_written(folder, comparison)


OTHERS = pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval__ckpt": "other"}, r"with checkpoint.sha256=\w+ \(now \w+\). Give the same"),
        ({"data": "fewer"}, r"with data.num_images=11 \(now 9\), data.names"),
        ({"data": "renamed"}, r"with data.names.sha256=\w+ \(now \w+\). Give the same"),
        ({"data": "inverted"}, r"with data.images.sha256=\w+ \(now \w+\). Give the same"),
        ({"model___t2tattn_cfg": "sblocal"}, r"with attention=performer \(now sblocal\)"),
        ({"++model__t2tattn1_cfg__nb_features": 3}, "with attention_options=.*3"),
        ({"seed": 3}, r"with seeds=\[1111\] \(now \[3\]\). Give the same"),
        ({"eval__num_seeds": 2}, r"with seeds=\[1111\] \(now \[1111, 1112\]\). Give the same"),
        ({"trainer__precision": "64-true"}, r"with precision=32-true \(now 64-true\)"),
        ({"model__image_size": 48}, r".*image_size=32 \(now 48\)"),
        ({"datamodule__batch_size": 3}, r"with datamodule.batch_size=2 \(now 3\)"),
        ({"model__fast": "off"}, r"with model.fast=True \(now False\)"),
    ],
    ids=str,
)


def with_inputs(changes: dict[str, object], checkpoints: dict[str, Path], tmp_path: Path) -> dict[str, object]:
    """The changes, with other weights and images where they name some."""
    if "eval__ckpt" in changes:
        weights = torch.load(checkpoints["t2t_vit_t_14"], weights_only=True)
        weights["state_dict_ema"]["head.bias"] += 1
        torch.save(weights, tmp_path / "other.pth")
        return {"eval__ckpt": tmp_path / "other.pth"}
    if changes.get("data") == "fewer":
        return {"data": make_images(tmp_path / "fewer", 9)}
    if changes.get("data") == "renamed":
        changes = {"data": make_images(tmp_path / "renamed", NUM_IMAGES)}
        rename_one(changes["data"])
    if changes.get("data") == "inverted":
        changes = {"data": make_images(tmp_path / "inverted", NUM_IMAGES)}
        one = sorted(path for path in changes["data"].rglob("*") if path.is_file())[3]
        ImageOps.invert(Image.open(one).convert("RGB")).save(one)
    return changes


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@OTHERS
def test_another_evaluation_is_not_resumed(interrupt, resume, checkpoints, tmp_path, changes, message):
    interrupt(2, **OPTIONS)
    before = contents_of(tmp_path / "run")
    with pytest.raises(UserError, match=f"run holds an unfinished evaluation {message}") as caught:
        resume(**{**OPTIONS, **with_inputs(changes, checkpoints, tmp_path)})
    assert "\n" not in str(caught.value)
    assert before.items() <= contents_of(tmp_path / "run").items()


def test_another_evaluation_does_not_pass_for_a_finished_one(evaluation, resume, checkpoints, tmp_path):
    evaluate(evaluation("t2t_vit_t_14", **OPTIONS))
    before = contents_of(tmp_path / "run")
    for changes, message in OTHERS.args[1]:
        with pytest.raises(UserError, match=f"run holds a finished evaluation {message}") as caught:
            resume(**{**OPTIONS, **with_inputs(changes, checkpoints, tmp_path)})
        assert "\n" not in str(caught.value)
    for changes in ({"eval__attentions": "[full]"}, {"eval__attentions": "[performer,full]"}):
        with pytest.raises(UserError, match=r"holds an evaluation of other attentions .* but eval.attentions=\['"):
            resume(**{"datamodule__batch_size": 2, **changes})
    assert contents_of(tmp_path / "run") == before


def test_a_moved_evaluation_resumes(evaluation, interrupt, resume, data, checkpoints, tmp_path):
    """Where images and weights are is nothing of the evaluation."""
    interrupt(2, **OPTIONS)
    shutil.copytree(data, tmp_path / "moved")
    shutil.copy(checkpoints["t2t_vit_t_14"], tmp_path / "moved.pth")
    changes = {"data": tmp_path / "moved", "eval__ckpt": tmp_path / "moved.pth"}
    results, _ = resume(**OPTIONS, **changes)
    evaluate(evaluation("t2t_vit_t_14", "whole", **OPTIONS, **changes))
    assert results.complete
    assert_same_evaluation(tmp_path / "run", tmp_path / "whole")


def test_another_machine_resumes_with_a_warning(interrupt, resume, monkeypatch, caplog):
    interrupt(2, **OPTIONS)
    monkeypatch.setattr("src.tasks.evaluation_runs.device_name", lambda trainer: "another")
    results, _ = resume(**OPTIONS)
    assert results.device == "another"
    assert re.search(r"The evaluation began with device=cpu .* \(now another\). Its results may differ", caplog.text)


def test_a_finished_evaluation_is_left_alone(evaluation, resume, tmp_path, caplog):
    caplog.set_level("INFO")
    results, _ = evaluate(evaluation("t2t_vit_t_14", **OPTIONS))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").glob("*.*")}
    again, objects = resume(**OPTIONS)
    assert not objects
    assert again == results
    assert "it is finished: nothing to do" in caplog.text
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "run").glob("*.*")}
    with pytest.raises(UserError, match="holds the results of an earlier run"):
        evaluate(evaluation("t2t_vit_t_14", **OPTIONS))


def test_resume_without_a_state_starts(resume):
    results, _ = resume("t2t_vit_7")
    assert (results.complete, results.num_evaluated) == (True, NUM_IMAGES)


def test_a_stop_before_the_first_image_writes_nothing(evaluation, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(ResumeState, "stop_requested", True)
    with pytest.raises(SystemExit):
        evaluate(evaluation())
    assert f"stopped after 0 of {NUM_IMAGES} images" in caplog.text
    assert not list((tmp_path / "run").rglob("*.json"))
    assert not (tmp_path / "run" / "unfinished").exists()


def test_nan_leaves_nothing_to_resume(evaluation, monkeypatch, tmp_path):
    monkeypatch.setattr("src.models.t2t_vit.T2TViT.forward", lambda self, images: torch.full((len(images), 5), np.nan))
    for _ in range(2):
        with pytest.raises(UserError, match="NaN"):
            evaluate(evaluation(model__fast="off", eval__save_seconds=0))
    assert not (tmp_path / "run" / "unfinished").exists()


@pytest.mark.parametrize(("value", "shown"), [("maybe", "eval.resume='maybe'"), (1, "eval.resume=1")])
def test_values_of_resume(evaluation, value, shown):
    with pytest.raises(UserError, match=f"{shown} is not valid"):
        evaluate(evaluation(eval__resume=value))


@pytest.mark.parametrize("value", [-1, "often", "null"])
def test_values_of_save_seconds(evaluation, value):
    with pytest.raises(UserError, match=r"eval.save_seconds=.* is not valid. Give seconds"):
        evaluate(evaluation(eval__save_seconds=value))


# The files of one process


def table_of(rows: int, draws: int = 2, classes: int = 7) -> ImageRecords:
    return ImageRecords(rows, classes, draws)


def fill_batch(table: ImageRecords, indices: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(int(indices[0]))
    for draw in range(len(table.count)):
        table.update(draw, indices, torch.randn(len(indices), 7, generator=generator), indices % 7)


def test_saves_are_as_far_apart_as_requested(monkeypatch, tmp_path):
    now = 100.0
    monkeypatch.setattr(resume_state.time, "monotonic", lambda: now)
    writes = []
    monkeypatch.setattr(resume_state.os, "fsync", lambda file: writes.append(now))
    part, table = ResumeState(tmp_path, {}, {}, 0, save_seconds=10), table_of(80)
    part.restore([table])
    for number in range(20):
        now = 100.0 + 2 * number
        indices = torch.arange(4 * number, 4 * number + 4)
        fill_batch(table, indices)
        part.add(number, indices)
    assert writes == [110, 120, 130]
    assert part.num_saved == 16
    part.save()
    part.save()
    assert len(writes) == 4


def test_rows_are_restored_bit_for_bit(tmp_path):
    batches = [torch.tensor([2 * first, 2 * first + 4]) for first in (0, 1, 4, 5)]
    part, table = ResumeState(tmp_path, {"a": 1}, {}, 0, 0), table_of(16)
    part.restore([table, table])
    for number, indices in enumerate(batches):
        fill_batch(table, indices)
        part.add(number, indices)

    items = [[torch.zeros(2), indices, indices] for indices in batches]
    again = ResumeState(tmp_path, {"a": 1}, {}, 0, 0)
    rest = again.remaining_batches(DataLoader(items, batch_size=None))
    assert [batch[-1].tolist() for batch in rest] == [indices.tolist() for indices in batches[2:]]
    tables = [table_of(16), table_of(16)]
    again.restore(tables)
    for each in tables:
        assert each.count.sum(0).tolist() == [2, 0, 2, 0, 2, 0, 2] + 9 * [0]
        for number, indices in enumerate(batches[2:]):
            fill_batch(each, indices)
            again.add(number, indices)
        for name in ("count", "targets", "top5_classes", "top5_probabilities", "losses"):
            assert torch.equal(getattr(each, name), getattr(table, name)), name
    # the batches that were evaluated once more are in the file once
    assert ResumeState(tmp_path, {"a": 1}, {}, 0, 0).num_saved == 4


@pytest.mark.parametrize("written", [True, False])
def test_an_interrupted_save_is_repeated(monkeypatch, tmp_path, written):
    part, table = ResumeState(tmp_path, {}, {}, 0, 0), table_of(8)
    part.restore([table])
    fill_batch(table, torch.tensor([3]))
    part.add(0, torch.tensor([3]))
    fill_batch(table, torch.tensor([5]))

    def break_off(descriptor):
        if not written:
            with open(records_file(tmp_path), "r+b") as file:
                file.truncate(records_file(tmp_path).stat().st_size - 7)
        raise RuntimeError("a signal")

    with monkeypatch.context() as patch:
        patch.setattr(resume_state.os, "fsync", break_off)
        with pytest.raises(RuntimeError, match="a signal"):
            part.add(1, torch.tensor([5]))
    part.save()
    again = ResumeState(tmp_path, {}, {}, 0, 0)
    assert again.num_saved == 2
    assert [batch["indices"].tolist() for batch in again._saved] == [[3], [5]]


def test_a_full_disk_does_not_stop_the_evaluation(monkeypatch, tmp_path, caplog):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume_state.os, "fsync", fail)
    part, table = ResumeState(tmp_path, {}, {}, 0, 0), table_of(8)
    part.restore([table])
    for number in range(2):
        fill_batch(table, torch.tensor([number]))
        part.add(number, torch.tensor([number]))
    assert caplog.text.count("cannot be written (No space left on device): from here on, nothing is saved") == 1


def test_nothing_in_the_file_is_executed(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, batches=np.array([Path("x")], dtype=object))
    contents = [b"[{}, {}]", buffer.getvalue()]
    path = records_file(tmp_path)
    path.parent.mkdir()
    path.write_bytes(b"".join(resume_state._HEAD.pack(b"EVAL", len(x), zlib.crc32(x)) + x for x in contents))
    with pytest.raises(UserError, match=r"process-0.records holds something else than arrays, which was not executed"):
        ResumeState(tmp_path, {}, {}, 0, 0)


def test_files_of_other_processes_are_compared_too(tmp_path):
    part, table = ResumeState(tmp_path, {"trainer.devices": 2}, {}, 1, 0), table_of(2)
    part.restore([table])
    fill_batch(table, torch.tensor([1]))
    part.add(0, torch.tensor([1]))
    with pytest.raises(UserError, match=r"with trainer.devices=2 \(now 1\)"):
        ResumeState(tmp_path, {"trainer.devices": 1}, {}, 0, 0)


def test_two_processes(evaluation, tmp_path):
    """One of two ranks gets a request to stop: both save, rank 0 writes the results of both, and both resume."""
    contents = []
    for folder, resumed in (("run", "false"), ("run", "true"), ("whole", "false")):
        options = {"trainer__devices": 2, "eval__resume": resumed, "eval__num_seeds": 2}
        config = evaluation("t2t_vit_t_14", folder, **OPTIONS | options | {"datamodule__batch_size": 1})
        contents.append(OmegaConf.to_container(with_runs(config, [config]), resolve=True))
    ends = run_processes(evaluate_in_turn, 2, contents)
    # images 0, 2, ..., 10 of process 0 were all evaluated, and 1 and 3 of process 1
    assert ends == [(False, 8), (True, NUM_IMAGES), (True, NUM_IMAGES)]
    assert_same_evaluation(tmp_path / "run", tmp_path / "whole")
    assert not (tmp_path / "run" / "unfinished").exists()
