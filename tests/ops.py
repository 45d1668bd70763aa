"""One table of all ops of the namespace, public and private: `CASES`. Each promise's tests take it as their parameter.

An entry says what an op computes, in float64. Its arguments follow from its schema, because a name has one meaning
everywhere: `input` is a map [N, C, *spatial], `w1` is [M, C], and so on (`PARTS`). So a new op needs one entry, and one
part for each argument of a new name. Where a name means something else in an op, its entry has parts of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    ACTIVATIONS,
    DTYPES,
    GATES,
    HALF,
    assert_close,
    cpu_kernels,
    make_map,
    make_weights,
    memory_format,
    one_thread,
    redispatch,
)
from torch import Tensor

from se_ext import reference

# Maps: of full size. Rows: one per sample, [N, …]. (Vectors and weights have no samples.)
MAPS = ("input", "residual", "saved", "grad_output")
ROWS = (*MAPS, "z", "hidden", "scale", "sample_means", "drop_scale")
# (spatial shape, channels_last)
LAYOUTS = [((37,), False), ((5, 7), False), ((5, 7), True), ((3, 4, 3), False), ((3, 4, 3), True)]
# Which of two optional tensors are there: two biases, or a batch norm's weight and bias.
EITHER = [(True, True), (False, False), (True, False), (False, True)]
WEIGHTS_AND_DTYPES = [(d, d) for d in DTYPES] + [(d, torch.float32) for d in DTYPES if d in HALF]
# Pairs of activations before and after the block: those that kernels are compiled for, and one that takes the switch.
PAIRS = [
    ("identity", "identity"),
    ("identity", "relu"),
    ("identity", "silu"),
    ("relu", "identity"),
    ("silu", "identity"),
    ("hardswish", "identity"),
    ("gelu", "tanh"),
]
# Where an activation's slope jumps.
KINKS = {
    "relu": (0.0,),
    "relu6": (0.0, 6.0),
    "leaky_relu": (0.0,),
    "hardswish": (-3.0, 3.0),
    "hardsigmoid": (-3.0, 3.0),
}
# Last activations whose slope follows from the output: a function of it.
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: (y > 0).to(y.dtype),
    "relu6": lambda y: ((y > 0) & (y < 6)).to(y.dtype),
    "leaky_relu": lambda y: torch.where(y > 0, torch.ones_like(y), torch.full_like(y, 0.01)),
    "tanh": lambda y: 1 - y * y,
    "sigmoid": lambda y: y * (1 - y),
}


@dataclass(frozen=True)
class Options:
    """What one call is like. An op takes the options that its arguments have a place for."""

    shape: tuple[int, ...] = (3, 19, 5, 7)  # of the map: N, C, *spatial
    hidden: int = 5  # M, the squeezed width
    dtype: torch.dtype = torch.float32  # of maps
    weight_dtype: torch.dtype | None = None  # of everything else; None: the maps'
    channels_last: bool = False
    activation: str = "relu"
    gate: str = "sigmoid"
    pre_activation: str = "identity"
    post_activation: str = "relu"
    biases: tuple[bool, bool] = (True, True)  # b1, b2
    affine: tuple[bool, bool] = (True, True)  # a batch norm's weight and bias
    residual: bool = True
    drop_scale: bool = True
    batch_statistics: bool = True  # else an affine map, or the running statistics
    running: bool = True  # running statistics, and a count of batches
    momentum: float | None = 0.1
    convolutions: bool = False  # weights [M, C, 1, 1] and [C, M, 1, 1]
    kernel: int = 3  # the width of a depthwise convolution's filter; in the other dims it is 3
    stride: int = 1
    padding: str | int | tuple[int, int] = "same"  # or as many zeros, times dilation, on both sides or on each
    dilation: int = 1
    requires_grad: bool | Collection[str] = False  # all arguments that have a gradient, or those named
    maps: Callable[[], Tensor] | None = None  # makes every map, instead of a random one in one of the two layouts

    @property
    def weights(self) -> torch.dtype:
        return self.weight_dtype or self.dtype

    @property
    def accumulate(self) -> torch.dtype:
        return torch.float32 if self.dtype in HALF else self.dtype

    @property
    def points(self) -> int:
        return torch.Size(self.shape[2:]).numel()

    @property
    def taps(self) -> int:
        return math.prod(self.filter)

    @property
    def filter(self) -> tuple[int, ...]:
        return (3, 3, self.kernel)[5 - len(self.shape) :]

    def map(self) -> Tensor:
        return self.maps() if self.maps else make_map(self.shape, self.dtype, self.channels_last)

    def map_of(self, shape: tuple[int, ...]) -> Tensor:
        """Of an output that may be smaller than the input."""
        return self.map() if shape == self.shape else make_map(shape, self.dtype, self.channels_last)

    def filters(self) -> Tensor:
        weight = torch.randn(self.shape[1], 1, *self.filter, dtype=torch.float64) / math.sqrt(self.taps)
        return weight.to(self.weights)

    def zeros(self) -> list[int]:
        """The padding of a convolution, as the op takes it."""
        if self.padding == "same":
            return []
        if isinstance(self.padding, int):
            return [self.padding * self.dilation]
        return [zeros * self.dilation for _ in self.filter for zeros in self.padding]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        return torch.randn(self.shape[:2], dtype=torch.float64).to(dtype)

    def vector(self, center: float) -> Tensor:
        return (center + torch.rand(self.shape[1], dtype=torch.float64) - 0.5).to(self.weights)

    def weight(self, name: str) -> Tensor | None:
        present = dict(zip(("b1", "b2"), self.biases, strict=True)).get(name, True)
        made = dict(zip(("w1", "b1", "w2", "b2"), make_weights(self.shape[1], self.hidden, self.weights), strict=True))
        weight = made[name] if present else None
        return weight[:, :, None, None] if self.convolutions and name in ("w1", "w2") else weight

    def __str__(self) -> str:
        """The dtype, and the options that differ from the defaults."""
        words = [str(self.dtype).removeprefix("torch.")]
        if self.weights is not self.dtype:
            words.append(f"{self.weights} weights".removeprefix("torch."))
        for name, value in vars(self).items():
            if value != getattr(Options, name) and name not in ("dtype", "weight_dtype", "requires_grad", "maps"):
                words.append(f"{name}={value}".replace("_activation", "").replace(", ", ",").removesuffix("=True"))
        return "-".join(words)


# What stands for an argument of a name.
PARTS: dict[str, Callable[[Options], Any]] = {
    "input": Options.map,
    "grad_output": Options.map,
    "residual": lambda o: o.map() if o.residual else None,
    "z": lambda o: o.matrix(o.dtype),
    "scale": lambda o: o.matrix(o.weights),
    "w1": lambda o: o.weight("w1"),
    "b1": lambda o: o.weight("b1"),
    "w2": lambda o: o.weight("w2"),
    "b2": lambda o: o.weight("b2"),
    "bn_weight": lambda o: o.vector(1.0) if o.affine[0] else None,
    "bn_bias": lambda o: o.vector(0.0) if o.affine[1] else None,
    "running_mean": lambda o: o.vector(0.0) if o.running else None,
    "running_var": lambda o: o.vector(1.0) if o.running else None,
    "num_batches_tracked": lambda o: torch.tensor(3) if o.running else None,
    "drop_scale": lambda o: ((torch.arange(o.shape[0]) % 3 > 0) * 1.25).to(o.weights) if o.drop_scale else None,
    "batch_statistics": lambda o: o.batch_statistics,
    "training": lambda o: o.batch_statistics or not o.running,
    "momentum": lambda o: o.momentum,
    "eps": lambda o: 1e-5,
    "pre_activation": lambda o: o.pre_activation,
    "activation": lambda o: o.activation,
    "gate": lambda o: o.gate,
    "post_activation": lambda o: o.post_activation,
}
PARTS["weight"], PARTS["bias"] = PARTS["bn_weight"], PARTS["bn_bias"]

# The values that an option goes through in an op with an argument of the name.
DOMAINS: dict[str, tuple[str, list[Any]]] = {
    "activation": ("activation", ACTIVATIONS),
    "gate": ("gate", GATES),
    "pre_activation": ("pre_activation", ACTIVATIONS),
    "post_activation": ("post_activation", ACTIVATIONS),
    "residual": ("residual", [False, True]),
    "saved": ("residual", [False, True]),
    "b1": ("biases", EITHER),
    "w1": ("convolutions", [False, True]),
    "bn_weight": ("affine", EITHER),
    "weight": ("affine", EITHER),
    "batch_statistics": ("batch_statistics", [False, True]),
    "training": ("batch_statistics", [False, True]),
    "drop_scale": ("drop_scale", [False, True]),
    "input": ("layout", LAYOUTS),
}

# The parts and the domains of a depthwise convolution, which names its filters as a batch norm names its vectors. A
# filter of an even width, a stride of 3 and a dilation of 2 are ATen's.
FILTER_PARTS: dict[str, Callable[[Options], Any]] = {
    "weight": Options.filters,
    "bias": lambda o: o.vector(0.0) if o.biases[0] else None,
    "stride": lambda o: [o.stride],
    "padding": Options.zeros,
    "dilation": lambda o: [o.dilation],
}
FILTER_DOMAINS: dict[str, tuple[str, list[Any]]] = {
    "weight": ("kernel", [3, 5, 7, 2]),
    "bias": ("biases", [(True, True), (False, False)]),
    "stride": ("stride", [1, 2, 3]),
    "padding": ("padding", ["same", 3, (4, 2)]),
    "dilation": ("dilation", [1, 2]),
}

Outputs = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class OpCase:
    """An op, and what is true of it.

    reference: the formula; takes the op's arguments in float64, by name, and returns one tensor for each of the op's
        outputs and then for each argument that it writes (None: an output that is absent or has no elements).
    summed: the lengths of the longest sums in the outputs and in the gradients, for `helpers.tolerance`.
    differentiable: the arguments that get gradients from the first output; without any the op has no derivative.
    writes: the arguments that the op writes.
    crossed: the options of which every combination is tried, not every pair alone.
    forward: of a backward op, the op whose outputs it is given, and the names that it has for them (None: not given).
    own_parts, own_domains: of arguments whose names mean something else in this op than elsewhere.
    """

    name: str
    reference: Callable[..., Outputs]
    summed: Callable[[Options], tuple[int, int]]
    differentiable: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    crossed: tuple[str, ...] = ()
    forward: tuple[str, tuple[str | None, ...]] | None = None
    own_parts: dict[str, Callable[[Options], Any]] = field(default_factory=dict, hash=False)
    own_domains: dict[str, tuple[str, list[Any]]] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name

    @property
    def op(self) -> Any:
        return getattr(torch.ops.se_ext, self.name).default

    @property
    def names(self) -> list[str]:
        """The arguments' names, in the order of the schema."""
        return [argument.name for argument in self.op._schema.arguments]

    @property
    def last_activation(self) -> str:
        """The argument that names the last activation, behind the residual."""
        return "post_activation" if "post_activation" in self.names else "activation"

    @property
    def is_public(self) -> bool:
        return not self.name.startswith("_")

    @property
    def has_map(self) -> bool:
        return "input" in self.names

    @property
    def is_atens(self) -> bool:
        """Whether ATen computes it where the tests run: then its bits are ATen's affair."""
        return "dilation" in self.names and not cpu_kernels()

    @property
    def needs_points(self) -> bool:
        """A map of no points is refused, as torch's convolution refuses it."""
        return "dilation" in self.names

    # ---- arguments ----

    def make(self, options: Options = Options()) -> dict[str, Any]:
        """Fresh random arguments, by name."""
        parts = PARTS | self.own_parts
        made = self._backward(options) if self.forward else {name: parts[name](options) for name in self.names}
        wanted = options.requires_grad
        for name in self.differentiable:
            if made[name] is not None and (wanted is True or (wanted is not False and name in wanted)):
                made[name].requires_grad_()
        return made

    def _backward(self, options: Options) -> dict[str, Any]:
        """Of a backward op: forward's arguments, what forward gave, a gradient, and a mask that asks for all."""
        name, outputs = self.forward
        forward = BY_NAME[name]
        given = forward.make(replace(options, requires_grad=False))
        found = dict(zip(outputs, forward.run(given), strict=True))
        output, residual = found.pop("output", None), given.pop("residual", None)
        made = {**given, **{k: v for k, v in found.items() if k}}
        made["grad_output"] = options.map_of(output.shape) if self.has_map else options.matrix(options.dtype)
        if "saved" in self.names:
            post = given[self.last_activation]
            absent = residual is None or post == "identity"
            made["saved"] = None if absent else output if post in SLOPES else residual
        made["mask"] = [given[k] is not None if k in given else options.residual for k in self.gradients]
        return {name: made[name] for name in self.names}

    @property
    def gradients(self) -> list[str]:
        """Of a backward op: the names of its outputs."""
        return [r.name for r in self.op._schema.returns]

    # ---- calls ----

    def run(self, arguments: dict[str, Any], redispatched: bool = False) -> list[Tensor | None]:
        """The op's outputs, and then the arguments that it writes.

        `redispatched`: of the kernel that devices without kernels of ours get.
        """
        found = redispatch(self.name, *arguments.values()) if redispatched else self.op(**arguments)
        outputs = [] if found is None else [found] if isinstance(found, Tensor) else list(found)
        return [*outputs, *(arguments[name] for name in self.writes)]

    def exact(self, arguments: dict[str, Any]) -> Outputs:
        """The same of the formula in float64."""
        with one_thread():
            return self.reference(**arguments)

    def leaves(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """The arguments that gradients are wanted of."""
        return {k: arguments[k] for k in self.differentiable if arguments[k] is not None and arguments[k].requires_grad}

    def step(self, arguments: dict[str, Any], grad: Tensor | None) -> list[Tensor]:
        """The outputs that there are, and the gradients that are wanted."""
        found, leaves = self.run(arguments), list(self.leaves(arguments).values())
        gradients = torch.autograd.grad(found[0], leaves, grad) if leaves else ()
        return [t for t in (*found, *gradients) if t is not None]

    # ---- checks ----

    def check(
        self,
        options: Options,
        arguments: dict[str, Any] | None = None,
        grad: Tensor | None = None,
        redispatched: bool = False,
    ) -> None:
        """Compares outputs, what is written, and the gradients that are wanted with the formula in float64.

        `arguments`: random ones unless given. `grad`: dL/dy, random unless given. `redispatched`: see `run`.
        """
        has_layout = arguments is None and options.maps is None
        arguments = self.make(options) if arguments is None else arguments
        exact_arguments = in_float64(arguments)
        found, exact = self.run(arguments, redispatched), self.exact(exact_arguments)
        forward, backward = self.summed(options)
        names = [*(r.name for r in self.op._schema.returns), *self.writes]
        summed, rounded = (backward, options.dtype) if self.forward else (forward, None)
        for i, (name, ours, theirs) in enumerate(zip(names, found, exact, strict=True)):

            def exact_again(moved: dict[str, Any], i: int = i) -> Tensor | None:
                return self.exact(moved)[i]

            if has_layout:
                self._check_layout(name, options, ours)
            dtype = self._dtype(name, options, arguments)  # a saved tensor may be of the map's dtype
            self._compare(f"output {i}, {name}", ours, theirs, dtype, summed, rounded, exact_arguments, exact_again)
        leaves = self.leaves(arguments)
        if not leaves:
            assert not any(t is not None and t.requires_grad for t in found)
            return
        y = found[0]
        if grad is None:
            grad = torch.randn_like(y, dtype=torch.float64).to(y.dtype)
            if (at_a_kink := self._at_a_kink(options, exact_arguments)) is not None:
                grad = grad.masked_fill(at_a_kink, 0)
        grads = torch.autograd.grad(y, list(leaves.values()), grad)
        with one_thread():
            exact_grads = torch.autograd.grad(exact[0], [exact_arguments[k] for k in leaves], grad.double())
        for (name, leaf), ours, theirs in zip(leaves.items(), grads, exact_grads, strict=True):

            def exact_gradient(moved: dict[str, Any], name: str = name) -> Tensor:
                return torch.autograd.grad(self.exact(moved)[0], moved[name], grad.double())[0]

            what = f"gradient of {name}"
            if has_layout:
                self._check_layout(what, options, ours)
            self._compare(what, ours, theirs, leaf.dtype, backward, y.dtype, exact_arguments, exact_gradient)

    def _check_layout(self, what: str, options: Options, t: Tensor | None) -> None:
        """Maps come in the layout of those given; squeeze's gradient is an expanded view."""
        is_map = t is not None and t.dim() == len(options.shape) and t.shape[:2] == options.shape[:2]
        if self.has_map and is_map and 0 not in t.stride():
            assert t.is_contiguous(memory_format=memory_format(t.dim(), options.channels_last)), f"{what}: {t.stride()}"

    def _compare(
        self,
        what: str,
        ours: Tensor | None,
        theirs: Tensor | None,
        dtype: torch.dtype,
        summed: int,
        rounded: torch.dtype | None,
        arguments: dict[str, Any],
        exact: Callable[[dict[str, Any]], Tensor | None],
    ) -> None:
        """Within `helpers.tolerance`, or within what roundings explain.

        The tolerance is a part of the result. Where terms cancel, the result is small beside its terms, and their
        roundings are a larger part of it. Then the error is measured by the condition of the formula on these
        arguments: `moves` is how far the exact result moves when every argument moves by 2 eps, signs at random. The
        tolerance counts 8 eps for stored and evaluated factors; 8 eps have 4 times the effect of 2. The sums' own
        roundings, the tolerance's other part, are allowed nothing here. Half types: eps is that of the accumulation
        type, so that an error in storing is not excused.
        """
        try:
            compare(ours, theirs, dtype, summed, rounded)
        except AssertionError as error:
            if ours is None or theirs is None or ours.shape != theirs.shape or not dtype.is_floating_point:
                raise AssertionError(f"{what}: {error}") from None
            eps = torch.finfo(max(dtype, torch.float32, key=lambda t: torch.finfo(t).bits)).eps
            with one_thread():
                moved = exact(moved_by(2 * eps, arguments))
            off, moves = (ours.double() - theirs).abs().max(), (moved - theirs).abs().max()
            if not off <= 4 * moves:
                raise AssertionError(f"{what}: {error}, and {off / moves:.3g} times what roundings explain") from None

    def _dtype(self, name: str, options: Options, arguments: dict[str, Any]) -> torch.dtype:
        """Of an output: that of the argument of its name; of the map; of small results, float32 for half types."""
        if isinstance(arguments.get(name), Tensor):
            return arguments[name].dtype
        return options.dtype if name in ("", "output", "residual") else options.accumulate

    def _at_a_kink(self, options: Options, exact_arguments: dict[str, Any]) -> Tensor | None:
        """Where the last activation's slope jumps and rounding may take either side: no gradient is asked for there.

        At 6 relu6's slope follows from y, which is rounded to the map's dtype. (Exactly at the kinks of short sums, the
        slope is torch's: test_slopes_at_the_kinks.)
        """
        name = self.last_activation
        kinks = KINKS.get(exact_arguments.get(name, ""), ())
        if not kinks or ("gate" in self.names and name == "activation"):
            return None
        with torch.no_grad():
            v = self.exact(exact_arguments | {name: "identity"})[0]
        dtypes = [options.dtype if kink == 6 else options.accumulate for kink in kinks]
        near = [(v - kink).abs() < 6 * torch.finfo(dtype).eps for kink, dtype in zip(kinks, dtypes, strict=True)]
        return torch.stack(near).any(0)

    # ---- variations ----

    def domains(self) -> dict[str, list[Any]]:
        """The options that the op takes, and the values that they go through."""
        domains = DOMAINS | self.own_domains
        return dict(domains[name] for name in self.names if name in domains) | {"dtypes": WEIGHTS_AND_DTYPES}

    def variations(self, crossed: Collection[str] | None = None, **other: list[Any]) -> list[Options]:
        """Every combination of the `crossed` options, and every pair of values of any two options.

        `other`: values of options instead of those of `domains`.
        """
        rows = covering(self.domains() | other, self.crossed if crossed is None else crossed)
        return [options_of(**row) for row in rows]


def options_of(
    dtypes: tuple[torch.dtype, torch.dtype],
    layout: tuple[tuple[int, ...], bool] = ((5, 7), False),
    **options: Any,
) -> Options:
    (spatial, channels_last), (dtype, weight_dtype) = layout, dtypes
    return Options((3, 19, *spatial), 5, dtype, weight_dtype, channels_last, **options)


def covering(domains: dict[str, list[Any]], crossed: Collection[str] = ()) -> list[dict[str, Any]]:
    """Rows of values, one for each name, among which is every combination of the `crossed` names' values and every pair
    of values of two names. Greedy: each row takes what adds most pairs that are not yet there."""
    pairs = {
        (a, i, b, j)
        for a, b in combinations(domains, 2)
        for i, j in product(range(len(domains[a])), range(len(domains[b])))
    }
    order = {name: position for position, name in enumerate(domains)}

    def new(row: dict[str, int], name: str, index: int) -> int:
        """How many of the missing pairs `name` at `index` makes with the names in the row."""
        return sum(
            ((other, j, name, index) if order[other] < order[name] else (name, index, other, j)) in pairs
            for other, j in row.items()
        )

    def complete(row: dict[str, int]) -> dict[str, Any]:
        for name in domains:
            if name not in row:
                # Ties turn with the number of rows, so that they do not all fall to the first value.
                turn = len(rows)
                indices = range(len(domains[name]))
                row[name] = max(indices, key=lambda i: (new(row, name, i), (i - turn) % len(indices)))
        pairs.difference_update((a, row[a], b, row[b]) for a, b in combinations(domains, 2))
        return {name: domains[name][index] for name, index in row.items()}

    rows: list[dict[str, Any]] = []
    if crossed:
        for indices in product(*(range(len(domains[name])) for name in crossed)):
            rows.append(complete(dict(zip(crossed, indices, strict=True))))
    while pairs:
        a, i, b, j = min(pairs)
        rows.append(complete({a: i, b: j}))
    return rows or [{}]


def compare(
    ours: Tensor | None, exact: Tensor | None, dtype: torch.dtype, summed: int, rounded: torch.dtype | None = None
) -> None:
    """Values of `dtype` against float64. `rounded`: the dtype of what they are computed from, which may be coarser."""
    if exact is None:
        assert ours is None or ours.numel() == 0
        return
    assert ours is not None, "absent"
    assert ours.dtype is dtype, f"{ours.dtype}, expected {dtype}"
    if not dtype.is_floating_point:
        assert torch.equal(ours, exact)
        return
    coarser = max(dtype, rounded or dtype, key=lambda t: torch.finfo(t).eps)
    assert_close(ours.detach(), exact.detach(), coarser, summed)


def moved_by(part: float, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments in float64, every value of theirs greater or less by this part of it."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        sign = torch.randint(0, 2, value.shape, dtype=torch.float64, device=value.device) * 2 - 1
        return (value.detach() * (1 + part * sign)).requires_grad_(value.requires_grad)

    return {name: move(value) for name, value in arguments.items()}


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the formula: float64 leaves of the same values, in memory of their own."""

    def exact(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        copy = value.detach().clone()
        return copy.double().requires_grad_(value.requires_grad) if value.is_floating_point() else copy

    return {name: exact(value) for name, value in arguments.items()}


# ---- the formulas ----


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, batch_statistics: bool, eps: float
) -> tuple[Tensor, Outputs]:
    """weight ⊙ norm(x) + bias, and of the batch: mean, biased variance, 1 / sqrt(var + eps)."""
    if batch_statistics:
        dims = [0, *range(2, x.dim())]
        mean, var = x.detach().mean(dims), x.detach().var(dims, correction=0)
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), (mean, var, (var + eps).rsqrt())
    shape = (-1, *[1] * (x.dim() - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape), (None, None, None)


def excited(z: Tensor, w1: Tensor, b1: Any, w2: Tensor, b2: Any, activation: str, gate: str) -> tuple[Tensor, Tensor]:
    """(scale, hidden): hidden is W1 z + b1, before the activation."""
    return reference.excite(z, w1, b1, w2, b2, activation, gate), F.linear(z, w1.flatten(1), b1)


def excite_forward(z: Tensor, **excitation: Any) -> Outputs:
    return excited(z, **excitation)


def squeeze_excite_forward(input: Tensor, residual: Tensor | None, post_activation: str, **excitation: Any) -> Outputs:
    z = reference.squeeze(input)
    scale, hidden = excited(z, **excitation)
    return reference.rescale(input, scale, residual, post_activation), z, hidden, scale


def bn_squeeze_excite_forward(
    input: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    batch_statistics: bool,
    eps: float,
    pre_activation: str,
    residual: Tensor | None,
    post_activation: str,
    drop_scale: Tensor | None,
    **excitation: Any,
) -> Outputs:
    """scale is without drop_scale."""
    norm, statistics = normalise(input, bn_weight, bn_bias, batch_statistics, eps)
    u = reference.ACTIVATIONS[pre_activation](norm)
    z = reference.squeeze(u)
    scale, hidden = excited(z, **excitation)
    dropped = scale if drop_scale is None else scale * drop_scale[:, None]
    y = reference.rescale(u, dropped, residual, post_activation)
    return y, *statistics, reference.squeeze(input) if pre_activation == "identity" else None, z, hidden, scale


def bn_squeeze_excite(**arguments: Any) -> Outputs:
    return bn_squeeze_excite_forward(**arguments)[:3]


def bn_activation(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_statistics: bool,
    eps: float,
    activation: str,
    residual: Tensor | None,
    drop_scale: Tensor | None,
) -> Outputs:
    v, statistics = normalise(input, weight, bias, batch_statistics, eps)
    if drop_scale is not None:
        v = v * drop_scale.view(-1, *[1] * (v.dim() - 1))
    return reference.ACTIVATIONS[activation](v if residual is None else v + residual), *statistics


def with_running_statistics(y: Callable[..., Tensor]) -> Callable[..., Outputs]:
    """`y` of the batch's statistics, or of the running ones as an affine map; and the running statistics as
    torch.nn.BatchNorm leaves them."""

    def formula(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float | None,
        eps: float,
        **rest: Any,
    ) -> Outputs:
        weight, bias = ("bn_weight", "bn_bias") if "bn_weight" in rest else ("weight", "bias")
        count = None if num_batches_tracked is None else num_batches_tracked + training
        if training:
            if running_mean is not None:
                part = momentum if momentum is not None else 1 / int(count)
                running_mean, running_var = running_mean.clone(), running_var.clone()
                F.batch_norm(input.detach(), running_mean, running_var, None, None, True, part, eps)
        else:
            inverse = (running_var + eps).rsqrt()
            scale = inverse if rest[weight] is None else inverse * rest[weight]
            shift = -running_mean * scale
            rest |= {weight: scale, bias: shift if rest[bias] is None else shift + rest[bias]}
        return y(input=input, batch_statistics=training, eps=eps, **rest), running_mean, running_var, count

    return formula


def with_given_statistics(y: Callable[..., Tensor]) -> Callable[..., Outputs]:
    """The same of the running statistics as they are."""
    formula = with_running_statistics(y)
    return lambda **given: formula(num_batches_tracked=None, training=False, momentum=None, **given)[:1]


def backward_of(forward: Callable[..., Tensor], inputs: tuple[str, ...]) -> Callable[..., Outputs]:
    """The gradients of `inputs`, in that order, by torch's own autograd through the formula.

    An argument `saved` is, as in the ops, what the last activation's slope is computed from: the output where the slope
    follows from it (`SLOPES`), else the residual.
    """
    has_tail = "residual" in inputs

    def formula(grad_output: Tensor, mask: list[bool], **arguments: Any) -> Outputs:
        last = "post_activation" if "post_activation" in arguments else "activation"
        saved = arguments.pop("saved", None)
        tensors = {k: arguments[k] for k in inputs if k in arguments}
        leaves = {k: t.detach().requires_grad_() for k, t in tensors.items() if t is not None}
        grads: dict[str, Tensor] = {}
        if has_tail:
            if saved is not None and arguments[last] in SLOPES:
                grad_output = grad_output * SLOPES[arguments[last]](saved)
                grads["residual"], arguments[last] = grad_output, "identity"
            else:
                residual = torch.zeros_like(grad_output) if saved is None else saved.detach()
                leaves["residual"] = residual.requires_grad_()
        known = {k: v for k, v in arguments.items() if k not in SAVED or k in inputs}
        if has_tail:
            known["residual"] = leaves.get("residual")
        y = forward(**known | leaves)
        grads |= dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_output), strict=True))
        return tuple(grads.get(k) if wanted else None for k, wanted in zip(inputs, mask, strict=True))

    return formula


# What forward leaves for backward beside the arguments, which the formula computes again.
SAVED = ("mean", "inverse", "sample_means", "z", "hidden", "scale")


def first(function: Callable[..., Outputs]) -> Callable[..., Tensor]:
    return lambda **arguments: function(**arguments)[0]


def one(function: Callable[..., Tensor]) -> Callable[..., Outputs]:
    return lambda **arguments: (function(**arguments),)


# ---- the longest sums ----


def of_points(o: Options) -> tuple[int, int]:
    return o.points, 1


def of_rescale(o: Options) -> tuple[int, int]:
    return 1, o.points


def of_excitation(o: Options) -> tuple[int, int]:
    return o.shape[1] + o.hidden, o.shape[0] * (o.shape[1] + o.hidden)


def of_block(o: Options) -> tuple[int, int]:
    length = o.points + o.shape[1] + o.hidden
    return length, o.shape[0] * length


def of_batch(o: Options) -> tuple[int, int]:
    """A channel has N P values. Written out, a weight's gradient is a sum over these and over C."""
    values = o.shape[0] * o.points
    return values + o.shape[1], values * o.shape[1]


def of_channel(o: Options) -> tuple[int, int]:
    values = o.shape[0] * o.points
    return values, 2 * values


def of_filter(o: Options) -> tuple[int, int]:
    """A value of the output is a sum over the filter, a weight's gradient one over the points of the batch."""
    return o.taps + 1, o.shape[0] * o.points + o.taps


EXCITATION = ("w1", "b1", "w2", "b2")
BLOCK = ("input", *EXCITATION, "residual")
BN_BLOCK = ("input", "bn_weight", "bn_bias", *EXCITATION, "residual")
BN = ("input", "weight", "bias", "residual")
FILTER = ("input", "weight", "bias")
CROSSED_TAIL = ("dtypes", "post_activation", "residual", "layout")
CROSSED_BN = ("dtypes", "activation", "residual", "layout")

CASES = [
    OpCase("squeeze", one(reference.squeeze), of_points, ("input",)),
    OpCase(
        "excite",
        one(reference.excite),
        of_excitation,
        ("z", *EXCITATION),
        crossed=("dtypes", "activation", "gate", "convolutions", "biases"),
    ),
    OpCase(
        "rescale",
        one(reference.rescale),
        of_rescale,
        ("input", "scale", "residual"),
        crossed=CROSSED_TAIL,
    ),
    OpCase(
        "squeeze_excite",
        one(reference.squeeze_excite),
        of_block,
        BLOCK,
        crossed=("dtypes", "activation", "post_activation", "residual"),
    ),
    OpCase(
        "bn_squeeze_excite",
        bn_squeeze_excite,
        of_batch,
        BN_BLOCK,
        crossed=("dtypes", "pre_activation", "post_activation", "residual", "batch_statistics"),
    ),
    OpCase(
        "_bn_squeeze_excite_running",
        with_running_statistics(first(bn_squeeze_excite_forward)),
        of_batch,
        BN_BLOCK,
        writes=("running_mean", "running_var", "num_batches_tracked"),
    ),
    OpCase("_bn_activation", bn_activation, of_channel, BN, crossed=CROSSED_BN),
    OpCase(
        "_bn_activation_running",
        with_running_statistics(first(bn_activation)),
        of_channel,
        BN,
        writes=("running_mean", "running_var", "num_batches_tracked"),
    ),
    OpCase(
        "depthwise_conv",
        one(reference.depthwise_conv),
        of_filter,
        FILTER,
        crossed=("kernel", "stride", "layout"),
        own_parts=FILTER_PARTS,
        own_domains=FILTER_DOMAINS,
    ),
    OpCase(
        "rescale_",
        one(reference.rescale),
        of_rescale,
        writes=("input",),
        crossed=CROSSED_TAIL,
    ),
    OpCase(
        "squeeze_excite_",
        one(reference.squeeze_excite),
        of_block,
        writes=("input",),
        crossed=CROSSED_TAIL,
    ),
    OpCase(
        "_bn_squeeze_excite_",
        one(first(bn_squeeze_excite)),
        of_batch,
        writes=("input",),
        crossed=("dtypes", "pre_activation", "residual", "batch_statistics"),
    ),
    OpCase("_bn_activation_", one(first(bn_activation)), of_channel, writes=("input",), crossed=CROSSED_BN),
    OpCase(
        "_bn_squeeze_excite_running_",
        with_given_statistics(first(bn_squeeze_excite_forward)),
        of_batch,
        writes=("input",),
    ),
    OpCase("_bn_activation_running_", with_given_statistics(first(bn_activation)), of_channel, writes=("input",)),
    OpCase("_excite_forward", excite_forward, of_excitation),
    OpCase(
        "_excite_backward",
        backward_of(reference.excite, ("z", *EXCITATION)),
        of_excitation,
        forward=("_excite_forward", ("scale", "hidden")),
    ),
    OpCase(
        "_rescale_backward",
        backward_of(reference.rescale, ("input", "scale", "residual")),
        of_rescale,
        forward=("rescale", ("output",)),
    ),
    OpCase("_squeeze_excite_forward", squeeze_excite_forward, of_block),
    OpCase(
        "_squeeze_excite_backward",
        backward_of(reference.squeeze_excite, BLOCK),
        of_block,
        forward=("_squeeze_excite_forward", ("output", "z", "hidden", "scale")),
    ),
    OpCase("_bn_squeeze_excite_forward", bn_squeeze_excite_forward, of_batch),
    OpCase(
        "_bn_squeeze_excite_backward",
        backward_of(first(bn_squeeze_excite_forward), BN_BLOCK),
        of_batch,
        forward=(
            "_bn_squeeze_excite_forward",
            ("output", "mean", None, "inverse", "sample_means", "z", "hidden", "scale"),
        ),
    ),
    OpCase(
        "_bn_activation_backward",
        backward_of(first(bn_activation), BN),
        of_channel,
        forward=("_bn_activation", ("output", "mean", None, "inverse")),
    ),
    OpCase(
        "_depthwise_conv_backward",
        backward_of(reference.depthwise_conv, FILTER),
        of_filter,
        forward=("depthwise_conv", ("output",)),
        own_parts=FILTER_PARTS,
        own_domains=FILTER_DOMAINS,
    ),
]
BY_NAME = {case.name: case for case in CASES}


# ---- parameters of tests ----


def cases(select: Callable[[OpCase], Any] = lambda _: True) -> pytest.MarkDecorator:
    """The ops that a test is for, as its parameter `case`."""
    return pytest.mark.parametrize("case", [case for case in CASES if select(case)], ids=str)


def differentiable(case: OpCase) -> bool:
    return bool(case.differentiable)


layouts = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
