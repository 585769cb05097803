"""The comparison of formats: that equal ones are found equal, that each difference is noticed, and how it fails."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from scripts.compare_formats import build_parser, main
from src.analysis import formats as comparing
from src.datamodules.writers import write_class_folders
from src.evaluation.predictions import Predictions
from src.models.t2t_vit import T2T_VIT_VARIANTS
from tests.src.tasks.setup import IMAGE_SIZE, NUM_CLASSES, make_checkpoint, make_images

VARIANT = "t2t_vit_t_7"
NUM_IMAGES = 11
HAS_PYARROW = importlib.util.find_spec("pyarrow") is not None
EVALUATED = [name for name in comparing.WRITERS if name != "parquet" or HAS_PYARROW]


def make_shallow(patch):
    """One backbone block in place of seven, which changes nothing that is compared."""
    patch.setitem(T2T_VIT_VARIANTS, VARIANT, dataclasses.replace(T2T_VIT_VARIANTS[VARIANT], depth=1))


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    make_shallow(monkeypatch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Photographs in `val`, and a checkpoint."""
    folder = make_images(tmp_path_factory.mktemp("formats"), NUM_IMAGES)
    with pytest.MonkeyPatch.context() as patch:
        make_shallow(patch)
        make_checkpoint(folder / "t7.pth", VARIANT)
    return folder


@pytest.fixture
def small(tmp_path):
    """Two photographs in each class folder, to be tampered with."""
    return make_images(tmp_path / "small", 2 * NUM_CLASSES)


def options(data, *others):
    given = {"data-dir": data, "checkpoint": data / "t7.pth", "image-size": IMAGE_SIZE, "batch-size": 4}
    return [*(f"--{name}={value}" for name, value in given.items()), "--num-workers=0", *others]


def tampered(patch, format, change):
    """Let a format be written of other images: those that `change` makes of the right ones."""
    write = comparing.WRITERS[format]
    patch.setitem(comparing.WRITERS, format, lambda folder, images: write(folder, change(list(images))))


def only(patch, *formats):
    """Leave out the other formats, which take their time."""
    patch.setattr(comparing, "WRITERS", {name: comparing.WRITERS[name] for name in (comparing.REFERENCE, *formats)})


def swapped(images):
    """Two images of different classes, each with the other's label."""
    a, b = images[0], images[-1]
    assert a.label != b.label
    images[0] = dataclasses.replace(a, label=b.label, folder=b.folder)
    images[-1] = dataclasses.replace(b, label=a.label, folder=a.folder)
    return images


def red_image():
    """To these weights of another class than random pixels are."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "PNG")
    return buffer.getvalue()


def rows_of(path):
    return {row["format"]: row for row in json.loads(path.read_text())["results"]}


def test_all_formats_are_equal(data, tmp_path, capsys):
    before = logging.root.manager.disable
    output, kept = tmp_path / "formats.json", tmp_path / "kept"
    assert main(options(data, f"--output={output}", f"--keep={kept}")) == 0
    assert logging.root.manager.disable == before
    content, rows = json.loads(output.read_text()), rows_of(output)
    assert content["equal"] is True
    assert content["settings"]["num_classes"] == NUM_CLASSES
    assert str(data) not in output.read_text()
    assert list(rows) == list(comparing.WRITERS)
    for name in EVALUATED:
        row = rows[name]
        counts = [row["num_images"], row["labels_equal"], row["first_predictions_equal"], row["num_skipped"]]
        assert counts == [NUM_IMAGES] * 3 + [0]
        assert row["probability_difference"] < 1e-5
        assert row["top1"] == rows[comparing.REFERENCE]["top1"]
        assert row["differences"] == []
        assert (kept / "runs" / name / "predictions.csv").is_file()
    # every photograph is there as it was
    for path in (data / "val").rglob("*.png"):
        assert (kept / "class_folders" / path.relative_to(data)).read_bytes() == path.read_bytes()
        assert (kept / "csv" / "images" / path.name).read_bytes() == path.read_bytes()
    printed = capsys.readouterr()
    assert printed.out.count(" equal ") == len(EVALUATED)
    assert printed.out.count(VARIANT) == 1  # none of the tables of the evaluations
    assert "Error" not in printed.err


def test_damaged_images_are_skipped_everywhere(data, tmp_path):
    output = tmp_path / "formats.json"
    assert main(options(data, "--damage=3", f"--output={output}")) == 0
    rows = rows_of(output)
    for name in EVALUATED:
        assert (rows[name]["num_images"], rows[name]["num_skipped"]) == (NUM_IMAGES - 3, 3)
        assert rows[name]["first_predictions_equal"] == NUM_IMAGES - 3


def test_damage_is_spread_and_leaves_the_others_alone(data):
    arguments = build_parser().parse_args(options(data, "--damage=3"))
    read = comparing.read_photographs(arguments)
    files = {path.name: path.read_bytes() for path in (data / "val").rglob("*.png")}
    damaged = [image.name for image in read if image.data != files[image.name]]
    assert len(damaged) == 3
    assert len({image.folder for image in read if image.name in damaged}) == 3
    for image in read:
        whole = files[image.name]
        assert image.data == (whole[: len(whole) // 3] if image.name in damaged else whole)
        assert image.folder == f"c{image.label}"


def test_without_pyarrow_parquet_is_left_out(data, tmp_path, monkeypatch, capsys):
    only(monkeypatch, "parquet")
    monkeypatch.setattr(comparing.importlib.util, "find_spec", lambda name: None)
    output = tmp_path / "formats.json"
    assert main(options(data, f"--output={output}")) == 0
    assert rows_of(output)["parquet"] == {"format": "parquet", "left_out": "PyArrow is not installed"}
    assert "left out: PyArrow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("format", "change", "words"),
    [
        ("csv", swapped, "csv differs from class_folders in labels (000, 009)."),
        ("tar", lambda images: images[1:], "tar differs from class_folders in images (000)."),
        (
            "webdataset",
            lambda images: [dataclasses.replace(images[0], data=red_image()), *images[1:]],
            "webdataset differs from class_folders in first predictions (000).",
        ),
    ],
)
def test_a_difference_is_noticed(data, tmp_path, monkeypatch, capsys, format, change, words):
    only(monkeypatch, format)
    tampered(monkeypatch, format, change)
    output = tmp_path / "formats.json"
    assert main(options(data, f"--output={output}")) == 1
    printed = capsys.readouterr()
    assert printed.err.strip().splitlines()[-1] == f"Error: {words}"
    assert printed.out.count(" differs ") == printed.out.count(" equal ") == 1
    assert json.loads(output.read_text())["equal"] is False
    assert len(rows_of(output)[format]["differences"]) == 1


def test_other_images_are_skipped(data, monkeypatch, capsys):
    only(monkeypatch, "tar")
    tampered(monkeypatch, "tar", lambda images: [dataclasses.replace(images[0], data=b""), *images[1:]])
    assert main(options(data, "--damage=1")) == 1
    assert "tar differs from class_folders in images (000), skipped images (000)." in capsys.readouterr().err


def test_a_format_that_fails_does_not_keep_others_from_being_compared(data, tmp_path, monkeypatch, capsys):
    only(monkeypatch, "csv", "tar", "webdataset")
    monkeypatch.setitem(comparing.WRITERS, "csv", lambda folder, images: None)
    monkeypatch.setitem(comparing.WRITERS, "tar", write_class_folders)
    output = tmp_path / "formats.json"
    assert main(options(data, f"--output={output}")) == 1
    printed = capsys.readouterr()
    assert "csv differs from class_folders in that it cannot be evaluated: " in printed.err
    assert " evaluated: tar was taken for class_folders. datamodule.format=tar names the format." in printed.err
    assert "webdataset differs" not in printed.err
    assert rows_of(output)["webdataset"]["num_images"] == NUM_IMAGES


def test_images_are_matched_by_name():
    """Whatever their order and that of their classes; differences of probabilities are those of the same class."""
    ours = Predictions(["b", "a"], np.array([1, 0]), np.array([[1, 0], [0, 1]]), np.array([[0.6, 0.4], [0.75, 0.25]]))
    theirs = Predictions(["a", "b"], np.array([0, 1]), np.array([[0, 1], [0, 1]]), np.array([[0.75, 0.25], [0.5, 0.5]]))
    row = comparing.compare((ours, set(), 100.0), (theirs, set(), 50.0))
    assert (row["labels_equal"], row["first_predictions_equal"], row["top1"]) == (2, 1, 100.0)
    assert row["probability_difference"] == pytest.approx(0.1)
    assert row["differences"] == ["first predictions (b)"]
    # twice in one of them
    twice = Predictions(["a", "b", "b"], np.array([0, 1, 1]), np.array([[0], [0], [0]]), np.ones((3, 1)))
    assert comparing.compare((twice, set(), 0.0), (theirs, set(), 0.0))["differences"] == ["images (b)"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--split=test"], "test is not a folder. Give --data-dir"),
        (["--split=val/c0"], "holds 3 files but no class folders"),
        ([f"--damage={NUM_IMAGES}"], f"--damage {NUM_IMAGES}: of {NUM_IMAGES} images, one at least has to be left"),
        (["--damage=none"], "'none' is not an integer"),
        (["--num-classes=7"], "but the model has 7 classes"),
        (["--variant=t2t_vit_7"], "--variant t2t_vit_7: the attention"),
        (["--attention=loca"], "invalid choice: 'loca'"),
        (["--checkpoint=nowhere.pth"], "nowhere.pth"),
        (["--num-workers=-1"], "datamodule.num_workers=-1"),
        (["--output=/nowhere/file.json"], "cannot be written"),
        (["--keep=/dev/null/here"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_reported(data, capsys, changes, words):
    assert main(options(data, *changes)) == 1
    printed = capsys.readouterr()
    message = printed.err.strip()  # a progress display leaves an empty line
    assert message.startswith("Error: ")
    assert "\n" not in message
    assert words in message
    assert printed.out == ""


def test_folders_in_the_way(data, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    for keep in (tmp_path / "mine", tmp_path / "mine" / "file"):
        assert main(options(data, f"--keep={keep}")) == 1
        assert f"--keep {keep} is there already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["000.jpg", "a.b.png", "\udcff.png"])
def test_names_that_not_every_format_holds(small, capsys, name):
    (small / "val" / "c1" / name).write_bytes(b"an image")
    assert main(options(small)) == 1
    printed = capsys.readouterr().err
    assert f"c1/{name}".encode("ascii", "backslashreplace").decode() in printed
    assert "Rename the files." in printed
    assert "c2/" not in printed


def test_class_folders_without_images(small, capsys):
    (small / "val" / "c9").mkdir()
    assert main(options(small)) == 1
    assert "class folders without images, which other formats lack: c9. Remove them." in capsys.readouterr().err


def test_an_image_that_cannot_be_read(small, capsys):
    (small / "val" / "c1" / "link.png").symlink_to("nowhere")
    assert main(options(small)) == 1
    assert "c1/link.png cannot be read (No such file or directory). Remove or replace it." in capsys.readouterr().err
