"""The function that an evaluation calls in place of a model: inference model, `torch.compile`, CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from src.models.inference import inference_model
from src.models.t2t_vit import T2TViT
from src.utils.static_shapes import CudaGraphForward, Forward, PaddedForward, compiled


class ForwardFactory:
    """Makes the function to evaluate from a model that is on its device and in its dtype.

    Later models share all modules but the token attentions with the first one; so do their inference models.

    Args:
        fast: use the inference model, see `src.models.inference`.
        use_compile: use `torch.compile`.
        batch_size: images of a full batch where any batch may be smaller; None where the first batch is full.
    """

    def __init__(self, fast: bool, use_compile: bool, batch_size: int | None = None) -> None:
        self._fast = fast
        self._use_compile = use_compile
        self._batch_size = batch_size
        self._first: nn.Module | None = None

    def __call__(self, model: T2TViT) -> Forward:
        """The function to evaluate in place of `model`."""
        evaluated = inference_model(model) if self._fast else model
        if self._first is None:
            self._first = evaluated
        elif self._fast:
            # the copy of the folded weights is freed here: there are never more than two
            share_modules(evaluated, self._first, model.token_attentions)
        on_cuda = next(model.parameters()).device.type == "cuda"
        if not self._use_compile and (evaluated is model or not on_cuda):
            return evaluated
        forward = compiled(evaluated) if self._use_compile else evaluated
        return PaddedForward(CudaGraphForward(forward) if on_cuda else forward, self._batch_size)


def share_modules(network: nn.Module, source: nn.Module, own: Sequence[nn.Module]) -> None:
    """Let a network use the modules, parameters and buffers of another of the same structure, but for some modules.

    Args:
        network: changed in place.
        source: the network whose modules are used.
        own: modules of `network`, at any depth, that it keeps.
    """
    kept = {id(module) for module in own}
    for name, child in list(network.named_children()):
        if id(child) in kept:
            continue
        if any(id(module) in kept for module in child.modules()):
            share_modules(child, source.get_submodule(name), own)
        else:
            network.register_module(name, source.get_submodule(name))
    for tensors, theirs in ((network._parameters, source._parameters), (network._buffers, source._buffers)):
        tensors.update({name: theirs[name] for name in tensors})
