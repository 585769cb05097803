"""Entry point: `python run.py experiment=imagenet-t2tvit-eval ...`; `python run.py --help` explains itself."""

from __future__ import annotations

import logging
import sys
import warnings

import hydra
from dotenv import load_dotenv
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from src.utils.cli import report, run_cli
from src.utils.errors import UserError, did_you_mean

failed_runs: list[int] = []


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(config: DictConfig) -> None:
    """Run the task of `config.mode`; in a multirun, a run that fails does not stop the others."""
    # imported here: `--help` and a misspelt option should not wait for PyTorch
    from src.tasks.evaluate import evaluate

    modes = {"eval": evaluate}
    _quieten()
    try:
        if config.mode not in modes:
            raise UserError(f"There is no mode={config.mode}. {did_you_mean(config.mode, modes)}")
        modes[config.mode](config)
    except UserError as error:
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            raise SystemExit(_failed(error)) from error
        _failed(error)
        failed_runs.append(HydraConfig.get().job.num)


def _failed(error: UserError) -> int:
    report(error)
    return 1


def _quieten() -> None:
    """Leave out what libraries say about themselves at every start."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*it is recommended to use `Trainer\\(devices=1.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", message)


if __name__ == "__main__":
    load_dotenv()
    status = run_cli(main, sys.argv)
    sys.exit(1 if failed_runs else status)
