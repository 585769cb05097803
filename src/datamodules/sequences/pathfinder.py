"""Pathfinder: grey images of dashed paths with two circles, to be told whether one path connects the circles.

Linsley et al., "Learning long-range spatial dependencies with horizontal gated recurrent units", NeurIPS 2018, at the
sizes that Tay et al., "Long Range Arena", ICLR 2021, give for 32 x 32 pixels (`lra_benchmarks/data/pathfinder.py` of
github.com/google-research/long-range-arena): two paths of 14 dashes, up to 5 distractors of 4 dashes where there is
room, dashes of 2 pixels at gaps of 1, circles with a radius of 1.5 pixels, first ends of the two paths 7 pixels apart.

An image is drawn before its label. Then one circle goes to the first end of one of the two paths; the other circle to
the last end of the same path ("connected"), or of the other path. So nothing but the circles depends on the label, and
circles have the same surroundings in both classes. The distance of the circles alone tells 54 % of the labels.

The images are not those of the Long Range Arena, whose generator (github.com/drewlinsley/pathfinder) places and bends
paths otherwise.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console

from scatterbrain.errors import check_whole_number
from src.datamodules.sequences.base import SequenceData
from src.datamodules.sequences.cache import read_cached
from src.utils.machine import usable_cpus
from src.utils.progress import progress_display

SIDE = 32
PATH_DASHES, NUM_DISTRACTORS, DISTRACTOR_DASHES = 14, 5, 4
DASH, GAP, RADIUS, SEED_DISTANCE = 2.0, 1.0, 1.5, 7.0
DASH_GREY, CIRCLE_GREY = 191, 255
BORDER = 1.5  # nothing but circles comes closer to the edge
CLEARANCE = 2.5  # between the centre lines of dashes that do not follow one another
CIRCLE_DISTANCE = 4.0  # between the centres of two circles
MAX_TURN, TURN_STD = np.pi / 3, np.pi / 12  # between two dashes
CELLS = 2  # per pixel and axis, of the map of what is occupied
FIRST_DASHES, DASHES_AT_A_TIME, TRIES = 2, 4, 48  # tries of the next dashes
OUTSIDE = -100.0  # where the dashes of a distractor are that there is no room for
IMAGES_AT_A_TIME, DRAWINGS_AT_A_TIME = 1000, 4096
MAX_SEED = 2**32 - 1  # beyond it, seeds of two groups could be the same


@dataclass(frozen=True)
class Drawings:
    """Paths and circles.

    Attributes:
        dashes: (N, 48, 2, 2) ends (y, x) of each dash in pixels: 14 of each path, 4 of each distractor.
        circles: (N, 2, 2) centres (y, x) of the circles.
        connected: (N,) bool, whether both circles are at the ends of the same path.
    """

    dashes: np.ndarray
    circles: np.ndarray
    connected: np.ndarray


def read_pathfinder(
    num_train: int = 160_000,
    num_validation: int = 20_000,
    num_test: int = 20_000,
    seed: int = 0,
    num_processes: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> dict[str, SequenceData]:
    """The three parts of Pathfinder-32: images by pixel, (N, 1024) in 0..255, and 1 for connected circles, 0 else.

    Half of each part is connected; of an odd number, one image more may be of either class.

    Args:
        num_train: images for training.
        num_validation: images for validation.
        num_test: images for the test.
        seed: of the images; the same for every seed of a training.
        num_processes: processes that draw; None is the number of usable CPUs. The images do not depend on it.
        cache: file with all images, which is read in place of drawing, and written where it does not exist.

    Raises:
        UserError: a value out of range, or see `read_cached`.
    """
    sizes = {"test": num_test, "validation": num_validation, "train": num_train}
    for name, size in sizes.items():
        check_whole_number(f"datamodule.read.num_{name}", size, 1)
    check_whole_number("datamodule.read.seed", seed, 0, MAX_SEED)
    num_processes = usable_cpus() if num_processes is None else num_processes
    check_whole_number("datamodule.read.num_processes", num_processes, 1)
    tensors = read_cached(cache, "pathfinder", lambda: _draw_parts(sizes, seed, num_processes), f"{sizes} {seed}")
    return {name: SequenceData(tensors[f"{name}.pixels"], tensors[f"{name}.targets"].long()) for name in sizes}


def _draw_parts(sizes: Mapping[str, int], seed: int, num_processes: int) -> dict[str, torch.Tensor]:
    """Images (N, 1024) and classes (N,) of each part, both uint8."""
    # each part has groups of its own: more of one leaves the others as they are
    groups = [(seed, part, group) for part, size in enumerate(sizes.values()) for group in range(_num_groups(size))]
    drawn = []
    with progress_display(Console(stderr=True)) as progress:
        task = progress.add_task("drawing Pathfinder", total=len(groups))
        for images, labels in _draw_groups(groups, num_processes):
            drawn.append((torch.from_numpy(images).flatten(1), torch.from_numpy(labels).to(torch.uint8)))
            progress.advance(task)
    tensors, first = {}, 0
    for name, size in sizes.items():
        last = first + _num_groups(size)
        images, labels = (torch.cat(each)[:size] for each in zip(*drawn[first:last], strict=True))
        tensors |= {f"{name}.pixels": images, f"{name}.targets": labels}
        first = last
    return tensors


def _num_groups(size: int) -> int:
    return -(-size // IMAGES_AT_A_TIME)


def _draw_groups(groups: list[tuple[int, ...]], num_processes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What `draw_images` gives for each group, in their order."""
    num_processes = min(num_processes, len(groups) // 4)
    if num_processes < 2:  # a process takes seconds to start
        yield from map(draw_images, groups)
        return
    # not fork: the parent may have threads, and a GPU
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(draw_images, groups)


def draw_images(seed: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Images (1000, 32, 32) uint8 of one group, and whether each one's circles are connected (1000,) bool."""
    drawings = draw(np.random.default_rng(seed))
    return render(drawings), drawings.connected


def draw(generator: np.random.Generator) -> Drawings:
    """Paths and circles of one group of 1,000 images; of each two in a row, one is connected."""
    found: list[np.ndarray] = []
    while sum(map(len, found)) < IMAGES_AT_A_TIME:
        found.append(_draw_dashes(generator))
    dashes = np.concatenate(found)[:IMAGES_AT_A_TIME]
    first_connected = generator.random(IMAGES_AT_A_TIME // 2) < 0.5
    connected = np.stack([first_connected, ~first_connected], axis=1).flatten()
    begins = generator.integers(0, 2, IMAGES_AT_A_TIME)
    ends = np.where(connected, begins, 1 - begins)
    rows = np.arange(IMAGES_AT_A_TIME)
    circles = np.stack(
        [dashes[rows, begins * PATH_DASHES, 0], dashes[rows, ends * PATH_DASHES + PATH_DASHES - 1, 1]], axis=1
    )
    return Drawings(dashes, circles, connected)


class _Canvas:
    """Pictures that are drawn together.

    Attributes:
        dashes: ends (n, 2, 2) of the dashes so far, far outside where there was no room.
        occupied: (n, cells, cells) bool, where no dash may lie.
    """

    def __init__(self, num: int, generator: np.random.Generator) -> None:
        self.dashes: list[np.ndarray] = []
        self.occupied = np.zeros((num, SIDE * CELLS, SIDE * CELLS), dtype=bool)
        self._generator = generator

    def __len__(self) -> int:
        return len(self.occupied)

    def uniform(self, low: float, high: float, *shape: int) -> np.ndarray:
        """Random numbers (n, *shape) in [low, high)."""
        return low + (high - low) * self._generator.random((len(self), *shape), dtype=np.float32)

    def start(self, num: int, begin: np.ndarray, circles: Sequence[np.ndarray] = (), optional: bool = False) -> None:
        """Add the `num` first dashes of a path: the first of the tries that there is room for.

        Args:
            num: of dashes.
            begin: (n, tries, 2) first ends of their first dashes.
            circles: centres (n, 2) of circles that `begin` leaves room for, and for one around itself.
            optional: keep pictures without room, with dashes far outside, which else are thrown away.
        """
        begins, ends = self._walk(num, begin, self.uniform(-np.pi, np.pi, begin.shape[1]), 0)
        free = self._is_free(begins, ends) & _are_apart(begins[:, :, 0], circles)
        self._choose(begins, ends, free, optional)

    def extend(self, num: int, circles: Sequence[np.ndarray] = ()) -> None:
        """Add `num` dashes behind the last one; pictures without room are thrown away.

        Args:
            num: of dashes.
            circles: centres (n, 2) of circles that the last end leaves room for, and for one around itself.
        """
        last = self.dashes[-1]
        direction = last[:, 1] - last[:, 0]
        angle = np.arctan2(direction[:, 0], direction[:, 1])[:, None].repeat(TRIES, axis=1)
        begins, ends = self._walk(num, last[:, 1, None], angle, GAP)
        free = self._is_free(begins, ends) & _are_apart(ends[:, :, -1], circles)
        self._choose(begins, ends, free, False)

    def _walk(self, num: int, begin: np.ndarray, angle: np.ndarray, gap: float) -> tuple[np.ndarray, np.ndarray]:
        """Ends (n, tries, num, 2) of random dashes, the first one `gap` behind `begin`, about in direction `angle`."""
        bend = self.uniform(-MAX_TURN, MAX_TURN, angle.shape[1], 1)
        noise = self._generator.standard_normal((*angle.shape, num), dtype=np.float32)
        angles = (bend + TURN_STD * noise).clip(-MAX_TURN, MAX_TURN)
        angles[..., 0] += angle
        directions = _direction(angles.cumsum(-1))
        steps = GAP * directions
        steps[..., 0, :] *= gap / GAP
        steps[..., 1:, :] += DASH * directions[..., :-1, :]
        begins = begin[:, :, None] + steps.cumsum(-2)
        return begins, begins + DASH * directions

    def _is_free(self, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Whether all of the dashes (n, tries, num) lie inside, where there is room."""
        points = np.stack([begins, (begins + ends) / 2, ends])
        inside = ((points >= BORDER) & (points <= SIDE - 1 - BORDER)).all((0, -1, -2))
        cells = ((points + 0.5) * CELLS).clip(0, SIDE * CELLS - 1).astype(np.int32)
        first = np.arange(len(self), dtype=np.int32)[:, None, None] * self.occupied[0].size
        taken = self.occupied.reshape(-1)[first + cells[..., 0] * (SIDE * CELLS) + cells[..., 1]]
        return inside & ~taken.any((0, -1))

    def _choose(self, begins: np.ndarray, ends: np.ndarray, free: np.ndarray, optional: bool) -> None:
        """Add the first of the tries that is free."""
        found = free.any(1)
        rows, tries = np.arange(len(self)), free.argmax(1)
        new = np.stack([begins[rows, tries], ends[rows, tries]], axis=2)
        new[~found] = OUTSIDE
        self.dashes += list(new.swapaxes(0, 1))
        if not optional and not found.all():
            self.occupied = self.occupied[found]
            self.dashes = [dash[found] for dash in self.dashes]

    def occupy(self, dash: np.ndarray) -> None:
        """Leave no room around the dashes (n, 2, 2)."""
        along, across, (rows, y, x) = _near(dash, CLEARANCE, CELLS)
        beyond = (abs(along) - DASH / 2).clip(0)
        self.occupied[rows, y, x] |= beyond**2 + across**2 <= CLEARANCE**2


def _are_apart(points: np.ndarray, circles: Sequence[np.ndarray]) -> np.ndarray:
    """Which points (n, tries, 2) could be the centres of circles beside those around `circles`, each (n, 2)."""
    apart = np.ones(points.shape[:2], dtype=bool)
    for centre in circles:
        apart &= ((points - centre[:, None]) ** 2).sum(-1) >= CIRCLE_DISTANCE**2
    return apart


def _near(dash: np.ndarray, reach: float, cells: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """The cells (n, h, w) in reach of dashes (n, 2, 2): how far along and across the dash they are, and their index.

    Distances are those of the cells' centres from the dash's middle, in pixels. Cells outside of the picture come as
    its far corner, where nothing is drawn: they count as far away.
    """
    begin, end = dash[:, 0], dash[:, 1]
    middle = (begin + end) / 2
    size = int(np.ceil((reach + DASH / 2) * cells)) + 1
    offsets = np.arange(-size, size + 1)
    y, x = ((np.round((middle + 0.5) * cells - 0.5).astype(np.intp))[:, axis, None] + offsets for axis in range(2))
    (dy, dx), direction = (
        ((cell + 0.5) / cells - 0.5 - middle[:, axis, None] for axis, cell in enumerate((y, x))),
        (end - begin) / DASH,
    )
    dy, dx = dy[:, :, None], dx[:, None, :]
    sine, cosine = (direction[:, axis, None, None] for axis in range(2))
    outside = [(cell < 0) | (cell >= SIDE * cells) for cell in (y, x)]
    far = np.where(outside[0][:, :, None] | outside[1][:, None, :], np.inf, 0.0)
    y, x = (cell.clip(0, SIDE * cells - 1) for cell in (y, x))
    index = (np.arange(len(dash))[:, None, None], y[:, :, None], x[:, None, :])
    return dy * sine + dx * cosine + far, dy * cosine - dx * sine, index


def _direction(angle: np.ndarray) -> np.ndarray:
    """Unit vectors (..., 2) as (y, x)."""
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1)


def _draw_dashes(generator: np.random.Generator) -> np.ndarray:
    """Dashes (n, 48, 2, 2) of those of `DRAWINGS_AT_A_TIME` pictures that have room for the two paths."""
    canvas = _Canvas(DRAWINGS_AT_A_TIME, generator)
    ends: list[tuple[int, int]] = []  # where circles may come: number of the dash, and which of its ends
    for path in range(2):
        if path == 0:
            begin = canvas.uniform(BORDER, SIDE - 1 - BORDER, TRIES, 2)
        else:
            begin = canvas.dashes[0][:, None, 0] + SEED_DISTANCE * _direction(canvas.uniform(-np.pi, np.pi, TRIES))
        first = len(canvas.dashes)
        canvas.start(FIRST_DASHES, begin, [canvas.dashes[dash][:, end] for dash, end in ends])
        ends.append((first, 0))
        for done in range(FIRST_DASHES, PATH_DASHES, DASHES_AT_A_TIME):
            # all but the last, whose follower begins closer to it than others may come
            for dash in canvas.dashes[first:-1]:
                canvas.occupy(dash)
            first = len(canvas.dashes) - 1
            is_end = done + DASHES_AT_A_TIME == PATH_DASHES
            canvas.extend(DASHES_AT_A_TIME, [canvas.dashes[dash][:, end] for dash, end in ends] if is_end else ())
        for dash in canvas.dashes[first:]:
            canvas.occupy(dash)
        ends.append((len(canvas.dashes) - 1, 1))
    for _ in range(NUM_DISTRACTORS):
        canvas.start(DISTRACTOR_DASHES, canvas.uniform(BORDER, SIDE - 1 - BORDER, TRIES, 2), optional=True)
        for dash in canvas.dashes[-DISTRACTOR_DASHES:]:
            canvas.occupy(dash)
    return np.stack(canvas.dashes, axis=1)


def render(drawings: Drawings) -> np.ndarray:
    """Images (N, 32, 32) uint8, antialiased: a pixel's grey is the share of it that a dash or a circle covers."""
    images = np.zeros((len(drawings.dashes), SIDE, SIDE), dtype=np.uint8)
    for dash in drawings.dashes.swapaxes(0, 1):
        along, across, index = _near(dash, 1.0, 1)
        covered = (DASH / 2 + 0.5 - abs(along)).clip(0, 1) * (1 - abs(across)).clip(0, 1)
        images[index] = np.maximum(images[index], np.round(DASH_GREY * covered).astype(np.uint8))
    pixels = np.arange(SIDE)
    for centre in drawings.circles.swapaxes(0, 1):
        dy, dx = (pixels - centre[:, axis, None] for axis in range(2))
        distance = np.hypot(dy[:, :, None], dx[:, None, :])
        covered = (RADIUS + 0.5 - distance).clip(0, 1)
        images = np.maximum(images, np.round(CIRCLE_GREY * covered).astype(np.uint8))
    return images
