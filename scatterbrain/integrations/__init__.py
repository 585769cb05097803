"""Scatterbrain in models that exist: any PyTorch code, timm, transformers and diffusers.

`scatterbrain.replace_sdpa` is in `sdpa.py`; `timm.py`, `transformers.py` and `diffusers.py` need the package of that
name.
"""
