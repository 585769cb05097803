"""Imports point one way: run.py -> src.tasks -> models, data, evaluation and ranks -> src.utils -> scatterbrain."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"scatterbrain", "src.utils"}
# Every package, and the packages that it may import beside itself.
ALLOWED = {
    "scatterbrain": set(),
    "src.utils": {"scatterbrain"},
    "src.ops": {"scatterbrain"},  # aliases of the library
    "src.models": {"scatterbrain"},
    "src.checkpoints": {*BASE, "src.models"},
    "src.datamodules": BASE,
    "src.evaluation": BASE,
    "src.distributed": BASE,
}
ALLOWED["src.tasks"] = set(ALLOWED)
ALLOWED["src.analysis"] = set(ALLOWED)
ALLOWED["run"] = set(ALLOWED)
OURS = ("run", "src", "scatterbrain", "scripts", "experiments", "tests", "notebooks")
# Names that the outside relies on, kept where they were.
ALIASES = {("src.utils.checkpoint", "src.checkpoints")}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """`src.tasks` of `src.tasks.train`; the first part of anything outside `src`."""
    return ".".join(module.split(".")[: 2 if module.startswith("src.") else 1])


def modules() -> dict[str, Path]:
    paths = [ROOT / "run.py", *(ROOT / "src").rglob("*.py"), *(ROOT / "scatterbrain").rglob("*.py")]
    return {name_of(path): path for path in paths}


def imports_of(module: str, path: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
            parts = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*parts, *filter(None, [node.module])])
            # `from src import tasks` imports src.tasks
            yield from (f"{origin}.{alias.name}" for alias in node.names)


MODULES = modules()


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_point_one_way(package):
    wrong = []
    for module, path in MODULES.items():
        if package_of(module) != package:
            continue
        for imported in imports_of(module, path):
            target = package_of(imported)
            if imported.split(".")[0] not in OURS:
                continue
            if target not in {package, *ALLOWED[package]}:
                wrong.append((module, target))
    assert not set(wrong) - ALIASES


def imported_modules(module: str, path: Path) -> set[str]:
    """Modules of the project that a file imports, anywhere in it."""
    # `from src import tasks` imports src.tasks, `from src.tasks import name` the module src.tasks
    candidates = ((name, name.rpartition(".")[0]) for name in imports_of(module, path))
    found = (next((name for name in names if name in MODULES), None) for names in candidates)
    return {name for name in found if name not in (None, module)}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; empty for none."""
    done: set[str] = set()

    def search(module: str, chain: list[str]) -> list[str]:
        if module in chain:
            return chain[chain.index(module) :]
        if module not in done:
            for name in sorted(imports[module]):
                if found := search(name, [*chain, module]):
                    return found
            done.add(module)
        return []

    return next(filter(None, (search(module, []) for module in sorted(imports))), [])


def test_no_modules_import_each_other_in_a_circle():
    """Within functions as well: a module that needs another one only later still cannot be understood without it."""
    assert circle({module: imported_modules(module, path) for module, path in MODULES.items()}) == []


def test_a_circle_is_seen(tmp_path):
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from scatterbrain.ops import common\n    from ..errors import UserError\n")
    found = imported_modules("scatterbrain.ops.module", path)
    assert found == {"scatterbrain.ops.common", "scatterbrain.errors"} & MODULES.keys()
    assert "scatterbrain.errors" in found


def test_every_package_has_its_place():
    assert {package_of(module) for module in MODULES} - {"src"} <= ALLOWED.keys()


def test_an_upward_import_is_seen(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("import src.tasks.train\n\n\ndef f():\n    from . import x\n    from src import models\n")
    assert list(imports_of("src.utils.module", path)) == ["src.tasks.train", "src.utils.x", "src.models"]
