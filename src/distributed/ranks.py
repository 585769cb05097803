"""Coordinates the ranks of a run that torchrun or srun started: output directory, logging, abort on first failure.

Each rank is the whole command. The ranks join before they do anything else: all use the output directory of rank 0,
rank 0 alone logs and writes, and the first failure aborts all of them with one message. They communicate through the
store that torch opens at MASTER_ADDR:MASTER_PORT, before and beside the process group.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from scatterbrain.errors import UserError
from src.distributed.launcher import Launch, find_launch
from src.distributed.timeouts import (
    ARRIVAL_SECONDS,
    EXIT_SECONDS,
    FAILURE_SECONDS,
    GRACE_SECONDS,
    NOTICE_SECONDS,
    POLL_SECONDS,
    REASON_SECONDS,
)

# What gloo reports when a process has exited; NCCL does not notice.
_BROKEN_CONNECTION = ("Connection closed by peer", "Connection reset by peer")
_KILLED = (
    "{who} ended before its work was done, often for lack of memory. Lower datamodule.batch_size, "
    "datamodule.num_workers or the number of processes on a machine."
)


class RanksMissingError(UserError):
    """The ranks of a run did not find each other."""


class RankFailed(SystemExit):
    """Another rank failed first, and has reported why."""

    def __init__(self) -> None:
        super().__init__(1)


class Ranks:
    """The ranks of a run; without a launcher, this process alone.

    Args:
        launch: see `find_launch`.

    Attributes:
        launch: as given.
        rank: this process, 0 where it is alone.

    Raises:
        RanksMissingError: the ranks do not find each other.
    """

    def __init__(self, launch: Launch | None) -> None:
        self.launch = launch
        self.rank = 0 if launch is None else launch.rank
        self._store: Any = None
        self._reports = False  # whether this rank reports the failure
        self._failed_elsewhere = False  # whether another rank has reported one
        self._left = threading.Event()
        if launch is not None and launch.world_size > 1:
            self._store = _open_store(launch)
            threading.Thread(target=self._watch, daemon=True).start()
            if self.rank > 0:
                logging.disable(logging.CRITICAL)
                warnings.simplefilter("ignore")
            self._meet("arrived", ARRIVAL_SECONDS)

    def broadcast(self, name: str, value: str) -> str:
        """The value of rank 0, under a name that is used once."""
        if self._store is None:
            return value
        if self.rank == 0:
            self._store.set(name, value)
        else:
            self._wait(name)
        return self._store.get(name).decode()

    def barrier(self, name: str) -> None:
        """Wait until every rank is here, under a name that is used once.

        Raises:
            RankFailed: one of them has failed.
        """
        if self._store is not None:
            self._meet(name)

    def call(self, function: Callable[[], Any]) -> Any:
        """What a function returns; where it fails, the rank that failed first raises the error, and all exit.

        Raises:
            RankFailed: another rank failed before.
        """
        try:
            return function()
        except Exception as error:
            # an error of the user's is the reason itself; anything else may follow from a failure of another rank
            is_reason = isinstance(error, UserError | HydraException | OmegaConfBaseException)
            if not self._claim_report(0.0 if is_reason else REASON_SECONDS):
                raise RankFailed from None
            if any(words in str(error) for words in _BROKEN_CONNECTION):
                raise UserError(_KILLED.format(who="A process")) from error
            raise

    def leave(self, complete: bool) -> None:
        """Exit together: after a failure at once, otherwise when all are done.

        Args:
            complete: whether the work is done; if not, the others are waited for, but not for long.

        Raises:
            RankFailed: another rank has failed while this one waited for it, or has exited.
        """
        if self._store is None:
            return
        failed_elsewhere = False
        try:
            if self._reports:
                sys.stdout.flush()
                sys.stderr.flush()
                self._store.set("failed", "")  # not before the message is out: launchers kill what is left
            elif not self._has("claimed"):
                try:
                    self._meet("done", None if complete else EXIT_SECONDS)
                except RankFailed:
                    failed_elsewhere = True
            if self.rank == 0:  # it may host the store, which the others need until they exit
                self._wait_for_others()
            else:
                self._store.add("last", 1)
        except (RuntimeError, RanksMissingError):  # a rank exited without a report
            if complete:
                self._report_rank_0_killed()
                raise RankFailed from None
        finally:
            self._left.set()
        if failed_elsewhere:
            raise RankFailed

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + (FAILURE_SECONDS if self._has("claimed") else EXIT_SECONDS)
        while time.monotonic() < deadline and self._store.add("last", 0) < self.launch.world_size - 1:
            time.sleep(POLL_SECONDS / 4)

    def _claim_report(self, wait_seconds: float) -> bool:
        """Whether this rank is the first to claim the report of a failure."""
        if self._store is None or self._reports:
            return True
        try:
            deadline = time.monotonic() + wait_seconds
            while time.monotonic() < deadline and not self._has("claimed"):
                time.sleep(POLL_SECONDS)
            rank = str(self.rank)
            self._reports = self._store.compare_set("claimed", "", rank).decode() == rank
        except RuntimeError:  # rank 0, which hosted the store, has exited
            self._reports = wait_seconds == 0
            if not self._reports:
                self._report_rank_0_killed()
        return self._reports

    def _meet(self, name: str, seconds: float | None = None) -> None:
        if self._store.add(f"{name}/number", 1) == self.launch.world_size:
            self._store.set(name, "")
        self._wait(name, seconds)

    def _wait(self, name: str, seconds: float | None = None) -> None:
        deadline = None if seconds is None else time.monotonic() + seconds
        notice = time.monotonic() + NOTICE_SECONDS if name == "arrived" and self.rank == 0 else math.inf
        while not self._has(name):
            if time.monotonic() > notice:
                notice = math.inf
                here = self._store.add(f"{name}/number", 0)
                _print_notice(f"Waiting for {self.launch.world_size - here} of {self.launch.world_size} processes.")
            if self._has("failed"):
                raise RankFailed
            if deadline is not None and time.monotonic() > deadline:
                here = self._store.add(f"{name}/number", 0)
                raise RanksMissingError(
                    f"{here} of {self.launch.world_size} processes have arrived after {seconds:.0f} s. Start all of "
                    "them: by torchrun on every machine, or by srun in a job of SLURM."
                )
            time.sleep(POLL_SECONDS / 4)

    def _has(self, name: str) -> bool:
        # polled, since a blocking wait would keep the store from the other thread
        return self._store.check([name])

    def _watch(self) -> None:
        """Exit after a failure of another rank, even while this one is blocked."""
        try:
            while not self._left.wait(POLL_SECONDS):
                if self._has("failed"):
                    self._failed_elsewhere = True
                    break
        except RuntimeError:
            pass
        if not self._left.wait(GRACE_SECONDS):
            self._report_rank_0_killed()
            os._exit(1)

    def _report_rank_0_killed(self) -> None:
        """Where the store is gone and no failure was reported, rank 0 was killed; rank 1 alone prints so."""
        if self.rank == 1 and not self._failed_elsewhere:
            self._failed_elsewhere = True
            print(f"Error: {_KILLED.format(who='Process 0')}", file=sys.stderr, flush=True)


_joined: Ranks | None = None


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """The ranks of this run, joined; within another `join_ranks`, the same.

    Raises:
        RanksMissingError: they do not find each other.
        UserError: see `find_launch`.
    """
    global _joined
    if _joined is not None:
        yield _joined
        return
    _joined = ranks = Ranks(find_launch())
    complete = False
    try:
        yield ranks
        complete = True
    finally:
        _joined = None
        ranks.leave(complete)


def barrier(name: str) -> None:
    """Wait for the other ranks of this run, if there are any, under a name that is used once."""
    if _joined is not None:
        _joined.barrier(name)


def _print_notice(text: str) -> None:
    print(f"{text} Giving up {ARRIVAL_SECONDS:.0f} s after the start.", file=sys.stderr, flush=True)


def quiet_hydra_options(rank: int) -> list[str]:
    """Options with which Hydra leaves no files in a rank other than 0."""
    if rank == 0:
        return []
    return [
        f"hydra.run.dir={Path.cwd()}",  # exists already; the folder of rank 0 replaces it
        "hydra.output_subdir=null",
        f"hydra.job_logging.handlers.file.filename={os.devnull}",
    ]


def _open_store(launch: Launch) -> Any:
    """The store of rank 0, or of torchrun where that has one, with a prefix of our own."""
    from torch.distributed import PrefixStore, TCPStore

    if launch.launcher == "SLURM":
        from lightning_fabric.plugins.environments import SLURMEnvironment

        # Lightning reads the number of tasks from this variable alone
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.per_node))
        environment = SLURMEnvironment(auto_requeue=False)
        host, port = environment.main_address, environment.main_port
    else:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(f"The variable {missing[0]} is not set. Start the processes by torchrun or srun.")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # multi_tenant: the process group, opened later, finds the same server
    is_master = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    text = f"Process {launch.rank} of {launch.world_size} waits for process 0 at MASTER_ADDR:MASTER_PORT={host}:{port}."
    notice = threading.Timer(NOTICE_SECONDS, _print_notice, [text])
    notice.daemon = True
    notice.start()
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
        raise RanksMissingError(
            f"Process {launch.rank} of {launch.world_size} cannot reach the others at {host}:{port}: {reason}. Start "
            "all of them, and see that MASTER_ADDR and MASTER_PORT name a machine and a free port that all reach."
        ) from error
    finally:
        notice.cancel()
    return PrefixStore(f"run/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
