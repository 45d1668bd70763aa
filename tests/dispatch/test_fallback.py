"""Devices without kernels of ours run the plain formula (csrc/formula/formula.cpp).

No such device is at hand: the ops are redispatched, with CPU tensors, to the kernels that one would get.
"""

from __future__ import annotations

import pytest
import torch
from helpers import redispatch
from ops import CASES, OpCase, Options

pytestmark = pytest.mark.cpu_only

# The formula is registered for the ops that users and networks call; backward is torch's own.
FORMULA = [
    case for case in CASES if not (case.forward or case.name.endswith("_forward") or "running_mean" in case.writes)
]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        pytest.param(case, options, id=f"{case}-{options}")
        for case in FORMULA
        for options in case.variations(crossed=())
    ],
)
def test_the_formula_serves_other_devices(case: OpCase, options: Options) -> None:
    case.check(options, redispatched=True)


def test_bad_input_is_refused_there_too() -> None:
    with pytest.raises(RuntimeError, match=r"^squeeze: expected input of shape \[N, C, \*spatial\]"):
        redispatch("squeeze", torch.randn(2, 3))
