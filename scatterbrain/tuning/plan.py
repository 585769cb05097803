"""`scatterbrain.Plan`: which method computes which attention call of a model; and `apply`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scatterbrain.errors import UserError
from scatterbrain.integrations.router import check_model
from scatterbrain.tuning.calls import PlannedCall, number, speed_up
from scatterbrain.tuning.checking import PlanCheck, check_plan
from scatterbrain.tuning.files import dataclass_of, read_json, write_json
from scatterbrain.tuning.forwards import put_plan
from scatterbrain.tuning.tables import PrintsTable, Table

FORMAT = "scatterbrain plan 1"


@dataclass
class Plan(PrintsTable):
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
        return speed_up(self.calls)

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
        return check_plan(self, model, inputs, repeats)


def apply(model: nn.Module, plan: Plan) -> nn.Module:
    """The model, whose attention calls are computed by the plan's methods from now on.

    Parameters, buffers and `state_dict` stay. A call that its method does not take as it is, such as one with another
    mask or with fewer tokens than the profile had, stays with PyTorch. Random parts have the plan's seeds. A plan that
    was applied before is replaced. Works with autocast, gradient checkpointing, copies, pickles and threads, and with
    DistributedDataParallel; `nn.DataParallel` is not supported. Under `torch.compile` the modules with a planned method
    run outside the graphs, so that `fullgraph=True` is an error.

    Args:
        model: the model of the profile, or one with the same modules; changed in place.
        plan: of `scatterbrain.tune` or `Plan.load`.

    Raises:
        UserError: a call of the plan is of a module that the model does not have; unknown method, or a budget or a seed
            out of range.
    """
    check_model(model)
    if not isinstance(plan, Plan):
        raise UserError(f"plan is {type(plan).__name__}. Give what scatterbrain.tune or Plan.load returns.")
    put_plan(model, plan)
    return model
