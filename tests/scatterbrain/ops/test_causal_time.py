"""The measurement of causal attention's time: its rows on tensors of files."""

import json

import numpy as np
import pytest
import torch

from tests.scatterbrain.ops import causal_error, causal_time

LENGTH, HEADS = 216, 3


@pytest.fixture
def inputs(tmp_path):
    """A file with two layers of two heads each."""
    generator = np.random.default_rng(0)
    shape = (1, LENGTH, 2, 8)
    arrays = {f"{name}{layer}": generator.standard_normal(shape).astype("float16") for name in "qkv" for layer in "01"}
    path = tmp_path / "net_qkv.npz"
    np.savez(path, **arrays)
    return path


def test_the_rows_of_layers_are_written(inputs, tmp_path, capsys):
    output, figure = tmp_path / "time.json", tmp_path / "time.png"
    sizes = ["--num-landmarks", "4", "--windows", "1", "--columns", "16,32", "--blocks", "2,4", "--local-windows", "64"]
    files = ["--inputs", str(inputs), "--output", str(output), "--figure", str(figure)]
    options = ["--device", "cpu", "--heads", str(HEADS), "--repeats", "1", "--value-weight", "2"]
    assert causal_time.main([*files, *options, *sizes]) == 0
    content = json.loads(output.read_text())
    assert content["complete"]
    assert "inputs" not in content["settings"]
    names = [
        "SDPA",
        "sbcluster M 4 W 1",
        "sbcluster M 4 W 1 value_weight 2",
        "sblocal, 16 columns",
        "sblocal, 32 columns",
    ]
    rows = content["results"]
    assert [(row["layer"], row["attention"]) for row in rows] == [(f"net {i}", name) for i in "01" for name in names]
    assert all(row["length"] == LENGTH and row["heads"] == HEADS for row in rows)
    assert all(row["milliseconds"]["forward"] > 0 and row["milliseconds"]["both"] > 0 for row in rows)
    assert figure.stat().st_size
    assert "net 1: 0." in capsys.readouterr().out

    arrays = np.load(inputs)
    for layer in "01":
        # the heads of a layer are repeated: the first, the second, the first again
        tensors = [torch.from_numpy(arrays[name + layer]).float().transpose(1, 2)[:, [0, 1, 0]] for name in "qkv"]
        full, _ = causal_error.local(*tensors, LENGTH)
        errors = {row["attention"]: row["error"] for row in rows if row["layer"] == f"net {layer}"}
        expected = causal_error.error(causal_error.with_levels(*tensors, 4, 1)[0], full)
        assert errors["SDPA"] < 1e-5 < expected == pytest.approx(errors["sbcluster M 4 W 1"], rel=1e-3)
        assert errors["sbcluster M 4 W 1 value_weight 2"] != errors["sbcluster M 4 W 1"]


def test_every_row_is_saved_when_it_is_measured(inputs, tmp_path, monkeypatch):
    output = tmp_path / "time.json"
    measure, calls = causal_time.measure, []

    def until_the_third(*arguments):
        if len(calls) == 2:
            assert len(json.loads(output.read_text())["results"]) == 2
            raise KeyboardInterrupt
        calls.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(causal_time, "measure", until_the_third)
    command = ["--inputs", str(inputs), "--output", str(output), "--device", "cpu", "--heads", "2", "--repeats", "1"]
    assert causal_time.main([*command, "--num-landmarks", "4", "--windows", "1"]) == 1
    content = json.loads(output.read_text())
    assert len(content["results"]) == 2
    assert not content["complete"]
