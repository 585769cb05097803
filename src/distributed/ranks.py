"""The processes of one run that torchrun or srun of SLURM started: one folder, one voice, one end.

Each of them is the whole command. Here they find each other before they do anything else, so that process 0 alone
writes and speaks, all of them use its folder, and the first failure ends them all with one message. What they agree on
passes through the store that torch opens at MASTER_ADDR:MASTER_PORT, before and beside the process group.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from scatterbrain.errors import UserError

# Clusters start processes minutes apart; a process that never comes should still be told of.
ARRIVAL_SECONDS = 600.0
# A process that fails takes its peers' collectives down with it: how long to wait for the one that knows why.
REASON_SECONDS = 5.0
# After a failure elsewhere, for a process to come to its own end, which a collective may keep it from.
GRACE_SECONDS = 10.0
# How long process 0 waits for the others to leave: after a failure they may be unable to, before it does.
FAILURE_SECONDS = 3.0
EXIT_SECONDS = 30.0
_POLL_SECONDS = 0.2
# What gloo says where a process has gone; NCCL does not notice.
_BROKEN_CONNECTION = ("Connection closed by peer", "Connection reset by peer")
_KILLED = (
    "{who} ended before its work was done, often for lack of memory. Lower datamodule.batch_size, "
    "datamodule.num_workers or the number of processes on a machine."
)
# Where a job on a cluster leaves the message for the process that submitted it.
ERROR_FILE = "error.txt"


class PeersMissingError(UserError):
    """The processes of a run did not find each other."""


class PeerFailed(SystemExit):
    """Another process failed first, and has told why."""

    def __init__(self) -> None:
        super().__init__(1)


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
    """How this process was started, by the environment; None where it is the only one of its run.

    Raises:
        UserError: a variable of torchrun or SLURM is missing or no number.
    """
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:  # first: srun may have started torchrun
            rank, size, nodes = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE"))
            return Launch("torchrun", rank, size, nodes)
        # by the names that SLURM gives to interactive shells, as Lightning tells them from srun
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


class Peers:
    """The processes of a run; without a launcher, this one alone.

    Args:
        launch: see `find_launch`.

    Attributes:
        launch: as given.
        rank: this process, 0 where it is alone.

    Raises:
        PeersMissingError: the processes do not find each other.
    """

    def __init__(self, launch: Launch | None) -> None:
        self.launch = launch
        self.rank = 0 if launch is None else launch.rank
        self._store: Any = None
        self._told = False  # by this process
        self._is_told = False  # by another
        self._left = threading.Event()
        if launch is not None and launch.world_size > 1:
            self._store = _open_store(launch)
            threading.Thread(target=self._watch, daemon=True).start()
            if self.rank > 0:
                logging.disable(logging.CRITICAL)
                warnings.simplefilter("ignore")
            self._meet("arrived", ARRIVAL_SECONDS)

    def agree(self, name: str, value: str) -> str:
        """The value of process 0, under a name that is used once."""
        if self._store is None:
            return value
        if self.rank == 0:
            self._store.set(name, value)
        else:
            self._wait(name)
        return self._store.get(name).decode()

    def barrier(self, name: str) -> None:
        """Wait until every process is here, under a name that is used once.

        Raises:
            PeerFailed: one of them has failed.
        """
        if self._store is not None:
            self._meet(name)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call a function; where it fails, raise the failure in the process that failed first and end the others.

        Raises:
            PeerFailed: another process failed before.
        """
        try:
            return function()
        except Exception as error:
            # of anything but a plain reason, a peer may know more
            knows = isinstance(error, UserError | HydraException | OmegaConfBaseException)
            if not self._is_first_to_tell(0.0 if knows else REASON_SECONDS):
                raise PeerFailed from None
            if any(words in str(error) for words in _BROKEN_CONNECTION):
                raise UserError(_KILLED.format(who="A process")) from error
            raise

    def leave(self, complete: bool) -> None:
        """End together: after a failure at once, otherwise when all are done.

        Args:
            complete: whether the work is done; if not, the others are waited for, but not for long.

        Raises:
            PeerFailed: another process has failed while this one waited for it, or is gone.
        """
        if self._store is None:
            return
        failed_elsewhere = False
        try:
            if self._told:
                sys.stdout.flush()
                sys.stderr.flush()
                self._store.set("failed", "")  # not before the message is out: launchers end what is left
            elif not self._has("claimed"):
                try:
                    self._meet("done", None if complete else EXIT_SECONDS)
                except PeerFailed:
                    failed_elsewhere = True
            if self.rank == 0:  # it may hold the store, which the others need for their own last words
                self._wait_for_last()
            else:
                self._store.add("last", 1)
        except (RuntimeError, PeersMissingError):  # a peer has gone without a word
            if complete:
                self._tell_of_process_0()
                raise PeerFailed from None
        finally:
            self._left.set()
        if failed_elsewhere:
            raise PeerFailed

    def _wait_for_last(self) -> None:
        deadline = time.monotonic() + (FAILURE_SECONDS if self._has("claimed") else EXIT_SECONDS)
        while time.monotonic() < deadline and self._store.add("last", 0) < self.launch.world_size - 1:
            time.sleep(_POLL_SECONDS / 4)

    def _is_first_to_tell(self, wait_seconds: float) -> bool:
        if self._store is None or self._told:
            return True
        try:
            deadline = time.monotonic() + wait_seconds
            while time.monotonic() < deadline and not self._has("claimed"):
                time.sleep(_POLL_SECONDS)
            rank = str(self.rank)
            self._told = self._store.compare_set("claimed", "", rank).decode() == rank
        except RuntimeError:  # process 0, which held the store, has gone
            self._told = wait_seconds == 0
            if not self._told:
                self._tell_of_process_0()
        return self._told

    def _meet(self, name: str, seconds: float | None = None) -> None:
        if self._store.add(f"{name}/number", 1) == self.launch.world_size:
            self._store.set(name, "")
        self._wait(name, seconds)

    def _wait(self, name: str, seconds: float | None = None) -> None:
        deadline = None if seconds is None else time.monotonic() + seconds
        while not self._has(name):
            if self._has("failed"):
                raise PeerFailed
            if deadline is not None and time.monotonic() > deadline:
                here = self._store.add(f"{name}/number", 0)
                raise PeersMissingError(
                    f"{here} of {self.launch.world_size} processes have come after {seconds:.0f} s. Start all of "
                    "them: by torchrun on every machine, or by srun in a job of SLURM."
                )
            time.sleep(_POLL_SECONDS / 4)

    def _has(self, name: str) -> bool:
        # asked for again and again, since a wait would keep the store from the other thread
        return self._store.check([name])

    def _watch(self) -> None:
        """End this process after a failure elsewhere, whatever it waits for."""
        try:
            while not self._left.wait(_POLL_SECONDS):
                if self._has("failed"):
                    self._is_told = True
                    break
        except RuntimeError:
            pass
        if not self._left.wait(GRACE_SECONDS):
            self._tell_of_process_0()
            os._exit(1)

    def _tell_of_process_0(self) -> None:
        """Where the store has gone and no failure was told of, process 0 was killed; one of the others says so."""
        if self.rank == 1 and not self._is_told:
            self._is_told = True
            print(f"Error: {_KILLED.format(who='Process 0')}", file=sys.stderr, flush=True)


_joined: Peers | None = None


@contextmanager
def joined() -> Iterator[Peers]:
    """The processes of this run, joined; within another `joined`, the same.

    Raises:
        PeersMissingError: they do not find each other.
        UserError: see `find_launch`.
    """
    global _joined
    if _joined is not None:
        yield _joined
        return
    _joined = peers = Peers(find_launch())
    complete = False
    try:
        yield peers
        complete = True
    finally:
        _joined = None
        peers.leave(complete)


def barrier(name: str) -> None:
    """Wait for the other processes of this run, if there are any, under a name that is used once."""
    if _joined is not None:
        _joined.barrier(name)


def silent_options(peers: Peers) -> list[str]:
    """What makes Hydra leave no files in a process that is not the first."""
    if peers.rank == 0:
        return []
    return [
        f"hydra.run.dir={Path.cwd()}",  # is there; the folder of process 0 takes its place
        "hydra.output_subdir=null",
        f"hydra.job_logging.handlers.file.filename={os.devnull}",
    ]


class FailedJobs(Callback):
    """Tells at the end of a multirun on a cluster what its jobs failed of; they have no other way to the terminal.

    Attributes:
        messages: one for each failed job of the last multirun.
    """

    messages: tuple[str, ...] = ()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read what the jobs have left in their folders.

        Args:
            config: the composed config, with `hydra.sweep.dir`.
            **kwargs: not used.
        """
        files = sorted(Path(config.hydra.sweep.dir).rglob(ERROR_FILE))
        FailedJobs.messages = tuple(f"{file.parent}: {file.read_text().strip()}" for file in files)
        for message in FailedJobs.messages:
            print(f"Error in {message}", file=sys.stderr, flush=True)


def _open_store(launch: Launch) -> Any:
    """The store of process 0, or of torchrun where that has one, with keys of our own."""
    from torch.distributed import PrefixStore, TCPStore

    if launch.launcher == "SLURM":
        from lightning_fabric.plugins.environments import SLURMEnvironment

        # Lightning accepts no other way to give their number
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.per_node))
        environment = SLURMEnvironment(auto_requeue=False)
        host, port = environment.main_address, environment.main_port
    else:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # multi_tenant: the process group, opened later, finds the same server
    is_master = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            host,
            port,
            is_master=is_master,
            timeout=timedelta(seconds=ARRIVAL_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise PeersMissingError(
            f"Process {launch.rank} of {launch.world_size} does not meet the others at {host}:{port}: {reason}. Start "
            "all of them, and see that MASTER_ADDR and MASTER_PORT name a machine and a free port that all reach."
        ) from error
    return PrefixStore(f"run/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
