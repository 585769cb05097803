"""The Hydra callback that compares the runs of a multirun."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from scatterbrain.errors import UserError
from src.evaluation.comparison import compare_runs
from src.evaluation.comparison_files import print_comparison, write_comparison
from src.evaluation.results import RESULTS_FILE

logger = logging.getLogger(__name__)


class ComparisonCallback(Callback):
    """Compares the runs of a multirun when it ends: three files in the sweep folder, and a table on stdout.

    Hydra ends a multirun with a failed run by that run's error and calls no `on_multirun_end`; the files are
    then written as the runs end, and the log says where they are. Single runs are left alone.
    """

    results_file = RESULTS_FILE  # what a run leaves in its folder

    def __init__(self) -> None:
        self._ended: dict[Path, bool] = {}  # folder of a run -> whether it failed, in order

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Add a run of a multirun; from the first failed one on, update the comparison.

        Args:
            config: the run's config, with `hydra.runtime.output_dir`.
            job_return: how it ended.
            **kwargs: not used.
        """
        if OmegaConf.select(config, "hydra.mode") != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir)
        failed = job_return.status == JobStatus.FAILED or not (folder / self.results_file).is_file()
        self._ended[folder] = failed
        if job_return.status == JobStatus.FAILED:
            logger.warning("Run %s failed and is missing from the comparison.", folder)
        if any(self._ended.values()) and not all(self._ended.values()):
            try:
                paths = self._write(_sweep_folder(config))[1]
            except UserError as error:
                logger.error("The runs could not be compared: %s", error)
            else:
                logger.info("Comparison of the runs so far: %s", paths[1])

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compare the runs, write the files and print the table.

        Args:
            config: the composed config, with `hydra.sweep.dir`.
            **kwargs: not used.
        """
        sweep = _sweep_folder(config)
        try:
            if not self._ended:  # the runs ended in other processes
                self._ended = find_runs(sweep, self.results_file)
            if all(self._ended.values()):
                logger.warning("No run in %s left results: there is nothing to compare.", sweep)
                return
            comparison, paths = self._write(sweep)
        except UserError as error:
            logger.error("The runs could not be compared: %s", error)
            return
        if comparison.failed:
            logger.warning("Runs without complete results in %s: %s", sweep, ", ".join(comparison.failed))
        self._print(comparison, paths)

    def _write(self, sweep: Path) -> tuple[Any, list[Path]]:
        finished = [folder for folder, failed in self._ended.items() if not failed]
        comparison = self._compare(finished, [folder for folder, failed in self._ended.items() if failed])
        return comparison, self._write_files(sweep, comparison)

    # for comparisons of other runs
    _compare = staticmethod(compare_runs)
    _write_files = staticmethod(write_comparison)
    _print = staticmethod(print_comparison)


def _sweep_folder(config: DictConfig) -> Path:
    # relative to the folder where the command was started, which hydra.job.chdir may have left
    return Path(OmegaConf.select(config, "hydra.runtime.cwd") or ".") / str(config.hydra.sweep.dir)


def find_runs(sweep: Path, results_file: str = RESULTS_FILE) -> dict[Path, bool]:
    """Folders of runs under a sweep folder in the order of their numbers, and whether they failed."""
    folders = {path.parent for path in sweep.rglob(results_file)}
    folders |= {path.parent.parent for path in sweep.rglob(".hydra/hydra.yaml")}
    # Digits as numbers, so that run 10 comes after run 9.
    ordered = sorted(
        folders,
        key=lambda folder: [
            (0, int(part), "") if part.isdigit() else (1, 0, part) for part in folder.relative_to(sweep).parts
        ],
    )
    return {folder: not (folder / results_file).is_file() for folder in ordered}
