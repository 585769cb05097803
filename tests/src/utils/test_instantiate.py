"""Objects from configs, whose values are resolved once."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from src.utils.instantiate import build, build_later, escape_interpolations


@pytest.mark.parametrize("text", ["/a/${oc.env:HOME}/b", "a\\${b}", "a\\", "${", "$a", "'${x}\\", "${x} \\\\${y}"])
def test_a_string_is_read_as_it_is(text, monkeypatch):
    assert OmegaConf.create(escape_interpolations({"a": [text]})).a[0] == text
    monkeypatch.setenv("TEXT", text)
    config = OmegaConf.create({"group": {"_target_": "builtins.dict", "value": "${..name}"}, "name": "${oc.env:TEXT}"})
    assert build(config.group, "group") == {"value": text}
    assert build_later(config.group, "group")() == {"value": text}
