"""The attentions, re-exported from `scatterbrain.attention`."""

from scatterbrain.attention import ATTENTIONS, COMPARED, attention_memory, create_attention

__all__ = ["ATTENTIONS", "COMPARED", "attention_memory", "create_attention"]
