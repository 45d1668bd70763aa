"""torch.export, and the fake kernels it stands on: shapes, strides and dtypes are those of the real run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DTYPES, make_map, make_weights
from ops import OpCase, Options, cases
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram, export

import se_ext
from se_ext import SqueezeExcitation

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

C, M = 16, 4
OPS = torch.ops.se_ext


def our_nodes(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def dims() -> dict[int, Dim]:
    return {0: Dim("n", min=1, max=64), 2: Dim("h", min=1, max=256), 3: Dim("w", min=1, max=256)}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_a_dynamic_program_reproduces_eager(strict: bool, residual: bool, channels_last: bool, tmp_path: Path) -> None:
    module = SqueezeExcitation(C, M, nn.SiLU, post_activation=nn.ReLU).eval()

    def inputs(n: int, h: int, w: int) -> tuple[Tensor, ...]:
        return tuple(make_map((n, C, h, w), channels_last=channels_last) for _ in range(1 + residual))

    shared = dims()
    program = export(module, inputs(3, 6, 5), dynamic_shapes=(shared,) * (1 + residual), strict=strict)
    assert our_nodes(program) == ["se_ext.squeeze_excite.default"]
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2")
    assert our_nodes(loaded) == ["se_ext.squeeze_excite.default"]
    for size in [(3, 6, 5), (2, 9, 4), (7, 3, 12), (1, 1, 1), (2, 1, 8)]:
        args = inputs(*size)
        expected = module(*args)
        for again in (program, loaded):
            y = again.module()(*args)
            assert torch.equal(y, expected)
            assert y.stride() == expected.stride()


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_decompositions_keep_the_node(strict: bool) -> None:
    """run_decompositions lowers to core ATen for other runtimes: the block stays one op, never the formula's nine."""
    module = SqueezeExcitation(C, M, bias=False).eval()
    program = export(module, (make_map((2, C, 5, 4)),), strict=strict).run_decompositions()
    assert our_nodes(program) == ["se_ext.squeeze_excite.default"]
    x = make_map((2, C, 5, 4))
    assert torch.equal(program.module()(x), module(x))


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(make_weights(C, M))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = se_ext.squeeze(x)
        s = se_ext.excite(z, *self.weights, "gelu", "hardsigmoid")
        return z, s, se_ext.rescale(x, s, x, "hardswish")


def test_the_functions_export_with_three_spatial_dims() -> None:
    module = Functions().eval()
    n, d = Dim("n", min=1, max=64), Dim("d", min=1, max=64)
    program = export(module, (make_map((2, C, 3, 4, 5), channels_last=True),), dynamic_shapes=({0: n, 2: d},))
    assert our_nodes(program) == ["se_ext.squeeze.default", "se_ext.excite.default", "se_ext.rescale.default"]
    x = make_map((5, C, 7, 4, 5), channels_last=True)
    for ours, eager in zip(program.module()(x), module(x), strict=True):
        assert torch.equal(ours, eager)
        assert ours.stride() == eager.stride()


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, (3, 5), groups=C, stride=(1, 2), padding=(1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        conv = self.conv
        as_given = se_ext.depthwise_conv(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation)
        same = se_ext.depthwise_conv(x, conv.weight, None, 2, "same")
        return as_given, same, se_ext.depthwise_conv(x, conv.weight, None, 1, (1, 0, 3, 2))


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_depthwise_convolutions_of_any_padding(strict: bool) -> None:
    """One node each, whose output's size follows from the input's."""
    module = Depthwise().eval()
    # Sizes from 3 on give more than one row and column, for which torch would write another program.
    sizes = {0: Dim("n", min=1, max=64), 2: Dim("h", min=3, max=64), 3: Dim("w", min=3, max=64)}
    program = export(module, (make_map((3, C, 6, 5), channels_last=True),), dynamic_shapes=(sizes,), strict=strict)
    assert our_nodes(program) == ["se_ext.depthwise_conv.default"] * 3
    for size in [(2, 9, 4), (7, 3, 12), (2, 4, 8)]:
        x = make_map((size[0], C, *size[1:]), channels_last=True)
        for ours, eager in zip(program.module()(x), module(x), strict=True):
            assert torch.equal(ours, eager)
            assert ours.stride() == eager.stride()


def test_the_in_place_module_writes_into_its_input() -> None:
    module = SqueezeExcitation(C, M, inplace=True).eval()
    x = make_map((2, C, 5, 4))
    with torch.no_grad():
        program = export(module, (x.clone(),))
        expected = module(x.clone())
        y = program.module()(x)
    assert torch.equal(y, expected)
    assert torch.equal(x, expected)


def test_bad_input_at_export_raises_with_our_message() -> None:
    with pytest.raises(RuntimeError, match=r"squeeze_excite: expected w1 of shape \[M, 15\] or \[M, 15, 1, 1\], got"):
        export(SqueezeExcitation(C, M), (make_map((2, C - 1, 5, 4)),))


# ---- fake tensors against real ones ----

LAYOUTS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "contiguous": lambda t: make_map((2, C, 5, 4), t),
    "channels_last": lambda t: make_map((2, C, 5, 4), t, channels_last=True),
    "channels_last_3d": lambda t: make_map((2, C, 3, 5, 4), t, channels_last=True),
    "1d": lambda t: make_map((2, C, 9), t),
    "1d channels last": lambda t: make_map((2, 9, C), t).transpose(1, 2),
    "transposed": lambda t: make_map((2, C, 4, 5), t).transpose(2, 3),
    "batch last": lambda t: make_map((C, 5, 4, 2), t).permute(3, 0, 1, 2),
    "sliced": lambda t: make_map((2, 2 * C, 5, 8), t)[:, ::2, :, ::2],
    "sliced channels_last": lambda t: make_map((2, 2 * C, 5, 8), t, channels_last=True)[:, :C],
    "expanded": lambda t: make_map((1, C, 5, 4), t).expand(3, C, 5, 4),
    "offset": lambda t: make_map((3, C, 5, 4), t)[1:],
    "empty batch": lambda t: make_map((0, C, 5, 4), t),
    "empty batch channels_last": lambda t: make_map((0, C, 5, 4), t, channels_last=True),
    # In channels_last torch disagrees with its own fake tensors here: empty_like's strides are (0, …) and (64, …).
    "no points": lambda t: make_map((2, C, 0, 4), t),
    "one point channels_last": lambda t: make_map((2, C, 1, 1), t, channels_last=True),
    "one point 3d channels_last": lambda t: make_map((2, C, 1, 1, 1), t, channels_last=True),
    "one sample channels_last": lambda t: make_map((1, C, 5, 4), t, channels_last=True),
    "one channel": lambda t: make_map((2, 1, 5, 4), t, channels_last=True),
}


ENDS = [
    {"post_activation": "relu", "activation": "silu", "stride": 2, "kernel": 5},
    {"post_activation": "identity", "residual": False, "convolutions": True, "biases": (False, False)},
    {"kernel": 2, "stride": 2, "padding": (4, 2), "dilation": 2},
    {"post_activation": "silu", "pre_activation": "silu", "batch_statistics": False, "drop_scale": False},
]


def arguments(case: OpCase, x: Tensor, end: dict[str, Any]) -> dict[str, Any]:
    """With maps that are like x: of its shape, dtype and strides, and in storage of its own."""
    maps = lambda: x.clone() if case.writes == ("input",) and x.is_contiguous() else x.detach()  # noqa: E731
    return case.make(Options(tuple(x.shape), M, x.dtype, maps=maps, **end))


Row = tuple[Any, ...] | None


def metadata(tensors: list[Tensor | None]) -> list[Row]:
    return [None if t is None else (t.dtype, tuple(t.shape), t.stride(), t.storage_offset()) for t in tensors]


def outputs(case: OpCase, given: dict[str, Any], recorded: bool) -> list[Row]:
    """Of the op; and of its gradients."""
    if not recorded:
        return metadata(case.run(given))
    leaves = [given[k].detach().requires_grad_() for k in case.differentiable if given[k] is not None]
    names = [k for k in case.differentiable if given[k] is not None]
    y, *others = case.run(given | dict(zip(names, leaves, strict=True)))
    return metadata([y, *others, *torch.autograd.grad(y, leaves, torch.ones_like(y))])


def is_refused(case: OpCase, layout: str) -> bool:
    """An op does not write into elements that share memory; a filter meets a point."""
    return (case.writes == ("input",) and layout == "expanded") or (case.needs_points and layout == "no points")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@cases()
def test_fake_results_have_the_real_ones_metadata(case: OpCase, layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](dtype)
    if is_refused(case, layout):
        return
    for end in ENDS if dtype is torch.float32 else ENDS[:1]:
        for recorded in (False, True) if case.differentiable else (False,):
            given = arguments(case, x, end)
            with FakeTensorMode() as mode:
                copies = {k: mode.from_tensor(t) if isinstance(t, Tensor) else t for k, t in given.items()}
                fake = outputs(case, copies, recorded)
            assert fake == outputs(case, given, recorded), (end, recorded)


@pytest.mark.parametrize("layout", LAYOUTS)
@cases()
def test_meta_results_have_the_real_ones_metadata(case: OpCase, layout: str) -> None:
    x = LAYOUTS[layout](torch.float32)
    if is_refused(case, layout):
        return
    for end in ENDS:
        given = arguments(case, x, end)
        on_meta = {
            k: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t
            for k, t in given.items()
        }
        real, meta = (outputs(case, g, recorded=False) for g in (given, on_meta))
        offset = len(case.writes)  # what is written lies where it lay
        assert meta[: len(meta) - offset] == real[: len(real) - offset], end


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_3d", "1d", "transposed"])
def test_symbolic_sizes_add_no_guard_on_a_value(layout: str) -> None:
    """A fake kernel that branched on a size would pin it: the program would then refuse other sizes."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    x = LAYOUTS[layout](torch.float32)
    env = ShapeEnv()
    dynamic = [DimDynamic.DYNAMIC if d != 1 else DimDynamic.STATIC for d in range(x.dim())]
    with FakeTensorMode(shape_env=env) as mode:
        fake = mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
        y = OPS.squeeze_excite(fake, *make_weights(C, M), "relu", "sigmoid", fake, "relu")
        z = OPS.squeeze(fake)
    assert not [str(g.expr) for g in env.guards if "Eq(s" in str(g.expr)]
    for d in range(x.dim()):
        assert isinstance(y.shape[d], torch.SymInt) is (d != 1)
        assert y.shape[d] is fake.shape[d] or str(y.shape[d]) == str(fake.shape[d])
    assert str(z.shape[0]) == str(fake.shape[0])
