"""Every format gives the same images, labels and predictions, and no damage changes a count in silence."""

from __future__ import annotations

import base64
import builtins
import io
import os
import pickle
import random
import struct
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset
from torchvision.transforms.functional import pil_to_tensor

from scatterbrain.errors import UserError
from src.datamodules.dataset import ImageDataset, ImageLoader
from src.datamodules.formats import FORMATS, SplitLocation, find_formats, open_split
from src.datamodules.formats.archives import members
from src.datamodules.formats.classes import imagenet_synsets
from src.datamodules.formats.files import expand_braces
from src.datamodules.formats.matlab import MatlabError, read_structure
from src.models.t2t_vit import create_t2t_vit
from tests.src.datamodules import format_files as files
from tests.src.datamodules.setup import datamodule, encoded, message_of

try:
    import pyarrow
except ImportError:
    pyarrow = None

needs_pyarrow = pytest.mark.skipif(pyarrow is None, reason="needs PyArrow (pip install pyarrow)")
WRITERS = [
    pytest.param(writer, id=writer.__name__, marks=[needs_pyarrow] if writer is files.parquet else [])
    for writer in files.WRITERS
]
# One of each way to read.
READERS = [files.flat, files.original_tar, files.shards, files.csv_of_synsets] + ([files.parquet] if pyarrow else [])


def listing_of(data_dir, split="val", num_classes=1000, format="auto", option="test_split"):
    return open_split(SplitLocation(Path(data_dir), split, option), num_classes, format)


def message(data_dir, split="val", **options):
    module = datamodule(data_dir, test_split=split, num_classes=options.pop("num_classes", 1000), **options)
    return message_of(module.setup)


def by_stem(names, values):
    """From what a name tells in every format: the file's name, less its suffix."""
    stems = [Path(name).stem for name in names]
    assert len(set(stems)) == len(stems)
    return dict(zip(stems, values, strict=True))


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Data folder of each format, both splits; tests leave them as they are."""
    folders = {}
    for writer in files.WRITERS:
        if writer is files.parquet and pyarrow is None:
            continue
        folders[writer] = tmp_path_factory.mktemp(writer.__name__)
        for split in files.SPLITS:
            writer(folders[writer], split)
    return folders


# ---- the same from every format ---------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("split", ["val", "train"])
def test_names_targets_and_bytes(everything, writer, split):
    listing = listing_of(everything[writer], split)
    expected = files.SPLITS[split]
    assert len(listing) == len(expected) == 8
    assert by_stem(listing.names, listing.targets) == by_stem(expected, map(files.TARGETS.get, expected.values()))
    images = [listing.read(index) for index in range(8)]
    assert by_stem(listing.names, images) == by_stem(expected, map(files.image, expected))
    assert listing.classes == files.SYNSETS
    assert listing.class_to_index == files.TARGETS
    assert not any(name.startswith(("/", ".")) for name in listing.names)
    in_class_folders = (writer, split) == (files.kaggle, "train")
    assert listing.format == ("class_folders" if in_class_folders else files.WRITERS[writer])
    named = listing_of(everything[writer], split, format=listing.format)
    assert (named.names, named.targets) == (listing.names, listing.targets)
    assert all(type(target) is int for target in listing.targets)


@pytest.mark.parametrize("writer", [files.flat, files.original_tar, files.tars_of_classes, files.csv_of_synsets])
def test_images_are_in_the_order_of_their_names(everything, writer):
    for split in files.SPLITS:
        names = listing_of(everything[writer], split).names
        assert names == sorted(names)


def test_the_format_of_shards_keep_their_order(everything):
    for writer in (files.shards, *([files.parquet] if pyarrow else [])):
        names = [Path(name).stem for name in listing_of(everything[writer], "val").names]
        number = 3 if writer is files.shards else 2
        stems = [Path(name).stem for name in files.SPLITS["val"]]
        assert names == [stem for first in range(number) for stem in stems[first::number]]


@pytest.fixture(scope="module")
def network():
    return create_t2t_vit("t2t_vit_t_7", image_size=32, num_classes=1000).eval()


def predictions(network, data_dir, **options):
    module = datamodule(data_dir, image_size=32, batch_size=1, num_classes=1000, **options)
    with torch.inference_mode():
        logits = [network(module.normalise(images)) for images, _, _ in module.test_dataloader()]
    return by_stem(module.test_dataset.paths, torch.cat(logits))


def test_predictions_through_the_data_module(everything, network):
    expected = predictions(network, everything[files.class_folders])
    assert len({tuple(logits.tolist()) for logits in expected.values()}) == 8
    for data_dir in everything.values():
        results = predictions(network, data_dir)
        assert results.keys() == expected.keys()
        # batches of one image: nothing depends on the order
        assert all(torch.equal(logits, expected[name]) for name, logits in results.items())


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_processes_share_the_images(everything, world_size):
    for data_dir in everything.values():
        seen = []
        for rank in range(world_size):
            module = datamodule(data_dir, num_classes=1000)
            module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
            seen += [index for _, _, indices in module.test_dataloader() for index in indices.tolist()]
        assert sorted(seen) == list(range(8))


def test_training_and_holding_out(everything):
    augmentation = {"auto_augment": None}
    for data_dir in everything.values():
        options = {"num_classes": 1000, "augmentation": augmentation, "batch_size": 4}
        module = datamodule(data_dir, **options)
        batches = list(module.train_dataloader())
        assert [len(targets) for _, targets, _ in batches] == [4, 4]
        assert sorted(target for _, targets, _ in batches for target in targets.tolist()) == sorted(
            module.train_dataset.targets
        )
        held = datamodule(data_dir, holdout=0.5, on_device=True, **options)
        held.setup("fit")
        for part in (held.train_dataset, held.val_dataset):
            assert sorted(part.targets) == list(files.TARGETS.values())
            for index, path in enumerate(part.paths):
                name = next(name for name in files.SPLITS["train"] if Path(name).stem == Path(path).stem)
                with Image.open(io.BytesIO(files.image(name))) as image:
                    assert torch.equal(pil_to_tensor(part.decode(index)), pil_to_tensor(image))
        assert sum(1 for _ in held.train_dataloader()) == 1


# ---- processes and threads --------------------------------------------------------------------------------


def whole(everything):
    return ConcatDataset([ImageDataset(listing_of(data_dir), pil_to_tensor) for data_dir in everything.values()])


def test_spawned_workers(everything):
    data = whole(everything)
    expected = torch.stack([image for image, _, _ in data])
    loader = ImageLoader(data, batch_size=8, num_workers=1, multiprocessing_context="spawn")
    assert torch.equal(torch.cat([images for images, _, _ in loader]), expected)


def test_forked_workers_after_the_parent_has_read(everything):
    data = whole(everything)
    expected = torch.stack([image for image, _, _ in data])
    loader = ImageLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork")
    for _ in range(2):
        assert torch.equal(torch.cat([images for images, _, _ in loader]), expected)
    assert torch.equal(torch.stack([image for image, _, _ in data]), expected)


def test_threads(everything):
    for writer in READERS:
        listing = pickle.loads(pickle.dumps(listing_of(everything[writer])))
        expected = [listing.read(index) for index in range(8)]
        wrong = []

        def read(seed, listing=listing, expected=expected, wrong=wrong):
            for index in random.Random(seed).choices(range(8), k=100):
                if listing.read(index) != expected[index]:
                    wrong.append(index)

        workers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong


def test_reads_may_come_in_pieces(everything, monkeypatch):
    listing = listing_of(everything[files.original_tar])
    expected = [listing.read(index) for index in range(8)]
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda number, size, offset: pread(number, min(size, 100), offset))
    assert [listing.read(index) for index in range(8)] == expected


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_few_files_are_open_at_a_time(tmp_path):
    for number in range(70):
        content = [(f"{number}.cls", b"0"), (f"{number}.jpg", encoded())]
        files.write_tar(tmp_path / f"val-{number:03}.tar", content)
    before = len(os.listdir("/proc/self/fd"))
    listing = listing_of(tmp_path)
    assert all(listing.read(index) == encoded() for index in range(70))
    assert len(os.listdir("/proc/self/fd")) - before <= 32


# ---- which format -----------------------------------------------------------------------------------------


def test_two_format_are_an_error_that_names_both(tmp_path):
    files.shards(tmp_path, "val")
    files.original_tar(tmp_path, "val")
    report = message(tmp_path)
    assert report.startswith(f"{tmp_path} holds the split 'val' 2 times: ")
    assert f"tar ({tmp_path / 'ILSVRC2012_img_val.tar'})" in report
    assert report.endswith("Choose one: datamodule.format=tar or datamodule.format=webdataset.")
    for format in ("webdataset", "tar"):
        assert listing_of(tmp_path, format=format).format == format


def test_class_folders_win_over_the_archive_beside_them(tmp_path, caplog):
    files.class_folders(tmp_path, "val")
    files.original_tar(tmp_path, "val")
    assert listing_of(tmp_path).format == "class_folders"
    assert f"ignoring tar ({tmp_path / 'ILSVRC2012_img_val.tar'})" in caplog.text
    assert listing_of(tmp_path, format="tar").format == "tar"


def test_one_format_twice_is_named_by_the_split(tmp_path):
    files.class_folders(tmp_path, "val")
    files.class_folders(tmp_path, "val", "ILSVRC/Data/CLS-LOC")
    report = message(tmp_path)
    assert report.endswith("Name one by datamodule.test_split, such as datamodule.test_split='val'.")
    assert listing_of(tmp_path, "ILSVRC/Data/CLS-LOC/val").root == tmp_path / "ILSVRC/Data/CLS-LOC/val"
    (tmp_path / "linked").mkdir()
    files.class_folders(tmp_path / "linked", "val")
    (tmp_path / "linked/ILSVRC/Data/CLS-LOC").mkdir(parents=True)
    os.symlink(tmp_path / "linked/val", tmp_path / "linked/ILSVRC/Data/CLS-LOC/val")
    assert len(listing_of(tmp_path / "linked")) == 8


def test_two_series_of_shards_are_named_by_a_pattern(tmp_path):
    files.shards(tmp_path, "val")
    files.shards(tmp_path, "val", "val-{number:04}.tar")
    report = message(tmp_path)
    assert "datamodule.test_split='imagenet1k-validation-*.tar'" in report
    for split in ("imagenet1k-validation-*.tar", "val-{0000..0002}.tar", "imagenet1k-validation-{00,01,02}.tar"):
        assert len(listing_of(tmp_path, split)) == 8
    assert len(listing_of(tmp_path, "val-{0000..0001}.tar")) == 6
    report = message(tmp_path, "val-{0000..0004}.tar")
    assert report.startswith("2 of the 5 files of datamodule.test_split=val-{0000..0004}.tar are missing")
    assert "val-0003.tar, val-0004.tar" in report


def test_half_sorted_validation_images_are_two_layouts(tmp_path):
    files.flat(tmp_path, "val")
    files.write(tmp_path / "val/n01440764/ILSVRC2012_val_00009111.JPEG", encoded())
    assert "datamodule.format=class_folders or datamodule.format=flat" in message(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_that_is_known(tmp_path, format):
    files.write(tmp_path / "imagenet.zip", b"PK")
    files.write(tmp_path / "val2/image.gif", b"GIF")
    report = message(tmp_path, format=format)
    if format != "class_folders":
        assert f"Found in {tmp_path}: imagenet.zip, val2/." in report
        assert report.count("Looked for") == 1
    if format == "auto":
        for wanted in (
            "ILSVRC2012_img_{val,validation}.tar",
            "ILSVRC2012_devkit_t12",
            "LOC_val_solution.csv",
            ".parquet",
            ".csv",
            ".cls",
        ):
            assert wanted in report
    elif format != "class_folders":
        assert f"in the format {format}. " in report


def test_formats_that_do_not_exist():
    report = message_of(datamodule, None, format="webdatset")
    assert report == "datamodule.format='webdatset' is not valid. Did you mean 'webdataset'?"


def test_files_can_be_named(everything):
    for writer, split in (
        (files.original_tar, "ILSVRC2012_img_val.tar"),
        (files.shards, "imagenet1k-validation-{00..02}.tar"),
        (files.csv_of_indices, "val.csv"),
        *([(files.parquet, "data/validation-*.parquet")] if pyarrow else []),
    ):
        listing = listing_of(everything[writer], split)
        assert listing.format == files.WRITERS[writer]
        assert len(listing) == 8


def test_the_folder_of_a_split_can_be_the_data_folder(everything):
    assert len(listing_of(everything[files.folder_of_shards] / "val", ".")) == 8
    assert len(listing_of(everything[files.kaggle] / "ILSVRC/Data/CLS-LOC")) == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{1..3}", ["1", "2", "3"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{a}", ["{a}"]),
        ("{}..{1..}", ["{}..{1..}"]),
    ],
)
def test_braces_are_those_of_a_shell(text, expected):
    assert expand_braces(text) == expected


def test_braces_of_too_many_files():
    assert "more than a million" in message_of(expand_braces, "{0..99999999}.tar")


# ---- classes ----------------------------------------------------------------------------------------------


def test_classes_of_ones_own(tmp_path):
    for name in ("roses", "daisy", "tulips"):
        files.write(tmp_path / f"images/{name}.png", encoded("PNG"))
    files.write(tmp_path / "val.csv", "".join(f"images/{name}.png,{name}\n" for name in ("roses", "daisy", "tulips")))
    files.write_tar(tmp_path / "test.tar", [(f"test/{name}/1.png", encoded("PNG")) for name in ("roses", "daisy")])
    listing = listing_of(tmp_path, num_classes=3)
    assert listing.class_to_index == {"daisy": 0, "roses": 1, "tulips": 2}
    assert listing.targets == [0, 1, 2]
    listing = listing_of(tmp_path, "test", num_classes=2)
    assert (listing.names, listing.targets) == (["test/daisy/1.png", "test/roses/1.png"], [0, 1])
    report = message(tmp_path, num_classes=4)
    assert report.startswith(f"{tmp_path / 'val.csv'}: 3 classes (daisy, roses, tulips), but the model has 4 classes.")


def test_indices_of_classes_of_ones_own(tmp_path):
    for number in range(3):
        content = [(f"{number}.png", encoded("PNG")), (f"{number}.cls", str(number).encode())]
        files.write_tar(tmp_path / f"val-{number}.tar", content)
    listing = listing_of(tmp_path, num_classes=4)
    assert listing.class_to_index == {"0": 0, "1": 1, "2": 2}
    assert listing.targets == [0, 1, 2]
    report = message(tmp_path, num_classes=2)
    assert "The label 2 is outside 0 to 1, the model's 2 classes. Set model.num_classes" in report
    assert list(listing_of(tmp_path).class_to_index) == list(imagenet_synsets())[:3]


def test_synsets_need_a_thousand_classes(everything):
    for data_dir in everything.values():
        if listing_of(data_dir).format in ("flat", "tar", "csv"):
            assert "Set model.num_classes" in message(data_dir, num_classes=5)


# ---- labels -----------------------------------------------------------------------------------------------


def test_the_kits_numbers_are_not_in_sorted_order(everything):
    numbers = files.numbering()
    order = sorted(files.SYNSETS, key=numbers.get)
    assert order != sorted(order)  # or the tests could not detect it


# SciPy 1.17: savemat(file, {"other": eye(2), "synsets": ..., "text": "abc"}, do_compression=True), the fields of the
# kit, three classes and an ancestor whose `children` are two numbers
SCIPY = base64.b64decode(
    "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFdlZCBOb3YgMjUgMDE6MDU6MTIgMjAyNgAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAAMQAAAHic42NgYIgAYjYg5oDSIMAK5TNBMSNULL8kI7UI"
    "SHMCsQIDDHywZ8AKPtgDALo/BTsPAAAANQEAAHic42NgYPjBwcDABqSBFAMTAwSwQvksQMwIxexAXFyZV5xaUgyUZ2EQhIp3ALGnT3BYkLORga"
    "FRvKcLyIBwPwgNB+X5RSnFyALpOfnFKAJ5pbnxyRmZOSlFqXlgARQOzIy81JL4jNTM9IwSqJaSosTMvPjM3MT01GIGPqCgBQPCP2xo/mFEwiDA"
    "CRWHgA/2IP0OSPpZsOjnRNIvAOXnGRhZGJqbGppBxckxhwvqQwUDHYXDexDmWBAwhxXNHFakwKUsPCD6DfDohwFk/djcTY69ZOsPmOJAof0O5K"
    "cDYzMTS0sDSyR/kGoOPB0YjqaDgU0HHBSkAyMDCwsDSxMkf5BqDjwdGI2mg4FNBwIUpAMIMEbyB6nmwNOB8WBJB5j1JDb9TGj6BZD0QxmUltMU"
    "pwsAbvBcHg8AAAArAAAAeJzjY2BgMABiNiDmAGIWBghghfIZgZgZTLMwlKRWlAgAeYlJyQwAKNEDZQ=="
)


def test_the_reader_reads_what_scipy_writes():
    rows = read_structure(SCIPY, "synsets", ("ILSVRC2012_ID", "WNID", "words", "num_children"))
    assert rows == [
        (1.0, "n02817516", "word 0, ü", 0.0),
        (2.0, "n03649909", "word 1, ü", 0.0),
        (3.0, "n02088094", "word 2, ü", 0.0),
        (4.0, "n00000003", "word 3, ü", 1.0),
    ]


def test_the_reader_ends_on_damaged_files():
    generator = random.Random(0)
    wrong = 0
    for data in (SCIPY, files.meta_mat({"n01440764": 1, "n02123045": 2}, compressed=False)):
        for _ in range(300):
            damaged = bytearray(data)
            damaged[generator.randrange(len(data))] = generator.randrange(256)
            if generator.random() < 0.3:
                del damaged[generator.randrange(len(damaged)) :]
            try:
                read_structure(bytes(damaged), "synsets", ("ILSVRC2012_ID", "WNID"))
            except MatlabError:
                wrong += 1
    assert wrong > 100


META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


@pytest.mark.parametrize(
    ("file", "content", "report"),
    [
        (META, b"", "data/meta.mat cannot be read: not a MATLAB file of level 5"),
        (META, files.meta_mat()[:-200], "data/meta.mat cannot be read: "),
        (META, files.meta_mat(variable="synset"), "it has no structure 'synsets'"),
        (META, files.meta_mat(fields=("ID", "WNID", "words")), "it has no field 'ILSVRC2012_ID'"),
        (META, files.meta_mat({"n01440764": 1}), "does not number the 1,000 classes"),
        (META, None, "has no data/meta.mat"),
        (TRUTH, None, "has no data/ILSVRC2012_validation_ground_truth.txt"),
        (TRUTH, b"1\n2\n1001\n", "line 3 of data/ILSVRC2012_validation_ground_truth.txt is '1001'"),
        (TRUTH, b"1\n-2\n", "line 2 "),
        (TRUTH, b"\xff\xfe1\0", "line 1 "),
        (TRUTH, b"1\n" * 49_999, "data/ILSVRC2012_validation_ground_truth.txt has 49999 labels, and not 50,000"),
    ],
)
def test_damaged_kits(tmp_path, file, content, report):
    files.flat(tmp_path, "val")
    path = tmp_path / "ILSVRC2012_devkit_t12" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    message_ = message(tmp_path)
    assert message_.startswith(str(tmp_path / "ILSVRC2012_devkit_t12"))
    assert report in message_
    assert "again" in message_


@pytest.mark.parametrize("cut", [10, 500, 5000])
def test_damaged_packed_kits(tmp_path, cut):
    files.flat_with_packed_kit(tmp_path, "val")
    path = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(path.read_bytes()[:-cut] if cut > 100 else path.read_bytes()[:cut])
    report = message(tmp_path)
    assert report.startswith(f"{path} ")
    assert report.endswith("Fetch the development kit again.")


@pytest.mark.parametrize(
    ("row", "report"),
    [
        ("ILSVRC2012_val_00000293", "row 10 is not an image and its synset"),
        ("ILSVRC2012_val_00000293,n00000000 1 1 1 1", "row 10 is not an image and its synset"),
        ("ILSVRC2012_val_293,n01440764 1 1 1 1", "row 10 is not an image and its synset"),
        ("ILSVRC2012_val_00000293,n02123045 1 1 1 1", "row 10 contradicts an earlier one"),
    ],
)
def test_damaged_solutions(tmp_path, row, report):
    files.kaggle(tmp_path, "val")
    path = tmp_path / "LOC_val_solution.csv"
    path.write_text(path.read_text() + row + "\n")
    message_ = message(tmp_path)
    assert message_.startswith(f"{path}: {report}")
    assert message_.endswith("Fetch it again.")


def test_a_solution_without_some_of_the_images(tmp_path):
    files.kaggle(tmp_path, "val")
    files.write_solution(tmp_path, kept=6)
    assert "has no labels for 2 images" in message(tmp_path)


def test_sources_that_contradict_each_other(tmp_path):
    files.flat_with_solution(tmp_path, "val")
    path = tmp_path / "LOC_val_solution.csv"
    path.write_text(path.read_text().replace("00000293,n01440764", "00000293,n02123045"))
    report = message(tmp_path)
    assert "differ in the labels of 1 images: ILSVRC2012_val_00000293.JPEG" in report
    assert "LOC_val_solution.csv" in report
    assert "devkit" in report


@pytest.mark.parametrize("packed", [False, True])
def test_images_without_labels(tmp_path, packed):
    if packed:
        files.original_tar(tmp_path, "val")
        (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    else:
        files._flat(tmp_path, "val")
    report = message(tmp_path)
    assert "holds 8 validation images, whose names do not contain their classes" in report
    assert f"Put ILSVRC2012_devkit_t12 (extracted or .tar.gz) or LOC_val_solution.csv into {tmp_path}" in report


def test_images_without_classes_in_their_names(tmp_path):
    files.write_tar(tmp_path / "val.tar", [("1.jpg", encoded()), ("2.jpg", encoded())])
    report = message(tmp_path)
    assert report.startswith(
        f"{tmp_path / 'val.tar'} does not contain the classes of its images, such as 1.jpg, 2.jpg."
    )


# ---- damaged archives -------------------------------------------------------------------------------------


def damage(path, edit):
    data = bytearray(path.read_bytes())
    result = edit(data)
    path.write_bytes(data if result is None else result)


def second_header(path):
    with tarfile.open(path) as archive:
        archive.next()
        return archive.next().offset


def flip(at):
    def edit(data):
        data[at] ^= 0xFF

    return edit


ARCHIVES = [files.original_tar, files.tar_of_class_folders, files.shards]


@pytest.mark.parametrize("writer", ARCHIVES)
@pytest.mark.parametrize(
    ("edit", "report"),
    [
        (lambda data: b"", "is incomplete|is damaged|empty"),
        (lambda data: data[:100], "damaged|incomplete"),
        (lambda data: data[: len(data) // 2 + 7], "damaged|incomplete"),
        (
            lambda data: bytes(data).rstrip(b"\0") + bytes(-len(bytes(data).rstrip(b"\0")) % 512),
            "end-of-archive marker is missing",
        ),
        (lambda data: bytes(data) + bytes(data), "neither a member nor the end"),
        (lambda data: b"<html>404</html>" * 1000, "damaged or no tar"),
        (lambda data: b"\x1f\x8b" + bytes(data), "compressed with gzip"),
    ],
)
def test_damaged_archives(tmp_path, writer, edit, report):
    writer(tmp_path, "val")
    path = sorted(tmp_path.glob("*.tar"))[0]
    damage(path, edit)
    message_ = message(tmp_path)
    assert str(path) in message_
    assert any(part in message_ for part in report.split("|")), message_
    assert "again" in message_ or "Decompress it." in message_


@pytest.mark.parametrize("writer", ARCHIVES)
def test_a_damaged_header_in_the_middle(tmp_path, writer):
    # where Python's tarfile takes it for the end, in silence
    writer(tmp_path, "val")
    path = sorted(tmp_path.glob("*.tar"))[0]
    damage(path, flip(second_header(path) + 20))
    assert f"{path} is damaged" in message(tmp_path)


def test_a_header_of_zeros_in_the_middle(tmp_path):
    files.original_tar(tmp_path, "val")
    path = tmp_path / "ILSVRC2012_img_val.tar"
    at = second_header(path)
    damage(path, lambda data: data[:at] + bytes(512) + data[at + 512 :])
    assert f"byte {at + 512} is neither a member" in message(tmp_path) or f"byte {at} " in message(tmp_path)


@pytest.mark.parametrize("part", ["header", "end"])
def test_damaged_archives_in_the_training_archive(tmp_path, part):
    files.original_tar(tmp_path, "train")
    path = tmp_path / "ILSVRC2012_img_train.tar"
    with tarfile.open(path) as archive:
        inner = archive.next()
    if part == "header":
        damage(path, flip(inner.offset_data + 3))
    else:  # the inner archive's end mark, so that the next archive would be read as members of it
        content = path.read_bytes()[inner.offset_data : inner.offset_data + inner.size]
        kept = len(content.rstrip(b"\0")) // 512 * 512 + 512
        others = [(f"{synset}.tar", files.class_tar(synset)) for synset in files.SYNSETS[:3]]
        files.write_tar(path, [(inner.name, content[:kept]), *others])
    report = message(tmp_path, "train")
    assert f"{inner.name} in {path} is" in report
    assert report.endswith("Fetch or make the archive again.")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_archives(tmp_path, kind):
    path = tmp_path / "val.tar"
    files.write_tar(path, [("val/n01440764/a.jpg", encoded())])
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("val/n01440764/b.jpg")
        member.type, member.linkname = kind, "val/n01440764/a.jpg"
        archive.addfile(member)
    report = message(tmp_path)
    assert report.startswith(f"val/n01440764/b.jpg in {path} is a link")
    assert "--hard-dereference" in report


def test_folders_and_hidden_files_in_archives_are_left_out(tmp_path):
    path = files.write_tar(
        tmp_path / "val.tar",
        [("val/n01440764/a.jpg", encoded()), ("val/n01440764/._a.jpg", b"mac"), ("val/.DS_Store", b"")],
    )
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("val/n02123045")
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    assert listing_of(tmp_path).names == ["val/n01440764/a.jpg"]
    assert [member.path for member in members(path)] == ["val/n01440764/a.jpg"]


def test_long_names_in_archives(tmp_path):
    name = "val/n01440764/" + "long" * 60 + ".jpg"
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        files.write_tar(tmp_path / "val.tar", [(name, files.image("a")), (name[:-4] + "2.jpg", b"b")], format=format)
        listing = listing_of(tmp_path)
        assert listing.names == [name, name[:-4] + "2.jpg"]
        assert listing.read(0) == files.image("a")


def test_images_twice_in_an_archive(tmp_path):
    files.write_tar(tmp_path / "val.tar", [("a/n01440764/a.jpg", encoded()), ("./a/n01440764/a.jpg", encoded())])
    assert "has images twice: a/n01440764/a.jpg" in message(tmp_path)


def test_an_archive_that_was_cut_after_it_was_listed(tmp_path):
    files.original_tar(tmp_path, "val")
    listing = listing_of(tmp_path)
    path = tmp_path / "ILSVRC2012_img_val.tar"
    os.truncate(path, 3000)
    assert "has become shorter" in message_of(ImageDataset(listing, pil_to_tensor).decode, 0)


# ---- shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "report"),
    [
        ([("1.jpg", b"x"), ("2.jpg", b"x"), ("2.cls", b"1")], "1 samples lack their class (.cls): 1"),
        ([("1.jpg", b"x"), ("1.cls", b"1"), ("2.cls", b"1")], "1 samples lack their image (.jpg, .jpeg, .png): 2"),
        ([("1.jpg", b"x"), ("1.cls", b"1"), ("1.cls", b"1")], "the sample '1' twice"),
        ([("1.jpg", b"x"), ("1.cls", b"1"), ("1.png", b"1")], "two images of it: 1.jpg and 1.png"),
        ([("1.json", b"{}"), ("1.cls", b"")], "1 samples lack their image"),
        ([("1.jpg", b"x"), ("1.cls", b"")], "The label of the .cls of 1.jpg in"),
        ([("1.jpg", b"x"), ("1.cls", b"-1")], "is '-1'. Give an index that counts from 0"),
        ([("1.jpg", b"x"), ("1.cls", b"1.0")], "is '1.0'"),
        ([("1.jpg", b"x"), ("1.cls", b"1000")], "The label 1000 is outside 0 to 999"),
        ([("1.jpg", b"x"), ("1.cls", b"9" * 30)], "is outside 0 to 999"),
        ([("1.jpg", b"x"), ("1.cls", b"9" * 3000)], "has 3000 bytes, too many for a class"),
        ([("1.jpg", b"x"), ("1.cls", b"1"), ("2.jpg", b"x"), ("2.cls", b"cat")], "either indices or names"),
        ([("1.jpg", b"x"), ("1.cls", b"n01440764"), ("2.jpg", b"x"), ("2.cls", b"cat")], "1 of 2 classes are not"),
    ],
)
def test_shards_that_are_not_as_they_should_be(tmp_path, contents, report):
    path = files.write_tar(tmp_path / "val-00.tar", contents)
    message_ = message(tmp_path)
    assert str(path) in message_
    assert report in message_


def test_a_missing_shard(tmp_path):
    files.shards(tmp_path, "val")
    (tmp_path / "imagenet1k-validation-01.tar").unlink()
    report = message(tmp_path)
    assert report.startswith(
        f"1 of the 3 files like {tmp_path / 'imagenet1k-validation-00.tar'} are missing: number 00001."
    )
    assert "datamodule.test_split" in report
    assert len(listing_of(tmp_path, "imagenet1k-validation-*.tar")) == 5


def test_shards_counted_from_one_and_shards_with_their_number(tmp_path):
    sample = [("1.jpg", encoded()), ("1.cls", b"1")]
    for number in (1, 2, 3):
        files.write_tar(tmp_path / f"a/val-{number}.tar", sample)
        files.write_tar(tmp_path / f"b/val-{number - 1:05}-of-00004.tar", sample)
    assert len(listing_of(tmp_path / "a")) == 3
    assert "1 of the 4 files" in message(tmp_path / "b")
    assert "number 00003" in message(tmp_path / "b")


# ---- CSV files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "report"),
    [
        ("", "is empty"),
        ("path,label\n", "has a header and no rows"),
        ("1.jpg\n", "line 1 has 1 columns separated by commas, and not 2"),
        ("1.jpg;0\n", "line 1 has 1 columns"),
        ("1.jpg,0\n2.jpg,0,1\n", "line 2 has 3 columns"),
        ("path,label\n1.jpg,0\n2.jpg\n", "line 3 has 1 columns"),
        ("1.jpg,0\n3.jpg,0\n", "1 of 2 images do not exist, the first one in line 2: 3.jpg"),
        ("file,what\n1.jpg,0\n", "The label of line 2 of"),
        ("a/1.jpg,0\n", "line 1: a/1.jpg"),
        ("1.jpg,0\n./1.jpg,1\n", "has images twice"),
        ("1.jpg,\n", "The label of line 1 of"),
        (",0\n", "line 1 has no path"),
        ("1.jpg,-3\n", "is '-3'"),
        ("1.jpg,3\n2.jpg,n01440764\n", "Give either indices or names"),
        ('"1.jpg,3\n2.jpg,4\n', "cannot be read"),
        (b"1.jpg,\xff\n", "not a text in UTF-8"),
        (b"1\0.jpg,1\n", ""),
        ("1.jpg,1000\n", "The label 1000 is outside"),
    ],
)
def test_csv_files_that_are_not_as_they_should_be(tmp_path, text, report):
    for name in ("1.jpg", "2.jpg"):
        files.write(tmp_path / name, encoded())
    path = files.write(tmp_path / "val.csv", text)
    message_ = message(tmp_path)
    assert message_.startswith(str(path)) or f" of {path} " in message_
    assert report in message_


@pytest.mark.parametrize(
    "text",
    [
        "1.jpg,7\n2.jpg,8\n",
        "label,path\n7,1.jpg\n8,2.jpg\n",
        "\ufeffImage,Class\n1.jpg,7\n\n2.jpg,8",
        '"1.jpg", 7\r\n2.jpg ,8\r\n',
    ],
)
def test_csv_files_with_and_without_a_header(tmp_path, text):
    for name in ("1.jpg", "2.jpg"):
        files.write(tmp_path / name, encoded())
    files.write(tmp_path / "val.csv", text)
    listing = listing_of(tmp_path)
    assert (listing.names, listing.targets) == (["1.jpg", "2.jpg"], [7, 8])


def test_absolute_paths_in_a_csv_file(tmp_path):
    files.write(tmp_path / "elsewhere/1.jpg", encoded())
    files.write(tmp_path / "data/val.csv", f"{tmp_path / 'elsewhere/1.jpg'},3\n")
    listing = listing_of(tmp_path / "data")
    assert listing.names == ["../elsewhere/1.jpg"]
    assert listing.read(0) == encoded()


# ---- Parquet ----------------------------------------------------------------------------------------------


@needs_pyarrow
def test_rows_without_names_are_named_by_their_number(tmp_path):
    files.parquet(tmp_path, "val", named=False)
    names = listing_of(tmp_path).names
    assert names[:2] == ["validation-00000-of-00002.parquet/000000", "validation-00000-of-00002.parquet/000001"]
    assert len(set(names)) == 8


@needs_pyarrow
def test_labels_of_parquet_files_may_be_synsets(tmp_path):
    files.parquet(tmp_path, "val", labels=str)
    assert sorted(listing_of(tmp_path).targets) == sorted([*files.TARGETS.values()] * 2)


@needs_pyarrow
def test_row_groups_are_read_once_in_order(tmp_path, monkeypatch):
    from src.datamodules.formats import parquet

    files.parquet(tmp_path, "val", group=2)
    read = []
    read_group = parquet._read_group
    monkeypatch.setattr(parquet, "_read_group", lambda *where: read.append(where[1]) or read_group(*where))
    listing = listing_of(tmp_path)
    assert not read
    for index in range(8):
        listing.read(index)
    assert read == [0, 1, 0, 1]


@needs_pyarrow
def test_a_fork_while_a_thread_reads(everything):
    data = ImageDataset(listing_of(everything[files.parquet]), pil_to_tensor)
    loader = ImageLoader(data, batch_size=8, num_workers=1, multiprocessing_context="fork", timeout=20)
    with data.listing._lock:
        ((images, _, _),) = loader
    assert torch.equal(images, torch.stack([image for image, _, _ in data]))


@needs_pyarrow
@pytest.mark.parametrize(
    ("edit", "report"),
    [
        (lambda data: b"", "is damaged or no parquet file"),
        (lambda data: data[:-10], "is damaged or no parquet file"),
        (lambda data: data[len(data) // 2 :], "damaged"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is damaged or no parquet file"),
    ],
)
def test_damaged_parquet_files(tmp_path, edit, report):
    files.parquet(tmp_path, "val")
    path = tmp_path / "data/validation-00001-of-00002.parquet"
    damage(path, edit)
    module = datamodule(tmp_path, num_classes=1000)
    message_ = message_of(lambda: list(module.test_dataloader()))
    assert str(path) in message_
    assert report in message_
    assert message_.endswith("Fetch the file again.")


@needs_pyarrow
def test_parquet_files_of_other_columns_rows_and_numbers(tmp_path):
    import pyarrow.parquet as pq

    path = tmp_path / "val.parquet"
    pq.write_table(pyarrow.table({"img": [b"1"], "label": [1]}), path)
    assert f"{path} has no column 'image.bytes'; it has img, label." in message(tmp_path)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = pyarrow.array([{"bytes": b"", "path": "a"}, {"bytes": None, "path": "b"}, None], kind)
    for size in (1, 3):  # the place of a row does not depend on its row group
        pq.write_table(pyarrow.table({"image": rows, "label": [1, 2, 3]}), path, row_group_size=size)
        data = ImageDataset(listing_of(tmp_path), pil_to_tensor)
        for row in (1, 2):
            assert message_of(data.decode, row).startswith(f"row {row} of {path} has no image bytes")
    assert "the file is empty" in message_of(data.decode, 0)
    for label in (None, 1.5, True):
        pq.write_table(pyarrow.table({"image": rows[:2], "label": [label, label]}), path)
        assert f"row 0 of {path} has the label {label!r}" in message(tmp_path)
    pq.write_table(pyarrow.table({"image": rows[:0], "label": pyarrow.array([], pyarrow.int64())}), path)
    assert f"{path} holds no images" in message(tmp_path)


@needs_pyarrow
def test_a_missing_parquet_file(tmp_path):
    files.parquet(tmp_path, "val")
    (tmp_path / "data/validation-00001-of-00002.parquet").unlink()
    assert "1 of the 2 files like" in message(tmp_path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    files.write(tmp_path / "val.parquet", b"PAR1")
    imported = builtins.__import__

    def without(name, *rest, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    report = message(tmp_path)
    assert report == f"{tmp_path / 'val.parquet'} is read with PyArrow, which is not installed: pip install pyarrow"


# ---- damaged images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"text", "not an image of a known format"), (encoded()[:-60], "")],
)
def test_damaged_images_are_named_with_what_holds_them(tmp_path, monkeypatch, content, reason):
    image = files.image
    name = "ILSVRC2012_val_00006697.JPEG"
    monkeypatch.setattr(files, "image", lambda its: content if its == name else image(its))
    for writer in READERS:
        writer(tmp_path / writer.__name__, "val")
        module = datamodule(tmp_path / writer.__name__, num_classes=1000, batch_size=1)
        module.setup()
        (position,) = (i for i, path in enumerate(module.test_dataset.paths) if Path(path).stem == Path(name).stem)
        report = message_of(lambda module=module: list(module.test_dataloader()))
        assert report.startswith("Cannot decode the image ")
        assert reason in report
        assert "0x" not in report
        assert str(tmp_path / writer.__name__) in report
        inside = {files.original_tar: name, files.shards: Path(name).stem, files.parquet: "row "}.get(writer, name)
        assert inside in report
        assert report.endswith("again." if writer in (files.original_tar, files.shards, files.parquet) else "the file.")
        message_of(module.test_dataset.decode, position)


@pytest.mark.parametrize("seed", range(240))
def test_fuzz(tmp_path, seed):
    """Whatever is damaged: all eight images are decoded, or one error tells what is wrong; none is lost in silence."""
    generator = random.Random(seed)
    writers = [files.original_tar, files.shards, files.tars_of_classes, files.flat] + [files.parquet] * (
        pyarrow is not None
    )
    writer = writers[seed % len(writers)]
    split = "train" if writer is files.tars_of_classes else generator.choice(["val", "train"])
    writer(tmp_path, split)
    suffixes = (".tar", ".JPEG", ".mat", ".txt", ".parquet")
    path = generator.choice(sorted(p for p in tmp_path.rglob("*") if p.suffix in suffixes))
    damage_at_random(path, generator)
    try:
        listing = listing_of(tmp_path, split)
        images = [ImageDataset(listing, pil_to_tensor).decode(index) for index in range(len(listing))]
    except UserError as error:
        report = str(error)
    else:
        assert len(images) == 8
        assert_right_labels(listing, path)
        return
    assert str(tmp_path) in report
    assert "\n" not in report

    # with images left out, every one that is listed is counted once: evaluated, or skipped with a reason
    try:
        listing = listing_of(tmp_path, split)
        loader = ImageLoader(ImageDataset(listing, pil_to_tensor), batch_size=1, skip=True)
        evaluated = [int(index) for _, _, indices in loader for index in indices]
    except UserError as error:
        report = str(error)
        # not one image but what holds it
        evaluated = None
    if evaluated is None:
        assert str(tmp_path) in report
        return
    assert len(listing) == 8
    assert_right_labels(listing, path)
    skipped = {index: reason for lacking in loader.skipped for index, reason in lacking.items()}
    assert skipped
    assert all(skipped.values())
    assert sorted([*evaluated, *skipped]) == list(range(8))


def damage_at_random(path, generator):
    data = bytearray(path.read_bytes())
    kind = generator.choice(["bytes", "cut", "zeros", "hole", "noise"])
    at, length = generator.randrange(len(data)), generator.randint(1, 1500)
    if kind == "bytes":
        for _ in range(generator.randint(1, 20)):
            data[generator.randrange(len(data))] = generator.randrange(256)
    elif kind == "cut":
        del data[at:]
    elif kind == "hole":
        del data[at : at + length]
    else:
        size = len(data[at : at + length])
        data[at : at + length] = bytes(size) if kind == "zeros" else generator.randbytes(size)
    path.write_bytes(data)


def assert_right_labels(listing, damaged):
    """The labels are those that were written, unless what was damaged are the labels themselves."""
    if damaged.suffix != ".parquet":
        assert sorted(listing.targets) == sorted([*files.TARGETS.values()] * 2)


def test_sizes_in_headers_that_lead_astray(tmp_path):
    """A size that leads beyond the end, or to a place in the middle, with a checksum that is right."""
    for size in (2**33, 10, 5000):
        path = tmp_path / f"{size}/ILSVRC2012_img_train.tar"
        files.write_tar(path, [(name, files.image(name)) for name in files.SPLITS["train"]])
        data = bytearray(path.read_bytes())
        header = data[:512]
        header[124:136] = b"%011o\0" % size if size < 2**32 else b"\x80" + struct.pack(">3xQ", size)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[:512] = header
        path.write_bytes(data)
        assert str(path) in message(tmp_path / str(size), "train")


def test_formats_are_recognised_from_names_alone(tmp_path):
    """No image is read for it, which would take minutes."""
    files.write(tmp_path / "ILSVRC2012_img_val.tar", b"")
    files.write(tmp_path / "val.csv", b"")
    assert [found.format for found in find_formats(SplitLocation(tmp_path, "val"))] == ["tar", "csv"]
    assert np.all([str(found).endswith(")") for found in find_formats(SplitLocation(tmp_path, "val"))])


@needs_pyarrow
def test_parquet_columns_of_odd_types_are_one_message_or_read(tmp_path):
    import pyarrow.parquet as pq

    content, path = encoded("PNG"), tmp_path / "val.parquet"
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = pyarrow.array([{"bytes": content, "path": "a"}, {"bytes": content, "path": "b"}], kind)
    refused = {
        "the column 'label' holds list": {"image": images, "label": [[0], [1]]},
        "the column 'label' holds struct": {"image": images, "label": [{"a": 0}, {"a": 1}]},
        "the column 'label' holds timestamp": {
            "image": images,
            "label": pyarrow.array([0, 1]).cast(pyarrow.timestamp("ns")),
        },
        "the column 'image.bytes' holds int64": {"image": [{"bytes": 1}, {"bytes": 2}], "label": [0, 1]},
        "the column 'image.bytes' holds string": {"image": [{"bytes": "a"}, {"bytes": "b"}], "label": [0, 1]},
        "has no column 'image.bytes'; it has image.bytes, label.": {"image.bytes": [content] * 2, "label": [0, 1]},
        "has no column 'image.bytes'; it has image, label.": {"image": [[{"bytes": content}]] * 2, "label": [0, 1]},
        "has 2 columns 'label'": pyarrow.table([images, [0, 1], [0, 1]], ["image", "label", "label"]),
        "has 2 columns 'image'": pyarrow.table([images, images, [0, 1]], ["image", "image", "label"]),
    }
    for expected, columns in refused.items():
        pq.write_table(columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns), path)
        report = message(tmp_path, num_classes=2)
        assert expected in report
        assert str(path) in report
    for name in (1, b"a", ["a"], {"x": 1}):  # not a name: images are numbered
        rows = [{"bytes": content, "path": name}] * 2
        pq.write_table(pyarrow.table({"image": rows, "label": [0, 1]}), path)
        listing = listing_of(tmp_path, num_classes=2)
        assert listing.names == ["val.parquet/000000", "val.parquet/000001"]
        assert listing.read(1) == content
