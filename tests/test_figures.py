"""Numbers in the tables of README and docs are those of the JSON files beside them."""

from __future__ import annotations

import functools
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from src.evaluation.sequence_comparison import SequenceComparison, read_results

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "docs/*.md", "checkpoints/demo/README.md")
    for path in ROOT.glob(pattern)
)
NUMBER = re.compile(r"(?:(?<![^ ])-)?\d[\d,]*(?:\.\d+)?")  # the minus of a number, not a hyphen

# The values of a cell's numbers, in their order; None where a cell has nothing to compare.
Values = tuple[float, ...] | None
# For each row below the heading, how its first cell begins, and the values of the other cells.
Expected = list[tuple[str, list[Values]]]


@functools.cache
def load(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def find_all(path: str, key: str = "results", **wanted: Any) -> list[dict[str, Any]]:
    """The rows of a file with these entries."""
    return [row for row in load(path)[key] if all(row[name] == value for name, value in wanted.items())]


def find(path: str, key: str = "results", **wanted: Any) -> dict[str, Any]:
    """The only row of a file with these entries."""
    rows = find_all(path, key, **wanted)
    assert len(rows) == 1, f"{path}: {len(rows)} rows have {wanted}"
    return rows[0]


def plain(cell: str) -> str:
    """A cell without Markdown."""
    return (
        re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell)
        .replace("*", "")
        .replace("`", "")
        .replace("\N{MULTIPLICATION SIGN}", "x")
        .strip()
    )


@functools.cache
def tables(page: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, the heading first."""
    found: list[list[list[str]]] = []
    previous = ""
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            if not previous.startswith("|"):
                found.append([])
            if not re.fullmatch(r"[|:\- ]+", line) or found[-1] == []:
                found[-1].append([plain(cell) for cell in line[1:-1].split("|")])
        previous = line
    return found


def shows(text: str, value: float) -> bool:
    """Whether a number as written is the value, rounded to its decimals."""
    digits = len(text.partition(".")[2])
    # either way for a value on the edge
    return abs(float(text.replace(",", "")) - value) <= 0.5 * 10**-digits * (1 + 1e-6)


def mean_std(entry: dict[str, Any]) -> Values:
    return (entry["mean"],) if entry["std"] is None else (entry["mean"], entry["std"])


def accuracy(names: tuple[str, ...], text_columns: int) -> Expected:
    """Top-1, agreement and output errors of the demo's network, after columns of text."""
    rows: Expected = []
    for name in names:
        if name == "full":
            values: list[Values] = [(load("docs/data/experiment_memory.json")["full_attention"]["top1"],), (100,)]
            values += [(0,), (0,)]
        else:
            row = find("docs/data/experiment_memory.json", attention=name, memory_fraction=1 / 32)
            values = [mean_std(row["top1"]), mean_std(row["agreement"])]
            for stage in (1, 2):
                error = find("checkpoints/demo/approximation.json", attention=name, stage=stage)
                values.append(mean_std(error["output_error"]))
        rows.append((name, [None] * text_columns + values))
    return rows


FOUR = ("full", "local", "performer", "sblocal")


def output_error() -> Expected:
    path = "docs/data/approximation_demo.json"
    rows: Expected = [("full", [None, None, (0,), (0,)])]
    names = ("local", "performer", "sblocal", "smyrf", "sbsmyrf", "combination-local-performer", "cluster", "sbcluster")
    for name in (*names, "pairedcluster", "sbpairedcluster", "sbadaptive"):
        first, second = (find(path, attention=name, stage=stage) for stage in (1, 2))
        one, two = first["options"], second["options"]
        sizes: dict[str, list[Values]] = {
            "local": [(one.get("local_context"), two.get("local_context")), None],
            "performer": [None, (one.get("nb_features"), two.get("nb_features"))],
            "smyrf": [None, None],
            "cluster": [None, (one.get("num_landmarks"), two.get("num_landmarks"))],
            "sbsmyrf": [None, (one.get("nb_features"), two.get("nb_features"))],
            "combination-local-performer": [None, None],
            "pairedcluster": [
                None,
                tuple(each.get(key) for key in ("num_landmarks", "num_query_landmarks") for each in (one, two)),
            ],
            "sbpairedcluster": [(one.get("num_exact"), two.get("num_exact")), None],
            "sbadaptive": [
                (
                    *(each.get("local_context") for each in (one, two)),
                    *(tokens * each.get("density", 0) for tokens, each in ((3136, one), (784, two))),
                ),
                (one.get("num_landmarks"), two.get("num_landmarks")),
            ],
        }
        for both, low_rank in (("sblocal", "nb_features"), ("sbcluster", "num_landmarks")):
            pairs = ((each.get("local_context"), each.get(low_rank)) for each in (one, two))
            sizes[both] = list(zip(*pairs, strict=True))
        errors: list[Values] = [(each["output_error"]["mean"],) for each in (first, second)]
        rows.append((name, sizes[name] + errors))
    return rows


def family() -> Expected:
    rows: Expected = []
    for row in load("docs/data/family_comparison.json")["runs"]:
        values = [row[key] for key in ("top1", "agreement", "images_per_second", "speedup")]
        cost = find("docs/data/attention_cost.json", attention=row["attention"])
        values += [100 * row["attention_memory"], 100 * cost["attention_operations"], cost["attention_peak_mib"]]
        rows.append((row["attention"], [(value,) for value in values]))
    return rows


def floors() -> Expected:
    """Errors of the output, and of its part that depends on the query, in both stages."""
    path = "docs/data/approximation_demo.json"
    rows: Expected = []
    names = ("zero", "uniform", "strided", "random-keys", "querycluster", "local", "performer", "sblocal", "smyrf")
    for name in (*names, "combination-local-performer", "cluster", "sbcluster", "pairedcluster", "sbadaptive"):
        stages = [find(path, attention=name, stage=stage) for stage in (1, 2)]
        errors: list[Values] = [(row[kind]["mean"],) for row in stages for kind in ("output_error", "query_error")]
        rows.append((name, [None, *errors]))
    return rows


def ablation() -> Expected:
    """Error, and exact pairs in percent, of each variant of adaptive attention on each layer."""
    rows: dict[str, list[Values]] = {}
    for row in load("docs/data/adaptive_ablation.json")["results"]:
        rows.setdefault(row["variant"], []).append((row["error"], 100 * row["share"]))
    return list(rows.items())


def adaptive_layers() -> Expected:
    """Errors of PISA and of adaptive attention on the layers of each network."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in load("docs/data/adaptive_layers.json")["results"]:
        rows.setdefault(row["network"], []).append(row)
    kinds = ("pisa", "density_0.03", "density_0.08")
    return [(name, [tuple(layer[kind] for layer in layers) for kind in kinds]) for name, layers in rows.items()]


def adaptive_cost() -> Expected:
    rows: Expected = []
    for name in ("full", "sblocal", "sbcluster", "pairedcluster", "sbadaptive"):
        row = find("docs/data/attention_cost.json", attention=name)
        shares: list[Values] = [(100 * row[f"attention_{kind}"],) for kind in ("memory", "operations")]
        rows.append((name, [*shares, (row["attention_peak_mib"],)]))
    return rows


def adaptive_time() -> Expected:
    path, lengths = "docs/data/benchmark_adaptive_cpu.json", (784, 3136, 12544)
    return [
        (name, [(find(path, name=name, length=length)["ratio_to_sdpa"],) for length in lengths])
        for name in ("sbcluster", "sbadaptive")
    ]


def scaling() -> Expected:
    rows: Expected = []
    for name in ("sblocal", "cluster", "pairedcluster"):
        values: list[Values] = []
        for device in ("cpu", "h100"):
            for length in (4096, 65536):
                path = f"docs/data/scaling_{device}.json"
                label = name if length == 4096 else f"{name} as at 4096"
                row, baseline = find(path, name=label, length=length), find(path, name="SDPA", length=length)
                ratio = row["ratio_to_sdpa"]
                if device == "h100":
                    ratio = row["device_milliseconds"] / baseline["device_milliseconds"]
                values.append((ratio,))
        rows.append((name, values))
    return rows


def device_time(name: str, length: int, direction: str) -> float:
    row = find("docs/data/benchmark_attention_h100.json", name=name, length=length, **{"pass": direction})
    return 1000 * row["device_milliseconds"]


def gpu_speed() -> Expected:
    """Microseconds and speed-up of README's table."""
    rows: Expected = []
    for label, length, name in (
        ("128 x 3,136", 3136, "sblocal"),
        ("16 x 12,544", 12544, "sblocal as at 3136"),
        ("1 x 65,536", 65536, "sblocal as at 3136"),
    ):
        values: list[Values] = []
        for direction in ("forward", "training"):
            full, ours = (device_time(each, length, direction) for each in ("SDPA cuDNN", name))
            values += [(full,), (ours,), (full / ours,)]
        rows.append((label, values))
    return rows


def gpu_attention() -> Expected:
    rows: Expected = []
    for label, length, suffix in (
        ("128 x 784", 784, ""),
        ("the same", 784, ", no fallback"),
        ("128 x 3,136", 3136, ""),
        ("the same", 3136, ", no fallback"),
        ("16 x 12,544, 49", 12544, " as at 3136"),
        ("16 x 12,544, 196", 12544, ""),
        ("1 x 65,536, 49", 65536, " as at 3136"),
        ("1 x 65,536, 1,024", 65536, ""),
    ):
        parts = [
            (device_time("SDPA cuDNN", length, each), device_time(f"sblocal{suffix}", length, each))
            for each in ("forward", "training")
        ]
        (full, ours), (full_both, ours_both) = parts
        others: list[Values] = [None, None]
        if "fallback" not in suffix:
            others = [(device_time(f"{name}{suffix}", length, "forward"),) for name in ("local", "performer")]
        values = [(full,), (ours,), (full / ours,), *others, (full_both,), (ours_both,), (full_both / ours_both,)]
        for name in ("SDPA cuDNN", f"sblocal{suffix}"):
            row = find("docs/data/benchmark_attention_h100.json", name=name, length=length, **{"pass": "forward"})
            values.append((row["temporary_bytes"] / 2**20,))
        rows.append((label, values))
    return rows


def landmarks_on_a_gpu() -> Expected:
    def values(path: str, length: int, names: tuple[str, ...], direction: str) -> list[Values]:
        where = {"length": length, "pass": direction}
        full = 1000 * find(path, name="SDPA", **where)["device_milliseconds"]
        shown: list[Values] = [(full,)]
        for name in names:
            time = 1000 * find(path, name=name, **where)["device_milliseconds"] if name else None
            shown += [(time,), (full / time,)] if time else [None, None]
        return shown

    path, both = "docs/data/benchmark_landmarks_h200.json", ("cluster", "sbcluster")
    rows: Expected = []
    for batch, length in ((128, 3136), (16, 12544), (48, 16384), (1, 65536)):
        rows.append(
            (f"{batch} x {length:,}", [x for each in ("forward", "training") for x in values(path, length, both, each)])
        )
    path, alone = "docs/data/benchmark_landmarks_512_h200.json", ("", "sbcluster")
    rows.append(("48 x 16,384", values(path, 16384, alone, "forward") + [None] * 5))
    path = "docs/data/benchmark_landmarks_short_h200.json"
    rows.append(("128 x 784", values(path, 784, alone, "forward") + values(path, 784, alone, "training")))
    return rows


def adaptive_on_a_gpu() -> Expected:
    rows: Expected = []
    for batch, length, window in ((128, 3136, 64), (128, 3136, 32), (16, 12544, 64), (48, 16384, 64), (1, 65536, 64)):
        for density in (0.03, 0.08):
            values: list[Values] = [(density,)]
            for direction in ("forward", "training"):
                if direction == "training" and length == 65536:
                    values += [None] * 3
                    continue
                where = {"length": length, "pass": direction, "local_context": window, "density": density}
                full, ours = (
                    1000 * find("docs/data/benchmark_adaptive_h200.json", name=name, **where)["device_milliseconds"]
                    for name in ("SDPA", "sbadaptive")
                )
                values += [(full,), (ours,), (full / ours,)]
            rows.append((f"{batch} x {length:,}", values))
    return rows


def gpu_model() -> Expected:
    rows: Expected = []
    for label, name in (
        ("as published", "published"),
        ("the same, compiled", "published, compiled"),
        ("the same, compiled, as a CUDA graph", "published, compiled, CUDA graph"),
        ("inference implementation, full attention", "inference full, CUDA graph"),
        ("inference implementation, sblocal", "inference sblocal, CUDA graph"),
        ("the same, compiled", "inference sblocal, compiled, CUDA graph"),
        ("inference implementation, sbcluster", "inference sbcluster, CUDA graph"),
        ("timm", "timm vit_small_patch16_224"),
        ("the same, compiled, as a CUDA graph", "timm vit_small_patch16_224, compiled, CUDA graph"),
    ):
        small, large = (find("docs/data/benchmark_model_h200.json", name=name, batch=batch) for batch in (128, 512))
        memory = small["peak_memory_mib"] / 1024
        rows.append((label, [(small["images_per_second"],), (large["images_per_second"],), (memory,)]))
    return rows


def cpu_attention() -> Expected:
    rows: Expected = []
    for label, name in (
        ("SDPA", "SDPA"),
        ("local", "local"),
        ("performer", "performer"),
        ("sblocal", "sblocal"),
        ("the published implementation", "published sblocal"),
    ):
        values: list[Values] = []
        for length in (784, 3136, 12544):
            row = find("docs/data/benchmark_attention_cpu.json", name=name, length=length, **{"pass": "forward"})
            values.append((row["milliseconds"],) if name == "SDPA" else (row["milliseconds"], row["ratio_to_sdpa"]))
        if name in ("SDPA", "published sblocal"):
            values.append(None)
        else:
            wanted = {"name": f"{name} as at 3136", "length": 12544, "pass": "forward"}
            row = find("docs/data/benchmark_attention_cpu.json", **wanted)
            values.append((row["milliseconds"], row["ratio_to_sdpa"]))
        rows.append((label, values))
    return rows


def cpu_model() -> Expected:
    content = load("docs/data/benchmark_model_cpu.json")

    def best(name: str) -> dict[str, Any]:
        return find("docs/data/benchmark_model_cpu.json", name=name, batch=content["best_batch"][name])

    full, ours = best("inference full"), best("inference sblocal")
    return [
        ("as published", [(best("published")["images_per_second"],), None]),
        ("inference implementation, full", [(full["images_per_second"],), (full["speed_over_published"],)]),
        # the 16 and the 224 are of the name of timm's network
        ("inference implementation, sblocal", [(ours["images_per_second"],), (ours["speed_over_published"], 16, 224)]),
    ]


def backbone() -> Expected:
    path = "docs/data/approximation_backbone.json"
    means = [
        statistics.fmean(row["output_error"]["mean"] for row in find_all(path, attention=name))
        for name in ("local", "performer", "sblocal", "cluster", "pairedcluster")
    ]
    # the first column has a value, too
    return [("", [(mean,) for mean in means])]


def training_from_scratch() -> Expected:
    names = ("local", "combination-local-performer", "bs-bigbird", "full", "sblocal", "performer")
    path = "docs/data/sequence_training.json"
    tests = [find(path, task="language", attention=name)["test"] for name in names]
    return [("bits per byte", [(test["bits_per_byte"],) for test in tests])]


def language_training() -> Expected:
    """Columns in percent, test and validation bits per byte of the language model, over seeds."""
    rows: Expected = []
    for name in ("full", "local", "sblocal", "sbcluster", "performer"):
        found = find_all("docs/data/language_training.json", attention=name)
        test, validation = ([row[part]["bits_per_byte"] for row in found] for part in ("test", "validation"))
        values = (statistics.fmean(test), statistics.stdev(test)), (statistics.fmean(validation),)
        rows.append((name, [(100 * found[0]["memory"],), *values]))
    return rows


PUBLISHED_TASKS = ("listops", "text", "image", "pathfinder", "copy")
TRAININGS = {"lra_listops": "ListOps", "lra_text": "Text", "lra_image": "Image", "lra_pathfinder": "Pathfinder"}
TRAININGS |= {"copy": "Copy", "copy_4096": "Copy"}


def published_sequences() -> Expected:
    """Results of the Long Range Arena and of Scatterbrain's paper."""
    labels = {"performer": "Performer", "reformer": "Reformer", "scatterbrain": "their own"}
    rows: Expected = []
    for source, name in (("LRA", "lra"), ("Scatterbrain", "scatterbrain")):
        for row in load(f"docs/data/published_{name}.json")["results"]:
            values: list[Values] = [(row[task],) if task in row else None for task in PUBLISHED_TASKS]
            rows.append((f"{source}, {labels.get(row['attention'], row['attention'])}", values))
    return rows


def sequence_trainings(name: str, length: int) -> Expected:
    """Every attention on a task and then the baselines: of `scripts/compare_trainings.py`, and published results."""
    summaries = read_results(ROOT / f"docs/data/{name}.json").summaries
    (groups,) = SequenceComparison([each for each in summaries if each.length == length]).tasks().values()
    task = name.removeprefix("lra_")
    metric, scale = summaries[0].metric, 100 if summaries[0].metric == "accuracy" else 1
    published = {
        source: {row["attention"]: row.get(task) for row in load(f"docs/data/published_{source}.json")["results"]}
        for source in (("scatterbrain",) if name.startswith("copy") else ("lra", "scatterbrain"))
    }
    published["scatterbrain"]["sblocal"] = published["scatterbrain"]["scatterbrain"]
    rows: Expected = []
    for label, group in groups.items():
        steps = tuple(dict.fromkeys(each.steps_done for each in group))
        steps += () if all(each.complete for each in group) else (group[0].steps,)
        tests = [scale * each.test[metric] for each in group if each.test]
        test: Values = None
        if len(tests) == len(group):
            error = statistics.stdev(tests) if len(tests) > 1 else scale * group[0].test["standard_error"]
            test = (statistics.fmean(tests), error)
        best = [scale * each.best[metric] for each in group if each.best]
        values: list[Values] = [(len(group),), (100 * group[0].memory,), steps]
        values += [(statistics.fmean(each.total_seconds for each in group) / 60,), test]
        values += [(statistics.fmean(best),) if best else None]
        for each in published.values():
            value = each.get(group[0].attention)  # of the copy task, the paper's N is 1,024
            values.append(None if value is None else (value,))
        rows.append((label, values))
    for label, value in summaries[0].data["baselines"].items():
        rows.append((f"({label})", [None] * 4 + [(scale * value,), None] + [None] * len(published)))
    return rows


def trainings_measured() -> list[tuple[str, str, Callable[[], Expected]]]:
    """Tables of the trainings whose results are there, one for each task and length."""
    found = [(name, task) for name, task in TRAININGS.items() if (ROOT / f"docs/data/{name}.json").is_file()]
    return [
        ("docs/sequence_training.md", f"{task}, N {length:,}", functools.partial(sequence_trainings, name, length))
        for name, task in found
        for length in sorted({row["length"] for row in load(f"docs/data/{name}.json")["results"]})
    ]


def formats() -> Expected:
    rows: Expected = []
    for label, name in (
        ("class folders", "class_folders"),
        ("flat folder and CSV", "csv"),
        ("tar", "tar"),
        ("WebDataset", "webdataset"),
        ("parquet", "parquet"),
    ):
        whole, damaged = (find(f"docs/data/{each}.json", format=name) for each in ("formats", "formats_damaged"))
        keys = ("labels_equal", "first_predictions_equal", "probability_difference")
        compared: list[Values] = [None] * 3 if name == "class_folders" else [(whole[key],) for key in keys]
        same: Values = None if name == "class_folders" else (damaged["first_predictions_equal"],)
        images: list[Values] = [(damaged["num_images"],), (damaged["num_skipped"],), same]
        rows.append((label, [(whole["num_images"],), *compared, *images]))
    return rows


def loading() -> Expected:
    names = (("timm's", "timm"), ("ours", "ours"), ("ours, from the cache", "ours, cached"))
    found = [(label, find("docs/data/benchmark_loading_cpu.json", loader=name)) for label, name in names]
    return [(label, [(row["images_per_second"],), (row["ratio_to_timm"],)]) for label, row in found]


def training_step() -> Expected:
    path = "docs/data/benchmark_training_h100.json"
    rows: Expected = []
    for name in ("full", "sblocal"):
        row = find(path, attention=name)
        time = (row["milliseconds"],) if name == "full" else (row["milliseconds"], row["time_ratio_to_full"])
        rows.append((name, [time, (row["peak_memory_mib"] / 1024,)]))
    return rows


def card_training() -> Expected:
    rows: Expected = []
    for label, name, images in (("CIFAR-10", "training_cifar10", 10_000), ("flowers", "training_flowers", 200)):
        content = load(f"checkpoints/demo/{name}.json")
        last = content["history"][-1]
        assert content["data"]["num_validation_images"] == images
        seen = content["updates"] * content["images_per_update"] / 1e6
        speed = content["images_per_second"]
        # to hundreds, and beside it the number of CPU cores of that machine
        rate: Values = (round(speed, -2), 16) if name == "training_cifar10" else (round(speed, -2),)
        values: list[Values] = [(seen,), (content["updates"],), (content["seconds"],), rate, (last["train_loss"],)]
        rows.append((label, [*values, (last["val_top1"], images)]))
    return rows


def demo() -> Expected:
    rows: Expected = []
    for row in load("docs/data/demo.json")["results"]:
        top1 = (row["top1"],) if row["top1_std"] is None else (row["top1"], row["top1_std"], row["num_seeds"])
        rows.append((row["attention"], [top1, (row["agreement"],), (100 * row["attention_memory"],)]))
    return rows


def bfloat16() -> Expected:
    content = load("docs/data/bfloat16_agreement.json")
    assert (content["precision"], content["against"]["precision"]) == ("bf16-true", "32-true")
    assert [row["attention"] for row in content["results"]] == list(FOUR)
    photographs: list[Values] = [(content["data"]["num_images"],)]
    return [("2 cores", photographs + [(row["same_as_against"],) for row in content["results"]])]


def query_part() -> Expected:
    names = ("strided", "random-keys", "querycluster", "local", "performer", "sblocal", "sbcluster", "sbadaptive")
    names += ("pairedcluster",)
    path = "docs/data/approximation_demo.json"
    stages = {
        each: [find(path, attention=name, stage=each)["query_error"]["mean"] for name in names] for each in (1, 2)
    }
    return [(f"stage {each}", [(error,) for error in errors]) for each, errors in stages.items()]


def pretrained(name: str, *metrics: str) -> Expected:
    """Errors of the layers and metrics at four budgets, after full attention's metrics in each of the cells."""
    path = f"docs/data/pretrained_{name}.json"
    names = ("local", "performer", "sblocal", "cluster", "sbcluster", "pairedcluster", "sbadaptive")
    full = find(path, method="full")
    rows: Expected = [("full", [tuple(full[metric] for metric in metrics), None, None, None])]
    for each in names:
        budgets = [find(path, method=each, budget=budget) for budget in (1 / 32, 1 / 16, 1 / 8, 1 / 4)]
        rows.append((each, [(row["layer_error"], *(row[metric] for metric in metrics)) for row in budgets]))
    return rows


def pretrained_sizes() -> Expected:
    """Columns, errors and metrics of adaptive attention with given sizes on two networks."""
    rows: Expected = []
    for row in load("docs/data/pretrained_sizes_dinov2.json")["results"][1:]:
        sizes = row["sizes"]
        other = find("docs/data/pretrained_sizes_whisper.json", sizes=sizes)
        both = ((row, "correlation", "worst_correlation", "iou"), (other, "word_error_rate", "perplexity"))
        cells: list[Values] = []
        for each, *metrics in both:
            cells += [(100 * each["columns"],), (each["layer_error"], *(each[metric] for metric in metrics))]
        label = f"W = {sizes['local_context']}, M = {sizes['num_landmarks']}, density {sizes['density']}"
        rows.append((label, cells))
    return rows


def pretrained_plans() -> Expected:
    rows: Expected = []
    maps = ("correlation", "worst_correlation", "iou")
    for label, name, metrics in (
        ("DINOv2, 518 px", {"image_size": 518}, maps),
        ("DINOv2, 784 px", {"image_size": 784}, maps),
        ("Whisper", "whisper", ("word_error_rate", "perplexity")),
        ("MiniLM", "minilm", ("cosine", "worst_cosine", "retrieved")),
    ):
        if isinstance(name, dict):
            row = find("docs/data/pretrained_plans_dinov2.json", **name)
        else:
            row = find(f"docs/data/pretrained_{name}.json", method="plan")
        replaced = sum(call["method"] != "full" for call in row["calls"])
        error = row["worst_layer_error"]
        rows.append((label, [(replaced, len(row["calls"])), (error,), tuple(row[metric] for metric in metrics)]))
    return rows


def pretrained_speed() -> Expected:
    """Time, speed-ups and error of a whole network at two sizes of images."""
    rows: Expected = []
    for label, name, budgets in (
        ("SDPA", "sdpa", (None,)),
        ("plan", "plan", (None,)),
        ("sbcluster", "sbcluster", (1 / 32, 1 / 16, 1 / 8)),
        ("sbadaptive", "sbadaptive", (1 / 16, 1 / 8)),
        ("sblocal", "sblocal", (1 / 16,)),
    ):
        for budget in budgets:
            values: list[Values] = []
            for size in (784, 1036):
                row = find("docs/data/pretrained_speed_h200.json", image_size=size, attention=name, budget=budget)
                keys = ("device_milliseconds", "device_speed_up", "eager_speed_up", "hidden_error")
                values += [(row[key],) for key in keys]
            rows.append((label, values))
    return rows


def frontier_on_a_gpu() -> Expected:
    """Mean error and speed of points of the frontier at each size."""
    path = "docs/data/frontier_h200.json"

    def adaptive(window: int, num_landmarks: int, num_queries: int, density: float) -> dict[str, float]:
        sizes = {"local_context": window, "num_landmarks": num_landmarks, "num_query_landmarks": num_queries}
        return {**sizes, "density": density}

    points: list[tuple[str, str, dict[str, float]]] = [
        ("sblocal", "sblocal", {"local_context": 64, "nb_features": 32}),
        ("cluster", "cluster", {"num_landmarks": 128}),
        *(("sbcluster", "sbcluster", {"local_context": 64, "num_landmarks": number}) for number in (128, 256)),
        *(
            ("sbadaptive", "sbadaptive", adaptive(*each))
            for each in (
                *((32, 64, 24, 0.03), (64, 64, 48, 0.03), (64, 128, 48, 0.03)),
                *((64, 128, 48, 0.08), (64, 256, 48, 0.08)),
            )
        ),
        *(("PISA", "pisa", {"density": density}) for density in (0.05, 0.15, 0.3)),
        ("its exact blocks", "topk-blocks", {"density": 0.15}),
        ("FlexAttention", "flex-window", {"local_context": 128}),
    ]
    rows: Expected = []
    for label, name, sizes in points:
        times = [find(path, method=name, sizes=sizes, length=length) for length in (3136, 12544, 16384, 65536)]
        rows.append((label, [(times[0]["error"],), *((1 / row["ratio_to_full"],) for row in times)]))
    return rows


def causal_time() -> Expected:
    """Milliseconds of causal attentions and their speed-up, forward and both passes."""
    rows: Expected = []
    for heads, length in ((192, 4096), (48, 16384), (8, 65536)):
        for name in ("SDPA", "sbcluster M 32 W 1", "sbcluster M 16 W 128", "window 512"):
            full, ours = (
                find("docs/data/causal_time_h200.json", attention=each, length=length)["milliseconds"]
                for each in ("SDPA", name)
            )
            cells: list[Values] = []
            for part in ("forward", "both"):
                cells += [(ours[part],), None if name == "SDPA" else (full[part] / ours[part],)]
            rows.append((f"{heads} x {length:,}", cells))
    return rows


def causal_error_time() -> Expected:
    """Milliseconds of causal attentions, forward and both passes, and the mean error on the language model's layers."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in load("docs/data/causal_error_time_language.json")["results"]:
        rows.setdefault(row["attention"], []).append(row)
    means = {
        name: [statistics.fmean(row["milliseconds"][part] for row in same) for part in ("forward", "both")]
        + [statistics.fmean(row["error"] for row in same)]
        for name, same in rows.items()
    }
    labels = {"SDPA": "PyTorch's, causal", "sblocal, 64 columns": "sblocal, 64 columns"}
    labels |= {f"window {keys}": f"FlexAttention's window of {keys:,}" for keys in (256, 512, 1024)}
    labels |= {f"blocks {number}": f"{number} chosen blocks" for number in range(2, 7)}
    labels |= {name: re.sub(" (?=[MWv])", ", ", name) for name in means if "sbcluster" in name}
    return [(labels[name], [(mean,) for mean in values]) for name, values in sorted(means.items(), key=lambda x: x[1])]


def causal_error(name: str) -> dict[str, list[Values]]:
    """Error and columns of each form of causal landmarks on each layer."""
    rows: dict[str, list[Values]] = {}
    for row in load(f"docs/data/{name}.json")["results"]:
        rows.setdefault(row["form"], []).append((row["error"], row["columns"]))
    return rows


def language_errors() -> Expected:
    """The same for layers of the language model, and the mean of their errors."""
    rows = causal_error("causal_error_language")
    return [(form, [*layers, (statistics.fmean(layer[0] for layer in layers),)]) for form, layers in rows.items()]


def language_conversion() -> Expected:
    """Columns in percent, and bits per byte of networks with each attention, before and after a fine-tune."""
    path, names = "docs/data/language_conversion.json", ("full", "local", "sblocal", "sbcluster", "performer")
    others = {"full": names[:4], "sbcluster": names[:4]}  # attentions in place of that of the training
    rows: Expected = []
    for trained in ("full", "local", "sblocal", "sbcluster", "performer"):
        for method in others.get(trained, (trained,)):
            stages = "trained" if trained == method else "swapped", "fine-tuned"
            before, after = (find_all(path, attention=trained, method=method, stage=stage) for stage in stages)
            values: list[Values] = [None, (100 * before[0]["memory"],)]
            for text in ("test", "WikiText-2 test"):
                for stage in (before, after):
                    bits = [row["bits_per_byte"][text] for row in stage]
                    values.append((statistics.fmean(bits), (max(bits) - min(bits)) / 2) if bits else None)
            rows.append((trained, values))
    return rows


def learned_features() -> Expected:
    """Learned features against random ones, and other attentions of the same columns, on held-out photographs."""
    path = "docs/data/learned_features.json"
    rows: Expected = [("full", [None, (load(path)["full_attention"]["top1"],), (100,), (0,), (0,)])]
    kinds = [(name, kind) for name in ("performer", "sblocal") for kind in ("random", "keys", "learned")]
    for name, kind in (("local", None), ("sbcluster", None), *kinds):
        row = find(path, attention=name, features=kind)
        entries = (row["top1"], row["agreement"], *(stage["output_error"] for stage in row["stages"]))
        rows.append((name, [None, *map(mean_std, entries)]))
    return rows


def learned_language() -> Expected:
    """Bits per byte of learned and random features in the language model, and errors of its layers, over seeds."""
    stages = (("full", "trained"), ("local", "swapped"), ("sbcluster", "swapped"))
    kinds = [(name, kind) for name in ("performer", "sblocal") for kind in ("random", "keys", "learned")]
    rows: Expected = []
    for method, stage in (*stages, *kinds):
        found = find_all("docs/data/learned_language.json", method=method, stage=stage)
        over_seeds = [
            [row["bits_per_byte"][text] for row in found] for text in ("validation", "test", "WikiText-2 test")
        ]
        over_seeds.append([statistics.fmean(row["errors"]) for row in found])
        values: list[Values] = [(100 * found[0]["memory"],)]
        for each in over_seeds:
            values.append((each[0],) if len(each) == 1 else (statistics.fmean(each), statistics.stdev(each)))
        layers = tuple(statistics.fmean(layer) for layer in zip(*(row["errors"] for row in found), strict=True))
        if method == "full":
            assert max(layers) < 0.005
            layers = (0.005,)
        rows.append((method, [None, *values, layers]))
    return rows


def claims() -> Expected:
    """What we measured for each of the paper's claims, in the order of the page."""
    normal = {"data": "normal", "memory_fraction": 1 / 8}
    oracles, local = (
        find("docs/data/experiment_regimes.json", "summary", family=x, **normal) for x in ("oracles", "local")
    )
    three = ("sparse", "low_rank", "both")
    ranks = [
        find("docs/data/experiment_residual.json", stage=stage, support="topk")["equal_memory"] for stage in (1, 2)
    ]

    def theory(name: str, of: str) -> dict[str, Any]:
        return find("docs/data/experiment_theory.json", cosine=None, hash=name, of=of)

    def output(name: str, entry: str = "output_error") -> list[Any]:
        rows = (find("docs/data/approximation_demo.json", attention=name, stage=stage) for stage in (1, 2))
        return [row[entry]["mean"] if entry == "output_error" else row[entry] for row in rows]

    def gains(both: str, *parts: str) -> list[float]:
        return [min(each) / own for own, *each in zip(output(both), *map(output, parts), strict=True)]

    def top1(name: str, entry: str = "top1") -> float:
        return find("docs/data/experiment_memory.json", attention=name, memory_fraction=1 / 32)[entry]["mean"]

    def bits(attention: str, method: str, stage: str) -> float:
        rows = find_all("docs/data/language_conversion.json", attention=attention, method=method, stage=stage)
        return statistics.fmean(row["bits_per_byte"]["test"] for row in rows)

    def learned(method: str, stage: str) -> float:
        rows = find_all("docs/data/learned_language.json", method=method, stage=stage)
        return statistics.fmean(statistics.fmean(row["errors"]) for row in rows)

    window = learned("local", "swapped")
    over_both = [min(window, learned("performer", kind)) / learned("sblocal", kind) for kind in ("random", "learned")]
    swapped = [bits("full", name, "swapped") for name in ("sblocal", "local", "sbcluster")]
    trained = [bits(name, name, "trained") for name in ("full", "sblocal", "local", "performer")]
    zero, full = (find("docs/data/demo.json", attention=name)["top1"] for name in ("zero", "full"))
    full_top1 = load("docs/data/experiment_memory.json")["full_attention"]["top1"]
    columns = find("docs/data/experiment_memory.json", attention="sblocal", memory_fraction=1 / 32)["memory"]
    averaged = "sblocal", "combination-local-performer"
    tests = (theory("cross-polytope", "entries"), theory("cross-polytope", "weights"), theory("shared", "entries"))

    def trained_test(task: str, name: str) -> float:
        rows = [row for row in find_all(f"docs/data/{task}.json", attention=name) if row["test"]]
        metric, scale = rows[0]["metric"], 100 if rows[0]["metric"] == "accuracy" else 1
        return scale * statistics.fmean(row["test"][metric] for row in rows)

    causal = ("full", "local", "performer", "sblocal", "sbcluster")
    copied = {task: [trained_test(task, name) for name in causal] for task in ("copy", "copy_4096")}
    values: list[Values] = [
        (oracles["sparse"], oracles["regimes"], oracles["low_rank"], oracles["both"]),
        (*(oracles["worst"][name] for name in three), *(local["worst"][name] for name in three)),
        tuple(rank[name] for name in ("sparse", "low_rank", "both_free") for rank in ranks),
        (tests[0]["bias"], *output("sblocal", "bias")),
        tuple(row["scatterbrain"] / row["predicted"] for row in tests),
        (*gains("sblocal", "local", "performer"), *gains("sbsmyrf", "smyrf", "performer")),
        (trained[0], *swapped, *over_both),
        (100 * (1 - columns), top1("sblocal"), full_top1, zero, full),
        (full_top1, *map(top1, ("sblocal", "local", "performer"))),
        (*(x for name in averaged for x in output(name)), *(top1(name, "agreement") for name in averaged)),
        tuple(trained),
        tuple(statistics.fmean(trained_test(task, name) for task in ("lra_text", "lra_image")) for name in causal),
        (*copied["copy"], copied["copy_4096"][0], min(copied["copy_4096"][1:])),
    ]
    return [("", [None, None, each, None]) for each in values]


# Page, how the table's heading begins, and what its rows have to show.
CHECKED: list[tuple[str, str, Callable[[], Expected]]] = [
    ("README.md", "attention|exact weights|low-rank part|top-1", lambda: accuracy(FOUR, 2)),
    ("README.md", "batch x tokens|forward", gpu_speed),
    ("README.md", "error of the query-dependent part", query_part),
    ("checkpoints/demo/README.md", "attention|top-1", lambda: accuracy(FOUR, 0)),
    ("checkpoints/demo/README.md", "part|images seen", card_training),
    ("docs/attentions.md", "name|exact weights|low-rank part|error", output_error),
    ("docs/attentions.md", "attention|top-1", family),
    ("docs/attentions.md", "name|what a query sees", floors),
    ("docs/attentions.md", "attention|features", learned_features),
    ("docs/attentions.md", "|CPU, 4,096 tokens", scaling),
    ("docs/benchmarks.md", "batch x tokens, window, features", gpu_attention),
    ("docs/benchmarks.md", "batch x tokens|cuDNN full", landmarks_on_a_gpu),
    ("docs/benchmarks.md", "batch x tokens, window, landmarks", adaptive_on_a_gpu),
    ("docs/benchmarks.md", "attention|error", frontier_on_a_gpu),
    ("docs/benchmarks.md", "images/s|batch 128", gpu_model),
    ("docs/benchmarks.md", "|784 tokens", cpu_attention),
    ("docs/benchmarks.md", "|images/s", cpu_model),
    ("docs/benchmarks.md", "machine|photographs", bfloat16),
    ("docs/causal.md", "error / columns", lambda: list(causal_error("causal_error").items())),
    ("docs/causal.md", "heads x tokens, attention", causal_time),
    ("docs/causal.md", "attention|forward, ms", causal_error_time),
    ("docs/claims.md", "claim|in the paper", claims),
    ("docs/data_formats.md", "format|images", formats),
    ("docs/data_formats.md", "loader|images/s", loading),
    ("docs/demo.md", "attention|top-1", demo),
    ("docs/findings.md", "window alone", backbone),
    ("docs/findings.md", "|local|local averaged", training_from_scratch),
    ("docs/language.md", "attention|features", learned_language),
    ("docs/language.md", "attention|columns", language_training),
    ("docs/language.md", "error / columns", language_errors),
    ("docs/language.md", "trained with", language_conversion),
    ("docs/pretrained.md", "DINOv2, 518 px", lambda: pretrained("dinov2_518", "correlation", "iou")),
    ("docs/pretrained.md", "DINOv2, 784 px", lambda: pretrained("dinov2_784", "correlation", "iou")),
    ("docs/pretrained.md", "MiniLM", lambda: pretrained("minilm", "cosine", "retrieved")),
    ("docs/pretrained.md", "Whisper", lambda: pretrained("whisper", "word_error_rate", "perplexity")),
    ("docs/pretrained.md", "attention|784 px, ms", pretrained_speed),
    ("docs/pretrained.md", "plan for an error", pretrained_plans),
    ("docs/pretrained.md", "sbadaptive|columns", pretrained_sizes),
    ("docs/sbadaptive.md", "attention|attention columns", adaptive_cost),
    ("docs/sbadaptive.md", "variant|demo", ablation),
    ("docs/sbadaptive.md", "layers|PISA", adaptive_layers),
    ("docs/sbadaptive.md", "|784 tokens", adaptive_time),
    ("docs/sequence_training.md", "published|ListOps", published_sequences),
    *trainings_measured(),
    ("docs/training.md", "attention|time|memory", training_step),
]
# Tables of options, files (and their sizes) and limits; their numbers are no results.
NO_RESULTS = (
    "option|",
    "experiment|",
    "datamodule.format|",
    "names of the classes",
    "text|bytes",
    "attentions|export",
    "attentions|key_lengths",
    "|call|",
    "call|",
    "operator|",
    'backend="triton"|',
)


def heading(rows: list[list[str]]) -> str:
    return "|".join(rows[0])


@pytest.mark.parametrize(("page", "first", "expected"), CHECKED, ids=[f"{page} {first}" for page, first, _ in CHECKED])
def test_a_table_shows_what_its_file_has(page, first, expected):
    found = [rows for rows in tables(page) if heading(rows).startswith(first)]
    assert len(found) == 1, f"{page}: {len(found)} tables begin with '{first}'"
    wanted = expected()
    assert len(found[0]) - 1 == len(wanted), f"{page}, '{first}': the file has {len(wanted)} rows"
    for cells, (label, values) in zip(found[0][1:], wanted, strict=True):
        assert cells[0].startswith(label), f"{page}, '{first}': {cells[0]} is where {label} belongs"
        shown = cells if label == "" else cells[1:]
        for cell, each in zip(shown, values, strict=True):
            if each is None:
                continue
            numbers = NUMBER.findall(cell)
            assert len(numbers) == len(each), f"{page}, {cells[0]}: '{cell}' should show {each}"
            wrong = [text for text, value in zip(numbers, each, strict=True) if not shows(text, value)]
            assert not wrong, f"{page}, {cells[0]}: '{cell}' is {each} in the file; correct the page"


def test_every_table_with_numbers_is_compared():
    known = {(page, first) for page, first, _ in CHECKED}
    for page in PAGES:
        for rows in tables(page):
            if heading(rows).startswith(NO_RESULTS) or not any(NUMBER.search(cell) for row in rows[1:] for cell in row):
                continue
            found = [first for name, first in known if name == page and heading(rows).startswith(first)]
            assert found, f"{page}: nothing compares the table '{heading(rows)}' with its file; add it to CHECKED"


def test_numbers_are_compared_as_rounded():
    assert shows("0.11", 0.1146)
    assert not shows("0.12", 0.1146)
    assert shows("2,679", 2679.32)
    assert not shows("3.9", 3.82)
