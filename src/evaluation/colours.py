"""Colours and markers of the attentions, the same in every figure."""

from __future__ import annotations

# Okabe and Ito's palette and two dark colours, which readers with any kind of colour vision can tell apart. The
# attentions that the text compares have one each, and the others are grey and have their names beside them.
OTHER_COLOUR = "#b4b9c0"
_HIGHLIGHTED = {
    "full": "#000000",
    "local": "#0072b2",
    "performer": "#e69f00",
    "sblocal": "#009e73",
    "smyrf": "#cc79a7",
    "cluster": "#56b4e9",
    "pairedcluster": "#d55e00",
    "sbcluster": "#332288",
    "sbadaptive": "#882255",
}
# By what an attention computes exactly, or in place of it.
_FAMILIES = {
    "o": ("full", "local", "sblocal", "local2d", "sblocal2d"),
    "D": ("performer", "linear-attention-performer"),
    "^": ("smyrf", "sbsmyrf", "reformer"),
    "P": ("combination-local-performer", "combination-smyrf-performer"),
    "s": ("bs-bigbird", "bs-longformer", "bs-openai", "sbbs-bigbird", "sbbs-longformer", "sbbs-openai"),
    "X": ("zero", "uniform", "strided", "random-keys", "querycluster"),
    "v": ("cluster", "sbcluster", "pairedcluster", "sbpairedcluster", "sbadaptive"),
}
ATTENTION_MARKERS = {name: marker for marker, names in _FAMILIES.items() for name in names}
ATTENTION_COLOURS = {name: _HIGHLIGHTED.get(name, OTHER_COLOUR) for name in ATTENTION_MARKERS}
