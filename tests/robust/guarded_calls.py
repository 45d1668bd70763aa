"""A program that test_guard_pages.py runs on guarded memory: every op, in every layout, on sizes that leave tails of
every length; or, as a proof that the guards are there, a read or a write beyond a tensor.

Prints the name of the op it is at; at the end, the number of its calls.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace

import torch
from helpers import DTYPES, HALF, make_map
from ops import CASES, LAYOUTS, OpCase
from strategies import SAME_VALUES

KINDS = ["contiguous", "dims reversed", "inside, channels last"]  # native, and copied


def shapes(rank: int, times: int) -> list[tuple[int, ...]]:
    """Points and channels one more and one less than registers have lanes, and some that are a multiple."""
    rest: list[tuple[int, ...]] = {1: [()], 2: [(1,), (3,)], 3: [(2, 1)]}[rank]
    sizes = [(1, 1), (7, 7), (8, 16), (9, 15), (17, 5), (33, 31), (3, 67)]
    sizes += [(1 + 7 * i % 71, 1 + 11 * i % 73) for i in range(1, 8 * (times - 1))]
    return [(3, channels, *rest[i % len(rest)], points) for i, (channels, points) in enumerate(sizes)]


def calls(case: OpCase, times: int) -> int:
    count = 0
    ranks = {len(spatial): channels_last for spatial, channels_last in LAYOUTS}
    for channels_last in (False, True):
        for rank in ranks if case.has_map else (2,):
            variations = case.variations(())
            for i, shape in enumerate(shapes(rank, times)):
                options = replace(
                    variations[(7 * i + rank) % len(variations)],
                    shape=shape,
                    hidden=1 + 5 * i % 19,
                    dtype=DTYPES[(i + rank) % len(DTYPES)],
                    weight_dtype=None,
                    channels_last=channels_last,
                    requires_grad=True,
                )
                if options.dtype in HALF and i % 2:  # float32 weights, as mixed precision has them
                    options = replace(options, weight_dtype=torch.float32)
                kind = SAME_VALUES[KINDS[i % 5 if i % 5 < len(KINDS) else 0]]
                if i % 5 in (1, 2):
                    options = replace(options, maps=lambda o=options, kind=kind: kind(make_map(o.shape, o.dtype)))
                arguments = case.make(options)
                y = case.run(arguments)[0]
                if case.leaves(arguments):
                    torch.autograd.grad(y, list(case.leaves(arguments).values()), torch.randn_like(y))
                count += 1
    return count


def main() -> None:
    what, times = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(0)
    torch.set_num_threads(2)
    if what in ("read", "write", "freed"):
        t = torch.randn(1000)
        where = t.data_ptr() - 1 if sys.argv[3] == "begin" else t.data_ptr() + t.nbytes
        print("beyond a tensor", flush=True)
        if what == "freed":
            where = t.data_ptr()
            del t
        ctypes.string_at(where, 1) if what != "write" else ctypes.memset(where, 1, 1)
        return
    total = 0
    for case in CASES:
        print(case, flush=True)
        total += calls(case, times)
    print(total)


if __name__ == "__main__":
    main()
