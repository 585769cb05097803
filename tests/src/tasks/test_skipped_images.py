"""Evaluations that skip images which cannot be decoded: results of the others, and a list of those skipped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from scatterbrain.errors import UserError
from src.distributed.processes import run_processes
from src.evaluation.comparison import compare_runs
from src.evaluation.comparison_table import comparison_markdown
from src.evaluation.predictions import read_predictions
from src.evaluation.results import read_results, skipped_info
from src.evaluation.results_table import results_table
from src.tasks.classification_evaluation import SeededClassifier
from src.tasks.evaluate import evaluate, with_runs
from src.tasks.image_records import ImageRecords
from src.tasks.resume_state import ResumeState
from src.tasks.train import train
from tests.src.distributed.process_functions import evaluate_in_turn
from tests.src.tasks.conftest import NUM_IMAGES
from tests.src.tasks.setup import assert_same_evaluation, make_images, stop_evaluation_at

# In the order of the names, the images are c0/000, c0/005, c0/010, c1/001, c1/006, ...: in batches of two, the first
# one lacks an image, the third one both, and the last one is empty.
DAMAGED = {
    "c0/005.png": "the file is empty",
    **dict.fromkeys(["c1/006.png", "c2/002.png"], "not an image of a known format"),
}
DAMAGED["c4/009.png"] = "No such file or directory"
BATCHES = 4
SKIP = {"model___t2tattn_cfg": "performer", "datamodule__batch_size": 2, "datamodule__on_error": "skip"}


def damage(folder: Path) -> Path:
    val = folder / "val"
    (val / "c0" / "005.png").write_bytes(b"")
    (val / "c1" / "006.png").write_bytes(b"nothing")
    (val / "c2" / "002.png").write_bytes(b"nothing")
    (val / "c4" / "009.png").unlink()
    (val / "c4" / "009.png").symlink_to("nowhere")
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """Eleven images, of which four are damaged; tests leave it as it is."""
    return damage(make_images(tmp_path_factory.mktemp("damaged"), NUM_IMAGES))


@pytest.fixture
def run(evaluation, damaged):
    """`run(folder="run", **changes)`: evaluate with the damaged images skipped."""

    def evaluate_into(folder: str = "run", **changes: object):
        return evaluate(evaluation("t2t_vit_t_14", folder, **{"data": damaged, **SKIP, **changes}))

    return evaluate_into


def content_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def crash_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let an evaluation end in a step, with what is on the disk by then, as after kill -9."""
    evaluate_batch = SeededClassifier.step
    steps = []

    def fail(self, *batch):
        steps.append(batch)
        if len(steps) == step:
            raise RuntimeError("the power is gone")
        evaluate_batch(self, *batch)

    patch.setattr(SeededClassifier, "step", fail)


@pytest.mark.parametrize("cache", [False, True])
def test_results_are_those_of_the_other_images(evaluation, run, data, damaged, tmp_path, caplog, capsys, cache):
    # one image at a time, so that batches hold the same images: the figures are the same to the last digit
    options = {"datamodule__batch_size": 1, "eval__num_seeds": 2}
    if cache:
        options["datamodule__cache_dir"] = tmp_path / "cache"
    results, _ = run(**options)
    intact = make_images(tmp_path / "intact", NUM_IMAGES)
    for name in DAMAGED:
        (intact / "val" / name).unlink()
    options = {**SKIP, **options, "datamodule__on_error": "raise"}
    expected, _ = evaluate(evaluation("t2t_vit_t_14", "intact_run", data=intact, **options))

    ours, theirs = tmp_path / "run", tmp_path / "intact_run"
    assert (ours / "predictions.csv").read_bytes() == (theirs / "predictions.csv").read_bytes()
    for name in ("top1", "top5", "loss", "top1_per_seed", "top1_std", "num_evaluated", "complete"):
        assert getattr(results, name) == getattr(expected, name), name
    assert results.data["num_images"] == expected.data["num_images"] == results.num_evaluated == NUM_IMAGES - 4
    content, without = content_of(ours), content_of(theirs)
    assert content["skipped"] == {"number": 4, "images": DAMAGED}
    assert list(content["skipped"]["images"]) == list(DAMAGED)
    assert list(content) == [*without, "skipped"]
    assert read_results(ours) == results
    warnings = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    root = damaged / "val"
    assert warnings == [
        f"4 of 11 images of {root} cannot be decoded and were left out (datamodule.on_error=skip), see results.json: "
        + ", ".join(f"{name} ({reason})" for name, reason in DAMAGED.items())
    ]
    assert "4 that cannot be decoded" in capsys.readouterr().out


def test_nothing_damaged(run, data, tmp_path, caplog):
    results, _ = run(data=data)
    assert results.skipped == {"number": 0, "images": {}}
    assert results.data["num_images"] == NUM_IMAGES
    assert "left out" not in caplog.text
    assert "left out" not in [str(cell) for cell in results_table(results, None).columns[0]._cells]


def test_an_error_by_default_and_then_it_is_skipped(run, tmp_path):
    """A damaged image at the end of a long evaluation does not cost what is finished."""
    options = {"eval__save_seconds": 0, "datamodule__on_error": "raise"}
    with pytest.raises(UserError, match=r"Cannot decode the image .*c0/005.png: the file is empty. Remove or replace"):
        run(**options)
    run(eval__resume="true", eval__save_seconds=0)
    run("whole")
    assert_same_evaluation(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("step", [1, 2, BATCHES])
def test_an_interrupted_evaluation_resumes_to_the_same_files(run, monkeypatch, tmp_path, step):
    """Images that were not reached are not listed, those that were are kept."""
    with monkeypatch.context() as patch:
        stop_evaluation_at(patch, step, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run()
    content = content_of(tmp_path / "run")
    # left out of the batches before the stop: 1 of the first, none of the second, 2 of the third, 0, 0
    reached = {1: 1, 2: 1, BATCHES: 3}[step]
    assert content["complete"] is False
    assert content["skipped"]["number"] == reached
    assert content["data"]["num_images"] == NUM_IMAGES - reached
    assert not content["skipped"]["images"].keys() & set(read_predictions(tmp_path / "run").images)
    run(eval__resume="true")
    run("whole")
    assert content_of(tmp_path / "run")["skipped"] == {"number": 4, "images": DAMAGED}
    assert_same_evaluation(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("step", [2, BATCHES])
def test_a_crash(run, monkeypatch, tmp_path, step):
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(RuntimeError, match="the power is gone"):
            run(eval__save_seconds=0, eval__num_seeds=2)
    assert (tmp_path / "run" / "unfinished" / "process-0.records").exists()
    run(eval__resume="true", eval__num_seeds=2)
    run("whole", eval__num_seeds=2)
    assert_same_evaluation(tmp_path / "run", tmp_path / "whole")


def test_what_was_left_out_is_an_error_where_all_images_are_wanted(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(RuntimeError, match="the power is gone"):
            run(eval__save_seconds=0)
    with pytest.raises(
        UserError, match=r"left out \d images, which could not be decoded: c0/005.png \(the file is emp"
    ):
        run(eval__resume="true", datamodule__on_error="raise")


def test_several_attentions_in_one_pass(run, monkeypatch, tmp_path):
    options = {"model___t2tattn_cfg": None, "eval__attentions": "[full,sblocal]", "eval__save_seconds": 0}
    with monkeypatch.context() as patch:
        crash_at(patch, 6)
        with pytest.raises(RuntimeError, match="the power is gone"):
            run(**options)
    results, _ = run(eval__resume="true", **options)
    run("whole", **options)
    for number, result in enumerate(results):
        assert result.skipped == {"number": 4, "images": DAMAGED}
        assert_same_evaluation(tmp_path / "run" / str(number), tmp_path / "whole" / str(number))
    comparison = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert comparison["common"]["data"]["num_images"] == NUM_IMAGES - 4
    assert comparison["runs"][1]["agreement"] is not None


@pytest.mark.parametrize("attentions", [None, "[full,local]"])
def test_no_image_at_all(run, tmp_path, attentions):
    data = make_images(tmp_path / "data", 5)
    for path in (data / "val").rglob("*.png"):
        path.write_bytes(b"")
    options = {"data": data, "eval__save_seconds": 0}
    if attentions:
        options |= {"model___t2tattn_cfg": None, "eval__attentions": attentions}
    for _ in range(2):  # nothing is left that stands in the way of a new beginning
        with pytest.raises(UserError) as caught:
            run(**options)
        message = str(caught.value)
        assert f"None of the 5 images of {data / 'val'} can be decoded: c0/000.png (the file is empty), c1" in message
        assert "scripts/check_imagenet.py DIR --decode" in message
    assert not list((tmp_path / "run").rglob("*.json"))


def test_a_stop_while_nothing_could_be_decoded(run, monkeypatch, tmp_path):
    data = make_images(tmp_path / "data", 5)
    (data / "val" / "c0" / "000.png").write_bytes(b"")
    (data / "val" / "c1" / "001.png").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(ResumeState, "stop_requested", property(lambda self: len(self._indices) == 1))
        with pytest.raises(SystemExit):
            run(data=data)
    assert not (tmp_path / "run" / "results.json").exists()
    results, _ = run(data=data, eval__resume="true")
    assert (results.num_evaluated, results.skipped["number"]) == (3, 2)


def test_a_value_that_is_misspelt(run):
    with pytest.raises(UserError, match=r"datamodule.on_error='skpi' is not valid. Did you mean 'skip'\?"):
        run(datamodule__on_error="skpi")


def test_training_is_refused(training):
    with pytest.raises(UserError, match=r"on_error=skip is for evaluation: .*scripts/check_imagenet.py DIR --decode"):
        train(training(datamodule__on_error="skip"))


def test_runs_of_different_images_are_not_compared_silently(evaluation, run, tmp_path, caplog):
    data = damage(make_images(tmp_path / "data", NUM_IMAGES))
    run("0", data=data, model___t2tattn_cfg="full")
    # one of them is repaired meanwhile
    image = make_images(tmp_path / "fresh", NUM_IMAGES) / "val" / "c0" / "005.png"
    image.rename(data / "val" / "c0" / "005.png")
    run("1", data=data, model___t2tattn_cfg="local")
    caplog.clear()
    comparison = compare_runs([tmp_path / "0", tmp_path / "1"])
    assert comparison.rows[1].top1_difference is comparison.rows[1].agreement is None
    assert [row.num_images for row in comparison.rows] == [7, 8]
    assert f"{tmp_path / '1'} is not compared with full attention: it evaluated 8 images, and" in caplog.text
    assert "| attention | images |" in comparison_markdown(comparison)
    caplog.clear()
    comparison = compare_runs([tmp_path / "0"])
    assert "not compared" not in caplog.text
    assert "| images |" not in comparison_markdown(comparison)
    # as many images, but others
    (data / "val" / "c3" / "003.png").write_bytes(b"")
    run("2", data=data, model___t2tattn_cfg="local")
    with pytest.raises(UserError, match="evaluated different images of the same data"):
        compare_runs([tmp_path / "0", tmp_path / "2"])


def test_two_processes(evaluation, damaged, tmp_path):
    """One of two ranks that has no image left; and two that are interrupted and resume."""
    none = make_images(tmp_path / "none", 5)
    names = sorted((none / "val").rglob("*.png"))
    for path in names[1::2]:
        path.write_bytes(b"")
    contents = []
    for folder, resumed, data in (
        ("run", "false", damaged),
        ("run", "true", damaged),
        ("whole", "false", damaged),
        ("none", "false", none),
    ):
        options = {"trainer__devices": 2, "eval__resume": resumed, "datamodule__batch_size": 1}
        config = evaluation("t2t_vit_t_14", f"{folder}_run", data=data, **SKIP | options)
        contents.append(OmegaConf.to_container(with_runs(config, [config]), resolve=True))
    ends = run_processes(evaluate_in_turn, 2, contents)
    assert ends[0][0] is False
    assert ends[1:] == [(True, NUM_IMAGES - 4), (True, NUM_IMAGES - 4), (True, 3)]
    assert content_of(tmp_path / "run_run")["skipped"] == {"number": 4, "images": DAMAGED}
    assert_same_evaluation(tmp_path / "run_run", tmp_path / "whole_run")
    expected = dict.fromkeys([path.relative_to(none / "val").as_posix() for path in names[1::2]], "the file is empty")
    assert content_of(tmp_path / "none_run")["skipped"] == {"number": 2, "images": expected}


# Parts


def test_a_row_that_was_skipped_has_to_be_missing():
    for partial in (False, True):
        table = ImageRecords(4, 5)
        table.partial, table.skipped = partial, [1, 3]
        table.update(0, torch.tensor([0, 2]), torch.randn(2, 5), torch.tensor([0, 1]))
        assert len(table.compute().targets) == 2
        assert table.evaluated.tolist() == [True, False, True, False]
        table = ImageRecords(4, 5)
        table.partial, table.skipped = partial, [3]
        table.update(0, torch.tensor([0, 2, 3]), torch.randn(3, 5), torch.tensor([0, 1, 2]))
        with pytest.raises(RuntimeError, match="not counted exactly once"):
            table.compute()
    table = ImageRecords(3, 5)
    table.skipped = [1]
    table.update(0, torch.tensor([0]), torch.randn(1, 5), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="1 of 3 images were not counted exactly once, the first of them number 2"):
        table.compute()


def test_names_that_are_not_utf_8_and_their_order():
    info = skipped_info({"b/x.png": "2", os.fsdecode(b"a-b/\xff.png"): "1", Path("a/c.png"): "0"})
    assert info == {"number": 3, "images": {"a/c.png": "0", "a-b/\\xff.png": "1", "b/x.png": "2"}}
    json.dumps(info, ensure_ascii=False).encode()
