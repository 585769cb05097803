"""Training of the sequence network from scratch, with any attention, and its results."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from scatterbrain.attention import attention_memory, create_attention
from src.datamodules.sequence_tasks import Task
from src.models.sequence_network import Network
from src.tasks.device_time import seconds_now

EVALUATION_BATCHES = 4  # training batches that an evaluation takes at a time
WARM_UP = 1 / 20  # of the training, in which the learning rate rises
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0


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


@dataclass
class Result:
    """A training; without first passes, which compile, and evaluations in its seconds and memory."""

    task: str
    attention: str
    seed: int  # of weights, batches and features
    sizes: dict[str, int]  # of the attention
    memory: float  # over that of full attention's matrix
    steps: int
    diverged_at: int | None  # the first step whose loss is not finite, with which the training ends
    curve: list[dict[str, float]]  # step, metric on held-out data, mean train_loss (nats) since the point before
    metric: float | None  # the last one
    standard_error: float | None  # of the metric, over held-out samples
    seconds_per_step: float
    peak_memory_mib: float | None  # of the device, data and all; None on the CPU


def create_network(task: Task, attention: str, recipe: Recipe, seed: int) -> Network:
    """The network of an attention; each block has its own seed. `UserError` where the attention cannot do the task."""
    # one that has no such option is not refused where it is not needed
    options = {"memory_fraction": recipe.memory_fraction, "causal": True if task.causal else None}
    length, dim, heads = recipe.length, recipe.dim, recipe.heads
    seeds = range(seed, seed + recipe.depth)
    attentions = [create_attention(attention, length, dim // heads, seed=each, **options) for each in seeds]
    return Network(attentions, task.vocabulary, task.num_outputs, length, dim, heads, task.causal, seed)


def learning_rate(progress: float, highest: float) -> float:
    """Learning rate after a part of the training in [0, 1]: linear warm-up to `highest`, then half a cosine to zero."""
    if progress < WARM_UP:
        return highest * progress / WARM_UP
    return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


class Training:
    """The training of one network; the seed is that of weights, batches and features."""

    def __init__(self, task: Task, attention: str, recipe: Recipe, seed: int, device: torch.device) -> None:
        self.task, self.attention, self.recipe, self.seed, self.device = task, attention, recipe, seed, device
        self.network = create_network(task, attention, recipe, seed).to(device).train()
        self.order = task.draw_order(recipe.steps, recipe.batch_size, seed)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.lr, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda" or None
        )
        self.losses = torch.zeros(recipe.steps, device=device)

    def autocast(self) -> torch.autocast:
        """Context of the recipe's precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

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
        nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRAD_NORM)
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
            finite = losses.isfinite()
            metric, error = self.evaluate() if finite.all() else (math.nan, None)
            if math.isfinite(metric):
                curve.append({"step": done, "metric": metric, "train_loss": losses.mean().item()})
            else:
                metric = error = None
                diverged_at = done if finite.all() else first + int((~finite).int().argmax()) + 1
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
