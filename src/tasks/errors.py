"""Errors of a run, as messages that name the cause and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from scatterbrain.errors import UserError

# What torch says where the memory of the CPU is too small; there is no class for it.
_NO_CPU_MEMORY = "DefaultCPUAllocator"
# How torch's data loader begins its message about a worker that has exited.
_LOST_WORKER = "DataLoader worker"


class WorkersLostError(UserError):
    """A data loader worker exited before its work was done."""


@contextmanager
def explain_errors(batch_size: int, compile_option: str | None = None) -> Iterator[None]:
    """Turn failures of the machine into errors with a remedy, and Lightning's exit after Ctrl-C back into Ctrl-C.

    Args:
        batch_size: the batch that may be too large.
        compile_option: the option that turned on `torch.compile`; None where nothing is compiled.

    Raises:
        UserError: the device or the CPU ran out of memory, or the compiler failed.
        WorkersLostError: a data loader worker was killed, or ran out of memory.
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
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_CPU_MEMORY in str(error)):
            raise UserError(f"The memory is too small. Lower datamodule.batch_size (now {batch_size}).") from error
        if isinstance(error, RuntimeError) and _LOST_WORKER in str(error):
            raise WorkersLostError(_lost_worker_message(str(error), batch_size)) from error
        origin = type(error).__module__
        if compile_option is not None and origin.startswith(("torch._inductor", "torch._dynamo")):
            first_line = str(error).strip().splitlines()[0]
            raise UserError(
                f"torch.compile failed: {first_line.rstrip('.')}. Leave out {compile_option}=true, or install the "
                "compiler."
            ) from error
        raise


def _lost_worker_message(message: str, batch_size: int) -> str:
    reason = message.strip().splitlines()[0].rstrip(". ")
    what = f"A process that loads images ended before its work was done ({reason})"
    lower = f"Lower datamodule.num_workers or datamodule.batch_size (now {batch_size})"
    if "shared memory" in message:
        return f"{what}. {lower}, or give a container more shared memory: docker run --shm-size=8g."
    return f"{what}, often for lack of memory. {lower}."


@contextmanager
def prefix_errors(attention: str | None) -> Iterator[None]:
    """Begin the message of an error with the attention it comes from; None leaves errors as they are.

    Raises:
        UserError: in place of one.
        OSError: as it is, with the name of its file.
        RuntimeError: in place of any other exception, which is its cause.
    """
    if attention is None:
        yield
        return
    try:
        yield
    except UserError as error:
        raise UserError(f"Attention {attention}: {error}") from error
    except OSError:
        raise
    except Exception as error:
        raise RuntimeError(f"Attention {attention} failed, {type(error).__name__}: {error}") from error
