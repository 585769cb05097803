"""The format that a split is in, recognised from the names of files; and its images."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from scatterbrain.errors import UserError, did_you_mean
from src.datamodules.formats import class_folders, csv_file, flat, parquet, tar, webdataset
from src.datamodules.formats.class_folders import ClassFolders
from src.datamodules.formats.classes import DEFAULT_NUMBERING, ClassNumbering, imagenet_synsets
from src.datamodules.formats.files import files_matching, pattern, scan_folder, unpack_command
from src.datamodules.formats.listing import Listing
from src.datamodules.formats.location import FoundSplit, SplitLocation
from src.datamodules.formats.unlabelled import is_image, list_unlabelled
from src.utils.text import abbreviate

logger = logging.getLogger(__name__)

FORMAT_MODULES: dict[str, ModuleType] = {
    module.FORMAT: module for module in (class_folders, flat, tar, webdataset, parquet, csv_file)
}
FORMATS = ("auto", *FORMAT_MODULES)


def check_format(format: str) -> None:
    """Check the name of a format.

    Raises:
        UserError: it is not one of `FORMATS`.
    """
    if format not in FORMATS:
        raise UserError(f"datamodule.format={format!r} is not valid. {did_you_mean(format, FORMATS)}")


def find_formats(location: SplitLocation, format: str = "auto") -> list[FoundSplit]:
    """The split in each format that it is found in, judged by names of files alone.

    Args:
        location: where to search.
        format: the only format to search for, or `"auto"` for all.
    """
    return [
        found for name, module in FORMAT_MODULES.items() if format in ("auto", name) for found in module.find(location)
    ]


def open_split(location: SplitLocation, num_classes: int = 1000, format: str = "auto") -> Listing | None:
    """The images of a split.

    Args:
        location: where it is.
        num_classes: outputs of the model.
        format: its format; `"auto"` takes the one that is found, and prefers class folders to other formats.

    Returns:
        The listing, or None if no format is recognised.

    Raises:
        UserError: the split is found more than once, or see `list_images` of its format.
    """
    found = find_formats(location, format)
    unpacked = [split for split in found if split.format == class_folders.FORMAT]
    others = [split for split in found if split.format != class_folders.FORMAT]
    if len(unpacked) == 1 and others and all(split.root != unpacked[0].root for split in others):
        # the archives that class folders were extracted from are often kept beside them
        logger.warning(
            "%s: using %s and ignoring %s. Set datamodule.format to use those.",
            location.data_dir,
            unpacked[0],
            "; ".join(map(str, others)),
        )
        found = unpacked
    if len(found) > 1:
        formats = list(dict.fromkeys(split.format for split in found))
        if len(formats) > 1:
            remedy = f"Choose one: {' or '.join(f'datamodule.format={name}' for name in formats)}."
        else:
            remedy = (
                f"Name one by datamodule.{location.option}, such as datamodule.{location.option}="
                f"'{_relative(found[0], location.data_dir)}'."
            )
        raise UserError(
            f"{location.data_dir} holds the split '{location.split}' {len(found)} times: "
            f"{'; '.join(map(str, found))}. {remedy}"
        )
    if found:
        return FORMAT_MODULES[found[0].format].list_images(found[0], location, num_classes)
    if format in ("auto", "flat"):
        # ImageNet's images without labels: the format is known, and the error says that labels are missing
        unlabelled = flat.find(location, need_labels=False)
        if unlabelled:
            return flat.list_images(unlabelled[0], location, num_classes)
    return None


def open_listing(
    data_dir: str | os.PathLike[str] | None,
    split: str,
    option: str,
    num_classes: int = 1000,
    format: str = "auto",
    numbering: ClassNumbering = DEFAULT_NUMBERING,
) -> Listing:
    """The images of a split, or an error that says what was found instead.

    Args:
        data_dir: folder that holds the splits; `~` is expanded. None if the user did not give it.
        split: a folder, file or pattern of files in `data_dir`.
        option: name of the option that `split` comes from, for messages.
        num_classes: outputs of the model.
        format: see `open_split`.
        numbering: of the classes, see `class_index`.

    Raises:
        UserError: `data_dir` is missing, it does not hold the split, or see `open_split`.
    """
    location = SplitLocation(_check_data_dir(data_dir, split), split, option, numbering)
    if not numbering.labelled:
        return _list_without_labels(location, format)
    found = open_split(location, num_classes, format)
    if found is not None:
        return found
    _refuse_compressed(location)
    if format not in ("auto", class_folders.FORMAT):
        raise UserError(
            f"No split '{split}' in the format {format}. {_describe_search(location, format)} Choose another format by "
            f"datamodule.format, or name the files by datamodule.{option}=..."
        )
    folder = _split_folder(location, format)
    try:
        return ClassFolders(folder, num_classes, numbering)
    except UserError as error:
        if format != "auto":
            raise
        raise UserError(f"{error} {_describe_search(location)}") from None


def _list_without_labels(location: SplitLocation, format: str) -> Listing:
    if format not in ("auto", class_folders.FORMAT, flat.FORMAT):
        raise UserError(
            f"datamodule.labels=none reads image files in a folder, but datamodule.format={format}. Leave one of them "
            "out."
        )
    return list_unlabelled(location.folders[0] if location.folders else _split_folder(location, format))


def _refuse_compressed(location: SplitLocation) -> None:
    """Raise a `UserError` if the split is there as a compressed archive, whose images cannot be read in any order."""
    stems = {f"{start}{stem}" for stem in location.stems for start in ("", "ILSVRC2012_img_")}
    archives = location.named_files + files_matching(
        dict.fromkeys([location.data_dir, *location.folders]), lambda name: name.split(".")[0] in stems
    )
    for path in archives:
        if command := unpack_command(path, location.data_dir):
            folder = location.data_dir / path.name.split(".")[0]
            raise UserError(
                f"{path} is a compressed archive, from which images cannot be read in any order. Unpack it, so that "
                f"{folder} holds the class folders, and give datamodule.{location.option}={folder.name}: {command}"
            )


def _check_data_dir(data_dir: str | os.PathLike[str] | None, split: str) -> Path:
    # "???" is OmegaConf's mark of a missing value
    if data_dir is None or str(data_dir) in ("", "???"):
        raise UserError(
            f"No data folder given. Give datamodule.data_dir=/path, the folder that holds '{split}', "
            "or set DATA_DIR=/path in the file .env."
        )
    data_dir = Path(data_dir).expanduser().absolute()
    if not data_dir.is_dir():
        problem = "is a file, not a folder" if data_dir.exists() else "does not exist"
        if data_dir.is_file() and (command := unpack_command(data_dir, data_dir.parent)):
            raise UserError(
                f"The data folder {data_dir} is a compressed archive. Unpack it, and give datamodule.data_dir the "
                f"folder that holds '{split}': {command}"
            )
        raise UserError(
            f"The data folder {data_dir} {problem}. Give datamodule.data_dir (or DATA_DIR in the file .env) "
            f"the folder that holds '{split}'."
        )
    return data_dir


def _split_folder(location: SplitLocation, format: str) -> Path:
    """The folder that a split names."""
    data_dir, split, option = location.data_dir, location.split, location.option
    split_folder = data_dir / split
    if split_folder.is_dir():
        return split_folder

    folders, files = scan_folder(data_dir)
    if any(map(is_image, files)):
        raise UserError(
            f"No folder '{split}' in {data_dir}, which holds images itself. To evaluate them without labels, give "
            f"datamodule.data_dir={data_dir.parent} datamodule.{option}={data_dir.name} datamodule.labels=none"
        )
    if _looks_like_split(data_dir, folders):
        name = "" if data_dir.name == split else f" datamodule.{option}={data_dir.name}"
        raise UserError(
            f"No folder '{split}' in {data_dir}, which looks like a split itself (class folders "
            f"{abbreviate(folders)}). Give its parent: datamodule.data_dir={data_dir.parent}{name}"
        )
    raise UserError(
        f"No folder '{split}' in {data_dir}; the folders there: {abbreviate(folders, 10) or 'none'}. "
        f"Give datamodule.data_dir the folder that holds '{split}', or name another "
        f"split with datamodule.{option}=..." + ("" if format != "auto" else f" {_describe_search(location)}")
    )


def _looks_like_split(folder: Path, subfolders: Sequence[str]) -> bool:
    """Whether `folder` holds class folders: synsets by name, or at least two folders that all hold files."""
    if any(name in imagenet_synsets() for name in subfolders):
        return True
    # five folders are enough; a wrong data_dir may hold very many
    return len(subfolders) > 1 and all(scan_folder(folder / name)[1] for name in subfolders[:5])


def _describe_search(location: SplitLocation, format: str = "auto") -> str:
    """Two sentences for a message: the names searched for, and those found in the data folder."""
    patterns = [module.SEARCHED_NAMES for name, module in FORMAT_MODULES.items() if format in ("auto", name)]
    split = location.split if len(location.stems) == 1 else f"{{{','.join(location.stems)}}}"
    names = "; ".join(text.replace("{split}", split).replace("{folder}", location.split) for text in patterns)
    folders, files = scan_folder(location.data_dir)
    present = abbreviate([f"{name}/" for name in folders] + files, 10) or "nothing"
    return f"Looked for: {names}. Found in {location.data_dir}: {present}."


def _relative(found: FoundSplit, data_dir: Path) -> str:
    path = found.files[0] if found.files else found.root
    relative = path.relative_to(data_dir) if path.is_relative_to(data_dir) else path
    return relative.with_name(pattern(found.files)).as_posix() if len(found.files) > 1 else relative.as_posix()
