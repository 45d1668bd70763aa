"""The example behind `make insertion`: train, compare, draw, write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..digits.report import provenance, whole_files
from . import data, plots, report, train

FULL = {"epochs": 20, "seeds": [0, 1, 2, 3, 4], "size": 64}
QUICK = {"epochs": 2, "seeds": [0], "size": 32}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, with --quick's or the full mode's defaults filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.insertion",
        description="Train a CNN on photographs of solar cells: plain, with inserted SE blocks, with twice the depth.",
    )
    option = parser.add_argument
    option("--out", type=Path, default=Path("demo_out/insertion"), help="folder to write to (%(default)s)")
    option("--epochs", type=int, help=f"epochs per run ({FULL['epochs']}; quick: {QUICK['epochs']})")
    option("--seeds", type=int, nargs="+", help=f"seeds, each with its own split ({FULL['seeds']}; quick: [0])")
    option("--size", type=int, help=f"pixels of an image's side ({FULL['size']}; quick: {QUICK['size']})")
    option("--quick", action="store_true", help="few epochs, one seed, small images: for a first look")
    option("--threads", type=int, default=1, help="threads torch may use (%(default)s)")
    options = parser.parse_args(argv)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name, least in (("epochs", 1), ("threads", 1), ("size", 16)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected {least} or more, got {getattr(options, name)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; return its exit code."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    cells = data.load(options.size)
    runs = train.train_all(cells, options.seeds, options.epochs)
    rows = {name: report.summarize(r, options.size) for name, r in runs.items()}
    majority = 1 - cells.labels.double().mean().item()
    print(report.table(rows, majority))
    print(report.verdict(rows))
    results = {
        "variants": rows,
        "seeds": options.seeds,
        "epochs": options.epochs,
        "size": options.size,
        "batch_size": train.BATCH_SIZE,
        "images": len(cells.labels),
        "share_of_the_larger_class": majority,
        "verdict": report.verdict(rows),
        **provenance(),
    }
    with whole_files(options.out) as scratch:
        (scratch / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        plots.plot_training(rows, scratch / "training.png")
        plots.plot_cost(rows, scratch / "cost.png")
    print(f"wrote results.json, training.png and cost.png to {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
