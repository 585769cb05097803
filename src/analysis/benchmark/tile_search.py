"""The search for the kernels' tile settings: which candidates it tries, and what it chooses. Needs no GPU."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from scatterbrain.ops.scatterbrain.triton.tiles import Tiles
from src.analysis.benchmark.timing import in_turn

# Settings with their smallest and largest values (matrix products take 16 rows at least), in groups that are searched
# together, since they influence one another and nothing else.
GROUPS: dict[str, dict[str, tuple[int, int]]] = {
    "sums": {"sum_rows": (16, 256), "sum_programs": (64, 4096), "sum_warps": (2, 8), "sum_stages": (2, 4)},
    "queries": {
        **{"query_rows": (16, 128), "key_rows": (16, 128), "query_tiles": (1, 16)},
        **{"query_warps": (1, 8), "query_stages": (2, 4), "query_registers": (96, 255)},
    },
    "query gradient": {
        **{"dq_rows": (16, 32), "dq_keys": (16, 128)},
        **{"dq_warps": (1, 8), "dq_stages": (2, 4), "dq_registers": (96, 255)},
    },
    "key gradients": {
        **{"dk_rows": (16, 32), "dk_queries": (16, 128)},
        **{"dk_warps": (1, 8), "dk_stages": (2, 4), "dk_registers": (96, 255)},
    },
}
LIMITS = {name: limits for group in GROUPS.values() for name, limits in group.items()}
# Registers that let two, three and four warps share a part of an SM, and None: what the compiler takes.
REGISTERS = (None, 128, 168, 232)
# A candidate differs from the best so far in this many settings at most: the search moves on to what is further away.
MAX_CHANGES = 3
MAX_MOVES = 4
FINALISTS, FINAL_ROUNDS = 5, 5
# The best so far is kept unless another is faster by this part: less is noise.
MIN_GAIN = 0.01


@dataclass
class Trial:
    """A candidate and its times in milliseconds by pass, or the reason why it is left out."""

    tiles: Tiles
    reason: str | None = None
    milliseconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """Geometric mean of the passes' medians; infinite where it was left out."""
        if not self.milliseconds:
            return math.inf
        return statistics.geometric_mean(statistics.median(times) for times in self.milliseconds.values())


def passes_of(group: str, passes: Sequence[str]) -> tuple[str, ...]:
    """Those of some passes that a group matters to."""
    return tuple(name for name in passes if name == "training" or not group.endswith(("gradient", "gradients")))


def values_around(name: str, present: int | None) -> tuple[int | None, ...]:
    """Values of one setting that are tried beside the present one; None leaves it to the compiler."""
    low, high = LIMITS[name]
    if name.endswith("_registers"):
        return (present, *(value for value in REGISTERS if value != present))
    near = (present - 1, present + 1) if name.endswith("_stages") else (present // 2, present * 2)
    return (present, *(value for value in near if low <= value <= high))


def candidates_around(tiles: Tiles, fields: Collection[str]) -> list[Tiles]:
    """The grid around `tiles` in some settings, nearest first, `tiles` itself before all others."""
    grid = itertools.product(*(values_around(name, getattr(tiles, name)) for name in fields))
    candidates = [replace(tiles, **dict(zip(fields, values, strict=True))) for values in grid]

    def changes(other: Tiles) -> int:
        return sum(getattr(other, name) != getattr(tiles, name) for name in fields)

    # a run may be stopped before all are measured
    return sorted((other for other in candidates if changes(other) <= MAX_CHANGES), key=changes)


def ranking(trials: Mapping[Tiles, Trial]) -> list[Trial]:
    """The trials that were timed, fastest first."""
    return sorted((trial for trial in trials.values() if trial.milliseconds), key=lambda trial: trial.score)


def ratio_to_present(trial: Trial, present: Trial | None) -> float | None:
    """Time over that of the present settings, None where one of them was not timed."""
    if present is None or not trial.milliseconds or not present.milliseconds:
        return None
    return trial.score / present.score


class Search:
    """The search for the tiles of one shape.

    Args:
        start: the present settings.
        passes: that are timed.
        check: runs candidates in some passes, where they can do no harm; why each is left out, None where it is not.
        measure: milliseconds of a call of a candidate in a pass; None where it cannot be timed.
    """

    def __init__(
        self,
        start: Tiles,
        passes: Sequence[str],
        check: Callable[[Sequence[Tiles], tuple[str, ...]], Mapping[Tiles, str | None]],
        measure: Callable[[Tiles, str], float | None],
    ) -> None:
        self.best = start
        self.passes = passes
        self.check = check
        self.measure = measure
        self.trials: dict[str, dict[Tiles, Trial]] = {}
        self.present: dict[str, Tiles] = {}

    @property
    def measured(self) -> bool:
        """Whether anything was."""
        return any(trial.milliseconds for trials in self.trials.values() for trial in trials.values())

    def run_group(self, name: str) -> None:
        """Search one of `GROUPS` until nothing near is faster; its best is where the next group starts."""
        trials = self.trials[name] = {}
        self.present[name] = self.best
        passes = passes_of(name, self.passes)
        for _ in range(MAX_MOVES):
            new = [tiles for tiles in candidates_around(self.best, GROUPS[name]) if tiles not in trials]
            for tiles, reason in self.check(new, passes).items():
                trials[tiles] = Trial(tiles, reason)
                # what failed elsewhere is never run here: a fault of the device would end everything
                if reason is None:
                    self.time(trials[tiles], passes)
            before, self.best = self.best, self.choose(trials, passes)
            if self.best == before:
                return

    def time(self, trial: Trial, passes: tuple[str, ...]) -> None:
        """Time a candidate once in each pass."""
        times = {name: self.measure(trial.tiles, name) for name in passes}
        if None in times.values():
            trial.reason, trial.milliseconds = "it cannot be captured in a CUDA graph", {}
            return
        for name, value in times.items():
            trial.milliseconds.setdefault(name, []).append(value)

    def choose(self, trials: dict[Tiles, Trial], passes: tuple[str, ...]) -> Tiles:
        """The fastest, after the best few and the best so far ran in turn; the latter where the gain is noise."""
        finalists = ranking(trials)[:FINALISTS]
        kept = trials.get(self.best)
        if kept is not None and kept.milliseconds and kept not in finalists:
            finalists.append(kept)
        for trial in in_turn(finalists, FINAL_ROUNDS):
            if trial.milliseconds:
                self.time(trial, passes)
        winner = min(finalists, key=lambda trial: trial.score, default=None)
        if winner is None or not winner.milliseconds:
            return self.best
        if kept is not None and winner.score > (1 - MIN_GAIN) * kept.score:
            return self.best
        return winner.tiles
