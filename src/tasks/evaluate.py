"""`mode=eval`: evaluate a checkpoint and write `results.json` and `predictions.csv`."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from munch import Munch
from omegaconf import DictConfig
from pytorch_lightning import Trainer, seed_everything
from rich.console import Console
from torch import nn

from src.datamodules.image_folder import ImageFolderDataModule
from src.datamodules.synthetic import SyntheticDataModule
from src.evaluation.results import (
    RESULTS_FILE,
    Results,
    results_table,
    summarise,
    write_predictions,
    write_results,
)
from src.models.inference import inference_form
from src.models.t2t_vit import T2TViT
from src.tasks.build import attention_name, build, build_model, runs_inference_form
from src.tasks.classification import ImageClassification
from src.tasks.launch import check_common_options, explained, launch
from src.tasks.provenance import (
    attention_memory_fraction,
    attention_options,
    command_line,
    device_name,
    package_versions,
    peak_memory_mib,
    reset_peak_memory,
)
from src.utils.checkpoint import holds_random_features, load_contents, read_checkpoint
from src.utils.errors import UserError, check_switch, check_whole_number
from src.utils.files import sha256_of_file
from src.utils.fixed_batch import CudaGraphForward, Forward, PaddedForward, compiled

logger = logging.getLogger(__name__)


def evaluate(config: DictConfig) -> tuple[Results, Munch]:
    """Evaluate the checkpoint `config.eval.ckpt` on the test split.

    With several devices there is one process for each, and this one only watches them.

    Args:
        config: the composed configuration, see `configs/`.

    Returns:
        The results (also written to `config.paths.output_dir` by the first process), and the objects they come
        from: `model`, `datamodule`, `task`, `trainer`; none of them where the processes were several.

    Raises:
        UserError: anything in the configuration, the data or the checkpoint that does not fit.
    """
    _check_options(config)
    return launch(_evaluate, config)


def _evaluate(config: DictConfig, trainer: Trainer) -> tuple[Results, Munch]:
    """`evaluate` in this process."""
    _check_limits(trainer)
    fast = runs_inference_form(config.model, str(trainer.precision))
    seed_everything(config.seed, workers=True, verbose=False)
    checkpoint = Path(config.eval.ckpt).expanduser()

    # what is cheap to check comes first: data, then the model and its weights
    datamodule: ImageFolderDataModule | SyntheticDataModule = build(config.datamodule, "datamodule")
    datamodule.setup("test")
    model = build_model(config.model)
    contents = read_checkpoint(checkpoint)
    load_contents(model, contents, checkpoint)
    redraw = _redraws(config, holds_random_features(contents, model))
    seeds = _seeds(config, model)

    task = ImageClassification(
        model,
        num_images=len(datamodule.test_dataset),
        num_classes=config.model.num_classes,
        seeds=seeds,
        redraw=redraw,
        make_forward=functools.partial(_make_forward, fast=fast, compile_form=config.eval.compile),
    )
    attention = attention_name(config.model, model)
    logger.info(
        "Evaluating %s with attention %s on %d images of %s",
        config.model.name,
        attention or "of its own",
        len(datamodule.test_dataset),
        datamodule.test_dataset.root,
    )
    if model.has_random_features and not redraw:
        logger.info("Random features: those of the checkpoint; eval.redraw=true draws others")
    reset_peak_memory(trainer)
    with explained(datamodule.batch_size, "eval.compile" if config.eval.compile else None):
        trainer.test(task, datamodule=datamodule, verbose=False)

    results = Results(
        model=config.model.name,
        attention=attention,
        checkpoint={"path": str(config.eval.ckpt), "sha256": sha256_of_file(checkpoint)},
        data={
            "dir": str(datamodule.data_dir),
            "split": datamodule.test_split,
            "num_images": len(datamodule.test_dataset),
            "num_classes": config.model.num_classes,
        },
        image_size=config.model.image_size,
        precision=str(trainer.precision),
        device=device_name(trainer),
        seeds=seeds,
        images_per_second=task.images_per_second,
        peak_memory_mib=peak_memory_mib(trainer),
        versions=package_versions(),
        command=command_line(),
        attention_options=attention_options(model),
        attention_memory=attention_memory_fraction(model),
        seconds=task.seconds,
        random_features=_origin_of_random_features(model, redraw),
        fast=fast,
        **summarise(task.records),
    )
    if trainer.is_global_zero:
        output_dir = Path(config.paths.output_dir)
        write_predictions(output_dir, datamodule.test_dataset.paths, task.records)
        write_results(output_dir, results)
        Console().print(results_table(results, results.published))
        logger.info("Results: %s", output_dir / RESULTS_FILE)
    return results, Munch(model=model, datamodule=datamodule, task=task, trainer=trainer)


def _make_forward(model: nn.Module, fast: bool, compile_form: bool) -> Forward:
    """What is evaluated in place of a model that is on its device and in its dtype."""
    form = inference_form(model) if fast else model
    on_cuda = next(model.parameters()).device.type == "cuda"
    if not compile_form and (form is model or not on_cuda):
        return form
    forward = compiled(form) if compile_form else form
    return PaddedForward(CudaGraphForward(forward) if on_cuda else forward)


def _check_options(config: DictConfig) -> None:
    """Check what no other part checks, before anything slow."""
    check_common_options(config)
    check_whole_number("eval.num_seeds", config.eval.num_seeds, 1)
    if config.eval.redraw not in (None, True, False):
        raise UserError(f"eval.redraw={config.eval.redraw!r} is not valid. Give true, false or null.")
    check_switch("eval.compile", config.eval.compile)
    if config.eval.ckpt is None:
        raise UserError(
            "No checkpoint given. Give eval.ckpt=/path/to/checkpoint, or set CHECKPOINT=/path in the file .env; "
            "scripts/download_checkpoint_t2t_vit.py fetches a published one."
        )
    output_dir = Path(config.paths.output_dir)
    if (output_dir / RESULTS_FILE).exists():
        raise UserError(
            f"{output_dir} holds the results of an earlier run. Choose another hydra.run.dir, or move them away."
        )


def _check_limits(trainer: Trainer) -> None:
    # a part of the images would give figures that look like those of all
    limit = trainer.limit_test_batches  # a whole number counts batches, 1.0 is all of them
    if trainer.fast_dev_run or isinstance(limit, int) or limit != 1.0:
        raise UserError(
            "An evaluation covers all images. Leave out trainer.limit_test_batches and trainer.fast_dev_run; for fewer "
            "images, give a smaller folder."
        )


def _redraws(config: DictConfig, stored: bool) -> bool:
    """Whether random features are drawn from the seeds, rather than taken from a checkpoint that was trained with them.

    Args:
        config: the configuration.
        stored: whether the checkpoint holds rows for the model's attention.
    """
    redraw, several = config.eval.redraw, config.eval.num_seeds > 1
    if redraw is False and several:
        raise UserError("eval.redraw=false keeps the checkpoint's random features. Leave out eval.num_seeds.")
    if redraw is False and not stored:
        raise UserError(
            f"eval.redraw=false, but {config.eval.ckpt} holds no random features for this attention. Leave it out."
        )
    return bool(redraw) or several or not stored


def _origin_of_random_features(model: T2TViT, redraw: bool) -> str | None:
    if not model.has_random_features:
        return None
    return "seeds" if redraw else "checkpoint"


def _seeds(config: DictConfig, model: T2TViT) -> list[int]:
    """One seed for each draw of the random features."""
    number = config.eval.num_seeds
    if number > 1 and not model.has_random_features:
        logger.info("This attention draws nothing: eval.num_seeds=%d is one evaluation.", number)
        number = 1
    return [config.seed + draw for draw in range(number)]
