"""The table of the tails: SE blocks with what stands around them."""

from __future__ import annotations

from collections.abc import Sequence

from block_tables import BARS, TITLES, four
from markdown_table import MODES, table
from summary import Row, groups, summarize

NAMES = {
    "bn_se_residual_relu": "batch norm, SE, shortcut, ReLU",
    "bn_silu_se": "batch norm, SiLU, SE",
    "bias_silu_se": "bias, SiLU, SE",
}


def tail_table(rows: Sequence[Row]) -> str:
    """One line per tail and layout, and one for both layouts together."""
    lines = []
    for (tail, batch), members in groups(rows, "tail", "batch").items():
        layouts = {layout: found for (layout,), found in groups(members, "layout").items()}
        if len(layouts) > 1:
            layouts["both"] = members
        for layout, found in layouts.items():
            speedups = [four(summarize(found, baseline)) for baseline in TITLES]
            lines.append([NAMES[tail], MODES[members[0]["mode"]], batch, layout, len(found), *speedups])
    title = (
        "The work around the block, on the shapes of seresnet50 and efficientnet_b0: speedup of se_ext over each "
        "baseline, as min / median / geometric mean / max:"
    )
    return f"{title}\n\n{table(['tail', 'mode', 'batch', 'layout', 'rows', *BARS], lines, 'llrlr')}"
