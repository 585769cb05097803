"""Entry point: `python run.py experiment=imagenet-t2tvit-eval ...`; `python run.py --help` explains itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import hydra
from dotenv import load_dotenv
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from src.utils.cli import report, run_cli
from src.utils.errors import UserError, did_you_mean

_failures: list[UserError] = []


# absolute: found from any folder, and by whoever imports this file
@hydra.main(version_base="1.3", config_path=str(Path(__file__).resolve().parent / "configs"), config_name="config")
def main(config: DictConfig) -> None:
    """Run the task of `config.mode`; in a multirun, a run that fails does not stop the others."""
    try:
        # imported here: `--help` and a misspelt option should not wait for PyTorch
        from src.tasks.evaluate import evaluate
        from src.tasks.train import train

        modes = {"eval": evaluate, "train": train}
        if config.mode not in modes:
            raise UserError(f"There is no mode={config.mode}. {did_you_mean(config.mode, modes)}")
        modes[config.mode](config)
    except UserError as error:
        # not raised: Hydra would print lines of its own, and in a multirun leave out the comparison
        job = HydraConfig.get()
        report(error, f"run {job.job.num}" if job.mode == RunMode.MULTIRUN else None)
        _failures.append(error)


def run(argv: list[str]) -> int:
    """Run the command line `argv` (the program's name first) and return its exit status, see `run_cli`."""
    _failures.clear()
    argv[1:] = _with_options_of_attentions(argv[1:])
    status = run_cli(main, argv)
    return 1 if _failures else status


def _with_options_of_attentions(arguments: list[str]) -> list[str]:
    """With `eval.attentions`, `model.t2tattn1_cfg.x=1` as `++model.t2tattn1_cfg.x=1`.

    The options of the token stages are those of each attention, and Hydra composes without any.
    """
    if not any(re.match(r"\+{0,2}eval\.attentions=(?!null$|\[\s*\]$)", argument) for argument in arguments):
        return arguments
    return [re.sub(r"^(?=model\.t2tattn[12]_cfg\.)", "++", argument) for argument in arguments]


if __name__ == "__main__":
    load_dotenv()
    sys.exit(run(sys.argv))
