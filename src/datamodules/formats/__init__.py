"""The formats that ImageNet is distributed in: where a split is found, and a listing of its images.

One module per format, with `find(location)`, which looks at names of files only, and
`list_images(found, location, num_classes)`.
"""

from src.datamodules.formats.classes import ClassNumbering, class_index, imagenet_synsets
from src.datamodules.formats.files import scan_folder
from src.datamodules.formats.listing import ImageSource, Listing
from src.datamodules.formats.location import FoundSplit, SplitLocation
from src.datamodules.formats.recognition import FORMATS, check_format, find_formats, open_listing, open_split

__all__ = [
    "FORMATS",
    "ClassNumbering",
    "FoundSplit",
    "ImageSource",
    "Listing",
    "SplitLocation",
    "check_format",
    "class_index",
    "find_formats",
    "imagenet_synsets",
    "open_listing",
    "open_split",
    "scan_folder",
]
