"""`scatterbrain.tune` and `Plan`: which method computes which attention call of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from scatterbrain.errors import UserError, is_number
from scatterbrain.tuning.files import dataclass_of, read_json, write_json
from scatterbrain.tuning.report import CallReport, Measurement, ProfileReport, call_label, method_label, number
from scatterbrain.tuning.tables import Table

if TYPE_CHECKING:
    from scatterbrain.tuning.checking import PlanCheck

FORMAT = "scatterbrain plan 1"
FULL = "full"


@dataclass
class PlannedCall:
    """What computes an attention call.

    Attributes:
        name: the module whose forward makes the call, as in `model.named_modules()`; empty for the model.
        index: number of the call within that forward, from 0.
        method: one of `scatterbrain.ATTENTIONS`; `full` leaves the call to PyTorch.
        budget: share of the attention columns; None for `full`, or a method without a budget.
        seed: of the random parts.
        min_tokens: shorter calls are left to PyTorch, since the profile had none.
        error: of the profile; 0 for `full`.
        milliseconds: of a call, of the profile.
        full_milliseconds: of full attention.
        num_calls: number of calls of the profile.
    """

    name: str
    index: int
    method: str
    budget: float | None
    seed: int
    min_tokens: int
    error: float
    milliseconds: float
    full_milliseconds: float
    num_calls: int = 1

    @property
    def label(self) -> str:
        """Name of the call: that of the module, and `#index` for its second call and later ones."""
        return call_label(self.name, self.index)

    @property
    def method_label(self) -> str:
        """Method and budget, such as `sbcluster 1/16`."""
        return method_label(self.method, self.budget)

    def check(self) -> None:
        """Check that numbers are those of a call.

        Raises:
            TypeError: one is too small.
        """
        whole = {"index": 0, "seed": 0, "min_tokens": 1, "num_calls": 1}
        small = [name for name, minimum in whole.items() if getattr(self, name) < minimum]
        small += [name for name in ("milliseconds", "full_milliseconds") if getattr(self, name) <= 0]
        if small:
            raise TypeError(f"{self.label}: {small[0]}={getattr(self, small[0])}")


@dataclass
class Plan:
    """A method and a budget for each attention call of a model.

    Attributes:
        model: class of the model.
        device: where the profile was measured.
        versions: of torch and scatterbrain.
        goal: what `tune` was given, such as `max_error=0.1`.
        calls: the calls, in the model's order.
    """

    model: str
    device: str
    versions: dict[str, str]
    goal: str
    calls: list[PlannedCall]

    @property
    def speed_up(self) -> float:
        """How many times as fast as full attention the attention calls are, by the times of the profile."""
        return _speed_up(self.calls)

    def table(self) -> Table:
        """The plan as a table."""
        rows: list[Sequence[str]] = [
            [
                call.label,
                call.method_label,
                number(call.error),
                f"{call.milliseconds:.3g}",
                f"{call.full_milliseconds:.3g}",
            ]
            for call in self.calls
        ]
        columns = ["call", "method", "error", "ms", "full ms"]
        notes = [f"All attention calls: {self.speed_up:.2f} times as fast as full attention (times of the profile)."]
        return Table(f"Plan for {self.model}, {self.goal}, {self.device}", columns, rows, notes)

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        """The table as an object of rich."""
        return self.table().__rich__()

    def print(self) -> None:
        """Print the table on standard output, in colours where rich is installed."""
        self.table().print()

    def save(self, path: str | os.PathLike[str]) -> Path | None:
        """Write the plan as JSON, and return the path of the backup of a file that was there, or None.

        Args:
            path: the file.

        Raises:
            UserError: the file cannot be written.
        """
        return write_json(path, FORMAT, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan that `save` wrote.

        Args:
            path: the file.

        Raises:
            UserError: the file cannot be read, or is no plan.
        """
        content = read_json(path, FORMAT)
        try:
            calls = [dataclass_of(PlannedCall, call) for call in content["calls"]]
            for call in calls:
                call.check()
            if not calls:
                raise TypeError("it has no calls")
            return dataclass_of(cls, {**content, "calls": calls})
        except (TypeError, KeyError) as error:
            raise UserError(f"{os.fspath(path)} is no complete plan ({error}). Write it again with `save`.") from error

    def check(self, model: nn.Module, inputs: Any, *, repeats: int = 3) -> PlanCheck:
        """Error of the model's outputs and of each call with this plan, on inputs that the profile has not seen.

        The model runs with full attention and with the plan, in evaluation mode and without gradients. Afterwards it is
        as before; a plan that was applied to it still is.

        Args:
            model: the model.
            inputs: as for `scatterbrain.profile`.
            repeats: smallest number of times of the model on the first batch, with and without the plan; short ones are
                repeated for half a second. 0 measures none.

        Raises:
            UserError: the plan does not fit the model, inputs of another type, or outputs that cannot be compared.
        """
        from scatterbrain.tuning.checking import check_plan

        return check_plan(self, model, inputs, repeats)


def tune(report: ProfileReport, *, max_error: float | None = None, speed_up: float | None = None) -> Plan:
    """Plan with a method and a budget for each attention call of a profile.

    With `max_error` each call gets the fastest method and budget whose error is at most that; calls where none is, or
    where full attention is as fast, stay full. With `speed_up` the bound is the smallest with which all calls together
    are that many times as fast as full attention, by the times of the profile.

    >>> plan = scatterbrain.tune(report, max_error=0.1)
    >>> plan.save("plan.json")
    >>> scatterbrain.apply(model, plan)

    Args:
        report: of `scatterbrain.profile`.
        max_error: largest error of the output of a call; instead of `speed_up`.
        speed_up: how many times as fast as full attention all calls together are to be, more than 1.

    Raises:
        UserError: not exactly one of the two, a value out of range, a speed-up that no plan reaches, a profile without
            times, or something else than a profile.
    """
    goal = check_goal(max_error, speed_up)
    if not isinstance(report, ProfileReport):
        raise UserError(
            f"report is {type(report).__name__}. Give what scatterbrain.profile or ProfileReport.load returns."
        )
    if not all(call.milliseconds > 0 for call in report.calls):
        raise UserError("report has no times, and a plan needs them. Profile with repeats of at least 1.")
    bound = _bound_for(report, speed_up) if max_error is None else float(max_error)
    return Plan(report.model, report.device, dict(report.versions), goal, _choices(report, bound))


def check_goal(max_error: float | None, speed_up: float | None) -> str:
    """What a plan is to reach as text, such as `max_error=0.1`.

    Args:
        max_error: as of `tune`.
        speed_up: as of `tune`.

    Raises:
        UserError: not exactly one of the two, or a value out of range.
    """
    if (max_error is None) == (speed_up is None):
        raise UserError("tune takes either max_error or speed_up. Give one, such as max_error=0.1.")
    if max_error is not None:
        if not is_number(max_error) or not max_error >= 0:
            raise UserError(f"max_error={max_error!r} is not valid. Give a number of at least 0, such as 0.1.")
        return f"max_error={max_error:g}"
    if not is_number(speed_up) or not speed_up > 1:
        raise UserError(f"speed_up={speed_up!r} is not valid. Give a number above 1, such as 2.")
    return f"speed_up={speed_up:g}"


def _choices(report: ProfileReport, bound: float) -> list[PlannedCall]:
    return [_planned(call, _choice(call, bound)) for call in report.calls]


def _choice(call: CallReport, bound: float) -> Measurement | None:
    """The fastest method with an error of at most `bound`; None for full attention."""
    able = [m for m in call.measurements if m.method != FULL and m.error is not None and m.error <= bound]
    best = min(able, key=lambda m: (m.milliseconds, m.error), default=None)
    return best if best is not None and best.milliseconds < call.milliseconds else None


def _planned(call: CallReport, choice: Measurement | None) -> PlannedCall:
    return PlannedCall(
        name=call.name,
        index=call.index,
        method=FULL if choice is None else choice.method,
        budget=None if choice is None else choice.budget,
        seed=call.seed,
        min_tokens=call.min_tokens,
        error=0.0 if choice is None else choice.error,
        milliseconds=call.milliseconds if choice is None else choice.milliseconds,
        full_milliseconds=call.milliseconds,
        num_calls=call.num_calls,
    )


def _speed_up(calls: Sequence[PlannedCall]) -> float:
    full = sum(call.full_milliseconds * call.num_calls for call in calls)
    return full / sum(call.milliseconds * call.num_calls for call in calls)


def _bound_for(report: ProfileReport, speed_up: float) -> float:
    """Smallest bound of the errors with which the calls are `speed_up` times as fast."""
    bounds = sorted({m.error for call in report.calls for m in call.measurements if m.error is not None})
    for bound in bounds:
        if _speed_up(_choices(report, bound)) >= speed_up:
            return bound
    best = _speed_up(_choices(report, bounds[-1])) if bounds else 1.0
    raise UserError(
        f"speed_up={speed_up:g} is out of reach: the fastest methods of the report make attention {best:.2f} times as "
        "fast. Profile more methods or smaller budgets, or give less."
    )
