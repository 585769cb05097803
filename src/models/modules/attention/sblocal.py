"""Scatterbrain attention with a local window: `SBLocalAttention`, re-exported from `scatterbrain.attention.sblocal`.

    A(i, j) = exp(s q_i.k_j)       for the W keys around query i: the sparse part, exact
              phi(q_i).phi(k_j)    for all others: the low-rank part, unbiased, from M positive random features
    out_i   = sum_j A(i, j) v_j / sum_j A(i, j)

O(T (W + M)) time and memory in place of O(T^2), without training. Its parts, in `scatterbrain/`:

- `ops/scatterbrain/`: README.md and naive.py, the maths and its specification; blocked.py, linear time in PyTorch;
  triton/, fused CUDA kernels, forward and backward
- `ops/common/features.py`, the random features, and `projection.py`, their random projections
- `attention/sblocal.py`, the `nn.Module`; `src/models/modules/token_stage.py` is where T2T-ViT calls it
"""

from scatterbrain.attention.sblocal import SBLocalAttention

__all__ = ["SBLocalAttention"]
