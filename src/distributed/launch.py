"""Runs the work of a mode with its trainer, in this process or in one process per device."""

from __future__ import annotations

import logging
import multiprocessing
import os
import warnings
from collections.abc import Callable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from munch import Munch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import ParallelStrategy

from src.distributed.interrupts import forward_to_children
from src.distributed.processes import run_processes
from src.distributed.ranks import barrier
from src.distributed.trainer import build_trainer, check_num_processes, quiet_libraries
from src.utils.cli import replace_what_cannot_be_encoded
from src.utils.instantiate import escape_interpolations

# The work of a mode: its summary, which can be sent between processes, and the objects it comes from.
Work = Callable[[DictConfig, Trainer], tuple[Any, Munch]]


def launch(work: Work, config: DictConfig) -> tuple[Any, Munch]:
    """What `work(config, trainer)` returns, called in one process per device where there are several.

    Several processes get SIGTERM on Ctrl-C or SIGTERM, after which `work` has to save and return by itself.

    Args:
        work: a function of a module, not a closure.
        config: the composed configuration, see `configs/`.

    Returns:
        What `work` returns in the process of rank 0; the objects only where this process did the work.

    Raises:
        UserError: the trainer cannot be built, or what `work` raises.
        KeyboardInterrupt: after Ctrl-C.
    """
    quiet_libraries()
    trainer = build_trainer(config)
    # no rank begins to write while another still checks what the folder holds
    barrier("checked")
    if number := _processes_to_start(trainer):
        check_num_processes(trainer, number)
        # resolved here: interpolations may refer to Hydra, which the processes do not have
        content = escape_interpolations(OmegaConf.to_container(config, resolve=True))
        with forward_to_children():
            return run_processes(_work_in_process, number, work, content, *_process_settings()), Munch()
    return work(config, trainer)


def _processes_to_start(trainer: Trainer) -> int:
    """Number of processes that the trainer needs on this machine, one per device; 0 where this one is enough.

    It is enough for a single device, and where torchrun or SLURM started the processes already.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ParallelStrategy) or strategy.cluster_environment is None:
        return 0
    return 0 if strategy.cluster_environment.creates_processes_externally else trainer.num_devices


def _work_in_process(
    work: Work, content: dict[str, Any], start_method: str, logging_config: dict[str, Any] | None
) -> Any:
    """`work` in one of several processes, of which rank 0 alone logs."""
    # a spawned process would spawn its data workers, which takes them seconds
    multiprocessing.set_start_method(start_method, force=True)
    if os.environ["LOCAL_RANK"] == "0":
        configure_log(None if logging_config is None else OmegaConf.create(logging_config))
    else:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
    quiet_libraries()
    replace_what_cannot_be_encoded()
    config = OmegaConf.create(content)
    return work(config, build_trainer(config))[0]


def _process_settings() -> tuple[str, dict[str, Any] | None]:
    """How this process starts others, and how it logs."""
    logging_config = None
    if HydraConfig.initialized():
        logging_config = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    return multiprocessing.get_start_method(), logging_config
