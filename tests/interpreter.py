"""Triton's interpreter without its repeated work: the same results in less than half the time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Take out work of Triton's interpreter that has no effect. A version with other internals stays as it is."""
    for name, faster in (("_patch_lang", _once_per_launch), ("_get_np_dtype", _cached_by_scalar)):
        if hasattr(interpreter, name):
            setattr(interpreter, name, faster(getattr(interpreter, name)))
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    # checks of integers for overflow end in an assertion that the interpreter leaves out unless it debugs
    if hasattr(options, "sanitize_overflow") and not options.debug:
        builder.options = replace(options, sanitize_overflow=False)


def _once_per_launch(patch: Callable[[FunctionType], Any]) -> Callable[[FunctionType], Any]:
    """`patch`, which replaces the functions of `triton.language`, but not again at each call within a kernel."""
    patched: set[tuple[ModuleType, ...]] = set()

    @functools.cache
    def languages(function: FunctionType) -> tuple[ModuleType, ...]:
        modules = [x for x in function.__globals__.values() if inspect.ismodule(x)]
        return tuple(x for x in (tl, tl.core) if x in modules)

    def patch_once(function: FunctionType) -> Any:
        modules = languages(function)
        if modules in patched:
            return None
        # the kernel's own call comes first; it alone is restored, at the end of the launch, and by new versions only
        is_kernel = not patched
        scope = patch(function)
        patched.add(modules)
        if is_kernel and scope is not None:
            restore = scope.restore

            def restore_and_forget() -> None:
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        return scope

    return patch_once


def _cached_by_scalar(dtype_of: Callable[[tl.dtype], Any]) -> Callable[[tl.dtype], Any]:
    """`dtype_of`, which gives NumPy's dtype, without building its table at each call."""
    known: dict[str, Any] = {}

    def cached(dtype: tl.dtype) -> Any:
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = dtype_of(scalar)
        return known[scalar.name]

    return cached
