"""Record of a model's attention calls: where each is made, and what methods would compute there."""

from __future__ import annotations

import contextlib
import fnmatch
import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from scatterbrain.errors import UserError
from scatterbrain.integrations.router import OVERRIDE, Router
from scatterbrain.integrations.sdpa import SDPAMode
from scatterbrain.tuning import measuring
from scatterbrain.tuning.inputs import named_modules
from scatterbrain.tuning.maps import attention_maps
from scatterbrain.tuning.report import AttentionMap, CallReport, Measurement, call_label


@dataclass
class Candidate:
    """A method to measure at a call.

    Attributes:
        method: its name.
        budget: memory fraction; None for none.
        router: computes it.
        seed_offset: added to the router's seed.
    """

    method: str
    budget: float | None
    router: Router
    seed_offset: int = 0


@dataclass
class _Sums:
    error: float = 0.0
    milliseconds: float = 0.0
    taken: int = 0
    reason: str | None = None


@dataclass
class _Record:
    """Sums over the calls of one place in the model."""

    name: str
    index: int
    candidates: Sequence[Candidate]
    report: dict[str, Any] = field(default_factory=dict)
    num_calls: int = 0
    num_samples: int = 0
    effective_keys: float = 0.0
    milliseconds: float = 0.0
    sums: list[_Sums] = field(default_factory=list)
    maps: list[AttentionMap] = field(default_factory=list)


class Recorder:
    """Takes the calls of routers and of scaled_dot_product_attention: full attention's output, and measurements.

    Args:
        candidates: methods to measure, from name, index and number of a call, in the order of first calls.
        repeats: times for the median of each time; 0 measures none.
        maps: patterns of names of calls whose attention maps are kept.
        on_call: called with the name of each call that was measured.
        cuda_graphs: on CUDA, time replays of CUDA graphs.
    """

    def __init__(
        self,
        candidates: Callable[[str, int, int], Sequence[Candidate]],
        repeats: int,
        maps: Sequence[str] = (),
        on_call: Callable[[str], None] | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        self.candidates, self.repeats, self.maps, self.on_call = candidates, repeats, maps, on_call
        self.cuda_graphs = cuda_graphs
        self.records: dict[tuple[str, int], _Record] = {}
        self.not_reached: Counter[str] = Counter()
        self.devices: dict[torch.device, None] = {}
        # modules whose forward runs: the name, and the number of attention calls that it has made
        self.stack: list[list[Any]] = []
        self._times: dict[tuple, dict[tuple, float]] = {}
        self._passing_on = False

    def count(self, outcome: str) -> None:
        """Note attention that does not call scaled_dot_product_attention."""
        if self.stack and not self._passing_on:
            self.not_reached[f"{call_label(self.stack[-1][0], 0)}: {outcome}"] += 1

    def attend(self, *args: Any, pass_on: Callable[[], torch.Tensor], **kwargs: Any) -> torch.Tensor:
        """Output of `pass_on`, after the measurements; arguments are those of `Router.attend`."""
        if self._passing_on or not self.stack:
            return pass_on()
        self._passing_on = True
        try:
            out = pass_on()
            name, index = self.stack[-1]
            self.stack[-1][1] += 1
            if (name, index) not in self.records:
                candidates = self.candidates(name, index, len(self.records))
                sums = [_Sums() for _ in candidates]
                self.records[name, index] = _Record(name, index, candidates, sums=sums)
            # function modes of the caller do not see what is measured
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._measure(self.records[name, index], pass_on, *args, **kwargs)
        finally:
            self._passing_on = False
        if self.on_call is not None:
            self.on_call(call_label(name, index))
        return out

    def _measure(
        self,
        record: _Record,
        pass_on: Callable[[], torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        key_mask: torch.Tensor | None = None,
        seed_offset: int = 0,
    ) -> None:
        arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        padding = key_mask is not None or attn_mask is not None
        signature = (
            *(tuple(x.shape) for x in (query, key, value)),
            *(query.dtype, query.device, is_causal, padding, scale),
        )
        plain = all(type(x) in (torch.Tensor, nn.Parameter) and not x.is_nested for x in (query, key, value))
        plain = plain and all(x.dim() == 4 for x in (query, key, value)) and query.shape[0] == key.shape[0]
        samples = query.shape[0] if plain else 1
        masks = (attn_mask, key_mask, is_causal, scale)
        keys = measuring.effective_keys(query, key, *masks) if plain and query.numel() and key.numel() else math.nan
        self._describe(record, query, key, value, is_causal, attn_mask, key_mask)
        self.devices[query.device] = None
        record.num_calls += 1
        record.num_samples += samples
        record.effective_keys += keys * samples if samples else 0.0
        full = queries = None
        taken: dict[tuple, Callable[[], object]] = {}
        for candidate, sums in zip(record.candidates, record.sums, strict=True):
            router, offset = candidate.router, candidate.seed_offset

            def call(router: Router = router, offset: int = offset) -> tuple[torch.Tensor | None, str | None]:
                return router.try_attend(*arguments, key_mask=key_mask, seed_offset=offset)

            try:
                out, reason = call()
            except torch.OutOfMemoryError:
                out, reason = None, f"{candidate.method}: out of memory"
            if out is None:
                sums.reason = reason
                continue
            if full is None:
                queries = measuring.key_mask_of(attn_mask, key_mask, query, key)
                full = measuring.full_output(query, key, value, queries, is_causal, scale)
            sums.error += samples * measuring.relative_error(out, full, queries)
            sums.taken += 1
            taken[candidate.method, candidate.budget] = call
        times = self._times_of(signature, {(None, None): pass_on, **taken}, query.device)
        record.milliseconds += times[None, None]
        for candidate, sums in zip(record.candidates, record.sums, strict=True):
            name = (candidate.method, candidate.budget)
            # with the plan, PyTorch computes what the method does not take
            sums.milliseconds += times[name if name in taken else (None, None)]
        if plain and not record.maps and any(fnmatch.fnmatchcase(record.name, pattern) for pattern in self.maps):
            record.maps = attention_maps(query, key, value, masks, record.candidates)

    def _times_of(
        self, signature: tuple, calls: dict[tuple, Callable[[], object]], device: torch.device
    ) -> dict[tuple, float]:
        """Times of calls, by method and budget; those of the same shapes are timed once."""
        if not self.repeats:
            return dict.fromkeys(calls, 0.0)
        known = self._times.setdefault(signature, {})
        if not calls.keys() <= known.keys():
            options = {"cuda_graphs": self.cuda_graphs}
            times = measuring.milliseconds(list(calls.values()), device, self.repeats, **options)
            known.update(zip(calls, times, strict=True))
        return known

    def _describe(
        self,
        record: _Record,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        is_causal: bool,
        attn_mask: torch.Tensor | None,
        key_mask: torch.Tensor | None,
    ) -> None:
        tokens = query.shape[-2]
        known = record.report
        min_tokens = min(tokens, known.get("min_tokens", tokens))
        if not known or tokens > known["shape"][-2]:
            known |= {
                "shape": list(query.shape),
                "num_keys": key.shape[-2],
                "kv_heads": key.shape[1] if key.dim() == 4 else 1,
                "value_width": value.shape[-1],
                "dtype": str(query.dtype).removeprefix("torch."),
            }
        known["min_tokens"] = min_tokens
        known["is_causal"] = known.get("is_causal", False) or is_causal
        mask = "none"
        if key_mask is not None or attn_mask is not None:
            is_padding = key_mask is not None or measuring.key_mask_of(attn_mask, None, query, key) is not None
            mask = "keys" if is_padding else "other"
        known["mask"] = max(mask, known.get("mask", mask), key=("none", "keys", "other").index)

    def reports(self, seed: int) -> list[CallReport]:
        """The calls, in the order in which they were first made.

        Args:
            seed: of the first call's random parts; call i has `seed + i`.
        """
        return [self._report(record, seed + number) for number, record in enumerate(self.records.values())]

    def _report(self, record: _Record, seed: int) -> CallReport:
        measurements = []
        for candidate, sums in zip(record.candidates, record.sums, strict=True):
            measurement = Measurement(candidate.method, candidate.budget, reason=sums.reason)
            if sums.taken:
                error = sums.error / record.num_samples
                if math.isfinite(error):
                    measurement.error = error
                    measurement.milliseconds = sums.milliseconds / record.num_calls
                else:
                    measurement.reason = f"{candidate.method}: output or full attention's is not finite"
            measurements.append(measurement)
        keys = record.effective_keys / record.num_samples if record.num_samples else math.nan
        return CallReport(
            name=record.name,
            index=record.index,
            **record.report,
            num_calls=record.num_calls,
            effective_keys=keys if math.isfinite(keys) else None,
            milliseconds=record.milliseconds / record.num_calls,
            seed=seed,
            measurements=measurements,
            maps=record.maps,
        )


@contextlib.contextmanager
def recording(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Context in which a recorder gets the attention calls that a model makes in this thread.

    Args:
        model: the model.
        recorder: the recorder.
    """
    thread = threading.get_ident()
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if threading.get_ident() == thread:
                recorder.stack.append([name, 0])

        return hook

    def leave(*_: Any) -> None:
        if threading.get_ident() == thread and recorder.stack:
            recorder.stack.pop()

    # not imported for this: nothing is compiled then
    compiler = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
    token = OVERRIDE.set(recorder)
    try:
        for name, module in named_modules(model).items():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
        with compiler, SDPAMode(recorder):
            yield
    finally:
        for handle in handles:
            handle.remove()
        recorder.stack.clear()
        OVERRIDE.reset(token)


def check_calls(recorder: Recorder, model: nn.Module) -> None:
    """Check that a recorder got a call.

    Args:
        recorder: the recorder.
        model: the model, for the message.

    Raises:
        UserError: it got none.
    """
    if not recorder.records:
        reached = "".join(f" It has {name}." for name in recorder.not_reached)
        raise UserError(
            f"{type(model).__name__} made no call of scaled_dot_product_attention.{reached} Load a model of "
            "transformers with attn_implementation='sdpa', and call timm.layers.set_fused_attn(True) before "
            "create_model."
        )
