"""The library as a package: what its wheel holds, what it imports, and that what it exports is documented."""

from __future__ import annotations

import email
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import scatterbrain
from scatterbrain.attention import ATTENTIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that has to succeed."""
    process = subprocess.run([str(x) for x in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


# The wheel ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The library's wheel, built without network from a copy: a build leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "scatterbrain", folder / "scatterbrain", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", "dist")
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_the_library_alone(wheel):
    assert wheel.name == f"scatterbrain_attention-{scatterbrain.__version__}-py3-none-any.whl"
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in (ROOT / "scatterbrain").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert held == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"scatterbrain/py.typed", "scatterbrain/ops/scatterbrain/README.md"} <= held


def test_metadata_of_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("scatterbrain-attention", scatterbrain.__version__)
    assert [x for x in metadata.get_all("Requires-Dist") if "extra ==" not in x] == ["torch>=2.6"]
    extras = {"experiment", "timm", "transformers", "diffusers", "profile", "dev", "docs"}
    assert set(metadata.get_all("Provides-Extra")) == extras


def test_the_installed_wheel_runs_outside_the_checkout(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    options = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=tmp_path)
    # torch is that of the running environment, whose folders come after the new environment's own
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "running.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    script = """
import torch, scatterbrain
print(scatterbrain.__file__)
query, key, value = torch.randn(3, 1, 2, 100, 16).unbind()
projection = scatterbrain.draw_projection(4, 16, seed=0)
print(tuple(scatterbrain.scatterbrain_attention(query, key, value, projection, 7).shape))
module = scatterbrain.create_attention("sbcluster", 100, dim_heads=16)
print(tuple(module(*(x.transpose(1, 2) for x in (query, key, value)))[0].shape))
"""
    place, *shapes = run(python, "-c", script, cwd=tmp_path).splitlines()
    assert Path(place).is_relative_to(packages)
    assert shapes == ["(1, 2, 100, 16)", "(1, 100, 2, 16)"]


def requirements(lines) -> set[str]:
    return {text for line in lines if (text := line.split("#")[0].strip())}


def test_requirements_are_those_of_the_package_and_its_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = requirements((ROOT / "requirements.txt").read_text().splitlines())
    assert listed == {*project["dependencies"], *extras["experiment"], *extras["dev"]}
    assert {*extras["timm"], *extras["profile"]} <= set(extras["experiment"])
    assert requirements((ROOT / "docs/requirements.txt").read_text().splitlines()) == set(extras["docs"])


# Imports ------------------------------------------------------------------------------------------------------------

IMPORT = """
import sys, time, torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ImportError("the library imports " + name)

before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
import scatterbrain
new = {{name.split(".")[0] for name in set(sys.modules) - before}} - {{"scatterbrain", "torch"}}
print(sorted(new - set(sys.stdlib_module_names)))
for name in scatterbrain.ATTENTIONS:
    module = scatterbrain.create_attention(name, 64, dim_heads=8)
    out, _ = module(*torch.randn(3, 1, 64, 2, 8).unbind())
    assert out.shape == (1, 64, 2, 8)
print(sorted(name for name in ("src", "triton") if name in sys.modules))
"""
# of this process alone, since others may keep the processors busy
TIME = "import time, torch; start = time.process_time(); import scatterbrain; print(time.process_time() - start)"
REFUSED = {
    *("src", "scripts", "tests", "hydra", "omegaconf", "pytorch_lightning", "lightning", "torchmetrics", "timm"),
    *("torchvision", "transformers", "einops", "munch", "rich", "matplotlib", "PIL", "safetensors", "pyarrow", "numpy"),
}


def test_the_library_imports_torch_alone():
    out = run(sys.executable, "-c", IMPORT.format(refused=sorted(REFUSED)), cwd=ROOT).splitlines()
    assert out == ["[]", "[]"], "modules beside the standard library and torch"


def test_the_import_is_fast():
    """Under 50 ms beyond that of torch, in the fastest of at most five processes."""
    seconds = []
    while not seconds or (min(seconds) >= 0.05 and len(seconds) < 5):
        seconds.append(float(run(sys.executable, "-c", TIME, cwd=ROOT)))
    assert min(seconds) < 0.05


# Names --------------------------------------------------------------------------------------------------------------

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(scatterbrain.__path__, "scatterbrain.")
    if ".triton" not in module.name
)


def exports() -> list[tuple[str, object]]:
    """Functions and classes that the library's packages export, by their full names."""
    found = {}
    for name in ("scatterbrain", *MODULES):
        module = importlib.import_module(name)
        for export in getattr(module, "__all__", ()):
            value = getattr(module, export)
            if callable(value):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return sorted(found.items())


def undocumented(docstring: str, function: object) -> list[str]:
    """Parameters of a function that the section Args of a docstring does not describe."""
    documented = set(re.findall(r"^ +\*{0,2}(\w+): \S", docstring, re.MULTILINE))
    return [name for name in inspect.signature(function).parameters if name not in documented]


@pytest.mark.parametrize(("name", "value"), exports(), ids=lambda x: x if isinstance(x, str) else "")
def test_every_export_documents_all_its_arguments(name, value):
    assert inspect.getdoc(value)
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    documented = value
    if inspect.isclass(value):  # the class that defines the constructor
        documented = next(cls for cls in value.__mro__ if "__init__" in vars(cls))
    assert undocumented(inspect.getdoc(documented), value) == []


def test_every_public_function_has_a_docstring():
    missing = []
    for name in MODULES:
        for which, value in vars(importlib.import_module(name)).items():
            own = getattr(value, "__module__", None) == name and not which.startswith("_")
            if own and (inspect.isfunction(value) or inspect.isclass(value)) and not value.__doc__:
                missing.append(f"{name}.{which}")
    assert missing == []


def test_all_names_are_sorted_and_there():
    assert scatterbrain.__all__ == sorted(scatterbrain.__all__)
    assert all(hasattr(scatterbrain, name) for name in scatterbrain.__all__)
    assert {kind.module.__name__ for kind in ATTENTIONS.values()} <= set(scatterbrain.__all__)


@pytest.mark.parametrize(
    ("first_address", "library", "name"),
    [
        ("src.ops.scatterbrain", "scatterbrain.ops.scatterbrain", "scatterbrain_attention"),
        ("src.ops.landmarks", "scatterbrain.ops.clusters", "landmark_attention"),
        ("src.ops.landmarks", "scatterbrain.ops.clusters", "paired_landmark_attention"),
        ("src.ops.projection", "scatterbrain.ops.common.projection", "draw_projection"),
        ("src.models.modules.attention", "scatterbrain.attention", "create_attention"),
        ("src.models.modules.attention", "scatterbrain.attention", "ATTENTIONS"),
        ("src.models.modules.attention.full", "scatterbrain.attention.full", "FullAttention"),
        ("src.models.modules.attention.local", "scatterbrain.attention.local", "LocalAttention"),
        ("src.models.modules.attention.performer", "scatterbrain.attention.performer", "PerformerAttention"),
        ("src.models.modules.attention.sblocal", "scatterbrain.attention.sblocal", "SBLocalAttention"),
    ],
)
def test_first_addresses_export_the_same_objects(first_address, library, name):
    old, new = importlib.import_module(first_address), importlib.import_module(library)
    assert getattr(scatterbrain, name) is getattr(old, name)
    for export in old.__all__:
        assert getattr(old, export) is getattr(new, export)
