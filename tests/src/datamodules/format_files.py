"""The same eight images of four synsets, written in every format that ImageNet comes in."""

from __future__ import annotations

import csv
import gzip
import io
import random
import struct
import tarfile
import zlib
from pathlib import Path

from src.datamodules.formats.classes import imagenet_synsets
from tests.src.datamodules.setup import encoded

# ImageNet's own: what these validation images show is known to timm's "ReaL" labels, too.
NUMBERS = {
    "n01440764": (293, 6697),
    "n02119789": (756, 6183),
    "n02123045": (1496, 2823),
    "n11939491": (4514, 4920),
}
SYNSETS = list(NUMBERS)
SPLITS = {
    "val": {f"ILSVRC2012_val_{n:08}.JPEG": synset for synset, both in NUMBERS.items() for n in both},
    "train": {f"{synset}_{n}.JPEG": synset for synset, both in NUMBERS.items() for n in (7, 10026)},
}
# Indices of the four among the 1,000 outputs.
TARGETS = {"n01440764": 0, "n02119789": 278, "n02123045": 281, "n11939491": 985}


def image(name):
    """Bytes of the image of that name: each is different, whatever holds it."""
    return encoded(seed=zlib.crc32(name.encode()), size=(40, 36))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_tar(path, contents, mode="w", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as archive:
        for name, content in contents:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


# ---- the development kit and Kaggle's solution --------------------------------------------------------------


def numbering():
    """ILSVRC2012_ID of each synset: in no order, as the kit's; ancestors come after the thousand."""
    synsets = list(imagenet_synsets())
    random.Random(5).shuffle(synsets)
    return {name: number for number, name in enumerate([*synsets, "n00001740", "n00001930"], start=1)}


def _element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def _matrix(kind, value):
    data = _element(4, value.encode("utf-16-le")) if kind == 4 else _element(9, struct.pack("<d", value))
    flags = _element(6, struct.pack("<II", kind, 0)) + _element(5, struct.pack("<ii", 1, 1)) + _element(1, b"")
    return _element(14, flags + data)


def meta_mat(numbers=None, compressed=True, variable="synsets", fields=("ILSVRC2012_ID", "WNID", "words")):
    numbers = numbering() if numbers is None else numbers
    names = b"".join(field.encode().ljust(32, b"\0") for field in fields)
    content = _element(6, struct.pack("<II", 2, 0)) + _element(5, struct.pack("<ii", len(numbers), 1))
    content += _element(1, variable.encode()) + struct.pack("<HHi", 5, 4, 32) + _element(1, names)
    for name, number in numbers.items():
        content += _matrix(6, float(number)) + _matrix(4, name) + _matrix(4, "a word")
    whole = _element(14, content)
    if compressed:
        packed = zlib.compress(whole)
        whole = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124, b" ") + b"\0\1IM" + whole


def kit_files(labels=None):
    """Content of the development kit; images that are not ours are of class 1."""
    labels = labels or {number: synset for synset, both in NUMBERS.items() for number in both}
    numbers = numbering()
    lines = [str(numbers[labels[number]] if number in labels else 1) for number in range(1, 50_001)]
    return {
        "data/meta.mat": meta_mat(),
        "data/ILSVRC2012_validation_ground_truth.txt": "\n".join(lines).encode() + b"\n",
    }


def write_kit(folder):
    for name, content in kit_files().items():
        write(folder / "ILSVRC2012_devkit_t12" / name, content)


def write_packed_kit(folder):
    contents = [(f"ILSVRC2012_devkit_t12/{name}", content) for name, content in kit_files().items()]
    return write_tar(folder / "ILSVRC2012_devkit_t12.tar.gz", contents, "w:gz")


def write_solution(folder, kept=None):
    rows = [f"{Path(name).stem},{synset} 1 2 30 40 {synset} 5 5 9 9 " for name, synset in SPLITS["val"].items()]
    random.Random(0).shuffle(rows)
    return write(folder / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows[:kept]]) + "\n")


# ---- formats: each writes one split into a data folder ------------------------------------------------------


def class_folders(data_dir, split, below="."):
    for name, synset in SPLITS[split].items():
        write(data_dir / below / split / synset / name, image(name))


def _flat(folder, split):
    for name in SPLITS[split]:
        write(folder / split / name, image(name))


def flat(data_dir, split):
    _flat(data_dir, split)
    write_kit(data_dir)


def flat_with_packed_kit(data_dir, split):
    _flat(data_dir, split)
    write_packed_kit(data_dir)


def flat_with_solution(data_dir, split):
    _flat(data_dir, split)
    write_solution(data_dir)
    write_kit(data_dir)


def kaggle(data_dir, split):
    if split == "train":
        class_folders(data_dir, split, "ILSVRC/Data/CLS-LOC")
    else:
        _flat(data_dir / "ILSVRC/Data/CLS-LOC", split)
    write_solution(data_dir)
    write(data_dir / "LOC_synset_mapping.txt", "n01440764 tench, Tinca tinca\n")


def original_tar(data_dir, split):
    path = data_dir / f"ILSVRC2012_img_{split}.tar"
    if split == "val":
        write_tar(path, [(name, image(name)) for name in reversed(SPLITS[split])])
    else:
        write_tar(path, [(f"{synset}.tar", class_tar(synset)) for synset in reversed(SYNSETS)])
    write_packed_kit(data_dir)


def class_tar(synset):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in (name for name, its in SPLITS["train"].items() if its == synset):
            content = image(name)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tar_of_class_folders(data_dir, split):
    contents = [(f"./{split}/{synset}/{name}", image(name)) for name, synset in SPLITS[split].items()]
    write_tar(data_dir / f"{split}.tar", contents, format=tarfile.PAX_FORMAT)


def tars_of_classes(data_dir, split):
    for synset in SYNSETS:
        contents = [(name, image(name)) for name, its in SPLITS[split].items() if its == synset]
        write_tar(data_dir / split / f"{synset}.tar", contents)


def shards(data_dir, split, pattern="imagenet1k-{split}-{number:02}.tar", label=TARGETS.get):
    names = list(SPLITS[split].items())
    split_name = {"val": "validation"}.get(split, split)
    for number in range(3):
        contents = []
        for name, synset in names[number::3]:
            stem = Path(name).stem
            contents += [(f"{stem}.cls", str(label(synset)).encode()), (f"{stem}.jpg", image(name))]
            contents += [(f"{stem}.json", b"{}")]
        write_tar(data_dir / pattern.format(split=split_name, number=number), contents)


def folder_of_shards(data_dir, split):
    shards(data_dir, split, f"{split}/{{number:06}}.tar", label=str)


def parquet(data_dir, split, group=3, labels=TARGETS.get, named=True):
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = list(SPLITS[split].items())
    split_name = {"val": "validation"}.get(split, split)
    for number in range(2):
        part = names[number::2]
        images = [{"bytes": image(name), "path": name if named else None} for name, _ in part]
        struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"image": pa.array(images, struct), "label": [labels(synset) for _, synset in part]})
        path = data_dir / "data" / f"{split_name}-{number:05}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=group)


def csv_of_synsets(data_dir, split):
    """Rows in no order, in folders that say nothing, without a header."""
    rows = [[f"images_{split}/{name}", synset] for name, synset in SPLITS[split].items()]
    _write_csv(data_dir / f"{split}.csv", random.Random(1).sample(rows, len(rows)))
    for name in SPLITS[split]:
        write(data_dir / f"images_{split}" / name, image(name))


def csv_of_indices(data_dir, split):
    rows = [["label", "note", "Path"]]
    rows += [[TARGETS[synset], "a, b", f"images_{split}/{name}"] for name, synset in SPLITS[split].items()]
    _write_csv(data_dir / f"{split}.csv", rows)
    for name in SPLITS[split]:
        write(data_dir / f"images_{split}" / name, image(name))


def _write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


# What each is recognised as.
WRITERS = {
    class_folders: "class_folders",
    flat: "flat",
    flat_with_packed_kit: "flat",
    flat_with_solution: "flat",
    kaggle: "flat",
    original_tar: "tar",
    tar_of_class_folders: "tar",
    tars_of_classes: "tar",
    shards: "webdataset",
    folder_of_shards: "webdataset",
    parquet: "parquet",
    csv_of_synsets: "csv",
    csv_of_indices: "csv",
}


def gzipped(path):
    path.write_bytes(gzip.compress(path.read_bytes()))
