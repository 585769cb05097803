"""The demo's photographs, made from the originals: `scripts/make_flower_subset.py`."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import tempfile
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, IptcImagePlugin
from rich.console import Console
from rich.progress import track

from scatterbrain.errors import UserError, check_whole_number
from src.datamodules.dataset import load_rgb
from src.datamodules.formats import scan_folder

JPEG_LIMIT = 65_500  # pixels, libjpeg's
FLICKR_ID = re.compile(r"([0-9]+)_")
IPTC_AUTHOR, IPTC_COPYRIGHT = (2, 80), (2, 116)

ATTRIBUTION = """\
# Where these photographs come from

{number} photographs of the flower photographs dataset that TensorFlow publishes as `flower_photos`
(The TensorFlow Team, *Flowers*, 2019), taken from its redistribution at
<https://github.com/Oldpel/flower_photos> (commit `140ff6f`, folder `dataset/val`): of each class the {per_class} whose
file names have the smallest SHA-256. The files are changed: each photograph was resized to a shorter side of
{side} px and re-encoded as JPEG without its metadata, by `scripts/make_flower_subset.py`.

Each photograph belongs to its photographer and is licensed under
[Creative Commons Attribution 2.0 Generic (CC BY 2.0)](https://creativecommons.org/licenses/by/2.0/), which allows
copies and changes with attribution. The redistribution does not carry the photographers' names; each
photograph's page on Flickr, linked below by the photo id that begins the file's name, names its photographer. An
author or a copyright notice in an original's metadata is repeated after the link.

| file | flower | pixels | original pixels | photograph and photographer |
|---|---|---|---|---|
{rows}
"""


def select(source: Path, per_class: int) -> list[Path]:
    """The photographs to take, in the order of their paths.

    Raises:
        UserError: no class folders, too few photographs in one, or a name that is of no use.
    """
    if not source.is_dir():
        fault = "is a file, not a folder" if source.exists() else "does not exist"
        raise UserError(f"{source} {fault}. Give the folder that holds the class folders.")
    classes, _ = scan_folder(source)
    if not classes:
        raise UserError(f"{source} holds no class folders. Give the folder that holds them, such as dataset/val.")
    selected = []
    for folder in (source / name for name in classes):
        _, files = scan_folder(folder)
        for file in files:
            if not FLICKR_ID.match(file):
                raise UserError(
                    f"{folder / file} cannot be attributed: its name does not begin with a Flickr id, as in "
                    "14816364517_2423021484_m.jpg. Restore the name or remove the file."
                )
        if len(files) < per_class:
            raise UserError(
                f"{folder} holds {len(files)} photographs, fewer than --per-class={per_class}. Lower --per-class or "
                "complete the folder."
            )
        taken = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file)).digest())[:per_class]
        taken.sort(key=lambda file: Path(file).stem)
        for one, other in itertools.pairwise(taken):
            if Path(one).stem == Path(other).stem:
                raise UserError(f"{folder}: {one} and {other} would become the same file. Remove one of them.")
        selected += [folder / file for file in taken]
    return selected


def read_original(path: Path) -> tuple[Image.Image, str]:
    """An original, turned upright, and the author and copyright of its metadata, empty if none.

    The licence demands that these notices be kept intact, and the new file has no metadata.

    Raises:
        UserError: the file cannot be decoded, or its metadata not be read.
    """
    image = load_rgb(path)
    try:
        exif = image.getexif()
        values = [exif.get(ExifTags.Base.Artist), exif.get(ExifTags.Base.Copyright)]
        with Image.open(path) as file:
            iptc = IptcImagePlugin.getiptcinfo(file) or {}
        for tag in (IPTC_AUTHOR, IPTC_COPYRIGHT):
            value = iptc.get(tag)
            values += value if isinstance(value, list) else [value]
        notices = dict.fromkeys(as_text(value) for value in values if value)
        return ImageOps.exif_transpose(image), ", ".join(filter(None, notices))
    except Exception as error:  # as of damaged images, nearly anything is raised
        reason = str(error) or type(error).__name__
        raise UserError(f"The metadata of {path} cannot be read: {reason}. Remove it from the file.") from error


def as_text(value: str | bytes) -> str:
    """A value of EXIF or IPTC on one line, fit for a cell of a table."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            value = value.decode("latin-1")
    return " ".join(value.replace("\0", " ").split()).replace("|", r"\|")


def size_for(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Width and height of the aspect ratio of `size`, the shorter of them exactly `side`."""
    width, height = (round(length * side / min(size)) for length in size)
    return width, height


def as_pixels(size: tuple[int, int]) -> str:
    """Width and height as text."""
    return f"{size[0]} x {size[1]}"


def write_photograph(original: Path, folder: Path, side: int, quality: int) -> str:
    """The attribution's row of `original`, after its small form is written to `folder`/val/<class>/.

    Raises:
        UserError: the original cannot be decoded, or its small form is too long for JPEG.
    """
    image, notice = read_original(original)
    small_size = size_for(image.size, side)
    if max(small_size) > JPEG_LIMIT:
        raise UserError(
            f"{original} of {as_pixels(image.size)} px would become {as_pixels(small_size)} px, but JPEG ends at "
            f"{JPEG_LIMIT}. Lower --side or remove the file."
        )
    flower = original.parent.name
    name = f"val/{flower}/{original.stem}.jpg"
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    small = image.resize(small_size, Image.Resampling.BICUBIC)
    # Pillow keeps the comment of the original unless another is given.
    small.save(target, "JPEG", quality=quality, optimize=True, comment=b"")
    link = f"<https://www.flickr.com/photo.gne?id={FLICKR_ID.match(original.name)[1]}>"
    if notice:
        link += f" ({notice})"
    cells = (f"`{name}`", flower.removesuffix("s"), as_pixels(small_size), as_pixels(image.size), link)
    return f"| {' | '.join(cells)} |"


def replace(new: Path, output: Path, backup: Path) -> bool:
    """Whether a folder `output` was moved to `backup`, after `new` got its name."""
    replaced = os.path.lexists(output)
    if replaced:
        os.rename(output, backup)
    try:
        os.rename(new, output)
    except OSError:
        if replaced:
            os.rename(backup, output)
        raise
    return replaced


def make_subset(source: str, output: str, per_class: int, side: int, quality: int, force: bool) -> str:
    """Make the photographs; a message about them.

    Args:
        source: folder of class folders with the originals.
        output: folder to make.
        per_class: photographs of each class.
        side: shorter side in pixels.
        quality: of the JPEG files, 1 to 95.
        force: move an existing output to the same name with `.og` behind it.

    Raises:
        UserError: an option, the source, a photograph in it, or the output; nothing is left behind.
    """
    check_whole_number("--per-class", per_class, 1)
    check_whole_number("--side", side, 1, 4096)
    check_whole_number("--quality", quality, 1, 95)
    source, output = Path(source).expanduser(), Path(output).expanduser()
    backup = Path(f"{output}.og")
    if os.path.lexists(output):
        if not force:
            raise UserError(f"{output} exists and is not overwritten. Choose another --output, or move it by --force.")
        if os.path.lexists(backup):
            raise UserError(f"{backup} exists, so {output} cannot be moved there. Move or remove the older backup.")
    originals = select(source, per_class)
    errors = Console(stderr=True)
    # into a file, even a bar that disappears would leave an empty line
    bar = {"console": errors, "transient": True, "disable": not errors.is_interactive}
    try:
        # beside the output, so that the last step is a rename within one file system
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as temporary:
            new = Path(temporary) / "new"  # the temporary folder itself can be read by its owner alone
            new.mkdir()
            rows = [write_photograph(each, new, side, quality) for each in track(originals, "Resizing", **bar)]
            attribution = ATTRIBUTION.format(number=len(rows), per_class=per_class, side=side, rows="\n".join(rows))
            (new / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
            total = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
            replaced = replace(new, output, backup)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}). Check that its folder exists and that you may write to it."
        ) from error
    message = (
        f"{output}: {len(rows)} photographs, shorter side {side} px, JPEG quality {quality}, {total:,} bytes in all"
    )
    return f"{message}; what was there is kept at {backup}" if replaced else message
