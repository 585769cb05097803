"""`scatterbrain.tune`: a plan from a profile."""

from __future__ import annotations

from scatterbrain.errors import UserError, is_number
from scatterbrain.tuning import calls as planned_calls
from scatterbrain.tuning.calls import FULL, CallReport, Measurement, PlannedCall
from scatterbrain.tuning.plan import Plan
from scatterbrain.tuning.report import ProfileReport


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


def _bound_for(report: ProfileReport, speed_up: float) -> float:
    """Smallest bound of the errors with which the calls are `speed_up` times as fast."""
    bounds = sorted({m.error for call in report.calls for m in call.measurements if m.error is not None})
    for bound in bounds:
        if planned_calls.speed_up(_choices(report, bound)) >= speed_up:
            return bound
    best = planned_calls.speed_up(_choices(report, bounds[-1])) if bounds else 1.0
    raise UserError(
        f"speed_up={speed_up:g} is out of reach: the fastest methods of the report make attention {best:.2f} times as "
        "fast. Profile more methods or smaller budgets, or give less."
    )
