"""Indices of classes: numbers, the order of folders, a file of classes, and synsets of another head."""

import json
import logging

import pytest

from src.datamodules.check import check_labels
from src.datamodules.formats import ClassNumbering, SplitLocation, imagenet_synsets, open_split
from src.datamodules.formats.classes import class_index, natural_key
from tests.src.datamodules import format_files as files
from tests.src.datamodules.setup import datamodule, encoded, message_of, write_images

NUMBERS = [str(number) for number in range(12)]


def folders(data_dir, names):
    write_images(data_dir, *[f"val/{name}/1.png" for name in names])


def tar(data_dir, names):
    files.write_tar(data_dir / "val.tar", [(f"val/{name}/1.png", encoded("PNG")) for name in names])


def csv(data_dir, names):
    folders(data_dir / "images", names)
    files.write(data_dir / "val.csv", "".join(f"images/val/{name}/1.png,{name}\n" for name in names))


def shards(data_dir, names):
    for name in names:
        content = [("1.png", encoded("PNG")), ("1.cls", name.encode())]
        files.write_tar(data_dir / f"val-{names.index(name):02}.tar", content)


def parquet(data_dir, names):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = pa.array([{"bytes": encoded("PNG"), "path": f"{name}.png"} for name in names])
    pq.write_table(pa.table({"image": images, "label": list(names)}), data_dir / "val.parquet")


WRITERS = [folders, tar, csv, shards, parquet]


def labels_by_name(data_dir, num_classes, **numbering):
    listing = open_split(SplitLocation(data_dir, "val", numbering=ClassNumbering(**numbering)), num_classes)
    names = {index: name for name, index in listing.class_to_index.items()}
    return [names[target] for target in listing.targets], listing


# ---- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("order", ["sorted", "natural"])
def test_names_that_are_exactly_0_to_n_are_indices(tmp_path, writer, order):
    writer(tmp_path, NUMBERS)
    listing = labels_by_name(tmp_path, len(NUMBERS), order=order)[1]
    assert sorted(listing.targets) == list(range(len(NUMBERS)))
    if writer in (folders, tar, csv):
        where = [name.split("/")[-2] for name in listing.names]
        assert listing.targets == [int(name) for name in where]
    assert listing.class_to_index == {name: int(name) for name in NUMBERS}


def test_the_thousand_folders_of_imagenetv2(tmp_path, caplog):
    for name in range(1000):
        files.write(tmp_path / f"val/{name}/1.jpeg", b"an image")
    module = datamodule(tmp_path, num_classes=1000)
    module.setup("test")
    assert all(
        path == f"{target}/1.jpeg"
        for path, target in zip(module.test_dataset.paths, module.test_dataset.targets, strict=True)
    )
    assert not caplog.records


def test_numbers_from_1_are_names(caplog):
    names = [str(number) for number in range(1, 11)]
    assert class_index(names, 10)["10"] == 1
    assert "1, 10, 2" in caplog.text or "10, 2, 3" in caplog.text
    assert class_index(names, 10, numbering=ClassNumbering("natural")) == {name: int(name) - 1 for name in names}


# ---- order --------------------------------------------------------------------------------------------------

NAMES = ["class10", "class2", "Mango", "Zebra", "apple"]
SORTED = ["Mango", "Zebra", "apple", "class10", "class2"]
NATURAL = ["apple", "class2", "class10", "Mango", "Zebra"]


def test_the_natural_order_is_timms():
    from timm.utils.misc import natural_key as timms_key

    assert sorted(NAMES, key=natural_key) == sorted(NAMES, key=timms_key) == NATURAL


@pytest.mark.parametrize("writer", WRITERS)
def test_the_order_of_class_folders_can_be_chosen(tmp_path, writer):
    writer(tmp_path, NAMES)
    path = files.write(tmp_path / "order.txt", "\n".join(NAMES) + "\n\n")
    for order, expected in (("sorted", SORTED), ("natural", NATURAL), (str(path), NAMES)):
        found, listing = labels_by_name(tmp_path, len(NAMES), order=order)
        assert listing.class_to_index == {name: index for index, name in enumerate(expected)}
        if writer in (folders, tar):
            assert found == [name.split("/")[-2] for name in listing.names]


def test_the_data_module_passes_the_order_on(tmp_path):
    folders(tmp_path, NAMES)
    module = datamodule(tmp_path, num_classes=5, class_order="natural")
    module.setup("test")
    assert [NATURAL[target] for target in module.test_dataset.targets] == SORTED


def test_a_difference_of_the_orders_is_a_warning_with_both(tmp_path, caplog):
    folders(tmp_path, NAMES)
    labels_by_name(tmp_path, len(NAMES))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert ", ".join(SORTED) in record.getMessage()
    assert ", ".join(NATURAL) in record.getMessage()
    assert "datamodule.class_order=natural" in record.getMessage()
    caplog.clear()
    labels_by_name(tmp_path, len(NAMES), order="natural")
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        NAMES,
        {name: index for index, name in enumerate(NAMES)},
        {str(index): name for index, name in enumerate(NAMES)},
        {str(index): [name, "a word"] for index, name in enumerate(NAMES)},
    ],
)
def test_a_file_of_classes_may_be_json(tmp_path, content):
    path = files.write(tmp_path / "classes.json", json.dumps(content))
    assert class_index(NAMES[:3], 5, numbering=ClassNumbering(str(path))) == {"class10": 0, "class2": 1, "Mango": 2}


def test_a_file_of_classes_numbers_synsets_and_numbers_too(tmp_path):
    path = str(files.write(tmp_path / "order.txt", "n02123045\n1\n0\n"))
    assert class_index(["n02123045", "0"], 3, numbering=ClassNumbering(path)) == {"n02123045": 0, "0": 2}


def test_a_file_of_classes_names_the_indices_of_a_table(tmp_path):
    csv(tmp_path, ["0", "1", "2"])
    path = files.write(tmp_path / "order.txt", "roses\ndaisy\ntulips\n")
    assert labels_by_name(tmp_path, 3, order=str(path))[1].class_to_index == {"roses": 0, "daisy": 1, "tulips": 2}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\na\nb", "does not list classes"),
        ("", "does not list classes"),
        ("[1, 2, 3]", "does not list classes"),
        ('{"a": 1, "b": 2, "c": 3}', "does not list classes"),
        ('{"a": 0, "b": 0, "c": 1}', "does not list classes"),
        ('{"a": ', "does not list classes"),
        ("a\nb", "lists 2 classes, but the model has 3"),
        ("a\nb\nd", "1 of 3 class folders are not in"),
        ('{"0": []}', "does not list classes"),
        (b"\xff\xfe", "no file that can be read"),
        (None, "no file that can be read: No such file"),
    ],
)
def test_an_unusable_file_of_classes_is_one_message(tmp_path, content, expected):
    path = tmp_path / "order"
    if content is not None:
        files.write(path, content)
    message = message_of(class_index, ["a", "b", "c"], 3, numbering=ClassNumbering(str(path)))
    assert expected in message
    assert str(path) in message


def test_values_of_the_options_are_checked():
    assert "datamodule.class_order=3" in message_of(datamodule, "x", class_order=3)
    assert "Give one of auto, imagenet, own" in message_of(datamodule, "x", labels="mine")
    assert "Leave one of them out" in message_of(datamodule, "x", labels="own", class_order="order.txt")


# ---- synsets with a head of their own -----------------------------------------------------------------------

SYNSETS = files.SYNSETS


@pytest.mark.parametrize("writer", WRITERS)
def test_synsets_with_one_output_each_are_numbered_from_0(tmp_path, writer, caplog):
    caplog.set_level(logging.INFO)
    writer(tmp_path, SYNSETS)
    listing = labels_by_name(tmp_path, 4)[1]
    assert listing.class_to_index == {name: index for index, name in enumerate(sorted(SYNSETS))}
    assert "datamodule.labels=own" in caplog.text
    assert labels_by_name(tmp_path, 1000)[1].class_to_index == files.TARGETS


def test_synsets_among_other_names_are_numbered_from_0():
    names = ["n01440764", "n02123045", "n99999999"]
    assert class_index(names, 3) == {name: index for index, name in enumerate(names)}
    assert "datamodule.labels=own" in message_of(class_index, names, 1000)


def test_the_kind_of_labels_can_be_chosen():
    own, imagenet = ClassNumbering(labels="own"), ClassNumbering(labels="imagenet")
    assert class_index(SYNSETS, 1000, numbering=imagenet) == files.TARGETS
    assert "model.num_classes=4" in message_of(class_index, SYNSETS, 1000, numbering=own)
    message = message_of(class_index, SYNSETS, 4, numbering=imagenet)
    assert "model.num_classes=1000" in message
    assert "datamodule.labels=own" in message
    names = [*list(imagenet_synsets())[:999], "other"]
    assert class_index(names, 1000, numbering=own)["other"] == 999
    assert "other" in message_of(class_index, names, 1000)


def test_splits_of_ones_own_synsets_hold_the_same(tmp_path):
    write_images(
        tmp_path, "train/n01440764/1.jpg", "train/n02123045/1.jpg", "val/n11939491/1.jpg", "val/n01440764/1.jpg"
    )
    module = datamodule(tmp_path, num_classes=2)
    assert "do not hold the same class folders: n02123045, n11939491" in message_of(module.setup, "fit")


def test_the_check_of_labels_knows_synsets_by_name(tmp_path):
    files.class_folders(tmp_path, "val")
    labels = check_labels(labels_by_name(tmp_path, 4)[1])
    assert labels["compared_with_real"] >= 5
    assert labels["agreement_with_real"] > 0.6
