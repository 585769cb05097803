"""From a configuration to a trainer, in this process or in one process per device."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from munch import Munch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.strategies import ParallelStrategy

from scatterbrain.errors import UserError, check_whole_number
from src.distributed.processes import run_processes
from src.distributed.ranks import barrier, find_launch, in_slurm
from src.tasks.build import build, build_group
from src.tasks.checkpoints import stop_on_interrupt

logger = logging.getLogger(__name__)

# What seed_everything takes, less room for the seeds of further draws.
MAX_SEED = 2**31 - 1
# What torch's loader says where a process of it has gone.
_LOST_WORKER = "DataLoader worker"
# What a mode does: its summary, which can be sent from process to process, and the objects it comes from.
Work = Callable[[DictConfig, Trainer], tuple[Any, Munch]]


class WorkersLostError(UserError):
    """A process that loads images has ended before its time."""


def check_common_options(config: DictConfig) -> None:
    """Check what every mode takes and no other part checks, before anything slow.

    Raises:
        UserError: a value that is not valid.
    """
    check_whole_number("seed", config.seed, 0, MAX_SEED)
    # the data module reads these two through its own options, and would name those
    check_whole_number("model.image_size", config.model.image_size, 1)
    check_whole_number("model.num_classes", config.model.num_classes, 1)


def launch(work: Work, config: DictConfig, finishes_on_sigterm: bool = False) -> tuple[Any, Munch]:
    """Call `work(config, trainer)`, in one process for each device where there are several.

    Args:
        work: a function of a module, not a closure.
        config: the composed configuration, see `configs/`.
        finishes_on_sigterm: whether `work` comes to an end by itself after SIGTERM. Several processes then get one on
            Ctrl-C or SIGTERM, in place of being ended at once.

    Returns:
        What `work` returns in the first process; the objects only where this process did the work.

    Raises:
        UserError: the trainer cannot be built, or what `work` raises.
        KeyboardInterrupt: after Ctrl-C.
    """
    quiet_libraries()
    trainer = build_trainer(config)
    # none begins to write while another still checks what the folder holds
    barrier("checked")
    if number := _processes_to_start(trainer):
        # interpolations may ask Hydra, which the processes do not have
        content = OmegaConf.to_container(config, resolve=True)
        with _pass_on_requests_to_stop() if finishes_on_sigterm else nullcontext():
            return run_processes(_work_in_process, number, work, content, *_settings_of_process()), Munch()
    return work(config, trainer)


@contextmanager
def _pass_on_requests_to_stop() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into SIGTERM for all processes that this one started, and wait for their end."""

    def ask_to_stop() -> None:
        for process in multiprocessing.active_children():
            process.terminate()

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: ask_to_stop()) if in_main_thread else None
    with stop_on_interrupt(ask_to_stop) as interrupted:
        try:
            yield
        except UserError as error:  # they had not come far enough to save anything, or could not
            if not interrupted.is_set():
                raise
            logger.warning("%s", error)
        finally:
            if in_main_thread:
                signal.signal(signal.SIGTERM, previous)
    if interrupted.is_set():
        raise KeyboardInterrupt


def build_trainer(config: DictConfig) -> Trainer:
    """Build the trainer with its loggers and callbacks.

    Raises:
        UserError: an option that does not fit, a strategy whose processes would not be ours, or another number of
            devices than torchrun or SLURM started processes for.
    """
    strategy = str(config.trainer.strategy)
    if any(word in strategy for word in ("spawn", "fork", "notebook")):
        raise UserError(
            f"trainer.strategy={strategy} is not supported. Leave trainer.strategy=auto: each device has its process."
        )
    environment = _environment(config.trainer)
    plugins = config.trainer.get("plugins") or []
    callbacks = build_group(config.callbacks, "callbacks")
    return build(
        config.trainer,
        "trainer",
        **({} if environment is None else {"plugins": [*(build(x, "trainer.plugins") for x in plugins), environment]}),
        logger=build_group(config.logger, "logger") or False,
        callbacks=callbacks,
        # otherwise Lightning adds its own
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
    )


def _environment(trainer: DictConfig) -> ClusterEnvironment | None:
    """How the trainer's processes were started, where Lightning would not find out by itself.

    Raises:
        UserError: torchrun or SLURM started another number of processes than the options say.
    """
    launch = find_launch()
    if launch is None:
        # a single task of SLURM's may well have several devices, each of which gets its process here
        return LightningEnvironment() if in_slurm() else None
    devices, num_nodes = str(trainer.devices), trainer.num_nodes
    if (devices.isdigit() and int(devices) != launch.per_node) or num_nodes != launch.num_nodes:
        raise UserError(
            f"{launch.launcher} started {launch.world_size} process(es), {launch.per_node} on each of "
            f"{launch.num_nodes} machine(s), but trainer.devices={devices} and trainer.num_nodes={num_nodes}. Give "
            f"trainer.devices={launch.per_node} trainer.num_nodes={launch.num_nodes}, or trainer="
            f"{launch.launcher.lower()}, which takes them from there."
        )
    # not to be put into the queue again by Lightning: what it would go on from is not ours
    return SLURMEnvironment(auto_requeue=False) if launch.launcher == "SLURM" else TorchElasticEnvironment()


@contextmanager
def explained(batch_size: int, compiled_by: str | None = None) -> Iterator[None]:
    """Turn faults of the machine into errors that say what to do, and Lightning's exit after Ctrl-C back into Ctrl-C.

    Args:
        batch_size: the batch that may be too large.
        compiled_by: the option that asked for `torch.compile`; None where nothing is compiled.

    Raises:
        UserError: the device ran out of memory, or the compiler failed.
        WorkersLostError: a process that loads images was killed, or ran out of memory.
        KeyboardInterrupt: after Ctrl-C.
    """
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except torch.OutOfMemoryError as error:
        raise UserError(f"The device ran out of memory. Lower datamodule.batch_size (now {batch_size}).") from error
    except Exception as error:
        if isinstance(error, RuntimeError) and _LOST_WORKER in str(error):
            raise WorkersLostError(_describe_lost_worker(str(error), batch_size)) from error
        origin = type(error).__module__
        if compiled_by is not None and origin.startswith(("torch._inductor", "torch._dynamo")):
            first_line = str(error).strip().splitlines()[0]
            raise UserError(
                f"torch.compile failed: {first_line.rstrip('.')}. Leave out {compiled_by}=true, or install the "
                "compiler."
            ) from error
        raise


def _describe_lost_worker(message: str, batch_size: int) -> str:
    told = (
        f"A process that loads images ended before its work was done ({message.strip().splitlines()[0].rstrip('. ')})"
    )
    lower = f"Lower datamodule.num_workers or datamodule.batch_size (now {batch_size})"
    if "shared memory" in message:
        return f"{told}. {lower}, or give a container more shared memory: docker run --shm-size=8g."
    return f"{told}, often for lack of memory. {lower}."


def quiet_libraries() -> None:
    """Leave out what libraries say about themselves at every start, and what the user cannot act on."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # torch.compile, of CUDA_HOME without a GPU
    for message in (
        ".*does not have many workers.*",
        ".*it is recommended to use `Trainer\\(devices=1.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        # each of the two has the hooks that are its own
        ".*You have overridden `transfer_batch_to_device` in `LightningModule`.*",
        # what a resumed training finds in its folder, and that it is in the middle of an epoch
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*your dataloader is not resumable.*",
        # of a process that was stopped before its first batch, or had finished all but the last ones
        ".*The ``compute`` method of metric .* was called before the ``update`` method.*",
        # figures that are of all processes already
        ".*It is recommended to use `self.log\\(.*sync_dist=True\\)`.*",
        # the logging interval is of no use to a small data set
        ".*is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)


def _processes_to_start(trainer: Trainer) -> int:
    """How many processes of this machine the trainer counts on: its devices, or 0 where it needs none.

    None are needed for a single device, and where torchrun or SLURM started them already.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ParallelStrategy) or strategy.cluster_environment is None:
        return 0
    return 0 if strategy.cluster_environment.creates_processes_externally else trainer.num_devices


def _work_in_process(
    work: Work, content: dict[str, Any], start_method: str, logging_config: dict[str, Any] | None
) -> Any:
    """`work` in one of several processes, of which the first speaks for all."""
    # spawned itself, it would spawn its data workers, which takes them seconds
    multiprocessing.set_start_method(start_method, force=True)
    if os.environ["LOCAL_RANK"] == "0":
        configure_log(None if logging_config is None else OmegaConf.create(logging_config))
    else:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
    quiet_libraries()
    config = OmegaConf.create(content)
    return work(config, build_trainer(config))[0]


def _settings_of_process() -> tuple[str, dict[str, Any] | None]:
    """How this process starts others, and how it logs."""
    logging_config = None
    if HydraConfig.initialized():
        logging_config = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    return multiprocessing.get_start_method(), logging_config
