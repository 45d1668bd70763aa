"""One row of gpu.json: an SE block, alone or with what stands around it, timed on a GPU; and what is measured first."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import harness
import summary
import tail_harness
import torch
from gpu_tables import BN, LARGE, SE, SHORTCUT, WALL, WORKLOADS
from harness import SEED, recorded
from problem import ACTIVATIONS, GATES, LAYOUTS, Problem, WrongResult, check, draw_problem, reference
from timing import Plan, Samples, Step, interleave
from torch import Tensor, nn
from torch.nn import functional
from variants import build
from workloads import Workload, read_workloads

import se_ext

LARGE_NAMES = (
    "256x56x56-m16-relu-sigmoid",
    "512x28x28-m32-relu-sigmoid",
    "1024x14x14-m64-relu-sigmoid",
    "2048x7x7-m128-relu-sigmoid",
)
# torch.compile takes seconds per shape: these stand for all.
COMPILED = ("256x56x56-m16-relu-sigmoid", "1024x14x14-m64-relu-sigmoid", "672x14x14-m28-silu-sigmoid")
EAGER = ("eager_conv", "eager_linear")
COMPILE = "compile_linear"
COPIES = ("clone", "copy_")
DRAWN = 8  # samples that are drawn; a larger batch repeats them
WARM_CALLS = 50
TAIL = tail_harness.TAILS[BN]
# Of the norm (see tail_harness.distance); half types round.
ALLOWED = {"float32": tail_harness.ALLOWED, "bfloat16": 2e-2, "float16": 4e-3}


@dataclass(frozen=True)
class Sizes:
    """`large`: bytes of x from which on it is large. `ring`: bytes over which the inputs and outputs of calls in turn
    spread, more than a GPU's caches hold."""

    large: int = 256_000_000
    ring: int = 160 * 2**20


QUICK = Sizes(large=1_000_000, ring=2**21)


@dataclass(frozen=True)
class Case:
    """What one row is about. `warm`: all calls have one input, which stays in cache where it fits."""

    group: str
    tail: str
    mode: str
    workload: Workload
    layout: str
    dtype: str
    batch: int
    warm: bool
    compiled: bool

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


def large_batch(workload: Workload, dtype: str, size: int) -> int:
    """The smallest multiple of 8 for which x has `size` bytes."""
    sample = workload.channels * workload.points * getattr(torch, dtype).itemsize
    return -(-size // (sample * DRAWN)) * DRAWN


def cases(text: str, layouts: Sequence[str], sizes: Sizes, compiled: bool, quick: bool = False) -> list[Case]:
    """All that is to be measured, the first first: a budget of time may end before the list does."""
    workloads = [w for w in read_workloads()[0] if w.matches(text)]
    large = [w for w in workloads if w.name in LARGE_NAMES]
    dtypes = ("float32", "bfloat16")
    batches = (8,) if quick else (8, 64, 32)

    def of_size(tail: str, mode: str, compiled_dtypes: Sequence[str]) -> list[Case]:
        return [
            Case(
                *(LARGE, tail, mode, w, layout, dtype, large_batch(w, dtype, sizes.large), False),
                compiled and w.name in COMPILED and dtype in compiled_dtypes,
            )
            for dtype, w, layout in itertools.product(dtypes, large, layouts)
        ]

    def of_networks(mode: str, dtype: str, warm: bool, compiled_batches: Sequence[int] = ()) -> list[Case]:
        return [
            Case(
                *(WORKLOADS, SE, mode, w, layout, dtype, batch, warm),
                compiled and w.name in COMPILED and batch in compiled_batches,
            )
            for batch, w, layout in itertools.product(batches, workloads, layouts)
        ]

    def one_sample(dtype: str, compiled_layouts: Sequence[str]) -> list[Case]:
        return [
            Case(
                *(WALL, SE, "inference", w, layout, dtype, 1, True),
                compiled and w.name in COMPILED and layout in compiled_layouts,
            )
            for w, layout in itertools.product(workloads, layouts)
        ]

    return [
        *of_size(SE, "inference", dtypes),
        *one_sample("float32", layouts[:1]),
        *of_size(SHORTCUT, "inference", dtypes[:1]),
        *of_size(SE, "train", dtypes[:1]),
        *of_networks("inference", "float32", warm=True, compiled_batches=(8, 64)),
        *of_size(BN, "train", dtypes[:1]),
        *of_networks("inference", "bfloat16", warm=True),
        *of_networks("inference", "float32", warm=False),
        *of_networks("train", "float32", warm=True),
        *one_sample("bfloat16", ()),
    ]


def split(some: Sequence[Case]) -> tuple[list[Case], list[Case]]:
    """What the targets are about, and the rest."""
    n = 1 + max((i for i, c in enumerate(some) if c.tail == BN), default=len(some) - 1)
    return list(some[:n]), list(some[n:])


# ---- the tensors ----


@functools.lru_cache(maxsize=256)
def _drawn(workload: Workload, layout: str, batch: int, dtype: str, device: torch.device) -> Problem:
    return draw_problem(workload, layout, batch, getattr(torch, dtype), device, SEED)


def problem_of(case: Case, device: torch.device) -> Problem:
    """DRAWN samples, drawn as everywhere, again and again up to the batch: no larger batch comes closer to a kink."""
    batch = min(case.batch, DRAWN)
    problem = _drawn(case.workload, case.layout, batch, case.dtype, device)
    if case.batch % batch:
        raise ValueError(f"expected a batch of fewer than {DRAWN} samples or a multiple of it, got {case.batch}")

    def repeated(t: Tensor) -> Tensor:
        out = t.new_empty((case.batch, *t.shape[1:])).to(memory_format=LAYOUTS[case.layout])
        for part in out.split(batch):
            part.copy_(t)
        return out

    return dataclasses.replace(problem, x=repeated(problem.x), grad_output=repeated(problem.grad_output))


def shortcut_of(problem: Problem) -> Tensor:
    """Another map than x, of the same layout."""
    return problem.x.flip(0).mul_(-0.5).contiguous(memory_format=LAYOUTS[problem.layout])


# ---- the variants ----


class WithShortcut(nn.Module):
    """A block, the shortcut's sum and a ReLU, in place as timm writes them."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__()
        self.se = se

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        y = self.se(x)
        y += shortcut
        return functional.relu(y, inplace=True)


def module_of(name: str, case: Case, problem: Problem) -> nn.Module:
    """The variant, to be called with x and, but for the block alone, the shortcut."""
    if case.tail == SE:
        return build(name, problem)
    compiled = name == COMPILE
    se = build("eager_linear" if compiled else name, problem)
    if case.tail == BN:
        module = tail_harness.Eager(TAIL, se, case.workload.channels)
        if name == summary.OURS:
            module = tail_harness.Fused(TAIL, module, case.workload)
        module.to(problem.x.device)
        tail_harness.randomize(module)
    elif name == summary.OURS:
        w = case.workload
        names = (ACTIVATIONS[w.activation], GATES[w.gate])
        module = se_ext.SqueezeExcitation(w.channels, w.hidden, *names, post_activation=nn.ReLU)
        module.to(problem.x.device, problem.x.dtype, memory_format=LAYOUTS[problem.layout])
        module.load_state_dict(se.state_dict())
    else:
        module = WithShortcut(se)
    return torch.compile(module, fullgraph=True, dynamic=False) if compiled else module


def step_of(module: nn.Module, case: Case, tensors: tuple[Tensor, ...]) -> Callable[[], dict[str, Tensor]]:
    """One call; when training, also the gradients of the maps and of every weight. `tensors`: x, shortcut, dL/dy."""
    *maps, grad = tensors
    if case.tail == SE:
        maps = maps[:1]
    if case.mode == "inference":
        return lambda: {"output": module(*maps)}
    leaves = [t.detach().requires_grad_() for t in maps]
    named = dict(zip(("input", "shortcut"), leaves, strict=False)) | dict(module.named_parameters())

    def step() -> dict[str, Tensor]:
        y = module(*leaves)
        grads = torch.autograd.grad(y, list(named.values()), grad)
        return {"output": y.detach(), **{f"grad {key}": g for key, g in zip(named, grads, strict=True)}}

    return step


def check_ours(case: Case, problem: Problem, shortcut: Tensor) -> None:
    """Raises WrongResult unless se_ext's output, gradients and running statistics are the float64 formula's."""
    ours = module_of(summary.OURS, case, problem)
    tensors = (problem.x, shortcut, problem.grad_output)
    if case.tail == SE:
        expected = reference(problem)
        with torch.inference_mode(case.mode == "inference"):
            check(problem, expected, step_of(ours, case, tensors)())
        return
    exact_module = copy.deepcopy(module_of("eager_linear", case, problem)).double()
    with torch.set_grad_enabled(case.mode == "train"):
        exact = _without_places(step_of(exact_module, case, tuple(t.double() for t in tensors))())
        found = _without_places(step_of(ours, case, tensors)())
    if case.tail == BN:
        for name in ("running_mean", "running_var"):
            exact[name], found[name] = getattr(exact_module.bn, name), getattr(ours.module.bn, name)
    if found["output"].stride() != problem.x.stride():
        raise WrongResult(f"{case}: output has strides {found['output'].stride()}, x {problem.x.stride()}")
    for key, value in found.items():
        truth = exact[key]
        error = tail_harness.distance(value, truth, found["output"], exact["output"])
        if not error <= ALLOWED[case.dtype]:
            raise WrongResult(f"{case}: {key} is off by {error:.2e} in the norm; allowed {ALLOWED[case.dtype]:.2e}")


def _without_places(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights' names alike, however deep in a module they are."""
    return {key.replace("module.", "").replace("se.", ""): value for key, value in results.items()}


# ---- the timing ----


def ring_size(case: Case, problem: Problem, sizes: Sizes) -> int:
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
    side = torch.cuda.Stream(device)
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


def measure_row(case: Case, device: torch.device, sizes: Sizes, plan: Plan) -> summary.Row:
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
                steps[name].append(step_of(module, case, tensors))
        if case.group == WALL:
            timed = {name: calls[0] for name, calls in steps.items()}
        else:
            timed = {name: as_one_step(calls, not case.warm, device) for name, calls in steps.items()}
        samples = interleave(timed, plan, torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    if case.compiled:
        torch._dynamo.reset()
    return as_row(case, problem, samples, calls)


def _twin(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.preserve_format)


def as_row(case: Case, problem: Problem, samples: dict[str, Samples], calls: int) -> summary.Row:
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
            "variants": recorded({summary.YARDSTICK: copies[best], **one}),
        }
    )


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


# ---- memory, and the CPU beside the GPU ----


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


def measure_memory(case: Case, device: torch.device) -> dict[str, Any]:
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


def cpu_rows(text: str, layouts: Sequence[str], plan: Plan) -> list[Callable[[], summary.Row]]:
    """se_ext on the CPU at batch 8, one workload after the other: what stands beside the GPU's rows."""

    def row(workload: Workload, layout: str) -> summary.Row:
        problem = _drawn(workload, layout, DRAWN, "float32", torch.device("cpu"))
        found = harness.measure_row(problem, reference(problem), "inference", [summary.YARDSTICK, summary.OURS], plan)
        return {**found, "group": WORKLOADS, "tail": SE, "warm": True}

    return [
        functools.partial(row, workload, layout)
        for workload, layout in itertools.product(read_workloads()[0], layouts)
        if workload.matches(text)
    ]
