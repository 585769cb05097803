"""An evaluation against a direct float64 computation of the same images: `scripts/verify_predictions.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import track

from scatterbrain.errors import UserError
from src.checkpoints import read_checkpoint
from src.datamodules.synthetic import SyntheticDataModule
from src.evaluation.predictions import PREDICTIONS_FILE, Predictions, read_predictions
from src.evaluation.results import RESULTS_FILE, Results, read_results
from src.models.t2t_vit import T2TViT
from src.tasks.build import uses_inference_model
from src.tasks.evaluation_runs import DataModule, build_classifier, run_settings
from src.tasks.resume import changed_settings, compared_settings, describe_evaluation
from src.utils.files import sha256_of_file
from src.utils.instantiate import build
from src.utils.text import abbreviate

# The largest difference of a probability that rounding explains.
TOLERANCES = {"float64": 1e-6, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
_DTYPES = {"64": "float64", "32": "float32", "16": "float16", "bf16": "bfloat16"}

# Rounding changes which keys an attention chooses by hashes, and with them a probability by up to some percent. What it
# can do in float32 is measured with images that are perturbed by this much, relatively; in which images it does is
# chance, hence a factor.
PERTURBATION = 1e-6
PERTURBATION_FACTOR = 3


def verify(run: Path, limit: int | None, batch_size: int, device: torch.device) -> int:
    """Compare and print; 1 if a first prediction or a label differs, or a probability by more than rounding, else 0.

    Args:
        run: folder of a run of run.py, or of a multirun or a run of `eval.attentions`, all of whose runs are verified.
        limit: number of images, evenly spread; None for all.
        batch_size: images of a forward pass.
        device: of the float64 model.

    Raises:
        UserError: the folder is none of a run, a file of it cannot be read, or its configuration is not that of its
            results; other runs of the folder are verified before.
    """
    runs = [run]
    if not (run / RESULTS_FILE).exists():
        folders = (path.parent for path in run.glob(f"*/{RESULTS_FILE}"))
        runs = sorted(folders, key=lambda folder: (len(folder.name), folder.name)) or [run]
    status, failed = 0, []
    console = Console()
    for folder in runs:
        if folder != run:
            console.print(f"{folder}:")
        try:
            status |= _verify_run(folder, limit, batch_size, device, console)
        except UserError as error:
            failed.append(str(error))
    if failed:
        raise UserError(" ".join(failed))
    return status


@torch.inference_mode()
def _verify_run(run: Path, limit: int | None, batch_size: int, device: torch.device, console: Console) -> int:
    results, predictions = read_results(run), read_predictions(run)
    try:
        config = _read_config(run, results)
        model, datamodule = _build(run, config, results)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{_config_file(run)} is no configuration of run.py ({reason}). Evaluate again.") from error
    dataset = datamodule.test_dataset
    positions = {str(name): position for position, name in enumerate(dataset.paths)}
    if missing := [name for name in predictions.images if name not in positions]:
        raise UserError(
            f"{run / PREDICTIONS_FILE} has images that are not in {dataset.root}: {abbreviate(missing)}. Restore the "
            "images, or evaluate again."
        )

    count = len(predictions.images)
    rows = list(range(count)) if limit is None else sorted({i * count // limit for i in range(min(limit, count))})
    order = [positions[predictions.images[row]] for row in rows]

    def compute(dtype: torch.dtype, perturbation: float = 0) -> Iterator[torch.Tensor]:
        """Probabilities (C,) of each image, on the CPU."""
        model.to(device, dtype)
        generator = torch.Generator().manual_seed(0)
        starts = range(0, len(order), batch_size)
        for start in track(starts, description=str(dtype).removeprefix("torch."), console=console):
            images = _images(datamodule, order[start : start + batch_size])
            images *= 1 + perturbation * torch.randn(images.shape, generator=generator, dtype=images.dtype)
            yield from model(images.to(device, dtype)).double().softmax(-1).cpu()

    differing, errors, exact, margins = [], [], [], []
    for row, position, probabilities in zip(rows, order, compute(torch.float64), strict=True):
        exact.append(probabilities.topk(min(5, len(probabilities))))
        first = int(exact[-1].indices[0]), int(dataset.targets[position])
        if first != (predictions.classes[row, 0], predictions.targets[row]):
            differing.append(predictions.images[row])
        errors.append(_largest_error(predictions, row, probabilities))
        margins += [float(exact[-1].values[0] - exact[-1].values[1])] if len(probabilities) > 1 else []
    console.print(
        f"{results.model}, attention {results.attention}: {len(rows) - len(differing)} of {len(rows)} first "
        f"predictions equal those of float64; largest difference of a probability {max(errors):.2e}, smallest margin "
        f"between the first two classes {min(margins, default=1):.2e}."
    )
    for name in differing[:10]:
        console.print(f"differs: {name}")

    dtype = _DTYPES.get(results.precision.partition("-")[0], "bfloat16")
    tolerance = TOLERANCES[dtype]
    if dtype == "float32" and max(errors) > tolerance:
        perturbed = zip(compute(torch.float32, PERTURBATION), exact, strict=True)
        errors_of_rounding = [float((row[top.indices] - top.values).abs().max()) for row, top in perturbed]
        tolerance = max(tolerance, PERTURBATION_FACTOR * max(errors_of_rounding))
    larger = [predictions.images[row] for row, error in zip(rows, errors, strict=True) if not error <= tolerance]
    if larger:
        console.print(
            f"{len(larger)} of {len(rows)} images have a probability that differs by more than {dtype} explains "
            f"({tolerance:.0e}): {abbreviate(larger)}"
        )
    return 1 if differing or larger else 0


def _config_file(run: Path) -> Path:
    return run / ".hydra" / "config.yaml"


def _read_config(run: Path, results: Results) -> DictConfig:
    """The configuration of a run, with the paths of the results where they came from the environment."""
    path = _config_file(run)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Give the folder of a run of run.py.")
    try:
        config = OmegaConf.load(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read. Give the folder of a run of run.py.") from error
    config.paths.data_dir, config.paths.checkpoint = results.data["dir"], results.checkpoint["path"]
    return config


def _build(run: Path, config: DictConfig, results: Results) -> tuple[T2TViT, DataModule]:
    """The model with its weights, seed and dense attentions, and the data module, both of the configuration.

    Raises:
        UserError: they are not those of the results.
    """
    datamodule = build(config.datamodule, "datamodule")
    datamodule.setup("test")
    checkpoint = Path(config.eval.ckpt).expanduser()
    classifier = build_classifier(config, checkpoint, read_checkpoint(checkpoint))
    model = classifier.model.eval()
    precision = _full_precision(str(config.trainer.precision), results.device)
    settings = run_settings(config, datamodule, sha256_of_file(checkpoint), classifier, precision)
    fast = uses_inference_model(config.model, precision)
    description = describe_evaluation([settings], fast, compared_settings(config, datamodule))
    if changes := changed_settings(results, description):
        raise UserError(
            f"{_config_file(run)} is not of the evaluation in {RESULTS_FILE}, which has {', '.join(changes)}. A resume "
            "with other options may have replaced it: give the same options as in the evaluation, or evaluate again."
        )
    for attention in model.token_attentions or ():
        attention.backend = "naive"
    if classifier.redraw and model.has_random_features:
        model.redraw_projections(classifier.seeds[0])
    return model, datamodule


def _full_precision(precision: str, device: str) -> str:
    """Lightning's full name of a precision, of which it takes short ones; its CPU has no float16 autocast."""
    full = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}.get(precision, precision)
    return "bf16-mixed" if full == "16-mixed" and device == "cpu" else full


def _images(datamodule: DataModule, positions: list[int]) -> torch.Tensor:
    """Transformed images (B, 3, size, size) float64 at positions of the test split, decoded one after another."""
    dataset = datamodule.test_dataset
    if isinstance(datamodule, SyntheticDataModule):
        pixels = dataset.pixels[[position % len(dataset.pixels) for position in positions]].double()
        mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (datamodule.mean, datamodule.std))
        return (pixels / 255 - mean) / std
    return torch.stack([datamodule.test_transform(dataset.decode(position)) for position in positions]).double()


def _largest_error(predictions: Predictions, row: int, probabilities: torch.Tensor) -> float:
    """Largest difference of the probabilities that a row of `predictions.csv` has; infinite if a class is not there."""
    classes = predictions.classes[row]
    if not np.all((classes >= 0) & (classes < len(probabilities))):
        return float("inf")
    return float(
        (probabilities[torch.as_tensor(classes)] - torch.as_tensor(predictions.probabilities[row])).abs().max()
    )
