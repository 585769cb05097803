"""The runs of an evaluation, one per attention: classifier with weights and seeds, and metadata of its results."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger

from scatterbrain.errors import UserError
from src.checkpoints import CheckpointContents, holds_random_features, load_contents, read_checkpoint
from src.datamodules.image_folder import ImageFolderDataModule
from src.datamodules.synthetic import SyntheticDataModule
from src.distributed.loggers import build_loggers
from src.models.t2t_vit import T2TViT
from src.tasks.attention_info import attention_memory_fraction, attention_name, attention_options
from src.tasks.build import build_model
from src.tasks.classification_evaluation import MakeForward, SeededClassifier
from src.tasks.environment import device_name, package_versions
from src.tasks.errors import prefix_errors
from src.tasks.forward import ForwardFactory, share_modules
from src.utils.cli import command_line
from src.utils.files import sha256_of_file

logger = logging.getLogger(__name__)

DataModule = ImageFolderDataModule | SyntheticDataModule


@dataclass(frozen=True)
class EvaluationRun:
    """One attention of an evaluation.

    Args:
        output_dir: folder of its results.
        config: its configuration, as of a run of its own.
        classifier: its model with weights and seeds; all runs share the modules beside the attention.
        metadata: the fields of `Results` that are known before the test.
        loggers: of Lightning, for its metrics.
    """

    output_dir: Path
    config: DictConfig
    classifier: SeededClassifier
    metadata: dict[str, Any]
    loggers: Sequence[Logger]


def build_runs(config: DictConfig, trainer: Trainer, datamodule: DataModule, fast: bool) -> list[EvaluationRun]:
    """The runs of `config.runs`.

    Args:
        config: see `evaluate.with_runs`.
        trainer: of all runs.
        datamodule: of all runs, set up.
        fast: evaluate the inference models.

    Raises:
        UserError: a model, a checkpoint or a logger that does not fit.
    """
    all_loggers = [build_loggers(run.logger) for run in config.runs]
    checkpoint = Path(config.eval.ckpt).expanduser()
    contents = read_checkpoint(checkpoint)
    make_forward = ForwardFactory(fast, config.eval.compile, _full_batch(trainer, datamodule))
    classifiers: list[SeededClassifier] = []
    for run in config.runs:
        name = run.model.t2tattn1_cfg.name if config.compare else None
        with prefix_errors(name):
            log_level = logging.DEBUG if classifiers else logging.INFO
            classifier = build_classifier(run, checkpoint, contents, make_forward, name, log_level)
        if classifiers:
            share_modules(classifier.model, classifiers[0].model, classifier.model.token_attentions)
        classifiers.append(classifier)
    _log_single_evaluations(config, classifiers)
    sha256 = sha256_of_file(checkpoint)
    return [
        EvaluationRun(
            output_dir=Path(run.paths.output_dir),
            config=run,
            classifier=classifier,
            metadata=_metadata(run, trainer, datamodule, sha256, classifier),
            loggers=loggers,
        )
        for run, classifier, loggers in zip(config.runs, classifiers, all_loggers, strict=True)
    ]


def _full_batch(trainer: Trainer, datamodule: DataModule) -> int | None:
    """Images of a full batch where any batch may lack some; None where the first one is full."""
    if datamodule.on_error == "raise":
        return None
    return min(datamodule.batch_size, -(-len(datamodule.test_dataset) // trainer.world_size))


def build_classifier(
    config: DictConfig,
    checkpoint: Path,
    contents: CheckpointContents,
    make_forward: MakeForward | None = None,
    name: str | None = None,
    log_level: int = logging.INFO,
) -> SeededClassifier:
    """The model of a run with its weights and seeds; see `SeededClassifier` for `make_forward` and `name`.

    Raises:
        UserError: the checkpoint does not fit the model, or a seed that does not fit the checkpoint.
    """
    model = build_model(config.model)
    load_contents(model, contents, checkpoint, log_level=log_level)
    redraw = _uses_seeds(config, holds_random_features(contents, model))
    return SeededClassifier(model, _seeds(config, model), redraw, make_forward, name)


def _uses_seeds(config: DictConfig, stored: bool) -> bool:
    """Whether random features are drawn from the seeds, in place of those that a checkpoint was trained with.

    Args:
        config: the configuration.
        stored: whether the checkpoint holds random projections for the model's attention.
    """
    redraw, several = config.eval.redraw, config.eval.num_seeds > 1
    if redraw is False and several:
        raise UserError("eval.redraw=false keeps the checkpoint's random features. Leave out eval.num_seeds.")
    if redraw is False and not stored:
        raise UserError(
            f"eval.redraw=false, but {config.eval.ckpt} holds no random features for this attention. Leave it out."
        )
    return bool(redraw) or several or not stored


def _seeds(config: DictConfig, model: T2TViT) -> list[int]:
    """`eval.num_seeds` seeds from `seed` on; one for a model without random features."""
    number = config.eval.num_seeds if model.has_random_features else 1
    return [config.seed + offset for offset in range(number)]


def _log_single_evaluations(config: DictConfig, classifiers: Sequence[SeededClassifier]) -> None:
    """Log which attentions have no random features, so that several seeds are one evaluation."""
    if config.eval.num_seeds == 1:
        return
    names = [
        attention_name(run.model, classifier.model) or config.model.name
        for run, classifier in zip(config.runs, classifiers, strict=True)
        if not classifier.model.has_random_features
    ]
    if names:
        logger.info(
            "No random features in %s: eval.num_seeds=%d is one evaluation.", ", ".join(names), config.eval.num_seeds
        )


def _metadata(
    config: DictConfig, trainer: Trainer, datamodule: DataModule, sha256: str, classifier: SeededClassifier
) -> dict[str, Any]:
    return {
        **run_settings(config, datamodule, sha256, classifier, str(trainer.precision)),
        "device": device_name(trainer),
        "versions": package_versions(),
        "command": command_line(),
        "attention_memory": attention_memory_fraction(classifier.model),
    }


def run_settings(
    config: DictConfig, datamodule: DataModule, sha256: str, classifier: SeededClassifier, precision: str
) -> dict[str, Any]:
    """The fields of `Results` that follow from the configuration of a run, its data and its checkpoint alone.

    Args:
        config: of the run.
        datamodule: set up.
        sha256: of the checkpoint.
        classifier: see `build_classifier`.
        precision: Lightning's name of it.
    """
    model = classifier.model
    random_features = "seeds" if classifier.redraw else "checkpoint"
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
        "precision": precision,
        "seeds": classifier.seeds,
        "attention_options": attention_options(model),
        "random_features": random_features if model.has_random_features else None,
    }
