"""An SE block on a GPU, alone or with what stands around it, the most telling rows first."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import summary
from benchmarks.cases import tails
from benchmarks.cases.blocks import BlockCase, build
from benchmarks.cases.problem import LAYOUTS, SEED, Problem, draw_problem, reference
from benchmarks.cases.problem import check as check_block
from benchmarks.cases.workloads import Workload, read_workloads
from benchmarks.measure import allocator
from benchmarks.measure.case import Case, Work, WrongResult
from benchmarks.measure.timing import Plan, Samples, Step, do_nothing, interleave
from benchmarks.summary import LARGE, WALL, WORKLOADS
from se_ext import _C

SE, SHORTCUT, BN = "se", "se_residual_relu", "bn_se_residual_relu"
LARGE_NAMES = (
    "256x56x56-m16-relu-sigmoid",
    "512x28x28-m32-relu-sigmoid",
    "1024x14x14-m64-relu-sigmoid",
    "2048x7x7-m128-relu-sigmoid",
)
# Block → batch: what csrc/cuda/plan.cpp predicts for these is in docs/tuning.md.
PREDICTED = {
    "256x56x56-m16-relu-sigmoid": 32,
    "1024x14x14-m64-relu-sigmoid": 256,
    "2048x7x7-m128-relu-sigmoid": 256,
}
AUTO, PATHS = "auto", ("cluster", "chunked", "whole")
# torch.compile takes seconds per shape: these stand for all.
COMPILED = ("256x56x56-m16-relu-sigmoid", "1024x14x14-m64-relu-sigmoid", "672x14x14-m28-silu-sigmoid")
EAGER = ("eager_conv", "eager_linear")
COMPILE = "compile_linear"
COPIES = ("clone", "copy_")
DRAWN = 8  # samples that are drawn; a larger batch repeats them
WARM_CALLS = 50
TAILS = {SHORTCUT: tails.Tail("train", None, silu=False, residual=True), BN: tails.TAILS[BN]}
# Of the norm (see tails.distance); half types round.
ALLOWED = {"float32": tails.ALLOWED, "bfloat16": 2e-2, "float16": 4e-3}


@dataclass(frozen=True)
class Sizes:
    """`large`: bytes of x from which on it is large. `ring`: bytes over which the inputs and outputs of calls in turn
    spread, more than a GPU's caches hold."""

    large: int = 256_000_000
    ring: int = 160 * 2**20


QUICK = Sizes(large=1_000_000, ring=2**21)


@dataclass(frozen=True)
class GpuCase(Case):
    """`warm`: all calls have one input, which stays in cache where it fits."""

    group: str
    tail: str
    mode: str
    workload: Workload
    layout: str
    dtype: str
    batch: int
    warm: bool
    compiled: bool
    device: str = "cuda"
    sizes: Sizes = Sizes()

    @property
    def kind(self) -> str:
        cache = ", warm" if self.warm and self.group == WORKLOADS else ""
        return f"{self.group}, {self.tail}, {self.mode}, {self.dtype}{cache}"

    def measure(self, plan: Plan) -> summary.Row:
        return measure_row(self, torch.device(self.device), self.sizes, plan)

    def fallback(self) -> GpuCase | None:
        """Where torch.compile fails, the row is measured without it."""
        return dataclasses.replace(self, compiled=False) if self.compiled else None

    @property
    def variants(self) -> tuple[str, ...]:
        return (*EAGER, *([COMPILE] if self.compiled else []), summary.OURS)

    def is_plain(self) -> bool:
        """A large map, forward, nothing around the block."""
        return (self.group, self.tail, self.mode) == (LARGE, SE, "inference")

    def __str__(self) -> str:
        cache = " warm" if self.warm else ""
        what = f"{self.tail} {self.mode} {self.workload.name} {self.layout} {self.dtype} batch {self.batch}"
        return f"{self.group}{cache}: {what}"


@dataclass(frozen=True)
class AsideCase(Case):
    """Something else of a plain case, in a list of its own."""

    of: GpuCase

    def __str__(self) -> str:
        return f"{self.kind} of {self.of}"


@dataclass(frozen=True)
class MemoryCase(AsideCase):
    """The extra memory of a plain case's inference, into a new tensor and in place."""

    into = kind = "memory"

    def measure(self, plan: Plan) -> summary.Row:
        return measure_memory(self.of, torch.device(self.of.device))


@dataclass(frozen=True)
class PathsCase(AsideCase):
    """A case of the block alone on every path of the CUDA kernels, beside the path that they choose; in training the
    path of the backward, which is forced on the forward too."""

    into = kind = "paths"

    def measure(self, plan: Plan) -> summary.Row:
        return measure_paths(self.of, torch.device(self.of.device), plan)


@dataclass(frozen=True)
class BesideCase(BlockCase):
    """se_ext on the CPU: what stands beside the GPU's rows."""

    kind = "the CPU"

    def measure(self, plan: Plan) -> summary.Row:
        return {**super().measure(plan), "group": WORKLOADS, "tail": SE, "warm": True}


def work(text: str, *, layout: Sequence[str], device: Sequence[str], variants: Sequence[str], quick: bool) -> Work:
    """What the targets are about first: the budget of time may end before the list does. The first device is the one
    that is measured (a CPU only to see that it works); where the CPU is among them, its rows stand beside."""
    if "cuda" in device and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch finds no CUDA device")
    where = device[0]
    first, rest = split(cases(text, layout, QUICK if quick else Sizes(), COMPILE in variants, quick, where))
    memory = [MemoryCase(case) for case in first if case.is_plain()] if where == "cuda" else []
    paths = [PathsCase(case) for case in predicted_cases(text, layout)] if where == "cuda" else []
    beside = [
        BesideCase("cpu", DRAWN, workload, one, "float32", "inference", ())
        for workload, one in itertools.product(read_workloads()[0], layout)
        if workload.matches(text) and "cpu" in device
    ]
    notes = [f"the CPU's rows: {allocator.note()}"] if beside else []
    every = [*paths, *memory, *first, *beside, *rest]
    return Work(every, notes, {"gpu": gpu_facts(where), "memory": [], "paths": []})


def gpu_facts(where: str) -> dict[str, Any] | None:
    if where != "cuda":
        return None
    found = torch.cuda.get_device_properties(torch.device(where))
    return {
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def large_batch(workload: Workload, dtype: str, size: int) -> int:
    """The smallest multiple of 8 for which x has `size` bytes."""
    sample = workload.channels * workload.points * getattr(torch, dtype).itemsize
    return -(-size // (sample * DRAWN)) * DRAWN


def cases(
    text: str, layouts: Sequence[str], sizes: Sizes, compiled: bool, quick: bool = False, device: str = "cuda"
) -> list[GpuCase]:
    """All that is to be measured, the first first: a budget of time may end before the list does."""
    workloads = [w for w in read_workloads()[0] if w.matches(text)]
    large = [w for w in workloads if w.name in LARGE_NAMES]
    batches = {LARGE: (None,), WALL: (1,), WORKLOADS: (8,) if quick else (8, 64, 32)}

    def sweep(
        group: str,
        mode: str,
        dtypes: Sequence[str],
        compile_if: Callable[[GpuCase], bool],
        *,
        tail: str = SE,
        warm: bool = True,
    ) -> Iterator[GpuCase]:
        """The group's workloads in every dtype, batch and layout; a large map's batch follows from its shape."""
        grid = itertools.product(dtypes, batches[group], large if group == LARGE else workloads, layouts)
        for dtype, batch, w, layout in grid:
            n = large_batch(w, dtype, sizes.large) if batch is None else batch
            case = GpuCase(group, tail, mode, w, layout, dtype, n, warm and group != LARGE, False, device, sizes)
            yield dataclasses.replace(case, compiled=compiled and w.name in COMPILED and compile_if(case))

    def never(case: GpuCase) -> bool:
        return False

    def in_float32(case: GpuCase) -> bool:
        return case.dtype == "float32"

    float32, bfloat16 = ("float32",), ("bfloat16",)
    both = (*float32, *bfloat16)
    return [
        *sweep(LARGE, "inference", both, lambda case: True),
        *sweep(WALL, "inference", float32, lambda case: case.layout == layouts[0]),
        *sweep(LARGE, "inference", both, in_float32, tail=SHORTCUT),
        *sweep(LARGE, "train", both, in_float32),
        *sweep(WORKLOADS, "inference", float32, lambda case: case.batch in (8, 64)),
        *sweep(LARGE, "train", both, in_float32, tail=BN),
        *sweep(WORKLOADS, "inference", bfloat16, never),
        *sweep(WORKLOADS, "inference", float32, never, warm=False),
        *sweep(WORKLOADS, "train", float32, never),
        *sweep(WALL, "inference", bfloat16, never),
    ]


def predicted_cases(text: str, layouts: Sequence[str]) -> list[GpuCase]:
    """Those whose times the choice of the path was reasoned from."""
    workloads = [w for w in read_workloads()[0] if w.name in PREDICTED and w.matches(text)]
    grid = itertools.product(("inference", "train"), workloads, ("float32", "bfloat16"), layouts)
    return [
        GpuCase(LARGE, SE, mode, w, layout, dtype, PREDICTED[w.name], warm=False, compiled=False)
        for mode, w, dtype, layout in grid
    ]


def split(some: Sequence[GpuCase]) -> tuple[list[GpuCase], list[GpuCase]]:
    """What the targets are about, and the rest."""
    n = 1 + max((i for i, c in enumerate(some) if c.tail == BN), default=len(some) - 1)
    return list(some[:n]), list(some[n:])


# ---- the tensors ----


@functools.lru_cache(maxsize=256)
def _drawn(workload: Workload, layout: str, batch: int, dtype: str, device: torch.device) -> Problem:
    return draw_problem(workload, layout, batch, getattr(torch, dtype), device, SEED)


def problem_of(case: GpuCase, device: torch.device) -> Problem:
    """DRAWN samples, drawn as everywhere, again and again up to the batch: no larger batch comes closer to a kink."""
    batch = min(case.batch, DRAWN)
    problem = _drawn(case.workload, case.layout, batch, case.dtype, device)
    if case.batch % batch:
        raise ValueError(f"expected a batch of fewer than {DRAWN} samples or a multiple of it, got {case.batch}")

    def repeated(t: Tensor) -> Tensor:
        out = t.new_empty((case.batch, *t.shape[1:])).to(memory_format=LAYOUTS[case.layout])
        for part in torch.split(out, batch):
            part.copy_(t)
        return out

    return dataclasses.replace(problem, x=repeated(problem.x), grad_output=repeated(problem.grad_output))


def shortcut_of(problem: Problem) -> Tensor:
    """Another map than x, of the same layout."""
    return problem.x.flip(0).mul_(-0.5).contiguous(memory_format=LAYOUTS[problem.layout])


# ---- the variants, and the check ----


def module_of(name: str, case: GpuCase, problem: Problem) -> nn.Module:
    """The variant, to be called with the maps of `maps_of`."""
    return build(name, problem) if case.tail == SE else tails.module_of(name, TAILS[case.tail], problem)


def maps_of(case: GpuCase, x: Tensor, shortcut: Tensor) -> tuple[Tensor, ...]:
    return (x,) if case.tail == SE else (x, shortcut)


def check_ours(case: GpuCase, problem: Problem, shortcut: Tensor) -> None:
    """Raises WrongResult unless se_ext's output, gradients and running statistics are the float64 formula's."""
    ours = module_of(summary.OURS, case, problem)
    maps = maps_of(case, problem.x, shortcut)
    if case.tail == SE:
        with torch.inference_mode(case.mode == "inference"):
            found = tails.make_step(ours, case.mode, maps, problem.grad_output)()
        check_block(problem, reference(problem), found)
    else:
        eager = module_of("eager_linear", case, problem)
        tails.check(str(case), case.mode, ours, eager, maps, problem.grad_output, ALLOWED[case.dtype])


# ---- the timing ----


def ring_size(case: GpuCase, problem: Problem, sizes: Sizes) -> int:
    """How many calls a replay makes: as many as it takes to leave the cache behind, at least two."""
    if case.warm:
        return WARM_CALLS
    maps = {SE: 2, SHORTCUT: 3, BN: 3}[case.tail] + (0 if case.mode == "inference" else 2)
    return min(256, max(2, -(-sizes.ring // (maps * problem.bytes_x))))


def as_one_step(ring: Sequence[Callable[[], object]], keep: bool, device: torch.device) -> Step:
    """All calls of the ring as one step: on a GPU one CUDA graph, so that what is timed is the device's time. Where
    `keep`, the results live on, each in memory of its own; else one call's memory may be the next one's."""

    def calls() -> list[object]:
        kept = []
        for call in ring:
            result = call()
            if keep:
                kept.append(result)
            del result
        return kept

    if device.type != "cuda":
        return calls
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in [*ring[:2], ring[0]]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = calls()

    def replay(kept: list[object] = kept) -> None:
        graph.replay()

    return replay


def copies_of(x: Tensor, out: Tensor) -> dict[str, Step]:
    return {"clone": x.clone, "copy_": lambda: out.copy_(x)}


def measure_row(case: GpuCase, device: torch.device, sizes: Sizes, plan: Plan) -> summary.Row:
    """Checks se_ext against the float64 formula, then times all variants interleaved."""
    problem = problem_of(case, device)
    shortcut = shortcut_of(problem)
    check_ours(case, problem, shortcut)
    calls = 1 if case.group == WALL else ring_size(case, problem, sizes)
    first = (problem.x, shortcut, problem.grad_output)
    ring = [first] * calls if case.warm else [first, *(tuple(map(_twin, first)) for _ in range(calls - 1))]
    modules = {name: module_of(name, case, problem) for name in case.variants}
    with torch.inference_mode(case.mode == "inference"):
        steps: dict[str, list[Callable[[], object]]] = {name: [] for name in (*COPIES, *modules)}
        outs = [torch.empty_like(problem.x) for _ in range(1 if case.warm else calls)]
        for i, tensors in enumerate(ring):
            for name, call in copies_of(tensors[0], outs[i % len(outs)]).items():
                steps[name].append(call)
            for name, module in modules.items():
                x, other, grad_output = tensors
                steps[name].append(tails.make_step(module, case.mode, maps_of(case, x, other), grad_output))
        if case.group == WALL:
            timed = {name: calls[0] for name, calls in steps.items()}
        else:
            timed = {name: as_one_step(calls, not case.warm, device) for name, calls in steps.items()}
        samples = interleave(timed, plan, torch.cuda.synchronize if device.type == "cuda" else do_nothing)
    if case.compiled:
        torch._dynamo.reset()
    return as_row(case, problem, samples, calls)


def _twin(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.preserve_format)


def as_row(case: GpuCase, problem: Problem, samples: dict[str, Samples], calls: int) -> summary.Row:
    """The faster way to copy x is the yardstick; times are those of one call."""
    one = {name: dataclasses.replace(s, time_us=[t / calls for t in s.time_us]) for name, s in samples.items()}
    copies = {name: one.pop(name) for name in COPIES}
    working_set = problem.working_set_bytes(case.mode)
    best = min(copies, key=lambda name: summary.spread(copies[name].time_us)["median"])
    return summary.add_metrics(
        {
            "group": case.group,
            "tail": case.tail,
            "name": case.workload.name,
            "device": problem.x.device.type,
            "dtype": case.dtype,
            "batch": case.batch,
            "layout": case.layout,
            "mode": case.mode,
            "warm": case.warm,
            "workload": asdict(case.workload),
            "bytes_x": problem.bytes_x,
            "bytes_slab": problem.bytes_x // case.batch,
            "working_set_bytes": working_set,
            "in_l2": case.warm and working_set <= l2_bytes(problem.x.device),
            "calls_per_step": calls,
            "other_cpu_share": None,
            "copied_by": best,
            "variants": {name: s.recorded() for name, s in {summary.YARDSTICK: copies[best], **one}.items()},
        }
    )


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


# ---- paths ----


def measure_paths(case: GpuCase, device: torch.device, plan: Plan) -> dict[str, Any]:
    """The time of each path that can be taken; None for another. Raises WrongResult unless all give the same bits."""
    problem = problem_of(case, device)
    calls = ring_size(case, problem, case.sizes)
    ring = [problem.x, *(_twin(problem.x) for _ in range(calls - 1))]
    taken: dict[str, str] = {}
    timed: dict[str, Step] = {}
    expected: dict[str, Tensor] | None = None
    try:
        with torch.inference_mode(case.mode == "inference"):
            module = build(summary.OURS, problem)
            steps = [tails.make_step(module, case.mode, (x,), problem.grad_output) for x in ring]
            for path in (AUTO, *PATHS):
                _C.set_cuda_path(path)
                found = steps[0]()
                taken[path] = _C.last_cuda_path()
                if path not in (AUTO, taken[path]):
                    continue
                expected = found if expected is None else expected
                for name, t in found.items():
                    if not torch.equal(t, expected[name]):
                        raise WrongResult(f"{case}: the path {path} gives another {name} than {taken[AUTO]}")
                timed[path] = as_one_step(steps, True, device)
            samples = interleave(timed, plan, torch.cuda.synchronize if device.type == "cuda" else do_nothing)
    finally:
        _C.set_cuda_path(AUTO)
    times = {path: summary.spread([t / calls for t in found.time_us]) for path, found in samples.items()}
    return {
        **{"name": case.workload.name, "mode": case.mode, "layout": case.layout, "dtype": case.dtype},
        **{"batch": case.batch, "bytes_x": problem.bytes_x, "calls_per_step": calls, "chosen": taken[AUTO]},
        "time_us": {path: times.get(path) for path in (AUTO, *PATHS)},
    }


# ---- memory ----


def extra_bytes(call: Callable[[], object]) -> int:
    """What a call adds at its peak to the bytes asked of torch's CUDA allocator."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def measure_memory(case: GpuCase, device: torch.device) -> dict[str, Any]:
    """The extra memory of inference into a new tensor and in place."""
    problem = problem_of(case, device)
    with torch.inference_mode():
        ours, in_place = build(summary.OURS, problem), build(summary.INPLACE, problem)
        found = {
            "bytes_output": extra_bytes(lambda: ours(problem.x)),
            "bytes_in_place": extra_bytes(lambda: in_place(problem.x)),
        }
    return {
        **{"name": case.workload.name, "layout": case.layout, "dtype": case.dtype, "batch": case.batch},
        **{"bytes_x": problem.bytes_x, **found},
    }
