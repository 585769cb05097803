"""A language model of bytes and ListOps, trained from scratch with each attention: `scripts/experiment_training.py`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import statistics
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from timm.layers import Mlp
from torch import nn

from scatterbrain.attention import attention_memory, create_attention
from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.ops.common.budget import budget_columns
from src.analysis.experiments.listops import (
    CLASS,
    NUM_CLASSES,
    VOCABULARY,
    Expressions,
    draw_expressions,
    first_operator_accuracy,
    majority_accuracy,
)
from src.analysis.plots.style import COLOURS, DOTTED, FAINT, LEGEND, new_figure, style
from src.analysis.records import read_rows, write_rows
from src.analysis.tools import (
    check_figure,
    check_writable,
    choose_device,
    first_line,
    new_table,
    save_figure,
    saved_until_stopped,
    say,
    without_paths,
)
from src.distributed.launch import MAX_SEED
from src.tasks.provenance import package_versions, seconds_now
from src.utils.console import progress_display
from src.utils.machine import machine_info

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
# Tasks ----------------------------------------------------------------------------------------------------------------


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
        """What the metric is the mean of, for each sample (B,)."""

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
    """The data of a task, samples of at most `length` tokens; `num_expressions` of ListOps are to train on.

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
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; the attention is over (B, N, H, dim / H)."""

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
        vocabulary: number of different tokens.
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
        """Logits (B, N, classes) for each of the tokens (B, N), or (B, classes); behind `lengths` (B,) is padding."""
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, lengths)
        return self.head(self.norm(x if self.each_token else x[:, 0]))


# Training -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained, whatever its attention: options of the script."""

    steps: int = 1500
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
        """Refuse values out of range.

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
        sizes: of the attention.
        memory: over that of the full matrix.
        steps: of the training.
        diverged_at: the first step whose loss is not finite; None where there is none. The training ends there.
        curve: `step`, `metric` on held-out data and mean `train_loss` (nats) since the point before.
        metric: the last one; None where there is none.
        standard_error: of the metric, over the held-out samples of one seed.
        seconds_per_step: without evaluations, and without the first passes, which compile and change no weight.
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
    """The training of one network; the seed is that of weights, batches and features.

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
        """Do one update without synchronising: the loss stays on the device."""
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
        """Train to the end; `advance` is called with the number of steps done."""
        recipe, device = self.recipe, self.device
        on_cuda = device.type == "cuda"
        self.backward(self.order[0])  # compiles
        self.optimizer.zero_grad()
        self.held_out_scores(0)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(device)
        curve: list[dict[str, float]] = []
        metric = error = diverged_at = None
        peak, spent, done = 0, 0.0, 0
        since = seconds_now(device)
        while done < recipe.steps and diverged_at is None:
            self.step(done, (done + 1) / recipe.steps)
            done += 1
            advance(1)
            if done % recipe.eval_every and done < recipe.steps:
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
            peak_memory_mib=peak / 2**20 if on_cuda else None,
        )


class Experiment:
    """All trainings of a run of the script with these options.

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
        return {
            "complete": not self.missing(),
            "machine": machine_info(self.device),
            "versions": package_versions(),
            "settings": without_paths(self.arguments),
            "tasks": self.tasks,
            "results": [asdict(result) for result in self.results],
            "skipped": self.skipped,
        }


def read_results(path: str | Path) -> dict[str, Any]:
    """What `--output` holds.

    Raises:
        UserError: it cannot be read, or is something else.
    """
    return read_rows(path, ("settings", "tasks", "results", "skipped"), "Give the --output of a run.")


# Tables and figure ----------------------------------------------------------------------------------------------------


def by_attention(content: Mapping[str, Any], task: str) -> dict[str, list[Mapping[str, Any]]]:
    """Trainings of a task by attention, the best first and those that diverged last."""
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
    """A metric as text."""
    if value is None:
        return "diverged"
    return f"{value:.3f}" if task == "language" else f"{100 * value:.1f} %"


def result_tables(content: Mapping[str, Any]) -> list[Table]:
    """A table for each task, the best attention first."""
    tables = []
    for task in content["tasks"]:
        groups = by_attention(content, task)
        several = max((len(results) for results in groups.values()), default=1) > 1
        headers = (
            "memory",
            "steps",
            METRICS[task],
            "± over seeds" if several else "± of the data",
            "ms per step",
            "MiB",
        )
        title = f"{TITLES[task]}: {METRICS[task]} on held-out data"
        table = new_table(title, ("attention", *headers), ("attention",))
        for name, results in groups.items():
            metric, error = mean_metric(results), None
            if metric is not None and several:
                error = statistics.stdev(result["metric"] for result in results) if len(results) > 1 else None
            elif metric is not None:
                error = results[0]["standard_error"]
            peak = [result["peak_memory_mib"] for result in results]
            table.add_row(
                name,
                f"{100 * results[0]['memory']:.1f} %",
                " / ".join(str(steps) for steps in dict.fromkeys(result["steps"] for result in results)),
                as_metric(task, metric),
                "-" if error is None else as_metric(task, error),
                f"{1e3 * statistics.fmean(result['seconds_per_step'] for result in results):.1f}",
                "-" if None in peak else f"{max(peak):.0f}",
            )
        for name, value in content["tasks"][task]["baselines"].items():
            table.add_row(f"({name})", "", "", as_metric(task, value), "", "", "")
        tables.append(table)
    return tables


def notes(content: Mapping[str, Any]) -> list[str]:
    """Lines on what was left out or diverged, and why."""
    lines = [f"{each['task']}: {each['attention']} left out. {each['reason']}." for each in content["skipped"]]
    for each in content["results"]:
        if each["diverged_at"] is not None:
            lines.append(
                f"{each['task']}: {each['attention']} (seed {each['seed']}) diverged at step {each['diverged_at']}."
            )
    return list(dict.fromkeys(lines))


def draw(content: Mapping[str, Any]) -> Figure:
    """Held-out metric against step, a panel for each task, of `Experiment.report`."""
    tasks = list(content["tasks"])
    most = max(len(by_attention(content, task)) for task in tasks)
    rows = -(-(most + 2) // LEGEND_COLUMNS)  # and the baselines
    figure = new_figure(5.6 * len(tasks), 3.6 + 0.17 * rows)
    for task, axes in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        draw_task(axes, content, task)
    return figure


def draw_task(axes: Axes, content: Mapping[str, Any], task: str) -> None:
    """Draw the curves of all attentions, means over seeds with their range; baselines dashed."""
    scale = 1 if task == "language" else 100
    for name, results in by_attention(content, task).items():
        curves = [{point["step"]: scale * point["metric"] for point in result["curve"]} for result in results]
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        colour = COLOURS[name]
        options = {"color": colour, "linewidth": 2.2 if name == "full" else 1.4}
        label = f"{name}: {as_metric(task, mean_metric(results))}"
        axes.plot(steps, [statistics.fmean(each) for each in values], label=label, **options)
        if len(curves) > 1:
            low, high = [min(each) for each in values], [max(each) for each in values]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        if mean_metric(results) is None and steps:
            axes.plot(steps[-1], statistics.fmean(values[-1]), "x", color=colour)
    lines = ((0, (5, 3)), DOTTED)
    for (name, value), line in zip(content["tasks"][task]["baselines"].items(), lines, strict=True):
        label = f"{name}: {as_metric(task, value)}"
        axes.axhline(scale * value, color=FAINT, linewidth=1, linestyle=line, label=label, zorder=0)
    unit = "" if task == "language" else " in %"
    axes.set(xlabel="step", ylabel=f"{METRICS[task]}{unit}, held out", title=TITLES[task])
    style(axes)
    place = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.13)}  # below: curves are everywhere above
    axes.legend(**LEGEND | {"fontsize": 7, "ncols": LEGEND_COLUMNS} | place)


def run(arguments: argparse.Namespace) -> int:
    """Train, print, write and draw what the options of `scripts/experiment_training.py` name; the exit status."""
    check_writable(arguments.output)
    check_figure(arguments.figure)
    experiment = Experiment(arguments)
    return saved_until_stopped(
        experiment.run, experiment.report, arguments.output, lambda: conclude(arguments, experiment)
    )


def conclude(arguments: argparse.Namespace, experiment: Experiment) -> int:
    """Print what is complete and write the files; the exit status."""
    content, missing = experiment.report(), experiment.missing()
    if not content["results"] and missing:
        print("Interrupted. Nothing was written.", file=sys.stderr)
        return 1
    if not content["results"]:
        raise UserError(f"No training was completed. {notes(content)[0]}")
    console = Console(width=120)
    for table in result_tables(content):
        console.print(table, "")
    for line in notes(content):
        say(line)
    if arguments.output is not None:
        write_rows(arguments.output, content)
    if arguments.figure is not None:
        save_figure(draw(content), arguments.figure)
    if missing:
        print(f"Interrupted. Missing: {', '.join(missing)}.", file=sys.stderr)
    return 1 if missing else 0
