"""One SE block by itself, in the variants that are timed against each other. All start from the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn

import se_ext
from benchmarks import summary
from benchmarks.cases.problem import ACTIVATIONS, GATES, SEED, Problem, check, draw_problem, reference, to_layout
from benchmarks.cases.workloads import SKIP_REASON, Workload, read_workloads
from benchmarks.measure.case import Case, Work
from benchmarks.measure.timing import Plan, Step, do_nothing, recorded

Results = Callable[[], dict[str, Tensor | None]]


@dataclass(frozen=True)
class BlockCase(Case):
    device: str
    batch: int
    workload: Workload
    layout: str
    dtype: str
    mode: str
    variants: tuple[str, ...]

    def measure(self, plan: Plan) -> summary.Row:
        """Checks se_ext against the float64 formula, then times all variants interleaved."""
        problem, expected = _drawn(self.workload, self.layout, self.dtype, self.batch, self.device)
        steps = {}
        with torch.inference_mode(self.mode == "inference"):
            for name in (summary.YARDSTICK, *self.variants, summary.OURS):
                steps[name], results = make_step(name, problem, self.mode)
                if name == summary.OURS:
                    check(problem, expected, results())
            return time_row(problem, self.mode, steps, plan)


def work(
    text: str,
    *,
    layout: Sequence[str],
    dtype: Sequence[str],
    batch: Sequence[int],
    mode: Sequence[str],
    variants: Sequence[str],
    device: Sequence[str],
    quick: bool,
) -> Work:
    """The dtypes side by side, because they are compared with each other too."""
    for where in device:
        if where == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: this torch finds no CUDA device")
    timed, skipped = ([w for w in found if w.matches(text)] for found in read_workloads())
    if skipped and not timed:
        raise ValueError(f"--workload {text}: {SKIP_REASON}")
    grid = itertools.product(device, batch, timed, layout, dtype, mode)
    cases = [BlockCase(*point, tuple(variants)) for point in grid]
    return Work(cases, [f"skipped {', '.join(w.name for w in skipped)}: {SKIP_REASON}"] if skipped else [])


@lru_cache(maxsize=1)
def _drawn(workload: Workload, layout: str, dtype: str, batch: int, device: str) -> tuple[Problem, dict[str, Tensor]]:
    """The problem, and what is right: the same for every mode."""
    problem = draw_problem(workload, layout, batch, getattr(torch, dtype), torch.device(device), SEED)
    return problem, reference(problem)


def time_row(problem: Problem, mode: str, steps: Mapping[str, Step], plan: Plan) -> summary.Row:
    """Times the steps interleaved, right or wrong; `mode` says what each of them does with the problem."""
    on_gpu = problem.x.device.type == "cuda"
    variants, other_cpu_share = recorded(steps, plan, torch.cuda.synchronize if on_gpu else do_nothing)
    if any(name.startswith("compile") for name in steps):
        torch._dynamo.reset()
    workload = problem.workload
    return summary.add_metrics(
        {
            "name": workload.name,
            "device": problem.x.device.type,
            "dtype": str(problem.x.dtype).removeprefix("torch."),
            "batch": problem.x.shape[0],
            "layout": problem.layout,
            "mode": mode,
            "workload": asdict(workload),
            "bytes_x": problem.bytes_x,
            "floor_bytes": summary.FLOOR_PASSES[mode] * problem.bytes_x,
            "working_set_bytes": problem.working_set_bytes(mode),
            "other_cpu_share": other_cpu_share,
            "variants": variants,
        }
    )


class EagerConv(nn.Module):
    """As timm and torchvision write it: mean, two 1x1 convolutions, multiply.

    (torchvision's AdaptiveAvgPool2d(1) is the same call to mean inside ATen.)
    """

    def __init__(self, channels: int, hidden: int, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, x: Tensor) -> Tensor:
        z = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.activation(self.fc1(z))))


class EagerLinear(nn.Module):
    """With linear layers on the [N, C] mean, as MONAI and the paper's re-implementations write it."""

    def __init__(self, channels: int, hidden: int, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        self.activation, self.gate = activation(), gate()

    def forward(self, x: Tensor) -> Tensor:
        s = self.gate(self.fc2(self.activation(self.fc1(x.mean((2, 3))))))
        return x * s[:, :, None, None]


MODULES: dict[str, Callable[..., nn.Module]] = {
    "eager_conv": EagerConv,
    "eager_linear": EagerLinear,
    "compile": EagerConv,
    "compile_linear": EagerLinear,
    "se_ext": se_ext.SqueezeExcitation,
    "se_ext_inplace": partial(se_ext.SqueezeExcitation, inplace=True),
}


def build(name: str, problem: Problem) -> nn.Module:
    """The module of variant `name` with a copy of the problem's weights."""
    workload = problem.workload
    module = MODULES[name](workload.channels, workload.hidden, ACTIVATIONS[workload.activation], GATES[workload.gate])
    to_layout(module.to(problem.x.device, problem.x.dtype), problem.layout)
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    module.load_state_dict({key: w.reshape(shapes[key]) for key, w in problem.weights.items()})
    return compiled(module) if name.startswith("compile") else module


def compiled(module: nn.Module) -> nn.Module:
    """As the benchmark compiles a block: for its shape."""
    return cast(nn.Module, torch.compile(module, fullgraph=True, dynamic=False))


def inference_step(module: nn.Module, problem: Problem) -> tuple[Step, Results]:
    """One forward pass. The caller is inside torch.inference_mode()."""
    x = problem.x

    def step() -> Tensor:
        y: Tensor = module(x)
        return y

    return step, lambda: {"output": step()}


def train_step(module: nn.Module, problem: Problem) -> tuple[Step, Results]:
    """One forward + backward pass; the gradients of x and of the weights are set to None first."""
    x = problem.x.detach().requires_grad_()
    grad_output = problem.grad_output
    leaves = {"input": x, **dict(module.named_parameters())}
    tensors = tuple(leaves.values())

    def step() -> Tensor:
        for tensor in tensors:
            tensor.grad = None
        y: Tensor = module(x)
        torch.autograd.backward(y, grad_output)
        return y

    def results() -> dict[str, Tensor | None]:
        y = step()
        return {"output": y.detach(), **{f"grad {name}": leaf.grad for name, leaf in leaves.items()}}

    return step, results


def make_step(name: str, problem: Problem, mode: str) -> tuple[Step, Results]:
    """The call to time, and a function that makes that call and returns its tensors by name."""
    if name == "clone":
        return problem.x.clone, lambda: {"output": problem.x.clone()}
    return MODES[mode](build(name, problem), problem)


MODES = {"inference": inference_step, "train": train_step}
