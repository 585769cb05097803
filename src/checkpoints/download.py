"""Published checkpoints, fetched and checked: `scripts/download_checkpoint_t2t_vit.py`."""

from __future__ import annotations

import http.client
import os
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from scatterbrain.errors import UserError, did_you_mean
from src.checkpoints import (
    PUBLISHED_CHECKPOINTS,
    PUBLISHED_URL,
    CheckpointContents,
    PublishedCheckpoint,
    convert_checkpoint_file,
    read_checkpoint,
)
from src.models.t2t_vit import T2T_VIT_VARIANTS
from src.utils.files import CHUNK_BYTES, sha256_of_file

SCHEMES = ("https", "http", "file")
TIMEOUT_SECONDS = 30


def find_published(name: str) -> PublishedCheckpoint:
    """The published file of that name.

    Raises:
        UserError: there is none; near names are suggested.
    """
    if name in PUBLISHED_CHECKPOINTS:
        return PUBLISHED_CHECKPOINTS[name]
    if name in T2T_VIT_VARIANTS:
        raise UserError(
            f"No checkpoint of {name} is published. Choose one of: {', '.join(sorted(PUBLISHED_CHECKPOINTS))}."
        )
    raise UserError(f"Unknown T2T-ViT checkpoint '{name}'. {did_you_mean(name, PUBLISHED_CHECKPOINTS)}")


def address_of(published: PublishedCheckpoint, base: str) -> str:
    """Address of a published file under `base`.

    Raises:
        UserError: the scheme of `base` is not one of `SCHEMES`.
    """
    scheme = urllib.parse.urlsplit(base).scheme.lower()
    if scheme not in SCHEMES:
        raise UserError(f"--url {base} is not an address of {', '.join(SCHEMES)}. Write it like {PUBLISHED_URL}")
    return f"{base.rstrip('/')}/{published.file_name}"


def check(path: Path, published: PublishedCheckpoint) -> CheckpointContents:
    """Contents of a file, after it is compared with what was published.

    Raises:
        UserError: it cannot be read, or is another checkpoint.
    """
    contents = read_checkpoint(path)
    expected = (published.num_classes, published.image_size)
    if published.variant not in contents.variants or (contents.num_classes, contents.image_size) != expected:
        raise UserError(
            f"{path} holds {contents.architecture}, {contents.num_classes} classes, {contents.image_size} px, but "
            f"{published.file_name} is {published.variant}, {published.num_classes} classes, {published.image_size} "
            "px. Check where it was downloaded from."
        )
    return contents


def fetch(address: str, target: Path) -> None:
    """Copy what is at `address` to the new file `target`, with a progress bar on stderr.

    Raises:
        UserError: the address cannot be read, or the connection ends early.
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    try:
        with (
            urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as response,
            open(target, "xb") as file,
            progress,
        ):
            length = response.headers.get("Content-Length")
            total = int(length) if length and length.isdigit() else None
            task = progress.add_task(target.name, total=total)
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                progress.advance(task, len(chunk))
            file.flush()
            os.fsync(file.fileno())
            received = file.tell()
    except urllib.error.HTTPError as error:
        raise UserError(f"{address}: the server answers {error.code} {error.reason}.") from error
    except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and resets are OSErrors
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(f"{address} cannot be fetched ({reason}).") from error
    if total is not None and received != total:
        raise UserError(f"{address}: the connection ended after {received:,} of {total:,} bytes.")


def download(published: PublishedCheckpoint, address: str, target: Path) -> CheckpointContents:
    """Contents of a published file, which has its name only once it is fetched and checked.

    Raises:
        UserError: it cannot be fetched, stored, or is not what it should be; nothing is left behind.
    """
    by_hand = f"Try again, name a mirror with --url, or fetch {address} by hand and put it at {target}."
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, so that the last step is a rename within one file system.
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-")
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be written to ({error.strerror}). Choose another folder with --output-dir."
        ) from error
    with folder:
        temporary = Path(folder.name) / target.name
        try:
            fetch(address, temporary)
        except UserError as error:
            raise UserError(f"{error} {by_hand}") from error
        try:
            contents = check(temporary, published)
        except UserError as error:
            # The user never sees the temporary file: what is wrong is what the address led to.
            raise UserError(f"{str(error).replace(str(temporary), address)} Nothing was kept. {by_hand}") from error
        os.replace(temporary, target)
    return contents


def download_published(name: str, output_dir: str, url: str = PUBLISHED_URL, convert: bool = False) -> str:
    """Fetch, check and, if `convert`, convert a published checkpoint; a message about it.

    Raises:
        UserError: see `download` and `convert_checkpoint_file`.
    """
    published = find_published(name)
    address = address_of(published, url)
    target = Path(output_dir).expanduser() / published.file_name
    if os.path.lexists(target):
        try:
            contents = check(target, published)
        except UserError as error:
            raise UserError(f"{error} It was there already and is kept: move it away and run this again.") from error
        message = f"{target}: there already and in order, nothing to do"
    else:
        contents = download(published, address, target)
        message = f"{target}: fetched from {address}"
    more = {}
    if convert:
        conversion = convert_checkpoint_file(target)
        if conversion.backup is not None:
            message += ", converted"
            more["original_kept_at"] = str(conversion.backup)
    return f"{message}\n{contents.summary(sha256=sha256_of_file(target), **more)}"
