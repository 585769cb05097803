"""Trained language models with other attentions: rows, fine-tunes, tables, tensors, and what is refused."""

import json

import numpy as np
import pytest
import torch

from experiments.language import compare, convert, distil
from experiments.language.compare import TEXTS
from experiments.language.convert import build_network, read_network
from scatterbrain.attention import create_attention
from src.datamodules.sequences.books import read_text_files
from src.models.attention_inputs import StageInputs, capture_calls
from src.models.sequence_network import rotate
from src.tasks.distillation import distil_features
from src.tasks.train_sequence import train_sequence
from src.utils.peak_memory import peak_bytes
from tests.scatterbrain.ops import causal_error
from tests.src.tasks.setup import compose_config

SMALL = ["model.dim=16", "model.depth=2", "model.heads=2", "model.mlp_dim=16", "model.memory_fraction=0.25"]
SMALL += ["trainer.accelerator=cpu", "callbacks.progress_bar=null", "logger=none", "datamodule.length=256"]
SMALL += ["train.steps=6", "train.eval_steps=6", "datamodule.batch_size=4", "datamodule.eval_windows=null"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts of some words, and networks that were trained on them: by the names of their attentions."""
    folder = tmp_path_factory.mktemp("language")
    generator = np.random.default_rng(0)
    for directory, names in (("books", ("train", "validation", "test")), ("wikitext", ("valid", "test"))):
        (folder / directory).mkdir()
        for name in names:
            (folder / directory / f"{name}.txt").write_text(" ".join(generator.choice(["who", "what", "why"], 1000)))
    for name in ("full", "performer"):
        train(folder, name)
    return folder


def train(folder, attention, *options, name=None):
    name = name or attention
    arguments = [f"model/attention={attention}", f"datamodule.read.data_dir={folder / 'books'}", "optimizer.lr=0.01"]
    config = compose_config(["experiment=language-books", *SMALL, *arguments, *options], folder / name)
    summary, _ = train_sequence(config)
    (folder / name / "test.json").write_text(json.dumps(summary.test))


def run_convert(folder, *options, networks=("full",), output="out.json"):
    checkpoints = [str(folder / name / "checkpoints" / "last.ckpt") for name in networks]
    texts = ["--books", str(folder / "books"), "--wikitext", str(folder / "wikitext"), "--batch-size", "4"]
    status = convert.main([*checkpoints, *texts, "--output", str(folder / output), *options])
    return status, json.loads((folder / output).read_text()) if status == 0 else None


def test_swapped_and_fine_tuned(folder, capsys):
    options = ["--attentions", "full,local,sbcluster", "--steps", "5", "--lr", "0.01"]
    status, content = run_convert(folder, *options)
    assert status == 0
    rows = {(row["method"], row["stage"]): row for row in content["results"]}
    stages = [("full", "trained"), ("full", "fine-tuned")]
    stages += [(name, stage) for name in ("local", "sbcluster") for stage in ("swapped", "fine-tuned")]
    assert list(rows) == stages
    trained = rows["full", "trained"]
    assert list(trained["bits_per_byte"]) == list(TEXTS)
    assert trained["seed"] == 1111
    assert trained["trained_steps"] == 6
    # as the training measured it, on the same windows
    test = json.loads((folder / "full" / "test.json").read_text())
    assert trained["bits_per_byte"]["test"] == pytest.approx(test["bits_per_byte"], rel=1e-5)
    assert trained["standard_error"]["test"] == pytest.approx(test["standard_error"], rel=1e-4)
    for name in ("full", "local", "sbcluster"):
        before = rows[name, "trained" if name == "full" else "swapped"]["bits_per_byte"]["test"]
        row = rows[name, "fine-tuned"]
        assert row["steps"] == 5
        assert row["bits_per_byte"]["test"] < before - 0.05
    assert rows["local", "swapped"]["sizes"] == {"local_context": 32}
    assert rows["local", "swapped"]["memory"] == 1 / 8
    assert rows["local", "swapped"]["bits_per_byte"]["test"] != trained["bits_per_byte"]["test"]
    assert "fine-tuned" in capsys.readouterr().out
    _, content = run_convert(folder, "--attentions", "sbcluster", "--value-weight", "4", output="weighted.json")
    assert content["settings"]["value_weight"] == 4
    assert content["results"][0] == trained
    assert content["results"][1]["sizes"] == rows["sbcluster", "swapped"]["sizes"]
    assert content["results"][1]["bits_per_byte"] != rows["sbcluster", "swapped"]["bits_per_byte"]


def test_an_attention_that_is_exact_changes_nothing(folder):
    options, state, _ = read_network(folder / "full" / "checkpoints" / "last.ckpt")
    window = {**options, "attention": {"name": "local", "local_context": 512}}
    tokens = read_text_files(folder / "books").test[None, :256].long()
    outs = [build_network(each, state, torch.device("cpu")).eval()(tokens) for each in (options, window)]
    torch.testing.assert_close(*outs)


def test_a_network_keeps_its_random_features(folder):
    _, content = run_convert(folder, "--attentions", "performer", "--steps", "1", networks=["performer"])
    test = json.loads((folder / "performer" / "test.json").read_text())
    assert content["results"][0]["bits_per_byte"]["test"] == pytest.approx(test["bits_per_byte"], rel=1e-5)
    assert [row["sizes"] for row in content["results"]] == [content["results"][0]["sizes"]] * 2


def test_networks_with_learned_positions(folder):
    train(folder, "sbcluster", "model.positions=learned")
    _, content = run_convert(folder, "--attentions", "full", networks=["sbcluster"], output="learned.json")
    test = json.loads((folder / "sbcluster" / "test.json").read_text())
    assert content["results"][0]["bits_per_byte"]["test"] == pytest.approx(test["bits_per_byte"], rel=1e-5)


def test_the_table_of_several_files(folder, capsys):
    run_convert(folder, "--attentions", "full,local", "--windows", "4", output="one.json")
    run_convert(folder, "--attentions", "full,local", "--windows", "4", networks=["performer"], output="other.json")
    capsys.readouterr()
    files = [str(folder / name) for name in ("one.json", "other.json")]
    assert compare.main([*files, "--output", str(folder / "both.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| trained with | attention | validation, swapped | test, swapped | WikiText-2")
    content = json.loads((folder / "both.json").read_text())
    assert [each["networks"] for each in content["settings"]] == [["full, seed 1111"], ["performer, seed 1111"]]
    assert all(each["windows"] == 4 for each in content["settings"])
    both = content["results"]
    assert [line.split(" | ")[:2] for line in lines[2:6]] == [
        ["| full", "full"],
        ["| full", "local"],
        ["| performer", "performer"],
        ["| performer", "full"],
    ]
    assert lines[3].split(" | ")[3] == f"{both[1]['bits_per_byte']['test']:.3f}"
    content = json.loads((folder / "one.json").read_text()) | {"complete": False}
    (folder / "one.json").write_text(json.dumps(content))
    assert compare.main(files) == 1
    assert "one.json is incomplete, or of another length" in capsys.readouterr().err


def test_tensors_for_the_measurement_of_errors(folder):
    run_convert(folder, "--attentions", "full", "--windows", "1", "--save-tensors", str(folder / "network_qkv.npz"))
    arrays = np.load(folder / "network_qkv.npz")
    assert sorted(arrays.files) == ["k0", "k1", "q0", "q1", "v0", "v1"]
    assert arrays["q1"].shape == (1, 256, 2, 8)
    # with rotary positions
    options, state, _ = read_network(folder / "full" / "checkpoints" / "last.ckpt")
    assert options["positions"] == "rotary"
    network = build_network(options, state, torch.device("cpu"))
    text = read_text_files(folder / "books").test
    block, outputs = network.blocks[0], []
    projected = block.qkv(block.norm1(network.embedding(text[None, :256].long()))).unflatten(-1, (3, 2, 8)).unbind(2)
    for name, before in zip("qk", projected, strict=False):
        found = torch.from_numpy(arrays[f"{name}0"]).float()
        torch.testing.assert_close(found, rotate(before, network.rotary), rtol=1e-3, atol=1e-3)
        assert (found - before).abs().max() > 0.1
    # the first block's attention computes from these what it adds
    block.attention.register_forward_hook(lambda *call: outputs.append(call[2][0]))
    network(text[None, :256].long())
    query, key, value = (torch.from_numpy(arrays[f"{name}0"]).float().transpose(1, 2) for name in "qkv")
    out, _ = causal_error.local(query, key, value, 256)
    torch.testing.assert_close(out.transpose(1, 2), outputs[0], rtol=1e-3, atol=1e-3)


def test_a_fine_tune_that_diverges(folder, capsys):
    assert run_convert(folder, "--attentions=full", "--steps=3", "--lr=1e30", output="nan.json")[0] == 1
    error = capsys.readouterr().err
    assert "in the fine-tune. Lower --lr." in error
    assert "Traceback" not in error
    assert not (folder / "nan.json").exists()


def test_what_is_refused(folder, tmp_path, capsys):
    train(folder, "local", "datamodule.length=128")
    assert run_convert(folder, networks=["full", "local"])[0] == 1
    assert "Networks of lengths 128, 256" in capsys.readouterr().err
    assert run_convert(folder, networks=["full", "full"])[0] == 1
    assert "two results of attention full and seed 1111 in the checkpoints" in capsys.readouterr().err
    for option, value in (("--steps", "-3"), ("--seed", "-1"), ("--seed", str(2**63))):
        assert run_convert(folder, f"{option}={value}")[0] == 1
        assert f"Argument {option}: '{value}' is not an integer of at least 0" in capsys.readouterr().err
    # before anything is measured
    assert run_convert(folder, "--attentions", "full,smyrf", output="none.json")[0] == 1
    assert "SmyrfAttention cannot be causal" in capsys.readouterr().err
    assert not (folder / "none.json").exists()
    options = ["--save-tensors", str(tmp_path / "qkv.npz")]
    assert run_convert(folder, *options, networks=["full", "performer"])[0] == 1
    assert "--save-tensors writes the tensors of one network" in capsys.readouterr().err
    (tmp_path / "other.ckpt").write_bytes(b"no checkpoint")
    assert convert.main([str(tmp_path / "other.ckpt"), "--books", str(folder / "books")]) == 1
    assert "or is no checkpoint. Resume" in capsys.readouterr().err


def test_one_file_twice_is_no_second_seed(folder, capsys):
    run_convert(folder, "--attentions", "full", "--windows", "1", output="once.json")
    capsys.readouterr()
    path = str(folder / "once.json")
    assert compare.main([path, path, "--output", str(folder / "twice.json")]) == 1
    assert "two results of attention full and seed 1111 in" in capsys.readouterr().err
    assert not (folder / "twice.json").exists()


def run_distil(folder, *options, network="full", output="distilled.json"):
    texts = ["--books", str(folder / "books"), "--wikitext", str(folder / "wikitext"), "--windows", "8"]
    sizes = ["--train-windows", "3", "--error-windows", "2", "--num-queries", "64", "--steps", "30", "--lr", "0.05"]
    checkpoint = str(folder / network / "checkpoints" / "last.ckpt")
    status = distil.main([checkpoint, *texts, *sizes, "--output", str(folder / output), *options])
    return status, json.loads((folder / output).read_text()) if status == 0 else None


def test_learned_features_against_random_ones(folder, capsys):
    status, content = run_distil(folder, "--num-seeds", "2", "--seed", "1111", "--device", "cpu")
    assert status == 0
    assert content["complete"]
    assert (content["settings"]["seed"], content["settings"]["num_seeds"], content["settings"]["steps"]) == (
        1111,
        2,
        30,
    )
    rows = {(row["method"], row["stage"], row["features_seed"]): row for row in content["results"]}
    of_features = [
        (name, kind, seed)
        for name in ("performer", "sblocal")
        for kind in ("random", "keys", "learned")
        for seed in (1111, 1112)
    ]
    others = [("full", "trained", None), ("local", "swapped", None), ("sbcluster", "swapped", None)]
    assert list(rows) == others + of_features
    assert rows[others[0]]["errors"] == [0.0, 0.0]
    for name in ("performer", "sblocal"):
        for seed in (1111, 1112):
            random, keys, learned = (rows[name, kind, seed] for kind in ("random", "keys", "learned"))
            assert random["sizes"] == keys["sizes"] == learned["sizes"]
            assert list(learned["bits_per_byte"]) == list(TEXTS)
            assert len(learned["divergences"]) == 2
            for layer in (0, 1):
                assert learned["errors"][layer] < 0.8 * min(keys["errors"][layer], random["errors"][layer])
        assert rows[name, "random", 1111]["errors"] != rows[name, "random", 1112]["errors"]
    # the random ones are those of a conversion with the seed of the network
    _, swapped = run_convert(folder, "--attentions", "performer,sblocal", "--windows", "8")
    for row in swapped["results"][1:]:
        assert row["bits_per_byte"] == pytest.approx(rows[row["method"], "random", 1111]["bits_per_byte"], rel=1e-6)
    output = capsys.readouterr().out
    assert "relative error of the output, mean ± standard deviation over seeds" in output
    learned = [rows["sblocal", "learned", seed]["bits_per_byte"]["test"] for seed in (1111, 1112)]
    assert f"{np.mean(learned):.3f} ± {np.std(learned, ddof=1):.3f}" in output


def test_errors_of_layers_are_of_the_trained_networks_inputs(folder):
    """The first layer gets the same in both networks, so their outputs there have the error."""
    _, content = run_distil(folder, "--num-seeds", "1", "--error-windows", "1", "--attentions", "performer")
    options, state, _ = read_network(folder / "full" / "checkpoints" / "last.ckpt")
    text, outputs = read_text_files(folder / "books").test, []
    start = (len(text) - 1) // 256 // 2 * 256  # the window in the middle
    window = {**options, "attention": {"name": "local"}, "memory_fraction": 1 / 8}
    for each in (options, window):
        network = build_network(each, state, torch.device("cpu")).eval()
        network.blocks[0].attention.register_forward_hook(lambda *call: outputs.append(call[2][0]))
        network(text[None, start : start + 256].long())
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert content["results"][1]["errors"][0] == pytest.approx(error.item(), rel=1e-4)


def test_learned_features_depend_on_their_seed_alone(folder):
    given = ["--attentions", "sblocal", "--steps", "5"]
    _, both = run_distil(folder, *given, "--seed", "3", "--num-seeds", "2")
    _, second = run_distil(folder, *given, "--seed", "4", "--num-seeds", "1")
    rows = [row for row in both["results"] if row["features_seed"] == 4]
    assert rows == [row for row in second["results"] if row["features_seed"] == 4]
    assert len(rows) == 3
    assert rows[-1]["divergences"] != both["results"][-2]["divergences"]


def test_learned_features_in_bfloat16(folder, monkeypatch):
    """As on CUDA, where the network runs in autocast: queries and keys are bfloat16, their features are not."""
    given = ["--attentions", "sblocal", "--num-seeds", "1", "--windows", "2"]
    _, single = run_distil(folder, *given)
    monkeypatch.setattr(distil.Distillation, "autocast", lambda self: torch.autocast("cpu", torch.bfloat16))
    _, half = run_distil(folder, *given)
    for one, other in zip(single["results"], half["results"], strict=True):
        assert other["bits_per_byte"]["test"] == pytest.approx(one["bits_per_byte"]["test"], abs=0.02)
        assert other["errors"] == pytest.approx(one["errors"], abs=0.02)
    assert half["results"][0]["errors"][0] > 0.0


@pytest.mark.parametrize("name", ["performer", "sblocal"])
def test_memory_of_learned_features_is_linear_in_the_length(name):
    """Of the evaluation and of a step of the distillation: no weights of all queries are there."""
    sizes = {"nb_features": 16} | ({"local_context": 32} if name == "sblocal" else {})
    cpu, peaks, steps = torch.device("cpu"), [], []
    for length in (1024, 2048):
        attention = create_attention(name, length, 8, causal=True, learned_heads=2, **sizes).eval()
        inputs = torch.randn(3, 1, length, 2, 8)
        with torch.no_grad():
            peaks.append(peak_bytes(lambda call=attention, inputs=inputs: call(*inputs), cpu))
        layers = [StageInputs(*inputs, 8**-0.5)]
        steps.append(peak_bytes(lambda call=attention, layers=layers: distil_features(call, layers, steps=2), cpu))
    assert peaks[1] < 2.2 * peaks[0]
    assert steps[1] < 2.2 * steps[0]
    assert max(peaks[1], steps[1]) < 4 * 2 * 2048**2  # float32 weights of both heads


def test_what_a_distillation_refuses(folder, capsys):
    for options, message in (
        (["--attentions", "performer,local"], "Attention local has no features to learn. Choose performer or sblocal."),
        (["--steps", "0"], "Argument --steps: '0' is not an integer of at least 1"),
        (["--seed", "-1"], "--seed"),
    ):
        assert run_distil(folder, *options, output="none.json")[0] == 1
        error = capsys.readouterr().err
        assert error.startswith("Error: ")
        assert message in error
        assert error.count("\n") == 1
    assert run_distil(folder, network="performer", output="none.json")[0] == 1
    assert "was trained with performer, and features are learned from full attention." in capsys.readouterr().err
    train(folder, "full", "model.depth=1", "seed=5", name="shallow")
    checkpoints = [str(folder / name / "checkpoints" / "last.ckpt") for name in ("full", "shallow")]
    assert distil.main([*checkpoints, "--books", str(folder / "books"), "--output", str(folder / "none.json")]) == 1
    assert "Networks of 1 and 2 blocks have no errors in common." in capsys.readouterr().err
    assert not (folder / "none.json").exists()


def test_a_diverged_distillation_ends_in_one_message(folder, capsys):
    given = ["--attentions", "sblocal", "--num-seeds", "1", "--lr", "1e30"]
    assert run_distil(folder, *given, output="diverged.json")[0] == 1
    assert "Error: sblocal (learned) has nan bits per byte on validation. Lower --lr.\n" in capsys.readouterr().err
    content = json.loads((folder / "diverged.json").read_text())
    assert not content["complete"]
    assert [row["stage"] for row in content["results"]][-2:] == ["random", "keys"]


def test_inputs_of_layers_take_no_more_memory_than_they_have_elements(folder):
    """Values are a part of a fused qkv, which is not held."""
    options, state, _ = read_network(folder / "full" / "checkpoints" / "last.ckpt")
    network = build_network(options, state, torch.device("cpu")).eval()
    attentions = [block.attention for block in network.blocks]
    for inputs in capture_calls(attentions, lambda: network(torch.zeros(1, 256, dtype=torch.long))):
        for x in (inputs.query, inputs.key, inputs.value):
            assert x.untyped_storage().nbytes() == x.nbytes
