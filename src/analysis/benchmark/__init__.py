"""Benchmarks: measurements, tables and figures of `scripts/benchmark_*.py`, `tune_attention.py` and others."""

import os

# read when torch is imported: its profiler writes to stderr otherwise
os.environ.setdefault("KINETO_LOG_LEVEL", "9")
