r"""Bits per byte of a trained language model, with other attentions in place of its own, and after a short fine-tune.

CHECKPOINT is last.ckpt of `python run.py experiment=language-books`. Each of --attentions gets the trained
weights as they are, and then as many --steps of training as the network's own attention, if it is among them.

    python experiments/language/convert.py CHECKPOINT --attentions full,local,sblocal,sbcluster --steps 200 \
        --wikitext data/wikitext-2 --output conversion.json
    python experiments/language/compare.py conversion.json
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # src is not installed: find it from any folder

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

from experiments.language.compare import check_seeds, grouped, mean_cell
from scatterbrain.attention import attention_memory, create_attention
from scatterbrain.errors import UserError
from src.analysis.benchmark.report import header
from src.analysis.tools import (
    Parser,
    Run,
    choose_device,
    new_table,
    not_negative,
    positive,
    positive_number,
    result_file,
    run_tool,
)
from src.datamodules.sampling import spread
from src.datamodules.sequences.base import TextData
from src.datamodules.sequences.books import read_text_files, read_wikitext
from src.models.sequence_network import Network, create_network
from src.tasks.classification_training import CHECKPOINT_KEY
from src.tasks.device_time import seconds_now
from src.tasks.optimization import warmup_and_decay
from src.tasks.sequence_training import sample_scores, summarise
from src.tasks.training_checkpoints import read_training_checkpoint
from src.utils.files import atomic_write

WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 1.0


class Conversion(Run):
    """Bits per byte of trained networks, of the same weights with other attentions, and after a fine-tune.

    A row of `results` is a network at a stage: `attention` and `seed` it was trained with, `method` it has now, its
    `sizes` and `memory`, `bits_per_byte` and `standard_error` by text, and of a fine-tune `steps`, `lr`, `train_loss`
    and `seconds`.
    """

    OTHERS: tuple[str, ...] = ()  # attentions that are measured beside those of the options

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, choose_device(arguments.device)
        self.results: list[dict[str, Any]] = []
        if arguments.save_tensors is not None and len(arguments.checkpoints) > 1:
            raise UserError("--save-tensors writes the tensors of one network. Give one checkpoint.")
        self.texts = read_texts(arguments.books, arguments.wikitext)
        self.checkpoints = [(path, read_network(path)) for path in arguments.checkpoints]
        lengths = {options["length"] for _, (options, *_) in self.checkpoints}
        if len(lengths) > 1 or min(map(len, self.texts.values())) <= max(lengths):
            raise UserError(
                f"Networks of lengths {', '.join(map(str, sorted(lengths)))} on texts of at least "
                f"{min(map(len, self.texts.values())):,} bytes. Give networks of one length, and longer texts."
            )
        self.length = lengths.pop()
        check_seeds([trained for _, (*_, trained) in self.checkpoints], "the checkpoints")
        for method in (*arguments.attentions, *self.OTHERS):  # what cannot be causal, before anything slow
            create_attention(method, self.length, memory_fraction=arguments.memory_fraction, causal=True)
        self.missing = [str(path) for path in arguments.checkpoints]

    def run(self, console: Console, save: Any) -> None:
        """Convert one network after the other."""
        for path, (options, state, trained) in self.checkpoints:
            own = options["attention"]["name"]
            console.log(f"{path}: {own}")
            network = build_network(options, state, self.device)
            self.measure(network, trained, own, "trained")
            if self.arguments.save_tensors is not None:
                tokens, _ = self.windows(self.texts["test"], torch.zeros(1, dtype=torch.long))
                with self.autocast():
                    save_tensors(self.arguments.save_tensors, network, tokens)
            for method in self.arguments.attentions:
                if method == own:  # which keeps its sizes and its random features
                    network = build_network(options, state, self.device)
                else:
                    changes = {"value_weight": self.arguments.value_weight} if method == "sbcluster" else {}
                    network = self.swapped(options, state, method, **changes)
                    self.measure(network, trained, method, "swapped")
                if self.arguments.steps:
                    record = self.fine_tune(network)
                    self.measure(network, trained, method, "fine-tuned", record)
                save()
            self.missing.remove(str(path))
            save()

    def swapped(
        self, options: Mapping[str, Any], state: Mapping[str, torch.Tensor], method: str, **changes: Any
    ) -> Network:
        """The network of a checkpoint with another attention; `changes` are its `seed` and options of the attention."""
        seed = changes.pop("seed", options["seed"])
        changed = {"attention": {"name": method, **changes}, "memory_fraction": self.arguments.memory_fraction}
        return build_network({**options, **changed, "seed": seed}, without_attentions(state), self.device)

    def autocast(self) -> torch.autocast:
        """bfloat16 on CUDA."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def measure(
        self,
        network: Network,
        trained: Mapping[str, Any],
        method: str,
        stage: str,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the row of a network."""
        network.eval()
        bits, errors = {}, {}
        for name, text in self.texts.items():
            if name == "train":
                continue
            number = (len(text) - 1) // self.length
            kept = min(number, self.arguments.windows)
            scores = []
            with torch.no_grad(), self.autocast():
                for starts in np.array_split(np.array(spread(number, kept)), -(-kept // self.arguments.batch_size)):
                    tokens, targets = self.windows(text, torch.from_numpy(starts) * self.length)
                    scores.append(sample_scores(network(tokens), targets))
            summary = summarise(scores, "bits_per_byte")
            bits[name], errors[name] = summary["bits_per_byte"], summary["standard_error"]
            if not math.isfinite(bits[name]):
                raise UserError(f"{method} ({stage}) has {bits[name]} bits per byte on {name}. Lower --lr.")
        attention = network.blocks[0].attention
        sizes = {"sizes": attention.sizes(), "memory": attention_memory(attention, self.length)}
        self.results.append(
            {**trained, "method": method, "stage": stage, **sizes, **(record or {})}
            | {"bits_per_byte": bits, "standard_error": errors}
        )

    def windows(self, text: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N) and the next ones."""
        windows = text[starts[:, None] + torch.arange(self.length + 1)].to(self.device).long()
        return windows[:, :-1], windows[:, 1:]

    def fine_tune(self, network: Network) -> dict[str, Any]:
        """Train a network on; the options of it, its mean loss (nats) in the last tenth, and seconds."""
        arguments, steps = self.arguments, self.arguments.steps
        network.train()
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=arguments.lr, weight_decay=WEIGHT_DECAY, fused=self.device.type == "cuda" or None
        )
        factor = warmup_and_decay(steps, 0.1)
        generator = torch.Generator().manual_seed(arguments.seed)
        train = self.texts["train"]
        losses = torch.zeros(steps, device=self.device)
        since = seconds_now(self.device)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * factor(step + 1)
            starts = torch.randint(len(train) - self.length, (arguments.batch_size,), generator=generator)
            tokens, targets = self.windows(train, starts)
            with self.autocast():
                logits = network(tokens)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            losses[step] = loss.detach()
        if not losses.isfinite().all():
            raise UserError(f"The loss became {losses[~losses.isfinite()][0].item()} in the fine-tune. Lower --lr.")
        return {
            "steps": steps,
            "lr": arguments.lr,
            "train_loss": losses[steps * 9 // 10 :].mean().item(),
            "seconds": seconds_now(self.device) - since,
        }

    # What is printed and stored

    def report(self) -> dict[str, Any]:
        """What is complete, for JSON."""
        content = header(self.arguments, self.device, "books", "wikitext", "checkpoints", "save_tensors")
        return {"complete": not self.missing, **content, "length": self.length, "results": self.results}

    def tables(self) -> Iterator[Table]:
        """A table of the bits per byte, means over the networks that were trained with the same attention."""
        names = [name for name in self.texts if name != "train"]
        table = new_table("bits per byte", ("trained with", "attention", "stage", *names), left=("attention", "stage"))
        for key, rows in grouped(self.results).items():
            values = [mean_cell([row["bits_per_byte"][name] for row in rows]) for name in names]
            table.add_row(*key, *values)
        yield table

    def notes(self) -> list[str]:
        """Lines below the table."""
        return []


def read_texts(books: str | Path, wikitext: str | Path | None) -> dict[str, torch.Tensor]:
    """The texts by name: `train` and those of `TEXTS`, WikiText-2 where its folder is given."""
    data: TextData = read_text_files(books)
    texts = {"train": data.train, "validation": data.validation, "test": data.test}
    if wikitext is not None:
        texts |= {f"WikiText-2 {name}": text for name, text in read_wikitext(wikitext).items()}
    return texts


def read_network(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """Options of the network of a checkpoint, its weights, and how it was trained.

    Raises:
        UserError: it is no checkpoint of a language model.
    """
    checkpoint = read_training_checkpoint(path)
    config = checkpoint[CHECKPOINT_KEY].get("config", {})
    options = dict(config.get("model") or {})
    if options.pop("pool", None) != "none" or not options.get("causal"):
        raise UserError(f"{path} is no checkpoint of a language model. Give one of experiment=language-books.")
    options.pop("_target_", None)
    state = {name.removeprefix("model."): weight for name, weight in checkpoint["state_dict"].items()}
    trained = {"attention": options["attention"]["name"], "seed": config["seed"]}
    return {**options, "pool": "none"}, state, {**trained, "trained_steps": checkpoint["global_step"]}


def without_attentions(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights without the random features of attentions."""
    return {name: weight for name, weight in state.items() if ".attention." not in name}


def build_network(options: Mapping[str, Any], state: Mapping[str, torch.Tensor], device: torch.device) -> Network:
    """The network of options of `create_network`, with the weights; random features that these lack are of its seed.

    Raises:
        UserError: the weights are of another network.
    """
    network = create_network(**options)
    missing, unexpected = network.load_state_dict(state, strict=False)
    if unexpected or without_attentions(dict.fromkeys(missing)):
        raise UserError(f"The weights do not fit the network: {', '.join([*missing, *unexpected])}.")
    return network.to(device)


@torch.no_grad()
def save_tensors(path: Path, network: Network, tokens: torch.Tensor) -> None:
    """Write what every block's attention gets, rotated where positions are rotary, for tokens (1, N).

    Queries, keys and values of a layer are `q<layer>`, `k<layer>` and `v<layer>`, (1, N, H, E) float16.
    """
    arrays: dict[str, np.ndarray] = {}
    hooks = []

    def record(layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            for name, tensor in zip("qkv", inputs, strict=False):
                arrays[f"{name}{layer}"] = tensor.half().cpu().numpy()

        return hook

    for layer, block in enumerate(network.blocks):
        hooks.append(block.attention.register_forward_pre_hook(record(layer)))
    try:
        network.eval()(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    with atomic_write(path, "wb") as file:
        np.savez(file, **arrays)


def add_inputs(parser: Parser) -> None:
    """Add the options that name checkpoints and texts, and how much of these is evaluated."""
    add = parser.add_argument
    add("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="of networks of one length")
    add("--books", default="data/books", metavar="DIR", help="of the texts (%(default)s)")
    add("--wikitext", metavar="DIR", help="folder of valid.txt and test.txt of WikiText-2, to evaluate on")
    add("--windows", type=positive, default=128, metavar="K", help="of a text, spread evenly (%(default)s)")
    add("--batch-size", type=positive, default=16, metavar="B", help="windows at a time (%(default)s)")


def build_parser() -> Parser:
    parser = Parser(
        __doc__, "attentions", "memory-fraction", "output", "device", attentions="full,local,sblocal,sbcluster"
    )
    parser.set_defaults(memory_fraction=1 / 8, figure=None)
    add_inputs(parser)
    add = parser.add_argument
    add("--steps", type=not_negative, default=0, metavar="N", help="of the fine-tune (0: none)")
    add("--lr", type=positive_number, default=1e-4, metavar="LR", help="highest learning rate (%(default)s)")
    add("--value-weight", type=float, default=0.0, metavar="W", help="option of sbcluster (%(default)s)")
    add("--seed", type=not_negative, default=0, metavar="S", help="of the order of the text (%(default)s)")
    add(
        "--save-tensors",
        type=result_file,
        metavar="FILE",
        help="write queries, keys and values, .npz, for causal_error",
    )
    return parser


main = partial(run_tool, build_parser, lambda arguments: Conversion(arguments).main())

if __name__ == "__main__":
    sys.exit(main())
