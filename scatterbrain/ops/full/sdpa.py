"""Full attention through PyTorch's fused kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scatterbrain.ops.common.inputs import length_mask, visible_keys
from scatterbrain.ops.common.numerics import no_autocast


def sdpa_full_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    is_causal: bool = False,
    key_lengths: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Output (B, H, T, D) of full attention; arguments as in `full_attention`.

    No (T, S) mask is built: causality is an option of the kernel, padding a (B, S) mask. Only causality together with
    `attn_mask` takes one, boolean (B, 1, T, S).
    """

    def attend(is_causal: bool, mask: torch.Tensor | None = None) -> torch.Tensor:
        # without autocast: the output has the dtype of the inputs, as that of the other operators
        with no_autocast(query):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
            )

    mask = visible_keys(key_lengths, attn_mask, key.shape[2])
    if mask is None:
        return attend(is_causal)
    mask = mask[:, None, None, :]
    if is_causal and attn_mask is not None:
        mask = mask & torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=mask.device).tril()
    # all keys, since kernels differ on rows without any; those rows are set to zero below
    blind = ~mask.any(-1, keepdim=True)
    out = attend(False, mask | blind)
    if is_causal and attn_mask is None:
        # a query before the end of its sample sees no padding, and one behind it the whole sample
        before_end = length_mask(key_lengths, query.shape[2])[:, None, :, None]
        out = torch.where(before_end, attend(True), out)
    return out.masked_fill(blind, 0.0)
