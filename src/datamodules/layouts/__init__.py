"""The layouts that ImageNet comes in: where a split is found, and a listing of its images.

A module per layout has `find(place)`, which looks at names alone, and `open_layout(found, place, num_classes)`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType

from scatterbrain.errors import UserError, did_you_mean
from src.datamodules.layouts import class_folders, csv_file, flat, parquet, tar, webdataset
from src.datamodules.layouts.base import Found, Listing, Place, listing, pattern, scan_folder

logger = logging.getLogger(__name__)

LAYOUTS: dict[str, ModuleType] = {
    module.FORMAT: module for module in (class_folders, flat, tar, webdataset, parquet, csv_file)
}
FORMATS = ("auto", *LAYOUTS)

__all__ = ["FORMATS", "LAYOUTS", "Found", "Listing", "Place", "check_format", "find_layouts", "open_split"]


def check_format(format: str) -> None:
    """Refuse the name of a layout that does not exist.

    Raises:
        UserError: it is none of `FORMATS`.
    """
    if format not in FORMATS:
        raise UserError(f"datamodule.format={format!r} is not valid. {did_you_mean(format, FORMATS)}")


def find_layouts(place: Place, format: str = "auto") -> list[Found]:
    """Every layout in which the split is there, judged by names.

    Args:
        place: where to look.
        format: the only layout to look for, or `"auto"`.
    """
    return [found for name, module in LAYOUTS.items() if format in ("auto", name) for found in module.find(place)]


def open_split(place: Place, num_classes: int = 1000, format: str = "auto") -> Listing | None:
    """The images of a split.

    Args:
        place: where it is.
        num_classes: outputs of the model.
        format: its layout; `"auto"` takes the one that is there, and class folders where there are others too.

    Returns:
        The listing, or None where no layout is recognised, not even that of class folders.

    Raises:
        UserError: the split is there twice, neither of them in class folders, or as its layout tells.
    """
    found = find_layouts(place, format)
    unpacked = [one for one in found if one.format == class_folders.FORMAT]
    others = [one for one in found if one.format != class_folders.FORMAT]
    if len(unpacked) == 1 and others and all(one.root != unpacked[0].root for one in others):
        # what the folders were unpacked from often stays beside them
        logger.warning(
            "%s: taking %s. Left out: %s. Another datamodule.format takes those.",
            place.data_dir,
            unpacked[0],
            "; ".join(map(str, others)),
        )
        found = unpacked
    if len(found) > 1:
        formats = list(dict.fromkeys(one.format for one in found))
        if len(formats) > 1:
            remedy = f"Choose one: {' or '.join(f'datamodule.format={name}' for name in formats)}."
        else:
            remedy = (
                f"Name one by datamodule.{place.option}, such as datamodule.{place.option}="
                f"'{_relative(found[0], place.data_dir)}'."
            )
        raise UserError(
            f"{place.data_dir} holds the split '{place.split}' {len(found)} times: {'; '.join(map(str, found))}. "
            f"{remedy}"
        )
    if found:
        return LAYOUTS[found[0].format].open_layout(found[0], place, num_classes)
    if format in ("auto", "flat"):
        # images without labels: their layout is clear, and what is missing too
        unlabelled = flat.find(place, need_labels=False)
        if unlabelled:
            return flat.open_layout(unlabelled[0], place, num_classes)
    return None


def searched(place: Place, format: str = "auto") -> str:
    """What was looked for and what is there, for a message: two sentences."""
    wanted = [module.LOOKED_FOR for name, module in LAYOUTS.items() if format in ("auto", name)]
    split = place.split if len(place.stems) == 1 else f"{{{','.join(place.stems)}}}"
    looked = "; ".join(text.replace("{split}", split).replace("{folder}", place.split) for text in wanted)
    folders, files = scan_folder(place.data_dir)
    there = listing([f"{name}/" for name in folders] + files, 10) or "nothing"
    return f"Looked for: {looked}. Found in {place.data_dir}: {there}."


def _relative(found: Found, data_dir: Path) -> str:
    path = found.files[0] if found.files else found.root
    text = path.relative_to(data_dir) if path.is_relative_to(data_dir) else path
    return text.with_name(pattern(found.files)).as_posix() if len(found.files) > 1 else text.as_posix()
