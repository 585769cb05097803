"""The Lightning trainer of a configuration, on the devices and ranks there are."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import DictConfig
from pytorch_lightning import Trainer
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.callbacks import ProgressBar

from scatterbrain.errors import UserError
from src.distributed.launcher import find_launch, in_slurm
from src.distributed.loggers import build_loggers
from src.utils.instantiate import build, build_group


def build_trainer(config: DictConfig) -> Trainer:
    """The trainer with its loggers and callbacks.

    Raises:
        UserError: an option that does not fit, a strategy that would start its own processes, or another number of
            devices than torchrun or SLURM started processes for.
    """
    strategy = str(config.trainer.strategy)
    if any(word in strategy for word in ("spawn", "fork", "notebook")):
        raise UserError(
            f"trainer.strategy={strategy} is not supported. Leave trainer.strategy=auto: each device has its process."
        )
    _check_accelerator(config.trainer.accelerator)
    environment = _cluster_environment(config.trainer)
    callbacks = build_group(config.callbacks, "callbacks")
    options: dict[str, Any] = {}
    if environment is not None:
        plugins = config.trainer.get("plugins") or []
        options["plugins"] = [*(build(plugin, "trainer.plugins") for plugin in plugins), environment]
    return build(
        config.trainer,
        "trainer",
        **options,
        logger=build_loggers(config.logger) or False,
        callbacks=callbacks,
        # otherwise Lightning adds its own
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )


def _check_accelerator(accelerator: Any) -> None:
    """Refuse an accelerator that this machine lacks.

    Raises:
        UserError: there is no such device.
    """
    available = {name: entry["accelerator"].is_available() for name, entry in AcceleratorRegistry.items()}
    available["gpu"] = available["cuda"] or available["mps"]
    if not available.get(accelerator, True):
        raise UserError(
            f"trainer.accelerator={accelerator}, but PyTorch finds no such device on this machine. Use "
            "trainer.accelerator=auto, which takes what there is."
        )


def _cluster_environment(trainer: DictConfig) -> ClusterEnvironment | None:
    """How the trainer's processes were started, where Lightning would not detect it.

    Raises:
        UserError: torchrun or SLURM started another number of processes than the options say.
    """
    launch = find_launch()
    if launch is None:
        if trainer.num_nodes != 1:
            raise UserError(
                f"trainer.num_nodes={trainer.num_nodes}, but this command was started on one machine alone. Start it "
                "by torchrun or srun on every machine, or leave trainer.num_nodes=1."
            )
        # a single SLURM task may have several devices, for each of which `launch` starts a process
        return LightningEnvironment() if in_slurm() else None
    devices, num_nodes = str(trainer.devices), trainer.num_nodes
    if (devices.isdigit() and int(devices) != launch.per_node) or num_nodes != launch.num_nodes:
        raise UserError(
            f"{launch.launcher} started {launch.world_size} process(es), {launch.per_node} on each of "
            f"{launch.num_nodes} machine(s), but trainer.devices={devices} and trainer.num_nodes={num_nodes}. Give "
            f"trainer.devices={launch.per_node} trainer.num_nodes={launch.num_nodes}, or trainer="
            f"{launch.launcher.lower()}, which takes them from there."
        )
    # Lightning must not requeue the job: it would resume from a checkpoint of its own
    return SLURMEnvironment(auto_requeue=False) if launch.launcher == "SLURM" else TorchElasticEnvironment()


def check_num_processes(trainer: Trainer, number: int) -> None:
    """Refuse more processes than a machine without accelerators can run.

    Raises:
        UserError: there are more than cores, and more than the few that a test may start.
    """
    most = max(8, os.cpu_count() or 1)
    if trainer.strategy.root_device.type == "cpu" and number > most:
        raise UserError(
            f"trainer.devices={number} starts as many processes, but this machine has {os.cpu_count()} cores. Give at "
            f"most trainer.devices={most}."
        )


def quiet_libraries() -> None:
    """Suppress what libraries log at every start, and warnings the user cannot act on."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # torch.compile, of CUDA_HOME without a GPU
    for message in (
        ".*does not have many workers.*",
        ".*it is recommended to use `Trainer\\(devices=1.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        # data module and task each override the hooks they need
        ".*You have overridden `transfer_batch_to_device` in `LightningModule`.*",
        # a resumed training finds its own logs, and starts within an epoch
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*your dataloader is not resumable.*",
        # of a rank that was stopped before its first batch, or had few batches left after a resume
        ".*The ``compute`` method of metric .* was called before the ``update`` method.*",
        # metrics that are reduced over the ranks already
        ".*It is recommended to use `self.log\\(.*sync_dist=True\\)`.*",
        # the logging interval does not matter to a small data set
        ".*is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)
