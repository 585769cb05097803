"""`mode=eval`: evaluate a checkpoint and write `results.json` and `predictions.csv`.

Ctrl-C and SIGTERM stop an evaluation after the current batch: both files are written for the images so far.
`eval.resume=true` resumes it there, and after a crash from the last save.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from munch import Munch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError
from pytorch_lightning import Trainer, seed_everything

from scatterbrain.errors import UserError
from src.datamodules.dataset import ImageError
from src.distributed.folder_lock import locked_folder
from src.distributed.interrupts import stop_on_interrupt
from src.distributed.launch import launch
from src.evaluation.results import Results
from src.tasks.attention_configs import attention_configs, requested_attentions
from src.tasks.build import uses_inference_model
from src.tasks.classification_evaluation import ClassificationEvaluation
from src.tasks.environment import peak_memory_mib, reset_peak_memory
from src.tasks.errors import WorkersLostError, explain_errors, prefix_errors
from src.tasks.evaluation_options import check_covers_all_images, check_evaluation_options
from src.tasks.evaluation_output import (
    collect_results,
    complete_comparison,
    list_skipped,
    log_skipped,
    log_start,
    log_stop,
    one_pass_of,
    skipped_images,
    write_runs,
)
from src.tasks.evaluation_runs import DataModule, build_runs
from src.tasks.resume import (
    check_output_folder,
    compared_settings,
    describe_evaluation,
    finished_results,
    open_resume_state,
    resume_hint,
)
from src.tasks.resume_state import ResumeState, resume_folder
from src.utils.instantiate import build, escape_interpolations

logger = logging.getLogger(__name__)


def evaluate(config: DictConfig) -> tuple[Results | list[Results], Munch]:
    """Results of the checkpoint `config.eval.ckpt` on the test split, with one attention or with several in one pass.

    With several devices there is one process for each, and this one only watches them. In a notebook:

        from hydra import compose, initialize_config_dir
        with initialize_config_dir("/path/to/configs", version_base="1.3"):
            config = compose("config", ["experiment=flowers-t2tvit-eval", "paths.output_dir=results"])
        results, objects = evaluate(config)

    Args:
        config: the composed configuration, see `configs/`; `paths.output_dir` is created if need be.

    Returns:
        The results (rank 0 also writes them to `config.paths.output_dir`), and the objects they come from: `model`,
        `datamodule`, `task`, `trainer`; no objects where the processes were several. With `config.eval.attentions`, a
        list of results, one for each (in the subfolders `0`, `1`, ..., as of a multirun, and compared in
        `config.paths.output_dir`), and `models` in place of `model`. With `config.eval.resume` and a finished
        evaluation in the folder, its results and no objects.

    Raises:
        UserError: anything in the configuration, the data or the checkpoint that does not fit.
        KeyboardInterrupt: after Ctrl-C, once the results of the images so far are written.
        SystemExit: with status 1, likewise after SIGTERM.
    """
    output_dir = _output_dir(config)
    check_evaluation_options(config)
    names = requested_attentions(config)
    run_configs = attention_configs(config, names) if names else [config]
    with locked_folder(output_dir):
        check_output_folder(config, run_configs)
        results, objects = launch(evaluate_runs, with_runs(config, run_configs))
    if results is None or not results[0].complete:
        raise SystemExit(1)  # no Exception, after which Hydra would start the next run of a multirun
    return results if names else results[0], objects


def _output_dir(config: DictConfig) -> str:
    try:
        return str(config.paths.output_dir)
    except InterpolationResolutionError as error:
        raise UserError(
            "Outside of run.py there is no folder for the results. Give one: compose(..., "
            "overrides=['paths.output_dir=FOLDER', ...])."
        ) from error


def with_runs(config: DictConfig, run_configs: Sequence[DictConfig]) -> DictConfig:
    """The configuration of all attentions, resolved, with that of each in `runs`.

    `compare` says whether the runs are those of `eval.attentions`, with folders and a comparison as of a multirun.
    """
    common = copy.deepcopy(config)
    OmegaConf.set_struct(common, False)
    common.eval.resume_hint = escape_interpolations(resume_hint(config))
    # each run has its own; an interpolation between options of the stages is valid there alone
    common.logger = common.model.t2tattn1_cfg = common.model.t2tattn2_cfg = None
    # resolved one by one, since interpolations start at the root
    content = OmegaConf.to_container(common, resolve=True)
    content["compare"] = run_configs[0] is not config
    content["runs"] = [OmegaConf.to_container(run, resolve=True) for run in run_configs]
    return OmegaConf.create(escape_interpolations(content))


def evaluate_runs(config: DictConfig, trainer: Trainer) -> tuple[list[Results] | None, Munch]:
    """Results of each run in this process; None where no image was evaluated, no objects where nothing was left to do.

    Args:
        config: see `with_runs`.
        trainer: with the devices of this process.
    """
    check_covers_all_images(trainer)
    fast = uses_inference_model(config.model, str(trainer.precision))
    seed_everything(config.seed, workers=True, verbose=False)

    # what is cheap to check comes first: data, then the models and their weights
    datamodule: DataModule = build(config.datamodule, "datamodule")
    datamodule.setup("test")
    runs = build_runs(config, trainer, datamodule, fast)
    metadata = [run.metadata for run in runs]
    compared = compared_settings(config, datamodule)
    finished = finished_results(
        config, [describe_evaluation([each], fast, compared) for each in metadata], datamodule.on_error
    )
    if finished:
        if trainer.is_global_zero:
            complete_comparison(config, finished)
            shutil.rmtree(resume_folder(config.paths.output_dir), ignore_errors=True)  # of a run killed at its end
            logger.info("%s holds this evaluation, and it is finished: nothing to do.", config.paths.output_dir)
        return finished, Munch()
    environment = {name: metadata[0][name] for name in ("device", "versions")}
    state = open_resume_state(config, trainer, datamodule, describe_evaluation(metadata, fast, compared), environment)

    @contextmanager
    def guard(name: str | None) -> Iterator[None]:
        with prefix_errors(name), explain_errors(datamodule.batch_size, _compile_option(config)):
            yield

    task = ClassificationEvaluation(
        [run.classifier for run in runs],
        num_images=len(datamodule.test_dataset),
        num_classes=config.model.num_classes,
        guard=guard,
        resume_state=state,
        device_times=config.compare,
        compiles=config.eval.compile,
    )
    log_start(config, runs, datamodule)
    reset_peak_memory(trainer)
    with stop_on_interrupt(state.request_stop, "batch") as interrupted:
        _test(config, trainer, task, datamodule, state)
        # the memory of a pass is not that of one attention
        one_pass, peak_memory = (
            (one_pass_of(runs, task, trainer), None) if config.compare else (None, peak_memory_mib(trainer))
        )
        device = trainer.strategy.root_device
        results = collect_results(runs, task, datamodule, fast, peak_memory, compared, one_pass, device)
        if trainer.is_global_zero:
            if results is not None:
                with _removed_at_end(state, task):
                    write_runs(config, runs, results, task, datamodule)
            log_skipped(task, datamodule)
            log_stop(task, config.eval.resume_hint)
    if interrupted.is_set():
        raise KeyboardInterrupt
    models = {run.classifier.name: run.classifier.model for run in runs}
    objects = {"models": models} if config.compare else {"model": runs[0].classifier.model}
    return results, Munch(**objects, datamodule=datamodule, task=task, trainer=trainer)


def _test(
    config: DictConfig,
    trainer: Trainer,
    task: ClassificationEvaluation,
    datamodule: DataModule,
    state: ResumeState,
) -> None:
    """Evaluate the images, all of them or until a stop is requested.

    Raises:
        UserError: see `explain_errors`; one of several processes was interrupted; no image can be decoded.
        KeyboardInterrupt: after a second Ctrl-C.
        SystemExit: a SIGTERM to all processes ended the data loader's workers, and so the loop; the state is saved.
    """
    try:
        with explain_errors(datamodule.batch_size, _compile_option(config)):
            trainer.test(task, datamodule=datamodule, verbose=False)
    except ImageError as error:
        raise UserError(f"{error} Or leave such images out: datamodule.on_error=skip") from error
    except (RuntimeError, WorkersLostError) as error:
        if not state.stop_requested:
            raise
        state.save()
        message = f"The evaluation stopped on request and is saved up to its last batch. {config.eval.resume_hint}"
        if trainer.world_size > 1:  # the other ranks must not wait for this one
            raise UserError(message) from error
        logger.warning("%s", message)
        raise SystemExit(1) from error
    if not task.stopped and len(task.skipped) == task.num_images:
        state.remove()
        raise UserError(
            f"None of the {task.num_images} images of {datamodule.test_dataset.root} can be decoded: "
            f"{list_skipped(skipped_images(task, datamodule))}. Give others, or fetch these again; python "
            "scripts/check_imagenet.py DIR --decode reports what is wrong with each."
        )


def _compile_option(config: DictConfig) -> str | None:
    return "eval.compile" if config.eval.compile else None


@contextmanager
def _removed_at_end(state: ResumeState, task: ClassificationEvaluation) -> Iterator[None]:
    """Remove the resume state once the results of all images are written, or cannot be."""
    try:
        yield
    except UserError:
        state.remove()
        raise
    if not task.stopped:
        state.remove()
