"""Whether every layout gives the same evaluation: the same photographs written in each, and evaluated from each.

    class_folders   val/<class folder>/<file>
    csv             images/<file>, and val.csv of paths and labels
    tar             val.tar of class folders
    webdataset      val-00.tar, ... of <name>.jpg and <name>.cls
    parquet         data/validation-00000-of-0000n.parquet, as Hugging Face writes them; needs PyArrow

The bytes of the photographs are read once, from class folders, and kept in memory. Each layout is recognised and
evaluated as run.py does it, and compared with class folders image by image, by name: paths differ, and with them the
order of the images and what is together in a batch. Images that --damage cuts short are skipped. Exit status 1 if a
layout differs in its images, labels or first predictions; differences of probabilities are only reported.

    python scripts/compare_layouts.py --damage 5 --output layouts.json
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import io
import itertools
import logging
import os
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # src is not installed: find it from any folder

from scatterbrain.attention import ATTENTIONS
from scatterbrain.errors import UserError
from scripts.measure_approximation import spread
from src.datamodules.layouts.base import imagenet_synsets, listing, scan_folder
from src.datamodules.layouts.class_folders import ClassFolders
from src.evaluation.predictions import Predictions, read_predictions
from src.tasks.build import check_swappable
from src.tasks.evaluate import evaluate
from src.utils.files import write_json
from src.utils.machine import machine_info
from src.utils.scripts import (
    Parser,
    check_writable,
    choose_device,
    console_for_tables,
    positive,
    progress_display,
    run_tool,
    say,
    without_paths,
)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
REFERENCE = "class_folders"
NUM_SHARDS = 4
ROWS_OF_A_GROUP = 16  # so few that a shard of the demo has several groups

# Predictions, their images without folder and suffix; images that were skipped; top-1 in percent.
Evaluation = tuple[Predictions, set[str], float]


@dataclass(frozen=True)
class Photograph:
    """An image as it is stored: the file's name and content, its class folder, and the index of its class."""

    name: str
    data: bytes
    folder: str
    label: int


def stem(path: str) -> str:
    """What an image is called in every layout."""
    return PurePosixPath(path).stem


def write_class_folders(folder: Path, images: Sequence[Photograph]) -> None:
    for image in images:
        path = folder / "val" / image.folder / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.data)


def write_csv(folder: Path, images: Sequence[Photograph]) -> None:
    (folder / "images").mkdir()
    for image in images:
        (folder / "images" / image.name).write_bytes(image.data)
    with open(folder / "val.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((f"images/{image.name}", image.label) for image in images)])


def write_tar(folder: Path, images: Sequence[Photograph]) -> None:
    write_archive(folder / "val.tar", ((f"{image.folder}/{image.name}", image.data) for image in images))


def write_webdataset(folder: Path, images: Sequence[Photograph]) -> None:
    for number, shard in enumerate(shards(images)):
        files = []
        for image in shard:
            name = stem(image.name)
            files += [(f"{name}.jpg", image.data), (f"{name}.cls", str(image.label).encode())]
        write_archive(folder / f"val-{number:02}.tar", files)


def write_parquet(folder: Path, images: Sequence[Photograph]) -> None:
    import pyarrow
    import pyarrow.parquet

    (folder / "data").mkdir()
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for number, shard in enumerate(shards(images)):
        column = pyarrow.array([{"bytes": image.data, "path": image.name} for image in shard], struct)
        table = pyarrow.table({"image": column, "label": [image.label for image in shard]})
        path = folder / "data" / f"validation-{number:05}-of-{len(shards(images)):05}.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=ROWS_OF_A_GROUP)


WRITERS: dict[str, Callable[[Path, Sequence[Photograph]], None]] = {
    REFERENCE: write_class_folders,
    "csv": write_csv,
    "tar": write_tar,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
}


def write_archive(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def shards(images: Sequence[Photograph]) -> list[Sequence[Photograph]]:
    """The images dealt out in turns: published shards are mixed, too."""
    return [images[start::NUM_SHARDS] for start in range(min(NUM_SHARDS, len(images)))]


def read_photographs(arguments: argparse.Namespace) -> list[Photograph]:
    """Every image of the class folders, damaged as asked for; `arguments.num_classes` is filled in.

    Raises:
        UserError: no such folder, no images in a class folder, names that not every layout holds, too many to damage.
    """
    root = Path(arguments.data_dir).expanduser() / arguments.split
    if not root.is_dir():
        raise UserError(f"{root} is not a folder. Correct --data-dir and --split: the split's class folders are read.")
    folders = scan_folder(root)[0]
    counted = 1000 if any(name in imagenet_synsets() for name in folders) else max(1, len(folders))
    arguments.num_classes = arguments.num_classes or counted
    found = ClassFolders(root, arguments.num_classes)
    empty = set(folders) - {name.split("/")[0] for name in found.names}
    if empty:
        raise UserError(
            f"{root}: class folders without images, which other layouts lack: {listing(empty)}. Remove them."
        )
    times = Counter(map(stem, found.names))
    odd = [name for name in found.names if times[stem(name)] > 1 or "." in stem(name) or not name.isprintable()]
    if odd:
        raise UserError(
            f"{root}: not every layout holds names that are the same without folder and suffix, have a second dot or "
            f"cannot be printed: {listing(map(ascii, odd))}. Rename the files."
        )
    if arguments.damage >= len(found):
        raise UserError(
            f"--damage {arguments.damage}: of {len(found)} images, one at least has to be left. Give fewer."
        )
    damaged = set(spread(len(found), arguments.damage)) if arguments.damage else set()
    images = []
    for position, (name, label) in enumerate(zip(found.names, found.targets, strict=True)):
        try:
            data = found.read(position)
        except OSError as error:
            raise UserError(f"{root / name} cannot be read ({error.strerror}). Remove or replace it.") from error
        folder, file = name.split("/")
        images.append(Photograph(file, data[: len(data) // 3] if position in damaged else data, folder, label))
    return images


def evaluate_layout(arguments: argparse.Namespace, layout: str, folder: Path) -> Evaluation:
    """Evaluate `folder / layout`.

    Raises:
        UserError: it is taken for another layout, or see `src.tasks.evaluate.evaluate`.
    """
    overrides = {
        "experiment": "imagenet-t2tvit-eval",
        "model/t2tmodel": arguments.variant,
        "model/t2tattn_cfg": arguments.attention,
        "model.image_size": arguments.image_size,
        "model.num_classes": arguments.num_classes,
        "datamodule.batch_size": arguments.batch_size,
        "datamodule.num_workers": "null" if arguments.num_workers is None else arguments.num_workers,
        "datamodule.on_error": "skip" if arguments.damage else "raise",
        "eval.num_seeds": 1,
        "callbacks": "none",
        "logger": "none",
    }
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("config", [f"{name}={value}" for name, value in overrides.items()])
    output_dir = folder / "runs" / layout
    output_dir.mkdir(parents=True)
    # not in the command line: paths would have to be quoted
    config.paths.output_dir, config.datamodule.data_dir = str(output_dir), str(folder / layout)
    config.eval.ckpt = arguments.checkpoint
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            results, objects = evaluate(config)
    finally:
        logging.disable(before)
    recognised = objects.datamodule.test_dataset.listing.format
    if recognised != layout:
        raise UserError(f"{folder / layout} was taken for {recognised}. datamodule.format={layout} names the layout.")
    found = read_predictions(output_dir)
    found.images[:] = map(stem, found.images)
    return found, set(map(stem, results.skipped["images"])) if results.skipped else set(), results.top1


def compare(ours: Evaluation, reference: Evaluation) -> dict[str, Any]:
    """Figures of a layout against those of class folders, and in words what differs."""
    (found, skipped, top1), (expected, expected_skipped, _) = ours, reference
    names, expected_names = Counter(found.images), Counter(expected.images)
    common = sorted(names.keys() & expected_names.keys())
    rows = ({name: row for row, name in enumerate(each.images)} for each in (found, expected))
    a, b = ([each[name] for name in common] for each in rows)
    other_label = found.targets[a] != expected.targets[b]
    other_class = found.classes[a, 0] != expected.classes[b, 0]
    # classes of about the same probability may come in another order
    same = found.classes[a][:, :, None] == expected.classes[b][:, None]
    difference = abs(found.probabilities[a][:, :, None] - expected.probabilities[b][:, None])
    differing = {
        "images": (names - expected_names) + (expected_names - names),
        "skipped images": skipped ^ expected_skipped,
        "labels": itertools.compress(common, other_label),
        "first predictions": itertools.compress(common, other_class),
    }
    return {
        "num_images": len(found.images),
        "num_skipped": len(skipped),
        "labels_equal": int((~other_label).sum()),
        "first_predictions_equal": int((~other_class).sum()),
        "probability_difference": float(difference[same].max(initial=0.0)),
        "top1": top1,
        "differences": [f"{what} ({text})" for what, images in differing.items() if (text := listing(images))],
    }


def compare_all(arguments: argparse.Namespace, images: Sequence[Photograph], folder: Path) -> Iterator[dict[str, Any]]:
    """Write, evaluate and compare every layout, class folders first.

    Raises:
        UserError: class folders cannot be evaluated, or a layout cannot be written.
    """
    reference = None
    with progress_display(Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(WRITERS))
        for layout, write in WRITERS.items():
            progress.update(task, description=layout)
            if layout == "parquet" and importlib.util.find_spec("pyarrow") is None:
                yield {"layout": layout, "left_out": "PyArrow is not installed"}
                continue
            try:
                (folder / layout).mkdir(parents=True)
                write(folder / layout, images)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"{folder / layout} cannot be written ({reason}). Name a folder by --keep.") from error
            try:
                found = evaluate_layout(arguments, layout, folder)
            except UserError as error:
                if reference is None:  # no fault of a layout
                    raise
                reason = str(error).replace(f"{folder}{os.sep}", "").rstrip(".")
                yield {"layout": layout, "differences": [f"that it cannot be evaluated: {reason}"]}
            else:
                reference = reference or found
                yield {"layout": layout, **compare(found, reference)}
            progress.advance(task)


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    checkpoint = "checkpoints/demo/t2t_vit_t_7_flowers.pth.tar"
    add("--data-dir", default="data/flowers", metavar="DIR", help="folder that holds the split's (data/flowers)")
    add("--split", default="val", metavar="NAME", help="folder of class folders (val)")
    add("--checkpoint", default=checkpoint, metavar="FILE", help=f"({checkpoint})")
    add("--variant", default="t2t_vit_t_7", metavar="NAME", help="one of t2t_vit_t_* (t2t_vit_t_7)")
    add("--attention", choices=tuple(ATTENTIONS), default="sblocal", metavar="NAME", help="(sblocal)")
    add("--num-classes", type=positive, metavar="N", help="outputs of the model (as many as class folders)")
    add("--image-size", type=positive, default=224, metavar="N", help="in pixels (224)")
    add("--batch-size", type=positive, default=8, metavar="B", help="(8)")
    add("--num-workers", type=int, metavar="N", help="processes that decode (as many as there are CPUs, at most 16)")
    add("--damage", type=positive, default=0, metavar="K", help="cut K images, evenly spread, to a third (none)")
    add("--output", metavar="FILE", help="write the figures as JSON")
    add("--keep", metavar="DIR", help="new folder for the layouts, and their evaluations in runs/ (a temporary one)")
    return parser


def result_table(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> Table:
    """One row for each layout."""
    title = f"{arguments.variant} with {arguments.attention}, {arguments.image_size} px, batch {arguments.batch_size}"
    table = Table("layout", title=title, title_justify="left")
    equal = ("same\nlabel", "same first\nprediction")
    for header in ("images", "skipped", *equal, "largest difference\nof a probability", "top-1 %"):
        table.add_column(header, justify="right")
    table.add_column("result")
    formats = dict.fromkeys(("num_images", "num_skipped", "labels_equal", "first_predictions_equal"), ",")
    formats |= {"probability_difference": ".1e", "top1": ".2f"}
    for row in rows:
        result = f"left out: {row['left_out']}" if "left_out" in row else "differs" if row["differences"] else "equal"
        cells = (format(row[name], style) if name in row else "-" for name, style in formats.items())
        table.add_row(row["layout"], *cells, result)
    return table


def compare_layouts(arguments: argparse.Namespace) -> int:
    """Compare, print, write; returns the exit status."""
    check_writable(arguments.output)
    check_swappable(arguments.variant)
    keep = arguments.keep and Path(arguments.keep).expanduser()
    if keep and keep.exists() and not (keep.is_dir() and not any(keep.iterdir())):
        raise UserError(f"--keep {keep} is there already. Name a folder that is empty or does not exist.")
    images = read_photographs(arguments)
    with contextlib.nullcontext(keep) if keep else tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        rows = list(compare_all(arguments, images, Path(folder)))
    console_for_tables(120).print(result_table(rows, arguments))
    machine = machine_info(choose_device("auto"))
    say(", ".join(f"{name} {value}" for name, value in machine.items() if value is not None))
    differing = [row for row in rows if row.get("differences")]
    if arguments.output is not None:
        settings = without_paths(arguments)
        del settings["data_dir"], settings["checkpoint"], settings["keep"]
        content = {"machine": machine, "settings": settings, "equal": not differing}
        write_json(arguments.output, {**content, "results": rows})
    for row in differing:
        print(f"Error: {row['layout']} differs from {REFERENCE} in {', '.join(row['differences'])}.", file=sys.stderr)
    return 1 if differing else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what `argv` asks for; returns the exit status."""
    return run_tool(build_parser(), compare_layouts, argv)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. Nothing was written.")
