"""The data module of sequences: data in the memory of the device, batches gathered there by index."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch

from scatterbrain.errors import UserError, check_switch, check_whole_number, did_you_mean
from src.datamodules.sampling import derive_seed, spread
from src.datamodules.sequences.base import PARTS, SequenceData, TextData

# What a result is called, and whether more of it is better.
METRICS = {"accuracy": True, "bits_per_byte": False, "perplexity": False}
# Tokens (B, T) int64, lengths (B,) int64 or None, targets (B,) or (B, T) int64.
Batch = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]


class SequenceDataModule(pl.LightningDataModule):
    """Batches of a data source, as `(tokens, lengths, targets)` on the trainer's device.

    The data is copied to the device once, if it takes at most half of the free memory there; else batches are gathered
    on the CPU and copied. What each step takes depends on the seed and the number of the step alone.

    Args:
        read: the data source, see `src.datamodules.sequences.base`.
        length: most tokens T of a sequence; of a text, those of a window.
        vocabulary: number of different tokens.
        num_classes: number of classes; of tokens where tokens are predicted.
        causal: whether a token may not see those after it.
        metric: what results are compared by, a key of `METRICS`.
        batch_size: sequences of a training step.
        eval_batch_size: sequences of an evaluation step.
        validation_samples: most sequences of the validation part in an evaluation, spread evenly; None for all.
        eval_windows: most windows of a text in an evaluation, spread evenly; None for all, side by side.
        steps: of the training.
        eval_steps: steps between two evaluations.
        seed: of the order.
        baselines: by their names, functions `(train, held_out) -> value` of the metric, to compare with.

    Raises:
        UserError: an invalid value; the message names the option.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, SequenceData] | TextData],
        length: int,
        vocabulary: int,
        num_classes: int,
        causal: bool = False,
        metric: str = "accuracy",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        validation_samples: int | None = 1024,
        eval_windows: int | None = 256,
        steps: int = 1,
        eval_steps: int = 1,
        seed: int = 0,
        baselines: Mapping[str, Callable[..., float]] | None = None,
    ) -> None:
        super().__init__()
        numbers = {"length": length, "vocabulary": vocabulary, "num_classes": num_classes, "batch_size": batch_size}
        numbers["eval_batch_size"] = eval_batch_size
        limits = {"validation_samples": validation_samples, "eval_windows": eval_windows}
        numbers |= {name: number for name, number in limits.items() if number is not None}
        for name, value in numbers.items():
            check_whole_number(f"datamodule.{name}", value, 1)
        check_switch("datamodule.causal", causal)
        if metric not in METRICS:
            raise UserError(f"datamodule.metric={metric} is unknown. {did_you_mean(str(metric), METRICS)}")
        self.length, self.vocabulary, self.num_classes, self.causal = length, vocabulary, num_classes, causal
        self.metric, self.batch_size, self.eval_batch_size = metric, batch_size, eval_batch_size
        self.steps, self.eval_steps, self.seed = steps, eval_steps, seed
        self._read, self._baselines = read, dict(baselines or {})
        self._validation_samples, self._eval_windows = validation_samples, eval_windows
        self._parts: dict[str, SequenceData | torch.Tensor] = {}
        self._placed: dict[str, tuple[torch.Tensor | None, ...]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the data, once.

        Raises:
            UserError: the data does not fit the options, or from the source.
        """
        if self._parts:
            return
        data = self._read()
        if isinstance(data, TextData):
            self._parts = {name: getattr(data, name) for name in PARTS}
            for name, text in self._parts.items():
                if len(text) <= self.length:
                    raise UserError(
                        f"The text for {name} has {len(text):,} bytes, too few for a window of datamodule.length="
                        f"{self.length}. Lower it, or give more text."
                    )
            return
        for name in PARTS:
            self._check(name, data[name])
        self._parts = {name: data[name] for name in PARTS}

    def _check(self, name: str, part: SequenceData) -> None:
        """Refuse sequences that the options do not describe."""
        if not len(part):
            raise UserError(f"There are no sequences for {name}. Check datamodule.read.")
        longest = part.tokens.shape[1]
        if longest > self.length:
            raise UserError(f"Sequences for {name} have {longest} tokens. Give datamodule.length={longest} or more.")
        for what, value, most in (
            ("vocabulary", int(part.tokens.max()), self.vocabulary),
            ("num_classes", int(part.targets.max()), self.num_classes),
        ):
            if value >= most:
                raise UserError(
                    f"datamodule.{what}={most}, but the part for {name} has the number {value}. Give at least "
                    f"{value + 1}."
                )

    @property
    def each_token(self) -> bool:
        """Whether each token has a target, and not each sequence."""
        part = self._parts["train"]
        return isinstance(part, torch.Tensor) or part.targets.ndim == 2

    def describe(self) -> dict[str, Any]:
        """Sizes of the parts, baselines on the test part, and a digest that another training has to share."""
        train, test = self._parts["train"], self._parts["test"]
        digest = hashlib.sha256()
        for part in self._parts.values():
            tensors = (part,) if isinstance(part, torch.Tensor) else (part.tokens, part.targets, part.lengths)
            for tensor in tensors:
                if tensor is not None:
                    digest.update(str(tuple(tensor.shape)).encode())
                    digest.update(tensor.contiguous().view(torch.uint8).numpy())
        baselines = {name: function(train, test) for name, function in self._baselines.items()}
        if not self.each_token:
            majority = torch.bincount(train.targets.long()).argmax()
            baselines = {"majority class": (test.targets == majority).double().mean().item(), **baselines}
        sizes = {f"num_{name}": len(part) for name, part in self._parts.items()}
        return {
            **sizes,
            "unit": "bytes" if isinstance(train, torch.Tensor) else "sequences",
            "baselines": baselines,
        } | {"sha256": digest.hexdigest()}

    def teardown(self, stage: str | None = None) -> None:
        """Free the device's memory, which the next run of a multirun needs."""
        self._placed.clear()

    # Batches

    def train_dataloader(self) -> Batches:
        """The batches from the trainer's current step to the next evaluation."""
        self.setup("fit")
        done = self.trainer.global_step if self.trainer else 0
        first = done // self.eval_steps * self.eval_steps
        last = min(first + self.eval_steps, self.steps)
        order = self._order(done, last)
        return Batches(lambda number: self._gather("train", order[number]), len(order), last - first)

    def val_dataloader(self) -> Batches:
        """The validation part, or samples of it, in order."""
        return self._evaluation_batches("validation")

    def test_dataloader(self) -> Batches:
        """The test part, or samples of it, in order."""
        return self._evaluation_batches("test")

    def num_evaluated(self, name: str) -> int:
        """Number of sequences or windows that a part is evaluated on, `"validation"` or `"test"`."""
        every, most = self._num_samples(name), self._validation_samples if name == "validation" else None
        if isinstance(self._parts[name], torch.Tensor):
            most = self._eval_windows
        return every if most is None else min(most, every)

    def _num_samples(self, name: str) -> int:
        part = self._parts[name]
        return (len(part) - 1) // self.length if isinstance(part, torch.Tensor) else len(part)

    def _evaluation_batches(self, name: str) -> Batches:
        self.setup("test")
        index = torch.tensor(spread(self._num_samples(name), self.num_evaluated(name)))
        if isinstance(self._parts[name], torch.Tensor):
            index = index * self.length
        parts = index.to(self._index_device(name)).split(self.eval_batch_size)
        return Batches(lambda number: self._gather(name, parts[number]), len(parts), len(parts))

    def _order(self, first: int, last: int) -> torch.Tensor:
        """What the steps from `first` to `last` take: positions (steps, B), of sequences or of windows' first bytes."""
        part, size = self._parts["train"], self.batch_size
        if isinstance(part, torch.Tensor):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, 0))
            # those of earlier steps are drawn again, since a generator cannot skip them
            order = torch.randint(len(part) - self.length, (last * size,), generator=generator)[first * size :]
        else:
            # permutations of all sequences, one after the other
            passes = range(first * size // len(part), (last * size - 1) // len(part) + 1)
            generators = (torch.Generator().manual_seed(derive_seed(self.seed, number)) for number in passes)
            order = torch.cat([torch.randperm(len(part), generator=generator) for generator in generators])
            start = first * size - passes[0] * len(part)
            order = order[start : start + (last - first) * size]
        return order.view(-1, size).to(self._index_device("train"))

    def _index_device(self, name: str) -> torch.device:
        return self._place(name)[0].device

    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _place(self, name: str) -> tuple[torch.Tensor | None, ...]:
        """The tensors of a part where batches are gathered."""
        if name not in self._placed:
            part, device = self._parts[name], self._device()
            tensors = (part,) if isinstance(part, torch.Tensor) else (part.tokens, part.lengths, part.targets)
            size = sum(x.numel() * x.element_size() for x in tensors if x is not None)
            if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] / 2:
                tensors = tuple(None if x is None else x.to(device) for x in tensors)
            self._placed[name] = tensors
        return self._placed[name]

    def _gather(self, name: str, index: torch.Tensor) -> Batch:
        tensors = self._place(name)
        if len(tensors) == 1:
            windows = tensors[0][index[:, None] + torch.arange(self.length + 1, device=index.device)]
            batch = (windows[:, :-1], None, windows[:, 1:])
        else:
            batch = tuple(None if x is None else x[index] for x in tensors)
        device = self._device()
        if device.type == "cuda" and index.device.type == "cpu":
            batch = tuple(None if x is None else x.pin_memory().to(device, non_blocking=True) for x in batch)
        return tuple(None if x is None else x.long() for x in batch)


class Batches:
    """Batches made one by one, in the thread of the training: they cost no more than an indexing.

    Args:
        make: from a number, from 0 on, to its batch.
        number: number of batches.
        length: number of batches of a whole epoch, those before the current one included.
    """

    def __init__(self, make: Callable[[int], Batch], number: int, length: int) -> None:
        self._make, self._number, self._length = make, number, length

    def __iter__(self) -> Iterator[Batch]:
        return map(self._make, range(self._number))

    def __len__(self) -> int:
        return self._length
