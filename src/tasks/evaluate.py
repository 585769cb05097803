"""`mode=eval`: evaluate a checkpoint and write `results.json` and `predictions.csv`."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from munch import Munch
from omegaconf import DictConfig
from pytorch_lightning import Trainer, seed_everything
from rich.console import Console

from src.datamodules.image_folder import ImageFolderDataModule
from src.evaluation.results import (
    RESULTS_FILE,
    Results,
    results_table,
    summarise,
    write_predictions,
    write_results,
)
from src.models.modules.attention import attention_memory
from src.models.modules.tokens_to_token import stage_lengths
from src.models.t2t_vit import T2TViT
from src.tasks.build import attention_name, build, build_group, build_model
from src.tasks.classification import ImageClassification
from src.utils.checkpoint import load_checkpoint
from src.utils.errors import UserError
from src.utils.files import sha256_of_file

logger = logging.getLogger(__name__)

VERSIONED_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "pytorch-lightning",
    "hydra-core",
    "numpy",
    "pillow",
)


def evaluate(config: DictConfig) -> tuple[Results, Munch]:
    """Evaluate the checkpoint `config.eval.ckpt` on the test split.

    Args:
        config: the composed configuration, see `configs/`.

    Returns:
        The results (also written to `config.paths.output_dir` by the first process), and the objects they come
        from: `model`, `datamodule`, `task`, `trainer`.

    Raises:
        UserError: anything in the configuration, the data or the checkpoint that does not fit.
    """
    output_dir = Path(config.paths.output_dir)
    _check_output(output_dir)
    checkpoint = _checkpoint_path(config.eval.ckpt)
    seed_everything(config.seed, workers=True, verbose=False)

    # what is cheap to check comes first: options, data, then the model and its weights
    trainer: Trainer = _build_trainer(config)
    datamodule: ImageFolderDataModule = build(config.datamodule, "datamodule")
    datamodule.setup("test")
    model = build_model(config.model)
    load_checkpoint(model, checkpoint)
    seeds = _seeds(config, model)

    task = ImageClassification(
        model,
        num_images=len(datamodule.test_dataset),
        num_classes=config.model.num_classes,
        seeds=seeds,
        forward=torch.compile(model) if config.eval.compile else None,
    )
    objects = Munch(model=model, datamodule=datamodule, task=task, trainer=trainer)
    logger.info(
        "Evaluating %s with attention %s on %d images of %s",
        config.model.name,
        attention_name(config.model, model) or "of its own",
        len(datamodule.test_dataset),
        datamodule.test_dataset.root,
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    _test(trainer, task, datamodule, config)

    results = Results(
        model=config.model.name,
        attention=attention_name(config.model, model),
        checkpoint={"path": str(config.eval.ckpt), "sha256": sha256_of_file(checkpoint)},
        data={
            "dir": str(config.datamodule.data_dir),
            "split": datamodule.test_split,
            "num_images": len(datamodule.test_dataset),
            "num_classes": config.model.num_classes,
        },
        image_size=config.model.image_size,
        precision=str(config.trainer.precision),
        device=_device_name(trainer),
        seeds=seeds,
        images_per_second=task.images_per_second,
        peak_memory_mib=_peak_memory_mib(trainer),
        versions=_versions(),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        attention_options=_attention_options(model),
        attention_memory=_attention_memory(model),
        seconds=task.seconds,
        **summarise(task.records),
    )
    if trainer.is_global_zero:
        write_predictions(output_dir, datamodule.test_dataset.paths, task.records)
        write_results(output_dir, results)
        Console().print(results_table(results, results.published))
        logger.info("Results: %s", output_dir / RESULTS_FILE)
    return results, objects


def _check_output(output_dir: Path) -> None:
    """Refuse to write into the folder of an earlier run, whose results would be lost."""
    if (output_dir / RESULTS_FILE).exists():
        raise UserError(
            f"{output_dir} holds the results of an earlier run. Choose another hydra.run.dir, or move them away."
        )


def _checkpoint_path(path: str | None) -> Path:
    if path is None:
        raise UserError(
            "No checkpoint given. Give eval.ckpt=/path/to/checkpoint, or set CHECKPOINT=/path in the file .env; "
            "scripts/download_checkpoint_t2t_vit.py fetches a published one."
        )
    return Path(path).expanduser()


def _build_trainer(config: DictConfig) -> Trainer:
    loggers = build_group(config.logger, "logger")
    callbacks = build_group(config.callbacks, "callbacks")
    return build(config.trainer, "trainer", logger=loggers or False, callbacks=callbacks)


def _seeds(config: DictConfig, model: T2TViT) -> list[int]:
    """One seed for each draw of the random features."""
    number = config.eval.num_seeds
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise UserError(f"eval.num_seeds={number!r} is not valid. Give a whole number of at least 1.")
    if number > 1 and not model.has_random_features:
        logger.info("This attention draws nothing: eval.num_seeds=%d is one evaluation.", number)
        number = 1
    return [config.seed + draw for draw in range(number)]


def _test(trainer: Trainer, task: ImageClassification, datamodule: ImageFolderDataModule, config: DictConfig) -> None:
    """Run the test loop; faults of the machine become errors that say what to do."""
    try:
        trainer.test(task, datamodule=datamodule, verbose=False)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"The device ran out of memory. Lower datamodule.batch_size (now {config.datamodule.batch_size})."
        ) from error
    except Exception as error:
        origin = type(error).__module__
        if config.eval.compile and origin.startswith(("torch._inductor", "torch._dynamo")):
            first_line = str(error).strip().splitlines()[0]
            raise UserError(
                f"torch.compile failed: {first_line} Leave out eval.compile=true, or install the compiler."
            ) from error
        raise


def _attention_options(model: T2TViT) -> list[dict[str, Any]] | None:
    """Options of the attention of both token stages, as they came out of budget and overrides."""
    if model.token_attentions is None:
        return None
    return [{**attention.sizes(), "scale": attention.softmax_temp} for attention in model.token_attentions]


def _attention_memory(model: T2TViT) -> float | None:
    """Memory of both token stages' attention over that of full attention."""
    if model.token_attentions is None:
        return None
    lengths = stage_lengths(model.image_size)
    entries = [length**2 for length in lengths]
    fractions = [attention_memory(module, n) for module, n in zip(model.token_attentions, lengths, strict=True)]
    return sum(f * n for f, n in zip(fractions, entries, strict=True)) / sum(entries)


def _device_name(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({_processor()})"
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"


def _processor() -> str:
    """Model of the processor, with the threads in use."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
            model = next(names, model)
    return f"{model}, {torch.get_num_threads()} threads"


def _peak_memory_mib(trainer: Trainer) -> float | None:
    if trainer.strategy.root_device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(trainer.strategy.root_device) / 2**20


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    # the wheel's own name of itself says CPU or CUDA, which the metadata may not
    return versions | {"torch": torch.__version__}
