"""torch.library.opcheck (schema, autograd registration, fake kernel, AOT dispatch) for every op of the namespace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import DTYPES, HALF
from ops import OpCase, Options, cases, layouts
from torch import Tensor

import se_ext

# The utilities of opcheck that compare with autograd or compile need ops that are differentiable and functional.
STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL = Options((3, 8, 5, 4), 4, activation="silu", gate="hardsigmoid", post_activation="relu", momentum=None)
NONE = replace(
    ALL,
    post_activation="identity",
    biases=(False, False),
    affine=(False, False),
    residual=False,
    drop_scale=False,
    batch_statistics=False,
    running=False,
    momentum=0.1,
)
optionals = pytest.mark.parametrize("options", [ALL, NONE], ids=["all", "none"])


def opcheck(case: OpCase, arguments: dict[str, Any], **kwargs: Any) -> None:
    result = torch.library.opcheck(case.op, tuple(arguments.values()), **kwargs)
    assert set(result.values()) == {"SUCCESS"}, result


@optionals
@layouts
@cases()
def test_float32(case: OpCase, channels_last: bool, options: Options) -> None:
    running = options.running or case.name.endswith("_running_")  # the statistics that these read are not optional
    opcheck(case, case.make(replace(options, channels_last=channels_last, running=running)))


@layouts
@optionals
@cases(lambda case: case.differentiable and not case.writes)
def test_recorded(case: OpCase, options: Options, channels_last: bool) -> None:
    """Leaves that require grad: opcheck compiles forward and backward, and compares gradients with eager's."""
    opcheck(case, case.make(replace(options, dtype=torch.float64, channels_last=channels_last, requires_grad=True)))


@cases(lambda case: case.forward)
def test_backward_recorded(case: OpCase) -> None:
    """With a graph being made, the backward ops take the plain formula; their registration must still hold."""
    arguments = case.make(replace(ALL, dtype=torch.float64))
    recorded = {k: t.requires_grad_() if isinstance(t, Tensor) else t for k, t in arguments.items()}
    opcheck(case, recorded, test_utils=STATIC)


@pytest.mark.parametrize("float32_weights", [False, True], ids=["", "float32 weights"])
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t is not torch.float32], ids=str)
@cases()
def test_dtypes(case: OpCase, dtype: torch.dtype, float32_weights: bool) -> None:
    if not float32_weights or dtype in HALF:
        weight_dtype = torch.float32 if float32_weights else dtype
        opcheck(case, case.make(replace(ALL, dtype=dtype, weight_dtype=weight_dtype)), test_utils=STATIC)


@pytest.mark.parametrize("shape", [(2, 8, 7), (2, 8, 2, 3, 2), (0, 8, 5, 4), (2, 8, 1, 1)], ids=str)
@cases()
def test_shapes(case: OpCase, shape: tuple[int, ...]) -> None:
    opcheck(case, case.make(replace(ALL, shape=shape, channels_last=True)), test_utils=STATIC)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch last": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
@cases(lambda case: case.has_map)
def test_strides(case: OpCase, strides: Callable[[Tensor], Tensor]) -> None:
    """Maps of a layout that the kernels do not read as it is."""
    opcheck(case, case.make(replace(ALL, maps=lambda: strides(ALL.map()))), test_utils=STATIC)


@pytest.mark.parametrize(
    ("case", "index"),
    [
        pytest.param(case, i, id=f"{case}-{name}")
        for case in cases(lambda case: case.forward).args[1]
        for i, name in enumerate(case.gradients)
    ],
)
def test_each_gradient_alone(case: OpCase, index: int) -> None:
    """A mask that asks for one gradient: the others come back undefined, from the real and the fake kernel alike."""
    arguments = case.make(ALL)
    arguments["mask"] = [i == index for i in range(len(case.gradients))]
    opcheck(case, arguments, test_utils=STATIC)
    assert [t is not None for t in case.run(arguments)] == arguments["mask"]


@cases()
def test_the_schema_says_what_is_written(case: OpCase) -> None:
    """Without the compliance tag torch.compile and export warn or refuse. An op that writes into an argument returns no
    alias of it, whose memory a compiler would reuse; test_compiled_networks.py shows what comes of that."""
    schema = case.op._schema
    assert torch.Tag.pt2_compliant_tag in case.op.tags
    assert [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write] == list(case.writes)
    assert all(r.alias_info is None for r in schema.returns)
    if case.name.endswith("_"):
        assert not schema.returns


def test_the_fake_kernel_is_torchs_own_idea_of_the_op() -> None:
    """Meta tensors run no arithmetic and touch no memory: a map of a terabyte passes."""
    big = torch.empty(1024, 1024, 512, 512, device="meta")
    w = [torch.empty(s, device="meta") for s in ((64, 1024), (64,), (1024, 64), (1024,))]
    y = se_ext.squeeze_excite(big, *w, residual=big, post_activation="relu")
    assert y.shape == big.shape
    assert y.is_meta
    assert se_ext.squeeze(big).shape == (1024, 1024)
