import hashlib
import os
import stat

import pytest

from scatterbrain.errors import UserError
from src.utils import files
from src.utils.files import atomic_write, sha256_of_file


def test_text_and_bytes_arrive(tmp_path):
    with atomic_write(tmp_path / "text") as file:
        file.write("Ré ≤ 1\n")
    with atomic_write(str(tmp_path / "bytes"), "wb") as file:
        file.write(b"\x00\xff\r\n")
    assert (tmp_path / "text").read_bytes() == "Ré ≤ 1\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff\r\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes", "text"]


def test_nothing_is_visible_before_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
        assert list(tmp_path.glob("*.json")) == []
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_failure_leaves_the_old_file_and_no_temporary(tmp_path, error, existed):
    path = tmp_path / "file"
    if existed:
        path.write_text("old")

    def fail():
        with atomic_write(path) as file:
            file.write("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [item.read_text() for item in tmp_path.iterdir()] == (["old"] if existed else [])


def test_failed_rename_leaves_no_temporary(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="no"), atomic_write(tmp_path / "file") as file:
        file.write("x")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with (
        pytest.raises(UserError, match=r"file cannot be written \(No space left on device\)"),
        atomic_write(tmp_path / "file") as file,
    ):
        file.write("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="umask is of POSIX")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "file") as file:
            file.write("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_missing_folder_and_folder_in_the_way_are_named(tmp_path):
    with (
        pytest.raises(UserError, match=r"absent.file.*Check that its folder"),
        atomic_write(tmp_path / "absent" / "file"),
    ):
        pass
    with pytest.raises(UserError, match="is a folder"), atomic_write(tmp_path):
        pass


@pytest.mark.parametrize("options", [{"mode": "a"}, {"mode": "wb", "encoding": "utf-8"}, {"mode": "wb", "newline": ""}])
def test_wrong_options_are_refused_before_anything_is_opened(tmp_path, options):
    with pytest.raises(ValueError, match="atomic_write"), atomic_write(tmp_path / "file", **options):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "link") as file:
        file.write("new")
    assert (tmp_path / "target").read_text() == "old"
    assert (tmp_path / "link").read_text() == "new"


def test_sha256(tmp_path, monkeypatch):
    (tmp_path / "abc").write_bytes(b"abc")
    # The first example of FIPS 180-2.
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "abc") == expected
    monkeypatch.setattr(files, "CHUNK_BYTES", 2)
    assert sha256_of_file(str(tmp_path / "abc")) == expected
    (tmp_path / "empty").touch()
    assert sha256_of_file(tmp_path / "empty") == hashlib.sha256().hexdigest()


def test_sha256_of_a_missing_file_names_it(tmp_path):
    with pytest.raises(UserError, match="absent cannot be read"):
        sha256_of_file(tmp_path / "absent")
