"""Profile, tune, apply: the error and the time of each method at each attention call of a model, and a plan from them.

`scatterbrain.profile` is in `profiling.py`, what it returns in `report.py`; `scatterbrain.tune` and `Plan` are in
`plan.py`, `scatterbrain.apply` and `restore` in `applying.py`. `html.py` and `figure.py` show a report; `command.py` is
`python -m scatterbrain`.
"""
