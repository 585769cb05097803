"""The benchmark of loading: what is compared, what is reported of it, and how it fails."""

import json
import statistics

import pytest
import torch

from scripts import benchmark_loading as benchmark
from src.analysis.benchmark import loading
from tests.src.datamodules.setup import write_images

SMALL = ["--image-size", "16", "--batch-size", "2", "--num-workers", "1"]
NAMES = [f"val/{'ab'[number % 2]}/{number}.jpg" for number in range(5)]


@pytest.fixture
def data_dir(tmp_path):
    write_images(tmp_path / "data", *NAMES)
    return tmp_path / "data"


def arguments(data_dir, *options):
    return benchmark.build_parser().parse_args(["--data-dir", str(data_dir), *SMALL, *options])


def test_all_loaders_hand_on_the_same_images(data_dir, tmp_path):
    candidates, seconds = loading.make_candidates(arguments(data_dir), tmp_path / "cache")
    assert seconds > 0
    images = {each.name: torch.cat([images for images, *_ in each.open_loader()]) for each in candidates}
    assert images[loading.OURS].dtype == torch.uint8
    assert len(images[loading.OURS]) == len(NAMES)
    for name in (loading.TIMM, loading.CACHED):
        assert torch.equal(images[name], images[loading.OURS])
    assert images[loading.TIMM_NORMALISED].dtype == torch.float32
    _, seconds = loading.make_candidates(arguments(data_dir), tmp_path / "cache")
    assert seconds is None


def test_the_report(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "MIN_SECONDS", 0.0)
    output = tmp_path / "loading.json"
    options = ["--rounds", "3", "--cache-dir", str(tmp_path / "cache"), "--output", str(output)]
    assert benchmark.main(["--data-dir", str(data_dir), *SMALL, *options]) == 0
    content = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["loader"]: row for row in content["results"]}
    assert list(rows) == [loading.TIMM, loading.TIMM_NORMALISED, loading.OURS, loading.CACHED]
    for row in rows.values():
        assert row["num_images"] == len(NAMES)
        assert len(row["images_per_second_per_round"]) == 3
        assert row["images_per_second"] == statistics.median(row["images_per_second_per_round"])
        reference = rows[loading.TIMM]["images_per_second"]
        assert row["ratio_to_timm"] == pytest.approx(row["images_per_second"] / reference)
    assert str(tmp_path) not in output.read_text(encoding="utf-8")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_a_temporary_cache_is_gone_afterwards(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "MIN_SECONDS", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders = []
    genuine = loading.measure

    def measure(*arguments):
        folders.extend(tmp_path.glob("decoded-images-*/*"))
        return genuine(*arguments)

    monkeypatch.setattr(benchmark, "measure", measure)
    assert benchmark.main(["--data-dir", str(data_dir), *SMALL, "--rounds", "1"]) == 0
    assert len(folders) == 1
    assert not folders[0].parent.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--split", "test"], "test is not a folder. Give --data-dir"),
        (["--rounds", "0"], "--rounds"),
        (["--output", "/nowhere/file.json"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_reported(data_dir, capsys, options, words):
    assert benchmark.main(["--data-dir", str(data_dir), *SMALL, *options]) == 1
    assert words in capsys.readouterr().err


def test_synsets_are_a_part_of_imagenet(tmp_path):
    write_images(tmp_path, "val/n01440764/1.jpg", "other/a/1.jpg", "other/b/1.jpg")
    assert loading.count_classes(tmp_path / "val") == 1000
    assert loading.count_classes(tmp_path / "other") == 2
