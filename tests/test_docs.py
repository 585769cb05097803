"""Documentation: links, anchors and figures exist, code examples run, commands name scripts and options that exist."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import re
import warnings
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

import scatterbrain
from tests.src.tasks.setup import EXPERIMENT, TRAINING_EXPERIMENT, compose_config

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/**/*.md", "notebooks/README.md"),
    *("checkpoints/**/README.md", "scatterbrain/**/README.md", "src/**/README.md", "tests/*/README.md"),
    "experiments/*/README.md",
)
PAGES = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))
README_BYTES = 10_000

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^()\s]+)\)|<(?:img|a)\s[^>]*?(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
SCRIPT = r"(?:scripts|experiments/\w+)/\w+\.py|run\.py"
COMMAND = re.compile(rf"(?:^|&& |\s)(?:python|torchrun)\s(?:-{{1,2}}\S+ )*({SCRIPT})(.*)")
OPTION = re.compile(r"(?<=\s)--[a-z][a-z-]*")
OVERRIDE = re.compile(r"^'?\+*([a-z][\w./]*)=(\S+?)'?$")
# What an override in running text is told apart by from other code: a dot or a slash, or the name of a group.
GROUPS = ("experiment", "datamodule", "logger", "trainer", "mode")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its code."""
    return INLINE_CODE.sub("", FENCE.sub("", read(page)))


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as the repository's host makes them."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def commands(page: str) -> list[tuple[str, str]]:
    """Script and arguments of every command in a page's code."""
    text = read(page)
    code = [body.replace("\\\n", " ") for _, language, body in FENCE.findall(text) if language in ("", "sh")]
    code += [" ".join(span.split()) for span in INLINE_CODE.findall(FENCE.sub("", text))]
    lines = [line.split(" #")[0] for block in code for line in block.splitlines()]
    return [match.groups() for line in lines for match in COMMAND.finditer(line)]


def overrides(page: str) -> list[tuple[str, str]]:
    """Key and value of every override of the configuration in a page: in commands of run.py, and in running text."""
    words = [word for script, arguments in commands(page) if script == "run.py" for word in arguments.split()]
    for span in INLINE_CODE.findall(FENCE.sub("", read(page))):
        parts = span.split()
        keys = [match.group(1) for match in map(OVERRIDE.match, parts) if match]
        if len(keys) == len(parts) and all("." in key or "/" in key or key in GROUPS for key in keys):
            words += parts
    return [match.groups() for match in map(OVERRIDE.match, words) if match]


@functools.cache
def known_options(script: str) -> set[str]:
    """Options that a script's help lists."""
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        module.main(["--help"])
    return set(re.findall(r"--[a-z][a-z-]*", text.getvalue()))


@functools.cache
def known_keys() -> set[str]:
    """Every key of the composed configurations of an evaluation and of both trainings, and of every logger."""

    def walk(config: DictConfig, prefix: str) -> set[str]:
        keys = set()
        for key in config:
            keys.add(f"{prefix}{key}")
            value = OmegaConf.to_container(config, resolve=False)[key]
            if isinstance(value, dict):
                keys |= walk(OmegaConf.create(value), f"{prefix}{key}.")
        return keys

    attention = "model/t2tattn_cfg=sblocal"
    evaluation = compose_config([f"experiment={EXPERIMENT}", attention])
    training = compose_config([f"experiment={TRAINING_EXPERIMENT}", attention])
    experiments = ("lra-listops", "lra-text", "lra-pathfinder", "language-books")
    sequences = [compose_config([f"experiment={name}"]) for name in experiments]
    loggers = [compose_config([f"logger={path.stem}"]) for path in (ROOT / "configs" / "logger").glob("*.yaml")]
    return set().union(*(walk(config, "") for config in (evaluation, training, *sequences, *loggers)))


def test_the_readme_is_short():
    assert len(read("README.md").encode()) < README_BYTES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for markdown, html in LINK.findall(prose(page)):
        target = markdown or html
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (folder / name).resolve() if name else ROOT / page
        assert path.is_relative_to(ROOT), f"{page}: {target} leads out of the repository"
        assert path.is_file(), f"{page}: {target} does not exist; correct the link"
        assert path.suffix != ".py", f"{page}: {target} is not on the site, which has no code; name it without a link"
        if anchor:
            assert anchor in anchors(path), f"{page}: no heading of {path.name} has the anchor #{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_lists_follow_an_empty_line(page):
    """Without it the site shows a list that follows a paragraph as a part of that paragraph."""
    previous = ""
    for line in FENCE.sub("", read(page)).splitlines():
        if re.match(r"(?:- |\d+\. )", line):
            starts = re.match(r"\s*$|#|(?:- |\d+\. )|<!--", previous) or previous.startswith("  ")
            assert starts, f"{page}: an empty line is missing before '{line[:60]}'"
        previous = line


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_and_options_that_exist(page):
    for script, arguments in commands(page):
        assert (ROOT / script).is_file(), f"{page}: {script} does not exist"
        if script != "run.py":
            unknown = set(OPTION.findall(f" {arguments}")) - known_options(script)
            assert not unknown, f"{page}: {script} has no option {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    blocks = [body for _, language, body in FENCE.findall(read(page)) if language in ("", "sh")]
    code = [line.strip() for body in blocks for line in body.splitlines()] + INLINE_CODE.findall(
        FENCE.sub("", read(page))
    )
    named = {match.group(1) for text in code for match in re.finditer(r"(?:^|&& )make ([a-z]+)\b", text)}
    assert named <= targets, f"{page}: the Makefile has no target {', '.join(sorted(named - targets))}"


@pytest.mark.parametrize("page", PAGES)
def test_overrides_name_choices_and_keys_that_exist(page):
    for key, value in overrides(page):
        group = ROOT / "configs" / key
        if key in known_keys() and not group.is_dir():
            continue
        if key.startswith("hydra.") or key == "hydra/launcher":
            continue
        assert group.is_dir(), f"{page}: the configuration has neither a key nor a group {key}"
        for name in value.strip("[]'").split(","):
            choice = (group / name.removesuffix(".yaml")).with_suffix(".yaml")
            assert choice.is_file() or "..." in name, f"{page}: {key} has no choice {name}"


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in read(page)])
def test_examples_run(page):
    for _, language, body in FENCE.findall(read(page)):
        if language == "python":
            exec(compile(body, page, "exec"), {})


def test_the_readme_has_one_memory_layout():
    """Operators and modules differ; the README's tensors are those of the operators, transposed for the module."""
    (body,) = [body for _, language, body in FENCE.findall(read("README.md")) if language == "python"]
    assert re.findall(r"^# \((.*?)\) each", body, re.MULTILINE) == ["B, H, N, E"]
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the module warns of another number of tokens
        exec(compile(body, "README.md", "exec"), names)
    query, key, value, attention = (names[name] for name in ("query", "key", "value", "attention"))
    assert names["out"].shape == query.shape
    window = attention.sizes()["local_context"]
    expected = scatterbrain.scatterbrain_attention(query, key, value, attention.projection_matrix, window)
    torch.testing.assert_close(names["out"], expected)


def test_the_site_lists_every_page_of_the_documentation():
    listed = set(re.findall(r": (\S+\.md)$", read("mkdocs.yml"), re.MULTILINE))
    assert {page for page in PAGES if page.startswith(("docs/", "scatterbrain/", "src/"))} <= listed
    missing = {page for page in listed if not (ROOT / page).is_file()}
    assert not missing, f"mkdocs.yml lists pages that do not exist: {sorted(missing)}"


def test_the_version_is_the_same_everywhere():
    import scatterbrain

    version = scatterbrain.__version__
    assert re.search(rf"^version: {re.escape(version)}$", read("CITATION.cff"), re.MULTILINE)
    assert f"## [{version}]" in read("CHANGELOG.md")


def test_the_reference_lists_every_public_name():
    import scatterbrain

    listed = re.findall(r"^::: scatterbrain\.(\w+)$|^ +- (\w+)$", read("docs/api.md"), re.MULTILINE)
    public = {name for name in scatterbrain.__all__ if not name.startswith("__")}
    missing = public - {name for names in listed for name in names} - {"ATTENTIONS"}
    assert not missing, f"docs/api.md leaves out {sorted(missing)}"
