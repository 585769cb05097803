"""`python -m scatterbrain profile`: profile of a model of timm on a folder of images, and a plan from it.

Needs timm, torchvision, Pillow and rich: `pip install 'scatterbrain-attention[profile]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn

from scatterbrain.errors import UserError, check_whole_number, did_you_mean

PACKAGES = "pip install 'scatterbrain-attention[profile]'"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FIGURES = (".png", ".svg", ".pdf")
DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """Parser whose errors are those of the user."""

    def error(self, message: str) -> NoReturn:
        """Raise the message.

        Args:
            message: what is wrong.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}. See: {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command: 0, or 1 after a message on stderr.

    Args:
        arguments: those of the command line; None takes them from the program's.
    """
    try:
        options = make_parser().parse_args(arguments)
        profile_command(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"error: out of memory ({first_line(error)}). Give a smaller --batch-size.", file=sys.stderr)
        return 1
    return 0


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(prog="python -m scatterbrain", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    add = commands.add_parser(
        "profile",
        help="error and time of each method at each attention call of a model of timm",
        description="Error and time of each method and budget at each attention call of a model of timm, on images.",
    ).add_argument
    add("--timm", required=True, metavar="NAME", help="model of timm, such as vit_small_patch14_dinov2")
    add("--images", required=True, metavar="DIR", type=Path, help="folder of images, with its subfolders")
    weights = commands.choices["profile"].add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's weights, downloaded at need (the default)")
    weights.add_argument("--random-weights", action="store_true", help="no weights: only times mean something then")
    weights.add_argument("--checkpoint", metavar="FILE", type=Path, help="weights of the model, .safetensors or .pth")
    add("--image-size", metavar="PIXELS", type=positive, help="side of the images; default: the model's")
    add("--limit", metavar="N", type=positive, default=8, help="images of the profile (default 8)")
    add("--held-out", metavar="N", type=positive, default=4, help="images after them that check the plan (default 4)")
    add("--batch-size", metavar="N", type=positive, default=1, help="images in a batch (default 1)")
    add("--methods", nargs="+", type=names, metavar="METHOD", help="default: local performer sblocal cluster ...")
    add("--budgets", nargs="+", type=shares, metavar="SHARE", help="default: 1/32 1/16 1/8 1/4")
    add("--min-tokens", metavar="N", type=positive, default=256, help="shorter calls are left out (default 256)")
    add("--seed", metavar="N", type=int, default=0, help="seed of the random parts (default 0)")
    add("--repeats", metavar="N", type=positive, default=5, help="number of times for each median (default 5)")
    add("--device", metavar="NAME", help="default: cuda where there is one, else cpu")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and images (default float32)")
    add("--maps", nargs="*", metavar="PATTERN", help="calls with attention maps; default with --output: 3 of them")
    add("--output", metavar="FILE", type=Path, help="the report as an HTML page")
    add("--json", metavar="FILE", type=Path, help="the report as JSON")
    add("--figure", metavar="FILE", type=Path, help="heat map of the errors as an image (needs matplotlib)")
    add("--plan", metavar="FILE", type=Path, help="the plan as JSON, for scatterbrain.apply")
    goal = commands.choices["profile"].add_mutually_exclusive_group()
    goal.add_argument("--max-error", metavar="ERROR", type=float, help="largest error of a call (default 0.1)")
    goal.add_argument("--speed-up", metavar="TIMES", type=float, help="how many times as fast as full attention")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1.

    Args:
        text: the argument.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def names(text: str) -> list[str]:
    """Names that commas separate.

    Args:
        text: the argument.
    """
    return [name for name in text.split(",") if name]


def shares(text: str) -> list[float]:
    """Numbers or fractions such as 1/16, separated by commas.

    Args:
        text: the argument.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        return [float(Fraction(share)) for share in text.split(",") if share]
    except (ValueError, ZeroDivisionError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 1/16") from None


def profile_command(options: argparse.Namespace) -> None:
    """Run `profile`.

    Args:
        options: of `make_parser`.

    Raises:
        UserError: wrong options, images or weights, or a package is missing.
    """
    try:
        import timm  # noqa: F401
        import torchvision  # noqa: F401
        from PIL import Image  # noqa: F401
        from rich.console import Console

        if options.figure is not None:
            import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f"profile needs the package {error.name}. Run: {PACKAGES}") from error

    from scatterbrain.integrations.router import MAX_SEED
    from scatterbrain.tuning.choosing import check_goal, tune
    from scatterbrain.tuning.files import check_writable
    from scatterbrain.tuning.profiling import BUDGETS, METHODS, profile

    outputs = {name: getattr(options, name) for name in ("output", "json", "figure", "plan")}
    for path in outputs.values():
        if path is not None:
            check_writable(path)
    if len({os.path.abspath(path) for path in outputs.values() if path}) < sum(1 for path in outputs.values() if path):
        raise UserError("--output, --json, --figure and --plan name the same file. Give each its own.")
    max_error = 0.1 if options.speed_up is None and options.max_error is None else options.max_error
    wants_plan = options.plan or options.max_error is not None or options.speed_up is not None
    check_goal(max_error, options.speed_up)
    check_whole_number("seed", options.seed, 0, MAX_SEED)
    if options.figure is not None and options.figure.suffix not in FIGURES:
        raise UserError(f"--figure {options.figure} is no file of {', '.join(FIGURES)}. Give it such an ending.")
    found = find_images(options.images)
    model, transform, device = load_model(options)
    shown, held_out = found[: options.limit], found[options.limit :][: options.held_out]
    log = Console(stderr=True)

    def batches(paths: Sequence[Path]) -> Iterator[Any]:
        return load_batches(paths, transform, options.batch_size, device, options.dtype)

    num_batches = -(-len(shown) // options.batch_size)
    measured: set[str] = set()
    with progress(log, num_batches) as (on_batch, on_call):
        try:
            report = profile(
                model,
                (on_batch(batch) for batch in batches(shown)),
                [name for group in options.methods or [list(METHODS)] for name in group],
                [share for group in options.budgets or [list(BUDGETS)] for share in group],
                min_tokens=options.min_tokens,
                seed=options.seed,
                repeats=options.repeats,
                maps=map_patterns(options, model),
                on_call=lambda name: measured.add(name) or on_call(name),
            )
        except Exception as error:
            # layers before attention fail on images that are too small for them, each in its own way
            is_of_user = isinstance(error, UserError) or type(error).__name__ == "OutOfMemoryError"
            if options.image_size is None or measured or is_of_user:
                raise
            raise UserError(
                f"--image-size {options.image_size}: {options.timm} fails on such images ({first_line(error)}). Give "
                "another size, or leave it out."
            ) from error
    report.model = options.timm
    report.print()

    def write(path: Path | None, save: Callable[[Path], Path | None]) -> None:
        if path is not None:
            backup = save(path)
            before = f" (the file before is {backup})" if backup else ""
            log.print(f"Wrote {path}{before}", markup=False, highlight=False)

    plan = None
    try:
        if wants_plan:
            plan = tune(report, max_error=max_error, speed_up=options.speed_up)
    finally:  # a report without a plan, where none reaches the speed-up
        write(options.output, lambda path: report.save_html(path, plan))
        write(options.json, report.save)
        write(options.figure, report.save_figure)
    if plan is None:
        return
    write(options.plan, plan.save)
    plan.print()
    if held_out:
        plan.check(model, batches(held_out), repeats=min(options.repeats, 3)).print()
    else:
        log.print(f"No image is left to check the plan: {options.images} has {len(found)}.", markup=False)


def find_images(folder: Path) -> list[Path]:
    """Images of a folder and its subfolders, in the order of their names.

    Args:
        folder: the folder.

    Raises:
        UserError: it does not exist, or has none.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder} is no folder. Give a folder of images.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"--images {folder} has no image ({', '.join(SUFFIXES)}). Give a folder of images.")
    return found


def load_model(options: argparse.Namespace) -> tuple[Any, Callable, Any]:
    """Model, transform of its images, and device.

    Args:
        options: of `make_parser`.

    Raises:
        UserError: an unknown model, weights that cannot be loaded, or a device that is not there.
    """
    import timm
    import torch

    device = device_of(options.device)
    name = options.timm
    if name.split(".")[0] not in timm.list_models():
        raise UserError(f"--timm {name} is no model of timm. {did_you_mean(name, timm.list_models())}")
    if options.checkpoint is not None and not options.checkpoint.is_file():
        raise UserError(f"--checkpoint {options.checkpoint} does not exist. Check the path.")
    size = {} if options.image_size is None else {"img_size": options.image_size}
    pretrained = options.checkpoint is None and not options.random_weights
    timm.layers.set_fused_attn(True)
    try:
        if not pretrained:
            torch.manual_seed(options.seed)
        model = timm.create_model(name, pretrained=pretrained, **size)
    except TypeError as error:
        raise UserError(f"--image-size: {name} takes no other size ({error}). Leave it out.") from error
    except Exception as error:  # of the download, of many classes
        if not pretrained:
            raise UserError(f"--timm {name}: {first_line(error)}. Try another model or --image-size.") from error
        raise UserError(
            f"--timm {name}: its weights could not be loaded ({first_line(error)}). Give --checkpoint FILE, or "
            "--random-weights for times alone."
        ) from error
    if options.checkpoint is not None:
        load_weights(model, options.checkpoint)
    config = timm.data.resolve_data_config({"img_size": options.image_size}, model=model)
    transform = timm.data.create_transform(**config)
    return model.eval().to(device, getattr(torch, options.dtype)), transform, device


def device_of(name: str | None) -> Any:
    """Device of a name that is there.

    Args:
        name: the name; None for CUDA where there is one, else the CPU.

    Raises:
        UserError: it is not there.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()
    except (RuntimeError, AssertionError, ValueError) as error:  # meta has no values
        raise UserError(f"--device {name} is not there ({first_line(error)}). Give cpu or cuda.") from error
    return device


def load_weights(model: Any, path: Path) -> None:
    """Load weights into a model, without running code of the file.

    Args:
        model: a model of timm.
        path: the file.

    Raises:
        UserError: the file holds none of this model.
    """
    from timm.models import load_checkpoint

    # resizes position embeddings and renames, where the model's family has it
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        load_checkpoint(model, str(path), filter_fn=convert, weights_only=True)
    except Exception as error:  # unpickling, safetensors, keys, shapes
        raise UserError(
            f"--checkpoint {path} holds no weights of {type(model).__name__} ({first_line(error)}). Give a state dict "
            "of this model of timm."
        ) from error


def load_batches(paths: Sequence[Path], transform: Callable, batch_size: int, device: Any, dtype: str) -> Iterator[Any]:
    """Batches (B, 3, size, size) of images.

    Args:
        paths: the images.
        transform: from an image to a tensor.
        batch_size: B, of all but the last.
        device: of the batches.
        dtype: of the batches.

    Raises:
        UserError: a file is no image.
    """
    import torch
    from PIL import Image

    for start in range(0, len(paths), batch_size):
        tensors = []
        for path in paths[start : start + batch_size]:
            try:
                with Image.open(path) as image:
                    tensors.append(transform(image.convert("RGB")))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise UserError(f"{path} is no readable image ({first_line(error)}). Move it elsewhere.") from error
        yield torch.stack(tensors).to(device, getattr(torch, dtype))


def map_patterns(options: argparse.Namespace, model: Any) -> list[str]:
    """Patterns of calls whose attention maps are kept: first, middle and last attention layer where none is given.

    Args:
        options: of `make_parser`.
        model: a model of timm.
    """
    if options.maps is not None or options.output is None:
        return options.maps or []
    layers = [name for name, module in model.named_modules() if hasattr(module, "fused_attn")]
    return [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})] if layers else []


@contextlib.contextmanager
def progress(console: Any, num_batches: int) -> Iterator[tuple[Callable[[Any], Any], Callable[[str], None]]]:
    """Context with a bar of the attention calls: functions to call with each batch, and with each call's name.

    Args:
        console: of rich.
        num_batches: number of batches.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    batch = count = 0
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("attention calls", total=None)

        def on_batch(images: Any) -> Any:
            nonlocal batch
            if batch == 1:  # every batch makes as many calls as the first
                bar.update(task, total=count * num_batches)
            batch += 1
            return images

        def on_call(name: str) -> None:
            nonlocal count
            count += 1
            bar.update(task, completed=count, description=f"batch {batch}/{num_batches}, {name}")

        yield on_batch, on_call


def first_line(error: BaseException) -> str:
    """First line of an error's message without its full stop, or the error's class if it has none.

    Args:
        error: the error.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
