"""The checkpoint scripts: what they print, what they leave, and how they fail."""

import functools
import hashlib
import http.server
import os
import runpy
import sys
import threading
from pathlib import Path

import pytest
import torch

from scripts import convert_checkpoint_t2t_vit as convert
from scripts import download_checkpoint_t2t_vit as download
from scripts import export_checkpoint_t2t_vit as export
from scripts import make_random_checkpoint as make_random
from src.checkpoints import PUBLISHED_CHECKPOINTS, PublishedCheckpoint, load_checkpoint, read_checkpoint
from src.checkpoints.seeded_weights import published_shapes, seeded_weights
from src.models.t2t_vit import T2T_VIT_VARIANTS, T2TViTVariant, create_t2t_vit

SCRIPTS = Path(convert.__file__).parent
FILE_NAME = "80.0_tiny.pth.tar"


@pytest.fixture(autouse=True)
def tiny_variant(monkeypatch):
    """A variant that is made, written and read in no time, and its published file."""
    monkeypatch.setitem(T2T_VIT_VARIANTS, "tiny_t", T2TViTVariant("transformer", 64, 2, 2))
    monkeypatch.setitem(
        PUBLISHED_CHECKPOINTS, "tiny_t", PublishedCheckpoint(FILE_NAME, "tiny_t", image_size=32, num_classes=5)
    )


def write_published(path, num_classes=5):
    weights = seeded_weights(published_shapes("tiny_t", num_classes, 32))
    torch.save({"state_dict_ema": {key: tensor.float() for key, tensor in weights.items()}}, path)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


# --- convert -----------------------------------------------------------------------------------------------------


def test_convert_prints_the_facts_and_keeps_the_original(tmp_path, capsys):
    path = write_published(tmp_path / "weights.pth.tar")
    original = path.read_bytes()
    assert convert.main([str(path)]) == 0
    out, err = capsys.readouterr()
    backup = tmp_path / "weights.pth.tar.og"
    assert backup.read_bytes() == original
    parameters = read_checkpoint(path).num_parameters
    facts = ("tiny_t", "state_dict_ema", f"{parameters:,}", "32", "5", sha256(path), str(backup))
    lines = out.splitlines()[1:]
    assert [line.split("  ")[-1].strip() for line in lines] == list(facts)
    assert err == ""


def test_convert_twice_has_nothing_to_do(tmp_path, capsys):
    path = write_published(tmp_path / "weights.pth.tar")
    original = path.read_bytes()
    assert convert.main([str(path)]) == 0
    converted = path.read_bytes()
    capsys.readouterr()
    assert convert.main([str(path)]) == 0
    assert "converted already, nothing to do" in capsys.readouterr().out
    assert path.read_bytes() == converted
    assert (tmp_path / "weights.pth.tar.og").read_bytes() == original


def test_convert_goes_on_after_a_bad_file(tmp_path, capsys):
    good, bad, missing = write_published(tmp_path / "good.pth"), tmp_path / "bad.pth", tmp_path / "missing.pth"
    bad.write_text("<html></html>")
    assert convert.main([str(bad), str(missing), str(good)]) == 1
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 2
    assert f"{bad} is a web page" in errors[0]
    assert f"{missing} does not exist" in errors[1]
    assert str(good) in out
    assert read_checkpoint(good).converted


def test_convert_to_an_output(tmp_path, capsys):
    path = write_published(tmp_path / "weights.pth")
    original, output = path.read_bytes(), tmp_path / "out [1].safetensors"
    assert convert.main([str(path), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    assert path.read_bytes() == original
    assert read_checkpoint(output).file_format == "safetensors"
    assert convert.main([str(path), "--output", str(output)]) == 1
    assert f"{output} exists and is not overwritten" in capsys.readouterr().err


def test_convert_takes_one_file_for_an_output(tmp_path, capsys):
    assert convert.main(["a", "b", "--output", str(tmp_path / "c")]) == 1
    assert "--output takes one FILE" in capsys.readouterr().err


@pytest.mark.parametrize("tool", [convert, download, export, make_random])
def test_a_misspelt_option_is_one_message(tool, capsys):
    assert tool.main(["a", "--outputt", "b"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert "--help lists the options" in error
    assert error.count("\n") == 1


def test_convert_expands_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_published(tmp_path / "weights.pth")
    assert convert.main(["~/weights.pth"]) == 0
    assert read_checkpoint(path).converted


# --- make random -------------------------------------------------------------------------------------------------


def test_random_checkpoint_is_in_the_published_format_and_loads(tmp_path, capsys):
    output = tmp_path / "random.pth.tar"
    assert make_random.main(["tiny_t", "--num-classes", "3", "--image-size", "48", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "accuracy means nothing" in out
    assert "variant       tiny_t\n" in out
    assert sha256(output) in out
    stored = torch.load(output, weights_only=True)
    assert list(stored) == ["state_dict_ema"]
    assert all(tensor.dtype == torch.float32 for tensor in stored["state_dict_ema"].values())
    expected = seeded_weights(published_shapes("tiny_t", 3, 48))
    assert list(stored["state_dict_ema"]) == list(expected)
    assert all(torch.equal(stored["state_dict_ema"][key], expected[key].float()) for key in expected)
    model = create_t2t_vit("tiny_t", num_classes=3, image_size=48)
    load_checkpoint(model, output)
    logits = model.eval()(torch.zeros(1, 3, 48, 48))
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["tiny_x"], ["'tiny_x'", "Did you mean 'tiny_t'"]),
        (["tiny_t", "--image-size", "50"], ["image_size=50", "multiple of 16"]),
        (["tiny_t", "--num-classes", "0"], ["num_classes=0"]),
    ],
)
def test_random_checkpoint_names_what_is_wrong(tmp_path, capsys, arguments, parts):
    assert make_random.main([*arguments, "--output", str(tmp_path / "random.pth")]) == 1
    err = capsys.readouterr().err
    assert all(part in err for part in parts)
    assert names(tmp_path) == []


def test_random_checkpoint_overwrites_nothing(tmp_path, capsys):
    output = tmp_path / "random.pth"
    output.write_text("mine")
    assert make_random.main(["tiny_t", "--output", str(output)]) == 1
    assert f"{output} exists and is not overwritten" in capsys.readouterr().err
    assert output.read_text() == "mine"


# --- download ----------------------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; below `/cut/` every answer ends halfway."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        if not self.path.startswith("/cut/"):
            super().do_GET()
            return
        content = (Path(self.directory) / self.path.removeprefix("/cut/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])


@pytest.fixture
def mirror(tmp_path):
    """Folder with the published file, and the address it is served at."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    write_published(folder / FILE_NAME)
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def fetch(tmp_path, url, *more, name="tiny_t"):
    return download.main([name, "--output-dir", str(tmp_path / "to" / "here"), "--url", url, *more])


@pytest.mark.parametrize("scheme", ["http", "http_without_slash", "file"])
def test_download(tmp_path, mirror, capsys, scheme):
    folder, url = mirror
    url = {"http": url, "http_without_slash": url.rstrip("/"), "file": folder.as_uri()}[scheme]
    assert fetch(tmp_path, url) == 0
    target = tmp_path / "to" / "here" / FILE_NAME
    assert target.read_bytes() == (folder / FILE_NAME).read_bytes()
    assert names(target.parent) == [FILE_NAME]
    out = capsys.readouterr().out
    assert all(fact in out for fact in (f"{target}: fetched from {url}", "tiny_t", sha256(target)))


def test_download_again_has_nothing_to_do(tmp_path, mirror, capsys):
    folder, url = mirror
    assert fetch(tmp_path, url) == 0
    (folder / FILE_NAME).unlink()
    capsys.readouterr()
    assert fetch(tmp_path, url) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_download_and_convert(tmp_path, mirror, capsys):
    folder, url = mirror
    target = tmp_path / "to" / "here" / FILE_NAME
    for _ in range(2):
        assert fetch(tmp_path, url, "--convert") == 0
        assert names(target.parent) == [FILE_NAME, FILE_NAME + ".og"]
        assert read_checkpoint(target).converted
        assert (target.parent / (FILE_NAME + ".og")).read_bytes() == (folder / FILE_NAME).read_bytes()
    assert sha256(target) in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["cut", "html", "wrong_classes", "missing", "no_server"])
def test_a_failed_download_leaves_nothing_and_says_how_to_go_on(tmp_path, mirror, capsys, fault):
    folder, url = mirror
    file = folder / FILE_NAME
    expected = {
        "cut": f"the connection ended after {file.stat().st_size // 2:,} of {file.stat().st_size:,} bytes",
        "html": "is a web page",
        "wrong_classes": f"holds tiny_t, 7 classes, 32 px, but {FILE_NAME} is tiny_t, 5 classes, 32 px",
        "missing": "the server answers 404",
        "no_server": "cannot be fetched",
    }
    if fault == "cut":
        url += "cut/"
    elif fault == "html":
        file.write_text("<!doctype html><title>Not here</title>")
    elif fault == "wrong_classes":
        write_published(file, num_classes=7)
    elif fault == "missing":
        file.unlink()
    else:
        url = "http://127.0.0.1:9/"  # the discard port: nobody listens
    assert fetch(tmp_path, url) == 1
    err = capsys.readouterr().err
    target = tmp_path / "to" / "here" / FILE_NAME
    assert expected[fault] in err
    assert f"fetch {url}{FILE_NAME} by hand and put it at {target}" in err
    assert ".download-" not in err
    assert names(target.parent) == []


def test_an_interrupted_download_leaves_nothing(tmp_path, mirror, capsys, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert fetch(tmp_path, mirror[1]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted. No half-written file was left."
    assert names(tmp_path / "to" / "here") == []


def test_a_damaged_file_that_is_there_already_is_kept_and_named(tmp_path, mirror, capsys):
    target = tmp_path / "to" / "here" / FILE_NAME
    target.parent.mkdir(parents=True)
    target.write_bytes(b"PK\x03\x04 half a download")
    assert fetch(tmp_path, mirror[1]) == 1
    err = capsys.readouterr().err
    assert f"{target} (" in err
    assert "truncated or damaged" in err
    assert "move it away" in err
    assert target.read_bytes() == b"PK\x03\x04 half a download"


@pytest.mark.parametrize(
    ("name", "url", "parts"),
    [
        ("t2t_vit_t14", None, ["Unknown T2T-ViT checkpoint 't2t_vit_t14'", "'t2t_vit_t_14'"]),
        ("t2t_vit_14_wide", None, ["No checkpoint of t2t_vit_14_wide is published", "t2t_vit_14_384"]),
        ("tiny_t", "ftp://host/", ["--url ftp://host/", "https, http, file"]),
        ("tiny_t", "/some/folder", ["--url /some/folder"]),
        ("tiny_t", "file:///no/such/folder", ["No such file", "by hand"]),
    ],
)
def test_download_names_what_is_wrong_with_its_options(tmp_path, capsys, name, url, parts):
    assert fetch(tmp_path, url or "http://127.0.0.1:9/", name=name) == 1
    err = capsys.readouterr().err
    assert all(part in err for part in parts)


# --- as commands -------------------------------------------------------------------------------------------------


def run_as_command(monkeypatch, script, *arguments):
    """Exit status of a script as `python scripts/...`, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    return caught.value.code


def test_a_users_error_ends_with_one_line_and_status_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_as_command(monkeypatch, "convert_checkpoint_t2t_vit", "no_such_thing") == 1
    output, errors = capsys.readouterr()
    assert errors.startswith("Error: ")
    assert errors.count("\n") == 1
    assert "no_such_thing" in errors
    assert "Traceback" not in errors
    assert output == ""


def test_a_users_error_of_a_download(monkeypatch, capsys):
    assert run_as_command(monkeypatch, "download_checkpoint_t2t_vit", "no_such_thing") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    assert "no_such_thing" in captured.err
    assert captured.out == ""


def test_a_checkpoint_is_made_and_converted_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ("t2t_vit_7", "--num-classes", "5", "--image-size", "32", "--output", "a.pth")
    assert run_as_command(monkeypatch, "make_random_checkpoint", *options) == 0
    assert run_as_command(monkeypatch, "convert_checkpoint_t2t_vit", "a.pth") == 0
    assert "t2t_vit_7" in capsys.readouterr().out
    assert names(tmp_path) == ["a.pth", "a.pth.og"]


# --- export ------------------------------------------------------------------------------------------------------


def write_lightning(path, attention="sblocal"):
    """A training's checkpoint, with what only a training needs."""
    model = create_t2t_vit("tiny_t", attention, image_size=32, num_classes=5)
    weights = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    state = {"state": {0: {"exp_avg": torch.ones(10**6)}}}
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": weights, "optimizer_states": [state]}, path)
    return model


def test_export_leaves_the_weights_alone(tmp_path, capsys):
    path, output = tmp_path / "last.ckpt", tmp_path / "exported.pth.tar"
    model = write_lightning(path)
    before = path.read_bytes()
    assert export.main([str(path), "--output", str(output)]) == 0
    assert path.read_bytes() == before
    content = torch.load(output, weights_only=True)
    assert list(content) == ["state_dict_ema"]
    assert content["state_dict_ema"].keys() == published_shapes("tiny_t", 5, 32).keys()
    loaded = create_t2t_vit("tiny_t", "full", image_size=32, num_classes=5)
    load_checkpoint(loaded, output)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert sha256(output) in capsys.readouterr().out


def test_export_in_half_precision(tmp_path):
    path = tmp_path / "last.ckpt"
    model = write_lightning(path)
    for half in (False, True):
        arguments = [str(path), "--output", str(tmp_path / f"{half}.pth"), *(["--half"] if half else [])]
        assert export.main(arguments) == 0
    sizes = [(tmp_path / f"{half}.pth").stat().st_size for half in (False, True)]
    assert sizes[1] < 0.6 * sizes[0]
    rounded = torch.load(tmp_path / "True.pth", weights_only=True)["state_dict_ema"]
    assert torch.equal(rounded["head.weight"], model.head.weight.detach().half())


def test_export_refuses_what_half_precision_cannot_hold(tmp_path, capsys):
    path = write_published(tmp_path / "weights.pth.tar")
    content = torch.load(path, weights_only=True)
    content["state_dict_ema"]["head.bias"][0] = 1e5
    torch.save(content, path)
    output = tmp_path / "out.pth"
    assert export.main([str(path), "--output", str(output), "--half"]) == 1
    assert (
        capsys.readouterr().err == f"Error: 'head.bias' of {path} is too large for half precision. Leave out --half.\n"
    )
    assert not output.exists()


def test_export_does_not_overwrite(tmp_path, capsys):
    path = write_published(tmp_path / "weights.pth.tar")
    assert export.main([str(path), "--output", str(path)]) == 1
    assert "exists and is not overwritten" in capsys.readouterr().err


def test_the_committed_checkpoint_is_in_the_published_layout():
    path = SCRIPTS.parent / "checkpoints" / "demo" / "t2t_vit_t_7_flowers.pth.tar"
    assert path.stat().st_size <= 10_000_000
    content = torch.load(path, weights_only=True)["state_dict_ema"]
    assert {key: tuple(tensor.shape) for key, tensor in content.items()} == published_shapes("t2t_vit_t_7", 5)
    assert {tensor.dtype for tensor in content.values()} == {torch.float16}
    assert sha256(path) in (path.parent / "README.md").read_text()
