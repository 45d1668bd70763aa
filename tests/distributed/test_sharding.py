"""Ops on DTensors: the values of the whole tensors, and no communication that need not be."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import ROOT, assert_same_bits, tolerance
from ops import BY_NAME, CASES, OpCase, Options
from processes import Processes, processes
from torch import Tensor

import se_ext
from se_ext import _sharding

pytestmark = pytest.mark.cpu_only

# Samples and channels that the processes share evenly, and unevenly.
SHAPES = [(8, 16, 3, 5), (6, 19, 5, 3)]
NAMES = [case.name for case in CASES]
CHANNELWISE = [case.name for case in CASES if "w1" not in case.names]


@pytest.fixture(scope="module")
def four() -> Iterator[Processes]:
    with processes(4) as group:
        yield group


def options_of(case: OpCase, shape: tuple[int, ...], cut: str) -> list[Options]:
    """Channels may be cut where a batch norm normalises by the batch; samples may not."""
    statistics = (False, True) if cut == "C" and {"batch_statistics", "training"} & set(case.names) else (False,)
    return [
        Options(
            shape,
            8,
            torch.float64,
            batch_statistics=batch,
            residual=residual,
            drop_scale=residual,
            biases=(residual, True),
            post_activation=post,
            requires_grad=True,
        )
        for batch in statistics
        for residual, post in ((True, "relu"), (False, "identity"), (True, "silu"))
    ]


def distributed(name: str, value: Any, cut: str) -> Any:
    """A tensor cut along N or C where it has that dim; whole in every process elsewhere."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    if not isinstance(value, Tensor):
        return value
    dims = _sharding.DIMS.get(name, "")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    is_cut = cut != "" and cut in dims and 0 not in value.shape
    placement = Shard(dims.index(cut)) if is_cut else Replicate()
    made = distribute_tensor(value.detach().clone(), mesh, [placement], src_data_rank=None)  # every process has it
    return made.requires_grad_(value.requires_grad)


def assert_same(ours: Any, theirs: Any, exact: bool) -> None:
    if theirs is None:
        assert ours is None
        return
    whole = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
    assert whole.shape == theirs.shape, (whole.shape, theirs.shape)
    if exact or not theirs.is_floating_point():
        assert_same_bits([whole], [theirs])
    elif theirs.numel():
        error = (whole - theirs).abs().max() / theirs.abs().max()
        assert error <= tolerance(theirs.dtype, 1000), error


def check(name: str, cut: str) -> None:
    """Outputs, what the op writes, and gradients are those of the whole tensors, and nothing was sent."""
    from torch.distributed.tensor.debug import CommDebugMode

    case = BY_NAME[name]
    for shape in SHAPES:
        for options in options_of(case, shape, cut):
            whole = case.make(options)
            parts = {name: distributed(name, value, cut) for name, value in whole.items()}
            grad = torch.randn(shape if case.has_map else shape[:2], dtype=torch.float64)
            if name == "squeeze":
                grad = grad.flatten(2).sum(2)
            grad_parts = distributed("output", grad, cut)
            with CommDebugMode() as sent:
                ours, gradients = step(case, parts, grad_parts)
            assert not sent.get_comm_counts(), f"{dict(sent.get_comm_counts())} of {options}"
            theirs, whole_gradients = step(case, whole, grad)
            for our, their in zip(ours, theirs, strict=True):
                # A channel's bits may depend on C, a sample's do not depend on N. Gradients of weights are sums over N.
                assert_same(our, their, exact=cut != "C" and not case.forward)
            for our, their in zip(gradients, whole_gradients, strict=True):
                assert_same(our, their, exact=not cut)


def step(case: OpCase, arguments: dict[str, Any], grad: Tensor) -> tuple[list[Any], list[Any]]:
    """What the op returns and writes, and the gradients that are wanted."""
    outputs, leaves = case.run(arguments), list(case.leaves(arguments).values())
    return outputs, list(torch.autograd.grad(outputs[0], leaves, grad)) if leaves else []


@pytest.mark.parametrize("name", NAMES)
def test_cut_along_the_samples(four: Processes, name: str) -> None:
    four.run(check, name, "N")


@pytest.mark.parametrize("name", CHANNELWISE)
def test_cut_along_the_channels(four: Processes, name: str) -> None:
    four.run(check, name, "C")


@pytest.mark.parametrize("name", NAMES)
def test_whole_in_every_process(four: Processes, name: str) -> None:
    four.run(check, name, "")


# ---- where something has to be sent ----


def check_a_norm_by_the_batch() -> None:
    """The same tensors normalised by given statistics and then by the batch's, which needs all samples: DTensor keeps
    what it has decided for a call, and must not take one for the other."""
    for name in ("bn_squeeze_excite", "_bn_activation", "_bn_squeeze_excite_running", "_bn_activation_running"):
        case = BY_NAME[name]
        for batch in (False, True):
            whole = case.make(Options(SHAPES[0], 8, torch.float64, batch_statistics=batch, requires_grad=True))
            grad = torch.randn(SHAPES[0], dtype=torch.float64)
            ours, gradients = step(
                case, {k: distributed(k, v, "N") for k, v in whole.items()}, distributed("output", grad, "N")
            )
            theirs, whole_gradients = step(case, whole, grad)
            for our, their in zip([*ours, *gradients], [*theirs, *whole_gradients], strict=True):
                assert_same(our, their, exact=False)


def test_a_norm_by_the_batch_sees_all_samples(four: Processes) -> None:
    four.run(check_a_norm_by_the_batch)


def check_cut_channels_of_a_block() -> None:
    """An excitation mixes the channels: a map that is cut along them is put together, and the values are right."""
    for name in ("squeeze_excite", "bn_squeeze_excite", "excite"):
        case = BY_NAME[name]
        whole = case.make(Options(SHAPES[0], 8, torch.float64, batch_statistics=False))
        ours = case.run(
            {k: distributed(k, v, "C" if k in ("input", "residual", "z") else "") for k, v in whole.items()}
        )
        for our, their in zip(ours, case.run(whole), strict=True):
            assert_same(our, their, exact=False)


def test_cut_channels_of_a_block_are_put_together(four: Processes) -> None:
    four.run(check_cut_channels_of_a_block)


def check_written_input() -> None:
    case = BY_NAME["squeeze_excite_"]
    whole = case.make(Options(SHAPES[0], 8, torch.float64))
    with pytest.raises(RuntimeError, match="squeeze_excite_: expected input, which the op writes, to be replicated"):
        case.run({k: distributed(k, v, "C" if k == "input" else "") for k, v in whole.items()})


def test_what_an_op_writes_is_never_a_copy(four: Processes) -> None:
    four.run(check_written_input)


def check_a_mesh_of_two_dims() -> None:
    """Samples cut over two pairs of processes, channels within a pair."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2, 2))
    x = torch.randn(SHAPES[0], dtype=torch.float64)
    scale = torch.rand(SHAPES[0][:2], dtype=torch.float64)
    both = [Shard(0), Shard(1)]
    x_parts = distribute_tensor(x, mesh, both, src_data_rank=None)
    scale_parts = distribute_tensor(scale, mesh, both, src_data_rank=None)
    with CommDebugMode() as sent:
        z, y = se_ext.squeeze(x_parts), se_ext.rescale(x_parts, scale_parts, None, "relu")
    assert not sent.get_comm_counts()
    assert z.placements == y.placements == tuple(both)
    assert_same(z, se_ext.squeeze(x), exact=False)
    assert_same(y, se_ext.rescale(x, scale, None, "relu"), exact=False)
    weight = distribute_tensor(torch.randn(16, 1, 3, 3, dtype=torch.float64), mesh, [Replicate(), Shard(0)])
    assert se_ext.depthwise_conv(x_parts, weight, padding=1).placements == tuple(both)


def test_a_mesh_of_two_dims(four: Processes) -> None:
    four.run(check_a_mesh_of_two_dims)


# ---- modules ----


def check_a_module() -> None:
    """A module whose parameters are whole in every process, on samples that are cut: as DTensor's own layers."""
    from torch.distributed.tensor import distribute_module, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (4,))
    plain = se_ext.SqueezeExcitation(16, 4).double()
    cut = distribute_module(copy.deepcopy(plain), mesh)
    x = torch.randn(SHAPES[0], dtype=torch.float64)
    with CommDebugMode() as sent:
        y = cut(distributed("input", x, "N"))
        y.sum().backward()
    assert not sent.get_comm_counts(), dict(sent.get_comm_counts())
    assert_same(y, plain(x), exact=False)
    plain(x).sum().backward()
    for our, their in zip(cut.parameters(), plain.parameters(), strict=True):
        assert_same(our.grad, their.grad, exact=False)


def test_a_module(four: Processes) -> None:
    four.run(check_a_module)


# ---- registration ----


def test_every_op_has_a_rule() -> None:
    from torch.distributed.tensor import DTensor

    rules = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
    assert [case.name for case in CASES if rules.get(case.op) is not _sharding.strategy] == []


def test_rules_come_with_the_module_they_are_for() -> None:
    """The import of se_ext imports nothing of torch.distributed that torch has not; order does not matter."""
    code = (
        "import sys, torch; before = set(sys.modules); import se_ext\n"
        "print([name for name in set(sys.modules) - before if 'distributed' in name])\n"
        "from torch.distributed.tensor import DTensor\n"
        "print(torch.ops.se_ext.squeeze.default in DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "True"]


def test_another_torch_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="se_ext: no op takes a DTensor with torch"):
        _sharding.add_rules_or_warn(object())
