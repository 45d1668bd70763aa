"""A program that test_out_of_memory.py runs with failing_malloc.c preloaded: calls every op, and its backward, again
and again, with one more allocation going well each time.

    failing_calls.py OP[,OP...] EVERY        every EVERY-th allocation fails; 1: each

Prints a line for each op: its name, its calls, how many raised, and "right" or what went wrong. With PRINT_STACKS=1 in
the environment, each allocation that fails is printed with its stack.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from helpers import bits
from ops import BY_NAME, OpCase, Options
from strategies import SAME_VALUES
from torch import Tensor

SHAPE = (2, 19, 5, 7)
# Enough for two threads, in maps too small for ATen's own loops to wake a second one.
WIDE = (2, 64, 14, 14)
# And enough weights for two.
WEIGHTY, HIDDEN = (2, 256, 4, 4), 64
COPIED_ON_WRITE = "copied on write"  # where asking for a tensor's data may allocate
MOST_REPEATS = 6
OOM = ctypes.CDLL(None)  # with what failing_malloc.c exports, where that is preloaded

Call = Callable[[], list[Tensor | None]]


def variations(case: OpCase) -> Iterator[tuple[str, Options]]:
    """Those with allocations of their own: other types, layouts that are copied, results in other types. (Not the
    convolutions that are ATen's: oneDNN ends the process where it finds no memory.)"""
    plain = Options(SHAPE, requires_grad=True)
    yield "float32", plain
    yield "two threads", replace(plain, shape=WIDE, dtype=torch.float64, channels_last=True)
    if case.name.endswith("excite") or not case.has_map or case.is_public:
        mixed = replace(plain, dtype=torch.bfloat16, weight_dtype=torch.float32, pre_activation="silu")
        yield "bfloat16, float32 weights", mixed
    half = replace(plain, dtype=torch.bfloat16, channels_last=True, pre_activation="silu", post_activation="silu")
    yield "bfloat16", half
    if case.has_map:
        kind = SAME_VALUES["dims reversed"]
        yield "copied", replace(plain, maps=lambda: kind(plain_map(plain)))
    yield COPIED_ON_WRITE, replace(plain, shape=WEIGHTY, hidden=HIDDEN, requires_grad=False)
    if "training" in case.names:
        yield "no momentum", replace(plain, momentum=None)
        yield "evaluation", replace(plain, batch_statistics=False)


def plain_map(options: Options) -> Tensor:
    return replace(options, maps=None).map()


@dataclass
class Tally:
    calls: int = 0
    raised: int = 0
    wrong: list[str] = field(default_factory=list)


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or torch.equal(bits(a), bits(b)))
        for a, b in zip(found, expected, strict=True)
    )


def copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {k: t.detach().clone(memory_format=torch.preserve_format) for k, t in tensors.items() if is_tensor(t)}


def is_tensor(t: Any) -> bool:
    return isinstance(t, Tensor)


def fail_each(
    what: str, every: int, tally: Tally, call: Call, given: dict[str, Any], written: tuple[str, ...] = ()
) -> None:
    """`call` reads the tensors `given` and writes some of them."""
    before = copies(given)

    def restore() -> None:
        with torch.no_grad():
            for name in written:
                if given[name] is not None:
                    given[name].copy_(before[name])

    def differing(but: tuple[str, ...] = ()) -> list[str]:
        return [k for k in before if k not in but and not torch.equal(bits(given[k]), bits(before[k]))]

    for _ in range(2):  # what is made once is not the call's
        expected = [None if t is None else t.detach().clone() for t in call()]
        restore()
    OOM.memory_list()
    kept = call()  # its destruction, which allocates, is not the call's
    count = OOM.memory_stop()
    del kept
    restore()
    ours = [i for i in range(count) if OOM.memory_is_ours(i)]
    if not ours:
        tally.wrong.append(f"{what}: no allocation was seen")
    for number, and_tensors in [(i, more) for i in ours[::every] for more in (False, True)]:
        where = f"{what}, allocation {number} of {count}" + and_tensors * " and the memory of tensors behind it"
        print("at", where, file=sys.stderr, flush=True)
        growth = []
        while len(growth) < MOST_REPEATS and 0 not in growth:
            blocks, result, error = OOM.memory_blocks(), None, ""
            OOM.memory_fail(number, and_tensors)
            try:
                result = call()
            except (RuntimeError, MemoryError):
                error = "raised"
            finally:
                OOM.memory_stop()
            failures = OOM.memory_failures()
            tally.calls += 1
            if error:
                tally.raised += 1
                if left := differing():
                    tally.wrong.append(f"{where}: raised, but wrote {left}")
            elif not failures:
                tally.wrong.append(f"{where}: it was not reached")
            elif not same(result, expected):
                tally.wrong.append(f"{where}: another result")
            del result
            restore()
            if left := differing():
                tally.wrong.append(f"{where}: {left} changed")
            del left, error, failures
            gc.collect(0)
            growth.append(max(0, OOM.memory_blocks() - blocks))
        if 0 not in growth:
            tally.wrong.append(f"{where}: leaves blocks: {growth}")
        if not same(call(), expected):
            tally.wrong.append(f"{where}: then another result")
        restore()


def list_copying(case: OpCase, arguments: dict[str, Any]) -> None:
    """On tensors that are copied when their data is asked for. (Torch does not survive a failure of that.)"""
    copied = {k: torch._lazy_clone(t) if is_tensor(t) else t for k, t in arguments.items()}
    OOM.memory_list()
    kept = case.run(copied | {name: arguments[name] for name in case.writes})
    OOM.memory_stop()
    del kept


def fail_in(case: OpCase, every: int) -> Tally:
    tally = Tally()
    for what, options in variations(case):
        torch.manual_seed(0)
        arguments = case.make(options)
        if what == COPIED_ON_WRITE:
            list_copying(case, arguments)
        else:
            fail_each(f"{what}, forward", every, tally, lambda a=arguments: case.run(a), arguments, case.writes)
        if leaves := list(case.leaves(arguments).values()):
            y = case.run(arguments)[0]
            grad = torch.randn_like(y)

            def backward(y: Tensor = y, leaves: list[Tensor] = leaves, grad: Tensor = grad) -> list[Tensor]:
                return list(torch.autograd.grad(y, leaves, grad, retain_graph=True))

            fail_each(f"{what}, backward", every, tally, backward, arguments | {"grad": grad, "y": y})
        if OOM.memory_in_regions():
            tally.wrong.append(f"{what}: {OOM.memory_in_regions()} allocations in parallel regions")
    return tally


def declare() -> None:
    OOM.memory_fail.argtypes = [ctypes.c_long, ctypes.c_int]
    for counter in (OOM.memory_stop, OOM.memory_failures, OOM.memory_blocks, OOM.memory_in_regions):
        counter.restype = ctypes.c_long


def main() -> None:
    declare()
    names, every = sys.argv[1].split(","), int(sys.argv[2])
    torch.set_num_threads(2)
    torch.ones(2**20).add_(1)  # OpenMP's threads, whose runtime ends the process where it finds no memory for them
    OOM.memory_start()
    assert OOM.memory_is_ready()
    for name in names:
        tally = fail_in(BY_NAME[name], every)
        print(f"{name}: {tally.calls} calls, {tally.raised} raised; {tally.wrong[:5] or 'right'}", flush=True)


if __name__ == "__main__":
    main()
