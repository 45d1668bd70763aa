"""Devices without kernels of ours run the plain formula (csrc/composite.cpp).

No such device is at hand: the ops are redispatched, with CPU tensors, to the kernels that one would get.
"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, make_map, make_weights, redispatch, to_float64

from se_ext import reference

pytestmark = pytest.mark.cpu_only

N, C, M, SIDE = 3, 8, 4, 5


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


@pytest.mark.parametrize("batch_statistics", [False, True], ids=["affine", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_too(dtype: torch.dtype, batch_statistics: bool) -> None:
    x, residual = make_map((N, C, SIDE, SIDE), dtype), make_map((N, C, SIDE, SIDE), dtype)
    weight, bias, drop, weights = torch.rand(C) + 0.5, torch.randn(C), torch.rand(N), make_weights(C, M)
    names = ("silu", "relu", "sigmoid", residual, "tanh", drop)
    y, mean, var = redispatch("bn_squeeze_excite", x, weight, bias, *weights, batch_statistics, 1e-5, *names)
    x64, exact = x.double(), [to_float64(w) for w in weights]
    # A given affine map is a batch norm of mean 0 and variance 1.
    statistics = (None, None) if batch_statistics else (torch.zeros(C).double(), torch.ones(C).double())
    expected = reference.bn_squeeze_excite(
        x64,
        weight.double(),
        bias.double(),
        *statistics,
        *exact,
        training=batch_statistics,
        eps=1e-5 if batch_statistics else 0.0,
        pre_activation="silu",
        residual=residual.double(),
        post_activation="tanh",
        drop_scale=drop.double(),
    )
    assert_close(y, expected, dtype, N * SIDE * SIDE)
    if batch_statistics:
        assert_close(mean, x64.mean((0, 2, 3)), torch.float32, N * SIDE * SIDE)
        assert_close(var, x64.var((0, 2, 3), correction=0), torch.float32, N * SIDE * SIDE)
    else:
        assert mean.numel() == var.numel() == 0


def test_bad_input_is_refused_there_too() -> None:
    with pytest.raises(RuntimeError, match=r"^squeeze: expected input of shape \[N, C, \*spatial\]"):
        redispatch("squeeze", torch.randn(2, 3))
