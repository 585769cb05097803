"""`python -m scatterbrain profile`: what it prints and writes, and its exit status for wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import scatterbrain
from scatterbrain.tuning.command import main

ROOT = Path(__file__).resolve().parents[3]
timm = pytest.importorskip("timm", minversion="1.0.23")
pytest.importorskip("rich")
pytest.importorskip("torchvision")
image = pytest.importorskip("PIL.Image")

MODEL = "vit_tiny_patch16_224"
SMALL = (
    "--image-size",
    "64",
    "--min-tokens",
    "4",
    "--methods",
    "local,strided",
    "--budgets",
    "1/4",
    "1",
    "--repeats",
    "1",
)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    torch.manual_seed(0)
    for number in range(5):
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8)
        image.fromarray(pixels.numpy()).save(folder / "a" / f"{number}.png")
    (folder / "readme.txt").write_text("no image")
    return folder


def test_profile_plan_and_pages(images, tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("html", "json", "png", "plan.json")}
    files["html"].write_text("mine")
    arguments = ["profile", "--timm", MODEL, "--images", str(images), "--random-weights", *SMALL, "--limit", "3"]
    arguments += ["--batch-size", "2", "--output", str(files["html"]), "--json", str(files["json"])]
    arguments += ["--plan", str(files["plan.json"]), "--max-error", "0.5", "--figure", str(files["png"])]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert all(
        word in printed.out for word in ("blocks.11.attn", "strided", "Plan for vit_tiny_patch16_224", "held out")
    )
    assert f"Wrote {files['plan.json']}" in printed.err.replace("\n", "")
    assert (tmp_path / "out.html.bak").read_text() == "mine"
    report = scatterbrain.ProfileReport.load(files["json"])
    assert [call.name for call in report.calls] == [f"blocks.{i}.attn" for i in range(12)]
    assert all(call.num_calls == 2 for call in report.calls)  # three images in batches of two
    assert [bool(call.maps) for call in report.calls] == [i in (0, 6, 11) for i in range(12)]
    assert report.budgets == [1 / 4, 1.0]
    plan = scatterbrain.Plan.load(files["plan.json"])
    assert plan.goal == "max_error=0.5"
    assert "data:image/png" in files["html"].read_text()
    assert image.open(files["png"]).size[0] > 100


def test_a_report_is_written_where_no_plan_reaches_the_goal(images, tmp_path, capsys):
    arguments = ["profile", "--timm", MODEL, "--images", str(images), "--random-weights", *SMALL, "--limit", "1"]
    files = ["--output", str(tmp_path / "out.html"), "--plan", str(tmp_path / "plan.json")]
    assert main([*arguments, *files, "--speed-up", "1e9"]) == 1
    assert "speed_up=1e+09 is out of reach" in capsys.readouterr().err.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["out.html"]


def test_a_checkpoint(images, tmp_path, capsys):
    torch.manual_seed(5)
    model = timm.create_model(MODEL)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pth")
    arguments = [
        "profile",
        "--timm",
        MODEL,
        "--images",
        str(images),
        "--checkpoint",
        str(tmp_path / "model.pth"),
        *SMALL,
    ]
    # its position embeddings are resized to the images
    assert main([*arguments, "--limit", "1", "--json", str(tmp_path / "one.json")]) == 0
    torch.save({"head.weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    arguments[arguments.index(str(tmp_path / "model.pth"))] = str(tmp_path / "wrong.pth")
    assert main(arguments) == 1
    assert "wrong.pth holds no weights of VisionTransformer" in capsys.readouterr().err
    assert json.loads((tmp_path / "one.json").read_text())["model"] == MODEL


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--timm": "vit_tinny_patch16_224"}, "Did you mean 'vit_tiny_patch16_224'"),
        ({"--images": "missing"}, "--images missing is no folder"),
        ({"--images": str(ROOT / "docs" / "data")}, "has no image"),
        ({"--checkpoint": "missing.pth"}, "--checkpoint missing.pth does not exist"),
        ({"--methods": "locl"}, "Unknown attention 'locl'"),
        ({"--budgets": "x"}, "argument --budgets: 'x' is no share"),
        ({"--budgets": "3"}, "budgets: 3.0 is not valid"),
        ({"--limit": "0"}, "argument --limit: '0' is no whole number"),
        ({"--device": "nowhere"}, "--device nowhere is not there"),
        ({"--figure": "heat.map"}, "--figure heat.map is no file of .png"),
        ({"--output": "missing/report.html"}, "report.html cannot be written"),
        ({"--json": "same.json", "--plan": "same.json"}, "name the same file"),
        ({"--max-error": "0.1", "--speed-up": "2"}, "not allowed with argument"),
        ({"--max-error": "-1"}, "max_error=-1.0 is not valid"),
        ({"--seed": "-1"}, "seed=-1"),
        ({"--seed": str(2**70)}, "seed="),
        ({"--budgets": "1e400"}, "'1e400' is no share"),
        ({"--device": "meta"}, "--device meta is not there"),
        ({"--json": "x" * 300}, "cannot be written"),
        ({"--image-size": "10"}, "--image-size 10: vit_tiny_patch16_224 fails on such images (Calculated padded input"),
        ({"--maps": "blocks.0.atn"}, "maps: no module is named 'blocks.0.atn'. Did you mean 'blocks.0.attn'"),
    ],
)
def test_wrong_input(images, capsys, changed, message):
    options = {"--timm": MODEL, "--images": str(images), "--image-size": "64", "--min-tokens": "4", "--limit": "1"}
    options |= {"--methods": "local", "--budgets": "1/4", "--repeats": "1"} | changed
    weights = [] if "--checkpoint" in changed else ["--random-weights"]
    assert main(["profile", *weights, *(word for pair in options.items() for word in pair)]) == 1
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert error.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error


def test_a_file_that_is_no_image(images, capsys):
    (images / "a" / "0.png").write_text("text")
    assert main(["profile", "--timm", MODEL, "--images", str(images), "--random-weights", *SMALL]) == 1
    assert "0.png is no readable image" in capsys.readouterr().err.replace("\n", "")


def test_a_damaged_part_of_an_image(images, capsys):
    path = images / "a" / "0.png"
    data = path.read_bytes()
    start = data.index(b"IDAT") - 4
    size = int.from_bytes(data[start : start + 4], "big")
    first = b"IDAT" + data[start + 8 : start + 8 + size // 2]
    first = (size // 2).to_bytes(4, "big") + first + zlib.crc32(first).to_bytes(4, "big")
    path.write_bytes(data[:start] + first + b"\0\0\0\5\0\1\2\3" + data[start + 8 + size // 2 :])
    assert main(["profile", "--timm", MODEL, "--images", str(images), "--random-weights", *SMALL]) == 1
    assert "0.png is no readable image" in capsys.readouterr().err.replace("\n", "")


def test_names_that_look_like_markup_of_rich(images, tmp_path, capsys):
    folder = tmp_path / "[a]"
    (images / "a").rename(folder)
    arguments = ["profile", "--timm", MODEL, "--images", str(folder), "--random-weights", *SMALL]
    assert main([*arguments, "--json", str(tmp_path / "[bold]r[*].json"), "--max-error", "1"]) == 0
    assert "[bold]r[*].json" in capsys.readouterr().err.replace("\n", "")
    (folder / "[").mkdir()
    (tmp_path / "[").mkdir()
    assert main([*arguments, "--plan", str(tmp_path / "[" / "]p.json")]) == 0
    assert "[/]p.json" in capsys.readouterr().err.replace("\n", "")


def test_weights_that_cannot_be_downloaded(images, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr(timm, "create_model", fail)
    assert main(["profile", "--timm", MODEL, "--images", str(images)]) == 1
    assert "its weights could not be loaded (no network). Give --checkpoint" in capsys.readouterr().err.replace(
        "\n", " "
    )


def test_the_module_runs_and_names_missing_packages():
    """Help needs torch alone, and a missing package is named with the command that installs it."""
    process = subprocess.run(
        [sys.executable, "-m", "scatterbrain", "profile", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 0
    assert "--speed-up" in process.stdout
    script = (
        "import sys; sys.modules['timm'] = None; from scatterbrain.tuning.command import main; "
        "sys.exit(main(['profile', '--timm', 'x', '--images', '.']))"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 1
    assert process.stderr == (
        "error: profile needs the package timm. Run: pip install 'scatterbrain-attention[profile]'\n"
    )
