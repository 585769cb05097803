"""Adaptive attention for CUDA. See README.md of the folder above."""
