"""Entry point: `python run.py experiment=imagenet-t2tvit-eval ...`; `python run.py --help` explains itself.

Or `torchrun --nproc_per_node=N run.py ...`, or `srun python run.py ...` in a job of SLURM: see `src.distributed.ranks`.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path

import hydra
from dotenv import load_dotenv
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from scatterbrain.errors import UserError, did_you_mean
from src.distributed import ranks
from src.utils.cli import report, run_cli

ROOT = Path(__file__).resolve().parent
_failures: list[UserError] = []


# absolute: found from any folder, and by whoever imports this file
@hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name="config")
def main(config: DictConfig) -> None:
    """Run the task of `config.mode`; in a multirun, a run that fails does not stop the others."""
    job = HydraConfig.get()
    # a launcher of Hydra's may call this in a process of its own, where nothing else of this file runs
    remote = not job.launcher["_target_"].startswith("hydra._internal.")
    if remote:
        sys.argv[:] = ["run.py", *job.overrides.task]  # for the results, in place of the launcher's own command
    try:
        with ranks.joined() as processes:
            config.paths.output_dir = processes.agree("output_dir", config.paths.output_dir)
            error_file = Path(config.paths.output_dir, ranks.ERROR_FILE)
            if processes.rank == 0:
                error_file.unlink(missing_ok=True)
            try:
                processes.call(lambda: _run_task(config))
            except UserError as error:
                # not raised: Hydra would print lines of its own, and in a multirun leave out the comparison
                report(error, f"run {job.job.num}" if job.mode == RunMode.MULTIRUN else None)
                _failures.append(error)
                if remote:
                    error_file.write_text(str(error))
            except ranks.PeerFailed:  # which has told
                if not remote:
                    raise
            except Exception as error:
                if remote:  # otherwise only that of process 0 would be known
                    traceback.print_exc()
                    error_file.write_text(f"{type(error).__name__}: {error}; the traceback is in the job's log")
                raise
    except ranks.PeersMissingError as error:
        report(error)
        _failures.append(error)


def _run_task(config: DictConfig) -> None:
    # imported here: `--help` and a misspelt option should not wait for PyTorch
    from src.tasks.evaluate import evaluate
    from src.tasks.train import train

    modes = {"eval": evaluate, "train": train}
    if config.mode not in modes:
        raise UserError(f"There is no mode={config.mode}. {did_you_mean(config.mode, modes)}")
    modes[config.mode](config)


def run(argv: list[str]) -> int:
    """Run the command line `argv` (the program's name first) and return its exit status, see `run_cli`."""
    _failures.clear()
    ranks.FailedJobs.messages = ()
    argv[1:] = _with_options_of_attentions(argv[1:])
    if ranks.find_launch() is None:
        status = _run_command(argv)
    else:
        try:
            with ranks.joined() as processes:
                argv[1:] += ranks.silent_options(processes)
                status = _run_command(argv, processes)
        except UserError as error:
            report(error)
            return 1
    return 1 if _failures or ranks.FailedJobs.messages else status


def _run_command(argv: list[str], processes: ranks.Peers | None = None) -> int:
    """`run_cli` of `main`, one of several `processes` where there are such."""

    def call_main() -> None:
        # a sweep's jobs find this file's modules from wherever it was started
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        try:
            main()
        except Exception as error:
            if isinstance(error, HydraException) and "hydra/launcher/submitit_" in str(error):
                raise UserError(
                    "hydra/launcher=slurm needs a package that is not installed: pip install hydra-submitit-launcher. "
                    "Or leave it out."
                ) from error
            if type(error).__module__.startswith("submitit"):
                raise UserError(
                    f"A job ended without a result: {str(error).strip().splitlines()[0]}. Its logs are in the same "
                    "folder."
                ) from error
            raise

    if processes is None:
        return run_cli(call_main, argv)

    def call_as_one_of_several() -> None:
        if {"-m", "--multirun"} & set(argv):
            raise UserError(
                "A multirun cannot be one of several processes that a launcher started. Start each run by itself, or "
                "give eval.attentions=[...] in place of -m."
            )
        call_main()

    try:
        return run_cli(lambda: processes.call(call_as_one_of_several), argv)
    except Exception:
        traceback.print_exc()  # here, since the launcher ends this process when it hears of the failure
        return 1


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
