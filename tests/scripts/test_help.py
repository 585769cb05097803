"""Every script, those of `experiments/` too: its --help, and that it finds the checkout from any folder."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPERIMENTS = [path for path in sorted(ROOT.glob("experiments/*/*.py")) if "__main__" in path.read_text("utf-8")]
SCRIPTS = [*sorted(ROOT.glob("scripts/*.py")), *EXPERIMENTS]
FIRST_PATH = "sys.path.insert(0, str(Path(__file__).resolve().parents[{}]))"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_help(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path), run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {path.name}")
    text = path.read_text(encoding="utf-8")
    first = re.search(r"^from (src|scatterbrain|experiments)", text, re.MULTILINE)
    assert 0 < text.index(FIRST_PATH.format(len(path.relative_to(ROOT).parts) - 1)) < first.start()
