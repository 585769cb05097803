"""A cache of decoded images: the images of a split after resize and crop, decoded once for all evaluations.

    cache_dir/
      <key>/              a complete entry, renamed to this from <key>.unfinished as the last step
        entry.json        description, for people
        images.uint8      (N, 3, size, size), read through a memory map
        checksums.uint32  (N,), CRC-32 of each image
      <key>.unfinished/   the same while it is written
      <key>.lock          held by the process that writes it

The key is a hash of the images' names, of the sizes and modification times of their files, and of everything that their
pixels depend on. If one of them changes, a new entry is written; entries of other keys are never deleted. A change that
keeps size and modification time of a file is not detected.

An interrupted entry is resumed: images are flushed to the disk in order, and their checksums after them, so the number
of valid checksums is the number of complete images. Each image is checked when a run first reads it; an altered image
is an error and not silently replaced, since the disk is at fault.

If images that cannot be decoded are skipped, the entry stores zeros for each and a checksum that zeros do not have. A
run that reads such a missing image tries to decode it again: it gets the repaired image, or the original error.
"""

from src.datamodules.cache.entry import DecodedCache
from src.datamodules.cache.reading import CachedImages, CachedLoader

__all__ = ["CachedImages", "CachedLoader", "DecodedCache"]
