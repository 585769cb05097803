"""Profile, tune, apply: the error and the time of each method at each attention call of a model, and a plan from them.

`scatterbrain.profile` is in `profiling.py`, what it returns in `report.py`; `scatterbrain.tune` is in `choosing.py`,
`Plan` and `apply` in `plan.py`, `restore` in `forwards.py`. `html.py` and `figure.py` show a report; `command.py` is
`python -m scatterbrain`. Imports point from these to `calls.py`, which holds what all are about.
"""
