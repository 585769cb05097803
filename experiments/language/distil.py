r"""Learned features of performer and sblocal in a trained language model, against as many random ones.

CHECKPOINT is last.ckpt of `python run.py experiment=language-books model/attention=full`. Layer by layer, feature maps
are trained on queries and keys of the training text, until the weights match full attention's (Zhang et al., ICLR
2024); nothing else is. Errors are those of each layer's output on the test text.

    python experiments/language/distil.py CHECKPOINT --wikitext data/wikitext-2 --output learned_features.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # src is not installed: find it from any folder

import torch
from rich.console import Console
from rich.table import Table

from experiments.language.compare import grouped
from experiments.language.convert import Conversion, add_inputs, build_network
from scatterbrain.attention.base import AttentionModule
from scatterbrain.errors import UserError, check_whole_number
from src.analysis.approximation import mean_and_std, plus_minus, relative_error
from src.analysis.experiments.distillation import FEATURES, LEARNERS, OTHERS
from src.analysis.tools import Parser, new_table, positive, positive_number, run_tool
from src.datamodules.sampling import spread
from src.models.attention_inputs import StageInputs, capture_calls
from src.models.sequence_network import Network
from src.tasks.distillation import distil_features, start_from_keys
from src.tasks.options import MAX_SEED
from src.utils.progress import progress_display


class Distillation(Conversion):
    """Bits per byte, and errors of the layers, of trained networks with random and with learned features.

    Rows are those of `Conversion`: `stage` is `trained`, `swapped` of attentions without features, or one of
    `FEATURES`. They also have `features_seed`, None without features; the relative `errors` of each layer's output; and
    where they are learned, `divergences`, mean loss of each layer in the last tenth of its steps, in nats.
    """

    OTHERS = OTHERS

    def __init__(self, arguments: argparse.Namespace) -> None:
        check_whole_number("--seed", arguments.seed, 0, MAX_SEED - arguments.num_seeds)
        for method in arguments.attentions:
            if method not in LEARNERS:
                raise UserError(f"Attention {method} has no features to learn. Choose {' or '.join(LEARNERS)}.")
        super().__init__(arguments)
        for path, (*_, trained) in self.checkpoints:
            if trained["attention"] != "full":
                raise UserError(
                    f"{path} was trained with {trained['attention']}, and features are learned from full attention. "
                    "Give one of model/attention=full."
                )
        depths = {options["depth"] for _, (options, *_) in self.checkpoints}
        if len(depths) > 1:
            raise UserError(
                f"Networks of {' and '.join(map(str, sorted(depths)))} blocks have no errors in common. "
                "Give networks of one depth."
            )
        self.seeds = range(arguments.seed, arguments.seed + arguments.num_seeds)

    def run(self, console: Console, save: Any) -> None:
        """Measure one network after the other."""
        for path, (options, state, trained) in self.checkpoints:
            full = build_network(options, state, self.device).eval()
            console.log(f"{path}: {len(full.blocks)} layers")
            self.console, self.references = console, self.full_outputs(full)
            self.measure(full, trained, "full", "trained")
            save()
            for method in self.OTHERS:
                self.measure(self.swapped(options, state, method), trained, method, "swapped")
                save()
            for (method, features, _), (network, record) in self.learn(full, options, state).items():
                self.measure(network, trained, method, features, record)
                save()
            self.missing.remove(str(path))
            save()

    def measure(
        self,
        network: Network,
        trained: Mapping[str, Any],
        method: str,
        stage: str,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the row of a network, and log it."""
        errors = layer_errors(network.eval(), self.references)
        super().measure(network, trained, method, stage, {"features_seed": None, **(record or {}), "errors": errors})
        bits = self.results[-1]["bits_per_byte"]["test"]
        self.console.log(f"{method} ({stage}): {bits:.3f} bits per byte of test, error {statistics.fmean(errors):.3f}")

    def captured(
        self, network: Network, attentions: Sequence[AttentionModule], text: str, number: int
    ) -> Iterator[tuple[StageInputs, ...]]:
        """What the attentions get in windows of a text, one at a time, spread evenly."""
        for index in spread((len(self.texts[text]) - 1) // self.length, number):
            tokens, _ = self.windows(self.texts[text], torch.tensor([index * self.length]))
            with self.autocast():
                inputs = capture_calls(attentions, lambda tokens=tokens: network(tokens))
            yield inputs

    @torch.no_grad()
    def full_outputs(self, network: Network) -> list[list[tuple[StageInputs, torch.Tensor]]]:
        """Inputs of all layers in some windows of the test text, and full attention's output in float32."""
        attentions = [block.attention for block in network.blocks]
        return [
            [
                (inputs, attention(inputs.query.float(), inputs.key.float(), inputs.value.float())[0])
                for attention, inputs in zip(attentions, layers, strict=True)
            ]
            for layers in self.captured(network, attentions, "test", self.arguments.error_windows)
        ]

    def learn(
        self, full: Network, options: Mapping[str, Any], state: Mapping[str, torch.Tensor]
    ) -> dict[tuple[str, str, int], tuple[Network, dict[str, Any]]]:
        """Networks with features by attention, kind of `FEATURES` and seed, and what is recorded of them.

        A layer's inputs are held for all windows of training, and none of another layer.
        """
        arguments, networks = self.arguments, {}
        for method in arguments.attentions:
            for features in FEATURES:
                changes = {} if features == "random" else {"learned_heads": options["heads"]}
                for seed in self.seeds:
                    network = self.swapped(options, state, method, seed=seed, **changes)
                    record = {"features_seed": seed} | ({"divergences": []} if features == "learned" else {})
                    networks[method, features, seed] = network, record
        steps, depth = arguments.steps, len(full.blocks)
        with progress_display(self.console) as progress:
            task = progress.add_task("Steps", total=depth * len(arguments.attentions) * len(self.seeds) * steps)
            given = {"steps": steps, "lr": arguments.lr, "num_queries": arguments.num_queries}
            given["advance"] = partial(progress.advance, task)
            for layer, block in enumerate(full.blocks):
                windows = self.captured(full, [block.attention], "train", arguments.train_windows)
                inputs = [each for (each,) in windows]
                for (method, features, seed), (network, record) in networks.items():
                    attention = network.blocks[layer].attention
                    if features == "keys":
                        start_from_keys(attention.learned_features, inputs[0], torch.Generator().manual_seed(seed))
                    elif features == "learned":
                        losses = distil_features(attention, inputs, seed=seed, **given)
                        record["divergences"].append(statistics.fmean(losses[steps * 9 // 10 :]))
                        self.console.log(
                            f"Layer {layer + 1} of {depth}, {method}, seed {seed}: divergence from {losses[0]:.3f} to "
                            f"{record['divergences'][-1]:.3f} nats"
                        )
        return networks

    def tables(self) -> Iterator[Table]:
        """Tables of bits per byte and of errors, over seeds of the features and the networks."""
        names = [name for name in self.texts if name != "train"]
        groups = {key[1:]: rows for key, rows in grouped(self.results).items()}
        title = "bits per byte, mean ± standard deviation over seeds"
        bits = new_table(title, ("attention", "features", "columns, %", *names), left=("attention", "features"))
        layers = [f"layer {number + 1}" for number in range(len(self.results[0]["errors"]))]
        title = "relative error of the output, mean ± standard deviation over seeds"
        errors = new_table(title, ("attention", "features", "mean", *layers), left=("attention", "features"))
        for (method, stage), rows in groups.items():
            heads = method, stage if stage in FEATURES else "-"
            values = [[row["bits_per_byte"][name] for row in rows] for name in names]
            bits.add_row(*heads, f"{100 * rows[0]['memory']:.1f}", *map(_cell, values))
            values = [[statistics.fmean(row["errors"]), *row["errors"]] for row in rows]
            errors.add_row(*heads, *map(_cell, zip(*values, strict=True)))
        yield bits
        yield errors


def _cell(values: Sequence[float]) -> str:
    return plus_minus(mean_and_std(values))


@torch.no_grad()
def layer_errors(network: Network, references: Sequence[Sequence[tuple[StageInputs, torch.Tensor]]]) -> list[float]:
    """Relative error of the output of each layer's attention, mean over windows.

    Args:
        network: with the attentions.
        references: for each window, inputs and right output of every layer.
    """
    errors = [
        [
            relative_error(block.attention(inputs.query, inputs.key, inputs.value)[0], reference).mean().item()
            for block, (inputs, reference) in zip(network.blocks, layers, strict=True)
        ]
        for layers in references
    ]
    return [statistics.fmean(layer) for layer in zip(*errors, strict=True)]


def build_parser() -> Parser:
    parser = Parser(__doc__, "attentions", "memory-fraction", attentions=",".join(LEARNERS))
    parser.set_defaults(memory_fraction=1 / 8, figure=None, save_tensors=None)
    add_inputs(parser)
    add = parser.add_argument
    add("--train-windows", type=positive, default=32, metavar="K", help="of the training text (%(default)s)")
    add("--error-windows", type=positive, default=8, metavar="K", help="of the test text, for errors (%(default)s)")
    add("--steps", type=positive, default=400, metavar="N", help="of training, for each layer (%(default)s)")
    add("--lr", type=positive_number, default=0.01, metavar="LR", help="learning rate (%(default)s)")
    add("--num-queries", type=positive, default=128, metavar="N", help="of a step (%(default)s)")
    parser.add("num-seeds", "seed", "device", "threads", "output")
    return parser


main = partial(run_tool, build_parser, lambda arguments: Distillation(arguments).main())

if __name__ == "__main__":
    sys.exit(main())
