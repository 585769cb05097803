"""`mode=eval`: evaluate a checkpoint and write `results.json` and `predictions.csv`."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from munch import Munch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import Logger
from rich.console import Console
from torch import nn

from src.datamodules.image_folder import ImageFolderDataModule
from src.datamodules.synthetic import SyntheticDataModule
from src.evaluation.comparison import OnePass, compare_runs, print_comparison, write_comparison
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
from src.tasks.attentions import attention_configs, chosen_attentions, naming, share_modules
from src.tasks.build import attention_name, build, build_group, build_model, runs_inference_form
from src.tasks.classification import Draws, ImageClassification, SeveralClassifications
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
from src.utils.checkpoint import CheckpointContents, holds_random_features, load_contents, read_checkpoint
from src.utils.errors import UserError, check_switch, check_whole_number
from src.utils.files import sha256_of_file
from src.utils.fixed_batch import CudaGraphForward, Forward, PaddedForward, compiled

logger = logging.getLogger(__name__)


def evaluate(config: DictConfig) -> tuple[Results | list[Results], Munch]:
    """Evaluate the checkpoint `config.eval.ckpt` on the test split, with one attention or with several.

    With several devices there is one process for each, and this one only watches them.

    Args:
        config: the composed configuration, see `configs/`.

    Returns:
        The results (also written to `config.paths.output_dir` by the first process), and the objects they come
        from: `model`, `datamodule`, `task`, `trainer`; none of them where the processes were several. With
        `config.eval.attentions`, a list of results, one for each (in the subfolders `0`, `1`, ..., as of a multirun,
        and compared in `config.paths.output_dir`), and `models` in place of `model`.

    Raises:
        UserError: anything in the configuration, the data or the checkpoint that does not fit.
    """
    _check_options(config)
    names = chosen_attentions(config)
    if not names:
        _check_no_results(config)
        return launch(_evaluate, config)
    configs = attention_configs(config, names)
    for own in configs:
        _check_no_results(own)
    common = copy.deepcopy(config)
    # each attention has its own; an interpolation between options of the stages has a meaning there alone
    common.logger = common.model.t2tattn1_cfg = common.model.t2tattn2_cfg = None
    # resolved one by one, since interpolations start at the root
    content = OmegaConf.to_container(common, resolve=True)
    content["runs"] = [OmegaConf.to_container(own, resolve=True) for own in configs]
    return launch(_evaluate_attentions, OmegaConf.create(content))


def _evaluate(config: DictConfig, trainer: Trainer) -> tuple[Results, Munch]:
    """`evaluate` of one attention in this process."""
    _check_limits(trainer)
    fast = runs_inference_form(config.model, str(trainer.precision))
    seed_everything(config.seed, workers=True, verbose=False)

    # what is cheap to check comes first: data, then the model and its weights
    datamodule = _build_datamodule(config)
    checkpoint, contents = _read_checkpoint(config)
    model, redraw, seeds = _build_loaded_model(config, checkpoint, contents)
    task = ImageClassification(
        model,
        num_images=len(datamodule.test_dataset),
        num_classes=config.model.num_classes,
        seeds=seeds,
        redraw=redraw,
        make_forward=functools.partial(_make_forward, fast=fast, compile_form=config.eval.compile),
    )
    logger.info(
        "Evaluating %s with attention %s on %d images of %s",
        config.model.name,
        attention_name(config.model, model) or "of its own",
        len(datamodule.test_dataset),
        datamodule.test_dataset.root,
    )
    _tell_kept_rows(model, redraw)
    reset_peak_memory(trainer)
    with explained(datamodule.batch_size, "eval.compile" if config.eval.compile else None):
        trainer.test(task, datamodule=datamodule, verbose=False)

    results = Results(
        **_provenance(config, trainer, datamodule, sha256_of_file(checkpoint), model, seeds, redraw),
        images_per_second=task.images_per_second,
        peak_memory_mib=peak_memory_mib(trainer),
        seconds=task.seconds,
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


def _evaluate_attentions(config: DictConfig, trainer: Trainer) -> tuple[list[Results], Munch]:
    """`evaluate` of several attentions in this process: `config.runs` holds the configuration of each."""
    _check_limits(trainer)
    fast = runs_inference_form(config.model, str(trainer.precision))
    seed_everything(config.seed, workers=True, verbose=False)

    datamodule = _build_datamodule(config)
    checkpoint, contents = _read_checkpoint(config)
    make_forward = _SharedForms(fast, config.eval.compile)
    draws: dict[str, Draws] = {}
    for run in config.runs:
        name = run.model.t2tattn1_cfg.name
        with naming(name):
            model, redraw, seeds = _build_loaded_model(run, checkpoint, contents)
        if draws:
            share_modules(model, next(iter(draws.values())).model, model.token_attentions)
        draws[name] = Draws(model, seeds, redraw, make_forward)
    loggers = [build_group(run.logger, "logger") for run in config.runs]
    compiled_by = "eval.compile" if config.eval.compile else None

    @contextmanager
    def guard(name: str) -> Iterator[None]:
        with naming(name), explained(datamodule.batch_size, compiled_by):
            yield

    num_images = len(datamodule.test_dataset)
    task = SeveralClassifications(draws, num_images, config.model.num_classes, guard)
    passes = sum(len(each.seeds) for each in draws.values())
    logger.info(
        "Evaluating %s with %d attention(s), %s: %d forward passes of each of %d images of %s",
        *(config.model.name, len(draws), ", ".join(draws), passes, num_images, datamodule.test_dataset.root),
    )
    for name, each in draws.items():
        _tell_kept_rows(each.model, each.redraw, f"{name}: ")
    reset_peak_memory(trainer)
    with explained(datamodule.batch_size, compiled_by):
        trainer.test(task, datamodule=datamodule, verbose=False)

    sha256 = sha256_of_file(checkpoint)
    results = [
        Results(
            **_provenance(run, trainer, datamodule, sha256, each.model, each.seeds, each.redraw),
            images_per_second=task.images_per_second[name],
            peak_memory_mib=None,  # that of the pass says nothing of one attention
            seconds=task.device_seconds[name],
            fast=fast,
            **summarise(task.records[name]),
        )
        for run, (name, each) in zip(config.runs, draws.items(), strict=True)
    ]
    if trainer.is_global_zero:
        one_pass = OnePass(
            attentions=len(draws), forward_passes=passes, seconds=task.seconds, peak_memory_mib=peak_memory_mib(trainer)
        )
        _write_attentions(config, results, task, datamodule.test_dataset.paths, loggers, one_pass)
    models = {name: each.model for name, each in draws.items()}
    return results, Munch(models=models, datamodule=datamodule, task=task, trainer=trainer)


def _write_attentions(
    config: DictConfig,
    results: Sequence[Results],
    task: SeveralClassifications,
    paths: Sequence[Path],
    loggers: Sequence[Sequence[Logger]],
    one_pass: OnePass,
) -> None:
    """Leave what a multirun leaves: a folder for each attention, and the comparison of those that gave numbers.

    Raises:
        UserError: an attention gave none, or cannot be written; those beside it are written and compared before.
    """
    finished, failed = [], {}
    for run, result, its_loggers in zip(config.runs, results, loggers, strict=True):
        folder, name = Path(run.paths.output_dir), run.model.t2tattn1_cfg.name
        try:
            with naming(name):
                (folder / ".hydra").mkdir(parents=True, exist_ok=True)
                OmegaConf.save(run, folder / ".hydra" / "config.yaml")
                for each in its_loggers:  # as Lightning logs the figures of a test
                    figures = {f"test/{figure}": getattr(result, figure) for figure in ("top1", "top5", "loss")}
                    each.log_metrics({"epoch": 0, **figures}, step=0)
                    each.save()
                    each.finalize("success")
                write_predictions(folder, paths, task.records[name])
                write_results(folder, result)
        except UserError as error:
            failed[folder] = error
        else:
            finished.append(folder)
    if finished:
        comparison = compare_runs(finished, list(failed), one_pass)
        print_comparison(comparison, write_comparison(config.paths.output_dir, comparison))
        logger.info("Done: %s.", one_pass.describe(results[0].data["num_images"]))
    if failed:
        raise UserError(" ".join(map(str, failed.values())))


def _build_datamodule(config: DictConfig) -> ImageFolderDataModule | SyntheticDataModule:
    datamodule = build(config.datamodule, "datamodule")
    datamodule.setup("test")
    return datamodule


def _read_checkpoint(config: DictConfig) -> tuple[Path, CheckpointContents]:
    checkpoint = Path(config.eval.ckpt).expanduser()
    return checkpoint, read_checkpoint(checkpoint)


def _build_loaded_model(
    config: DictConfig, checkpoint: Path, contents: CheckpointContents
) -> tuple[T2TViT, bool, list[int]]:
    """The model with its weights, whether its random features are drawn from the seeds, and the seeds."""
    model = build_model(config.model)
    load_contents(model, contents, checkpoint)
    redraw = _redraws(config, holds_random_features(contents, model))
    return model, redraw, _seeds(config, model)


def _provenance(
    config: DictConfig,
    trainer: Trainer,
    datamodule: ImageFolderDataModule | SyntheticDataModule,
    sha256: str,
    model: T2TViT,
    seeds: list[int],
    redraw: bool,
) -> dict[str, Any]:
    """What `Results` tells of where the figures come from."""
    return {
        "model": config.model.name,
        "attention": attention_name(config.model, model),
        "checkpoint": {"path": str(config.eval.ckpt), "sha256": sha256},
        "data": {
            "dir": str(datamodule.data_dir),
            "split": datamodule.test_split,
            "num_images": len(datamodule.test_dataset),
            "num_classes": config.model.num_classes,
        },
        "image_size": config.model.image_size,
        "precision": str(trainer.precision),
        "device": device_name(trainer),
        "seeds": seeds,
        "versions": package_versions(),
        "command": command_line(),
        "attention_options": attention_options(model),
        "attention_memory": attention_memory_fraction(model),
        "random_features": _origin_of_random_features(model, redraw),
    }


def _make_forward(model: nn.Module, fast: bool, compile_form: bool) -> Forward:
    """What is evaluated in place of a model that is on its device and in its dtype."""
    return _runner(inference_form(model) if fast else model, model, compile_form)


class _SharedForms:
    """`_make_forward` for models that share their modules but for the token attentions: so do their inference forms."""

    def __init__(self, fast: bool, compile_form: bool) -> None:
        self._fast = fast
        self._compile_form = compile_form
        self._first: nn.Module | None = None

    def __call__(self, model: T2TViT) -> Forward:
        form = inference_form(model) if self._fast else model
        if self._first is None:
            self._first = form
        elif self._fast:
            # folded once more than is needed, and let go of here: never more than two copies
            share_modules(form, self._first, model.token_attentions)
        return _runner(form, model, self._compile_form)


def _runner(form: nn.Module, model: nn.Module, compile_form: bool) -> Forward:
    """A form of a model, compiled and recorded where that is asked for or pays."""
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


def _check_no_results(config: DictConfig) -> None:
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


def _tell_kept_rows(model: T2TViT, redraw: bool, prefix: str = "") -> None:
    if model.has_random_features and not redraw:
        logger.info("%sRandom features: those of the checkpoint; eval.redraw=true draws others", prefix)


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
