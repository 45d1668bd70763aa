"""torch.export, and the fake kernels it stands on: shapes, strides and dtypes are those of the real run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DTYPES, HALF, make_map, make_weights
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


def calls(x: Tensor) -> dict[str, Callable[[], Any]]:
    """Every op on the map x: made under the mode in which x is."""
    n, c = x.shape[:2]
    dtype = x.dtype
    accumulate = torch.float32 if dtype in HALF else dtype

    def matrix(columns: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.ones(n, columns, dtype=dtype)

    w = [torch.ones(s, dtype=accumulate) for s in ((M, c), (M,), (c, M), (c,))]
    k = [w[0][:, :, None, None], None, w[2][:, :, None, None], None]
    names = ("silu", "sigmoid")
    z, hidden, s = (matrix(columns, accumulate) for columns in (c, M, c))
    g = torch.ones_like(x)
    return {
        "squeeze": lambda: OPS.squeeze(x),
        "excite": lambda: OPS.excite(matrix(c), *w, *names),
        "rescale": lambda: OPS.rescale(x, matrix(c)),
        "rescale residual": lambda: OPS.rescale(x, s, g, "silu"),
        "squeeze_excite": lambda: OPS.squeeze_excite(x, *w, *names),
        "squeeze_excite residual": lambda: OPS.squeeze_excite(x, *k, *names, g, "relu"),
        "_excite_forward": lambda: OPS._excite_forward(matrix(c), *w, *names),
        "_excite_backward": lambda: OPS._excite_backward(
            matrix(c), matrix(c), *w, hidden, matrix(c), *names, [True] * 5
        ),
        "_rescale_backward": lambda: OPS._rescale_backward(g, x, s, g, "relu", [True] * 3),
        "_squeeze_excite_forward": lambda: OPS._squeeze_excite_forward(x, *w, *names, g, "relu"),
        "_squeeze_excite_backward": lambda: OPS._squeeze_excite_backward(
            g, x, *w, z, hidden, s, g, *names, "relu", [True] * 6
        ),
        "_squeeze_excite_backward of 1×1 weights": lambda: OPS._squeeze_excite_backward(
            g, x, *k, z, hidden, s, None, *names, "identity", [True, True, False, True, False, False]
        ),
        "autograd": lambda: _gradients(x, w),
        "rescale_": lambda: _written(OPS.rescale_, x.clone(), s),
        "squeeze_excite_": lambda: _written(OPS.squeeze_excite_, x.clone(), *w, *names),
    }


def _written(op: Any, x: Tensor, *args: Any) -> Tensor:
    op(x, *args)
    return x


def _gradients(x: Tensor, w: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, *w)]
    y = OPS.squeeze_excite(*leaves, "relu", "sigmoid", leaves[0], "relu")
    return (y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y)))


def metadata(result: Any) -> list[Any]:
    tensors = (result,) if isinstance(result, Tensor) else result
    return [
        None if t is None else (t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), t.device.type, t.requires_grad)
        for t in tensors
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_results_have_the_real_ones_metadata(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](dtype)
    real = {name: metadata(call()) for name, call in calls(x).items()}
    with FakeTensorMode() as mode:
        fake = {name: metadata(call()) for name, call in calls(mode.from_tensor(x)).items()}
    assert fake == real


@pytest.mark.parametrize("layout", LAYOUTS)
def test_meta_results_have_the_real_ones_metadata(layout: str) -> None:
    x = LAYOUTS[layout](torch.float32)
    real = {name: metadata(call()) for name, call in calls(x).items()}
    with torch.device("meta"):
        on_meta = torch.empty_strided(x.shape, x.stride())
        meta = {name: metadata(call()) for name, call in calls(on_meta).items()}

    def without_device(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {name: [None if t is None else (*t[:3], t[5]) for t in row] for name, row in rows.items()}

    assert without_device(meta) == without_device(real)


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
