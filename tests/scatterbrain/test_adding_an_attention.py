"""The worked example of `docs/adding_an_attention.md` runs, in a copy of the library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scatterbrain.attention import ATTENTIONS

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = dict(
    re.findall(
        r'^```\w+ title="([^"]+)"\n(.*?)^```$',
        (ROOT / "docs" / "adding_an_attention.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)
CONFIG = "configs/model/t2tattn_cfg/pooled.yaml"
MODULE = "scatterbrain/attention/pooled.py"
USE = """
import sys

import pytest
import torch
from scatterbrain import UserError, create_attention
from scatterbrain.attention import attention_memory

module = create_attention("pooled", 3136, dim_heads=8)
assert module.sizes() == {"num_groups": 98} and attention_memory(module, 3136) == 1 / 32
tensors = torch.randn(3, 2, 40, 2, 8).unbind()
out, weights = create_attention("pooled", 40, dim_heads=8, num_groups=5)(*tensors, need_weights=True)
torch.testing.assert_close(out, torch.einsum("bhts,bshd->bthd", weights, tensors[2]))
for options in ({"num_group": 3}, {"causal": True}, {"num_groups": 0}):
    try:
        create_attention("pooled", 40, **options)
    except UserError as error:
        print(error)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests"]))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the library with the files of the example, and what its test needs."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "scatterbrain", folder / "scatterbrain", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in BLOCKS.items():
        if "/" in name:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "tests" / "helpers.py", folder / "tests")
    return folder


def test_the_example_is_an_attention_and_passes_its_own_test(checkout):
    """In one process, whose working directory and path are the copy."""
    script = BLOCKS["registration"] + USE
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr
    messages = process.stdout.splitlines()
    assert "Did you mean 'num_groups'" in messages[0]
    assert "cannot be causal" in messages[1]
    assert "num_groups=0" in messages[2]
    assert "12 passed" in messages[-1]


def test_the_config_of_the_example_has_the_options_of_the_module():
    stages = yaml.safe_load(BLOCKS[CONFIG])
    assert set(stages) == {"t2tattn1_cfg", "t2tattn2_cfg"}
    for stage in stages.values():
        assert stage["name"] == "pooled"
        assert set(stage) - {"name", "memory_fraction"} <= set(re.findall(r"^        (\w+): ", BLOCKS[MODULE], re.M))
    assert "pooled" not in ATTENTIONS  # an example, not one of the library's


def test_the_example_is_formatted(checkout):
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    files = [name for name in BLOCKS if name.endswith(".py")]
    for command in (["format", "--check"], ["check", "--no-cache"]):
        options = ["--config", str(ROOT / "pyproject.toml"), *files]
        process = subprocess.run([str(ruff), *command, *options], cwd=checkout, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr
