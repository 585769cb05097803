"""Benchmarks: measurements, tables and figures of `scripts/benchmark_*.py`, `tune_attention.py` and others."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # before torch is imported: its profiler writes to stderr otherwise
