"""Files of results: one row a line, read back as they were, and refused where they are something else."""

from __future__ import annotations

import json
import math

import pytest

from scatterbrain.errors import UserError
from src.evaluation.result_rows import read_rows, write_rows

CONTENT = {
    "complete": True,
    "machine": {"gpu": None, "processor": "Ünlimited"},
    "results": [{"a": 1, "stages": [{"b": 0.1}, {"b": 2}]}, {"a": 2}],
    "curve": [[0, 1.5], [1, 1e-30]],
    "empty": [],
    "seeds": [1, 2],
}


def test_rows_have_a_line_each_and_are_read_as_they_were(tmp_path):
    path = tmp_path / "r.json"
    write_rows(path, CONTENT)
    assert path.read_text(encoding="utf-8").splitlines() == [
        "{",
        '"complete": true,',
        '"machine": {"gpu": null, "processor": "Ünlimited"},',
        '"results": [',
        '{"a": 1, "stages": [{"b": 0.1}, {"b": 2}]},',
        '{"a": 2}',
        "],",
        '"curve": [',
        "[0, 1.5],",
        "[1, 1e-30]",
        "],",
        '"empty": [],',
        '"seeds": [1, 2]',
        "}",
    ]
    assert read_rows(path, ["results", "seeds"], "Give another.") == CONTENT


def test_only_numbers_of_json_are_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(tmp_path / "r.json", {"a": math.nan})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [None, "{", "[]", '{"results": []}'])
def test_other_files_are_refused_with_the_remedy(tmp_path, text):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"r\.json .*Give the --output of a run\."):
        read_rows(path, ["results", "skipped"], "Give the --output of a run.")


def test_a_file_of_write_rows_is_json(tmp_path):
    write_rows(tmp_path / "r.json", CONTENT)
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8")) == CONTENT
