"""The scripts that measure and draw approximations of full attention, end to end on tiny data."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from scatterbrain.ops.full import naive_full_attention
from scatterbrain.ops.scatterbrain import naive_scatterbrain_attention
from scripts import measure_approximation, plot_attention_maps
from src.analysis.approximation import (
    attention_weights,
    effective_keys,
    largest_logit,
    load_model,
    relative_errors,
)
from src.analysis.plots import attention_maps
from src.datamodules.image_folder import ImageFolderDataModule
from src.datamodules.sampling import spread
from src.models.attention_inputs import (
    capture_inputs,
    capture_stage_inputs,
    create_block_attentions,
    create_stage_attentions,
)
from src.utils.files import sha256_of_file
from tests.src.tasks.setup import IMAGE_SIZE, NUM_CLASSES, make_checkpoint, make_images

VARIANT = "t2t_vit_t_7"
NUM_IMAGES = 7
MEMORY = 1 / 4  # 64 and 16 tokens: windows and features of several each
# Batches of other sizes are other orders of additions, in float32.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs in `val`, and a checkpoint."""
    folder = make_images(tmp_path_factory.mktemp("approximation"), NUM_IMAGES)
    make_checkpoint(folder / "t7.pth", VARIANT)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder / "t7.pth")[1]


@pytest.fixture(scope="module")
def batch(folder):
    """All images, as an evaluation decodes and normalises them."""
    datamodule = ImageFolderDataModule(folder, IMAGE_SIZE, NUM_CLASSES, batch_size=NUM_IMAGES, num_workers=0)
    return datamodule.normalise(next(iter(datamodule.test_dataloader()))[0])


def options(folder, **changes):
    """Command line; None leaves an option out."""
    given = {"checkpoint": folder / "t7.pth", "data_dir": folder, "memory_fraction": MEMORY, "threads": 1}
    given |= {"device": "cpu", **changes}
    given = {name: value for name, value in given.items() if value is not None}
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


# Measuring ------------------------------------------------------------------------------------------------------------

MEASURED = {"seed": 5, "num_seeds": 2, "batch_size": 3, "matrix_images": 2}


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("measured") / "approximation.json"
    assert measure_approximation.main(options(folder, **MEASURED, output=output)) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", ["local", "performer", "sblocal"])
@pytest.mark.parametrize("stage", [1, 2])
def test_errors_are_means_over_images_and_seeds(measured, model, batch, name, stage):
    (row,) = (row for row in measured["results"] if (row["attention"], row["stage"]) == (name, stage))
    modules = [create_stage_attentions(name, model, MEMORY, seed)[stage - 1] for seed in (5, 6)]
    modules = modules[:1] if name == "local" else modules
    assert row["options"] == modules[0].sizes()
    some = [1, 5]  # the middles of two halves of seven
    for kind, images in (("output_error", batch), ("matrix_error", batch[some])):
        inputs = capture_stage_inputs(model, images)[stage - 1]
        values = relative_errors(inputs, modules, of_weights=kind == "matrix_error").mean(1).tolist()
        assert row[kind]["per_seed"] == pytest.approx(values, rel=ROUNDING)
        assert row[kind]["mean"] == pytest.approx(statistics.fmean(values), rel=ROUNDING)
        if name == "local":
            assert row[kind]["std"] is None
        else:
            # a small difference of the values, whose own rounding it has
            expected = abs(values[0] - values[1]) / 2**0.5
            assert row[kind]["std"] == pytest.approx(expected, abs=ROUNDING * values[0])
            assert expected > 100 * ROUNDING * values[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_error_of_the_query_part_is_relative_to_what_depends_on_the_query(measured, model, batch, stage):
    (row,) = (row for row in measured["results"] if (row["attention"], row["stage"]) == ("local", stage))
    inputs = capture_stage_inputs(model, batch)[stage - 1]
    local = create_stage_attentions("local", model, MEMORY, 5)[stage - 1]
    full, out = (
        attention(inputs.query, inputs.key, inputs.value)[0].double()
        for attention in (model.token_attentions[stage - 1], local)
    )
    ratios = [(a - b).norm() / (b - b.mean(0)).norm() for a, b in zip(out, full, strict=True)]
    assert row["query_error"]["mean"] == pytest.approx(torch.stack(ratios).mean().item(), rel=ROUNDING)
    assert row["query_error"]["mean"] > row["output_error"]["mean"]


def test_sharpness_of_full_attention(measured, model, batch):
    inputs = capture_stage_inputs(model, batch[[1, 5]])
    for row, stage, attention in zip(measured["full_attention"], inputs, model.token_attentions, strict=True):
        assert row["num_tokens"] == stage.query.shape[1]
        assert row["scale"] == attention.softmax_temp
        keys = effective_keys(attention_weights(stage, attention)).mean().item()
        assert row["effective_keys"] == pytest.approx(keys, rel=ROUNDING)
        assert row["largest_logit"] == pytest.approx(largest_logit(stage).max().item(), rel=ROUNDING)


def test_provenance(measured, folder):
    assert measured["model"] == VARIANT
    assert measured["image_size"] == IMAGE_SIZE
    assert measured["memory_fraction"] == MEMORY
    assert measured["seeds"] == [5, 6]
    assert measured["checkpoint"] == {"path": str(folder / "t7.pth"), "sha256": sha256_of_file(folder / "t7.pth")}
    assert measured["data"] == {
        "dir": str(folder),
        "split": "val",
        "num_images": NUM_IMAGES,
        "num_matrix_images": 2,
    }
    assert measured["versions"]["torch"] == torch.__version__
    assert measured["machine"]["processor"]
    assert measured["command"].startswith("measure_approximation.py --checkpoint=")


def test_a_part_of_the_photographs(folder, tmp_path, capsys, measured):
    output = tmp_path / "some.json"
    arguments = options(folder, limit=3, num_seeds=1, output=output)
    assert measure_approximation.main([*arguments, "--attentions", "sblocal,full,sblocal"]) == 0
    found = json.loads(output.read_text())
    # twelve matrices are requested, and there are no more than three photographs
    assert (found["data"]["num_images"], found["data"]["num_matrix_images"]) == (3, 3)
    assert [(row["attention"], row["stage"]) for row in found["results"]] == [
        ("sblocal", 1),
        ("full", 1),
        ("sblocal", 2),
        ("full", 2),
    ]
    assert all(row["output_error"]["mean"] < ROUNDING for row in found["results"] if row["attention"] == "full")
    assert all(row["output_error"]["std"] is None for row in found["results"])
    printed = capsys.readouterr().out
    assert "error of output" in printed
    assert f"{found['results'][0]['output_error']['mean']:.3f}" in printed


def test_layers_of_the_stages_are_named(measured):
    assert [(row["layer"], row["stage"]) for row in measured["results"]] == 3 * [("stage 1", 1)] + 3 * [("stage 2", 2)]
    assert [(row["layer"], row["stage"]) for row in measured["full_attention"]] == [("stage 1", 1), ("stage 2", 2)]
    assert (measured["layers"], measured["backbone_means"], measured["skipped"]) == ("stages", [], [])


BLOCKS = 0.8  # of 5 tokens: 4 columns
BLOCK_ATTENTIONS = ("local", "sblocal", "pairedcluster")


@pytest.fixture(scope="module")
def backbone(folder, tmp_path_factory):
    output, text = tmp_path_factory.mktemp("backbone") / "approximation.json", io.StringIO()
    changes = {**MEASURED, "layers": "backbone", "memory_fraction": BLOCKS, "output": output}
    names = ",".join((BLOCK_ATTENTIONS[0], "local2d", *BLOCK_ATTENTIONS[1:]))
    with contextlib.redirect_stdout(text):
        assert measure_approximation.main([*options(folder, **changes), "--attentions", names]) == 0
    return json.loads(output.read_text()), text.getvalue()


def test_errors_of_the_blocks(backbone, model, batch):
    found, _ = backbone
    layers = [f"block {number}" for number in range(1, 8)]
    assert [(row["layer"], row["attention"]) for row in found["results"]] == [
        (layer, name) for layer in layers for name in BLOCK_ATTENTIONS
    ]
    some = [1, 5]
    inputs = {
        "output_error": capture_inputs(model, batch, "backbone"),
        "matrix_error": capture_inputs(model, batch[some], "backbone"),
    }
    for row in found["results"]:
        number = layers.index(row["layer"])
        seeds = (5, 6) if row["attention"] == "sblocal" else (5,)
        modules = [create_block_attentions(row["attention"], model, BLOCKS, seed)[number] for seed in seeds]
        assert row["stage"] is None
        assert row["options"] == modules[0].sizes()
        assert row["memory"] == min(1, modules[0].memory_columns(5) / 5)
        assert (row["bias"] is None) == (row["spread"] is None) == (len(seeds) == 1)
        for kind, captured in inputs.items():
            values = relative_errors(captured[number], modules, of_weights=kind == "matrix_error").mean(1).tolist()
            assert row[kind]["per_seed"] == pytest.approx(values, rel=ROUNDING)
    for row, layer, stage in zip(found["full_attention"], layers, inputs["matrix_error"], strict=True):
        assert (row["layer"], row["stage"], row["num_tokens"]) == (layer, None, 5)
        assert row["scale"] == stage.scale
        keys = effective_keys(attention_weights(stage, create_block_attentions("full", model)[0])).mean().item()
        assert row["effective_keys"] == pytest.approx(keys, rel=ROUNDING)
        assert row["largest_logit"] == pytest.approx(largest_logit(stage).max().item(), rel=ROUNDING)


def test_means_of_the_blocks(backbone):
    found, printed = backbone
    assert [(row["attention"], row["layer"]) for row in found["backbone_means"]] == [
        (name, "blocks") for name in BLOCK_ATTENTIONS
    ]
    for mean in found["backbone_means"]:
        rows = [row for row in found["results"] if row["attention"] == mean["attention"]]
        assert len(rows) == 7
        for kind in ("output_error", "matrix_error"):
            values = [statistics.fmean(each) for each in zip(*(row[kind]["per_seed"] for row in rows), strict=True)]
            assert mean[kind]["per_seed"] == pytest.approx(values)
            assert mean[kind]["mean"] == pytest.approx(statistics.fmean(row[kind]["mean"] for row in rows))
            if mean["attention"] == "sblocal":
                # a seed is that of all blocks, so that the standard deviations of the blocks do not add
                assert mean[kind]["std"] == pytest.approx(statistics.stdev(values))
        for kind in ("bias", "spread"):
            expected = None if mean["attention"] != "sblocal" else statistics.fmean(row[kind] for row in rows)
            assert mean[kind] == (expected if expected is None else pytest.approx(expected))
        (line,) = (line for line in printed.splitlines() if mean["attention"] in line.split() and " blocks " in line)
        assert f"{mean['output_error']['mean']:.3f}" in line


def test_what_the_backbone_cannot_have_is_left_out_and_named(backbone):
    found, printed = backbone
    reason = "5 tokens are no image with rows of 2: give image_width, tokens of a row."
    assert found["skipped"] == [{"attention": "local2d", "layer": "backbone", "reason": reason}]
    assert printed.splitlines()[-1] == f"local2d left out of the backbone: {reason}"


def test_all_layers_in_one_run(folder, tmp_path, capsys, measured, backbone):
    output = tmp_path / "all.json"
    changes = {**MEASURED, "layers": "all", "output": output}
    assert measure_approximation.main(options(folder, **changes)) == 0
    found = json.loads(output.read_text())
    assert [row["layer"] for row in found["results"][::3]] == [
        "stage 1",
        "stage 2",
        *(f"block {number}" for number in range(1, 8)),
    ]
    # the stages are what they are alone
    assert found["results"][:6] == measured["results"]
    assert found["full_attention"][:2] == measured["full_attention"]
    printed = capsys.readouterr().out
    for layer in ("stage 1", "block 7"):
        assert f" {layer} " in printed
        assert f"{layer}, full attention: " in printed


def test_nothing_that_the_backbone_can_have(folder, capsys):
    line = refused(measure_approximation, [*options(folder, layers="backbone"), "--attentions", "local2d"], capsys)
    assert "5 tokens are no image" in line


def test_items_are_spread_evenly():
    assert spread(7, 2) == [1, 5]
    assert spread(736, 12)[::11] == [30, 705]
    assert spread(3, 12) == [0, 1, 2]


# Drawing --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to the figure."""
    calls = []
    draw = attention_maps.draw
    monkeypatch.setattr(attention_maps, "draw", lambda *given: calls.append(given) or draw(*given))
    return calls


def test_the_picture(folder, tmp_path, drawn):
    output = tmp_path / "maps.png"
    assert plot_attention_maps.main(options(folder, output=output)) == 0
    with Image.open(output) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width == 976
        assert 2400 < picture.height < 2700
        colours = {colour: count for count, colour in picture.convert("RGB").getcolors(256)}
    assert output.stat().st_size < 600_000
    assert colours[(255, 255, 255)] > 300_000, "its ground"
    assert len(colours) > 100
    ((photographs, conditions),) = drawn
    assert len({photograph.path.split("/")[0] for photograph in photographs}) == 2, "of different classes"
    assert [list(stage.maps) for stage in photographs[0].stages] == 2 * [["full", "local", "performer", "sblocal"]]
    assert VARIANT in conditions


def test_maps_are_rows_of_the_matrices(folder, tmp_path, drawn, model, batch):
    names = [path.relative_to(folder / "val").as_posix() for path in sorted((folder / "val").rglob("*.png"))]
    arguments = options(folder, output=tmp_path / "maps.png", seed=3)
    arguments += ["--images", names[4], "--token", "0.5", "0.999", "--attentions", "sblocal"]
    assert plot_attention_maps.main(arguments) == 0
    (photograph,) = drawn[0][0]
    assert photograph.path == names[4]
    inputs = capture_stage_inputs(model, batch[4:5])
    for number, (stage, side) in enumerate(zip(photograph.stages, (8, 4), strict=True)):
        assert stage.token == (side // 2, side - 1)
        row = side // 2 * side + side - 1
        tensors = [x.transpose(1, 2) for x in (inputs[number].query, inputs[number].key, inputs[number].value)]
        module = create_stage_attentions("sblocal", model, MEMORY, seed=3)[number]
        window = module.sizes()["local_context"]
        full = naive_full_attention(*tensors, inputs[number].scale)[1][0, 0, row]
        sblocal = naive_scatterbrain_attention(*tensors, module.projection_matrix, window, inputs[number].scale)
        sblocal = sblocal[1][0, 0, row]
        for name, weights in (("full", full), ("sblocal", sblocal)):
            drawn_map = stage.maps[name]
            np.testing.assert_allclose(drawn_map.weights, (weights * side**2).view(side, side), rtol=1e-4)
            assert drawn_map.effective_keys == pytest.approx(effective_keys(weights).item(), rel=ROUNDING)
            error = (weights - full).norm() / full.norm()
            assert drawn_map.error == pytest.approx(error.item(), abs=ROUNDING)
            assert drawn_map.options == ({} if name == "full" else module.sizes())


def test_the_photograph_is_drawn_in_its_own_colours(tmp_path, folder, drawn):
    colour = (255, 128, 0)
    for name in range(NUM_CLASSES):
        (tmp_path / "val" / f"c{name}").mkdir(parents=True)
        Image.new("RGB", (50, 40), colour).save(tmp_path / "val" / f"c{name}" / "one.png")
    assert plot_attention_maps.main(options(folder, data_dir=tmp_path, output=tmp_path / "maps.png")) == 0
    pixels = drawn[0][0][0].pixels
    assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    np.testing.assert_allclose(255 * pixels, np.broadcast_to(colour, pixels.shape), atol=1e-3)


def test_edges_of_a_window():
    # five tokens in the middle of a row: two long sides of five, two ends
    inside_a_row = attention_maps.window_edges(8, (3, 4), 5)
    assert len(inside_a_row) == len(set(inside_a_row)) == 12
    x, y = np.array(inside_a_row).reshape(-1, 2).T
    assert (x.min(), x.max(), y.min(), y.max()) == (1.5, 6.5, 2.5, 3.5)
    # the same at the end of a row: three tokens there, two at the beginning of the next
    wrapped = attention_maps.window_edges(8, (3, 7), 5)
    assert len(wrapped) == (2 * 3 + 2) + (2 * 2 + 2)
    x, y = np.array(wrapped).reshape(-1, 2).T
    assert (x.min(), x.max(), y.min(), y.max()) == (-0.5, 7.5, 2.5, 4.5)
    # at the corner of the image the window is cut off
    assert len(attention_maps.window_edges(8, (0, 0), 5)) == 2 * 3 + 2


# Photographs of one's own, without classes ----------------------------------------------------------------------------


@pytest.fixture
def plain(folder, tmp_path):
    """The photographs of `val` in a folder without class folders, and their paths in the order of `val`."""
    (tmp_path / "mine").mkdir()
    paths = sorted((folder / "val").rglob("*.png"))
    return [shutil.copy(path, tmp_path / "mine" / f"{number}.png") for number, path in enumerate(paths)]


@pytest.mark.parametrize("what", ["files", "folder"])
def test_errors_need_no_labels(folder, plain, tmp_path, measured, what):
    images = [str(path) for path in plain] if what == "files" else [str(plain[0].parent)]
    output = tmp_path / "approximation.json"
    arguments = options(folder, **MEASURED, data_dir=None, output=output)
    assert measure_approximation.main([*arguments, "--images", *images]) == 0
    found = json.loads(output.read_text())
    assert found["results"] == measured["results"]
    assert found["data"] == {"images": images, "num_images": NUM_IMAGES, "num_matrix_images": 2}


def test_errors_of_some_photographs_of_a_split(folder, tmp_path):
    output = tmp_path / "approximation.json"
    arguments = options(folder, **MEASURED, output=output)
    assert measure_approximation.main([*arguments, "--images", "c1/001.png", "c0/000.png"]) == 0
    data = json.loads(output.read_text())["data"]
    assert (data["images"], data["dir"], data["num_images"]) == (["c1/001.png", "c0/000.png"], str(folder), 2)


def test_maps_need_no_labels(folder, plain, tmp_path, drawn):
    names = [path.relative_to(folder / "val").as_posix() for path in sorted((folder / "val").rglob("*.png"))]
    arguments = options(folder, output=tmp_path / "maps.png")
    assert plot_attention_maps.main([*arguments, "--images", names[2]]) == 0
    arguments = options(folder, output=tmp_path / "maps.png", data_dir=None)
    assert plot_attention_maps.main([*arguments, "--images", str(plain[2])]) == 0
    theirs, ours = (photographs[0] for photographs, _ in drawn)
    assert ours.path == "mine/2.png"
    np.testing.assert_array_equal(ours.pixels, theirs.pixels)
    for a, b in zip(ours.stages, theirs.stages, strict=True):
        for name in a.maps:
            np.testing.assert_array_equal(a.maps[name].weights, b.maps[name].weights)


# Mistakes -------------------------------------------------------------------------------------------------------------

BOTH = (measure_approximation, plot_attention_maps)


def refused(script, arguments, capsys):
    """The one line on stderr."""
    assert script.main(arguments) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == ""
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        *((script, {"checkpoint": "{folder}/t8.pth"}, "Did you mean {folder}/t7.pth?") for script in BOTH),
        *((script, {"checkpoint": None}, "--checkpoint") for script in BOTH),
        *((script, {"attentions": "sblocl"}, "'sblocl' is unknown. Did you mean 'sblocal'") for script in BOTH),
        *((script, {"split": "test"}, "Give --data-dir the folder that holds 'test'") for script in BOTH),
        *((script, {"memory_fraction": 0}, "memory_fraction=0.0 has to lie in (0, 1]") for script in BOTH),
        *((script, {"memory_fraction": "a"}, "'a' is not a number or a fraction") for script in BOTH),
        *((script, {"seed": -1}, "--seed=-1 is not valid") for script in BOTH),
        *((script, {"output": "{folder}/none/x.png"}, "has to be a file in a folder that exists") for script in BOTH),
        (measure_approximation, {"layers": "block"}, "--layers: invalid choice: 'block'"),
        (measure_approximation, {"layers": "backbone", "memory_fraction": 0}, "memory_fraction=0.0 has to lie in"),
        (measure_approximation, {"num_seeds": 0}, "--num-seeds/--num-draws: '0' is not an integer of at least 1"),
        (measure_approximation, {"limit": "-1"}, "--limit: '-1' is not an integer of at least 1"),
        (measure_approximation, {"matrix_images": 0}, "--matrix-images: '0' is not an integer of at least 1"),
        (measure_approximation, {"batch_size": "x"}, "--batch-size: 'x' is not an integer of at least 1"),
        (plot_attention_maps, {"images": "c1/001.pmg"}, "c1/001.pmg is not in {folder}/val. Is it one like c1/001.png"),
        (plot_attention_maps, {"images": "elsewhere"}, "elsewhere is not in {folder}/val. Is it one like c0/000.png?"),
        *((script, {"data_dir": None}, "Give --images FILE ..., or --data-dir.") for script in BOTH),
        *((script, {"data_dir": None, "images": "no.jpg"}, "--images: no.jpg does not exist") for script in BOTH),
        *((script, {"images": "{folder}/t7.pth"}, "Leave --data-dir out for a file that is els") for script in BOTH),
        (plot_attention_maps, {"attentions": "full"}, "leaves nothing to compare"),
        (plot_attention_maps, {"output": "{folder}/maps.jpg"}, "maps.jpg: the name has to end in .png"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, script, changes, message):
    changes = {name: str(value).format(folder=folder) if value is not None else None for name, value in changes.items()}
    assert message.format(folder=folder) in refused(script, options(folder, **changes), capsys)


@pytest.mark.parametrize("token", [("1", "0"), ("0", "1"), ("-0.1", "0"), ("nan", "0")])
def test_tokens_outside_the_image(folder, capsys, token):
    line = refused(plot_attention_maps, [*options(folder), "--token", *token], capsys)
    assert "is not valid. Give two fractions of at least 0 and below 1." in line


@pytest.mark.parametrize("script", BOTH)
def test_no_photographs(folder, tmp_path, capsys, script):
    for name in range(NUM_CLASSES):
        (tmp_path / "val" / f"c{name}").mkdir(parents=True)
    assert "No images in the 5 class folders" in refused(script, options(folder, data_dir=tmp_path), capsys)


@pytest.mark.parametrize("script", BOTH)
def test_a_checkpoint_with_performer_tokens(folder, capsys, script):
    checkpoint = folder / "t2t_vit_7.pth"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, "t2t_vit_7")
    line = refused(script, options(folder, checkpoint=checkpoint), capsys)
    assert "holds t2t_vit_7: no attention of its token stages can be swapped" in line
