"""The two pictures: training curves, and what the gates do for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from .model import CLASSES, FUSED, NO_SE, PLAIN

# Okabe and Ito's palette; se_ext's line is dashed and on top, so the plain one shows where the two coincide.
VARIANT_STYLE = {
    NO_SE: {"color": "#E69F00", "linewidth": 2},
    PLAIN: {"color": "#56B4E9", "linewidth": 4},
    FUSED: {"color": "#000000", "linewidth": 1.5, "linestyle": (0, (4, 2))},
}
# Paul Tol's muted palette and black; neighbouring classes also differ in line style.
CLASS_COLORS = (
    "#332288", "#88CCEE", "#117733", "#DDCC77", "#CC6677",
    "#AA4499", "#44AA99", "#882255", "#999933", "#000000",
)  # fmt: skip
DPI = 150


def plot_training(rows: dict[str, dict], path: Path) -> None:
    """Draw training loss and test accuracy by epoch: the mean over seeds, in a band from lowest to highest.

    Args:
        rows: variant -> a table row, of which "train_loss" and "test_accuracy" [seeds, epochs] are drawn.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for axis, key in zip(axes, ("train_loss", "test_accuracy"), strict=True):
        for variant, row in rows.items():
            values, style = np.array(row[key]), VARIANT_STYLE[variant]
            epochs = np.arange(1, values.shape[1] + 1)
            axis.plot(epochs, values.mean(0), label=variant, **style)
            axis.fill_between(epochs, values.min(0), values.max(0), color=style["color"], alpha=0.15, lw=0)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    axes[0].set(yscale="log", title="Training loss", ylabel="cross-entropy (log scale)")
    axes[1].set(title="Test accuracy", ylabel="share of test images classified right")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    shown = f"mean and range of {len(values)} seeds" if len(values) > 1 else "one seed"
    figure.suptitle(f"Digits with and without Squeeze-and-Excitation ({shown})")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rows))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def class_means(gates: Tensor, labels: Tensor) -> np.ndarray:
    """Return the mean gate per class, [10, C], of gates [N, C] and labels [N]."""
    return np.stack([gates[labels == digit].mean(0).numpy() for digit in range(CLASSES)])


def plot_gates(gates: Sequence[Tensor], labels: Tensor, whose: str, path: Path) -> None:
    """Draw each block's mean gate by channel, one line per digit (after Hu et al. 2017, arXiv 1709.01507).

    Args:
        gates: per block, the gate [N, C] of every test image.
        labels: [N].
        whose: the net the gates are from, for the title.
    """
    size = (11, 2.9 * len(gates))
    figure, axes = plt.subplots(len(gates), 1, figsize=size, layout="constrained", sharey=True)
    for number, (axis, gate) in enumerate(zip(axes, gates, strict=True), start=1):
        means = class_means(gate, labels)
        for digit, color in enumerate(CLASS_COLORS):
            axis.plot(means[digit], color=color, linestyle=("-", "--")[digit % 2], lw=1.3, label=str(digit))
        spread = means.std(0).mean()
        channels = gate.shape[1]
        axis.set_title(f"Block {number}: {channels} channels, standard deviation between digits {spread:.3f}")
        axis.set(xlim=(0, channels - 1), ylabel="mean gate")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("channel")
    figure.suptitle(f"How far each digit opens each channel: mean SE gate over the test images ({whose})")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", title="digit")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
