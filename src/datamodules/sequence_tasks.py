"""Two small tasks on sequences: the next byte of source code, and the value of a nested list."""

from __future__ import annotations

import hashlib
import math
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from scatterbrain.errors import UserError
from src.datamodules.formats.files import read_file
from src.datamodules.listops import (
    CLASS,
    NUM_CLASSES,
    VOCABULARY,
    Expressions,
    draw_expressions,
    first_operator_accuracy,
    majority_accuracy,
)

TASKS = ("language", "listops")
CORPUS_BYTES = 8_000_000
HELD_OUT_FILES = 10  # each tenth file
NUM_WINDOWS = 128  # of the held-out text
HELD_OUT_EXPRESSIONS = 2000


class Task(ABC):
    """Data on the device, and how a network is scored on it.

    Attributes:
        name: of `TASKS`.
        causal: whether a token may see what comes after it.
        vocabulary: number of different tokens.
        num_outputs: number of classes.
        num_held_out: number of samples that a network is scored on.
        description: of the data, for the file of results; `baselines` among it.
    """

    name: str
    causal: bool
    vocabulary: int
    num_outputs: int
    num_held_out: int
    description: dict[str, Any]

    @abstractmethod
    def draw_order(self, num_steps: int, batch_size: int, seed: int) -> torch.Tensor:
        """Which samples each step takes: (steps, B) on the device, a function of the seed."""

    @abstractmethod
    def batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Tokens (B, T), their lengths (B,) or None, and targets (B, T) or (B,), of training samples."""

    @abstractmethod
    def held_out(self, part: slice) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The same, of some of the held-out samples."""

    @abstractmethod
    def score(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of the samples, whose mean is the metric."""

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats."""
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


class Language(Task):
    """The next byte of a text, in windows of `length` bytes; `held_out` are bytes of other files."""

    name, causal, vocabulary, num_outputs = "language", True, 256, 256

    def __init__(
        self, train: bytes, held_out: bytes, length: int, device: torch.device, description: Mapping[str, Any]
    ) -> None:
        texts = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, held_out)]
        if min(len(text) for text in texts) <= length:
            raise UserError(f"--length {length}: the sources of the standard library are shorter. Lower it.")
        self.description = {
            **description,
            "train_bytes": len(train),
            "held_out_bytes": len(held_out),
            "baselines": byte_baselines(*texts),
        }
        self._train = texts[0].to(device)
        self._within = torch.arange(length + 1, device=device)
        # windows side by side where there are few, spread evenly where there are more
        self.num_held_out = min(NUM_WINDOWS, (len(held_out) - 1) // length)
        starts = torch.linspace(0, len(held_out) - length - 1, self.num_held_out).long()
        self._windows = texts[1].to(device)[starts.to(device)[:, None] + self._within]
        self.description["held_out_windows"] = self.num_held_out

    def draw_order(self, num_steps: int, batch_size: int, seed: int) -> torch.Tensor:
        """Starts of the windows."""
        generator = torch.Generator().manual_seed(seed)
        last = len(self._train) - len(self._within)
        return torch.randint(last + 1, (num_steps, batch_size), generator=generator).to(self._train.device)

    def batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Windows, and each one's next bytes."""
        return self._split(self._train[index[:, None] + self._within])

    def held_out(self, part: slice) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The same of the held-out files."""
        return self._split(self._windows[part])

    def score(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Bits per byte of each window, from its first to its last byte."""
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return nats.view_as(targets).mean(1) / math.log(2)

    @staticmethod
    def _split(windows: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        windows = windows.long()
        return windows[:, :-1], None, windows[:, 1:]


class ListOps(Task):
    """The value of a nested list, read from a token before it, as in the Arena."""

    name, causal, vocabulary, num_outputs = "listops", False, len(VOCABULARY), NUM_CLASSES

    def __init__(self, train: Expressions, held_out: Expressions, device: torch.device) -> None:
        self.num_held_out = len(held_out)
        self.description = {
            "train_expressions": len(train),
            "held_out_expressions": len(held_out),
            "mean_length": float(train.lengths.mean()),
            "baselines": {
                "majority class": majority_accuracy(train, held_out),
                "first operator": first_operator_accuracy(train, held_out),
            },
        }
        self._train, self._held_out = (self._on_device(each, device) for each in (train, held_out))

    def draw_order(self, num_steps: int, batch_size: int, seed: int) -> torch.Tensor:
        """Permutations of the expressions, one after the other."""
        generator = torch.Generator().manual_seed(seed)
        num = len(self._train[0])
        passes = -(-num_steps * batch_size // num)
        order = torch.cat([torch.randperm(num, generator=generator) for _ in range(passes)])
        return order[: num_steps * batch_size].view(num_steps, batch_size).to(self._train[0].device)

    def batch(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Expressions, their lengths and values."""
        tokens, lengths, values = (x[index] for x in self._train)
        return tokens.long(), lengths, values

    def held_out(self, part: slice) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The same of those held out."""
        tokens, lengths, values = (x[part] for x in self._held_out)
        return tokens.long(), lengths, values

    @staticmethod
    def _on_device(expressions: Expressions, device: torch.device) -> list[torch.Tensor]:
        """Tokens behind the one that the value is read from, lengths with it, and values."""
        tokens, lengths, values = (
            torch.from_numpy(x) for x in (expressions.tokens, expressions.lengths, expressions.values)
        )
        tokens = torch.cat([tokens.new_full((len(tokens), 1), CLASS), tokens], dim=1)
        return [x.to(device) for x in (tokens, lengths + 1, values)]

    def score(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Whether the value is right, 1 or 0."""
        return (logits.argmax(-1) == targets).float()


def library_sources(folder: str | Path | None = None, limit: int = CORPUS_BYTES) -> tuple[bytes, bytes, dict[str, Any]]:
    """Training text, held-out text (each tenth file) and a description of the sources of Python's standard library.

    They are in the order of their names; tests, installed packages and files that building Python writes are left out.
    No other file is begun after `limit` bytes. `sha256` in the description is another for each version of Python.
    """
    folder = Path(folder or sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = {}
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder)
        if not left_out & set(name.parts) and not name.parts[0].startswith(("config-", "_sysconfigdata")):
            paths[name.as_posix()] = path
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    digest, size, files = hashlib.sha256(), 0, 0
    for files, name in enumerate(sorted(paths), start=1):
        text = read_file(paths[name])
        digest.update(text)
        size += len(text)
        texts[files % HELD_OUT_FILES == 0].append(text)
        if size >= limit:
            break
    version = ".".join(map(str, sys.version_info[:3]))
    description = {"python": version, "files": files, "bytes": size, "sha256": digest.hexdigest()}
    return b"".join(texts[0]), b"".join(texts[1]), description


def byte_baselines(train: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
    """Bits per byte of held-out text under the frequencies of bytes in training, and of bytes after each byte.

    Each byte, or pair, counts once more than it occurs, so that none is impossible.
    """
    single = torch.bincount(train.long(), minlength=256).double() + 1
    pairs = torch.bincount(train[:-1].long() * 256 + train[1:].long(), minlength=256**2).view(256, 256).double() + 1
    before, after = held_out[:-1].long(), held_out[1:].long()
    return {
        "byte frequencies": -(single / single.sum()).log2()[held_out.long()].mean().item(),
        "byte after byte": -(pairs / pairs.sum(1, keepdim=True)).log2()[before, after].mean().item(),
    }


def create_task(name: str, length: int, num_expressions: int, seed: int, device: torch.device) -> Task:
    """The data of a task, samples of at most `length` tokens; `num_expressions` of ListOps are to train on.

    Raises:
        UserError: the length does not suit the task.
    """
    if name == "language":
        train, held_out, description = library_sources()
        return Language(train, held_out, length, device, description)
    drawn = draw_expressions(num_expressions + HELD_OUT_EXPRESSIONS, length - 1, seed)
    return ListOps(drawn[HELD_OUT_EXPRESSIONS:], drawn[:HELD_OUT_EXPRESSIONS], device)
