"""What the processes of `test_processes.py` do; they import this file, which therefore imports little."""

from __future__ import annotations

import os
import signal
import time

import torch

from src.utils.errors import UserError


def tell_rank(word: str) -> tuple[str, str, str, int]:
    return word, os.environ["LOCAL_RANK"], os.environ["MASTER_PORT"], torch.get_num_threads()


def fail_in_one(kind: str) -> None:
    """Rank 1 fails; rank 0 would wait for ever, or fails of the consequence."""
    if os.environ["LOCAL_RANK"] == "1":
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5 if kind == "late" else 0)
        raise (ZeroDivisionError("a bug") if kind == "bug" else UserError("image 7 is damaged."))
    if kind == "late":
        raise RuntimeError("connection closed by peer")
    time.sleep(600)
