"""Replacement of scaled_dot_product_attention in PyTorch code, without a change of the code."""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from scatterbrain.integrations.router import Router


class SDPAMode(TorchFunctionMode):
    """Context in which a router gets the calls of scaled_dot_product_attention of this thread.

    Args:
        router: what computes or passes on the calls.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        self._route, self._inside = _uncompiled()

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The call, by the router if it is one of attention."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._route(self, func, args, kwargs)
        if func in COMPOSITE:
            return self._inside(self, func, args, kwargs)
        return func(*args, **kwargs)

    def _seed_offset(self) -> int:
        """What to add to the seed for the place in the model that calls."""
        return 0


def _route(mode: SDPAMode, function: Callable, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return mode.router.attend(
        *args, **kwargs, pass_on=lambda: function(*args, **kwargs), seed_offset=mode._seed_offset()
    )


def _inside(mode: SDPAMode, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Result of a Python function of PyTorch, whose own calls reach the mode.

    Under a mode such a function is one call, and the mode is off while it runs. Here a copy of the function that does
    not ask for modes runs, with the mode on.
    """
    if function is F.multi_head_attention_forward and kwargs.get("need_weights", True):
        mode.router.count("nn.MultiheadAttention with need_weights=True")
    names = {**function.__globals__, "has_torch_function": _no, "has_torch_function_unary": _no}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    with mode:
        return copy(*args, **kwargs)


def _no(*_: Any) -> bool:
    return False


# They compute attention, or layers again (checkpointing).
COMPOSITE = (F.multi_head_attention_forward, torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad)


@functools.cache
def _uncompiled() -> tuple[Callable, Callable]:
    """`_route` and `_inside` with a graph break around them; here, since this imports the compiler."""
    return torch.compiler.disable(_route), torch.compiler.disable(_inside)


class SDPAReplacement(SDPAMode):
    """Context that `replace_sdpa` returns.

    Random parts have a seed for each `nn.Module` that calls, in the order of first calls; calls outside any module
    have one for each line of code.

    Args:
        router: what computes or passes on the calls.
    """

    def __init__(self, router: Router) -> None:
        super().__init__(router)
        self._lock = threading.Lock()
        self._modules: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._lines: dict[tuple[str, int], int] = {}
        self._count = 0

    def report(self) -> dict[str, int]:
        """Number of calls by what became of them: `routed`, or the reason for passing them on."""
        return self.router.counts()

    def _seed_offset(self) -> int:
        if not self.router.is_random:
            return 0
        module, line = _call_site()
        known, site = (self._lines, line) if module is None else (self._modules, module)
        with self._lock:
            if site not in known:
                known[site] = self._count
                self._count += 1
            return known[site]


def _call_site() -> tuple[nn.Module | None, tuple[str, int]]:
    """The innermost `nn.Module` on the call stack, and the line of the call outside this library and PyTorch."""
    frame = sys._getframe(1)
    line = ("", 0)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner, line
        package = frame.f_globals.get("__name__", "").split(".")[0]
        if not line[0] and package not in ("scatterbrain", "torch"):
            line = (frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None, line


def replace_sdpa(
    method: str = "sbcluster", min_tokens: int = 1024, *, seed: int = 0, **options: Any
) -> SDPAReplacement:
    """Context manager in which `F.scaled_dot_product_attention` is computed by a method of this library.

    >>> with scatterbrain.replace_sdpa("sbcluster", memory_fraction=1 / 16) as replacement:
    ...     out = model(images)
    >>> replacement.report()
    {'routed': 12}

    A call is routed where the method takes it as it is; every other one is computed by PyTorch, and counted by reason:
    causal calls and masks that the method does not take, cross-attention, decoding with a cache, short sequences,
    dropout. Holds for the thread that enters it, for `nn.MultiheadAttention` with need_weights=False as well, and until
    it ends, also by an exception. Recomputation in the backward pass (checkpointing) has to be inside, too. Under
    `torch.compile` every attention call is a graph break, so `fullgraph=True` is an error.

    Args:
        method: one of `scatterbrain.ATTENTIONS`.
        min_tokens: smallest number of queries of a routed call.
        seed: seed of the random parts of the first caller; the others follow it.
        **options: options of `create_attention`, such as memory_fraction (default 1/32), and sizes.

    Returns:
        The context, whose `report()` gives the number of calls by what became of them.

    Raises:
        UserError: unknown method or option, or a value out of range.
    """
    return SDPAReplacement(Router(method, min_tokens, seed, **options))
