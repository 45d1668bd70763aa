"""The table of the tails: SE blocks with what stands around them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.blocks import BARS, by_layout
from benchmarks.report.markdown import MODES, table
from benchmarks.summary import Row, groups

NAMES = {
    "bn_se_residual_relu": "batch norm, SE, shortcut, ReLU",
    "bn_silu_se": "batch norm, SiLU, SE",
    "bias_silu_se": "bias, SiLU, SE",
}


def tail_table(rows: Sequence[Row]) -> str:
    """One line per tail and layout, and one for both layouts together."""
    lines = []
    for (tail, mode, batch), members in groups(rows, "tail", "mode", "batch").items():
        lines += [[NAMES[tail], MODES[mode], batch, *cells] for cells in by_layout(members)]
    title = (
        "The work around the block, on the shapes of seresnet50 and efficientnet_b0: speedup of se_ext over each "
        "baseline, as min / median / geometric mean / max:"
    )
    return f"{title}\n\n{table(['tail', 'mode', 'batch', 'layout', 'rows', *BARS], lines, 'llrlr')}"
