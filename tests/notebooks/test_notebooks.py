"""Every notebook: it runs, small, from start to end, and what is committed was run."""

from __future__ import annotations

import json
import re
import sys
import warnings
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from tests.src.tasks.setup import make_checkpoint, make_images

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST_BYTES = 400_000
REGIMES = {"length": 64, "width": 8, "centres": 4, "temperatures": [0.5, 4.0], "num_seeds": 2, "variance_samples": 100}


def outputs(notebook, kind):
    """Outputs of a type of all code cells."""
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [output for cell in cells for output in cell.outputs if output.output_type == kind]


def pictures(notebook):
    """Number of pictures."""
    return sum("image/png" in output.data for output in outputs(notebook, "display_data"))


@pytest.fixture
def small_settings(tmp_path, monkeypatch):
    """What makes each notebook small, by its name; and kernels that leave nothing in the home folder."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    residual = {"checkpoint": str(tmp_path / "t7.pth"), "data_dir": str(tmp_path), "memory": 0.25, "num_images": 2}
    memory = {"checkpoint": residual["checkpoint"], "data_dir": str(tmp_path), "num_images": 4, "error_images": 2}
    memory |= {"attentions": ["local", "performer", "bs-openai"], "memory_fractions": [1 / 16, 1 / 4]}
    return {
        "01_regimes": REGIMES,
        "02_residual": residual,
        "03_memory": memory,
        "04_training": {},
        "05_scaling": {},
        "06_pretrained": {},
    }


def code_cells(path):
    """The notebook, and its code cells without their outputs."""
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    return notebook, cells


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch, small_settings):
    """In this process: a kernel for each takes far longer to start than the cells to run."""
    if "checkpoint" in small_settings[path.stem]:
        make_images(tmp_path, 5)
        make_checkpoint(tmp_path / "t7.pth", "t2t_vit_t_7")
    monkeypatch.setenv("NOTEBOOK_SETTINGS", json.dumps(small_settings[path.stem]))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(path.parent)
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    expected = pictures(nbformat.read(path, as_version=4))
    variables, num_threads = {"__name__": "__main__"}, torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            for number, cell in enumerate(code_cells(path)[1], start=1):
                exec(compile(cell.source, f"{path.name}, cell {number}", "exec"), variables)
    finally:
        torch.set_num_threads(num_threads)
    assert sum(image.data.startswith(b"\x89PNG") for image in shown) == len(shown) == expected > 0


def test_runs_in_a_kernel(tmp_path, monkeypatch, small_settings):
    """The one that measures nothing, as Jupyter runs it."""
    (path,) = (path for path in NOTEBOOKS if path.stem == "05_scaling")
    monkeypatch.setenv("NOTEBOOK_SETTINGS", json.dumps(small_settings[path.stem]))
    notebook, _ = code_cells(path)
    expected = pictures(nbformat.read(path, as_version=4))
    # a cell that fails raises
    NotebookClient(notebook, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    assert not outputs(notebook, "error")
    assert pictures(notebook) == expected > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_was_run_before_it_was_committed(path):
    assert path.stat().st_size <= LARGEST_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not outputs(notebook, "error")
    # a warning would stand there as well
    assert {output.name for output in outputs(notebook, "stream")} <= {"stdout"}
    assert pictures(notebook) > 0
    assert str(ROOT) not in path.read_text(), "the folder of whoever ran it says nothing to others"
    for each in re.findall(r"\]\(([^)]+)\)", "".join(cell.source for cell in notebook.cells)):
        assert (path.parent / each).is_file(), f"{path.name} links to {each}, which is not there"


def test_readme_has_a_line_for_each():
    lines = (ROOT / "notebooks" / "README.md").read_text().splitlines()
    assert NOTEBOOKS
    for path in NOTEBOOKS:
        assert sum(f"]({path.name})" in line for line in lines) == 1
