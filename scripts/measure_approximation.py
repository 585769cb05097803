"""Error of the attentions against full attention, on the queries, keys and values of a trained T2T-ViT.

Every photograph of DATA_DIR/SPLIT runs through the network with full attention. What the two token stages hand to
their attention is then given to each attention in its place, and the relative Frobenius error of its output,
|| out - full || / || full ||, is averaged over the photographs, and over the draws where there is randomness. From the
draws also follow the bias, what all of them have in common, and the spread of one draw about it: their squares add up.
Some photographs, spread evenly, also give the error of the matrix of attention weights, and how sharp full attention
is: its effective number of keys (exp of the entropy of a query's weights) and its largest logit.

--layers has the blocks of the backbone measured too, or alone: 197 tokens, the class token among them, in several heads
of width 64. There 1/32 is 6 columns, which pay for a window of 6 keys, 6 clusters, 3 features, or 3 keys and 2
features; clusters of queries are a single one. Give a larger --memory-fraction, such as 1/8: 24 columns. Blocks of a
block-sparse attention have 16 tokens at least, and spend more than the budget; the column `memory` has what is spent.
What cannot be had at this length is left out, and a line says why.

    python scripts/measure_approximation.py --checkpoint FILE --data-dir data/flowers
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.attention import ATTENTIONS, attention_memory
from scatterbrain.attention.base import AttentionModule
from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.dataset import ImageFolderDataset, ImageLoader
from src.datamodules.image_folder import ImageFolderDataModule
from src.models.modules.tokens_to_token import stage_lengths
from src.models.t2t_vit import T2TViT
from src.tasks.approximation import (
    LAYERS,
    StageInputs,
    attention_weights,
    bias_and_spread,
    capture_inputs,
    create_block_attentions,
    create_stage_attentions,
    effective_keys,
    largest_logit,
    load_model,
    relative_errors,
)
from src.tasks.environment import package_versions
from src.tasks.options import MAX_SEED
from src.utils.files import sha256_of_file, write_json
from src.utils.machine import machine_info
from src.utils.scripts import (
    Parser,
    check_writable,
    choose_device,
    comma_separated,
    console_for_tables,
    fraction,
    positive,
    run_tool,
    say,
)

BACKBONE, MEAN_OF_BLOCKS = "backbone", "blocks"
# Of the table where it is not shown on a terminal.
WIDTH = 132


@dataclass
class Error:
    """Mean over images of a relative error.

    Attributes:
        mean: over images and draws.
        std: sample deviation over draws of the mean over images; None with one draw.
        draws: mean over images of each draw.
    """

    mean: float
    std: float | None
    draws: list[float]

    @classmethod
    def of(cls, errors: torch.Tensor) -> Error:
        """From the errors (draws, images)."""
        draws = errors.mean(1).tolist()
        return cls(statistics.fmean(draws), statistics.stdev(draws) if len(draws) > 1 else None, draws)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.std is None else f"{self.mean:.3f} ± {self.std:.3f}"


@dataclass
class Approximation:
    """Errors of one attention in one layer.

    Attributes:
        attention: its name.
        layer: `stage 1`, `stage 2`, `block 1`, ..., or `blocks`, the mean of all blocks of the backbone.
        stage: 1 or 2; None in the backbone.
        options: its sizes.
        memory: over that of the full attention matrix.
        output_error: of the output, over all images.
        bias: relative norm of the expected output less that of full attention, over all images; None with one draw.
        spread: relative deviation of the output about the expected one; None with one draw.
        matrix_error: of the matrix of attention weights, over some images.
    """

    attention: str
    layer: str
    stage: int | None
    options: dict[str, int]
    memory: float
    output_error: Error
    bias: float | None
    spread: float | None
    matrix_error: Error


@dataclass
class Sharpness:
    """How sharp full attention is in one layer.

    Attributes:
        layer: `stage 1`, `stage 2`, `block 1`, ...
        stage: 1 or 2; None in the backbone.
        num_tokens: number of queries and of keys.
        scale: softmax scale.
        effective_keys: mean over images, heads and queries of exp(entropy), in [1, num_tokens].
        largest_logit: largest |s q.k| over images, heads, queries and keys.
    """

    layer: str
    stage: int | None
    num_tokens: int
    scale: float
    effective_keys: float
    largest_logit: float


def approximation_parser(description: str, attentions: Sequence[str]) -> Parser:
    """The options of both scripts about approximation; `attentions` are the default of --attentions."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="of one of the t2t_vit_t_* variants")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="folder that holds the split's folder")
    parser.add_argument("--split", default="val", metavar="NAME", help="folder of the class folders (val)")
    parser.add_argument(
        "--attentions",
        type=comma_separated(tuple(ATTENTIONS)),
        default=tuple(attentions),
        metavar="NAMES",
        help=f"separated by commas, of {', '.join(ATTENTIONS)} ({','.join(attentions)})",
    )
    parser.add_argument("--memory-fraction", type=fraction, default=1 / 32, metavar="F", help="budget (1/32)")
    parser.add_argument("--seed", type=int, default=1111, metavar="N", help="seed of the random features (1111)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(auto: CUDA where it is)")
    parser.add_argument("--threads", type=positive, metavar="T", help="CPU threads (PyTorch's choice)")
    return parser


def build_parser() -> Parser:
    parser = approximation_parser(__doc__, ("local", "performer", "sblocal"))
    parser.add_argument(
        "--layers", choices=LAYERS, default="stages", help="token stages, blocks of the backbone, or all (stages)"
    )
    parser.add_argument("--num-draws", type=positive, default=3, metavar="K", help="draws of the random features (3)")
    parser.add_argument("--limit", type=positive, metavar="N", help="take N photographs, spread evenly, not all")
    parser.add_argument(
        "--matrix-images", type=positive, default=12, metavar="N", help="photographs of the matrix errors (12)"
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="B", help="(8)")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    return parser


def open_split(data_dir: str, split: str, model: T2TViT) -> ImageFolderDataset:
    """The photographs of a split, as the model's evaluation sees them.

    Raises:
        UserError: there is no such folder, or see `ImageFolderDataset`.
    """
    root = Path(data_dir).expanduser() / split
    if not root.is_dir():
        raise UserError(f"{root} is not a folder. Give --data-dir the folder that holds '{split}', or another --split.")
    transform = ImageFolderDataModule(image_size=model.image_size).test_transform
    return ImageFolderDataset(root, transform, model.num_classes)


def spread(size: int, number: int) -> list[int]:
    """Positions of `number` items, all of them where they are fewer, spread evenly over `size`."""
    number = min(size, number)
    return [(2 * i + 1) * size // (2 * number) for i in range(number)]


@dataclass(frozen=True)
class Skipped:
    """An attention that is left out of the backbone, and why."""

    attention: str
    layer: str
    reason: str


class LayerRecords:
    """What is measured in one layer, batch by batch.

    Args:
        layer: its name.
        stage: 1 or 2; None in the backbone.
        num_tokens: number of queries and of keys.
        full: its full attention.
        draws: modules of each attention, one for each draw of the random features.
    """

    def __init__(
        self,
        layer: str,
        stage: int | None,
        num_tokens: int,
        full: AttentionModule,
        draws: dict[str, list[AttentionModule]],
    ) -> None:
        self.layer, self.stage, self.num_tokens, self.full = layer, stage, num_tokens, full
        # without random features, every draw would be the same
        self.draws = {
            name: modules if hasattr(modules[0], "redraw_projection") else modules[:1]
            for name, modules in draws.items()
        }
        self.output_errors: dict[str, list[torch.Tensor]] = {name: [] for name in self.draws}
        self.biases: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in self.draws}
        self.matrix_errors: list[torch.Tensor] = []
        self.effective_keys: list[float] = []
        self.largest_logits: list[float] = []

    def update(self, inputs: StageInputs, of_matrix: Sequence[int]) -> None:
        """Take a batch of which the images `of_matrix` have their matrices compared, one at a time."""
        modules = [module for draws in self.draws.values() for module in draws]
        for name, draws in self.draws.items():
            if len(draws) > 1:
                errors, *bias = bias_and_spread(inputs, draws)
                self.biases[name].append(bias)
            else:
                errors = relative_errors(inputs, draws)
            self.output_errors[name].append(errors)
        for number in of_matrix:
            one = inputs.image(number)
            self.matrix_errors.append(relative_errors(one, modules, of_weights=True))
            self.effective_keys.append(effective_keys(attention_weights(one, self.full)).mean().item())
            self.largest_logits.append(largest_logit(one).item())

    def approximations(self) -> Iterator[Approximation]:
        """The errors of each attention."""
        sizes = [len(draws) for draws in self.draws.values()]
        matrices = torch.cat(self.matrix_errors, 1).split(sizes)
        for (name, draws), matrix in zip(self.draws.items(), matrices, strict=True):
            output = Error.of(torch.cat(self.output_errors[name], 1))
            bias = spread = None
            if self.biases[name]:
                bias, spread = (torch.cat(parts).mean().item() for parts in zip(*self.biases[name], strict=True))
            memory = attention_memory(draws[0], self.num_tokens)
            sizes = draws[0].sizes()
            yield Approximation(name, self.layer, self.stage, sizes, memory, output, bias, spread, Error.of(matrix))

    def sharpness(self) -> Sharpness:
        """How sharp full attention is."""
        return Sharpness(
            self.layer,
            self.stage,
            self.num_tokens,
            self.full.softmax_temp,
            statistics.fmean(self.effective_keys),
            max(self.largest_logits),
        )


def layer_records(
    model: T2TViT, arguments: argparse.Namespace, seeds: Sequence[int]
) -> tuple[list[LayerRecords], list[Skipped]]:
    """Records of the layers that are asked for, in the order of `capture_inputs`, and what is left out of them.

    Args:
        model: with full attention.
        arguments: the options.
        seeds: one for each draw of the random features.

    Raises:
        UserError: an attention that the token stages cannot have, or none that the backbone can.
    """

    def modules_by_layer(create: Callable[..., tuple[AttentionModule, ...]], name: str) -> list[list[AttentionModule]]:
        drawn = [create(name, model, arguments.memory_fraction, seed) for seed in seeds]
        return [list(modules) for modules in zip(*drawn, strict=True)]

    records, skipped = [], []
    if arguments.layers != "backbone":
        draws = {name: modules_by_layer(create_stage_attentions, name) for name in arguments.attentions}
        for number, (full, length) in enumerate(
            zip(model.token_attentions, stage_lengths(model.image_size), strict=True)
        ):
            of_stage = {name: modules[number] for name, modules in draws.items()}
            records.append(LayerRecords(f"stage {number + 1}", number + 1, length, full, of_stage))
    if arguments.layers != "stages":
        draws = {}
        for name in arguments.attentions:
            try:
                draws[name] = modules_by_layer(create_block_attentions, name)
            except UserError as error:
                skipped.append(Skipped(name, BACKBONE, str(error)))
        if not draws:
            raise UserError(skipped[0].reason)
        length = model.patch_embed.num_patches + 1
        for number, full in enumerate(create_block_attentions("full", model)):
            of_block = {name: modules[number] for name, modules in draws.items()}
            records.append(LayerRecords(f"block {number + 1}", None, length, full, of_block))
    return records, skipped


def backbone_means(approximations: Sequence[Approximation]) -> list[Approximation]:
    """Means over the blocks of the backbone, attention by attention; none where no block was measured."""
    found: dict[str, list[Approximation]] = {}
    for item in approximations:
        if item.stage is None:
            found.setdefault(item.attention, []).append(item)
    return [mean_of_blocks(items) for items in found.values()]


def mean_of_blocks(items: Sequence[Approximation]) -> Approximation:
    """Mean of one attention's errors over the blocks; a draw is one of all blocks at once."""
    first = items[0]

    def error(name: str) -> Error:
        draws = torch.tensor([getattr(item, name).draws for item in items], dtype=torch.float64)
        return Error.of(draws.T)

    def mean(name: str) -> float | None:
        return None if getattr(first, name) is None else statistics.fmean(getattr(item, name) for item in items)

    parts = (error("output_error"), mean("bias"), mean("spread"), error("matrix_error"))
    return Approximation(first.attention, MEAN_OF_BLOCKS, None, first.options, first.memory, *parts)


def table(approximations: Sequence[Approximation], sharpness: Sequence[Sharpness], title: str) -> Table:
    """The errors, and the sharpness below them."""
    rows = Table(title=title, title_justify="left", caption_justify="left")
    rows.caption = "memory: of the attention matrix\n" + "\n".join(
        f"{item.layer}, full attention: {item.effective_keys:,.0f} effective keys of {item.num_tokens:,}, "
        f"largest |logit| {item.largest_logit:.1f}"
        for item in sharpness
    )
    for header in ("attention", "layer", "sizes", "memory", "error of output", "bias", "spread", "error of matrix"):
        rows.add_column(header, justify="left" if header in ("attention", "layer", "sizes") else "right", no_wrap=True)
    layer = ""
    for item in approximations:
        sizes = " + ".join(map(str, item.options.values())) or "-"
        parts = ("-" if part is None else f"{part:.3f}" for part in (item.bias, item.spread))
        memory = f"{100 * item.memory:.1f} %"
        errors = (str(item.output_error), *parts, str(item.matrix_error))
        if item.layer != layer:
            rows.add_section()
        layer = item.layer
        rows.add_row(item.attention, layer, sizes, memory, *errors)
    return rows


def measure(arguments: argparse.Namespace, command: str) -> None:
    """Measure, print and write."""
    check_writable(arguments.output)
    check_whole_number("--seed", arguments.seed, 0, MAX_SEED)
    seeds = [arguments.seed + draw for draw in range(arguments.num_draws)]
    device = choose_device(arguments.device)
    name, model = load_model(arguments.checkpoint)
    model.to(device)
    dataset = open_split(arguments.data_dir, arguments.split, model)
    layers, skipped = layer_records(model, arguments, seeds)

    chosen = spread(len(dataset), arguments.limit or len(dataset))
    of_matrix = {chosen[number] for number in spread(len(chosen), arguments.matrix_images)}
    loader = ImageLoader(Subset(dataset, chosen), batch_size=arguments.batch_size)
    for images, _, positions in track(loader, "Photographs", console=Console(stderr=True), transient=True):
        wanted = [number for number, position in enumerate(positions.tolist()) if position in of_matrix]
        for records, inputs in zip(layers, capture_inputs(model, images.to(device), arguments.layers), strict=True):
            records.update(inputs, wanted)

    approximations = [item for records in layers for item in records.approximations()]
    means = backbone_means(approximations)
    sharpness = [records.sharpness() for records in layers]
    title = (
        f"{name}: relative error against full attention, mean of {len(chosen)} photographs "
        f"(matrix: {len(of_matrix)}) ± deviation over {len(seeds)} draws"
    )
    console = console_for_tables(WIDTH)
    console.print(table([*approximations, *means], sharpness, title))
    for item in skipped:
        say(f"{item.attention} left out of the {item.layer}: {item.reason}")
    if arguments.output is not None:
        content = {
            "machine": machine_info(device),
            "versions": package_versions(),
            "command": command,
            "model": name,
            "checkpoint": {
                "path": arguments.checkpoint,
                "sha256": sha256_of_file(Path(arguments.checkpoint).expanduser()),
            },
            "data": {
                "dir": arguments.data_dir,
                "split": arguments.split,
                "num_images": len(chosen),
                "num_matrix_images": len(of_matrix),
            },
            "image_size": model.image_size,
            "memory_fraction": arguments.memory_fraction,
            "seeds": seeds,
            "full_attention": [asdict(item) for item in sharpness],
            "results": [asdict(item) for item in approximations],
            "layers": arguments.layers,
            "backbone_means": [asdict(item) for item in means],
            "skipped": [asdict(item) for item in skipped],
        }
        write_json(arguments.output, content)


def main(argv: Sequence[str] | None = None) -> int:
    """Take the measurements that `argv` asks for; returns the exit status."""
    command = shlex.join([Path(__file__).name, *(sys.argv[1:] if argv is None else argv)])
    return run_tool(build_parser(), lambda arguments: measure(arguments, command), argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
