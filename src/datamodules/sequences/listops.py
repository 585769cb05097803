"""ListOps: random nested lists of digits with their values, many at a time.

Nangia and Bowman, "ListOps: A Diagnostic Dataset for Latent Tree Learning", NAACL-SRW 2018, in the long form of Tay et
al., "Long Range Arena", ICLR 2021: `[MAX 2 9 [MIN 4 7 ] 0 ]` has the value 9. A tree starts with an operator, each of
its 2 to 10 arguments is again an operator with probability 1/4 and a digit else, and at the greatest depth of 10 all
are digits. Trees outside the wanted lengths are thrown away, as there. Operators are MIN, MAX, MED (the median, rounded
down) and SM (the sum modulo 10).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch

from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.sequences.base import SequenceData
from src.datamodules.sequences.cache import read_cached

OPERATORS = ("MIN", "MAX", "MED", "SM")
# padding, digits, operators with their opening bracket, closing bracket
VOCABULARY = (".", *(str(digit) for digit in range(10)), *(f"[{name}" for name in OPERATORS), "]")
PADDING, FIRST_DIGIT, FIRST_OPERATOR, CLOSE = 0, 1, 11, 15
NUM_CLASSES = 10
NESTED = 1 / 4  # probability that an argument is an operator
MAX_DEPTH, MAX_ARGUMENTS = 10, 10
SHORTEST, LONGEST = 16, 2048  # beyond 2,048 tokens hardly any tree of this depth is long enough
TREES_AT_A_TIME = 4096


@dataclass(frozen=True)
class Expressions:
    """Expressions as tokens.

    Attributes:
        tokens: (N, length) uint8, indices into `VOCABULARY`, padded at the end.
        lengths: (N,) int64, tokens of each.
        values: (N,) int64 in 0..9.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> Expressions:
        return Expressions(self.tokens[part], self.lengths[part], self.values[part])


@dataclass
class _Level:
    """Nodes of one depth, over all trees, the arguments of an operator side by side and in the order of operators.

    Attributes:
        tree: (n,) number of the tree.
        operator: (n,) operator, -1 for digits.
        value: (n,) digit, or what the operator gives.
        num_arguments: (n,) 0 for digits.
        size: (n,) tokens of the sub-tree.
    """

    tree: np.ndarray
    operator: np.ndarray
    value: np.ndarray
    num_arguments: np.ndarray
    size: np.ndarray


def draw_expressions(num: int, length: int, seed: int, shortest: int | None = None) -> Expressions:
    """Expressions that differ from one another.

    Args:
        num: number N of expressions; a smaller number with the same seed gives the first of them.
        length: most tokens, and what all are padded to, from 16 to 2048.
        seed: of everything random.
        shortest: least tokens; None is half of `length`.

    Raises:
        UserError: a value out of range, or there are not so many short expressions.
    """
    check_whole_number("length", length, SHORTEST, LONGEST)
    shortest = length // 2 if shortest is None else shortest
    check_whole_number("shortest", shortest, 4, length)
    generator = np.random.default_rng(seed)
    found: list[Expressions] = []
    known: set[bytes] = set()
    none_for = 0
    while len(known) < num:
        batch = _draw(generator, length, shortest)
        before = len(known)
        new = []
        for row in range(len(batch)):
            text = batch.tokens[row].tobytes()
            if text not in known and len(known) < num:
                known.add(text)
                new.append(row)
        found.append(Expressions(batch.tokens[new], batch.lengths[new], batch.values[new]))
        none_for = 0 if len(known) > before else none_for + 1
        if none_for == 100:
            raise UserError(
                f"Only {len(known)} different expressions of {shortest} to {length} tokens turn up, not {num}. "
                "Give a greater length."
            )
    return Expressions(*(np.concatenate([getattr(x, name) for x in found]) for name in ("tokens", "lengths", "values")))


def _draw(generator: np.random.Generator, length: int, shortest: int) -> Expressions:
    """Expressions of those of `TREES_AT_A_TIME` trees that have the right length."""
    levels = _grow(generator, length)
    _evaluate(levels)
    root = levels[0]
    kept = (root.size >= shortest) & (root.size <= length)
    row_of = np.cumsum(kept) - 1
    tokens = np.full((kept.sum(), length), PADDING, dtype=np.uint8)
    start = np.zeros(len(kept), dtype=np.int64)
    for number, level in enumerate(levels):
        mine = kept[level.tree]
        rows, starts = row_of[level.tree[mine]], start[mine]
        is_operator = level.operator[mine] >= 0
        own = np.where(is_operator, FIRST_OPERATOR + level.operator[mine], FIRST_DIGIT + level.value[mine])
        tokens[rows, starts] = own
        ends = starts + level.size[mine] - 1
        tokens[rows[is_operator], ends[is_operator]] = CLOSE
        if number + 1 < len(levels):
            # an argument starts where those before it end, the first after its operator's token
            size = levels[number + 1].size
            before = np.cumsum(size) - size
            parents = level.operator >= 0
            count = level.num_arguments[parents]
            first = np.cumsum(count) - count
            start = np.repeat(start[parents] + 1 - before[first], count) + before
    return Expressions(tokens, root.size[kept], root.value[kept])


def _grow(generator: np.random.Generator, length: int) -> list[_Level]:
    """Trees from the root on, sizes and values of operators still to be found."""
    levels = []
    tree = np.arange(TREES_AT_A_TIME)
    num_tokens = np.zeros(TREES_AT_A_TIME, dtype=np.int64)
    for depth in range(1, MAX_DEPTH + 1):
        num = len(tree)
        nested = np.ones(num, bool) if depth == 1 else generator.random(num) < NESTED
        # trees that are too long already are thrown away in the end: they need not grow
        nested &= (depth < MAX_DEPTH) & (num_tokens[tree] <= length)
        num_arguments = np.where(nested, generator.integers(2, MAX_ARGUMENTS + 1, num), 0)
        operator = np.where(nested, generator.integers(0, len(OPERATORS), num), -1)
        value = generator.integers(0, 10, num)
        levels.append(_Level(tree, operator, value, num_arguments, np.where(nested, 2, 1)))
        num_tokens += np.bincount(tree, levels[-1].size, TREES_AT_A_TIME).astype(np.int64)
        tree = np.repeat(tree, num_arguments)
        if not len(tree):
            break
    return levels


def _evaluate(levels: list[_Level]) -> None:
    """Fill in sizes and values of the operators, from the greatest depth up."""
    for level, below in zip(reversed(levels[:-1]), reversed(levels[1:]), strict=True):
        parents = np.flatnonzero(level.operator >= 0)
        num_arguments = level.num_arguments[parents]
        owner = np.repeat(np.arange(len(parents)), num_arguments)
        level.size[parents] += np.bincount(owner, below.size, len(parents)).astype(np.int64)
        # how often each digit is among the arguments: all four operators follow from that
        counts = np.bincount(owner * 10 + below.value, minlength=10 * len(parents)).reshape(-1, 10)
        upto = counts.cumsum(1)
        middle = [(upto <= rank[:, None]).sum(1) for rank in ((num_arguments - 1) // 2, num_arguments // 2)]
        results = (
            (counts > 0).argmax(1),
            9 - (counts[:, ::-1] > 0).argmax(1),
            (middle[0] + middle[1]) // 2,
            counts @ np.arange(10) % 10,
        )
        level.value[parents] = np.choose(level.operator[parents], results)


def as_text(tokens: np.ndarray) -> str:
    """An expression as text, without the padding."""
    return " ".join(VOCABULARY[token] for token in tokens if token != PADDING)


def first_operator_accuracy(train: SequenceData, held_out: SequenceData) -> float:
    """Accuracy of predicting the most frequent value of the outermost operator, which is the first token.

    It takes no reading of the list: MIN is mostly 0, MAX mostly 9.
    """
    guesses = torch.zeros(len(VOCABULARY), dtype=torch.long)
    for token in range(FIRST_OPERATOR, CLOSE):
        values = train.targets[train.tokens[:, 0] == token]
        guesses[token] = torch.bincount(values, minlength=NUM_CLASSES).argmax()
    return (held_out.targets == guesses[held_out.tokens[:, 0].long()]).double().mean().item()


def read_listops(
    length: int = 2000,
    shortest: int = 500,
    num_train: int = 96_000,
    num_validation: int = 2000,
    num_test: int = 2000,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
) -> dict[str, SequenceData]:
    """The three parts of ListOps; the defaults are the sizes of the Long Range Arena.

    Args:
        length: most tokens, from 16 to 2048.
        shortest: least tokens.
        num_train: expressions for training.
        num_validation: expressions for validation.
        num_test: expressions for the test.
        seed: of the expressions; the same for every seed of a training.
        cache: file that keeps the expressions, which take a minute for each 100,000; None keeps none.

    Raises:
        UserError: a value out of range, or see `read_cached`.
    """
    sizes = {"test": num_test, "validation": num_validation, "train": num_train}
    for name, size in sizes.items():
        check_whole_number(f"datamodule.read.num_{name}", size, 1)
    check_whole_number("datamodule.read.seed", seed, 0)

    def draw() -> dict[str, torch.Tensor]:
        drawn = draw_expressions(sum(sizes.values()), length, seed, shortest)
        return {name: torch.from_numpy(x) for name, x in vars(drawn).items()}

    drawn = read_cached(cache, "listops", draw, f"{sum(sizes.values())} of {shortest} to {length} tokens, seed {seed}")
    # training last: more of it leaves the held-out expressions as they are
    parts = zip(*(drawn[name].split(list(sizes.values())) for name in ("tokens", "values", "lengths")), strict=True)
    return {name: SequenceData(*part) for name, part in zip(sizes, parts, strict=True)}
