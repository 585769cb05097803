"""Forwards of modules whose attention calls a plan computes: into a model, and out of it (`scatterbrain.restore`)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from scatterbrain.errors import UserError, did_you_mean
from scatterbrain.integrations.router import OVERRIDE, ROUTED, Router, check_model
from scatterbrain.integrations.sdpa import SDPAMode
from scatterbrain.tuning.calls import FULL, PlannedCall, call_label
from scatterbrain.tuning.inputs import named_modules, unwrap
from scatterbrain.tuning.recording import Recorder

PLAN = "scatterbrain_plan"
# They compute attention in one fused operator, unless a function mode is on.
FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


class PlannedForward:
    """Forward of a module whose attention calls are computed by a plan.

    Args:
        module: the module.
        routers: by the number of a call; calls without one stay with PyTorch.
    """

    def __init__(self, module: nn.Module, routers: dict[int, Router]) -> None:
        self.module, self.routers = module, routers
        # that of an instance, such as one of another package that wraps it
        self.previous = vars(module).get("forward")
        self._uncompiled = torch.compiler.disable(_run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the module."""
        return self._uncompiled(self, args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_uncompiled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._uncompiled = torch.compiler.disable(_run)

    def forward(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Output of the forward that the module had before.

        Args:
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


class _PlannedCalls:
    """Takes the attention calls of one forward of a module."""

    def __init__(self, routers: dict[int, Router]) -> None:
        self.routers = routers
        self._next = 0
        self._passing_on = False

    def count(self, outcome: str) -> None:
        """Nothing: attention that does not call scaled_dot_product_attention is in no plan."""

    def attend(self, *args: Any, pass_on: Callable[[], torch.Tensor], seed_offset: int = 0, **kwargs: Any) -> Any:
        """Output of the planned method where it takes the call, else of `pass_on`."""
        if self._passing_on or not _is_direct():
            return pass_on()
        router = self.routers.get(self._next)
        self._next += 1
        if router is not None:
            out, reason = router.try_attend(*args, **kwargs)
            router.count(reason or ROUTED)
            if out is not None:
                return out
        self._passing_on = True
        try:
            return pass_on()
        finally:
            self._passing_on = False


def _run(planned: PlannedForward, args: tuple, kwargs: dict[str, Any]) -> Any:
    if isinstance(OVERRIDE.get(), Recorder):  # a profile measures full attention
        return planned.forward(args, kwargs)
    calls = _PlannedCalls(planned.routers)
    token = OVERRIDE.set(calls)
    try:
        with SDPAMode(calls):
            return planned.forward(args, kwargs)
    finally:
        OVERRIDE.reset(token)


def _is_direct() -> bool:
    """Whether the innermost module whose forward runs is the planned one, and not one inside it."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not _run.__code__:
        if frame.f_code is nn.Module._call_impl.__code__:
            return False
        frame = frame.f_back
    return True


class PlanProtocol(Protocol):
    """What a `Plan` is here: its goal, and what computes each call."""

    goal: str
    calls: list[PlannedCall]


def put_plan(model: nn.Module, plan: PlanProtocol) -> None:
    """Put a plan into a model, in place of one that is there; see `scatterbrain.apply`.

    Args:
        model: the model; changed in place.
        plan: the plan.

    Raises:
        UserError: as of `scatterbrain.apply`.
    """
    inner = unwrap(model)
    modules = named_modules(inner)
    routers: dict[str, dict[int, Router]] = {}
    for call in plan.calls:
        if call.name not in modules:
            raise UserError(
                f"plan: {type(inner).__name__} has no module '{call.name}' for the call '{call.label}'. "
                f"{did_you_mean(call.name, [name for name in modules if name] or [''])} Names are those of "
                "model.named_modules()."
            )
        if call.method != FULL:
            routers.setdefault(call.name, {})[call.index] = router_of(call)
    # their fused operators would not reach the planned modules inside
    for name in list(routers):
        parts = name.split(".")
        for end in range(len(parts)):
            ancestor = ".".join(parts[:end])
            if isinstance(modules[ancestor], FUSED):
                routers.setdefault(ancestor, {})
    restore(inner)
    for name, chosen in routers.items():
        vars(modules[name])["forward"] = PlannedForward(modules[name], chosen)
    vars(inner)[PLAN] = plan


def router_of(call: PlannedCall) -> Router:
    """Router that computes a planned call.

    Args:
        call: the call.

    Raises:
        UserError: unknown method, or a budget or a seed out of range.
    """
    options = {} if call.budget is None else {"memory_fraction": call.budget}
    return Router(call.method, call.min_tokens, call.seed, **options)


def restore(model: nn.Module) -> nn.Module:
    """The model with its own attention again: undoes `apply`.

    What `replace` of `scatterbrain.integrations` did is undone by its own `restore`.

    Args:
        model: the model; changed in place.

    Raises:
        UserError: it is no `torch.nn.Module`.
    """
    check_model(model)
    for module in model.modules():
        vars(module).pop(PLAN, None)
        planned = vars(module).get("forward")
        if isinstance(planned, PlannedForward):
            del vars(module)["forward"]
            if planned.previous is not None:
                vars(module)["forward"] = planned.previous
    return model


def applied_plan(model: nn.Module) -> PlanProtocol | None:
    """The plan that is applied to a model; None for none.

    Args:
        model: the model.
    """
    return vars(unwrap(model)).get(PLAN)


def call_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """Number of calls of each planned call by what became of them: `routed`, or the reason for passing them on.

    Args:
        model: a model to which a plan is applied.
    """
    found = {}
    for name, module in named_modules(unwrap(model)).items():
        planned = vars(module).get("forward")
        if isinstance(planned, PlannedForward):
            found |= {call_label(name, index): router.counts() for index, router in planned.routers.items()}
    return found
