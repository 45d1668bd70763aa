"""Every op on shapes, strides, dtypes and options drawn at random: forward and all gradients against the formula in
float64. The strategies follow from the table of ops, so a new op joins by itself."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch
from helpers import HALF, make_map
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from ops import CASES, KINKS, OpCase, Options, in_float64
from strategies import IS_LONG, OTHER_VALUES, SAME_VALUES, TIMES
from torch import Tensor

pytestmark = pytest.mark.cpu_only

EXAMPLES = 60  # of an op
# Data, each drawn anew, on which a call of the long form has to be wrong. Now and then a value lies where a slope
# jumps, or a gradient is what is left of terms that cancel: then rounding decides it. A wrong stride, tail or name is
# wrong on all data. The short form is the same at every run, and right at once.
ATTEMPTS = 3 if IS_LONG else 1
MOST = 4000  # elements of a map: an example takes milliseconds
SAMPLES = [1, 2, 3, 5]
CHANNELS = [1, 2, 3, 7, 8, 16, 17, 31, 64, 127, 130]
SPATIAL = [1, 2, 3, 5, 7, 8, 13, 16, 31, 61]
HIDDEN = [1, 2, 3, 8, 11, 33]
# Values of a channel. Of few, normalised, little is left that depends on the input: its gradient is what roundings
# leave of terms that cancel.
FEWEST = 12
OPTIONS = {"layout", "dtypes"}  # of the domains, those that are drawn in another way


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Of maps: small ones, some of them empty or of one point."""
    rank = draw(st.integers(1, 3))
    common = draw(st.sampled_from([None, None, 1, 7]))  # 1 x 1 and 7 x 7 maps
    shape = [draw(st.sampled_from(SAMPLES)), draw(st.sampled_from(CHANNELS))]
    for _ in range(rank):
        room = MOST // torch.Size(shape).numel()
        fitting = [size for size in SPATIAL if size <= max(1, room)]
        shape.append(common if common in fitting else draw(st.sampled_from(fitting)))
    if draw(st.integers(0, 11)) == 0:
        shape[draw(st.integers(0, rank + 1))] = 0
    return tuple(shape)


def is_batch_norm(case: OpCase) -> bool:
    return "eps" in case.names


@st.composite
def options_for(draw: st.DrawFn, case: OpCase) -> tuple[Options, list[str]]:
    """Options of a call, and the kinds of memory that its tensors lie in."""
    domains = case.domains()
    drawn = {name: draw(st.sampled_from(values)) for name, values in domains.items() if name not in OPTIONS}
    dtype, weight_dtype = draw(st.sampled_from(domains["dtypes"]))
    drawn["momentum"] = draw(st.sampled_from([0.1, 0.7, 1.0, None]))
    options = Options(draw(shapes()), draw(st.sampled_from(HIDDEN)), dtype, weight_dtype, **drawn)
    kinds = draw(st.lists(st.sampled_from(list(SAME_VALUES)), min_size=1, max_size=5))
    of_maps = list(SAME_VALUES)
    if not case.writes and options.points > 1:
        # A channel of which all values are one has no variance, and a gradient that rounding decides.
        of_maps += ["expanded channels"] if is_batch_norm(case) else list(OTHER_VALUES)
    map_kinds = draw(st.lists(st.sampled_from(of_maps), min_size=1, max_size=3))
    names = set(case.differentiable)
    if dtype in HALF and options.residual and drawn.get(case.last_activation) in ("tanh", "sigmoid"):
        names = set()  # where y is near its bound, the slope that follows from it is mostly the rounding of y
    wanted = draw(st.one_of(st.just(names), st.sets(st.sampled_from(sorted(names)))) if names else st.just(names))
    return replace(options, requires_grad=wanted, maps=None), [*kinds, "|", *map_kinds]


def make(case: OpCase, options: Options, kinds: list[str], map_kinds: list[str]) -> dict[str, Any]:
    """Arguments, each in memory of another kind."""
    of_map, of_rest = cycle(map_kinds), cycle(kinds)
    both = SAME_VALUES | OTHER_VALUES

    def a_map() -> Tensor:
        return both[next(of_map)](make_map(options.shape, options.dtype))

    made = case.make(replace(options, maps=a_map))
    for name, t in made.items():
        is_map = isinstance(t, Tensor) and t.shape == options.shape
        if isinstance(t, Tensor) and t.is_floating_point() and not is_map and t.dim() > 0:
            made[name] = SAME_VALUES[next(of_rest)](t.detach()).requires_grad_(t.requires_grad)
    return made


def trains(case: OpCase, options: Options) -> bool:
    if "training" in case.names:
        return options.batch_statistics or not options.running
    return "batch_statistics" in case.names and options.batch_statistics


def refusal(case: OpCase, options: Options) -> str | None:
    """What the op says of arguments that it does not take."""
    if trains(case, options) and options.shape[0] * options.points == 1:
        return "expected more than one value per channel when training"
    if case.needs_points and 0 in options.shape[2:]:
        return "expected input of at least one point along each spatial dim"
    return None


def gradient(case: OpCase, options: Options, arguments: dict[str, Any], kind: str) -> Tensor | None:
    """dL/dy in memory of that kind, nothing where the last activation has a kink; None where none is needed."""
    if not case.leaves(arguments):
        return None
    exact = in_float64(arguments)
    with torch.no_grad():
        y = case.exact(exact)[0]
        grad = torch.randn_like(y).to(options.dtype)
        at_a_kink = case._at_a_kink(options, exact)
    if at_a_kink is not None:
        grad = grad.masked_fill(at_a_kink, 0)
    return SAME_VALUES[kind](grad)


def check_empty(case: OpCase, options: Options, arguments: dict[str, Any]) -> None:
    """Of maps without elements: the formula's shapes, and its NaNs of means over nothing."""
    found = case.run({k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()})
    try:
        exact = case.exact(in_float64(arguments))
    except (ValueError, RuntimeError, IndexError):
        return  # torch has no batch norm of nothing
    for ours, theirs in zip(found, exact, strict=True):
        if theirs is None:
            assert ours is None or ours.numel() == 0
        elif case.forward and {options.activation, options.gate} & set(KINKS):
            assert ours.shape == theirs.shape  # at a NaN, torch's slope is now 0 and now NaN, by vector and by value
        elif not is_batch_norm(case):
            torch.testing.assert_close(ours.double(), theirs.detach(), equal_nan=True, rtol=0.02, atol=0.02)
    leaves = case.leaves(arguments)
    if leaves:
        y = case.run(arguments)[0]
        for leaf, grad in zip(leaves.values(), torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
            assert grad.shape == leaf.shape


@pytest.fixture(autouse=True)
def one_thread_is_enough(restore_threads: None) -> None:
    """Small maps; the reference's tiny products, spread over threads, would take most of the time."""
    torch.set_num_threads(2)


def try_once(case: OpCase, options: Options, kinds: list[str]) -> None:
    middle = kinds.index("|")
    try:
        arguments = make(case, options, kinds[:middle], kinds[middle + 1 :])
    except RuntimeError as error:
        if case.forward and "at least as large as the filter" in str(error):
            reject()
        raise
    message = refusal(case, options)
    if message:
        with pytest.raises((ValueError, RuntimeError), match=message):
            case.run(arguments)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of means of nothing
        if 0 in options.shape:
            check_empty(case, options, arguments)
        else:
            case.check(options, arguments, gradient(case, options, arguments, kinds[0]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_random_calls(case: OpCase) -> None:
    @settings(
        max_examples=EXAMPLES * TIMES,
        deadline=None,
        derandomize=not IS_LONG,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(options_for(case), st.integers(0, 2**31))
    def check(drawn: tuple[Options, list[str]], seed: int) -> None:
        options, kinds = drawn
        if case.forward and refusal(case, options):
            reject()  # forward leaves nothing for it
        if trains(case, options) and 1 < options.shape[0] * options.points < FEWEST:
            reject()
        for attempt in range(ATTEMPTS):
            torch.manual_seed(seed + attempt)
            try:
                try_once(case, options, kinds)
                break
            except AssertionError:
                if attempt == ATTEMPTS - 1:
                    raise

    check()
