"""`mode=eval`: evaluate a checkpoint and write `results.json` and `predictions.csv`."""

from __future__ import annotations

import logging
import os
import platform
import shlex
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from munch import Munch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.strategies import ParallelStrategy
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
from src.tasks.processes import run_processes
from src.utils.checkpoint import load_checkpoint
from src.utils.errors import UserError, check_whole_number
from src.utils.files import sha256_of_file
from src.utils.machine import processor_name

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


# What seed_everything takes, less room for the seeds of further draws.
MAX_SEED = 2**31 - 1


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
    quiet_libraries()
    _check_options(config)
    trainer = _build_trainer(config)
    if number := _processes_to_start(trainer):
        # interpolations may ask Hydra, which the processes do not have
        content = OmegaConf.to_container(config, resolve=True)
        return run_processes(_evaluate_in_process, number, content, _logging_config()), Munch()
    return _evaluate(config, trainer)


def _processes_to_start(trainer: Trainer) -> int:
    """How many processes of this machine the trainer counts on: its devices, or 0 where it needs none.

    None are needed for a single device, and where torchrun or SLURM started them already.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ParallelStrategy) or strategy.cluster_environment is None:
        return 0
    return 0 if strategy.cluster_environment.creates_processes_externally else trainer.num_devices


def _evaluate_in_process(content: dict[str, Any], logging_config: dict[str, Any] | None) -> Results:
    """`evaluate` in one of several processes, of which the first speaks for all."""
    if os.environ["LOCAL_RANK"] == "0":
        configure_log(None if logging_config is None else OmegaConf.create(logging_config))
    else:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
    quiet_libraries()
    config = OmegaConf.create(content)
    return _evaluate(config, _build_trainer(config))[0]


def _logging_config() -> dict[str, Any] | None:
    if not HydraConfig.initialized():
        return None
    return OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)


def _evaluate(config: DictConfig, trainer: Trainer) -> tuple[Results, Munch]:
    """`evaluate` in this process."""
    seed_everything(config.seed, workers=True, verbose=False)
    checkpoint = Path(config.eval.ckpt).expanduser()

    # what is cheap to check comes first: data, then the model and its weights
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
    attention = attention_name(config.model, model)
    logger.info(
        "Evaluating %s with attention %s on %d images of %s",
        config.model.name,
        attention or "of its own",
        len(datamodule.test_dataset),
        datamodule.test_dataset.root,
    )
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.init()  # before that, there is nothing to reset
        torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
    _test(trainer, task, datamodule, config)

    results = Results(
        model=config.model.name,
        attention=attention,
        checkpoint={"path": str(config.eval.ckpt), "sha256": sha256_of_file(checkpoint)},
        data={
            "dir": str(config.datamodule.data_dir),
            "split": datamodule.test_split,
            "num_images": len(datamodule.test_dataset),
            "num_classes": config.model.num_classes,
        },
        image_size=config.model.image_size,
        precision=str(trainer.precision),
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
        output_dir = Path(config.paths.output_dir)
        write_predictions(output_dir, datamodule.test_dataset.paths, task.records)
        write_results(output_dir, results)
        Console().print(results_table(results, results.published))
        logger.info("Results: %s", output_dir / RESULTS_FILE)
    return results, Munch(model=model, datamodule=datamodule, task=task, trainer=trainer)


def quiet_libraries() -> None:
    """Leave out what libraries say about themselves at every start, and what the user cannot act on."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # torch.compile, of CUDA_HOME without a GPU
    for message in (
        ".*does not have many workers.*",
        ".*it is recommended to use `Trainer\\(devices=1.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", message)


def _check_options(config: DictConfig) -> None:
    """Check what no other part checks, before anything slow."""
    check_whole_number("seed", config.seed, 0, MAX_SEED)
    check_whole_number("eval.num_seeds", config.eval.num_seeds, 1)
    # the data module reads these two through its own options, and would name those
    check_whole_number("model.image_size", config.model.image_size, 1)
    check_whole_number("model.num_classes", config.model.num_classes, 1)
    if not isinstance(config.eval.compile, bool):
        raise UserError(f"eval.compile={config.eval.compile!r} is not valid. Give true or false.")
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


def _build_trainer(config: DictConfig) -> Trainer:
    strategy = str(config.trainer.strategy)
    if any(word in strategy for word in ("spawn", "fork", "notebook")):
        raise UserError(
            f"trainer.strategy={strategy} is not supported. Leave trainer.strategy=auto: each device has its process."
        )
    callbacks = build_group(config.callbacks, "callbacks")
    trainer: Trainer = build(
        config.trainer,
        "trainer",
        logger=build_group(config.logger, "logger") or False,
        callbacks=callbacks,
        # otherwise Lightning adds its own
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )
    # a part of the images would give figures that look like those of all
    limit = trainer.limit_test_batches  # a whole number counts batches, 1.0 is all of them
    if trainer.fast_dev_run or isinstance(limit, int) or limit != 1.0:
        raise UserError(
            "An evaluation covers all images. Leave out trainer.limit_test_batches and trainer.fast_dev_run; for fewer "
            "images, give a smaller folder."
        )
    return trainer


def _seeds(config: DictConfig, model: T2TViT) -> list[int]:
    """One seed for each draw of the random features."""
    number = config.eval.num_seeds
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
                f"torch.compile failed: {first_line.rstrip('.')}. Leave out eval.compile=true, or install the compiler."
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
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} ({processor_name()}, {torch.get_num_threads()} threads)"
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"


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
