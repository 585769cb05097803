"""`mode=eval`: evaluate a checkpoint and write `results.json` and `predictions.csv`.

Ctrl-C and SIGTERM end an evaluation after the batch in hand: both files are written of the images so far, and
`eval.resume=true` goes on from there, as it does after a crash from the last save.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from munch import Munch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer, seed_everything
from pytorch_lightning.loggers import Logger
from rich.console import Console
from torch import nn

from scatterbrain.errors import UserError, check_switch, check_whole_number, is_number
from src.checkpoints import CheckpointContents, holds_random_features, load_contents, read_checkpoint
from src.datamodules.image_folder import ImageFolderDataModule
from src.datamodules.synthetic import SyntheticDataModule
from src.distributed.launch import WorkersLostError, check_common_options, explained, launch
from src.evaluation.comparison import OnePass, compare_runs, print_comparison, write_comparison
from src.evaluation.results import (
    RESULTS_FILE,
    Results,
    read_results,
    results_table,
    skipped_info,
    summarise,
    write_predictions,
    write_results,
)
from src.models.inference import inference_model
from src.models.t2t_vit import T2TViT
from src.tasks.attentions import attention_configs, chosen_attentions, naming, share_modules
from src.tasks.build import attention_name, build, build_group, build_model, runs_inference_form
from src.tasks.checkpoints import stop_on_interrupt
from src.tasks.classification import Classification, Draws, ImageClassification, SeveralClassifications
from src.tasks.provenance import (
    attention_memory_fraction,
    attention_options,
    command_line,
    device_name,
    package_versions,
    peak_memory_mib,
    reset_peak_memory,
)
from src.tasks.unfinished import UnfinishedEvaluation, names_digest, unfinished_folder
from src.utils.files import sha256_of_file
from src.utils.static_shapes import CudaGraphForward, Forward, PaddedForward, compiled
from src.utils.text import abbreviate

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
        and compared in `config.paths.output_dir`), and `models` in place of `model`. With `config.eval.resume` and a
        finished evaluation in the folder, its results and no objects.

    Raises:
        UserError: anything in the configuration, the data or the checkpoint that does not fit.
        KeyboardInterrupt: after Ctrl-C, once what was evaluated so far is written.
        SystemExit: with status 1, likewise after SIGTERM.
    """
    _check_options(config)
    names = chosen_attentions(config)
    configs = attention_configs(config, names) if names else []
    finished = _finished_results(config, configs or [config])
    if finished:
        logger.info("%s holds this evaluation, and it is finished: nothing to do.", config.paths.output_dir)
        return finished if names else finished[0], Munch()
    common = copy.deepcopy(config)
    OmegaConf.set_struct(common, False)
    common.eval.going_on = _how_to_go_on(config)
    if not names:
        results, objects = launch(_evaluate, common, finishes_on_sigterm=True)
        return _complete(results), objects
    # each attention has its own; an interpolation between options of the stages has a meaning there alone
    common.logger = common.model.t2tattn1_cfg = common.model.t2tattn2_cfg = None
    # resolved one by one, since interpolations start at the root
    content = OmegaConf.to_container(common, resolve=True)
    content["runs"] = [OmegaConf.to_container(own, resolve=True) for own in configs]
    results, objects = launch(_evaluate_attentions, OmegaConf.create(content), finishes_on_sigterm=True)
    for result in results:
        _complete(result)
    return results, objects


def _complete(results: Results | None) -> Results:
    """Results of all images; those of a part are written, but are none to go on with."""
    if results is None or not results.complete:
        raise SystemExit(1)  # no Exception, for which Hydra would begin with the next run of a multirun
    return results


def _evaluate(config: DictConfig, trainer: Trainer) -> tuple[Results | None, Munch]:
    """`evaluate` of one attention in this process; None where it was stopped before the first image."""
    _check_limits(trainer)
    fast = runs_inference_form(config.model, str(trainer.precision))
    seed_everything(config.seed, workers=True, verbose=False)

    # what is cheap to check comes first: data, then the model and its weights
    datamodule = _build_datamodule(config)
    checkpoint, contents = _read_checkpoint(config)
    model, redraw, seeds = _build_loaded_model(config, checkpoint, contents)
    provenance = _provenance(config, trainer, datamodule, sha256_of_file(checkpoint), model, seeds, redraw)
    unfinished = _unfinished(config, trainer, datamodule, [provenance], fast)
    num_images = len(datamodule.test_dataset)
    task = ImageClassification(
        model,
        num_images=num_images,
        num_classes=config.model.num_classes,
        seeds=seeds,
        redraw=redraw,
        make_forward=functools.partial(
            _make_forward, fast=fast, compile_form=config.eval.compile, batch_size=_full_batch(trainer, datamodule)
        ),
        unfinished=unfinished,
    )
    logger.info(
        "Evaluating %s with attention %s on %d images of %s",
        config.model.name,
        attention_name(config.model, model) or "of its own",
        num_images,
        datamodule.test_dataset.root,
    )
    _tell_kept_rows(model, redraw)
    reset_peak_memory(trainer)
    with stop_on_interrupt(unfinished.ask_to_stop, "batch") as interrupted:
        _test(config, trainer, task, datamodule, unfinished)
        results = None
        if task.records is not None:
            results = Results(
                **_with_skipped(provenance, datamodule, task),
                images_per_second=task.images_per_second,
                peak_memory_mib=peak_memory_mib(trainer),
                seconds=task.seconds,
                fast=fast,
                complete=not task.stopped,
                num_evaluated=len(task.evaluated),
                **summarise(task.records),
            )
        if trainer.is_global_zero:
            output_dir = Path(config.paths.output_dir)
            if results is not None:
                with _removing(unfinished, task):
                    write_predictions(output_dir, _paths_of(datamodule, task), task.records)
                    write_results(output_dir, results)
                Console().print(results_table(results, results.published))
                logger.info("Results: %s", output_dir / RESULTS_FILE)
            _tell_skipped(datamodule, task)
            _tell_stop(config, task)
    if interrupted.is_set():
        raise KeyboardInterrupt
    return results, Munch(model=model, datamodule=datamodule, task=task, trainer=trainer)


def _evaluate_attentions(config: DictConfig, trainer: Trainer) -> tuple[list[Results | None], Munch]:
    """`evaluate` of several attentions in this process: `config.runs` holds the configuration of each."""
    _check_limits(trainer)
    fast = runs_inference_form(config.model, str(trainer.precision))
    seed_everything(config.seed, workers=True, verbose=False)

    datamodule = _build_datamodule(config)
    checkpoint, contents = _read_checkpoint(config)
    make_forward = _SharedForms(fast, config.eval.compile, _full_batch(trainer, datamodule))
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
    sha256 = sha256_of_file(checkpoint)
    provenances = [
        _provenance(run, trainer, datamodule, sha256, each.model, each.seeds, each.redraw)
        for run, each in zip(config.runs, draws.values(), strict=True)
    ]
    unfinished = _unfinished(config, trainer, datamodule, provenances, fast)
    task = SeveralClassifications(draws, num_images, config.model.num_classes, guard, unfinished)
    passes = sum(len(each.seeds) for each in draws.values())
    logger.info(
        "Evaluating %s with %d attention(s), %s: %d forward passes of each of %d images of %s",
        *(config.model.name, len(draws), ", ".join(draws), passes, num_images, datamodule.test_dataset.root),
    )
    for name, each in draws.items():
        _tell_kept_rows(each.model, each.redraw, f"{name}: ")
    reset_peak_memory(trainer)
    with stop_on_interrupt(unfinished.ask_to_stop, "batch") as interrupted:
        _test(config, trainer, task, datamodule, unfinished)
        results = [
            None
            if task.records[name] is None
            else Results(
                **_with_skipped(provenance, datamodule, task),
                images_per_second=task.images_per_second[name],
                peak_memory_mib=None,  # that of the pass says nothing of one attention
                seconds=task.device_seconds[name],
                fast=fast,
                complete=not task.stopped,
                num_evaluated=len(task.evaluated),
                **summarise(task.records[name]),
            )
            for name, provenance in zip(draws, provenances, strict=True)
        ]
        if trainer.is_global_zero:
            one_pass = OnePass(
                attentions=len(draws),
                forward_passes=passes,
                seconds=task.seconds,
                peak_memory_mib=peak_memory_mib(trainer),
            )
            if None not in results:
                with _removing(unfinished, task):
                    _write_attentions(config, results, task, _paths_of(datamodule, task), loggers, one_pass)
            _tell_skipped(datamodule, task)
            _tell_stop(config, task)
    if interrupted.is_set():
        raise KeyboardInterrupt
    models = {name: each.model for name, each in draws.items()}
    return results, Munch(models=models, datamodule=datamodule, task=task, trainer=trainer)


def _write_attentions(
    config: DictConfig,
    results: Sequence[Results],
    task: SeveralClassifications,
    paths: Sequence[str | Path],
    loggers: Sequence[Sequence[Logger]],
    one_pass: OnePass,
) -> None:
    """Leave what a multirun leaves: a folder for each attention, and the comparison of those that gave numbers.

    Of a part of the images, there is neither comparison nor anything for the loggers.

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
                for each in () if task.stopped else its_loggers:  # as Lightning logs the figures of a test
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
    if finished and not task.stopped:
        comparison = compare_runs(finished, list(failed), one_pass)
        print_comparison(comparison, write_comparison(config.paths.output_dir, comparison))
        logger.info("Done: %s.", one_pass.describe(results[0].data["num_images"]))
    if failed:
        raise UserError(" ".join(map(str, failed.values())))


def _test(
    config: DictConfig,
    trainer: Trainer,
    task: Classification,
    datamodule: ImageFolderDataModule | SyntheticDataModule,
    unfinished: UnfinishedEvaluation,
) -> None:
    """Go over the images, to their end or until asked to stop.

    Raises:
        UserError: see `explained`; one of several processes broke off, see below; no image can be decoded.
        KeyboardInterrupt: after a second Ctrl-C.
        SystemExit: a SIGTERM to all processes ended those that decode, and so the loop; what is finished is saved.
    """
    try:
        with explained(datamodule.batch_size, "eval.compile" if config.eval.compile else None):
            trainer.test(task, datamodule=datamodule, verbose=False)
    except (RuntimeError, WorkersLostError) as error:
        if not unfinished.asked_to_stop:
            raise
        unfinished.save()
        message = (
            f"The evaluation stopped because it was asked to, and is saved as far as it is. {config.eval.going_on}"
        )
        if trainer.world_size > 1:  # the others must not wait for this one
            raise UserError(message) from error
        logger.warning("%s", message)
        raise SystemExit(1) from error
    if not task.stopped and len(task.skipped) == task.num_images:
        unfinished.remove()
        raise UserError(
            f"None of the {task.num_images} images of {datamodule.test_dataset.root} can be decoded: "
            f"{_described(_skipped_names(datamodule, task))}. Give others, or fetch these again; python "
            "scripts/check_imagenet.py DIR --decode tells what is wrong with each."
        )


def _paths_of(datamodule: ImageFolderDataModule | SyntheticDataModule, task: Classification) -> list[str | Path]:
    """Names of the images that were evaluated."""
    paths = datamodule.test_dataset.paths
    return [paths[index] for index in task.evaluated]


def _skipped_names(
    datamodule: ImageFolderDataModule | SyntheticDataModule, task: Classification
) -> dict[str | Path, str]:
    """Names of the images that were left out, and why."""
    paths = datamodule.test_dataset.paths
    return {paths[index]: reason for index, reason in sorted(task.skipped.items())}


def _with_skipped(
    provenance: dict[str, Any], datamodule: ImageFolderDataModule | SyntheticDataModule, task: Classification
) -> dict[str, Any]:
    """Where the figures come from, once it is known which images they are not of."""
    if datamodule.on_error == "raise":
        return provenance
    data = {**provenance["data"], "num_images": task.num_images - len(task.skipped)}
    return {**provenance, "data": data, "skipped": skipped_info(_skipped_names(datamodule, task))}


def _tell_skipped(datamodule: ImageFolderDataModule | SyntheticDataModule, task: Classification) -> None:
    if task.skipped:
        logger.warning(
            "%s of %s images of %s cannot be decoded and were left out (datamodule.on_error=skip), see %s: %s",
            *(f"{len(task.skipped):,}", f"{task.num_images:,}", datamodule.test_dataset.root, RESULTS_FILE),
            _described(_skipped_names(datamodule, task)),
        )


def _described(skipped: dict[str | Path, str]) -> str:
    """The first few of them in words."""
    return abbreviate(f"{name} ({reason})" for name, reason in skipped.items())


@contextmanager
def _removing(unfinished: UnfinishedEvaluation, task: Classification) -> Iterator[None]:
    """Once everything is written, remove what was for going on; likewise where there are no figures to write."""
    try:
        yield
    except UserError:
        unfinished.remove()
        raise
    if not task.stopped:
        unfinished.remove()


def _tell_stop(config: DictConfig, task: Classification) -> None:
    if task.stopped:
        logger.warning(
            "The evaluation stopped after %s of %s images because it was asked to. %s",
            *(f"{len(task.evaluated):,}", f"{task.num_images:,}", config.eval.going_on),
        )


def _how_to_go_on(config: DictConfig) -> str:
    """What to do after an interruption; asked of Hydra here, since further processes do not have it."""
    option = f"hydra.run.dir={config.paths.output_dir}"
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        option = f"hydra.sweep.dir={Path(HydraConfig.get().sweep.dir).absolute()}"
    return f"The same command with eval.resume=true {option} goes on from there."


def _unfinished(
    config: DictConfig,
    trainer: Trainer,
    datamodule: ImageFolderDataModule | SyntheticDataModule,
    provenances: Sequence[dict[str, Any]],
    fast: bool,
) -> UnfinishedEvaluation:
    """What is finished of the evaluation in the folder, for the data module to leave out.

    Raises:
        UserError: that is another evaluation, or one that left out images which are errors now.
    """
    dataset, first = datamodule.test_dataset, provenances[0]
    loading = ("interpolation", "crop_pct", "mean", "std", "num_distinct")
    options = {name: config.datamodule[name] for name in ("batch_size", *loading) if name in config.datamodule}
    of_attentions = {
        name: [each[name] for each in provenances]
        for name in ("attention", "attention_options", "random_features", "seeds")
    }
    if len(provenances) == 1:
        of_attentions = {name: values[0] for name, values in of_attentions.items()}
    description = {
        "model": first["model"],
        **of_attentions,
        "checkpoint.sha256": first["checkpoint"]["sha256"],
        "data.split": first["data"]["split"],
        "data.num_images": len(dataset),
        "data.names.sha256": names_digest(dataset.paths, dataset.targets),
        "model.num_classes": first["data"]["num_classes"],
        **{name: first[name] for name in ("image_size", "precision")},
        "model.fast": fast,
        "eval.compile": config.eval.compile,
        "trainer.devices": trainer.world_size,
        "datamodule": OmegaConf.to_container(OmegaConf.create(options), resolve=True),
    }
    circumstances = {name: first[name] for name in ("device", "versions")}
    unfinished = UnfinishedEvaluation(
        config.paths.output_dir, description, circumstances, trainer.global_rank, config.eval.save_seconds
    )
    if unfinished.skipped and datamodule.on_error == "raise":
        skipped = {dataset.paths[index]: reason for index, reason in unfinished.skipped.items()}
        raise UserError(
            f"{config.paths.output_dir} holds an unfinished evaluation that left out {len(skipped)} images, which "
            f"could not be decoded: {_described(skipped)}. Give datamodule.on_error=skip to go on with it, or choose "
            "another hydra.run.dir."
        )
    if unfinished.num_saved:
        logger.info("Going on with the evaluation in %s.", config.paths.output_dir)
        load_all = datamodule.test_dataloader
        datamodule.test_dataloader = lambda: unfinished.rest_of(load_all())
    return unfinished


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


def _full_batch(trainer: Trainer, datamodule: ImageFolderDataModule | SyntheticDataModule) -> int | None:
    """Images of a full batch where any batch, the first one too, may lack some; None where the first one is full."""
    if datamodule.on_error == "raise":
        return None
    return min(datamodule.batch_size, -(-len(datamodule.test_dataset) // trainer.world_size))


def _make_forward(model: nn.Module, fast: bool, compile_form: bool, batch_size: int | None = None) -> Forward:
    """What is evaluated in place of a model that is on its device and in its dtype."""
    return _runner(inference_model(model) if fast else model, model, compile_form, batch_size)


class _SharedForms:
    """`_make_forward` for models that share their modules but for the token attentions: so do their inference forms."""

    def __init__(self, fast: bool, compile_form: bool, batch_size: int | None = None) -> None:
        self._fast = fast
        self._compile_form = compile_form
        self._batch_size = batch_size
        self._first: nn.Module | None = None

    def __call__(self, model: T2TViT) -> Forward:
        form = inference_model(model) if self._fast else model
        if self._first is None:
            self._first = form
        elif self._fast:
            # folded once more than is needed, and let go of here: never more than two copies
            share_modules(form, self._first, model.token_attentions)
        return _runner(form, model, self._compile_form, self._batch_size)


def _runner(form: nn.Module, model: nn.Module, compile_form: bool, batch_size: int | None) -> Forward:
    """A form of a model, compiled and recorded where that is asked for or pays."""
    on_cuda = next(model.parameters()).device.type == "cuda"
    if not compile_form and (form is model or not on_cuda):
        return form
    forward = compiled(form) if compile_form else form
    return PaddedForward(CudaGraphForward(forward) if on_cuda else forward, batch_size)


def _check_options(config: DictConfig) -> None:
    """Check what no other part checks, before anything slow."""
    check_common_options(config)
    check_whole_number("eval.num_seeds", config.eval.num_seeds, 1)
    if config.eval.redraw not in (None, True, False):
        raise UserError(f"eval.redraw={config.eval.redraw!r} is not valid. Give true, false or null.")
    check_switch("eval.compile", config.eval.compile)
    check_switch("eval.resume", config.eval.resume)
    if not is_number(config.eval.save_seconds) or config.eval.save_seconds < 0:
        raise UserError(f"eval.save_seconds={config.eval.save_seconds!r} is not valid. Give seconds of at least 0.")
    if config.eval.ckpt is None:
        raise UserError(
            "No checkpoint given. Give eval.ckpt=/path/to/checkpoint, or set CHECKPOINT=/path in the file .env; "
            "scripts/download_checkpoint_t2t_vit.py fetches a published one."
        )


def _finished_results(config: DictConfig, configs: Sequence[DictConfig]) -> list[Results]:
    """Results of a finished evaluation to be resumed; none where there is something to evaluate.

    Args:
        config: the configuration of all.
        configs: that of each attention.

    Raises:
        UserError: the folder holds an evaluation that is not to be resumed, or cannot be.
    """
    output_dir = Path(config.paths.output_dir)
    folders = [Path(each.paths.output_dir) for each in configs]
    found = {folder: read_results(folder) for folder in folders if (folder / RESULTS_FILE).exists()}
    complete = [folder for folder, results in found.items() if results.complete]
    can_go_on = unfinished_folder(output_dir).exists()
    if config.eval.resume and len(complete) == len(folders):
        return list(found.values())
    if complete and not (config.eval.resume and can_go_on):
        raise UserError(
            f"{complete[0]} holds the results of an earlier run. Choose another hydra.run.dir, or move them away."
        )
    if (can_go_on or found) and not config.eval.resume:
        raise UserError(
            f"{output_dir} holds an unfinished evaluation. eval.resume=true goes on with it; or choose another "
            "hydra.run.dir."
        )
    return []


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
