"""Scatterbrain attention with a local window: `SBLocalAttention`.

    A(i, j) = exp(s q_i.k_j)       for the W keys around query i: the sparse part, exact
              phi(q_i).phi(k_j)    for all others: the low-rank part, M positive random features, unbiased
    out_i   = sum_j A(i, j) v_j / sum_j A(i, j)

O(N (W + M)) time and memory in place of O(N^2), and no training. Its parts:

- the maths and the dense specification: `scatterbrain/ops/scatterbrain/README.md` and `naive.py`
- linear time: `blocked.py` in the same folder (PyTorch), `triton/` (fused CUDA kernels, forward and backward)
- random features: `scatterbrain/ops/common/features.py`; their projection: `projection.py`
- the `nn.Module`: `scatterbrain/attention/sblocal.py`; where it enters T2T-ViT: `src/models/modules/token_stage.py`
"""

from scatterbrain.attention.sblocal import SBLocalAttention

__all__ = ["SBLocalAttention"]
