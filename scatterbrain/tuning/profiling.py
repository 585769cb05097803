"""`scatterbrain.profile`: error and time of attention methods at each attention call of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scatterbrain.attention import ATTENTIONS
from scatterbrain.errors import UserError, check_switch, check_whole_number, did_you_mean, is_number
from scatterbrain.integrations.router import MAX_SEED, Router
from scatterbrain.tuning.inputs import batches, evaluation, named_modules, unwrap
from scatterbrain.tuning.maps import thumbnail
from scatterbrain.tuning.measuring import Candidate
from scatterbrain.tuning.recording import Recorder, check_calls, recording
from scatterbrain.tuning.report import ProfileReport
from scatterbrain.version import __version__

METHODS = ("local", "performer", "sblocal", "cluster", "sbcluster", "pairedcluster", "sbadaptive")
BUDGETS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)


def profile(
    model: nn.Module,
    inputs: Any,
    methods: Sequence[str] = METHODS,
    budgets: Sequence[float] = BUDGETS,
    *,
    min_tokens: int = 256,
    seed: int = 0,
    repeats: int = 5,
    cuda_graphs: bool = False,
    maps: Sequence[str] = (),
    on_call: Callable[[str], None] | None = None,
) -> ProfileReport:
    """Error and time of each method with each budget, at each attention call of a model.

    The model runs once, with full attention, in evaluation mode and without gradients, and stays as it is. At each call
    of `scaled_dot_product_attention` every method computes its output, too, from the same queries, keys and values.
    Calls that a method does not take as they are (causal, masks, cross-attention, short sequences) are listed with the
    reason. Autocast around it holds for the methods as well. A plan that is applied to the model is off meanwhile.

    *Error*: || out - full || / || full || of the output (Frobenius norm), full attention in float32, mean over samples.
    Queries at padding are left out. *Effective keys*: exp of the mean entropy (in nats) of the weights of queries.
    *Time*: median over rounds of all methods; calls of equal shapes are timed once. On CUDA with the host's
    time where that is longer, unless `cuda_graphs`.

    >>> report = scatterbrain.profile(model, images, methods=["sblocal", "sbcluster"], budgets=[1 / 16, 1 / 8])
    >>> report.print()
    >>> report.save_html("report.html")

    Args:
        model: any model; what is computed by `torch.compile` is computed without it.
        inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or an iterable of these.
        methods: names of `scatterbrain.ATTENTIONS`.
        budgets: shares of the attention columns, `memory_fraction` of `create_attention`.
        min_tokens: smallest number of queries of a call that methods compute.
        seed: of the random parts of the first call; call i has `seed + i`.
        repeats: number of times for each median; 0 measures no times.
        cuda_graphs: on CUDA, time replays of CUDA graphs: for a model that runs as one, without the host's time.
        maps: patterns (`fnmatch`) of names of modules whose attention maps are kept, for models of square images.
        on_call: called with the name of each call that was measured.

    Returns:
        The report: `print()`, `save`, `save_html`, `figure`, and `scatterbrain.tune` for a plan.

    Raises:
        UserError: unknown method, budget out of range, a pattern of `maps` that matches no module, inputs of another
            type, or a model without such a call.
    """
    model = unwrap(model)
    methods = methods if isinstance(methods, str) or not isinstance(methods, Iterable) else list(methods)
    routers = _routers(methods, budgets, min_tokens)
    check_whole_number("seed", seed, 0, MAX_SEED)
    check_whole_number("repeats", repeats, 0)
    check_switch("cuda_graphs", cuda_graphs)
    maps = [maps] if isinstance(maps, str) else list(maps) if isinstance(maps, Iterable) else [maps]
    wrong = [pattern for pattern in maps if not isinstance(pattern, str)]
    if wrong:
        raise UserError(f"maps: {wrong[0]!r} is not valid. Give names of modules, such as ['blocks.0.*'].")
    modules = list(named_modules(model))
    for pattern in maps:
        if not fnmatch.filter(modules, pattern):
            raise UserError(
                f"maps: no module is named '{pattern}'. {did_you_mean(pattern, filter(None, modules))} Names are those "
                "of model.named_modules()."
            )
    for router, _ in routers.values():
        router.seed = seed

    def candidates(name: str, index: int, number: int) -> list[Candidate]:
        return [Candidate(router.method, budget, router, number) for router, budget in routers.values()]

    recorder = Recorder(candidates, repeats, maps, on_call, cuda_graphs)
    thumbnails: list[str] = []
    with evaluation(model), recording(model, recorder):
        for args, kwargs in batches(inputs):
            model(*args, **kwargs)
            if maps and not thumbnails:
                thumbnails += [png for png in [thumbnail((*args, *kwargs.values()))] if png]
    check_calls(recorder, model)
    calls, device = recorder.reports(seed), next(iter(recorder.devices))
    if not any(call.maps for call in calls):
        thumbnails.clear()
    return ProfileReport(
        model=type(model).__name__,
        device=device_name(device) + (", CUDA graphs" if cuda_graphs and device.type == "cuda" else ""),
        versions=versions(),
        methods=list(dict.fromkeys(methods)),
        budgets=list(dict.fromkeys(float(budget) for budget in budgets)),
        calls=calls,
        not_reached=dict(recorder.not_reached),
        thumbnails=thumbnails,
    )


def _routers(
    methods: Sequence[str], budgets: Sequence[float], min_tokens: int
) -> Mapping[tuple[str, float | None], tuple[Router, float | None]]:
    """Router and budget of each method and budget."""
    if isinstance(methods, str) or not methods:
        raise UserError(f"methods={methods!r} is not valid. Give a list of names of scatterbrain.ATTENTIONS.")
    if not isinstance(budgets, Sequence) or not budgets:
        raise UserError(f"budgets={budgets!r} is not valid. Give a list of shares in (0, 1], such as [1 / 16, 1 / 8].")
    for budget in budgets:
        if not is_number(budget) or not 0 < budget <= 1:
            raise UserError(f"budgets: {budget!r} is not valid. Give shares in (0, 1], such as [1 / 16, 1 / 8].")
    routers = {}
    for method in methods:
        if not isinstance(method, str):
            raise UserError(f"methods: {method!r} is no name. Give names of scatterbrain.ATTENTIONS.")
        has_budget = method not in ATTENTIONS or ATTENTIONS[method].fit is not None
        for budget in budgets if has_budget else [None]:
            options = {} if budget is None else {"memory_fraction": float(budget)}
            routers[method, budget] = (Router(method, min_tokens, **options), budget)
    return routers


def device_name(device: torch.device) -> str:
    """Name of a device for a reader.

    Args:
        device: the device.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return str(device)


def versions() -> dict[str, str]:
    """Versions of torch and of this library."""
    return {"scatterbrain": __version__, "torch": torch.__version__}
