"""Devices without kernels of ours run the plain formula (csrc/composite.cpp).

No such device is at hand: the ops are redispatched, with CPU tensors, to the kernels that one would get.
"""

from __future__ import annotations

import pytest
import torch
from conftest import assert_close, make_map, make_weights, to_float64

from se_ext import reference

OTHER_DEVICE = torch._C.DispatchKeySet(torch._C.DispatchKey.XLA)
N, C, M, SIDE = 3, 8, 4, 5


def redispatch(name: str, *args: object) -> torch.Tensor:
    return getattr(torch.ops.se_ext, name).default.redispatch(OTHER_DEVICE, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_serves_other_devices(dtype: torch.dtype) -> None:
    x, residual, scale = make_map((N, C, SIDE, SIDE), dtype), make_map((N, C, SIDE, SIDE), dtype), torch.rand(N, C)
    weights = make_weights(C, M)
    x64, residual64, scale64, weights64 = (
        x.double(),
        residual.double(),
        scale.double(),
        [to_float64(w) for w in weights],
    )
    z, summed = make_map((N, C, 1), torch.float32).flatten(1), SIDE * SIDE + C + M

    assert_close(redispatch("squeeze", x), reference.squeeze(x64), dtype, summed)
    assert_close(redispatch("excite", z, *weights), reference.excite(z.double(), *weights64), torch.float32, summed)
    expected = reference.rescale(x64, scale64, residual64, "relu")
    assert_close(redispatch("rescale", x, scale, residual, "relu"), expected, dtype)
    expected = reference.squeeze_excite(x64, *weights64, "silu", "hardsigmoid", residual64, "tanh")
    args = (x, *weights, "silu", "hardsigmoid", residual, "tanh")
    assert_close(redispatch("squeeze_excite", *args), expected, dtype, summed)
    redispatch("squeeze_excite_", *args)
    assert_close(x, expected, dtype, summed)


def test_bad_input_is_refused_there_too() -> None:
    with pytest.raises(RuntimeError, match=r"^squeeze: expected input of shape \[N, C, \*spatial\]"):
        redispatch("squeeze", torch.randn(2, 3))
