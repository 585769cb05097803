"""Which launcher started this process: torchrun, srun of SLURM, or none."""

from __future__ import annotations

import os
from dataclasses import dataclass

from scatterbrain.errors import UserError

# Variables that Lightning and torch read as numbers, some of them when they are imported.
_NUMBERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
    *("MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NNODES"),
)
_RANK_AND_SIZE = {"torchrun": ("RANK", "WORLD_SIZE"), "SLURM": ("SLURM_PROCID", "SLURM_NTASKS")}


@dataclass(frozen=True)
class Launch:
    """This process among those that were started for one run.

    Args:
        launcher: what started them, `"torchrun"` or `"SLURM"`.
        rank: this process, in [0, world_size).
        world_size: number of processes.
        num_nodes: number of machines.
    """

    launcher: str
    rank: int
    world_size: int
    num_nodes: int

    @property
    def per_node(self) -> int:
        """Processes on each machine.

        Raises:
            UserError: the machines have different numbers of them.
        """
        if self.world_size % self.num_nodes:
            raise UserError(
                f"{self.launcher} started {self.world_size} processes on {self.num_nodes} machines. Start the same "
                "number on each."
            )
        return self.world_size // self.num_nodes


def find_launch() -> Launch | None:
    """How the environment says this process was started; None where it is the only one of its run.

    Raises:
        UserError: a variable of torchrun or SLURM is missing or no number.
    """
    for name in _NUMBERS:
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit()):
            raise UserError(
                f"The environment variable {name}={value!r} is not a whole number. Unset it, or start the processes by "
                "torchrun or srun, which set it."
            )
    try:
        launch = _read_launch()
    except KeyError as error:
        raise UserError(f"The variable {error.args[0]} is not set. Start the processes by torchrun or srun.") from None
    if launch is not None and not (launch.rank < launch.world_size and launch.num_nodes >= 1):
        rank, size = _RANK_AND_SIZE[launch.launcher]
        raise UserError(
            f"The environment variables {rank}={launch.rank} and {size}={launch.world_size} of {launch.launcher} do "
            f"not fit, with {launch.num_nodes} machine(s): ranks begin at 0. Start the processes by torchrun or srun."
        )
    return launch


def _read_launch() -> Launch | None:
    if "TORCHELASTIC_RUN_ID" in os.environ:  # first: srun may have started torchrun
        rank, size, nodes = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE"))
        return Launch("torchrun", rank, size, nodes)
    # SLURM gives these names to interactive shells; Lightning tells them from srun in the same way
    if in_slurm() and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        size = int(os.environ["SLURM_NTASKS"])
        if size > 1:
            nodes = int(os.environ.get("SLURM_NNODES", 1))
            return Launch("SLURM", int(os.environ["SLURM_PROCID"]), size, nodes)
    return None


def in_slurm() -> bool:
    """Whether this process runs in a job of SLURM, alone or with others."""
    return "SLURM_NTASKS" in os.environ
