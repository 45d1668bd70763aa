"""The two pictures: training curves, and accuracy against cost."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from .model import DEEPER, PLAIN, WITH_SE

# Okabe and Ito's palette.
COLORS = {PLAIN: "#E69F00", WITH_SE: "#0072B2", DEEPER: "#000000"}
MARKERS = {PLAIN: "o", WITH_SE: "D", DEEPER: "s"}
DPI = 150


def plot_training(rows: dict[str, dict], path: Path) -> None:
    """Draw training loss and test accuracy by epoch: the mean over seeds, in a band from lowest to highest."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, key in zip(axes, ("train_loss", "test_accuracy"), strict=True):
        for variant, row in rows.items():
            values = np.array(row[key])
            epochs = np.arange(1, values.shape[1] + 1)
            axis.plot(epochs, values.mean(0), label=variant, color=COLORS[variant], linewidth=2)
            axis.fill_between(epochs, values.min(0), values.max(0), color=COLORS[variant], alpha=0.15, lw=0)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set(yscale="log", title="Training loss", ylabel="cross-entropy (log scale)")
    axes[1].set(title="Test accuracy", ylabel="share of test images classified right")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    shown = f"mean and range of {len(values)} seeds" if len(values) > 1 else "one seed"
    figure.suptitle(f"Solar cells: plain, with inserted SE, and deeper ({shown})")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rows))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def plot_cost(rows: dict[str, dict], path: Path) -> None:
    """Draw the test accuracy against each of the three costs: small for one seed, large for the mean."""
    costs = {
        "parameters": "parameters",
        "multiply_adds": "multiply-adds of one image",
        "epoch_ms_median": "training time of one epoch, ms",
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained", sharey=True)
    for axis, (key, name) in zip(axes, costs.items(), strict=True):
        for variant, row in rows.items():
            accuracies = row["test_accuracy_per_seed"]
            look = {"color": COLORS[variant], "marker": MARKERS[variant]}
            axis.scatter([row[key]] * len(accuracies), accuracies, s=18, alpha=0.4, **look)
            axis.scatter([row[key]], [row["test_accuracy_mean"]], s=110, label=variant, edgecolors="white", **look)
        axis.set(xlabel=name, xlim=(0, 1.08 * max(row[key] for row in rows.values())))
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of test images classified right")
    figure.suptitle("Accuracy against cost: small marks are seeds, large ones their mean")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rows))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
