"""Errors of the attentions in each layer of a trained T2T-ViT: `scripts/measure_approximation.py`."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.utils.data import Subset

from scatterbrain.attention import attention_memory
from scatterbrain.attention.base import AttentionModule
from scatterbrain.errors import UserError, check_whole_number
from src.analysis import approximation
from src.analysis.tools import choose_device, new_table, print_report, provenance, shown, write_results
from src.datamodules.dataset import ImageLoader
from src.datamodules.sampling import spread
from src.models.attention_inputs import StageInputs, capture_inputs, create_block_attentions, create_stage_attentions
from src.models.modules.tokens_to_token import stage_lengths
from src.models.t2t_vit import T2TViT
from src.tasks.options import MAX_SEED
from src.utils.files import sha256_of_file

BACKBONE, MEAN_OF_BLOCKS = "backbone", "blocks"
ERRORS = ("output", "query", "matrix")

Row = dict[str, Any]
Modules = Sequence[AttentionModule]


class LayerRecords:
    """Measurements of one layer, batch by batch.

    `layer` is its name, `stage 1`, ..., or `block 1`, ...; `stage` 1 or 2, None in the backbone; `num_tokens` the
    number of queries and of keys; `full` its full attention; `samples` the modules of each attention, one a seed.
    """

    def __init__(
        self, layer: str, stage: int | None, num_tokens: int, full: AttentionModule, samples: Mapping[str, Modules]
    ) -> None:
        self.layer, self.stage, self.num_tokens, self.full = layer, stage, num_tokens, full
        # without random features, all seeds would be the same
        self.samples = {
            name: modules if hasattr(modules[0], "redraw_projection") else modules[:1]
            for name, modules in samples.items()
        }
        self.output_errors: dict[str, list[torch.Tensor]] = {name: [] for name in self.samples}
        self.biases: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in self.samples}
        self.query_dependence: list[torch.Tensor] = []
        self.matrix_errors: list[torch.Tensor] = []
        self.effective_keys: list[float] = []
        self.largest_logits: list[float] = []

    def update(self, inputs: StageInputs, of_matrix: Sequence[int]) -> None:
        """Take a batch of which the images `of_matrix` have their matrices compared, one at a time."""
        for name, modules in self.samples.items():
            if len(modules) > 1:
                errors, *bias = approximation.bias_and_spread(inputs, modules)
                self.biases[name].append(bias)
            else:
                errors = approximation.relative_errors(inputs, modules)
            self.output_errors[name].append(errors)
        self.query_dependence.append(approximation.query_dependence(inputs))
        every = [module for modules in self.samples.values() for module in modules]
        for number in of_matrix:
            one = inputs.image(number)
            self.matrix_errors.append(approximation.relative_errors(one, every, of_weights=True))
            weights = approximation.attention_weights(one, self.full)
            self.effective_keys.append(approximation.effective_keys(weights).mean().item())
            self.largest_logits.append(approximation.largest_logit(one).item())

    def approximations(self) -> Iterator[Row]:
        """A row for each attention.

        It has `attention`, `layer`, `stage`; its sizes as `options`, `memory`, the share of the columns; relative
        `output_error` over all images, `query_error`, that over `query_dependence`, and `matrix_error` over some
        images, see `over_seeds`; `bias` and `spread` of the output, see `bias_and_spread`, None with one seed.
        """
        dependence = torch.cat(self.query_dependence)
        matrices = torch.cat(self.matrix_errors, 1).split([len(modules) for modules in self.samples.values()])
        for (name, modules), matrix in zip(self.samples.items(), matrices, strict=True):
            bias = about_it = None
            if self.biases[name]:
                bias, about_it = (torch.cat(parts).mean().item() for parts in zip(*self.biases[name], strict=True))
            errors = torch.cat(self.output_errors[name], 1)
            output, query = errors.mean(1).tolist(), (errors / dependence).mean(1).tolist()
            row = {"attention": name, "layer": self.layer, "stage": self.stage, "options": modules[0].sizes()}
            row |= {"memory": attention_memory(modules[0], self.num_tokens)}
            row |= {"output_error": approximation.over_seeds(output), "query_error": approximation.over_seeds(query)}
            row |= {"bias": bias, "spread": about_it}
            yield row | {"matrix_error": approximation.over_seeds(matrix.mean(1).tolist())}

    def sharpness(self) -> Row:
        """Row on full attention: `effective_keys`, mean over images, heads and queries, and the `largest_logit`."""
        row = {"layer": self.layer, "stage": self.stage, "num_tokens": self.num_tokens}
        row |= {"scale": self.full.softmax_temp, "effective_keys": statistics.fmean(self.effective_keys)}
        return row | {"largest_logit": max(self.largest_logits)}


def layer_records(
    model: T2TViT, layers: str, attentions: Sequence[str], memory_fraction: float, seeds: Sequence[int]
) -> tuple[list[LayerRecords], list[Row]]:
    """Records of the layers, in the order of `capture_inputs`, and rows on what is left out of the backbone.

    Raises:
        UserError: an attention that is not defined in the token stages, or none that is in the backbone.
    """

    def modules_by_layer(create: Callable[..., tuple[AttentionModule, ...]], name: str) -> list[list[AttentionModule]]:
        samples = [create(name, model, memory_fraction, seed) for seed in seeds]
        return [list(modules) for modules in zip(*samples, strict=True)]

    records, skipped = [], []
    if layers != "backbone":
        samples = {name: modules_by_layer(create_stage_attentions, name) for name in attentions}
        lengths = stage_lengths(model.image_size)
        for number, (full, length) in enumerate(zip(model.token_attentions, lengths, strict=True)):
            of_stage = {name: modules[number] for name, modules in samples.items()}
            records.append(LayerRecords(f"stage {number + 1}", number + 1, length, full, of_stage))
    if layers != "stages":
        samples = {}
        for name in attentions:
            try:
                samples[name] = modules_by_layer(create_block_attentions, name)
            except UserError as error:
                skipped.append({"attention": name, "layer": BACKBONE, "reason": str(error)})
        if not samples:
            raise UserError(skipped[0]["reason"])
        length = model.patch_embed.num_patches + 1
        for number, full in enumerate(create_block_attentions("full", model)):
            of_block = {name: modules[number] for name, modules in samples.items()}
            records.append(LayerRecords(f"block {number + 1}", None, length, full, of_block))
    return records, skipped


def backbone_means(rows: Sequence[Row]) -> list[Row]:
    """Means over the blocks of the backbone for each attention, seed by seed; none where no block was measured."""
    means = []
    for name in dict.fromkeys(row["attention"] for row in rows):
        blocks = [row for row in rows if row["attention"] == name and row["stage"] is None]
        if blocks:
            mean = {**blocks[0], "layer": MEAN_OF_BLOCKS}
            for kind in ERRORS:
                per_seed = zip(*(row[f"{kind}_error"]["per_seed"] for row in blocks), strict=True)
                mean[f"{kind}_error"] = approximation.over_seeds([statistics.fmean(values) for values in per_seed])
            if mean["bias"] is not None:
                mean |= {kind: statistics.fmean(row[kind] for row in blocks) for kind in ("bias", "spread")}
            means.append(mean)
    return means


def error_table(rows: Sequence[Row], sharpness: Sequence[Row], title: str) -> Table:
    """Table of the errors, and the sharpness below them."""
    headers = ("attention", "layer", "sizes", "columns", "error of output", "of query part", "bias", "spread", "matrix")
    table = new_table(title, headers, headers[:3])
    table.caption = "columns: of the attention matrix\n" + "\n".join(
        f"{row['layer']}, full attention: {row['effective_keys']:,.0f} effective keys of {row['num_tokens']:,}, "
        f"largest |logit| {row['largest_logit']:.1f}"
        for row in sharpness
    )
    layer = ""
    for row in rows:
        if row["layer"] != layer:
            table.add_section()
        layer = row["layer"]
        sizes = " + ".join(f"{x:.2g}" if isinstance(x, float) else str(x) for x in row["options"].values()) or "-"
        parts = ("-" if row[kind] is None else f"{row[kind]:.3f}" for kind in ("bias", "spread"))
        output, query, matrix = (approximation.plus_minus(row[f"{kind}_error"]) for kind in ERRORS)
        errors = (output, query, *parts, matrix)
        table.add_row(row["attention"], layer, sizes, f"{100 * row['memory']:.1f} %", *errors)
    return table


def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure, print and write what the options of `scripts/measure_approximation.py` name."""
    check_whole_number("--seed", arguments.seed, 0, MAX_SEED)
    seeds = list(range(arguments.seed, arguments.seed + arguments.num_seeds))
    device = choose_device(arguments.device)
    name, model = approximation.load_model(arguments.checkpoint)
    model.to(device)
    dataset = approximation.open_photographs(arguments, model)
    layers, skipped = layer_records(model, arguments.layers, arguments.attentions, arguments.memory_fraction, seeds)

    chosen = spread(len(dataset), arguments.limit or len(dataset))
    of_matrix = {chosen[number] for number in spread(len(chosen), arguments.matrix_images)}
    loader = ImageLoader(Subset(dataset, chosen), batch_size=arguments.batch_size)
    for images, _, positions in shown(loader, "Photographs"):
        wanted = [number for number, position in enumerate(positions.tolist()) if position in of_matrix]
        for records, inputs in zip(layers, capture_inputs(model, images.to(device), arguments.layers), strict=True):
            records.update(inputs, wanted)

    rows = [row for records in layers for row in records.approximations()]
    means, sharpness = backbone_means(rows), [records.sharpness() for records in layers]
    title = (
        f"{name}: relative error against full attention, mean of {len(chosen)} photographs "
        f"(matrix: {len(of_matrix)}) ± std over {len(seeds)} seeds"
    )
    lines = (f"{row['attention']} left out of the {row['layer']}: {row['reason']}" for row in skipped)
    print_report([error_table([*rows, *means], sharpness, title)], *lines)
    data = {"images": arguments.images} if arguments.images else {}
    data |= {} if arguments.data_dir is None else {"dir": arguments.data_dir, "split": arguments.split}
    content = {**provenance(device), "command": command, "model": name}
    sha256 = sha256_of_file(Path(arguments.checkpoint).expanduser())
    content |= {"checkpoint": {"path": arguments.checkpoint, "sha256": sha256}}
    content |= {"data": data | {"num_images": len(chosen), "num_matrix_images": len(of_matrix)}}
    content |= {"image_size": model.image_size, "memory_fraction": arguments.memory_fraction, "seeds": seeds}
    content |= {"full_attention": sharpness, "results": rows, "layers": arguments.layers, "backbone_means": means}
    write_results(arguments, content | {"skipped": skipped})
