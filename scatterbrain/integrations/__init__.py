"""Scatterbrain in models that exist: any PyTorch code, timm and transformers.

`scatterbrain.replace_sdpa` is in `sdpa.py`; `timm.py` and `transformers.py` need the package of that name.
"""
