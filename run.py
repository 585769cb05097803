"""Entry point: `python run.py experiment=imagenet-t2tvit-eval ...`; `python run.py --help` explains itself.

Or `torchrun --nproc_per_node=N run.py ...`, or `srun python run.py ...` in a job of SLURM: see `src.distributed.ranks`.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path

import hydra
from dotenv import load_dotenv
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from scatterbrain.errors import UserError, did_you_mean
from src.distributed.failed_jobs import ERROR_FILE, FailedJobs
from src.distributed.launcher import find_launch
from src.distributed.ranks import RankFailed, Ranks, RanksMissingError, join_ranks, quiet_hydra_options
from src.utils.cli import USER_ERRORS, describe, replace_what_cannot_be_encoded, report, run_cli
from src.utils.instantiate import escape_interpolations

ROOT = Path(__file__).resolve().parent
_failures: list[Exception] = []
# the folder of a multirun, which is held from its first run to its last
_locks = ExitStack()
_locked: set[Path] = set()


# absolute: found from any working directory, and when this file is imported
@hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name="config")
def main(config: DictConfig) -> Exception | None:
    """Run the task of `config.mode`; in a multirun, a run that fails does not stop the others.

    Returns:
        The error of the user's that ended it, for Hydra's callbacks.
    """
    job = HydraConfig.get()
    # a launcher of Hydra may call this in another process, where nothing else of this file runs
    remote = not job.launcher["_target_"].startswith("hydra._internal.")
    if remote:
        sys.argv[:] = ["run.py", *job.overrides.task]  # the command in the results, in place of the launcher's
    try:
        with join_ranks() as ranks:
            output_dir = ranks.broadcast("output_dir", str(config.paths.output_dir))
            config.paths.output_dir = escape_interpolations(output_dir)
            error_file = Path(output_dir, ERROR_FILE)
            if ranks.rank == 0:
                error_file.unlink(missing_ok=True)
            try:
                if job.mode == RunMode.MULTIRUN and not remote:
                    _lock_sweep(Path(job.runtime.cwd, job.sweep.dir))
                ranks.call(lambda: _run_task(config))
            except USER_ERRORS as error:
                # not raised: Hydra would print its own lines, and skip the comparison of a multirun
                report(error, f"run {job.job.num}" if job.mode == RunMode.MULTIRUN else None)
                _failures.append(error)
                if remote:
                    error_file.write_text(describe(error))
                return error
            except RankFailed:  # which has reported
                if not remote:
                    raise
            except Exception as error:
                if remote:  # otherwise only that of rank 0 would be known
                    traceback.print_exc()
                    error_file.write_text(f"{type(error).__name__}: {error}; the traceback is in the job's log")
                raise
    except RanksMissingError as error:
        report(error)
        _failures.append(error)
    return None


def _run_task(config: DictConfig) -> None:
    # imported here: `--help` and a misspelt option need not import PyTorch
    from src.tasks.evaluate import evaluate
    from src.tasks.train import train
    from src.tasks.train_sequence import train_sequence

    modes = {"eval": evaluate, "train": train, "sequence": train_sequence}
    mode = config.get("mode")
    if mode not in modes:
        raise UserError(f"There is no mode={mode}. {did_you_mean(mode, modes)}")
    modes[mode](config)


def _lock_sweep(folder: Path) -> None:
    from src.distributed.folder_lock import locked_folder

    if folder not in _locked:
        _locks.enter_context(locked_folder(folder))
        _locked.add(folder)


def run(argv: list[str]) -> int:
    """Exit status of the command line `argv` (the program's name first), see `run_cli`."""
    replace_what_cannot_be_encoded()
    _failures.clear()
    FailedJobs.messages = ()
    argv[1:] = _with_options_of_attentions(argv[1:])
    _locked.clear()
    try:
        with _locks:
            if find_launch() is None:
                status = _run_command(argv)
            else:
                with join_ranks() as ranks:
                    argv[1:] += quiet_hydra_options(ranks.rank)
                    status = _run_command(argv, ranks)
    except UserError as error:
        report(error)
        return 1
    return 1 if _failures or FailedJobs.messages else status


def _run_command(argv: list[str], ranks: Ranks | None = None) -> int:
    """Exit status of `main`, as one of several `ranks` where a launcher started them."""

    def call_main() -> None:
        # for the jobs of a sweep, which may start in another folder
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

    if ranks is None:
        return run_cli(call_main, argv)

    def call_as_rank() -> None:
        if {"-m", "--multirun"} & set(argv):
            raise UserError(
                "A multirun cannot be one of several processes that a launcher started. Start each run by itself, or "
                "give eval.attentions=[...] in place of -m."
            )
        call_main()

    try:
        return run_cli(lambda: ranks.call(call_as_rank), argv)
    except Exception:
        traceback.print_exc()  # here, since the launcher kills this process after the failure
        return 1


def _with_options_of_attentions(arguments: list[str]) -> list[str]:
    """With `eval.attentions`, `model.t2tattn1_cfg.x=1` as `++model.t2tattn1_cfg.x=1`.

    Hydra composes the model without an attention then, so that its options are new keys.
    """
    if not any(re.match(r"\+{0,2}eval\.attentions=(?!null$|\[\s*\]$)", argument) for argument in arguments):
        return arguments
    return [re.sub(r"^(?=model\.t2tattn[12]_cfg\.)", "++", argument) for argument in arguments]


if __name__ == "__main__":
    load_dotenv(interpolate=False)  # values of the environment are plain text
    sys.exit(run(sys.argv))
