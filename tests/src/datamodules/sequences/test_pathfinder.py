"""Pathfinder: the geometry of what is drawn gives the label, and nothing simpler does."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from scatterbrain.errors import UserError
from src.datamodules.sequences import pathfinder
from src.datamodules.sequences.pathfinder import Drawings, draw, draw_images, read_pathfinder, render


@pytest.fixture(scope="module")
def drawings():
    return draw(np.random.default_rng(3))


def segment_distances(dashes):
    """Smallest distances (n, n) between points of dashes (n, 2, 2)."""
    share = np.linspace(0, 1, 21)[:, None]
    points = dashes[:, None, 0] * (1 - share) + dashes[:, None, 1] * share
    return np.linalg.norm(points[:, None, :, None] - points[None, :, None], axis=-1).min((-1, -2))


def is_connected(dashes, circles):
    """Whether a walk from dash to dash, over gaps shorter than the room between paths, leads from circle to circle."""
    dashes = dashes[dashes[:, 0, 0] >= 0]
    near = segment_distances(dashes) < (pathfinder.GAP + pathfinder.CLEARANCE) / 2
    begin, end = (np.linalg.norm(dashes - circle, axis=-1).min(1) < pathfinder.RADIUS for circle in circles)
    reached = begin
    for _ in dashes:
        reached = near[reached].any(0) | reached
    return bool((reached & end).any())


def test_the_circles_are_connected_by_one_path_or_by_none(drawings):
    found = [is_connected(drawings.dashes[i], drawings.circles[i]) for i in range(200)]
    assert found == drawings.connected[:200].tolist()


def test_paths_are_dashes_of_one_length_at_one_gap(drawings):
    begin, end = drawings.dashes[:, :, 0], drawings.dashes[:, :, 1]
    drawn = begin[..., 0] >= 0
    assert np.allclose(np.linalg.norm(end - begin, axis=-1)[drawn], pathfinder.DASH, atol=1e-4)
    for path in range(2):
        mine = slice(14 * path, 14 * path + 14)
        assert drawn[:, mine].all()
        gaps = np.linalg.norm(begin[:, mine][:, 1:] - end[:, mine][:, :-1], axis=-1)
        assert np.allclose(gaps, pathfinder.GAP, atol=1e-4)
    distractors = drawn[:, 28:].reshape(-1, 5, 4)
    assert (distractors.all(-1) == distractors.any(-1)).all()
    assert 1.5 < distractors[:, :, 0].sum(1).mean() < 5
    points = drawings.dashes[drawn]
    assert points.min() >= pathfinder.BORDER - 1e-4
    assert points.max() <= 31 - pathfinder.BORDER + 1e-4


def test_circles_are_apart_at_ends_of_the_two_paths(drawings):
    assert np.linalg.norm(drawings.circles[:, 0] - drawings.circles[:, 1], axis=-1).min() >= 4 - 1e-4
    first = np.linalg.norm(drawings.dashes[:, 0, 0] - drawings.dashes[:, 14, 0], axis=-1)
    assert np.allclose(first, pathfinder.SEED_DISTANCE, atol=1e-4)


def test_classes_are_equally_frequent_and_no_simple_statistic_tells_them_apart(drawings):
    groups = [drawings, draw(np.random.default_rng(4))]
    images = np.concatenate([render(group) for group in groups]).reshape(2000, -1).astype(np.float64)
    circles = np.concatenate([group.circles for group in groups])
    connected = np.concatenate([group.connected for group in groups])
    assert connected.reshape(-1, 2).sum(1).tolist() == [1] * 1000
    assert not (connected[::2] == connected[0]).all()
    distractors = np.concatenate([group.dashes[:, 28::4, 0, 0] >= 0 for group in groups]).sum(1)
    statistics = {
        "distance": np.linalg.norm(circles[:, 0] - circles[:, 1], axis=-1),
        "mean": images.mean(1),
        "std": images.std(1),
        "bright pixels": (images > 128).sum(1),
        "distractors": distractors,
        "from the centre": abs(circles - 15.5).mean((1, 2)),
    }
    for name, values in statistics.items():
        thresholds = np.quantile(values, np.linspace(0.02, 0.98, 49))
        share = max(abs(((values > threshold) == connected).mean() - 0.5) for threshold in thresholds)
        assert share < 0.08, name


def test_images_show_the_dashes_and_the_circles(drawings):
    images = render(drawings)
    assert images.shape == (1000, 32, 32)
    assert images.dtype == np.uint8
    y, x = np.round(drawings.circles).astype(int).transpose(2, 0, 1)
    assert (images[np.arange(1000)[:, None], y, x] == pathfinder.CIRCLE_GREY).all()
    # a pixel at the middle of a dash is at least half covered along it, and a third across
    middles = drawings.dashes[:, :14].mean(2)
    y, x = np.round(middles).astype(int).transpose(2, 0, 1)
    assert (images[np.arange(1000)[:, None], y, x] > 50).all()
    # circles hang over the border, dashes do not; most of an image is black
    assert (images[:, [0, -1]] > pathfinder.DASH_GREY).sum() == 0
    assert 10 < images.mean() < 30
    assert np.median(images) == 0


def test_a_pixel_is_as_grey_as_the_share_of_it_that_is_covered():
    dashes = np.full((1, 48, 2, 2), pathfinder.OUTSIDE)
    dashes[0, 0] = [[10.0, 5.25], [10.0, 7.25]]
    drawings = Drawings(dashes, np.full((1, 2, 2), 25.0), np.ones(1, dtype=bool))
    image = render(drawings)[0]
    # a line one pixel wide: it covers a quarter of the pixel at 5, all of that at 6, three quarters of that at 7
    assert image[10, 4:9].tolist() == [0, 48, 191, 143, 0]
    assert image[[9, 11], 4:9].max() == 0
    assert image[25, 22:29].tolist() == [0, 0, 255, 255, 255, 0, 0]


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of 100 images, which take a tenth of the time."""
    monkeypatch.setattr(pathfinder, "IMAGES_AT_A_TIME", 100)
    monkeypatch.setattr(pathfinder, "DRAWINGS_AT_A_TIME", 400)


def test_the_parts_differ_and_depend_on_the_seed_alone(small_groups):
    parts = read_pathfinder(num_train=250, num_validation=100, num_test=60, num_processes=1)
    assert {name: len(part) for name, part in parts.items()} == {"test": 60, "validation": 100, "train": 250}
    for part in parts.values():
        assert part.tokens.shape == (len(part), 1024)
        assert part.tokens.dtype == torch.uint8
        assert part.targets.dtype == torch.int64
        assert part.lengths is None
        assert part.targets.double().mean() == 0.5
    everything = torch.cat([part.tokens for part in parts.values()])
    assert len(torch.unique(everything, dim=0)) == 410
    fewer = read_pathfinder(num_train=10, num_validation=100, num_test=60, num_processes=1)
    assert torch.equal(fewer["train"].tokens, parts["train"].tokens[:10])
    assert torch.equal(fewer["test"].tokens, parts["test"].tokens)


def test_images_do_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr(pathfinder, "ProcessPoolExecutor", SerialPool)
    SerialPool.sizes.clear()
    groups = [(0, 2, group) for group in range(8)]
    monkeypatch.setattr(pathfinder, "draw_images", lambda group: group)
    assert list(pathfinder._draw_groups(groups, 16)) == groups
    assert list(pathfinder._draw_groups(groups[:7], 16)) == groups[:7]
    assert SerialPool.sizes == [2]


class SerialPool:
    """A pool of processes without processes."""

    sizes: ClassVar[list[int]] = []

    def __init__(self, num, context):
        self.sizes.append(num)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def map(self, function, items):
        return map(function, items)


def test_a_group_is_the_same_each_time(small_groups):
    (images, labels), (again, labels_again) = draw_images((5, 1)), draw_images((5, 1))
    assert np.array_equal(images, again)
    assert np.array_equal(labels, labels_again)
    assert not np.array_equal(images, draw_images((5, 2))[0])


@pytest.mark.parametrize("option", ["num_train", "num_validation", "num_test", "num_processes"])
def test_sizes_are_checked(option):
    with pytest.raises(UserError, match=rf"datamodule\.read\.{option}=0 is not valid"):
        read_pathfinder(**{option: 0})
