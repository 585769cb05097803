"""Photographs, copied once."""

import shutil

import pytest

from tests.src.datamodules.setup import PHOTOGRAPHS


@pytest.fixture(scope="session")
def flowers(tmp_path_factory):
    """Data folder that holds `PHOTOGRAPHS`; tests leave it as it is."""
    data_dir = tmp_path_factory.mktemp("flowers")
    for path in PHOTOGRAPHS:
        folder = data_dir / "val" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return data_dir
