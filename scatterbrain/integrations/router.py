"""Which calls of scaled_dot_product_attention a method computes, and their computation.

A call is routed where the method takes the call's shapes, masks and options as they are. All others are passed on, and
counted by reason.
"""

from __future__ import annotations

import copy
import fnmatch
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from scatterbrain.attention import ATTENTIONS, create_attention, option_parameters
from scatterbrain.attention.base import AttentionModule
from scatterbrain.errors import UserError, check_whole_number, is_number
from scatterbrain.ops.common.numerics import no_autocast

ROUTED = "routed"
MAX_SEED = 2**63 - 1
# Modules kept for the sequence lengths of late; an older one is made again, from the same seed.
MAX_MODULES = 1024
# Options that belong to a call.
OF_A_CALL = ("causal", "softmax_temp", "attention_dropout", "dim_heads")
ATTRIBUTE = "scatterbrain_router"
# What gets the calls of every router of this thread in its place: a profile, or a plan.
OVERRIDE: ContextVar[Any] = ContextVar("scatterbrain_override", default=None)


class Router:
    """Attention by one method where it takes the call as it is, with counts of what was passed on.

    Thread-safe. A copy, or a pickle, starts without counts.

    Args:
        method: one of `scatterbrain.ATTENTIONS`.
        min_tokens: smallest number of queries of a routed call.
        seed: seed of the random parts, where there are any.
        **options: options of `create_attention`, such as memory_fraction, and sizes.

    Raises:
        UserError: unknown method or option, or a value out of range.
    """

    def __init__(self, method: str = "sbcluster", min_tokens: int = 1024, seed: int = 0, **options: Any) -> None:
        check_whole_number("min_tokens", min_tokens, 1)
        check_whole_number("seed", seed, 0, MAX_SEED)
        for name in OF_A_CALL:
            if name in options:
                raise UserError(f"{name} is not an option here: each call of the model has its own. Leave it out.")
        self.method, self.min_tokens, self.seed, self.options = method, min_tokens, seed, options
        probe = create_attention(method, min_tokens, seed=seed, **options)
        self.takes_attn_mask = probe.takes_attn_mask
        self.takes_causal = self._takes_causal()
        self.is_random = "seed" in option_parameters(ATTENTIONS[method].module)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._modules: OrderedDict[tuple, AttentionModule] = OrderedDict()

    def _takes_causal(self) -> bool:
        try:
            create_attention(self.method, self.min_tokens, seed=self.seed, causal=True, **self.options)
        except UserError:
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_counts", "_modules")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({self.method!r}, min_tokens={self.min_tokens}, seed={self.seed}{options})"

    def counts(self) -> dict[str, int]:
        """Number of calls by what became of them: `routed`, or the reason for passing them on."""
        with self._lock:
            return dict(self._counts)

    def count(self, outcome: str) -> None:
        """Count a call.

        Args:
            outcome: `routed`, or the reason for passing it on.
        """
        with self._lock:
            self._counts[outcome] += 1

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        pass_on: Callable[[], torch.Tensor],
        key_mask: torch.Tensor | None = None,
        seed_offset: int = 0,
    ) -> torch.Tensor:
        """Output (B, H, T, D) by the method where it takes the call, and of `pass_on` otherwise.

        Args:
            query: (B, H, T, E).
            key: (B, H, S, E), or with fewer heads where `enable_gqa`.
            value: (B, H, S, D), likewise.
            attn_mask: as in scaled_dot_product_attention, where a mask of two dimensions is (T, S).
            dropout_p: probability of dropping a weight.
            is_causal: hide the keys j > i.
            scale: softmax scale; None is E ** -0.5.
            enable_gqa: key and value may have Hkv heads, H a multiple of Hkv.
            pass_on: computes the call as it was requested.
            key_mask: boolean (B, S), false for keys to hide, with `is_causal` as well; instead of `attn_mask`.
            seed_offset: added to the seed of the random parts.
        """
        arguments = (query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        override = OVERRIDE.get()
        if override is not None:
            return override.attend(*arguments, pass_on=pass_on, key_mask=key_mask)
        out, reason = self.try_attend(*arguments, key_mask=key_mask, seed_offset=seed_offset)
        self.count(reason or ROUTED)
        return pass_on() if out is None else out

    def try_attend(
        self,
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
    ) -> tuple[torch.Tensor | None, str | None]:
        """Output (B, H, T, D) by the method and None, or None and why the method does not take the call.

        The arguments are those of `attend`. Counts nothing.
        """
        reason = self._reason(query, key, value, dropout_p, is_causal, scale, enable_gqa)
        if reason is None and attn_mask is not None:
            key_mask, reason = self._key_mask(attn_mask, query, key, is_causal)
        if reason is None and key_mask is not None and not self.takes_attn_mask:
            # reading values waits for an accelerator
            if key_mask.device.type == "cpu" and bool(key_mask.all()):
                key_mask = None
            else:
                reason = f"attn_mask, and {self.method} takes none"
        if reason is not None:
            return None, reason
        # function modes of a caller do not see the operators, which call scaled_dot_product_attention themselves
        with torch._C.DisableTorchFunction():
            try:
                return self._compute(query, key, value, key_mask, is_causal, scale, enable_gqa, seed_offset), None
            except UserError as error:
                return None, f"{self.method}: {error}"

    def _reason(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        dropout_p: float,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> str | None:
        """Why a call is passed on, whatever its mask; None for no reason."""
        tensors = (query, key, value)
        if not all(isinstance(x, torch.Tensor) for x in tensors):
            return "no tensors (torch.fx.symbolic_trace)"
        # modules made here would belong to the recording, or to the level of the transform
        if torch.jit.is_tracing() or any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
            return "torch.jit.trace or a transform of torch.func"
        if any(type(x) not in (torch.Tensor, nn.Parameter) or x.is_nested for x in tensors):
            return "tensors of another class (torch.export, DTensor), or nested"
        if any(x.dim() != 4 or not x.is_floating_point() or x.device != query.device for x in tensors):
            return "not floating-point tensors (B, H, length, width) of one device"
        if len({compute_dtype(x) for x in tensors}) > 1:
            return "query, key and value differ in dtype"
        if query.shape[2] != key.shape[2]:
            return "another number of queries than of keys (cross-attention, or a cache)"
        if query.shape[2] < self.min_tokens:
            return f"fewer than {self.min_tokens} tokens"
        heads, kv_heads = query.shape[1], key.shape[1]
        grouped = enable_gqa and kv_heads > 0 and heads % kv_heads == 0
        if (
            query.numel() == 0
            or value.numel() == 0
            or key.shape[:3] != value.shape[:3]
            or (key.shape[0], key.shape[3]) != (query.shape[0], query.shape[3])
            or not (heads == kv_heads or grouped)
        ):
            return "shapes that broadcast, are empty or do not fit"
        if dropout_p != 0:
            return "dropout"
        if scale is not None and not (is_number(scale) and 0 < scale < math.inf):
            return "scale that is no positive number"
        if is_causal and not self.takes_causal:
            return f"causal, and {self.method} is not"
        return None

    def _key_mask(
        self, attn_mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, is_causal: bool
    ) -> tuple[torch.Tensor | None, str | None]:
        """Mask of the keys (B, S), or why a mask is none."""
        if is_causal:
            return None, "attn_mask and is_causal"  # an error of scaled_dot_product_attention
        batch, num_keys = query.shape[0], key.shape[2]
        if attn_mask.requires_grad:
            return None, "attn_mask with a gradient"
        mask = key_padding(attn_mask, batch, num_keys)
        if mask is None:
            return None, "attn_mask that differs by query or head"
        if mask.dtype != torch.bool:
            if mask.device.type != "cpu" or not bool(((mask == 0) | (mask == -math.inf)).all()):
                return None, "additive attn_mask"
            mask = mask == 0
        return mask, None

    def _compute(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None,
        is_causal: bool,
        scale: float | None,
        enable_gqa: bool,
        seed_offset: int,
    ) -> torch.Tensor:
        # as scaled_dot_product_attention does under autocast
        query, key, value = (x.to(compute_dtype(x)) for x in (query, key, value))
        module = self.module_for(query, is_causal, scale, seed_offset)
        with no_autocast(query):
            out, _ = module(
                *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=key_mask, enable_gqa=enable_gqa
            )
        return out.transpose(1, 2)

    def module_for(
        self, query: torch.Tensor, is_causal: bool, scale: float | None, seed_offset: int
    ) -> AttentionModule:
        """Module of the method for the length and width of a query (B, H, T, E); arguments are those of `attend`."""
        seed = self.seed + (seed_offset if self.is_random else 0)
        length, width = query.shape[2:]
        name = (length, width, is_causal, scale, query.device, seed)
        with self._lock:
            module = self._modules.get(name)
            if module is not None:
                self._modules.move_to_end(name)
                return module
            options = self.options | ({"causal": True} if is_causal else {})
            with torch.inference_mode(False):  # buffers made in inference mode could not take part in training
                module = create_attention(
                    self.method, length, dim_heads=width, softmax_temp=scale, seed=seed, **options
                )
                module = module.to(query.device).eval()
            self._modules[name] = module
            if len(self._modules) > MAX_MODULES:
                self._modules.popitem(last=False)
            return module


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Dtype in which scaled_dot_product_attention computes: that of autocast, where it is enabled."""
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def key_padding(attn_mask: torch.Tensor, batch: int, num_keys: int) -> torch.Tensor | None:
    """Mask (B, S) that is the same for all queries and heads, known from shape and strides alone; None for another.

    Args:
        attn_mask: mask of scaled_dot_product_attention, which broadcasts to (B, H, T, S).
        batch: B.
        num_keys: S.
    """
    if attn_mask.dim() != 4 or attn_mask.shape[0] not in (1, batch) or attn_mask.shape[3] != num_keys:
        return None
    if any(attn_mask.shape[i] != 1 and attn_mask.stride(i) != 0 for i in (1, 2)):
        return None
    return attn_mask[:, 0, 0].expand(batch, num_keys)


# Layers of a model ---------------------------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """Check that a model is one.

    Args:
        model: the model.

    Raises:
        UserError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"model is {type(model).__name__}. Give a torch.nn.Module.")


def layer_routers(
    names: list[str], layers: Mapping[str, Mapping[str, Any] | None] | None, seed: int, **options: Any
) -> dict[str, Router | None]:
    """Router of each layer, None for a layer that keeps its attention.

    Args:
        names: the layers' names, in order; layer i has the seed `seed + i`.
        layers: options of single layers, by patterns of their names as in `fnmatch`; the last one that matches counts.
            They change `options`, of which another method takes min_tokens alone. None keeps the layer's attention.
        seed: seed of the first layer.
        **options: arguments of `Router`.

    Raises:
        UserError: a pattern without a layer, or options that `Router` refuses.
    """
    layers = {} if layers is None else layers
    if not isinstance(layers, Mapping) or not all(isinstance(pattern, str) for pattern in layers):
        raise UserError(f"layers={layers!r} is not valid. Give options, or None, by patterns of names.")
    for pattern, changed in layers.items():
        if changed is not None and not isinstance(changed, Mapping):
            raise UserError(f"layers: {changed!r} of '{pattern}' is not valid. Give a dict of options, or None.")
    for pattern in layers:
        if not fnmatch.filter(names, pattern):
            example = f"Names are those of model.named_modules(), such as '{names[-1]}'."
            raise UserError(f"layers: no layer is named '{pattern}'. {example}")
    # one for each set of options, since making one checks them by making attentions
    made: dict[str | None, Router | None] = {None: Router(seed=seed, **options)}
    for pattern, changed in layers.items():
        # options of one method are not those of another
        base = {"min_tokens": options["min_tokens"]} if "method" in (changed or {}) else options
        made[pattern] = None if changed is None else Router(**({"seed": seed} | base | dict(changed)))
    found: dict[str, Router | None] = {}
    for index, name in enumerate(names):
        matching = [pattern for pattern in layers if fnmatch.fnmatchcase(name, pattern)]
        pattern = matching[-1] if matching else None
        router = found[name] = copy.copy(made[pattern])
        if router is not None and "seed" not in (layers.get(pattern) or {}):
            router.seed = seed + index
    return found


def routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """Names of the layers that have a router, and the routers."""
    for name, module in model.named_modules():
        router = vars(module).get(ATTRIBUTE)
        if router is not None:
            yield name, router


def report(model: nn.Module) -> dict[str, dict[str, int]]:
    """Number of calls of each layer by what became of them: `routed`, or the reason for passing them on.

    Args:
        model: a model in which `replace` replaced attention.
    """
    return {name: router.counts() for name, router in routers(model) if router.counts()}
