"""A program that test_fuzz.py runs: calls of every op with arguments of which some are nonsense that the schema lets
through, from Python and from TorchScript, where no wrapper of ours helps.

    fuzzed_calls.py FIRST CALLS PROGRESS

Call number i is the same at every run. Its number is in the file PROGRESS before it begins, so a call that ends the
process or never ends is known. Each call gives the formula's result or raises a Python exception; what does otherwise
is printed, one line each.
"""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ops import CASES, OpCase, in_float64
from strategies import OTHER_VALUES, SAME_VALUES
from torch import Tensor

SHAPES = [
    (2, 3, 5),
    (2, 5, 3, 4),
    (1, 8, 7, 7),
    (3, 17, 2, 2),
    (2, 4, 2, 3, 2),
    (0, 3, 2, 2),
    (2, 0, 3, 3),
    (2, 3, 0, 2),
]
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64]
DTYPES += [torch.float8_e4m3fn, torch.uint16]
STRINGS = [
    "",
    "ReLU",
    "relu\0",
    "sigmoid",
    "identity",
    "double_sigmoid",
    "hardsigmoid",
    "gelu",
    "x" * 100_000,
    "é",
    "%s%n",
]
FLOATS = [0.0, -1.0, float("nan"), float("inf"), 1e308, 1e-320]
INTEGERS = [-(2**63), -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**62, 2**63 - 1]
# What a mistake in the library says, or in how it calls torch; and a message without end.
NOT_AN_ANSWER = ("INTERNAL ASSERT", "Unknown exception")


# ---- nonsense ----


def other_shape(t: Tensor, rng: random.Random) -> Tensor:
    shape = list(t.shape)
    kind = rng.randrange(6)
    if kind == 0:
        shape.append(rng.choice([0, 1, 2]))
    elif kind == 1 and shape:
        shape.pop(rng.randrange(len(shape)))
    elif kind == 2:
        rng.shuffle(shape)
    elif shape:
        shape[rng.randrange(len(shape))] = rng.choice([0, 1, 2, 3, 64])
    return torch.randn(shape).to(t.dtype)


def huge(t: Tensor, rng: random.Random) -> Tensor:
    """Of as many elements as nobody has memory for: without memory, or all of them one value."""
    shape = [rng.choice([size, size, 2**20, 2**31, 2**33]) for size in t.shape]
    if math.prod(shape) >= 2**60:
        return t
    if rng.random() < 0.7:
        return torch.empty(shape, dtype=t.dtype, device="meta")
    shape = [min(size, 2**20) for size in shape]
    return torch.zeros((), dtype=t.dtype).expand(shape) if torch.Size(shape).numel() > 2**36 else t


def sparse(t: Tensor, rng: random.Random) -> Tensor:
    kinds: list[Callable[[], Tensor]] = [
        t.to_sparse,
        lambda: t.to_mkldnn(),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
        lambda: torch.nested.nested_tensor([t]),
        lambda: torch._efficientzerotensor(t.shape, dtype=t.dtype),
        lambda: torch._neg_view(t),
        lambda: torch.empty(0, dtype=t.dtype),
        lambda: torch.tensor(1.0, dtype=t.dtype),
    ]
    return rng.choice(kinds)()


def part_of(t: Tensor, other: Tensor | None) -> Tensor | None:
    """A tensor of t's shape in the memory of another."""
    if other is None or other.numel() < t.numel() or other.dtype is not t.dtype:
        return other
    return other.detach().as_strided(t.shape, t.stride(), other.storage_offset()) if t.is_contiguous() else other


def a_name(rng: random.Random, names: list[str]) -> str:
    return rng.choice(names)


def changed(case: OpCase, arguments: dict[str, Any], rng: random.Random) -> set[str]:
    """Changes some arguments; the names of those whose values, not their memory alone, are others."""
    others: set[str] = set()
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    for name in rng.sample(list(arguments), min(len(arguments), rng.choice([0, 1, 1, 1, 2, 3]))):
        value = arguments[name]
        if value is None or (isinstance(value, Tensor) and rng.random() < 0.05):
            value = arguments[rng.choice(tensors)] if value is None else None
        elif isinstance(value, Tensor):
            t = value.detach()
            kind = rng.randrange(9)
            if kind <= 1:
                t = rng.choice(list(SAME_VALUES.values()))(t) if t.dim() else t
                arguments[name] = t
                continue
            if kind == 2:
                t = t.to(rng.choice(DTYPES))
            elif kind == 3:
                t = other_shape(t, rng)
            elif kind == 4:
                t = huge(t, rng)
            elif kind == 5:
                t = sparse(t, rng)
            elif kind == 6:
                t = part_of(t, arguments[rng.choice(tensors)])
            elif kind == 7 and t.dim() > 1:
                t = rng.choice(list(OTHER_VALUES.values()))(t)
            else:
                t = t * rng.choice([0.0, float("nan"), float("inf"), 1e30])
            value = t
        elif isinstance(value, str):
            value = a_name(rng, STRINGS)
        elif isinstance(value, bool):
            value = not value
        elif isinstance(value, float):
            value = rng.choice(FLOATS)
        elif name == "mask":
            value = [rng.random() < 0.5 for _ in value]
        elif isinstance(value, list):
            value = [rng.choice(INTEGERS) for _ in range(rng.randrange(8))]
        arguments[name] = value
        others.add(name)
    return others


# ---- calls ----


def scripted(case: OpCase) -> Callable[..., Any]:
    """The op called from TorchScript."""
    schema = case.op._schema
    types = {"List[int]": "List[int]", "List[bool]": "List[bool]"}
    listed = ", ".join(f"{a.name}: {types.get(str(a.type), annotation(a))}" for a in schema.arguments)
    passed = ", ".join(a.name for a in schema.arguments)
    source = f"def call({listed}):\n    return torch.ops.se_ext.{case.name}({passed})\n"
    return torch.jit.CompilationUnit(source).call


def annotation(argument: Any) -> str:
    return str(argument.type.annotation_str)


def is_comparable(arguments: dict[str, Any]) -> bool:
    tensors = [t for t in arguments.values() if isinstance(t, Tensor)]
    return all(
        t.layout is torch.strided
        and not t.is_nested
        and not t.is_quantized
        and t.device.type == "cpu"
        and t.numel() < 10**6
        and (not t.is_floating_point() or bool(t.double().isfinite().all() and t.double().abs().max() < 1e4))
        for t in tensors
        if t.numel() > 0
    ) and all(t.device.type == "cpu" and t.layout is torch.strided and not t.is_nested for t in tensors)


def said(error: BaseException) -> str:
    return str(error).split("\n")[0]


class Wrong(Exception):
    """An answer that is neither the formula's nor an error."""


def attempt(case: OpCase, call: Callable[..., Any], rng: random.Random) -> str:
    """What became of the call: "right", "accepted" (the formula has nothing to say of it) or "refused"."""
    rows = case.variations(())
    options = replace(rng.choice(rows), shape=rng.choice(SHAPES), hidden=rng.choice([0, 1, 5]))
    try:
        arguments = case.make(options)  # of a backward op, what forward gave
        others = changed(case, arguments, rng)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return "impossible"  # torch has no such tensor, or forward refuses the options
    is_sane = is_comparable(arguments)
    exact_arguments = in_float64(arguments) if is_sane else {}
    is_recorded = bool(case.differentiable) and rng.random() < 0.5
    if is_recorded:
        for name in case.differentiable:
            t = arguments[name]
            if isinstance(t, Tensor) and t.is_floating_point() and t.is_leaf:
                arguments[name] = t.requires_grad_()
    try:
        found = call(*arguments.values())
        outputs = [] if found is None else [found] if isinstance(found, Tensor) else list(found)
        if is_recorded and isinstance(outputs[0], Tensor) and outputs[0].requires_grad:
            outputs[0].sum().backward()
    except (RuntimeError, TypeError, ValueError, NotImplementedError, IndexError) as error:
        if any(words in str(error) for words in NOT_AN_ANSWER) or len(str(error)) > 500_000:
            raise Wrong(f"raised {said(error)}") from None
        return "refused"
    saved = {name for name in (case.forward[1] if case.forward else ()) if name} | {"saved"}
    written = set(case.writes) - {"input"}  # running statistics, which may be each other
    if not is_sane or 0 in options.shape or others & (saved | written) or options.hidden == 0:
        return "accepted"
    if case.forward and others - {"grad_output", "mask"}:
        return "accepted"  # what forward saved is of other arguments
    if 0 < arguments.get("eps", 1) < torch.finfo(options.accumulate).tiny:
        return "accepted"  # zero in the accumulation type, in which a channel without variance is then NaN
    results = [*outputs, *(arguments[name] for name in case.writes)]
    try:
        exact = case.exact(exact_arguments)
    except Exception as error:
        if "eps must be positive" in str(error):
            return "accepted"  # torch.nn.functional's rule; the ops compute what is written
        raise Wrong(f"gave {[tuple(t.shape) for t in outputs if t is not None]}; the formula: {said(error)}") from None
    for i, (ours, theirs) in enumerate(zip(results, exact, strict=True)):
        if theirs is None or ours is None:
            continue
        a, b = ours.detach().double(), theirs.detach().double()
        if a.shape != b.shape:
            raise Wrong(f"output {i} is of shape {tuple(a.shape)}; the formula's {tuple(b.shape)}")
        if b.numel() == 0 or not b.isfinite().all() or b.abs().max() > 1e4:
            continue  # a gradient through a batch norm without variance, or a type's largest number
        # A wrong element, stride or name is off by more than half types are; precision is tested elsewhere.
        if not (a - b).abs().max() <= 0.05 * b.abs().max().clamp_min(0.3):
            raise Wrong(f"output {i} is off by {(a - b).abs().max():.3g}, of {b.abs().max():.3g}")
    return "right"


def main() -> None:
    first, calls, progress = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    callers = {case.name: (case.op, scripted(case)) for case in CASES}
    became: dict[str, int] = {}
    with progress.open("w") as at:
        for i in range(first, first + calls):
            rng = random.Random(i)
            torch.manual_seed(i)
            case = CASES[i % len(CASES)]
            at.seek(0)
            at.write(f"{i} {case}".ljust(60))
            at.flush()
            try:
                result = attempt(case, rng.choice(callers[case.name]), rng)
            except Wrong as wrong:
                print(f"call {i}, {case}: {wrong}", flush=True)
                result = "wrong"
            became[result] = became.get(result, 0) + 1
    print(became)


if __name__ == "__main__":
    main()
