"""`python -m se_ext convert-report MODEL`: what a conversion of a network of timm or torchvision does, and what it
gains on this machine.

    python -m se_ext convert-report seresnet50
    python -m se_ext convert-report torchvision:efficientnet_b0 --batch 16 --layout nchw --train

builds the network with random weights, converts a copy, and prints

- the report of `se_ext.convert`, and the largest difference between the two in outputs and gradients, in float64;
- the time of an inference and of a training step (forward, backward, SGD), before and after: medians of some rounds, in
  which the two take turns, and the median of the ratios round by round (10 % of them are lower, and 10 % higher, than
  the numbers in parentheses);
- the most memory that tensors hold in the training step, before and after.

timm is asked for the name first, then torchvision.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import importlib
import statistics
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .convert import convert
from .measure import Step, inference, interleaved, peak_bytes, ratios, training_step

NAME = "convert-report"
# In the order in which a name is looked up. They are imported when a network of theirs is built.
LIBRARIES = ("timm", "torchvision")
FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
DEFAULT_SIZE = 224
CHECKED = 2  # images: a batch norm in training needs more than one value per channel
BEFORE, AFTER = "before", "after"


class CommandError(Exception):
    """What is wrong with the arguments."""


def add_to(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    text = __doc__ or ""
    parser = commands.add_parser(
        NAME,
        help="what se_ext.convert does to a network of timm or torchvision, and what it gains here",
        description=text.partition(": ")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(do=run)
    parser.add_argument("model", metavar="MODEL", help="a name of timm's or torchvision's, timm:NAME, torchvision:NAME")
    parser.add_argument(
        "--size", type=_positive, help=f"height and width of the images; default: the network's, or {DEFAULT_SIZE}"
    )
    parser.add_argument("--batch", type=_positive, default=8, help="number of images (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=10, help="times each is timed (default: %(default)s)")
    parser.add_argument(
        "--layout", choices=FORMATS, default="nhwc", help="nhwc is channels_last (default: %(default)s)"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train", action="store_true", help="time the training step alone")
    only.add_argument("--inference", action="store_true", help="time the inference alone")


def run(options: argparse.Namespace) -> None:
    """Prints everything.

    Raises:
        CommandError: the network cannot be had, or does not take such images.
    """
    trains = not options.inference
    if trains and options.batch < CHECKED:
        raise CommandError(
            f"expected --batch to be {CHECKED} or more for a training step, got {options.batch}; "
            "--inference times the inference alone"
        )
    library, plain = build(options.model)
    size = options.size or _size_of(plain)
    plain = plain.to(memory_format=FORMATS[options.layout])  # type: ignore[call-overload]
    images = torch.randn(options.batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    images = images.to(memory_format=FORMATS[options.layout])
    checked = torch.randn(CHECKED, 3, size, size, generator=torch.Generator().manual_seed(1))
    _try(plain, checked, options.model)
    print(
        f"{options.model.rpartition(':')[2]} of {library}, batch {options.batch}, images {size}x{size}, float32, "
        f"{options.layout}, {torch.get_num_threads()} threads\n"
    )
    ours = copy.deepcopy(plain)
    report = convert(ours, verify=checked)
    print(report, flush=True)
    if not report.converted:
        return
    models = {BEFORE: plain, AFTER: ours}
    print()
    if not options.train:
        _print_times("inference", {name: inference(m, images) for name, m in models.items()}, options.rounds)
    if trains:
        steps = {name: training_step(m, images) for name, m in models.items()}
        _print_times("training step", steps, options.rounds)
        before, after = (peak_bytes(steps[name], models[name]) for name in (BEFORE, AFTER))
        print(
            f"peak memory of the training step: {before / 2**20:.1f} → {after / 2**20:.1f} MB, "
            f"{after / before:.2f} of it"
        )


def _print_times(what: str, steps: dict[str, Step], rounds: int) -> None:
    seconds = interleaved(steps, _progress(rounds, what))
    before, after = (f"{1e3 * statistics.median(seconds[name]):.1f}" for name in (BEFORE, AFTER))
    ratio = ratios(seconds[BEFORE], seconds[AFTER])
    print(
        f"{what}: {before} → {after} ms, {ratio.median:.2f} times as fast ({ratio.low:.2f} to {ratio.high:.2f})",
        flush=True,
    )


def _progress(rounds: int, what: str) -> Iterable[int]:
    """The rounds, with a bar on a terminal where tqdm is installed."""
    try:
        tqdm: Any = importlib.import_module("tqdm").tqdm
    except ImportError:
        return range(rounds)
    bar: Iterable[int] = tqdm(range(rounds), desc=what, unit="round", leave=False, disable=None, file=sys.stderr)
    return bar


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text!r}")
    return int(text)


# ---- the network ----


def build(name: str) -> tuple[str, nn.Module]:
    """The library that has a network of this name, and the network, with random weights and no batch norm that is zero:
    what such a one gives hides the blocks behind it.

    Args:
        name: as the libraries call it, with "timm:" or "torchvision:" in front or nothing.

    Raises:
        CommandError: no library that can be imported has it.
    """
    prefix, _, model = name.rpartition(":")
    if prefix not in ("", *LIBRARIES):
        raise CommandError(f"expected MODEL to be NAME, timm:NAME or torchvision:NAME, got {name!r}")
    wanted = (prefix,) if prefix else LIBRARIES
    missing, names = [], []
    for library in wanted:
        try:
            module = importlib.import_module(library)
        except Exception as error:  # not installed, or built for another torch
            missing.append(_why_not_imported(library, error))
            continue
        if _has(module, model):
            torch.manual_seed(0)
            return library, _without_zero_norms(_create(module, model))
        names += [f"{library}:{found}" for found in difflib.get_close_matches(model, names_of(module), 3)]
    raise CommandError(
        ". ".join(
            [
                f"expected MODEL to be a network of {' or '.join(wanted)}, got {name!r}",
                *missing,
                *([f"Names like it: {', '.join(names)}"] if names else []),
            ]
        )
    )


def _why_not_imported(library: str, error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == library:
        return f"{library} is not installed (pip install {library})"
    return f"{library} cannot be imported ({type(error).__name__}: {error})"


def names_of(library: ModuleType) -> list[str]:
    """The names of a library's networks that take images and give logits."""
    names: list[str] = (
        library.list_models() if library.__name__ == "timm" else library.models.list_models(module=library.models)
    )
    return names


def _has(library: ModuleType, name: str) -> bool:
    return bool(library.is_model(name)) if library.__name__ == "timm" else name in names_of(library)


def _create(library: ModuleType, name: str) -> nn.Module:
    model: nn.Module = (
        library.create_model(name, pretrained=False)
        if library.__name__ == "timm"
        else library.models.get_model(name, weights=None)
    )
    return model


def _without_zero_norms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and not module.weight.any():
            nn.init.ones_(module.weight)
    return model


def _size_of(model: nn.Module) -> int:
    config = getattr(model, "pretrained_cfg", None) or {}
    return int(config.get("input_size", (3, DEFAULT_SIZE, DEFAULT_SIZE))[-1])


def _try(model: nn.Module, images: Tensor, name: str) -> None:
    try:
        inference(model, images)()
    except Exception as error:  # what a network says of images of another size
        size = "x".join(map(str, images.shape[1:]))
        raise CommandError(f"{name} does not take images of {size} ({type(error).__name__}: {error})") from error
