"""Times se_ext's SE block against x.clone(), eager PyTorch and torch.compile, interleaved in one process.

python benchmarks/run.py --out benchmarks/results/inference.json
python benchmarks/run.py --workload 512x7x7 --variants eager_conv --quick
python benchmarks/run.py --batch 1 8 32 --compare benchmarks/results/inference.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import allocator
import command

VARIANTS = ["clone", "eager_conv", "eager_linear", "compile", "compile_linear", "se_ext"]
DEFAULT_VARIANTS = ["clone", "eager_conv", "eager_linear", "compile", "se_ext"]
MODES = ["inference", "train"]
DTYPES = ["float32", "float64", "bfloat16", "float16"]
ALWAYS = {"clone", "se_ext"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__)
    command.add_workload(parser)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    add("--batch", nargs="+", type=int, default=[8], help="default: 8")
    add("--mode", nargs="+", choices=MODES, default=MODES, help="default: both")
    variants_help = "default: all but compile_linear; clone and se_ext are always timed"
    add("--variants", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS, help=variants_help)
    add("--compare", type=Path, metavar="OLDER.json", help="print what became faster since these results")
    add("--rounds", type=int, default=20, help="blocks timed per variant, default: 20")
    options = parser.parse_args(arguments)
    options.variants = [name for name in VARIANTS if name in {*options.variants, *ALWAYS}]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    # Imported here so that --help, a wrong option and the restart in allocator.py don't wait for torch.
    import session

    return session.run(options)


if __name__ == "__main__":
    allocator.take_page_faults_out()
    sys.exit(main())
