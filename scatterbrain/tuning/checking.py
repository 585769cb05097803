"""`Plan.check`: a model with a plan against the same model with full attention, on held-out inputs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from scatterbrain.errors import UserError, check_whole_number
from scatterbrain.integrations.router import OVERRIDE
from scatterbrain.tuning import measuring
from scatterbrain.tuning.calls import FULL, call_label, duration, number
from scatterbrain.tuning.forwards import PlanProtocol, applied_plan, call_counts, put_plan, restore, router_of
from scatterbrain.tuning.inputs import batches, evaluation, output_tensors, unwrap
from scatterbrain.tuning.measuring import Candidate
from scatterbrain.tuning.recording import Recorder, recording
from scatterbrain.tuning.tables import PrintsTable, Table

# Milliseconds of the times, at least: medians of a few short runs of a model differ by several times.
LEAST = 500.0


@dataclass
class CheckedCall:
    """A planned call on held-out inputs.

    Attributes:
        label: its name.
        method: its method and budget.
        error: of its output for the inputs that full attention gives it; None where the method took no call.
        planned_error: of the profile.
        counts: of calls by what became of them in the model with the plan: `routed`, or why not.
    """

    label: str
    method: str
    error: float | None
    planned_error: float
    counts: dict[str, int]


@dataclass
class PlanCheck(PrintsTable):
    """Result of `Plan.check`; prints as a table.

    Attributes:
        model: class of the model.
        goal: of the plan.
        num_batches: number of batches of the held-out inputs.
        outputs: relative error of each output of the model, mean over the samples.
        calls: the calls that the plan does not leave to PyTorch.
        full_milliseconds: of the model on the first batch; None where it was not measured.
        milliseconds: of the model with the plan.
    """

    model: str
    goal: str
    num_batches: int
    outputs: dict[str, float]
    calls: list[CheckedCall] = field(default_factory=list)
    full_milliseconds: float | None = None
    milliseconds: float | None = None

    @property
    def error(self) -> float:
        """Largest relative error of an output."""
        return max(self.outputs.values())

    def table(self) -> Table:
        """The check as a table."""
        rows: list[Sequence[str]] = []
        for call in self.calls:
            counts = ", ".join(f"{count} {name}" for name, count in call.counts.items()) or "not called"
            error = "-" if call.error is None else number(call.error)
            rows.append([call.label, call.method, error, number(call.planned_error), counts])
        notes = [f"Relative error of {name}: {number(error)}" for name, error in self.outputs.items()]
        if self.full_milliseconds is not None and self.milliseconds is not None:
            ratio = self.full_milliseconds / self.milliseconds
            notes.append(
                f"Whole model: {duration(self.milliseconds)}, with full attention {duration(self.full_milliseconds)} "
                f"({ratio:.2f} times as fast)."
            )
        columns = ["call", "method", "error", "of the profile", "calls"]
        batches = f"{self.num_batches} batch{'es' if self.num_batches > 1 else ''}"
        return Table(f"{self.model} with the plan of {self.goal}, {batches} held out", columns, rows, notes)


def check_plan(plan: PlanProtocol, model: nn.Module, inputs: Any, repeats: int) -> PlanCheck:
    """Result of `Plan.check`, whose arguments these are.

    Args:
        plan: the plan.
        model: the model.
        inputs: held-out inputs.
        repeats: number of times.

    Raises:
        UserError: the plan does not fit the model, or inputs of another type.
    """
    check_whole_number("repeats", repeats, 0)
    model = unwrap(model)
    before = applied_plan(model)
    planned = {(call.name, call.index): call for call in plan.calls if call.method != FULL}
    put_plan(model, plan)  # checks it before anything runs
    restore(model)

    def candidates(name: str, index: int, _: int) -> list[Candidate]:
        call = planned.get((name, index))
        return [] if call is None else [Candidate(call.method, call.budget, router_of(call))]

    recorder = Recorder(candidates, 0)
    times: list[float] = []
    sums: dict[str, float] = {}
    counts: dict[str, dict[str, int]] = {}
    num_samples = num_batches = 0
    try:
        with evaluation(model):
            for args, kwargs in batches(inputs):

                def call(args: tuple = args, kwargs: dict[str, Any] = kwargs) -> Any:
                    return model(*args, **kwargs)

                # a model may change its inputs
                own_args, own_kwargs = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
                with recording(model, recorder):
                    full = dict(output_tensors(model(*own_args, **own_kwargs)))
                if not any(tensor.numel() for tensor in full.values()):
                    raise UserError(f"{type(model).__name__} returned no floating-point tensor to compare.")
                put_plan(model, plan)
                out = dict(output_tensors(call()))
                if any(name not in out or out[name].shape != tensor.shape for name, tensor in full.items()):
                    raise UserError(
                        f"{type(model).__name__}: outputs with the plan have other names or shapes than with full "
                        "attention. Check a part of the model whose outputs can be compared."
                    )
                _add(counts, call_counts(model))
                if repeats and not num_batches:
                    device = next(iter(full.values())).device
                    times = measuring.milliseconds(
                        [functools.partial(_without_plan, call), call], device, repeats, LEAST
                    )
                restore(model)
                samples = max(next(iter(full.values())).shape[:1] or (1,))
                for name, tensor in full.items():
                    pair = [x if x.dim() else x[None] for x in (out[name], tensor)]
                    sums[name] = sums.get(name, 0.0) + samples * measuring.relative_error(*pair)
                num_samples, num_batches = num_samples + samples, num_batches + 1
    finally:
        restore(model)
        if before is not None:
            put_plan(model, before)
    reports = {(call.name, call.index): call for call in recorder.reports(0)}
    errors = {name: x.measurements[0].error for name, x in reports.items() if x.measurements}
    calls = [
        CheckedCall(
            *(call.label, call.method_label, errors.get(name), call.error),
            counts.get(call_label(*name), {}),
        )
        for name, call in planned.items()
    ]
    outputs = {name: total / num_samples for name, total in sums.items()}
    result = PlanCheck(type(model).__name__, plan.goal, num_batches, outputs, calls)
    if times:
        result.full_milliseconds, result.milliseconds = times
    return result


def _without_plan(call: Callable[[], Any]) -> Any:
    """Result of a call with full attention: a recorder that records nothing goes before plans and routers."""
    token = OVERRIDE.set(Recorder(lambda *_: (), 0))
    try:
        return call()
    finally:
        OVERRIDE.reset(token)


def _add(total: dict[str, dict[str, int]], counts: dict[str, dict[str, int]]) -> None:
    for name, found in counts.items():
        known = total.setdefault(name, {})
        for outcome, count in found.items():
            known[outcome] = known.get(outcome, 0) + count
