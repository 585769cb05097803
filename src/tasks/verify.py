"""An evaluation against a direct float64 computation of the same images: `scripts/verify_predictions.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import track

from scatterbrain.errors import UserError
from src.checkpoints import load_checkpoint
from src.datamodules.dataset import load_rgb
from src.evaluation.predictions import read_predictions
from src.evaluation.results import read_results
from src.tasks.build import build_model
from src.utils.instantiate import build


@torch.inference_mode()
def verify(run: Path, limit: int | None, batch_size: int, device: torch.device) -> int:
    """Compare and print; 1 if a first prediction differs, else 0.

    Args:
        run: folder of a run of run.py.
        limit: number of images, evenly spread; None for all.
        batch_size: images of a forward pass.
        device: of the float64 model.

    Raises:
        UserError: the folder is none of a run, or a file of it cannot be read.
    """
    results, predictions = read_results(run), read_predictions(run)
    config_file = run / ".hydra" / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"{config_file} does not exist. Give the folder of a run of run.py.")
    config = OmegaConf.load(config_file)
    # null stands where the value came from the environment of that run
    config.paths.data_dir, config.paths.checkpoint = results.data["dir"], results.checkpoint["path"]

    model = build_model(config.model).eval()
    load_checkpoint(model, Path(results.checkpoint["path"]).expanduser())
    for attention in model.token_attentions or ():
        attention.backend = "naive"
    if results.random_features == "seeds":
        model.redraw_projections(results.seeds[0])
    model.double().to(device)

    datamodule = build(config.datamodule, "datamodule")
    root = Path(results.data["dir"]).expanduser() / results.data["split"]
    count = len(predictions.images)
    chosen = list(range(count)) if limit is None else sorted({i * count // limit for i in range(min(limit, count))})

    agree = 0
    largest_error, smallest_margin = 0.0, float("inf")
    differing = []
    console = Console()
    starts = range(0, len(chosen), batch_size)
    for start in track(starts, description="float64", console=console):
        rows = chosen[start : start + batch_size]
        images = [load_rgb(root / predictions.images[row], config.datamodule.get("max_image_pixels")) for row in rows]
        batch = torch.stack([datamodule.test_transform(image) for image in images])
        probability_rows = model(batch.double().to(device)).softmax(-1).cpu()
        for row, probabilities in zip(rows, probability_rows, strict=True):
            top = probabilities.topk(min(2, len(probabilities)))
            written_class = int(predictions.classes[row, 0])
            if int(top.indices[0]) == written_class:
                agree += 1
            else:
                differing.append(str(predictions.images[row]))
            written = torch.as_tensor(predictions.probabilities[row])
            known = torch.as_tensor(predictions.classes[row])
            present = known >= 0
            error = (probabilities[known[present]] - written[present]).abs().max()
            largest_error = max(largest_error, float(error))
            if len(top.values) == 2:
                smallest_margin = min(smallest_margin, float(top.values[0] - top.values[1]))

    console.print(
        f"{results.model}, attention {results.attention}: {agree} of {len(chosen)} first predictions equal those of "
        f"float64; largest difference of a probability {largest_error:.2e}, smallest margin between the first two "
        f"classes {smallest_margin:.2e}."
    )
    for name in differing[:10]:
        console.print(f"differs: {name}")
    return 0 if not differing else 1
