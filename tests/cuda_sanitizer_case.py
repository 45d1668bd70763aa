"""Every op on every path of the CUDA kernels, once: what `make gpu-check` runs first, and under compute-sanitizer.

    python tests/cuda_sanitizer_case.py [PATH …]

Inputs are drawn on the CPU and results compared there, so that little but our kernels runs on the GPU. A line for each
case is written as soon as its results are compared. A se_ext on PYTHONPATH is taken in place of this checkout's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

if find_spec("se_ext") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import se_ext
from se_ext import _C

DTYPES = (torch.float32, torch.bfloat16)
PATHS = ("auto", "cluster", "chunked", "whole")
SHAPES = [(3, 19, 5, 7), (2, 40, 8, 8), (1, 131, 33)]
HIDDEN = 5
Case = tuple[str, tuple[int, ...], torch.dtype, bool]


def cases() -> Iterator[Case]:
    """(path, shape, dtype, channels_last): every path with every layout, dtypes and shapes in turn."""
    turn = 0
    for path in PATHS:
        for channels_last in (False, True):
            for dtype in DTYPES:
                yield path, SHAPES[turn % len(SHAPES)], dtype, channels_last
                turn += 1


def draw(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> dict[str, Tensor]:
    c = shape[1]

    def of_layout() -> Tensor:
        t = torch.randn(shape).to(dtype)
        if not channels_last:
            return t
        return t.movedim(1, -1).contiguous().movedim(-1, 1)

    sizes = {"w1": (HIDDEN, c), "b1": (HIDDEN,), "w2": (c, HIDDEN), "b2": (c,), "bn_weight": (c,), "bn_bias": (c,)}
    return {
        **{name: of_layout() for name in ("x", "residual", "grad")},
        **{name: (torch.randn(size) / c**0.5).to(dtype) for name, size in sizes.items()},
    }


def run(given: dict[str, Tensor]) -> list[Tensor]:
    """The results and gradients of every op, on the device that the tensors are on."""
    names = ("x", "w1", "b1", "w2", "b2", "residual")
    x, *weights, residual = leaves = [given[name].detach().requires_grad_() for name in names]
    results: list[Tensor] = []
    # silu throughout: a slope that jumps could fall either way between two devices.
    y = se_ext.squeeze_excite(x, *weights, "silu", "sigmoid", residual, "silu")
    results += [y, *torch.autograd.grad(y, leaves, given["grad"])]
    s = se_ext.excite(se_ext.squeeze(x), *weights, "silu")
    y = se_ext.rescale(x, s, residual, "silu")
    results += [s, y, *torch.autograd.grad(y, leaves, given["grad"])]
    vectors = [given[name].detach().requires_grad_() for name in ("bn_weight", "bn_bias")]
    mean, var = torch.zeros_like(given["b2"]), torch.zeros_like(given["b2"])
    for training in (True, False):
        y = se_ext.bn_squeeze_excite(
            *(x, *vectors, mean, var, *weights, training),
            momentum=1.0,
            pre_activation="silu",
            activation="silu",
            residual=residual,
            post_activation="silu",
        )
        results += [y, *torch.autograd.grad(y, [*leaves, *vectors], given["grad"])]
    results += [mean, var]
    for training in (True, False):
        y, *statistics = torch.ops.se_ext._bn_activation(x, *vectors, training, 1e-5, "silu", residual)
        results += [y, *statistics, *torch.autograd.grad(y, [x, residual, *vectors], given["grad"])]
    with torch.no_grad():
        target = given["x"].clone()
        results.append(se_ext.squeeze_excite(target, *weights, residual=given["residual"], inplace=True).clone())
        torch.ops.se_ext.rescale_(target, s.detach(), given["residual"], "silu")
        results.append(target)
        results.append(se_ext.squeeze_excite(given["x"][:, :, 1:], *weights))  # strides that need a copy
    return [t.detach() for t in results]


def takes_its_path(given: dict[str, Tensor], path: str) -> bool:
    """Whether the block and its backward took the path that was forced; all shapes here fit into any."""
    x = given["x"].detach().requires_grad_()
    y = se_ext.squeeze_excite(x, *(given[name] for name in ("w1", "b1", "w2", "b2")))
    taken = {_C.last_cuda_path()}
    torch.autograd.grad(y, x, given["grad"])
    taken.add(_C.last_cuda_path())
    return path == "auto" or taken == {path}


def main(paths: list[str]) -> int:
    torch.manual_seed(1)
    checked = 0
    chosen = [case for case in cases() if not paths or case[0] in paths]
    for path, shape, dtype, channels_last in chosen:
        given = draw(shape, dtype, channels_last)
        expected = run(given)
        _C.set_cuda_path(path)
        on_gpu = {name: t.cuda() for name, t in given.items()}
        case = f"{path} {shape} {dtype} channels_last={channels_last}"
        assert takes_its_path(on_gpu, path), f"{case}: took the path {_C.last_cuda_path()}"
        found = [t.cpu() for t in run(on_gpu)]
        for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            allowed = 64 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * (dtype != torch.float64))
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
            assert error <= allowed, f"{case}: result {i} off by {error}"
            checked += 1
        print(f"right: {case}", flush=True)
    _C.set_cuda_path("auto")
    print(f"checked {checked} results of {len(chosen)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
