import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from src.datamodules.cache import CachedLoader, DecodedCache
from src.datamodules.cache import entry as entry_module
from src.datamodules.cache import lock as lock_module
from src.datamodules.cache import reading as reading_module
from src.datamodules.cache import writer as writer_module
from src.datamodules.cache.writer import CHECKSUMS_FILE, ENTRY_FILE, IMAGES_FILE
from src.datamodules.dataset import ImageDataset
from tests.src.datamodules.format_files import WRITERS
from tests.src.datamodules.setup import datamodule, message_of, write_images

NAMES = [f"{'ab'[number % 2]}/{number:02}.png" for number in range(10)]
FORK = multiprocessing.get_context("fork")  # the processes of a test need not import torch again
SECONDS = 30  # more than any process here takes


@pytest.fixture
def data_dir(tmp_path):
    write_images(tmp_path / "data" / "val", *NAMES)
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def one_image_at_a_time(monkeypatch):
    """Every image counts as soon as it is written."""
    monkeypatch.setattr(entry_module, "BATCH_SIZE", 1)
    monkeypatch.setattr(writer_module, "FLUSH_BYTES", 1)
    for module_with_polling in (entry_module, lock_module):
        monkeypatch.setattr(module_with_polling, "POLL_SECONDS", 0.01)


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """Positions that were decoded, by any process, in order; `decoded.slowly` lets each take a while."""
    path = tmp_path / "decoded"
    decode = ImageDataset.decode
    control = SimpleNamespace(seconds=0.0, before=lambda number: None)

    def decode_and_tell(self, index):
        with open(path, "a") as file:
            file.write(f"{self.paths[index]}\n")
        names = path.read_text().splitlines()
        time.sleep(control.seconds)
        control.before(len(names))
        return decode(self, index)

    monkeypatch.setattr(ImageDataset, "decode", decode_and_tell)
    control.names = lambda: path.read_text().splitlines() if path.exists() else []
    control.forget = lambda: path.unlink(missing_ok=True)
    return control


def module(data_dir, **options):
    return datamodule(data_dir, **{"num_classes": 2, **options})


def cached(data_dir, **options):
    return module(data_dir, **{"cache_dir": data_dir.parent / "cache", **options})


def entry(data_dir):
    """The only folder of the cache."""
    (folder,) = (data_dir.parent / "cache").iterdir()
    return folder


def batches(datamodule):
    return list(datamodule.test_dataloader())


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other) is list
        for tensor, expected in zip(one, other, strict=True):
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected)


def alter(path, position):
    """Change one byte and nothing else."""
    state = path.stat()
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def in_process(function, *arguments):
    """Start `function(*arguments)`; the batches it returns or the message of its `UserError` come through a queue."""
    queue = FORK.SimpleQueue()

    def work():
        try:
            # arrays: torch would share its tensors with a process that has ended by then
            queue.put([[tensor.numpy() for tensor in batch] for batch in function(*arguments)])
        except ValueError as error:
            queue.put(str(error))

    process = FORK.Process(target=work)
    process.start()
    return process, queue


def finish(process, queue):
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, "a process hung or failed"
    found = queue.get()
    return found if isinstance(found, str) else [[torch.from_numpy(array) for array in batch] for batch in found]


# ---- the same images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", WRITERS, ids=lambda writer: writer.__name__)
def test_every_format_is_cached_bit_for_bit(write, tmp_path, decoded):
    if write.__name__ == "parquet":
        pytest.importorskip("pyarrow")
    write(tmp_path / "data", "val")
    options = {"num_classes": 1000, "batch_size": 3}
    expected = batches(module(tmp_path / "data", **options))
    assert_same(batches(cached(tmp_path / "data", **options)), expected)
    decoded.forget()
    assert_same(batches(cached(tmp_path / "data", **options)), expected)
    assert not decoded.names()


@pytest.mark.parametrize("workers", [0, 2])
def test_photographs_by_any_number_of_workers(flowers, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(entry_module, "BATCH_SIZE", 5)
    options = {"num_classes": 5, "image_size": 224, "batch_size": 5, "num_workers": workers}
    expected = batches(datamodule(flowers, **options))
    assert_same(batches(datamodule(flowers, cache_dir=tmp_path, **options)), expected)


def test_home_is_expanded_and_the_entry_describes_its_content(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    batches(cached(data_dir, cache_dir="~/cache"))
    content = json.loads((entry(data_dir) / ENTRY_FILE).read_text())
    assert content["shape"] == [10, 3, 16, 16]
    assert content["pixels"]["interpolation"] == "bicubic"
    assert content["pixels"]["versions"]["timm"]
    assert content["source"]["path"] == str(data_dir / "val")
    assert {path.name for path in entry(data_dir).iterdir()} == {ENTRY_FILE, IMAGES_FILE, CHECKSUMS_FILE}
    report = capsys.readouterr()
    assert "10 images" in report.err
    assert "0.1 MiB in" in " ".join(report.err.split())
    assert not report.out


def test_lightning_normalises_the_same(data_dir):
    class Recorder(pl.LightningModule):
        def test_step(self, batch, batch_idx):
            seen.append(batch)

    records = []
    for each in (module(data_dir), cached(data_dir)):
        seen = []
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        pl.Trainer(accelerator="cpu", use_distributed_sampler=False, enable_model_summary=False, **options).test(
            Recorder(), datamodule=each, verbose=False
        )
        records.append(seen)
    assert_same(*records)
    assert records[0][0][0].dtype == torch.float32


def test_a_part_of_a_pass_and_single_images(data_dir):
    expected = batches(module(data_dir))
    loader = cached(data_dir).test_dataloader()
    assert isinstance(loader, CachedLoader)
    loader.batch_sampler.sampler = list(loader.batch_sampler.sampler)[4:]  # as a resumed evaluation does
    assert_same(list(loader), expected[2:])
    image, target, index = loader.dataset[3]
    assert torch.equal(image, expected[1][0][1])
    assert (target, index) == (int(expected[1][1][1]), 3)


def test_validation_is_cached_and_training_is_not(tmp_path, decoded):
    write_images(tmp_path / "data", *[f"train/{name}" for name in NAMES], *[f"val/{name}" for name in NAMES])
    both = cached(tmp_path / "data", augmentation={"mixup_prob": 0.0})
    batches(both)
    decoded.forget()
    assert len(list(both.val_dataloader())) == 5
    assert not decoded.names()
    for _ in range(2):
        decoded.forget()
        assert len(list(both.train_dataloader())) == 5
        assert len(decoded.names()) == 10


def test_held_out_images_are_an_entry_of_their_own(tmp_path):
    write_images(tmp_path / "data", *[f"train/{name}" for name in NAMES])
    plain, ours = (each(tmp_path / "data", holdout=0.4) for each in (module, cached))
    assert_same(list(ours.val_dataloader()), list(plain.val_dataloader()))
    assert np.memmap(entry(tmp_path / "data") / IMAGES_FILE).size == 4 * 3 * 16 * 16


# ---- another source or other options ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"image_size": 24}, {"crop_pct": 0.8}, {"interpolation": "bilinear"}, {"pillow": "0"}], ids=str
)
def test_another_option_is_another_entry(data_dir, options, monkeypatch):
    batches(cached(data_dir))
    first = {path: path.read_bytes() for path in entry(data_dir).iterdir()}
    if options.pop("pillow", None):
        monkeypatch.setattr("PIL.__version__", "0")
    assert_same(batches(cached(data_dir, **options)), batches(module(data_dir, **options)))
    assert len(list((data_dir.parent / "cache").iterdir())) == 2
    assert {path: path.read_bytes() for path in first} == first


def test_what_pixels_do_not_depend_on_is_not_in_the_key(data_dir, decoded):
    batches(cached(data_dir))
    decoded.forget()
    others = {"batch_size": 3, "mean": (0.1, 0.2, 0.3), "seed": 5, "pin_memory": False, "num_workers": 1}
    batches(cached(data_dir, **others))
    assert not decoded.names()
    entry(data_dir)


def _touch(path):
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


@pytest.mark.parametrize("change", [_touch, lambda path: path.rename(path.with_stem(f"{path.stem}x")), os.remove])
def test_a_changed_file_is_another_entry(data_dir, change, decoded):
    batches(cached(data_dir))
    first = entry(data_dir)
    change(data_dir / "val" / NAMES[4])
    expected = batches(module(data_dir))
    decoded.forget()
    assert_same(batches(cached(data_dir)), expected)
    assert len(decoded.names()) == len(list((data_dir / "val").glob("*/*")))
    assert first.is_dir()


@pytest.mark.parametrize("writer", ["original_tar", "parquet"])
def test_a_changed_archive_is_another_entry(tmp_path, writer, decoded):
    if writer == "parquet":
        pytest.importorskip("pyarrow")
    write = next(each for each in WRITERS if each.__name__ == writer)
    write(tmp_path / "data", "val")
    batches(cached(tmp_path / "data", num_classes=1000))
    _touch(next(path for path in sorted((tmp_path / "data").rglob("*.*")) if path.suffix in (".tar", ".parquet")))
    decoded.forget()
    batches(cached(tmp_path / "data", num_classes=1000))
    assert len(decoded.names()) == 8


def test_moved_images_are_the_same(data_dir, decoded):
    batches(cached(data_dir))
    data_dir = data_dir.rename(data_dir.with_name("elsewhere"))
    decoded.forget()
    batches(cached(data_dir))
    assert not decoded.names()


# ---- interruptions and other processes --------------------------------------------------------------------


def test_a_killed_process_is_gone_on_with(data_dir, decoded):
    decoded.before = lambda number: number < 6 or os.kill(os.getpid(), signal.SIGKILL)
    process, _ = in_process(batches, cached(data_dir))
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL
    unfinished = next((data_dir.parent / "cache").glob("*.unfinished"))
    assert (unfinished / CHECKSUMS_FILE).stat().st_size == 5 * 4
    # the beginning of an image, and of a checksum, as a crash of the machine may leave them
    for name in (IMAGES_FILE, CHECKSUMS_FILE):
        with open(unfinished / name, "ab") as file:
            file.write(b"xyz")
    decoded.before = lambda number: None
    decoded.forget()
    ours = batches(cached(data_dir))
    assert decoded.names() == sorted(NAMES)[5:]
    assert_same(ours, batches(module(data_dir)))
    entry(data_dir)


def test_images_that_did_not_reach_the_disk_are_decoded_again(data_dir, decoded):
    batches(cached(data_dir))
    unfinished = entry(data_dir).rename(entry(data_dir).with_suffix(".unfinished"))
    alter(unfinished / IMAGES_FILE, 7 * 3 * 16 * 16)
    decoded.forget()
    assert_same(batches(cached(data_dir)), batches(module(data_dir)))
    assert decoded.names()[:3] == sorted(NAMES)[7:]


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["ctrl-c", "sigterm"]
)
def test_a_signal_stops_at_once_whatever_its_handler_is(data_dir, decoded, number, kind):
    def handler(*_):
        """As an evaluation that finishes its batch first."""

    before = signal.signal(number, handler)
    decoded.before = lambda seen: seen == 4 and signal.raise_signal(number)
    try:
        with pytest.raises(kind):
            batches(cached(data_dir))
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    decoded.before = lambda seen: None
    decoded.forget()
    batches(cached(data_dir))
    assert decoded.names() == sorted(NAMES)[3:]


def test_two_at_once_decode_once(data_dir, decoded, capfd):
    decoded.seconds = 0.05
    runs = [in_process(batches, cached(data_dir)) for _ in range(2)]
    expected = None
    for run in runs:
        found = finish(*run)
        expected = expected or found
        assert_same(found, expected)
    assert decoded.names() == sorted(NAMES)
    assert capfd.readouterr().err.count("Waiting for process") == 1
    entry(data_dir)


def test_one_that_waits_takes_over_from_one_that_is_killed(data_dir, decoded):
    decoded.before = lambda number: number != 3 or os.kill(os.getpid(), signal.SIGKILL)
    decoded.seconds = 0.05
    runs = [in_process(batches, cached(data_dir)) for _ in range(2)]
    for process, _ in runs:
        process.join(SECONDS)
    assert sorted(process.exitcode for process, _ in runs) == [-signal.SIGKILL, 0]
    assert sorted(decoded.names()) == sorted([*NAMES, sorted(NAMES)[2]])
    entry(data_dir)


def test_a_lock_that_was_left_behind_is_none(data_dir):
    batches(cached(data_dir))
    folder = entry(data_dir)
    folder.with_suffix(".lock").write_text("process 1 on a machine that is no more")
    shutil.rmtree(folder)
    batches(cached(data_dir))
    entry(data_dir)


def rank_of_two(data_dir, rank):
    each = cached(data_dir)
    each.trainer = SimpleNamespace(global_rank=rank, world_size=2, local_rank=rank, training=False)
    return batches(each)


def test_the_first_process_of_a_machine_decodes(data_dir, decoded, capfd):
    decoded.seconds = 0.02
    decoded.before = lambda number: os.environ.get("RANK") == "0" or os.abort()

    def run(rank):
        os.environ["RANK"] = str(rank)
        time.sleep(0.3 * (1 - rank))
        return rank_of_two(data_dir, rank)

    runs = [in_process(run, rank) for rank in (1, 0)]
    found = [batch for one in runs for batch in finish(*one)]
    assert sorted(int(index) for batch in found for index in batch[2]) == list(range(10))
    assert decoded.names() == sorted(NAMES)
    assert "Waiting" not in capfd.readouterr().err  # that is what is to be expected


def test_a_damaged_image_ends_all_processes_with_its_name(data_dir, monkeypatch):
    monkeypatch.setattr(entry_module, "_FIRST_SECONDS", 0.5)
    (data_dir / "val" / "a" / "04.png").write_bytes(b"not an image")
    expected = message_of(batches, module(data_dir))
    runs = [in_process(rank_of_two, data_dir, rank) for rank in range(2)]
    assert [finish(*run) for run in runs] == [expected, expected]


# ---- what can be wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_reported_as_without_a_cache(data_dir, decoded, workers):
    path = data_dir / "val" / sorted(NAMES)[4]
    intact, state = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(intact)))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert message_of(batches, cached(data_dir, num_workers=workers)) == message_of(batches, module(data_dir))
    assert entry(data_dir).suffix == ".unfinished"
    path.write_bytes(intact)  # as if it could not be read for a while
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    decoded.forget()
    batches(cached(data_dir))
    assert decoded.names() == sorted(NAMES)[4:]
    assert not entry(data_dir).suffix


def test_an_error_keeps_what_was_not_flushed_yet(data_dir, monkeypatch):
    monkeypatch.setattr(writer_module, "FLUSH_BYTES", 1 << 20)
    (data_dir / "val" / sorted(NAMES)[4]).write_bytes(b"")
    assert "the file is empty" in message_of(batches, cached(data_dir))
    assert (entry(data_dir) / CHECKSUMS_FILE).stat().st_size == 4 * 4


def test_a_missing_image_is_reported_as_without_a_cache(data_dir):
    (data_dir / "val" / "a" / "00.png").unlink()
    (data_dir / "val" / "a" / "00.png").symlink_to("nowhere")
    assert message_of(batches, cached(data_dir)) == message_of(batches, module(data_dir))
    assert not list((data_dir.parent / "cache").iterdir())


def test_checksums_follow_images_that_are_on_the_disk(tmp_path, monkeypatch):
    events = []
    write, fsync = writer_module._write, os.fsync
    with open(tmp_path / "images", "wb", 0) as images, open(tmp_path / "checksums", "wb", 0) as checksums:
        names = {file.fileno(): name for file, name in ((images, "images"), (checksums, "checksums"))}

        def tell_write(file, content):
            events.append(f"write {names[file.fileno()]}")
            write(file, content)

        def tell_fsync(descriptor):
            events.append(f"flush {names[descriptor]}")
            fsync(descriptor)

        monkeypatch.setattr(writer_module, "_write", tell_write)
        monkeypatch.setattr(os, "fsync", tell_fsync)
        writer_module.Writer(images, checksums, 48, 0).add(np.zeros((2, 3, 4, 4), np.uint8))
    assert events == ["write images", "flush images", "write checksums", "flush checksums"]


@pytest.mark.parametrize("full", ["images", "checksums", "flush"])
def test_a_disk_that_fills_up(data_dir, decoded, monkeypatch, full):
    write, fsync = writer_module._write, os.fsync
    calls = []

    def full_write(file, content):
        if content.dtype == (np.uint8 if full == "images" else "<u4") and full != "flush":
            calls.append(file)
            if len(calls) > 3:
                file.write(memoryview(np.ascontiguousarray(content)).cast("B")[:3])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, content)

    def full_fsync(descriptor):
        if full == "flush":
            calls.append(descriptor)
            if len(calls) > 7:  # one of entry.json, two for each image
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "_write", full_write)
        patch.setattr(os, "fsync", full_fsync)
        message = message_of(batches, cached(data_dir))
    assert f"datamodule.cache_dir={data_dir.parent / 'cache'} is full" in message
    assert "take 0.0 MiB" in message
    assert str(entry(data_dir)) in message
    assert "another disk" in message
    assert (entry(data_dir) / IMAGES_FILE).stat().st_size == 3 * 3 * 16 * 16
    assert (entry(data_dir) / CHECKSUMS_FILE).stat().st_size == 3 * 4
    decoded.forget()
    assert_same(batches(cached(data_dir)), batches(module(data_dir)))
    assert decoded.names()[:7] == sorted(NAMES)[3:]


def test_a_disk_that_is_too_small_is_reported_first(data_dir, decoded, monkeypatch):
    usage = SimpleNamespace(total=10**6, used=10**6 - 2000, free=2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = message_of(batches, cached(data_dir))
    assert "has 0.0 MiB free" in message
    assert not decoded.names()
    assert not list((data_dir.parent / "cache").iterdir())


@pytest.mark.parametrize("file", [IMAGES_FILE, CHECKSUMS_FILE])
@pytest.mark.parametrize("damage", ["truncated", "missing", "altered"])
def test_a_damaged_entry_names_the_folder_to_delete(data_dir, file, damage):
    batches(cached(data_dir))
    path = entry(data_dir) / file
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "missing":
        path.unlink()
    else:
        alter(path, path.stat().st_size // 2)
    message = message_of(batches, cached(data_dir))
    assert f"Delete the folder {path.parent}:" in message
    if damage == "altered":
        assert sorted(NAMES)[5] in message
    shutil.rmtree(path.parent)
    assert_same(batches(cached(data_dir)), batches(module(data_dir)))


# ---- threads -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    """Several parts in a batch, the last one smaller, and read in no particular order."""
    monkeypatch.setattr(reading_module, "PART_SIZE", 2)
    read = reading_module.CachedImages.read

    def read_late(self, positions, images):
        time.sleep(0.01 * (positions[0] % 3))
        return read(self, positions, images)

    monkeypatch.setattr(reading_module.CachedImages, "read", read_late)


def reading_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("cache")]


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_threads_keep_the_order(data_dir, small_parts, batch_size):
    expected = batches(module(data_dir, batch_size=batch_size))
    loader = cached(data_dir, batch_size=batch_size, num_workers=3).test_dataloader()
    for _ in range(2):
        assert_same(list(loader), expected)
    assert not reading_threads()


def test_threads_end_with_a_pass_that_is_left(data_dir, small_parts):
    passing = iter(cached(data_dir, batch_size=3, num_workers=3).test_dataloader())
    next(passing)
    assert reading_threads()
    passing.close()
    assert not reading_threads()


def test_an_error_of_a_thread_is_that_of_its_batch(data_dir, small_parts):
    batches(cached(data_dir))
    alter(entry(data_dir) / IMAGES_FILE, 7 * 3 * 16 * 16)
    passing = iter(cached(data_dir, batch_size=3, num_workers=3).test_dataloader())
    expected = batches(module(data_dir, batch_size=3))
    assert_same([next(passing), next(passing)], expected[:2])
    assert f"is damaged at {sorted(NAMES)[7]}." in message_of(lambda: next(passing))
    assert not reading_threads()


def test_each_image_is_checked_once(data_dir, monkeypatch):
    loader = cached(data_dir).test_dataloader()
    checked = []
    monkeypatch.setattr(
        reading_module, "zlib", SimpleNamespace(crc32=lambda image: checked.append(image) or zlib_crc32(image))
    )
    list(loader)
    list(loader)
    assert len(checked) == 10


zlib_crc32 = reading_module.zlib.crc32


@pytest.mark.parametrize("value", ["", 3, True])
def test_a_cache_that_is_no_folder(data_dir, value):
    assert f"datamodule.cache_dir={value!r}" in message_of(module, data_dir, cache_dir=value)


def test_a_folder_that_cannot_be_made(data_dir):
    (data_dir.parent / "cache").write_text("a file")
    message = message_of(batches, cached(data_dir))
    assert f"datamodule.cache_dir={data_dir.parent / 'cache'} cannot be used" in message


def test_a_file_system_without_locks(data_dir, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert "cannot be used" in message_of(batches, cached(data_dir))


def test_a_thread_may_make_an_entry(data_dir):
    found = []
    thread = threading.Thread(target=lambda: found.extend(batches(cached(data_dir))))
    thread.start()
    thread.join(SECONDS)
    assert_same(found, batches(module(data_dir)))


def test_transforms_other_than_bytes_are_a_mistake(data_dir):
    plain = module(data_dir)
    plain.setup("test")
    with pytest.raises(TypeError, match="uint8"):
        DecodedCache(data_dir.parent / "cache", plain.test_dataset, 16).make()
    plain.test_dataset.transform = lambda image: np.array(image.resize((8, 8), Image.Resampling.BOX)).T
    with pytest.raises(TypeError, match="16"):
        DecodedCache(data_dir.parent / "cache", plain.test_dataset, 16).make()
