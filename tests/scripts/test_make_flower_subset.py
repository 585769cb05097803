"""The demo's photographs: which are taken, what becomes of them, how making them fails, and those that are there."""

import hashlib
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from scripts import make_flower_subset
from src.datamodules import flowers

FLOWERS = Path(make_flower_subset.__file__).parents[1] / "data" / "flowers"
ROW = re.compile(r"\| `(.+)` \| (\w+) \| (\d+ x \d+) \| (\d+ x \d+) \| <(\S+?)>(?: \((.*)\))? \|")


def picture(mode="RGB", size=(40, 30)):
    """A smooth image: the left half reddish, growing brighter downwards."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[..., 1] = np.linspace(0, 200, size[1])[:, None]
    pixels[:, : size[0] // 2, 0] = 255
    return Image.fromarray(pixels).convert(mode)


def write(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


@pytest.fixture
def source(tmp_path):
    """Two classes of four photographs."""
    for name in ("daisy", "roses"):
        for number in range(4):
            write(tmp_path / "originals" / name / f"{number}1_{name}.jpg")
    return tmp_path / "originals"


def make(source, *options):
    """Exit status of the script with small defaults; the output is `flowers` beside the source."""
    defaults = ["--output", str(source.parent / "flowers"), "--per-class", "2", "--side", "16"]
    return make_flower_subset.main([str(source), *defaults, *map(str, options)])


def made(source):
    """Paths of the photographs made, relative to the output."""
    folder = source.parent / "flowers"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.suffix != ".md")


def make_one(tmp_path, image, name="1_a.jpg", side=16, quality=80, **options):
    """Small form of a single photograph."""
    source = tmp_path / "originals"
    write(source / "daisy" / name, image, **options)
    assert make(source, "--per-class", 1, "--side", side, "--quality", quality) == 0
    with Image.open(tmp_path / "flowers" / "val" / "daisy" / (Path(name).stem + ".jpg")) as small:
        small.load()
        return small


def rows(folder):
    """The attribution's table: file to flower, pixels, original pixels, link, notice."""
    lines = [line for line in (folder / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines() if "`val/" in line]
    found = [ROW.fullmatch(line).groups() for line in lines]
    assert len({file for file, *_ in found}) == len(found)
    return {file: facts for file, *facts in found}


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# --- which are taken ---------------------------------------------------------------------------------------------


def test_the_names_of_the_smallest_sha256_are_taken(source, tmp_path):
    assert make(source) == 0
    expected = []
    for folder in (source / "daisy", source / "roses"):
        files = sorted(names(folder), key=lambda file: hashlib.sha256(file.encode()).hexdigest())
        expected += [f"val/{folder.name}/{file}" for file in files[:2]]
    assert made(source) == sorted(expected)
    assert expected != sorted(expected)  # else the order of the names would do as well
    assert names(tmp_path) == ["flowers", "originals"]


def test_the_same_source_gives_the_same_bytes(source, tmp_path):
    for output in ("first", "second"):
        assert make(source, "--output", tmp_path / output) == 0
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path / "first", tmp_path / "second")
    )
    assert first == second
    assert len(first) == 5


def test_hidden_files_and_files_beside_the_classes_do_not_count(source):
    (source / "daisy" / ".DS_Store").touch()
    (source / "readme.txt").touch()
    assert make(source, "--per-class", 4) == 0
    assert made(source) == [f"val/{name}/{n}1_{name}.jpg" for name in ("daisy", "roses") for n in range(4)]


# --- what becomes of them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((60, 40), (48, 32)),
        ((40, 60), (32, 48)),
        ((50, 50), (32, 32)),
        ((20, 17), (38, 32)),
        ((333, 500), (32, 48)),
        ((32, 77), (32, 77)),
    ],
    ids=["landscape", "portrait", "square", "smaller", "odd", "fits"],
)
def test_the_shorter_side_is_exact_and_the_ratio_kept(tmp_path, size, expected):
    assert make_one(tmp_path, picture(size=size), side=32).size == expected


@pytest.mark.parametrize(
    ("mode", "name"), [("L", "1_grey.jpg"), ("CMYK", "1_cmyk.jpeg"), ("P", "1_palette.png"), ("RGB", "1_rgb.webp")]
)
def test_every_mode_and_format_becomes_rgb_jpeg(tmp_path, mode, name):
    original = picture(mode)
    small = make_one(tmp_path, original, name)
    assert (small.format, small.mode) == ("JPEG", "RGB")
    expected = original.convert("RGB").resize(small.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(small, dtype=float) - np.asarray(expected)).mean() < 12


def test_the_resize_is_antialiased_bicubic(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400), dtype=np.uint8))
    small = np.asarray(make_one(tmp_path, noise, "1_noise.png", 30, 95).convert("L"), dtype=float)
    distances = {
        name: np.abs(small - np.asarray(noise.resize((40, 30), Image.Resampling[name]))).mean()
        for name in ("NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")
    }
    assert min(distances, key=distances.get) == "BICUBIC"


def test_photographs_are_upright_and_without_metadata(tmp_path):
    image = picture(size=(40, 30))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    small = make_one(tmp_path, image, exif=exif, comment=b"by me", icc_profile=b"profile", dpi=(72, 72))
    assert small.size == (16, 21)
    assert set(small.info) == {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    assert small.info["jfif_unit"] == 0
    turned = np.asarray(small)[..., 0]
    assert turned[:8].mean() > 200 > 50 > turned[-8:].mean()  # the left half is above now
    assert rows(tmp_path / "flowers")["val/daisy/1_a.jpg"][1:3] == ["16 x 21", "30 x 40"]


def test_the_summary_tells_number_sizes_quality_and_bytes(source, tmp_path, capsys):
    totals = []
    for quality in (20, 90):
        output = tmp_path / str(quality)
        assert make(source, "--output", output, "--side", 64, "--quality", quality) == 0
        total = sum(path.stat().st_size for path in output.rglob("*.*"))
        out, err = capsys.readouterr()
        assert out == (f"{output}: 4 photographs, shorter side 64 px, JPEG quality {quality}, {total:,} bytes in all\n")
        assert err == ""
        totals.append(total)
    assert totals[0] < totals[1]


def test_others_may_read_what_is_made(source, tmp_path):
    before = os.umask(0o022)
    try:
        assert make(source) == 0
    finally:
        os.umask(before)
    assert {(path.stat().st_mode & 0o777) for path in (tmp_path / "flowers").rglob("*") if path.is_dir()} == {0o755}
    assert (tmp_path / "flowers").stat().st_mode & 0o777 == 0o755


# --- the attribution ---------------------------------------------------------------------------------------------


def test_every_photograph_is_attributed_once(source, tmp_path):
    assert make(source, "--per-class", 3) == 0
    table = rows(tmp_path / "flowers")
    assert sorted(table) == made(source)
    for file, (flower, pixels, original_pixels, link, notice) in table.items():
        assert flower == {"daisy": "daisy", "roses": "rose"}[file.split("/")[1]]
        assert (pixels, original_pixels, notice) == ("21 x 16", "40 x 30", None)
        assert link == f"https://www.flickr.com/photo.gne?id={Path(file).name.split('_')[0]}"
    text = " ".join((tmp_path / "flowers" / "ATTRIBUTION.md").read_text(encoding="utf-8").split())
    assert "6 photographs of the flower" in text
    assert "the 3 whose file names" in text
    assert "resized to a shorter side of 16 px and re-encoded as JPEG" in text


def iptc(**fields):
    """Photoshop's block of a JPEG file, with author and copyright as IPTC has them."""
    tags = {"author": 80, "copyright": 116}
    data = b"".join(bytes([0x1C, 2, tags[name], 0, len(value)]) + value for name, value in fields.items())
    data += b"\0" * (len(data) % 2)
    resource = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + len(data).to_bytes(4, "big") + data
    return b"\xff\xed" + (len(resource) + 2).to_bytes(2, "big") + resource


def test_notices_in_the_originals_are_kept(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Ann | Bob"
    exif[ExifTags.Base.Copyright] = "(C) 2013 Ann\n"
    path = write(tmp_path / "originals" / "daisy" / "1_a.jpg", exif=exif)
    content = path.read_bytes()
    path.write_bytes(content[:2] + iptc(author=b"(C) 2013 Ann", copyright="© Zoë".encode("latin-1")) + content[2:])
    assert make(tmp_path / "originals", "--per-class", 1) == 0
    assert rows(tmp_path / "flowers")["val/daisy/1_a.jpg"][-1] == r"Ann \| Bob, (C) 2013 Ann, © Zoë"


# --- errors ------------------------------------------------------------------------------------------------------


def failure(capsys, source, *options):
    """The one line of an error that leaves everything as it was."""
    before = sorted(source.parent.rglob("*"))
    assert make(source, *options) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert sorted(source.parent.rglob("*")) == before
    return err


def test_a_missing_source(tmp_path, capsys):
    assert f"{tmp_path / 'none'} does not exist" in failure(capsys, tmp_path / "none")
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is a file" in failure(capsys, tmp_path / "file")


def test_a_source_without_class_folders(source, capsys):
    assert f"{source / 'daisy'} holds no class folders" in failure(capsys, source / "daisy")


def test_a_class_with_too_few_photographs(source, capsys):
    (source / "roses" / "01_roses.jpg").unlink()
    assert f"{source / 'roses'} holds 3 photographs, fewer than --per-class=4" in failure(
        capsys, source, "--per-class", 4
    )


@pytest.mark.parametrize("name", ["a_1.jpg", "12.jpg", "_1.jpg", "12-1_a.jpg"])
def test_a_name_without_a_flickr_id(source, capsys, name):
    write(source / "daisy" / name)
    assert f"{source / 'daisy' / name} cannot be attributed" in failure(capsys, source)


def test_names_that_would_become_the_same_file(source, capsys):
    write(source / "daisy" / "21_daisy.png")
    error = failure(capsys, source, "--per-class", 4)
    assert f"{source / 'daisy'}: " in error
    assert "21_daisy.jpg" in error
    assert "21_daisy.png" in error


def test_a_file_that_cannot_be_decoded(source, capsys):
    path = source / "roses" / "31_roses.jpg"
    path.write_bytes(path.read_bytes()[:300])
    assert f"Cannot decode the image {path}" in failure(capsys, source, "--per-class", 4)


def test_metadata_that_cannot_be_read(source, capsys):
    path = write(source / "roses" / "31_roses.jpg", exif=b"Exif\0\0nonsense")
    assert f"The metadata of {path} cannot be read" in failure(capsys, source, "--per-class", 4)


def test_an_image_too_long_for_jpeg(source, capsys):
    path = write(source / "roses" / "31_roses.png", picture(size=(8, 5000)))
    (source / "roses" / "31_roses.jpg").unlink()
    error = failure(capsys, source, "--per-class", 4, "--side", 128)
    assert f"{path} of 8 x 5000 px would become 128 x 80000 px" in error


@pytest.mark.parametrize(
    ("option", "value"), [("--per-class", 0), ("--side", 0), ("--side", 4097), ("--quality", 0), ("--quality", 96)]
)
def test_numbers_out_of_range(source, capsys, option, value):
    assert f"{option}={value} is not valid" in failure(capsys, source, option, value)


def test_an_output_whose_folder_is_missing(source, capsys):
    output = source.parent / "no" / "flowers"
    assert f"{output} cannot be written" in failure(capsys, source, "--output", output)


def test_an_interrupt_leaves_nothing(source, tmp_path, capsys, monkeypatch):
    def interrupt(original):
        raise KeyboardInterrupt

    monkeypatch.setattr(flowers, "load_rgb", interrupt)
    assert make(source) == 1
    assert capsys.readouterr().err.splitlines() == ["Interrupted. No half-made folder was left."]
    assert names(tmp_path) == ["originals"]


def test_as_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_flower_subset.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(make_flower_subset.__file__, run_name="__main__")
    assert caught.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


# --- an output that is there already -----------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path):
    """An output of long ago."""
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "old.txt").write_text("mine")
    return tmp_path / "flowers"


def test_an_existing_output_is_refused(source, old, capsys):
    assert f"{old} exists and is not overwritten" in failure(capsys, source)


def test_force_keeps_a_backup(source, old, tmp_path, capsys):
    assert make(source, "--force") == 0
    assert f"what was there is kept at {old}.og" in capsys.readouterr().out
    assert names(tmp_path) == ["flowers", "flowers.og", "originals"]
    assert names(tmp_path / "flowers.og") == ["old.txt"]
    assert names(old) == ["ATTRIBUTION.md", "val"]


def test_force_overwrites_no_backup(source, old, tmp_path, capsys):
    (tmp_path / "flowers.og").mkdir()
    assert f"{old}.og exists, so {old} cannot be moved there" in failure(capsys, source, "--force")


def test_a_failure_under_force_leaves_the_old_output(source, old, capsys):
    (source / "roses" / "31_roses.jpg").write_bytes(b"")
    assert "the file is empty" in failure(capsys, source, "--force", "--per-class", 4)


def test_the_old_output_comes_back_if_the_new_cannot_take_its_name(source, old, capsys, monkeypatch):
    rename = os.rename

    def refuse_the_new(origin, target):
        if Path(origin).name == "new":
            raise OSError(28, "No space left on device")
        rename(origin, target)

    monkeypatch.setattr(os, "rename", refuse_the_new)
    assert "No space left on device" in failure(capsys, source, "--force")


def test_force_without_an_old_output(source, tmp_path, capsys):
    assert make(source, "--force") == 0
    assert "is kept at" not in capsys.readouterr().out
    assert names(tmp_path) == ["flowers", "originals"]


# --- those that are there ----------------------------------------------------------------------------------------


def test_the_demos_photographs():
    files = sorted(path for path in FLOWERS.rglob("*") if path.is_file())
    photographs = [path for path in files if path.name != "ATTRIBUTION.md"]
    assert sum(path.stat().st_size for path in files) <= 5_000_000
    assert names(FLOWERS / "val") == ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    assert all(len(names(folder)) == 40 for folder in (FLOWERS / "val").iterdir())
    table = rows(FLOWERS)
    assert sorted(table) == [path.relative_to(FLOWERS).as_posix() for path in photographs]
    for file, (_, pixels, _, link, _) in table.items():
        with Image.open(FLOWERS / file) as image:
            image.load()
            assert (image.format, image.mode, min(image.size)) == ("JPEG", "RGB", 256)
            assert pixels == "{} x {}".format(*image.size)
        assert link == f"https://www.flickr.com/photo.gne?id={Path(file).name.split('_')[0]}"
