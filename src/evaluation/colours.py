"""Colours of the attentions in every figure."""

from __future__ import annotations

# Attentions of one family have similar hues.
ATTENTION_COLOURS = {
    "full": "#3b4252",
    "local": "#3b7dc4",
    "performer": "#e08a1e",
    "sblocal": "#2e9e62",
    "smyrf": "#8e63c7",
    "sbsmyrf": "#5fb98a",
    "reformer": "#b06ac0",
    "linear-attention-performer": "#c9a227",
    "combination-local-performer": "#1f9aa6",
    "combination-smyrf-performer": "#69a9b0",
    "bs-bigbird": "#6f9fd8",
    "bs-longformer": "#5583bd",
    "bs-openai": "#93b7e0",
    "sbbs-bigbird": "#4c8f3f",
    "sbbs-longformer": "#7bb661",
    "sbbs-openai": "#a5c95c",
    "local2d": "#2f5f9e",
    "sblocal2d": "#1f7a4a",
    "cluster": "#d1495b",
    "sbcluster": "#b5344a",
    "pairedcluster": "#8f1d3f",
    "sbpairedcluster": "#6b0f2f",
}
