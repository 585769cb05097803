"""Which launcher started this process: torchrun, srun of SLURM, or none."""

from __future__ import annotations

import os
from dataclasses import dataclass

from scatterbrain.errors import UserError


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
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # first: srun may have started torchrun
            rank, size, nodes = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE"))
            return Launch("torchrun", rank, size, nodes)
        # SLURM gives these names to interactive shells; Lightning tells them from srun in the same way
        if in_slurm() and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
            size = int(os.environ["SLURM_NTASKS"])
            if size > 1:
                nodes = int(os.environ.get("SLURM_NNODES", 1))
                return Launch("SLURM", int(os.environ["SLURM_PROCID"]), size, nodes)
    except KeyError as error:
        raise UserError(f"The variable {error.args[0]} is not set. Start the processes by torchrun or srun.") from None
    except ValueError as error:
        raise UserError(f"A variable of torchrun or SLURM is not valid: {error}. Start by torchrun or srun.") from None
    return None


def in_slurm() -> bool:
    """Whether this process runs in a job of SLURM, alone or with others."""
    return "SLURM_NTASKS" in os.environ
