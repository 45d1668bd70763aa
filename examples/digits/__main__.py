"""The demo behind `make demo`: train, compare, draw, write."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import data, plots, report, train
from .model import FUSED, PLAIN, gates

FULL = {"epochs": 20, "seeds": [0, 1, 2]}
QUICK = {"epochs": 5, "seeds": [0]}
INTERRUPTED = 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, with --quick's or the full mode's defaults filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits",
        description="Train a small CNN on digits without SE, with SE in plain PyTorch and with se_ext.",
    )
    option = parser.add_argument
    option("--out", type=Path, default=Path("demo_out"), help="folder to write to (%(default)s)")
    option("--epochs", type=int, help=f"epochs per run ({FULL['epochs']}; quick: {QUICK['epochs']})")
    option("--seeds", type=int, nargs="+", help=f"seeds ({FULL['seeds']}; quick: {QUICK['seeds']})")
    option("--quick", action="store_true", help="few epochs and one seed, for a first look or CI")
    option("--threads", type=int, default=1, help="threads torch may use (%(default)s)")
    options = parser.parse_args(argv)
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("epochs", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(options, name)}")
    return options


def demo(options: argparse.Namespace) -> bool:
    """Run everything; return whether the two SE variants reached the same accuracy."""
    # One thread unless asked: where another program holds a core, OpenMP's spinning barriers make two threads
    # many times slower than one on a net this small.
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    digits = data.load()
    runs = train.train_all(digits, options.seeds, options.epochs)
    rows = {name: report.summarize(r, train.peak_step_bytes(name, digits)) for name, r in runs.items()}
    agreement = train.agreement([run.correct for run in runs[PLAIN]], [run.correct for run in runs[FUSED]])
    print(report.table(rows))
    print(report.verdict(options.seeds, agreement))

    results = {
        "variants": rows,
        "agreement": {**vars(agreement), "holds": agreement.holds},
        "seeds": options.seeds,
        "epochs": options.epochs,
        "batch_size": train.BATCH_SIZE,
        "train_images": len(digits.train_labels),
        "test_images": len(digits.test_labels),
        **report.provenance(),
    }
    with report.whole_files(options.out) as scratch:
        (scratch / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        plots.plot_training(rows, scratch / "training.png")
        block_gates = gates(runs[FUSED][0].net, digits.test_images)
        whose = f"se_ext, seed {options.seeds[0]}"
        plots.plot_gates(block_gates, digits.test_labels, whose, scratch / "gates.png")
    print(f"wrote results.json, training.png and gates.png to {options.out}")
    return agreement.holds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; return its exit code: 0, 1 where the SE variants disagree, 130 after Ctrl-C."""
    options = parse(argv)
    try:
        return 0 if demo(options) else 1
    except KeyboardInterrupt:
        print("interrupted: no half-written file is left", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main())
