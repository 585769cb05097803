"""Imports between the packages of `src` point in one direction."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each package may import of `src`, itself included.
ALLOWED = {
    "utils": {"utils"},
    "datamodules": {"datamodules", "utils"},
    "models": {"models"},
    "checkpoints": {"checkpoints", "models", "utils"},
}
# A fixed address of functions that live elsewhere.
RE_EXPORTS = {ROOT / "src/utils/checkpoint.py"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_of(package):
    files = sorted((ROOT / "src" / package).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        if path not in RE_EXPORTS
        for name in imported(path)
        if name.startswith("src.") and name.split(".")[1] not in ALLOWED[package]
    ]
    assert not wrong
