"""The picture of the supports: what is drawn, and mistakes in one line."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from scatterbrain.ops.common.windows import window_mask
from scatterbrain.ops.sparse.block_sparse import block_layout
from scatterbrain.ops.sparse.window2d import neighbourhood_mask
from scripts.plot_supports import main
from src.analysis.plots import supports


def test_draws_every_support(tmp_path, monkeypatch, capsys):
    drawn = []
    draw = supports.draw
    monkeypatch.setattr(supports, "draw", lambda masks: drawn.append((masks, draw(masks))) or drawn[-1][1])
    output = tmp_path / "supports.png"
    arguments = ["--length=36", "--window=6", "--block=5", "--seed=4", f"--output={output}"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{output}\n"
    with Image.open(output) as image:
        assert image.format == "PNG"
    ((masks, figure),) = drawn

    block = torch.arange(36) // 5
    expected = {
        "Local window, 6": window_mask(36, 36, 6),
        "Neighbourhood, 2 \N{MULTIPLICATION SIGN} 3": neighbourhood_mask(6, 6, (2, 3)),
    }
    for name, title in (("longformer", "Longformer"), ("bigbird", "BigBird"), ("openai", "OpenAI, fixed")):
        expected[f"{title}, blocks of 5"] = block_layout(name, 8, 8, 4)[block[:, None], block]
    assert list(masks) == list(expected) == [axes.get_title() for axes in figure.axes]
    for axes, (title, mask) in zip(figure.axes, expected.items(), strict=True):
        assert torch.equal(masks[title], mask)
        assert torch.equal(torch.tensor(axes.images[0].get_array().data.copy()), mask)
        assert axes.get_xlabel() == f"{mask.sum().item() / 36:.1f} keys per query"


@pytest.mark.parametrize("suffix", ["pdf", "SVG"])
def test_formats(tmp_path, suffix):
    output = tmp_path / f"supports.{suffix}"
    assert main(["--length=4", "--window=1", "--block=9", f"--output={output}"]) == 0
    assert output.stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length=200"], "--length 200 is no square image of tokens. Try 196 or 225."),
        (["--length=4225"], "--length=4225 is not valid. Give a whole number from 1 to 4096."),
        (["--length=0"], "'0' is not an integer of at least 1"),
        (["--block=x"], "'x' is not an integer of at least 1"),
        (["--window=-3"], "'-3' is not an integer of at least 1"),
        (["--seed=-1"], "--seed=-1 is not valid"),
        (["--output={folder}/supports.jpg"], "supports.jpg: the name has to end in .png, .pdf or .svg."),
        (["--output={folder}/none/supports.png"], "has to be a file in a folder that exists"),
        (["--blocks=3"], "--help lists the options"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, options, message):
    options = [f"--output={tmp_path}/supports.png", *(option.format(folder=tmp_path) for option in options)]
    assert main(options) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("Error: ")
    assert message in line
    assert not list(tmp_path.iterdir())
