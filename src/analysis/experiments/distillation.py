"""Learned features against random ones on a trained T2T-ViT: `scripts/distil_features.py`."""

from __future__ import annotations

import argparse
import functools
from functools import partial
from pathlib import Path

from scatterbrain.errors import UserError, check_whole_number
from src.analysis.approximation import load_model, model_entries, open_split, over_seeds, plus_minus
from src.analysis.experiments.memory import Reference, load_photographs, measure_point, swapped
from src.analysis.tools import choose_device, provenance, say, shown, without_paths, write_results
from src.checkpoints.writing import save_checkpoint
from src.datamodules.sampling import spread
from src.models.attention_inputs import capture_stage_inputs, create_stage_attentions
from src.tasks.distillation import learned_stage_attentions, mean_divergence
from src.tasks.options import MAX_SEED

OTHERS = ("local", "sbcluster")  # at the same columns
ERROR_IMAGES = 32  # of the held-out ones, for errors and divergences
LEARNERS, FEATURES = ("performer", "sblocal"), ("random", "keys", "learned")
NUMBERS = ("top-1 %", "agreement %", "error of stage 1", "of stage 2", "nats in stage 1", "in stage 2")


def run(arguments: argparse.Namespace) -> None:
    """Distil, measure, print and write what the options of `scripts/distil_features.py` name."""
    check_whole_number("--seed", arguments.seed, 0, MAX_SEED - arguments.num_seeds)
    if arguments.save is not None and not Path(arguments.save).is_dir():
        raise UserError(f"--save {arguments.save} is not a folder. Make it first.")
    device = choose_device(arguments.device)
    name, model = load_model(arguments.checkpoint)
    model.to(device)
    dataset = open_split(arguments.data_dir, arguments.split, model)
    chosen = spread(len(dataset), arguments.limit or len(dataset))
    if len(chosen) < 2:
        raise UserError("One photograph cannot be learned from and measured on. Give two or more, see --limit.")
    parts = chosen[::2], chosen[1::2]  # in the order of the classes: every other photograph of each
    (images, _), held_out = (load_photographs(dataset, part) for part in parts)
    training = [capture_stage_inputs(model, image[None].to(device)) for image in images]
    reference = Reference.of(model, *(x.to(device) for x in held_out), error_images=ERROR_IMAGES)
    options = {name: getattr(arguments, name) for name in ("steps", "lr", "num_queries")}
    cases = [(each, None) for each in OTHERS] + [(each, kind) for each in LEARNERS for kind in FEATURES]
    rows = []
    for attention, features in shown(cases, "Attentions"):
        create = partial(learned_stage_attentions, features, training, options) if features else create_stage_attentions
        create = functools.cache(create)  # the modules of a seed are measured twice
        seeds = range(arguments.seed, arguments.seed + (arguments.num_seeds if features else 1))
        row = measure_point(reference, attention, arguments.memory_fraction, seeds, create=create)
        row |= {"features": features, "divergence": None}
        if features:
            samples = [create(attention, model, arguments.memory_fraction, seed) for seed in seeds]
            stages = zip(zip(*samples, strict=True), zip(*reference.stages, strict=True), strict=True)
            row["divergence"] = [over_seeds([mean_divergence(x, inputs) for x in each]) for each, inputs in stages]
        rows.append(row)
        if features == "learned" and arguments.save is not None:
            with swapped(model, samples[0]):
                path = Path(arguments.save) / f"{attention}_learned.safetensors"
                save_checkpoint(model.state_dict(), path, "safetensors")
        numbers = [plus_minus(row[each], 2) for each in ("top1", "agreement")]
        numbers += [plus_minus(stage["output_error"]) for stage in row["stages"]]
        numbers += [plus_minus(value, 2) for value in row["divergence"] or ()]
        say(f"{attention} {features or ''}: " + ", ".join(map(" ".join, zip(NUMBERS, numbers, strict=False))))
    content = provenance(device) | model_entries(name, arguments.checkpoint)
    content |= {"settings": without_paths(arguments, "checkpoint", "save")}
    content |= {"num_training_images": len(parts[0]), "num_held_out_images": len(parts[1])}
    content |= {"num_error_images": sum(len(pair[0].query) for pair in reference.stages)}
    write_results(arguments, content | {"full_attention": {"top1": reference.top1}, "results": rows})
