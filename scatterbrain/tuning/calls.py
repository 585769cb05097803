"""An attention call of a model: what a profile measured there, what a plan chose, and both as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

FULL = "full"


@dataclass
class Measurement:
    """A method with a budget at an attention call.

    Attributes:
        method: one of `scatterbrain.ATTENTIONS`.
        budget: share of the attention columns, `memory_fraction`; None for a method without a budget.
        error: relative Frobenius error of the output against full attention in float32, mean over samples; None where
            the method took no call. Calls that it did not take have none.
        milliseconds: time of a call on the device of the profile.
        reason: why the method did not take the call, or some of several; None where it took all.
    """

    method: str
    budget: float | None
    error: float | None = None
    milliseconds: float | None = None
    reason: str | None = None

    @property
    def label(self) -> str:
        """Method and budget, such as `sbcluster 1/16`."""
        return method_label(self.method, self.budget)


@dataclass
class AttentionMap:
    """Attention of one query over the tokens of an image, mean over the heads.

    Attributes:
        query: which query.
        label: the method and its budget.
        png: the map as a PNG file in base64; the brightest colour is the largest weight of full attention.
    """

    query: str
    label: str
    png: str


@dataclass
class CallReport:
    """An attention call of a model.

    Attributes:
        name: the innermost module whose forward makes the call, as in `model.named_modules()`; empty for the model.
        index: number of the call within that forward, from 0.
        shape: (B, H, T, E) of the queries, of the longest where there are several.
        num_keys: number of keys S.
        kv_heads: number of heads of keys and values.
        value_width: width D of values.
        dtype: of queries, keys and values.
        is_causal: whether the call is causal.
        mask: `none`, `keys` (padding) or `other`.
        min_tokens: number of queries of the shortest.
        num_calls: number of calls, over all batches.
        effective_keys: exp of the mean entropy of the weights, in nats; None where it cannot be computed.
        milliseconds: time of full attention.
        seed: of the random parts of the methods.
        measurements: of each method and budget.
        maps: attention maps, where they were requested.
    """

    name: str
    index: int
    shape: list[int]
    num_keys: int
    kv_heads: int
    value_width: int
    dtype: str
    is_causal: bool
    mask: str
    min_tokens: int
    num_calls: int
    effective_keys: float | None
    milliseconds: float
    seed: int
    measurements: list[Measurement] = field(default_factory=list)
    maps: list[AttentionMap] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Name of the call: that of the module, and `#index` for its second call and later ones."""
        return call_label(self.name, self.index)

    @property
    def size(self) -> str:
        """Shape of the queries as text."""
        return " x ".join(map(str, self.shape))

    def reasons(self) -> dict[str, list[str]]:
        """Labels of the methods that did not take all calls, by reason."""
        found: dict[str, list[str]] = {}
        for measurement in self.measurements:
            if measurement.reason is not None:
                found.setdefault(measurement.reason, []).append(measurement.label)
        return found


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


def speed_up(calls: Sequence[PlannedCall]) -> float:
    """How many times as fast as full attention planned calls are, by the times of the profile.

    Args:
        calls: the calls.
    """
    full = sum(call.full_milliseconds * call.num_calls for call in calls)
    return full / sum(call.milliseconds * call.num_calls for call in calls)


def call_label(name: str, index: int) -> str:
    """Name of a call for a reader.

    Args:
        name: name of the module; empty for the model.
        index: number of the call within the module's forward.
    """
    return (name or "(model)") + (f"#{index}" if index else "")


def method_label(method: str, budget: float | None) -> str:
    """Name of a method with its budget for a reader, such as `sbcluster 1/16`.

    Args:
        method: the method.
        budget: the budget; None for none.
    """
    return method if budget is None else f"{method} {fraction(budget)}"


def fraction(budget: float) -> str:
    """A budget as text, such as 1/16.

    Args:
        budget: the share.
    """
    nearest = Fraction(budget).limit_denominator(4096)
    return str(nearest) if math.isclose(nearest, budget, rel_tol=1e-9) and nearest.numerator == 1 else f"{budget:.3g}"


def shorten(names: Sequence[str], limit: int = 4) -> str:
    """The first names, and how many more there are.

    Args:
        names: the names.
        limit: number of names that are shown.
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def duration(milliseconds: float) -> str:
    """A time with its unit.

    Args:
        milliseconds: the time.
    """
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.3g} s"


def number(value: float) -> str:
    """A number with two digits.

    Args:
        value: the number.
    """
    return f"{value:.1e}" if 0 < value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
