"""Made-up results files, every number of which can be worked out by hand."""

from __future__ import annotations

from typing import Any

from benchmarks import summary

HEADER: dict[str, Any] = {
    "kind": "blocks",
    "settings": {"quick": False},
    "date": "2026-01-02T03:04:05+00:00",
    "notes": ["page faults taken out"],
    "machine": {"cpu": "a CPU", "gpu": None, "threads": 2, "isa": "avx2"},
    "software": {"torch": "2.13.0"},
    "git": {"commit": "0123456789abcdef", "dirty": False},
}


def block_row(samples: dict[str, list[float]], **other: Any) -> dict[str, Any]:
    """A row of one SE block; by default float32, batch 8, forward and backward, NCHW."""
    given = {"name": "block", "device": "cpu", "dtype": "float32", "batch": 8, "layout": "nchw", "mode": "train"}
    shape = {"channels": 256, "height": 56, "width": 56, "hidden": 8, "activation": "ReLU", "gate": "Sigmoid"}
    return summary.add_metrics(
        {
            **given,
            "workload": {**shape, "uses": [{"model": "net", "module": "SEModule", "count": 3}]},
            "bytes_x": 1000,
            "other_cpu_share": 0.0,
            "variants": {variant: {"samples_us": times} for variant, times in samples.items()},
            **other,
        }
    )
