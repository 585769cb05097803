import dataclasses
import io
import json
import logging
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import hydra
import matplotlib.image
import numpy as np
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console

from scatterbrain.errors import UserError
from src.evaluation import comparison_files
from src.evaluation.colours import ATTENTION_COLOURS
from src.evaluation.comparison import OnePass, compare_runs
from src.evaluation.comparison_callback import ComparisonCallback
from src.evaluation.comparison_figure import comparison_figure
from src.evaluation.comparison_files import write_comparison
from src.evaluation.comparison_table import comparison_markdown, comparison_table
from src.evaluation.predictions import write_predictions
from src.evaluation.records import Records, summarise
from src.evaluation.results import Results, write_results
from tests.hydra_helpers import hydra_restored

FILES = ["comparison.json", "comparison.md", "comparison.png"]
NAMES = ["a.png", "b.png", "c.png", "d.png"]
FULL = [0, 1, 2, 3]


def write_run(folder, attention, first=FULL, names=NAMES, overrides=None, **changes):
    """A run on four images of classes 0, 1, 2, 9, whose first predictions are `first`: one list, or one per seed."""
    seeds = first if isinstance(first[0], list) else [first]
    classes = np.array([[[label, 10, 11, 12, 13] for label in labels] for labels in seeds])
    records = Records([0, 1, 2, 9], classes, np.full(classes.shape, 0.2), np.ones(classes.shape[:2]))
    values = {
        "model": "t2t_vit_t_14",
        "attention": attention,
        "checkpoint": {"path": "a/81.7.pth.tar", "sha256": "ab" * 32},
        "data": {"dir": "/data", "split": "val", "num_images": 50_000, "num_classes": 1000},
        "image_size": 224,
        "precision": "32-true",
        "device": "cpu",
        "seeds": list(range(len(seeds))),
        **summarise(records),
        "images_per_second": 10.0,
        "peak_memory_mib": None,
        "versions": {},
        "command": "",
        "attention_memory": 1.0 if attention == "full" else 1 / 32,
        "attention_operations": 1.0 if attention == "full" else 0.054,
        "attention_peak_mib": 3.25,
    }
    folder.mkdir(parents=True)
    write_results(folder, Results(**{**values, **changes}))
    write_predictions(folder, names, records)
    if overrides is not None:
        (folder / ".hydra").mkdir()
        OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    return folder


@pytest.fixture
def four(tmp_path):
    """Runs 0 to 3: full, local, performer over two seeds, sblocal."""
    return [
        write_run(tmp_path / "0", "full"),
        write_run(tmp_path / "1", "local", [0, 1, 5, 3], images_per_second=25.0),
        write_run(tmp_path / "2", "performer", [[0, 5, 5, 9], [0, 1, 2, 9]]),
        write_run(tmp_path / "3", "sblocal", FULL),
    ]


def sweep_config(folder, mode=RunMode.MULTIRUN, **runtime):
    return OmegaConf.create({"hydra": {"mode": mode, "sweep": {"dir": str(folder)}, "runtime": runtime}})


def draw(table, width=160):
    sink = io.StringIO()
    Console(width=width, file=sink).print(table)
    return sink.getvalue()


# Rows


def test_rows_by_hand(four):
    comparison = compare_runs(four)
    rows = comparison.rows
    assert [row.label for row in rows] == ["full", "local", "performer", "sblocal"]
    assert [row.run for row in rows] == ["0", "1", "2", "3"]
    assert [row.top1 for row in rows] == [75.0, 50.0, 75.0, 75.0]
    assert [row.top1_difference for row in rows] == [0.0, -25.0, 0.0, 0.0]
    # The first seed of performer: only the first of four images agrees with full.
    assert [row.agreement for row in rows] == [100.0, 75.0, 25.0, 100.0]
    assert [row.speedup for row in rows] == [1.0, 2.5, 1.0, 1.0]
    assert rows[2].num_seeds == 2
    assert rows[2].top1_std == pytest.approx(50 / 2**0.5)
    assert rows[0].top1_std is None
    assert [row.published.text for row in rows] == ["81.7", "80.6", "77.8-79.0", "81.1"]
    assert comparison.common["checkpoint"] == {"path": "a/81.7.pth.tar", "sha256": "ab" * 32}
    assert "seeds" not in comparison.common


def test_images_are_matched_by_name_not_by_place(tmp_path):
    full = write_run(tmp_path / "0", "full", [0, 1, 2, 3])
    # The same predictions per image, handed over and stored in another order.
    other = write_run(tmp_path / "1", "local", [3, 2, 1, 0], names=NAMES[::-1])
    lines = (other / "predictions.csv").read_text().splitlines()
    (other / "predictions.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    assert compare_runs([full, other]).rows[1].agreement == 100.0


def test_order_is_kept_and_full_may_come_last(four):
    rows = compare_runs(four[::-1]).rows
    assert [row.attention for row in rows] == ["sblocal", "performer", "local", "full"]
    assert [row.agreement for row in rows] == [100.0, 25.0, 75.0, 100.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "t2t_vit_t_19"},
        {"checkpoint": {"path": "a/81.7.pth.tar", "sha256": "cd" * 32}},
        {"data": {"dir": "/other", "split": "val", "num_images": 50_000, "num_classes": 1000}},
        {"image_size": 384},
    ],
)
def test_no_agreement_across_models_weights_data_or_sizes(tmp_path, changes):
    full = write_run(tmp_path / "0", "full")
    other = write_run(tmp_path / "1", "local", **changes)
    row = compare_runs([full, other]).rows[1]
    assert row.agreement is row.speedup is row.top1_difference is None


def test_the_path_of_the_same_weights_does_not_matter(tmp_path):
    full = write_run(tmp_path / "0", "full")
    other = write_run(tmp_path / "1", "local", checkpoint={"path": "copy", "sha256": "ab" * 32})
    assert compare_runs([full, other]).rows[1].agreement == 100.0


def test_reference_of_the_same_precision_is_preferred(tmp_path):
    folders = [
        write_run(tmp_path / "0", "full", images_per_second=10.0),
        write_run(tmp_path / "1", "full", [9, 9, 9, 9], images_per_second=20.0, precision="bf16-mixed"),
        write_run(tmp_path / "2", "local", images_per_second=30.0),
        write_run(tmp_path / "3", "local", images_per_second=30.0, precision="bf16-mixed"),
        write_run(tmp_path / "4", "sblocal", images_per_second=30.0, device="other"),
    ]
    rows = compare_runs(folders).rows
    assert [row.agreement for row in rows] == [100.0, 100.0, 100.0, 0.0, 100.0]
    assert [row.speedup for row in rows] == [1.0, 1.0, 3.0, 1.5, None]


def test_without_full_there_is_nothing_to_agree_with(tmp_path):
    folder = write_run(tmp_path / "0", "local")
    (folder / "predictions.csv").unlink()  # and the predictions are not needed
    comparison = compare_runs([folder])
    assert comparison.rows[0].agreement is None
    assert "agreement" not in comparison_markdown(comparison)


def test_different_images_of_the_same_data_are_an_error(tmp_path):
    full = write_run(tmp_path / "0", "full")
    other = write_run(tmp_path / "1", "local", names=["a.png", "b.png", "c.png", "e.png"])
    with pytest.raises(UserError, match=r"1 and .*0 evaluated different images.*d\.png is in one"):
        compare_runs([full, other])


def test_missing_files_and_no_runs_are_reported(tmp_path, four):
    with pytest.raises(UserError, match="nothing to compare"):
        compare_runs([])
    (four[1] / "predictions.csv").unlink()
    with pytest.raises(UserError, match=r"1.predictions\.csv does not exist"):
        compare_runs(four)


# Labels


def test_labels_of_a_repeated_attention_name_the_overrides_that_differ(tmp_path):
    common = ["experiment=e", "trainer.devices=1"]
    folders = [
        write_run(tmp_path / "0", "full", overrides=[*common, "model/t2tattn_cfg=full", "x.window=3"]),
        write_run(tmp_path / "1", "local", overrides=[*common, "model/t2tattn_cfg=local", "x.window=3"]),
        write_run(tmp_path / "2", "local", overrides=[*common, "model/t2tattn_cfg=local", "+x.window=5"]),
    ]
    assert [row.label for row in compare_runs(folders).rows] == ["full", "local, window=3", "local, window=5"]


def test_labels_keep_whole_keys_that_end_alike(tmp_path):
    folders = [
        write_run(tmp_path / "0", "local", overrides=["a.size=1", "b.size=1"]),
        write_run(tmp_path / "1", "local", overrides=["a.size=2", "b.size=2"]),
    ]
    assert [row.label for row in compare_runs(folders).rows] == [
        "local, a.size=1, b.size=1",
        "local, a.size=2, b.size=2",
    ]


def test_labels_without_overrides_name_results_or_the_folder(tmp_path):
    folders = [
        write_run(tmp_path / "0", "local"),
        write_run(tmp_path / "1", "local", precision="bf16-mixed"),
        write_run(tmp_path / "2", None, model="t2t_vit_14"),
        write_run(tmp_path / "3", "full"),
        write_run(tmp_path / "4", "full"),
    ]
    assert [row.label for row in compare_runs(folders).rows] == [
        "local, precision=32-true",
        "local, precision=bf16-mixed",
        "t2t_vit_14",
        "full (run 3)",
        "full (run 4)",
    ]


# Files


def test_files_of_a_comparison(tmp_path, four):
    paths = write_comparison(tmp_path, compare_runs(four, failed=[tmp_path / "4"]))
    assert [path.name for path in paths] == FILES
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == FILES  # no temporary is left

    content = json.loads(paths[0].read_text())
    assert list(content) == ["common", "runs", "failed"]
    assert content["failed"] == ["4"]
    assert content["common"]["data"]["num_images"] == 50_000
    assert [run["agreement"] for run in content["runs"]] == [100.0, 75.0, 25.0, 100.0]
    assert content["runs"][2]["published"]["text"] == "77.8-79.0"
    assert content["runs"][1]["attention_memory"] == 1 / 32

    lines = paths[1].read_text().splitlines()
    assert lines[0] == "# Attention of the token stages compared: t2t_vit_t_14"
    assert lines[2] == "50,000 images of val, 224 px, checkpoint 81.7.pth.tar (sha256 abababab), cpu, 32-true."
    assert lines[4] == (
        "| attention | top-1 | to full | published | top-5 | agreement | images/s | speed-up | attention columns "
        "| operations | MiB |"
    )
    assert lines[7] == "| local | 50.00 | -25.00 | 80.6 | 50.00 | 75.00 | 25.0 | 2.50x | 3.1 % | 5.4 % | 3.2 |"
    assert lines[8].startswith("| performer | 75.00 ± 35.36 (2 seeds) | +0.00 | 77.8-79.0 |")
    assert lines[-1] == "Runs without complete results: 4."


def test_an_interrupted_run_is_left_out_and_named(tmp_path, caplog):
    full = write_run(tmp_path / "0", "full")
    part = write_run(tmp_path / "1", "local", complete=False, num_evaluated=4)
    comparison = compare_runs([full, part], [tmp_path / "2"])
    assert [row.run for row in comparison.rows] == ["0"]
    assert comparison.failed == ["2", "1"]
    assert f"it was interrupted (eval.resume=true resumes it): {part}" in caplog.text
    with pytest.raises(UserError, match=r"There is nothing to compare: .*1 was interrupted"):
        compare_runs([part])


def test_a_failing_writer_leaves_the_old_files(tmp_path, four, monkeypatch):
    comparison = compare_runs(four)
    paths = write_comparison(tmp_path, comparison)
    before = [path.read_bytes() for path in paths]

    class Broken:
        def savefig(self, file, format):
            file.write(b"half")
            raise RuntimeError("disk")

    monkeypatch.setattr(comparison_files, "comparison_figure", lambda _: Broken())
    with pytest.raises(RuntimeError, match="disk"):
        write_comparison(tmp_path, comparison)
    assert [path.read_bytes() for path in paths] == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == FILES


def test_markdown_keeps_its_columns_when_a_label_has_a_bar(tmp_path):
    folders = [write_run(tmp_path / name, "local", overrides=[f"x={name}|y"]) for name in ("0", "1")]
    text = comparison_markdown(compare_runs(folders))
    assert r"| local, x=0\|y |" in text


@pytest.mark.parametrize("count", [1, 4, 16])
def test_figure_has_a_sensible_size_and_no_overlapping_labels(tmp_path, count):
    attentions = list(ATTENTION_COLOURS)[:count]
    comparison = compare_runs([write_run(tmp_path / str(i), name) for i, name in enumerate(attentions)])
    path = write_comparison(tmp_path, comparison)[2]
    image = matplotlib.image.imread(path)
    height, width = image.shape[:2]
    assert 1500 < width < 3000
    assert 300 < height < 1500
    assert image[:, :, :3].std() > 0.05  # something is drawn

    figure = comparison_figure(comparison)
    figure.canvas.draw()
    assert len(figure.axes) == 4
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    boxes += [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    boxes += [text.get_window_extent() for text in figure.texts]
    boxes += [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    assert len(boxes) == 5 * count + 2 + 4
    for number, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    # The first run is on top, and values stand beside their own line.
    tops = [box.y0 for box in boxes[:count]]
    assert tops == sorted(tops, reverse=True)


def test_sampling_error_is_beside_the_std_over_seeds(four):
    comparison = compare_runs(four)
    images = comparison.common["data"]["num_images"]
    # of a share p of n images: sqrt(p (1 - p) / n)
    expected = 100 * (0.75 * 0.25 / images) ** 0.5
    assert comparison.rows[0].sampling_error == pytest.approx(expected)
    assert f"a standard error of up to {100 * (0.5 * 0.5 / images) ** 0.5:.2f} points" in comparison_markdown(
        comparison
    )
    bands = [line for line in comparison_figure(comparison).axes[0].lines if line.get_linewidth() == 7]
    assert list(bands[0].get_xdata()) == pytest.approx([75 - expected, 75 + expected])


def test_figure_shows_what_the_rows_say(four):
    figure = comparison_figure(compare_runs(four))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts[:4] == ["75.00", "50.00", "75.00 ±35.36", "75.00"]
    assert texts[4:8] == ["100.0", "75.0", "25.0", "100.0"]
    assert texts[9] == "25.0  2.50x"
    assert texts[12:] == ["100 %", "3.1 %", "3.1 %", "3.1 %"]
    assert figure.axes[3].get_xscale() == "log"
    diamonds = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    assert [list(line.get_xdata()) for line in diamonds] == [[81.7], [80.6], [77.8, 79.0], [81.1]]


def test_panels_without_values_are_left_out_and_odd_text_is_drawn(tmp_path):
    folders = [
        write_run(tmp_path / name, None, overrides=[f"x=$_{{{name}$[bold]"], attention_memory=None)
        for name in ("0", "1")
    ]
    comparison = compare_runs(folders)
    write_comparison(tmp_path, comparison)
    assert len(comparison_figure(comparison).axes) == 2
    assert "[bold]" in draw(comparison_table(comparison))


def test_table_for_the_screen(four):
    text = draw(comparison_table(compare_runs(four)))
    for words in ("81.7.pth.tar", "75.00 ± 35.36 (2 seeds)", "77.8-79.0", "2.50x", "3.1 %", "-25.00"):
        assert words in text


# Callback


def test_one_pass_is_described(tmp_path, four):
    one_pass = OnePass(attentions=4, forward_passes=8, seconds=20.0, peak_memory_mib=1234.5)
    described = one_pass.describe(5000)
    assert described == (
        "one pass over 5,000 images with 4 attentions (8 forward passes of each image) took 20.0 s, 250.0 images/s, "
        "peak memory 1,234 MiB"
    )
    plain, told = compare_runs(four), compare_runs(four, one_pass=one_pass)
    assert "one pass" not in comparison_markdown(plain)
    assert "without the loader; one pass over" in comparison_markdown(told)
    contents = []
    for comparison in (plain, told):
        write_comparison(tmp_path, comparison)
        contents.append(json.loads((tmp_path / "comparison.json").read_text()))
    assert "one_pass" not in contents[0]
    assert contents[1].pop("one_pass") == dataclasses.asdict(one_pass)
    assert contents[0] == contents[1]


def test_callback_compares_a_sweep_folder(tmp_path, four, capsys, caplog):
    # Run 10 comes after run 4, which failed: Hydra's folder is there and the results are not.
    write_run(tmp_path / "10", "smyrf")
    (tmp_path / "4" / ".hydra").mkdir(parents=True)
    (tmp_path / "4" / ".hydra" / "hydra.yaml").touch()
    with caplog.at_level(logging.WARNING):
        ComparisonCallback().on_multirun_end(sweep_config(tmp_path))
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["run"] for run in content["runs"]] == ["0", "1", "2", "3", "10"]
    assert content["failed"] == ["4"]
    assert "Runs without complete results" in caplog.text
    out = capsys.readouterr().out
    assert "performer" in out
    for name in FILES:
        assert (tmp_path / name).stat().st_size > 0
        assert str(tmp_path / name) in out.splitlines()


def test_callback_without_results_warns(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        ComparisonCallback().on_multirun_end(sweep_config(tmp_path))
        ComparisonCallback().on_multirun_end(sweep_config(tmp_path / "absent"))
    assert caplog.text.count("nothing to compare") == 2
    assert list(tmp_path.iterdir()) == []


def test_callback_reports_what_cannot_be_compared(tmp_path, four, caplog):
    (four[0] / "results.json").write_text("{")
    ComparisonCallback().on_multirun_end(sweep_config(tmp_path))
    assert "could not be compared" in caplog.text
    assert not (tmp_path / "comparison.json").exists()


def test_callback_takes_only_the_runs_of_this_sweep(tmp_path, four):
    callback = ComparisonCallback()
    done = JobReturn(status=JobStatus.COMPLETED)
    for folder in four[:2]:
        callback.on_job_end(sweep_config(tmp_path, output_dir=str(folder)), done)
    assert not (tmp_path / "comparison.json").exists()
    callback.on_multirun_end(sweep_config(tmp_path))
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["run"] for run in content["runs"]] == ["0", "1"]  # 2 and 3 are left from an earlier one


def test_callback_leaves_single_runs_alone(tmp_path, four):
    callback = ComparisonCallback()
    config = sweep_config(tmp_path, mode=RunMode.RUN, output_dir=str(four[0]))
    callback.on_run_start(config)
    callback.on_job_end(config, JobReturn(status=JobStatus.COMPLETED))
    callback.on_run_end(config)
    assert not (tmp_path / "comparison.json").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_callback_in_hydra(tmp_path, monkeypatch, capsys, fails):
    """A real multirun; with a failing run Hydra never calls on_multirun_end."""
    (tmp_path / "config.yaml").write_text(
        textwrap.dedent(
            """
            attention: full
            defaults: [_self_]
            hydra:
              sweep: {dir: out}
              job_logging: {disable_existing_loggers: false}
              callbacks: {comparison: {_target_: src.evaluation.comparison_callback.ComparisonCallback}}
            """
        )
    )

    @hydra.main(config_path=str(tmp_path), config_name="config", version_base="1.3")
    def main(config):
        if config.attention == "bad":
            raise ValueError("this run fails")
        # write_run makes its folder, and Hydra has made this one.
        scratch = write_run(tmp_path / "scratch" / config.attention, config.attention)
        for file in scratch.iterdir():
            file.rename(Path(HydraConfig.get().runtime.output_dir) / file.name)

    sweep = "attention=full,bad,local" if fails else "attention=full,local"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["app.py", "-m", sweep])
    with hydra_restored(), pytest.raises(SystemExit, match=r"^1$") if fails else nullcontext():
        main()
    output, errors = capsys.readouterr()
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [run["attention"] for run in content["runs"]] == ["full", "local"]
    assert all((tmp_path / "out" / name).is_file() for name in FILES)
    if fails:
        assert "this run fails" in errors
        assert content["failed"] == ["1"]
    else:
        assert "comparison.png" in output
        assert content["failed"] == []
