"""Networks trained from scratch with each attention: a causal language model of bytes, and ListOps.

Chen et al., "Scatterbrain", NeurIPS 2021, section 5, trains on language (WikiText-103, enwik8) and on the Long Range
Arena; here are both in small, from data that any machine has: the sources of Python's standard library, split by file,
and nested lists drawn on the spot (`scripts/listops.py`). The networks differ in nothing but the attention: the weights
that they start from, the batches and the schedule are the same, and the attentions have the same memory.

The language model is causal; an attention that cannot be is left out, with the reason that it gives. A causal window
of W keys shows W // 2 + 1 of them, as its other half lies behind the query: its memory is counted in full all the same.
ListOps is bidirectional, its expressions fill half to all of the length, and the rest is hidden by key lengths. Its
value is read from a token before the expression. A network that knows the outermost operator alone, which is the next
token, is right a third of the time: that baseline is told beside the most frequent value. Two things count against
sparse attentions there: the answer's token sees through a window no further than depth times half of it, and the hashes
of SMYRF and Reformer sort the padding's queries among the others.

    python scripts/experiment_training.py --output training.json --figure training.png

--output is written after each training; Ctrl-C and SIGTERM end the run with the trainings that are complete by then
("complete": false). Trainings may run beside each other, as processes with an output of their own each, which --inputs
puts together; their seconds then say little.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import statistics
import sys
import sysconfig
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from timm.layers import Mlp
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.attention import ATTENTIONS, attention_memory, create_attention
from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.budget import budget_columns
from scripts.experiment_regimes import FAINT, INK, style
from scripts.listops import (
    CLASS,
    NUM_CLASSES,
    VOCABULARY,
    Expressions,
    draw_expressions,
    first_operator_accuracy,
    majority_accuracy,
)
from src.evaluation.colours import ATTENTION_COLOURS
from src.tasks.device_time import seconds_now
from src.tasks.environment import package_versions
from src.tasks.options import MAX_SEED
from src.utils.files import write_json
from src.utils.machine import machine_info
from src.utils.scripts import (
    Parser,
    check_figure,
    check_writable,
    choose_device,
    comma_separated,
    first_line,
    fraction,
    positive,
    progress_display,
    run_tool,
    save_figure,
    saved_until_stopped,
    without_paths,
)

TASKS = ("language", "listops")
TITLES = {"language": "Language: the standard library's sources", "listops": "ListOps"}
METRICS = {"language": "bits per byte", "listops": "accuracy"}
COMPARED = (
    *("full", "local", "performer", "sblocal", "smyrf", "sbsmyrf"),
    *("cluster", "sbcluster", "pairedcluster", "reformer"),
)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CORPUS_BYTES = 8_000_000
HELD_OUT_FILES = 10  # each tenth file
NUM_WINDOWS = 128  # of the held-out text
HELD_OUT_EXPRESSIONS = 2000
EVALUATION_BATCHES = 4  # training batches that an evaluation takes at a time
WARM_UP = 1 / 20  # of the training, in which the learning rate rises
WEIGHT_DECAY = 0.01
LARGEST_GRADIENT = 1.0
LEGEND_COLUMNS = 2
# what files need not agree in to be put together; each training says how many steps it has got in its time
OWN_SETTINGS = ("tasks", "attentions", "threads", "seconds")


def positive_number(text: str) -> float:
    """Type of an option that takes a positive number."""
    number = fraction(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return number


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--tasks", type=comma_separated(TASKS), default=TASKS, metavar="NAMES", help=f"({','.join(TASKS)})")
    names = {"type": comma_separated(tuple(ATTENTIONS)), "default": COMPARED, "metavar": "NAMES"}
    add("--attentions", **names, help=f"({','.join(COMPARED)})")
    add("--steps", type=positive, default=1500, metavar="N", help="of a training (1500)")
    add("--seconds", type=positive_number, metavar="S", help="end a training after S seconds, annealed (no limit)")
    add("--batch-size", type=positive, default=32, metavar="B", help="(32)")
    add("--length", type=positive, default=1024, metavar="N", help="tokens (1024)")
    add("--memory-fraction", type=fraction, default=1 / 16, metavar="F", help="budget of the attentions (1/16)")
    add("--depth", type=positive, default=4, metavar="N", help="blocks (4)")
    add("--dim", type=positive, default=128, metavar="N", help="width of the tokens (128)")
    add("--heads", type=positive, default=2, metavar="H", help="(2)")
    add("--lr", type=positive_number, default=1e-3, metavar="R", help="highest learning rate (1e-3)")
    add("--num-seeds", type=positive, default=1, metavar="K", help="of weights, batches and features (1)")
    add("--num-expressions", type=positive, default=20_000, metavar="N", help="of ListOps to train on (20000)")
    add("--eval-every", type=positive, default=150, metavar="N", help="steps between evaluations (150)")
    add("--seed", type=int, default=1111, metavar="N", help="the first one, and that of the lists (1111)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: CUDA where it is)")
    add("--precision", choices=tuple(PRECISIONS), help="bfloat16 is autocast (bfloat16 on CUDA, else float32)")
    add("--threads", type=positive, metavar="T", help="CPU threads (PyTorch's choice)")
    add("--inputs", nargs="+", metavar="FILE", help="put these files of --output together; nothing is trained")
    add("--output", metavar="FILE", help="write the figures as JSON")
    add("--figure", metavar="FILE", help="draw them: .png, .pdf or .svg")
    return parser


# Tasks ----------------------------------------------------------------------------------------------------------------


class Task(ABC):
    """Data on the device, and how a network is scored on it.

    Attributes:
        name: of `TASKS`.
        causal: whether a token may see what comes after it.
        vocabulary: number of tokens that there are.
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
        """What the metric is the mean of, for each sample (B,)."""

    def loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy in nats."""
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


class Language(Task):
    """The next byte of a text.

    Args:
        train: bytes to train on.
        held_out: bytes of other files.
        length: tokens of a window.
        device: where the bytes are kept.
        description: of the text.
    """

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
        """Where the windows start."""
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
    """The value of a nested list.

    Args:
        train: expressions to train on.
        held_out: others.
        device: where they are kept, each with a token before it that the value is read from, as in the Arena.
    """

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
    """The sources of Python's standard library, in the order of their names, as training and held-out text.

    Tests, installed packages and files that building Python writes are left out. Each tenth file is held out.

    Args:
        folder: where they are; None is that of this Python.
        limit: bytes after which no other file is begun.

    Returns:
        Training text, held-out text, and a description: `python`, `files`, `bytes` and the `sha256` of all of it. It is
        another for each version of Python.
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
        text = paths[name].read_bytes()
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
    """The data of a task.

    Args:
        name: of `TASKS`.
        length: tokens of a sample, at most; of ListOps, one of them is the one that the value is read from.
        num_expressions: of ListOps, to train on; the held-out ones are drawn on top.
        seed: of ListOps.
        device: where the data is kept.

    Raises:
        UserError: the length does not suit the task.
    """
    if name == "language":
        train, held_out, description = library_sources()
        return Language(train, held_out, length, device, description)
    drawn = draw_expressions(num_expressions + HELD_OUT_EXPRESSIONS, length - 1, seed)
    return ListOps(drawn[HELD_OUT_EXPRESSIONS:], drawn[:HELD_OUT_EXPRESSIONS], device)


# Network --------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`.

    Args:
        dim: width of the tokens.
        heads: number of heads H.
        attention: over (B, N, H, dim / H).
    """

    def __init__(self, dim: int, heads: int, attention: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention = attention
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim); lengths (B,) or None."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out, _ = self.attention(query, key, value, key_lengths=lengths)
        x = x + self.proj(out.flatten(2))
        return x + self.mlp(self.norm2(x))


class Network(nn.Module):
    """Tokens and learned positions, pre-norm blocks, and a linear map of each token or of the first.

    Args:
        attentions: one for each block.
        vocabulary: number of tokens that there are.
        num_outputs: number of classes.
        length: most tokens N.
        dim: width.
        heads: number of heads.
        each_token: give logits for each token; else for the first one, which is there for that.
        seed: of the weights, which do not depend on the attentions.
    """

    def __init__(
        self,
        attentions: Sequence[nn.Module],
        vocabulary: int,
        num_outputs: int,
        length: int,
        dim: int,
        heads: int,
        each_token: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.each_token = each_token
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, dim)
            self.positions = nn.Parameter(torch.empty(length, dim))
            self.blocks = nn.ModuleList(Block(dim, heads, attention) for attention in attentions)
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, num_outputs)
            for weight in (self.embedding.weight, self.positions):
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B, N, classes) for each token, or (B, classes).

        Args:
            tokens: (B, N) integers.
            lengths: (B,) integers, tokens of each sample; the rest is padding. None for all.
        """
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, lengths)
        return self.head(self.norm(x if self.each_token else x[:, 0]))


# Training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained, whatever its attention; see the options of the script."""

    steps: int = 1500
    seconds: float | None = None
    batch_size: int = 32
    length: int = 1024
    memory_fraction: float = 1 / 16
    depth: int = 4
    dim: int = 128
    heads: int = 2
    lr: float = 1e-3
    eval_every: int = 150
    precision: str = "float32"

    def check(self) -> None:
        """Refuse what no attention could do.

        Raises:
            UserError: a value out of range.
        """
        budget_columns(self.length, self.memory_fraction)
        if self.dim % self.heads:
            raise UserError(f"--heads {self.heads} does not divide --dim {self.dim}. Choose another.")


@dataclass
class Result:
    """A training.

    Attributes:
        task: of `TASKS`.
        attention: its name.
        seed: of weights, batches and features.
        sizes: what the attention's memory is spent on.
        memory: over that of the full matrix.
        steps: that were done.
        diverged_at: the first step whose loss is not finite; None where there is none. The training ends there.
        curve: `step`, `metric` on held-out data and mean `train_loss` (nats) since the point before.
        metric: the last one; None where there is none.
        standard_error: of the metric, from the held-out samples alone: another seed is another matter.
        seconds_per_step: without evaluations.
        warm_up_seconds: of the first passes, which compile; they count as no step and change no weight.
        peak_memory_mib: of the device in training, data and all; None where it is not counted.
    """

    task: str
    attention: str
    seed: int
    sizes: dict[str, int]
    memory: float
    steps: int
    diverged_at: int | None
    curve: list[dict[str, float]]
    metric: float | None
    standard_error: float | None
    seconds_per_step: float
    warm_up_seconds: float
    peak_memory_mib: float | None


def create_network(task: Task, attention: str, recipe: Recipe, seed: int) -> Network:
    """The network of an attention; each block has random features of its own.

    Raises:
        UserError: the attention cannot do the task.
    """
    attentions = [
        create_attention(
            attention,
            recipe.length,
            recipe.dim // recipe.heads,
            memory_fraction=recipe.memory_fraction,
            seed=seed + block,
            # one that has no such option is not refused where it is not needed
            causal=True if task.causal else None,
        )
        for block in range(recipe.depth)
    ]
    return Network(
        attentions, task.vocabulary, task.num_outputs, recipe.length, recipe.dim, recipe.heads, task.causal, seed
    )


def learning_rate(progress: float, highest: float) -> float:
    """Linear warm-up, then half a cosine to zero.

    Args:
        progress: part of the training that is done, in [0, 1].
        highest: at the end of the warm-up.
    """
    if progress < WARM_UP:
        return highest * progress / WARM_UP
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


class Training:
    """A network that is trained.

    Args:
        task: that it learns.
        attention: its name.
        recipe: of the training.
        seed: of weights, batches and features.
        device: where it runs.

    Raises:
        UserError: the attention cannot do the task.
    """

    def __init__(self, task: Task, attention: str, recipe: Recipe, seed: int, device: torch.device) -> None:
        self.task, self.attention, self.recipe, self.seed, self.device = task, attention, recipe, seed, device
        self.network = create_network(task, attention, recipe, seed).to(device).train()
        self.order = task.draw_order(recipe.steps, recipe.batch_size, seed)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.lr, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda" or None
        )
        self.losses = torch.zeros(recipe.steps, device=device)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision that is asked for."""
        dtype = PRECISIONS[self.recipe.precision]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            yield

    def backward(self, index: torch.Tensor) -> torch.Tensor:
        """Loss of a batch, and its gradients."""
        tokens, lengths, targets = self.task.batch(index)
        with self.autocast():
            loss = self.task.loss(self.network(tokens, lengths), targets)
        loss.backward()
        return loss.detach()

    def step(self, number: int, progress: float) -> None:
        """An update. The host waits for nothing: the loss stays on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(progress, self.recipe.lr)
        self.optimizer.zero_grad()
        self.losses[number] = self.backward(self.order[number])
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()

    @torch.no_grad()
    def held_out_scores(self, start: int) -> torch.Tensor:
        """Scores of some held-out samples, from one on."""
        size = EVALUATION_BATCHES * self.recipe.batch_size
        tokens, lengths, targets = self.task.held_out(slice(start, start + size))
        self.network.eval()
        with self.autocast():
            logits = self.network(tokens, lengths)
        self.network.train()
        return self.task.score(logits, targets)

    def evaluate(self) -> tuple[float, float]:
        """Metric on held-out data, and its standard error."""
        size = EVALUATION_BATCHES * self.recipe.batch_size
        every = torch.cat([self.held_out_scores(start) for start in range(0, self.task.num_held_out, size)]).double()
        error = every.std().item() / len(every) ** 0.5 if len(every) > 1 else 0.0
        return every.mean().item(), error

    def run(self, advance: Callable[[int], None] = lambda steps: None) -> Result:
        """Train to the end.

        Args:
            advance: is told of steps that are done.
        """
        recipe, device = self.recipe, self.device
        on_cuda = device.type == "cuda"
        start = seconds_now(device)
        self.backward(self.order[0])
        self.optimizer.zero_grad()
        self.held_out_scores(0)
        warm_up = seconds_now(device) - start
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        curve: list[dict[str, float]] = []
        metric = error = diverged_at = None
        peak, spent, done = 0, 0.0, 0
        start = since = seconds_now(device)
        while done < recipe.steps and diverged_at is None:
            progress = (done + 1) / recipe.steps
            if recipe.seconds is not None:
                # by the host's clock, which is a few steps ahead of the device; the schedule ends with the time
                progress = max(progress, (time.perf_counter() - start) / recipe.seconds)
            self.step(done, min(1.0, progress))
            done += 1
            advance(1)
            if done % recipe.eval_every and progress < 1:
                continue
            spent += seconds_now(device) - since
            if on_cuda:
                peak = max(peak, torch.cuda.max_memory_allocated(device))
            first = int(curve[-1]["step"]) if curve else 0
            losses = self.losses[first:done]
            if losses.isfinite().all():
                metric, error = self.evaluate()
                if math.isfinite(metric):
                    curve.append({"step": done, "metric": metric, "train_loss": losses.mean().item()})
                else:
                    metric = error = None
                    diverged_at = done
            else:
                metric = error = None
                diverged_at = first + int((~losses.isfinite()).int().argmax()) + 1
            if progress >= 1:
                break
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(device)
            since = seconds_now(device)
        attention = self.network.blocks[0].attention
        return Result(
            task=self.task.name,
            attention=self.attention,
            seed=self.seed,
            sizes=attention.sizes(),
            memory=attention_memory(attention, recipe.length),
            steps=done,
            diverged_at=diverged_at,
            curve=curve,
            metric=metric,
            standard_error=error,
            seconds_per_step=spent / done,
            warm_up_seconds=warm_up,
            peak_memory_mib=peak / 2**20 if on_cuda else None,
        )


class Experiment:
    """All trainings of a run.

    Args:
        arguments: the options.

    Raises:
        UserError: a value out of range.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        check_whole_number("--seed", arguments.seed, 0, MAX_SEED - arguments.num_seeds - arguments.depth)
        self.device = choose_device(arguments.device)
        chosen = {
            "device": self.device.type,
            "precision": arguments.precision or ("bfloat16" if self.device.type == "cuda" else "float32"),
        }
        self.arguments = argparse.Namespace(**vars(arguments) | chosen)
        self.recipe = Recipe(**{name: getattr(self.arguments, name) for name in Recipe.__dataclass_fields__})
        self.recipe.check()
        self.cases = [
            (seed, task, attention)
            for seed in range(arguments.seed, arguments.seed + arguments.num_seeds)
            for task in arguments.tasks
            for attention in arguments.attentions
        ]
        self.tasks: dict[str, dict[str, Any]] = {}
        self.results: list[Result] = []
        self.skipped: list[dict[str, Any]] = []

    def run(self, console: Console, save: Callable[[], None] = lambda: None) -> None:
        """Train all; `save` is called after each.

        Raises:
            UserError: the length does not suit a task.
        """
        arguments = self.arguments
        tasks = {}
        with progress_display(console) as progress:
            bar = progress.add_task("data", total=len(self.cases) * arguments.steps)
            for name in arguments.tasks:
                tasks[name] = create_task(
                    name, arguments.length, arguments.num_expressions, arguments.seed, self.device
                )
            self.tasks = {name: task.description for name, task in tasks.items()}
            for number, (seed, name, attention) in enumerate(self.cases, start=1):
                progress.update(bar, description=f"{name}: {attention}")
                try:
                    training = Training(tasks[name], attention, self.recipe, seed, self.device)
                    self.results.append(training.run(lambda steps: progress.advance(bar, steps)))
                # the others go on: what an attention cannot do, memory of the device, a kernel that it lacks
                except (UserError, RuntimeError) as error:
                    reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else first_line(error)
                    self.skipped.append({"task": name, "attention": attention, "seed": seed, "reason": reason})
                training = None  # its memory is the next one's
                progress.update(bar, completed=number * arguments.steps)
                save()

    def missing(self) -> list[str]:
        """Trainings that were not reached."""
        done = {(each.seed, each.task, each.attention) for each in self.results}
        done |= {(each["seed"], each["task"], each["attention"]) for each in self.skipped}
        return [
            f"{task} {attention} (seed {seed})"
            for seed, task, attention in self.cases
            if (seed, task, attention) not in done
        ]

    def report(self) -> dict[str, Any]:
        """Everything, for a file."""
        settings = without_paths(self.arguments)
        settings.pop("inputs", None)
        return {
            "complete": not self.missing(),
            "machine": machine_info(self.device),
            "versions": package_versions(),
            "settings": settings,
            "tasks": self.tasks,
            "results": [asdict(result) for result in self.results],
            "skipped": self.skipped,
        }


def merge(contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Files of results as if one run had written them all.

    Raises:
        UserError: they were not run with the same settings and data, or hold a training twice.
    """
    first = contents[0]
    merged = {**first, "tasks": {}, "results": [], "skipped": []}
    compared = [{k: v for k, v in each["settings"].items() if k not in OWN_SETTINGS} for each in contents]
    for each, settings in zip(contents, compared, strict=True):
        for name in settings:
            if settings[name] != compared[0].get(name):
                raise UserError(
                    f"--inputs: {name} is {compared[0].get(name)} in one file and {settings[name]} in another."
                )
        for name, description in each["tasks"].items():
            if merged["tasks"].setdefault(name, description) != description:
                raise UserError(f"--inputs: the files have other data of {name}: it differs by Python version.")
        merged["results"] += each["results"]
        merged["skipped"] += each["skipped"]
    keys = [(each["task"], each["attention"], each["seed"]) for each in merged["results"]]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--inputs: {key[0]} with {key[1]} (seed {key[2]}) is in more than one file.")
    merged["complete"] = all(each["complete"] for each in contents)
    unions = {
        name: list(dict.fromkeys(x for each in contents for x in each["settings"][name]))
        for name in ("tasks", "attentions")
    }
    limits = [each["settings"]["seconds"] for each in contents]
    merged["settings"] = {**first["settings"], **unions, "seconds": None if None in limits else max(limits)}
    return merged


def read_results(path: str) -> dict[str, Any]:
    """A file of --output.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--inputs: {path} cannot be read ({first_line(error)}).") from error
    if not isinstance(content, dict) or not {"complete", "settings", "tasks", "results", "skipped"} <= set(content):
        raise UserError(f"--inputs: {path} is not a file of this script's --output.")
    return content


# Tables and figure ----------------------------------------------------------------------------------------------------


def by_attention(content: Mapping[str, Any], task: str) -> dict[str, list[Mapping[str, Any]]]:
    """Trainings of a task by attention, the best first and those that diverged last.

    Args:
        content: of `Experiment.report`.
        task: of `TASKS`.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in content["results"]:
        if result["task"] == task:
            groups.setdefault(result["attention"], []).append(result)

    def rank(name: str) -> float:
        metric = mean_metric(groups[name])
        if metric is None:
            return math.inf
        return metric if task == "language" else -metric

    return {name: groups[name] for name in sorted(groups, key=rank)}


def mean_metric(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean over seeds; None where one of them diverged."""
    metrics = [result["metric"] for result in results]
    return None if None in metrics else statistics.fmean(metrics)


def as_metric(task: str, value: float | None) -> str:
    """A metric as it is written."""
    if value is None:
        return "diverged"
    return f"{value:.3f}" if task == "language" else f"{100 * value:.1f} %"


def result_tables(content: Mapping[str, Any]) -> list[Table]:
    """A table for each task, the best attention first."""
    tables = []
    for task in content["tasks"]:
        groups = by_attention(content, task)
        several = max((len(results) for results in groups.values()), default=1) > 1
        table = Table(title=f"{TITLES[task]}: {METRICS[task]} on held-out data")
        table.add_column("attention", no_wrap=True)
        for header in ("memory", "steps", METRICS[task], "± over seeds" if several else "± of the data"):
            table.add_column(header, justify="right")
        for header in ("ms per step", "MiB"):
            table.add_column(header, justify="right")
        for name, results in groups.items():
            metric = mean_metric(results)
            deviation = None
            if metric is not None:
                metrics = [result["metric"] for result in results]
                alone = results[0]["standard_error"]
                deviation = (statistics.stdev(metrics) if len(metrics) > 1 else None) if several else alone
            peak = [result["peak_memory_mib"] for result in results]
            table.add_row(
                name,
                f"{100 * results[0]['memory']:.1f} %",
                " / ".join(str(steps) for steps in dict.fromkeys(result["steps"] for result in results)),
                as_metric(task, metric),
                "-" if deviation is None else as_metric(task, deviation),
                f"{1e3 * statistics.fmean(result['seconds_per_step'] for result in results):.1f}",
                "-" if None in peak else f"{max(peak):.0f}",
            )
        for name, value in content["tasks"][task]["baselines"].items():
            table.add_row(f"({name})", "", "", as_metric(task, value), "", "", "")
        tables.append(table)
    return tables


def notes(content: Mapping[str, Any]) -> list[str]:
    """What was left out, and why."""
    lines = [f"{each['task']}: {each['attention']} left out. {each['reason']}." for each in content["skipped"]]
    for each in content["results"]:
        if each["diverged_at"] is not None:
            lines.append(
                f"{each['task']}: {each['attention']} (seed {each['seed']}) diverged at step {each['diverged_at']}."
            )
    return list(dict.fromkeys(lines))


def draw(content: Mapping[str, Any]) -> Figure:
    """Held-out metric against step, a panel for each task, on an Agg canvas; pyplot is not involved.

    Args:
        content: of `Experiment.report` or `merge`.
    """
    tasks = list(content["tasks"])
    most = max(len(by_attention(content, task)) for task in tasks)
    rows = -(-(most + 2) // LEGEND_COLUMNS)  # and the baselines
    figure = Figure(figsize=(5.6 * len(tasks), 3.6 + 0.17 * rows), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        draw_task(axes, content, task)
    return figure


def draw_task(axes: Axes, content: Mapping[str, Any], task: str) -> None:
    """Curves of all attentions, means over seeds with their range; baselines dashed."""
    scale = 1 if task == "language" else 100
    for name, results in by_attention(content, task).items():
        curves = [{point["step"]: scale * point["metric"] for point in result["curve"]} for result in results]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        colour = ATTENTION_COLOURS[name]
        options = {"color": colour, "linewidth": 2.2 if name == "full" else 1.4}
        label = f"{name}: {as_metric(task, mean_metric(results))}"
        axes.plot(steps, [statistics.fmean(each) for each in values], label=label, **options)
        if len(curves) > 1:
            low, high = [min(each) for each in values], [max(each) for each in values]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        if mean_metric(results) is None and steps:
            axes.plot(steps[-1], statistics.fmean(values[-1]), "x", color=colour)
    lines = ((0, (5, 3)), (0, (1, 2)))
    for (name, value), line in zip(content["tasks"][task]["baselines"].items(), lines, strict=True):
        label = f"{name}: {as_metric(task, value)}"
        axes.axhline(scale * value, color=FAINT, linewidth=1, linestyle=line, label=label, zorder=0)
    unit = "" if task == "language" else " in %"
    axes.set(xlabel="step", ylabel=f"{METRICS[task]}{unit}, held out", title=TITLES[task])
    style(axes)
    place = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.13)}  # below: curves are everywhere above
    axes.legend(fontsize=7, frameon=False, labelcolor=INK, ncols=LEGEND_COLUMNS, **place)


def measure(arguments: argparse.Namespace) -> int:
    """Train, or put files together; print, write and draw. Returns the exit status."""
    check_writable(arguments.output)
    check_figure(arguments.figure)
    if arguments.inputs:
        return conclude(arguments, merge([read_results(path) for path in arguments.inputs]), [])
    experiment = Experiment(arguments)
    return saved_until_stopped(
        experiment.run,
        experiment.report,
        arguments.output,
        lambda: conclude(arguments, experiment.report(), experiment.missing()),
    )


def conclude(arguments: argparse.Namespace, content: Mapping[str, Any], missing: Sequence[str]) -> int:
    """Print what is complete and write the files; returns the exit status."""
    if not content["results"] and missing:
        print("Interrupted. Nothing was written.", file=sys.stderr)
        return 1
    if not content["results"]:
        raise UserError(f"No training came to its end. {notes(content)[0]}" if notes(content) else "No results.")
    console = Console(width=120)
    for table in result_tables(content):
        console.print(table, "")
    for line in notes(content):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if arguments.output is not None:
        write_json(arguments.output, content)
    if arguments.figure is not None:
        save_figure(draw(content), arguments.figure)
    if missing:
        print(f"Interrupted. Missing: {', '.join(missing)}.", file=sys.stderr)
    return 1 if missing else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trainings that `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), measure, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
