"""What the check of ImageNet finds: layouts, counts, labels in a wrong order, and images that are corrupt or odd."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import check_imagenet
from src.datamodules import check as module
from tests.src.datamodules import format_files as files
from tests.src.datamodules.setup import encoded

try:
    import pyarrow
except ImportError:
    pyarrow = None

LAYOUTS = [layout for layout in files.WRITERS if layout is not files.parquet or pyarrow is not None]


@pytest.fixture
def check(tmp_path):
    """Run the check; its status and its report by split."""

    def run(*arguments):
        output = tmp_path / "report.json"
        output.unlink(missing_ok=True)
        status = check_imagenet.main([*map(str, arguments), "--jobs", "2", "--output", str(output)])
        report = json.loads(output.read_text()) if output.exists() else {"splits": []}
        return status, {split["split"]: split for split in report["splits"]}

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(check, tmp_path, layout, capsys):
    for split in files.SPLITS:
        layout(tmp_path / "data", split)
    status, reports = check(tmp_path / "data", "--subset", "--decode")
    assert status == 0
    assert list(reports) == ["val", "train"]
    for split, report in reports.items():
        assert report["format"] == (
            "class_folders" if (layout, split) == (files.kaggle, "train") else files.WRITERS[layout]
        )
        assert (report["num_images"], report["num_classes"]) == (8, 4)
        assert report["images_per_class"] == {"min": 2, "max": 2}
        assert {name for name, number in report["per_class"].items() if number} == set(files.SYNSETS)
        assert len(report["missing_classes"]) == 996
        assert report["corrupt"] == report["odd"] == {}
        assert report["wrong"] == []
    # names in Parquet and shards lead to the ReaL labels too
    assert reports["val"]["labels"]["compared_with_real"] == 8
    assert reports["val"]["labels"]["agreement_with_real"] == 1
    assert reports["train"]["labels"]["compared_with_real"] == 0
    printed = capsys.readouterr().out
    assert "val: " in printed
    assert "8, " not in printed
    assert "nothing" in printed


def test_an_incomplete_imagenet_is_wrong(check, tmp_path, capsys):
    files.class_folders(tmp_path, "val")
    status, reports = check(tmp_path)
    assert status == 1
    wrong = "; ".join(reports["val"]["wrong"])
    assert "996 of 1000 classes are missing: n01443537" in wrong
    assert "8 images, where ImageNet has 50,000" in wrong
    assert "4 classes have not 50 images: n01440764, n02119789, n02123045, n11939491" in wrong


def test_one_split_and_format_may_be_asked_for(check, tmp_path):
    files.class_folders(tmp_path, "val")
    files.class_folders(tmp_path, "train")
    assert list(check(tmp_path, "--subset", "--split", "train")[1]) == ["train"]
    assert list(check(tmp_path, "--subset", "--split", "val", "--split", "train")[1]) == ["val", "train"]
    assert check(tmp_path, "--format", "tar", "--split", "val")[0] == 1


def test_classes_of_ones_own(check, tmp_path):
    for name in "abc":
        files.write(tmp_path / "val" / name / "1.png", encoded("PNG"))
    status, reports = check(tmp_path, "--num-classes", 3)
    assert status == 0
    assert reports["val"]["per_class"] == {"a": 1, "b": 1, "c": 1}
    (tmp_path / "val/c/1.png").unlink()
    status, reports = check(tmp_path, "--num-classes", 3)
    assert status == 1
    assert reports["val"]["wrong"] == ["1 classes without images: c"]


@pytest.mark.parametrize("shift", [0, 1])
def test_labels_in_a_wrong_order(check, tmp_path, shift):
    synsets = files.SYNSETS[shift:] + files.SYNSETS[:shift]
    for name, synset in files.SPLITS["val"].items():
        files.write(tmp_path / "val" / synsets[files.SYNSETS.index(synset)] / name, files.image(name))
    status, reports = check(tmp_path, "--subset")
    assert status == shift
    assert reports["val"]["labels"]["agreement_with_real"] == 1 - shift
    assert reports["val"]["wrong"] == ["labels in a wrong order: 0% agree with the ReaL labels"] * shift


@pytest.mark.parametrize(
    ("number", "agreeing", "wrong"), [(14, 8, False), (14, 3, True), (8, 0, True), (5, 0, False), (1000, 550, True)]
)
def test_few_labels_are_called_wrong_only_beyond_chance(number, agreeing, wrong):
    labels = {"compared_with_real": number, "agreement_with_real": agreeing / number}
    assert module.in_wrong_order(labels) == wrong


def test_few_labels_are_not_called_right(check, tmp_path, capsys):
    files.class_folders(tmp_path, "val")
    assert check(tmp_path, "--subset")[0] == 0
    assert "100.0% of 8 (too few to judge)" in " ".join(capsys.readouterr().out.split())


def test_messages_name_the_options_of_the_tool(check, tmp_path, capsys):
    for number, name in enumerate(["n01440764", "n01443537", "n99999999"]):
        files.write(tmp_path / "val" / name / f"{number}.png", encoded("PNG"))
    assert check(tmp_path)[0] == 1
    message = capsys.readouterr().err
    assert message.endswith("For a model trained on exactly these classes, set --num-classes 3 --labels own\n")
    assert check(tmp_path, "--num-classes", 3, "--labels", "own", "--class-order", "natural")[0] == 0
    for arguments in (["--num-classes", 4], ["--split", "test"], ["--class-order", "x"]):
        assert check(tmp_path, *arguments)[0] == 1
        message = capsys.readouterr().err
        assert "--" in message
        assert "datamodule" not in message
        assert "model." not in message


def test_labels_that_contradict_names(check, tmp_path):
    files.class_folders(tmp_path, "train")
    source = tmp_path / "train/n01440764/n01440764_7.JPEG"
    source.rename(tmp_path / "train/n02123045" / source.name)
    status, reports = check(tmp_path, "--split", "train", "--subset")
    assert status == 1
    assert reports["train"]["labels"]["contradictions"] == ["n02123045/n01440764_7.JPEG as n02123045"]
    assert reports["train"]["wrong"] == ["1 labels that contradict the image's name"]


def with_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    buffer = io.BytesIO()
    Image.open(io.BytesIO(encoded())).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "odd"),
    [
        (encoded("PNG"), ["PNG in .JPEG"]),
        (encoded(mode="CMYK"), ["CMYK"]),
        (encoded(mode="L"), ["grayscale"]),
        (encoded("PNG", "RGBA"), ["PNG in .JPEG", "RGBA"]),
        (with_orientation(6), ["EXIF orientation"]),
        (with_orientation(1), []),
        (encoded() + b"appended by a camera", []),
    ],
)
@pytest.mark.parametrize("decode", [False, True])
def test_odd_images_are_reported_and_not_wrong(check, tmp_path, content, odd, decode):
    files.class_folders(tmp_path, "train")
    files.write(tmp_path / "train/n01440764/n01440764_99.JPEG", content)
    status, reports = check(tmp_path, "--split", "train", "--subset", *["--decode"] * decode)
    assert status == 0
    assert sorted(reports["train"]["odd"]) == odd
    for entry in reports["train"]["odd"].values():
        assert entry == {"number": 1, "examples": ["n01440764/n01440764_99.JPEG"]}


@pytest.mark.parametrize("layout", [files.class_folders, files.original_tar, files.shards])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "zero bytes"),
        (encoded()[:-60], "truncated"),
        (encoded("PNG")[:-200], "truncated"),
        (b"<html></html>", "not an image of a known format"),
    ],
)
def test_corrupt_images_are_wrong(check, tmp_path, monkeypatch, layout, content, fault):
    image = files.image
    bad = "ILSVRC2012_val_00004514.JPEG"
    monkeypatch.setattr(files, "image", lambda name: content if name == bad else image(name))
    layout(tmp_path, "val")
    status, reports = check(tmp_path, "--subset")
    assert status == 1
    ((name, reported),) = reports["val"]["corrupt"].items()
    assert Path(name).stem == Path(bad).stem
    assert reported == fault
    assert reports["val"]["wrong"] == ["1 corrupt images"]


def test_what_only_decoding_finds(check, tmp_path):
    """Header and end are as they should be, and a table of Huffman codes is not."""
    data = bytearray(encoded())
    at = data.index(b"\xff\xc4") + 5
    data[at : at + 16] = b"\xff" * 16
    files.class_folders(tmp_path, "train")
    files.write(tmp_path / "train/n01440764/n01440764_99.JPEG", bytes(data))
    assert check(tmp_path, "--split", "train", "--subset")[0] == 0
    status, reports = check(tmp_path, "--split", "train", "--subset", "--decode")
    assert status == 1
    assert list(reports["train"]["corrupt"]) == ["n01440764/n01440764_99.JPEG"]


@pytest.mark.parametrize("seed", range(12))
def test_fuzz(check, tmp_path, seed):
    """Damaged images end in a report: nothing else is counted or missing, and nothing hangs or fails."""
    generator = np.random.default_rng(seed)
    files.class_folders(tmp_path, "train")
    paths = sorted((tmp_path / "train").rglob("*.JPEG"))
    for path in paths[:4]:
        data = bytearray(path.read_bytes())
        for at in generator.integers(0, len(data), 10):
            data[at] = generator.integers(256)
        path.write_bytes(data[: generator.integers(len(data)) + 1])
    _, reports = check(tmp_path, "--split", "train", "--subset", "--decode")
    report = reports["train"]
    assert report["num_images"] == 8
    assert set(report["corrupt"]) <= {path.relative_to(tmp_path / "train").as_posix() for path in paths[:4]}


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["nowhere"], "The data folder"),
        (["."], "Looked for"),
        ([".", "--format", "zip"], "--format"),
        ([".", "--jobs", "0"], "integer of at least 1"),
        ([".", "--output", "no/such/report.json"], "cannot be written"),
        ([], "data_dir|DIR"),
    ],
)
def test_mistakes_are_reported_in_one_line(tmp_path, monkeypatch, capsys, arguments, reported):
    monkeypatch.chdir(tmp_path)
    assert check_imagenet.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert any(part in captured.err for part in reported.split("|"))


def test_names_are_not_markup(check, tmp_path, capsys):
    files.write(tmp_path / "val/a/[bold]1.png", b"")
    assert check(tmp_path, "--num-classes", 1)[0] == 1
    assert "a/[bold]1.png" in capsys.readouterr().out
