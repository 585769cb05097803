"""Training from scratch with each attention: ListOps against its rules, the network's masks, the script end to end."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics

import numpy as np
import pytest
import torch
from PIL import Image

from scatterbrain.errors import UserError
from scripts.experiment_training import main
from src.analysis.experiments import training
from src.datamodules import listops, sequence_tasks
from src.tasks import sequence_training

CPU = torch.device("cpu")
LENGTH = 32
RECIPE = training.Recipe(
    steps=3, batch_size=4, length=LENGTH, memory_fraction=1 / 4, depth=2, dim=16, heads=2, eval_every=2
)
CAUSAL = ("full", "local", "performer", "sblocal", "sbcluster")


@pytest.fixture(scope="module")
def expressions():
    return listops.draw_expressions(400, 200, seed=3)


@pytest.fixture(scope="module")
def tasks():
    """Both tasks, small."""
    drawn = listops.draw_expressions(80, LENGTH - 1, seed=0)
    text = bytes(range(32, 127)) * 8
    return {
        "language": sequence_tasks.Language(text, text[::-1], LENGTH, CPU, {}),
        "listops": sequence_tasks.ListOps(drawn[30:], drawn[:30], CPU),
    }


# ListOps --------------------------------------------------------------------------------------------------------------


def evaluate(words):
    """Value of an expression and its depth, by its grammar; takes the words from the list."""
    word = words.pop(0)
    if not word.startswith("["):
        return int(word), 1
    arguments = []
    while words[0] != "]":
        arguments.append(evaluate(words))
    words.pop(0)
    assert 2 <= len(arguments) <= 10
    values = [value for value, _ in arguments]
    functions = {"[MIN": min, "[MAX": max, "[MED": lambda x: int(statistics.median(x)), "[SM": lambda x: sum(x) % 10}
    return functions[word](values), 1 + max(depth for _, depth in arguments)


def test_values_are_those_of_the_grammar(expressions):
    deepest = 0
    for tokens, length, value in zip(expressions.tokens, expressions.lengths, expressions.values, strict=True):
        words = listops.as_text(tokens).split()
        assert len(words) == length
        assert 100 <= length <= 200
        assert (tokens[length:] == listops.PADDING).all()
        found, depth = evaluate(words)
        assert not words
        assert found == value
        deepest = max(deepest, depth)
    assert deepest == listops.MAX_DEPTH


def test_expressions_are_a_function_of_their_seed_and_differ():
    one, again, more, other = (
        listops.draw_expressions(num, 64, seed) for num, seed in ((50, 1), (50, 1), (300, 1), (50, 2))
    )
    for name in ("tokens", "lengths", "values"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
        assert np.array_equal(getattr(one, name), getattr(more[:50], name))
    assert not np.array_equal(one.tokens, other.tokens)
    # with four tokens, there are 400 of them, which come again and again
    short = listops.draw_expressions(300, 16, seed=0, shortest=4)
    assert len({tokens.tobytes() for tokens in short.tokens}) == len(short) == 300


def test_expressions_are_balanced():
    drawn = listops.draw_expressions(4000, 256, seed=5)
    shares = np.bincount(drawn.values, minlength=10) / len(drawn)
    # MIN and MAX of several digits favour 0 and 9; no value is rare
    assert shares.max() < 0.22
    assert shares.min() > 0.05
    # four standard errors of a quarter of 4,000 are 0.03; lengths that are wanted favour no operator by much
    outermost = np.bincount(drawn.tokens[:, 0], minlength=17)[11:15] / len(drawn)
    assert np.abs(outermost - 0.25).max() < 0.05
    # all lengths: each tenth of the range has its share
    counts = np.histogram(drawn.lengths, bins=8, range=(128, 256))[0]
    assert counts.min() > 200


def test_baselines_are_what_a_guess_gets():
    tokens = np.array([[11], [11], [11], [12], [12]], dtype=np.uint8)
    train = listops.Expressions(tokens, np.ones(5, int), np.array([0, 0, 3, 9, 9]))
    held_out = listops.Expressions(tokens[1:], np.ones(4, int), np.array([0, 0, 9, 1]))
    assert listops.majority_accuracy(train, held_out) == 0.5
    assert listops.first_operator_accuracy(train, held_out) == 0.75


def test_expressions_that_are_not_there_are_refused(monkeypatch):
    small_expressions = listops.draw_expressions(3, 16, seed=0)
    with pytest.raises(UserError, match=r"length=8 is not valid"):
        listops.draw_expressions(5, 8, seed=0)
    monkeypatch.setattr(listops, "_draw", lambda *_: small_expressions)
    with pytest.raises(UserError, match=r"Only 3 different expressions of 8 to 16 tokens turn up, not 4\."):
        listops.draw_expressions(4, 16, seed=0)


# Language -------------------------------------------------------------------------------------------------------------


def test_sources_are_split_by_file(tmp_path):
    (tmp_path / "pack" / "test").mkdir(parents=True)
    (tmp_path / "site-packages").mkdir()
    for name in ("pack/test/a.py", "site-packages/a.py", "_sysconfigdata_x.py", "a.txt"):
        (tmp_path / name).write_text("no")
    for number in range(24):
        (tmp_path / ("pack" if number % 2 else ".") / f"m{number:02}.py").write_text(f"<{number}>")
    train, held_out, description = sequence_tasks.library_sources(tmp_path)
    even, odd = range(0, 24, 2), range(1, 24, 2)
    order = [f"<{number}>" for number in (*even, *odd)]  # m*.py before pack/m*.py
    assert held_out.decode() == "".join(order[9::10])
    assert train.decode() == "".join(text for place, text in enumerate(order) if place % 10 != 9)
    assert description["files"] == 24
    assert description["bytes"] == len(train) + len(held_out)
    assert sequence_tasks.library_sources(tmp_path, limit=7)[2]["files"] == 3
    (tmp_path / "m00.py").write_text("<x>")
    assert sequence_tasks.library_sources(tmp_path)[2]["sha256"] != description["sha256"]


def test_sources_are_there():
    train, held_out, description = sequence_tasks.library_sources()
    assert len(train) > 1_000_000
    assert len(held_out) > 50_000
    assert description["bytes"] < 1.2 * sequence_tasks.CORPUS_BYTES


def test_bits_of_bytes():
    def as_bytes(text):
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    found = sequence_tasks.byte_baselines(as_bytes("aaab"), as_bytes("ab"))
    assert found["byte frequencies"] == pytest.approx(-(math.log2(4 / 260) + math.log2(2 / 260)) / 2)
    assert found["byte after byte"] == pytest.approx(-math.log2(2 / (3 + 256)))  # aa, aa, ab


def test_windows_lie_in_the_text_and_targets_are_the_next_bytes(tasks):
    task = tasks["language"]
    tokens, lengths, targets = task.batch(torch.tensor([0, 3]))
    assert lengths is None
    assert tokens.tolist() == [list(range(32, 64)), list(range(35, 67))]
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    order = task.draw_order(500, 20, seed=1)
    assert order.min() == 0
    assert order.max() == 8 * 95 - LENGTH - 1
    held_out, _, _ = task.held_out(slice(None))
    assert len(held_out) == task.num_held_out == (8 * 95 - 1) // LENGTH
    assert held_out[0, :2].tolist() == [126, 125]


def test_score_of_language_is_in_bits(tasks):
    logits = torch.zeros(2, LENGTH, 256)
    targets = torch.zeros(2, LENGTH, dtype=torch.long)
    logits[1, :, 0] = 100.0
    torch.testing.assert_close(tasks["language"].score(logits, targets), torch.tensor([8.0, 0.0]))


# Network --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CAUSAL)
def test_a_later_byte_never_changes_an_earlier_logit(tasks, name):
    network = sequence_training.create_network(tasks["language"], name, RECIPE, seed=0).double().eval()
    tokens = torch.randint(256, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = network(tokens)
        for position in (1, 13, LENGTH - 1):
            other = tokens.clone()
            other[:, position:] = (other[:, position:] + 1) % 256
            after = network(other)
            # other sums behind the position, in float64
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-9)
            assert (after[:, position] - before[:, position]).abs().max() > 1e-4


@pytest.mark.parametrize("name", training.COMPARED)
def test_keys_and_values_of_padding_are_hidden(tasks, name):
    (attention, _) = (
        block.attention.double() for block in sequence_training.create_network(tasks["listops"], name, RECIPE, 0).blocks
    )
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, LENGTH, 2, 8, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([20, 5])
    padding = (torch.arange(LENGTH) >= lengths[:, None])[..., None, None]
    before, _ = attention(query, key, value, key_lengths=lengths)
    after, _ = attention(query, key.where(~padding, 3.0), value.where(~padding, 100.0), key_lengths=lengths)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    seen, _ = attention(query, key, value.where(~padding, 100.0))
    assert (seen - before).abs().max() > 1e-3


# The hashes sort the queries of padding among the others, which moves the clusters: what is there, which is always the
# same, is not hidden from them. It is in no weighted sum, see above.
@pytest.mark.parametrize("name", [name for name in training.COMPARED if name not in ("smyrf", "sbsmyrf", "reformer")])
def test_padding_is_hidden(tasks, name):
    network = sequence_training.create_network(tasks["listops"], name, RECIPE, seed=0).double().eval()
    tokens, lengths, _ = tasks["listops"].held_out(slice(0, 8))
    assert (tokens[:, 0] == listops.CLASS).all()
    assert ((tokens != listops.PADDING).sum(1) == lengths).all()
    # so short that the padding is within the reach of the windows of two blocks
    lengths = torch.arange(2, 10).clamp(max=5)
    padding = torch.arange(LENGTH) >= lengths[:, None]
    with torch.no_grad():
        before = network(tokens, lengths)
        after = network(tokens.where(~padding, listops.CLOSE), lengths)
        seen = network(tokens.where(~padding, listops.CLOSE), None)
    assert before.shape == (8, 10)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9)
    assert (seen - before).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("task", sequence_tasks.TASKS)
def test_attentions_share_weights_and_batches(tasks, task):
    names = CAUSAL if task == "language" else training.COMPARED
    first, *others = (training.Training(tasks[task], name, RECIPE, 5, CPU) for name in names)
    weights = dict(first.network.named_parameters())
    for other in others:
        assert torch.equal(other.order, first.order)
        found = dict(other.network.named_parameters())
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    another = training.Training(tasks[task], "full", RECIPE, 6, CPU)
    assert not torch.equal(another.order, first.order)
    assert not torch.equal(another.network.head.weight, first.network.head.weight)


def test_blocks_have_features_of_their_own(tasks):
    network = sequence_training.create_network(tasks["language"], "performer", RECIPE, seed=0)
    one, two = (block.attention.projection_matrix for block in network.blocks)
    assert not torch.equal(one, two)


def test_each_expression_comes_once_in_a_pass(tasks):
    order = tasks["listops"].draw_order(30, 5, seed=0).flatten()
    for part in order.view(3, 50):
        assert torch.equal(part.sort().values, torch.arange(50))


# Training -------------------------------------------------------------------------------------------------------------


def test_learning_rate():
    rates = [sequence_training.learning_rate(progress, 2.0) for progress in (0, 0.025, 0.05, 0.525, 1)]
    assert rates == pytest.approx([0, 1, 2, 1, 0])


def test_it_learns_and_the_warm_up_changes_nothing(tasks):
    recipe = training.Recipe(**{**vars(RECIPE), "steps": 60, "eval_every": 25, "lr": 1e-2})
    trained = [training.Training(tasks["language"], "sblocal", recipe, 0, CPU) for _ in range(2)]
    runs = [each.run() for each in trained]
    (first, _, last) = runs[0].curve
    assert runs[0].curve == runs[1].curve
    assert [point["step"] for point in runs[0].curve] == [25, 50, 60]
    # of 95 bytes one follows; without what comes before it, the loss would be no less than ln 95
    assert last["train_loss"] < math.log(95) - 1 < first["train_loss"]
    assert runs[0].metric == last["metric"]
    assert runs[0].peak_memory_mib is None
    assert runs[0].memory <= 1 / 4
    # by hand: the first loss is that of the weights as they were drawn
    task = tasks["language"]
    network = sequence_training.create_network(task, "sblocal", recipe, 0)
    tokens, _, targets = task.batch(trained[0].order[0])
    loss = torch.nn.functional.cross_entropy(network(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(trained[0].losses[0], loss.detach())


def test_a_loss_that_is_not_finite_is_reported(tasks, monkeypatch):
    steps = []

    def loss(self, logits, targets):
        steps.append(1)
        # the first pass is the warm-up
        return logits.sum() * (math.nan if len(steps) == 4 else 1.0)

    monkeypatch.setattr(sequence_tasks.Language, "loss", loss)
    recipe = training.Recipe(**{**vars(RECIPE), "steps": 6})
    result = training.Training(tasks["language"], "full", recipe, 0, CPU).run()
    assert result.diverged_at == 3
    assert result.steps == 4
    assert result.metric is None
    assert [point["step"] for point in result.curve] == [2]


# The script -----------------------------------------------------------------------------------------------------------


SMALL = [f"--length={LENGTH}", "--memory-fraction=1/4", "--depth=1", "--dim=16", "--batch-size=8", "--threads=1"]
SMALL += ["--device=cpu", "--steps=3", "--eval-every=2", "--num-expressions=60", "--seed=7"]


@pytest.fixture
def few(monkeypatch):
    """Little to score on."""
    monkeypatch.setattr(sequence_tasks, "HELD_OUT_EXPRESSIONS", 40)
    monkeypatch.setattr(sequence_tasks, "NUM_WINDOWS", 4)
    monkeypatch.setattr(sequence_tasks, "CORPUS_BYTES", 100_000)
    monkeypatch.setattr(sequence_tasks.library_sources, "__defaults__", (None, 300_000))


@pytest.mark.usefixtures("few")
def test_end_to_end(tmp_path, capsys):
    output, figure = tmp_path / "t.json", tmp_path / "t.png"
    assert main([*SMALL, f"--output={output}", f"--figure={figure}", "--num-seeds=2"]) == 0
    printed = capsys.readouterr().out
    assert "first operator" in printed
    with Image.open(figure) as image:
        assert image.format == "PNG"
    content = json.loads(output.read_text())
    assert content["complete"] is True
    assert content["settings"]["precision"] == "float32"
    assert content["settings"]["memory_fraction"] == 0.25
    assert not set(content["settings"]) & {"output", "figure"}
    keys = [(result["seed"], result["task"], result["attention"]) for result in content["results"]]
    assert keys == [
        (seed, task, name)
        for seed in (7, 8)
        for task, names in (("language", CAUSAL), ("listops", training.COMPARED))
        for name in names
    ]
    for result in content["results"]:
        assert [point["step"] for point in result["curve"]] == [2, 3]
        assert result["metric"] == result["curve"][-1]["metric"]
    # those that cannot be causal say so themselves
    refused = [name for name in training.COMPARED if name not in CAUSAL]
    assert [each["attention"] for each in content["skipped"]] == 2 * refused
    for each in content["skipped"]:
        assert each["task"] == "language"
        assert "cannot be causal" in each["reason"]
        assert each["reason"] in printed
    corpus = content["tasks"]["language"]
    assert len(corpus["sha256"]) == 64
    assert corpus["train_bytes"] + corpus["held_out_bytes"] == corpus["bytes"]
    assert content["tasks"]["listops"]["train_expressions"] == 60


def test_bfloat16_runs(tasks):
    recipe = training.Recipe(**{**vars(RECIPE), "precision": "bfloat16"})
    for name in ("full", "sblocal", "pairedcluster"):
        task = training.Training(tasks["listops"], name, recipe, 0, CPU)
        seen = []
        task.network.blocks[0].attention.register_forward_hook(lambda _, given, out, seen=seen: seen.append(given[0]))
        assert task.run().metric is not None
        assert {query.dtype for query in seen} == {torch.bfloat16}


@pytest.mark.usefixtures("few")
def test_an_interrupted_run_keeps_what_is_complete(tmp_path, capsys, monkeypatch):
    run = training.Training.run

    def stop(self, advance):
        if self.attention == "performer":
            os.kill(os.getpid(), signal.SIGTERM)
        return run(self, advance)

    monkeypatch.setattr(training.Training, "run", stop)
    output, figure = tmp_path / "t.json", tmp_path / "t.pdf"
    options = [*SMALL, "--tasks=listops", "--attentions=full,performer,local"]
    assert main([*options, f"--output={output}", f"--figure={figure}"]) == 1
    assert "Missing: listops performer (seed 7), listops local (seed 7)." in capsys.readouterr().err
    content = json.loads(output.read_text())
    assert content["complete"] is False
    assert [result["attention"] for result in content["results"]] == ["full"]
    assert figure.stat().st_size > 0


def test_the_best_comes_first_and_the_diverged_last():
    def result(task, name, metric, seed=0):
        return {"task": task, "attention": name, "metric": metric, "seed": seed}

    content = {
        "results": [
            *(result("language", name, metric) for name, metric in (("full", 2.0), ("local", None), ("sblocal", 1.5))),
            *(result("listops", name, metric) for name, metric in (("full", 0.3), ("local", 0.4), ("smyrf", None))),
            result("listops", "full", 0.8, seed=1),
        ]
    }
    assert list(training.by_attention(content, "language")) == ["sblocal", "full", "local"]
    assert list(training.by_attention(content, "listops")) == ["full", "local", "smyrf"]


def refuses(capsys, options, message):
    """The tool says what is wrong in one line and ends with status 1."""
    assert main(options) == 1
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.strip())  # the display leaves an empty one
    assert captured.out == ""
    assert line.startswith("Error: ")
    assert message in line


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks=images"], "'images' is unknown"),
        (["--attentions=locale"], "'locale' is unknown"),
        (["--heads=3"], "--heads 3 does not divide --dim 16"),
        (["--memory-fraction=2"], "memory_fraction=2.0 has to lie in (0, 1]"),
        (["--lr=0"], "'0' is not a positive number"),
        (["--seed=-1"], "--seed=-1 is not valid"),
        (["--length=9", "--tasks=listops"], "length=8 is not valid"),
        (["--length=900000", "--tasks=language"], "--length 900000: the sources of the standard library are shorter"),
        (["--attentions=cluster", "--tasks=language"], "No training was completed. language: cluster left out."),
        (["--figure={folder}/f.jpg"], "the name has to end in .png, .pdf or .svg."),
        (["--output={folder}/none/r.json"], "has to be a file in a folder that exists"),
    ],
)
def test_refuses(tmp_path, capsys, options, message):
    refuses(capsys, [*SMALL, *(option.format(folder=tmp_path) for option in options)], message)
