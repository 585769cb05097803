"""Implementations by others of what the benchmarks of attention measure, all from (B, N, H, E) tensors to one."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from scatterbrain.errors import UserError
from scatterbrain.ops.common.features import log_softmax_features
from scatterbrain.ops.common.projection import draw_projection
from scatterbrain.ops.sparse.naive import block_means

# query, key and value to output; (B, N, H, E) each, unless stated otherwise
Function = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

CUDA_BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
WRITTEN_OUT = "softmax written out"
# Those that hold N x N matrices.
QUADRATIC_MEMORY = (WRITTEN_OUT, "SDPA math")
# What fast-transformers' local products hold at positions without a key.
NO_KEY = -1e20


def heads_first(function: Function) -> Function:
    """A function of (B, H, N, E) tensors as one of (B, N, H, E) tensors."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)

    return attend


def softmax_written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Full attention with its N x N matrix, (B, H, N, E)."""
    return torch.softmax(query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5, dim=-1) @ value


def pytorch_baselines(device: torch.device) -> dict[str, Function]:
    """Full attention by each of PyTorch's kernels for the device, and written out."""
    backends = CUDA_BACKENDS if device.type == "cuda" else {}
    found = {name: sdpa_kernel(backend)(F.scaled_dot_product_attention) for name, backend in backends.items()}
    found[WRITTEN_OUT] = softmax_written_out
    return {name: heads_first(function) for name, function in found.items()}


def fast_transformers_baselines(
    shape: Sequence[int], device: torch.device, sizes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[str, Function]]:
    """Local attention, Performer and Scatterbrain by the kernels of pytorch-fast-transformers, float32 only.

    Name and function, by the name of our attention. `shape` is (B, N, H, E), `sizes` the window and features of our
    attentions by name; those without a counterpart are ignored. Raises `ImportError` where the package is not
    installed, `RuntimeError` where its kernels are not built for `device`.
    """
    from fast_transformers import local_product
    from fast_transformers.attention.linear_attention import LinearAttention
    from fast_transformers.feature_maps import Favor
    from fast_transformers.masking import FullMask, LengthMask

    if local_product.LocalDotProduct.dot[device.type] is None:
        raise RuntimeError(f"its kernels are not built for {device.type}")
    batch, length, _, dim = shape
    scale = dim**-0.5
    lengths = torch.full((batch,), length, dtype=torch.int64, device=device)
    no_mask = torch.zeros(1, 1, device=device).expand(length, length)  # the kernels want one; a view takes no memory

    def products(left: torch.Tensor, right: torch.Tensor, window: int) -> torch.Tensor:
        return local_product.local_dot_product(left.contiguous(), right.contiguous(), no_mask, lengths, window)

    def local(window: int, _: int) -> Function:
        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            weights = torch.softmax(products(query, key, window) * scale, dim=-1)
            return local_product.local_weighted_average(weights, value.contiguous())

        return heads_first(attend)

    def scatterbrain(window: int, features: int) -> Function:
        projection = draw_projection(features // 2, dim, seed=0).to(device)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            # as published: the low-rank part over all keys, and its share inside the window subtracted again
            log_query = log_softmax_features(query, projection, scale, cosh=True)
            log_key = log_softmax_features(key, projection, scale, cosh=True)
            query_max = log_query.detach().amax(-1, keepdim=True)
            key_max = log_key.detach().amax((-2, -1), keepdim=True)
            query_features, key_features = (log_query - query_max).exp(), (log_key - key_max).exp()
            logits = products(query, key, window) * scale
            estimate = products(query_features, key_features, window)
            estimate = estimate.masked_fill(estimate < NO_KEY, 0.0)
            log_scale = query_max + key_max
            running_max = torch.maximum(logits.detach().amax(-1, keepdim=True), log_scale)
            low_rank_scale = (log_scale - running_max).exp()
            correction = (logits - running_max).exp() - estimate * low_rank_scale
            sums = query_features @ (key_features.transpose(-2, -1) @ value)
            norms = query_features @ key_features.sum(-2).unsqueeze(-1)
            numerator = local_product.local_weighted_average(correction, value.contiguous()) + sums * low_rank_scale
            return numerator / (correction.sum(-1, keepdim=True) + norms * low_rank_scale)

        return heads_first(attend)

    def performer(_: int, features: int) -> Function:
        # Its features come in pairs; the projection is drawn once, as ours is, and not on each call. Its orthogonal
        # projection needs a function that PyTorch has removed; the time does not depend on which one it is.
        options = {"orthogonal": False, "stabilize": True, "deterministic_eval": True}
        favor = Favor.factory(n_dims=max(2, features // 2 * 2), **options)
        attention = LinearAttention(dim, feature_map=favor).to(device)
        attention.feature_map.new_feature_map(device)
        attention.eval()
        full = FullMask(length, device=device)
        keys = LengthMask(lengths, max_len=length, device=device)
        # it builds these on first use, and those built in inference mode are of no use in training
        masks = (full, keys, keys) if full.all_ones and keys.float_matrix is not None else ()
        return lambda query, key, value: attention(query, key, value, *masks)

    makers = {"local": ("fast-transformers local", local), "performer": ("fast-transformers performer", performer)}
    makers["sblocal"] = ("published sblocal", scatterbrain)
    known = ((name, *makers[name], size) for name, size in sizes.items() if name in makers)
    return {name: (label, make(*size)) for name, label, make, size in known}


# Compiled for each shape: `torch._dynamo.reset()` comes before more of them than its limit.
compiled_flex_attention = functools.cache(lambda: torch.compile(flex_attention, dynamic=False))


def flex_window(length: int, window: int, device: torch.device) -> Function:
    """Local attention by FlexAttention; its mask is made once."""
    width = torch.tensor(window, device=device)  # a tensor: one compilation for all widths

    def inside(_batch: torch.Tensor, _head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j - i >= -(width // 2)) & (j - i < (width + 1) // 2)

    mask = create_block_mask(inside, None, None, length, length, device=device.type)
    return heads_first(functools.partial(compiled_flex_attention(), block_mask=mask))


def flex_blocks(num_blocks: int, block: int = 64) -> Function:
    """`naive_block_attention` without its Taylor part, by FlexAttention; choosing the blocks is part of the call."""
    options = {"BLOCK_SIZE": block, "compute_q_blocks": False}  # these serve gradients; PyTorch 2.6 has no such option
    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    options = {name: value for name, value in options.items() if name in known}

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = block_means(query, block) @ block_means(key, block).transpose(-2, -1)
        indices = scores.argsort(-1, descending=True).int()
        numbers = torch.full_like(indices[..., 0], num_blocks)
        mask = BlockMask.from_kv_blocks(numbers, indices, seq_lengths=(query.shape[2], key.shape[2]), **options)
        tiles = {"BLOCK_M": block, "BLOCK_N": block}  # larger ones, some versions' choice, do not divide the blocks
        return compiled_flex_attention()(query, key, value, block_mask=mask, kernel_options=tiles)

    return heads_first(attend)


def load_pisa(folder: str) -> Callable[[float], Function]:
    """PISA's own kernel for a density, from a checkout of github.com/xie-lab-ml/piecewise-sparse-attention.

    Raises:
        UserError: it cannot be imported from there.
    """
    sys.path.insert(0, folder)
    try:
        attend = importlib.import_module("piecewise_attn").piecewise_sparse_attention
        triton = importlib.import_module("triton")
    except (ImportError, AttributeError) as error:
        raise UserError(f"--pisa {folder}: piecewise_attn cannot be imported from there ({error}).") from error
    finally:
        sys.path.remove(folder)
    # its tensor descriptors take memory of their own
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    return lambda density: heads_first(lambda *tensors: attend(*(x.contiguous() for x in tensors), density=density))
