"""Accuracy against cost, as a table and as one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .model import DEEPER, PLAIN, WITH_SE, multiply_adds
from .train import Run


def summarize(runs: Sequence[Run], size: int) -> dict[str, object]:
    """Return one table row: a variant's numbers over its seeds. The accuracy is that of the last epoch, never that of
    the best one, which would be chosen by the test set."""
    accuracies = [run.test_accuracy[-1] for run in runs]
    return {
        "parameters": sum(p.numel() for p in runs[0].net.parameters()),
        "multiply_adds": multiply_adds(runs[0].net, size),
        "test_accuracy_per_seed": accuracies,
        "test_accuracy_mean": float(np.mean(accuracies)),
        "epoch_ms_median": float(np.median(np.concatenate([run.epoch_ms for run in runs]))),
        "train_loss": [run.train_loss for run in runs],
        "test_accuracy": [run.test_accuracy for run in runs],
    }


def difference(row: dict, plain: dict) -> tuple[float, float | None]:
    """Return by how much a variant is more accurate than the plain network, seed by seed: the mean and its standard
    error (None with one seed). The same split and the same batches make the pairs."""
    pairs = np.subtract(row["test_accuracy_per_seed"], plain["test_accuracy_per_seed"])
    if len(pairs) < 2:
        return float(pairs.mean()), None
    return float(pairs.mean()), float(pairs.std(ddof=1) / math.sqrt(len(pairs)))


def table(rows: dict[str, dict], majority: float) -> str:
    """Return the rows as aligned text."""
    plain = rows[PLAIN]
    header = ("network", "parameters", "multiply-adds", "epoch, ms", "test accuracy, %", "against plain, points")
    cells = [header]
    for variant, row in rows.items():
        against = ""
        if variant != PLAIN:
            mean, error = difference(row, plain)
            against = f"{100 * mean:+.2f}" + ("" if error is None else f" ± {100 * error:.2f}")
        costs = [
            f"{row[key]:,.0f} (x{row[key] / plain[key]:.2f})"
            for key in ("parameters", "multiply_adds", "epoch_ms_median")
        ]
        cells.append((variant, *costs, f"{100 * row['test_accuracy_mean']:.2f}", against))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    note = f"To call every cell intact is right for {100 * majority:.2f} %. ±: standard error over the seeds, of pairs."
    return "\n".join([*lines, note])


def verdict(rows: dict[str, dict]) -> str:
    """Return what the numbers show of SE and of depth: more than two standard errors, or nothing."""
    sentences = []
    for variant in (WITH_SE, DEEPER):
        mean, error = difference(rows[variant], rows[PLAIN])
        if error is None:
            shown = "one seed shows nothing"
        elif mean > 2 * error:
            shown = "more accurate than the plain network"
        elif mean < -2 * error:
            shown = "less accurate than the plain network"
        else:
            shown = "no difference from the plain network that these seeds can tell from chance"
        sentences.append(f"{variant}: {shown}")
    return "; ".join(sentences)
