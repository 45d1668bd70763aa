"""Views that negate: torch keeps a bit for the sign, and what reads the memory without it is wrong.

`torch._neg_view` makes such a view, and so does the imaginary part of a conjugate.
"""

from __future__ import annotations

from typing import Any

import torch
from ops import OpCase, Options, cases
from torch import Tensor


def negated_twice(value: Any) -> Any:
    """The same values, as a negating view of their negatives."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    view = torch._neg_view(torch.empty_like(value).copy_(value).neg_())
    assert view.is_neg()
    return view


@cases()
def test_every_argument_may_be_one(case: OpCase) -> None:
    """Also what an op writes: torch's fallback for such views wrote into freed memory where an op returns nothing."""
    for name in (None, *case.names):  # all at once, then one by one
        for pre_activation in ("identity", "silu"):
            plain = case.make(Options(pre_activation=pre_activation))
            views = {k: negated_twice(v) if name in (None, k) else v for k, v in copied(plain).items()}
            for i, (ours, theirs) in enumerate(zip(case.run(views), case.run(plain), strict=True)):
                if theirs is not None:
                    what = f"result {i} with {name or 'all arguments'} negated"
                    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda m, w=what: f"{w}: {m}")


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.empty_like(v).copy_(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
