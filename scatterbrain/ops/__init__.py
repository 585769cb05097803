"""Operators: functions from tensors to tensors, one folder each. See README.md."""
