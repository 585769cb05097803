"""Where a split is searched for, and where it is found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from scatterbrain.errors import UserError
from src.datamodules.formats.classes import DEFAULT_NUMBERING, ClassNumbering
from src.datamodules.formats.files import expand_braces
from src.utils.text import abbreviate

# Folders of Kaggle's archive that hold the splits.
KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
# Other names of a split in file names.
_ALIASES = {"val": ("val", "validation"), "validation": ("validation", "val")}


@dataclass(frozen=True)
class SplitLocation:
    """Where to search for a split.

    Args:
        data_dir: an existing folder.
        split: name of the split: a folder, file or pattern of files in `data_dir`.
        option: the option that names it, such as `test_split`.
        numbering: of its classes, see `class_index`.
    """

    data_dir: Path
    split: str
    option: str = "test_split"
    numbering: ClassNumbering = DEFAULT_NUMBERING

    @property
    def folders(self) -> list[Path]:
        """Folders named after the split: in `data_dir`, and in the folders of Kaggle's archive."""
        candidates = [self.data_dir / parent / self.split for parent in (".", *KAGGLE_FOLDERS)]
        # two names may be links to the same folder
        return list({folder.resolve(): folder for folder in reversed(candidates) if folder.is_dir()}.values())[::-1]

    @property
    def stems(self) -> tuple[str, ...]:
        """Prefixes that names of the split's files may have."""
        return _ALIASES.get(self.split, (self.split,))

    @property
    def named_files(self) -> list[Path]:
        """Files that `split` names itself, by a path, braces or a pattern, sorted.

        Raises:
            UserError: one of several named by braces is missing.
        """
        texts = expand_braces(self.split)
        if any(character in self.split for character in "*?["):
            paths = [path for text in texts for path in _glob(self.data_dir, text)]
        else:
            paths = [self.data_dir / text for text in texts]
            missing = [path.name for path in paths if not path.is_file()]
            if missing and len(paths) > 1:
                raise UserError(
                    f"{len(missing)} of the {len(paths)} files of datamodule.{self.option}={self.split} are missing in "
                    f"{self.data_dir}: {abbreviate(missing)}. Fetch them, or name those that are there."
                )
        return sorted({path for path in paths if path.is_file()})


@dataclass(frozen=True)
class FoundSplit:
    """A split that was found in some format.

    Args:
        format: name of the format.
        root: file or folder that holds the split.
        files: the split's files if there are several; all are in one folder.
    """

    format: str
    root: Path
    files: tuple[Path, ...] = ()

    def __str__(self) -> str:
        if len(self.files) > 1:
            return f"{self.format} ({self.files[0]} and {len(self.files) - 1} more)"
        return f"{self.format} ({self.files[0] if self.files else self.root})"


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return list(folder.glob(pattern))
    except (ValueError, NotImplementedError):  # "**" within a name, or an absolute pattern
        return []
