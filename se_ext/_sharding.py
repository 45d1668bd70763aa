"""For DTensor: how each op runs on tensors that are cut up over a mesh of processes, so that none of them is gathered
that need not be.

A dim of an argument is that of the samples (N), of the channels (C), or another. An op whose samples (or channels) have
nothing to do with each other may be cut along N (or C): each process computes the op on its part. What has no such dim
(weights, for N) is whole in every process, and its gradient is a sum over the processes. Everything else runs on whole
tensors.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ._when_imported import when_imported

# The dims that may be cut, by an argument's name: one letter a dim, those behind them are whole.
_ROW = dict.fromkeys(("grad_output", "input", "residual", "saved", "output", "z", "scale", "sample_means"), "NC")
_VECTOR = dict.fromkeys(
    ("bn_weight", "bn_bias", "weight", "bias", "running_mean", "running_var", "mean", "var", "inverse"), "C"
)
DIMS = _ROW | _VECTOR | {"hidden": "N", "drop_scale": "N"}
# Of no elements where an op has not computed them.
_MAY_BE_EMPTY = ("mean", "var", "inverse", "sample_means")


def register() -> None:
    when_imported("torch.distributed.tensor", add_rules_or_warn)


def add_rules_or_warn(tensor: Any) -> None:
    """What is used of DTensor is private, and another version may lack it. Other programs are right without it."""
    try:
        add_rules(tensor)
    except (AttributeError, ImportError, TypeError) as error:
        warnings.warn(f"se_ext: no op takes a DTensor with torch {torch.__version__}: {error}", stacklevel=2)


def add_rules(tensor: Any) -> None:
    """To torch.distributed.tensor, the module: for every op of the namespace, its strategy.

    Every argument is a part of the key of DTensor's cache (static_argnum=0): whether a batch norm normalises by the
    batch, and which gradients are wanted, decides how the op may be cut. torch's register_sharding for other libraries'
    ops keys by tensors and integers alone.
    """
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    propagator = tensor.DTensor._op_dispatcher.sharding_propagator
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace == "se_ext":
            op = getattr(torch.ops.se_ext, name).default
            propagator.register_op_strategy(op, strategy, RuntimeSchemaInfo(static_argnum=0, needs_pytree=True))


def strategy(call: Any) -> Any:
    """All ways in which a call (an OpSchema) may be cut up over a mesh, for DTensor to choose the one that moves least.

    Raises:
        RuntimeError: a tensor that the op writes is cut in none of these ways; what would be written is a copy.
    """
    from torch.distributed.tensor._op_schema import OpStrategy
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    schema = call.op._schema
    given = dict(zip([argument.name for argument in schema.arguments], call.args_schema, strict=False))
    tensors = {name: value for name, value in given.items() if isinstance(value, OpStrategy)}
    ways = [way(cut, schema, given, tensors) for cut in ("", "N", "C") if may_be_cut(cut, given)]
    found: Any = expand_to_full_mesh_op_strategy(
        call.get_mesh_from_args(), call, ways, input_index=len(schema.returns), inplace_op=False
    )
    written = [
        i for i, argument in enumerate(a for a in schema.arguments if a.name in tensors) if is_written(argument, given)
    ]
    now = [value.strategies[0].output_spec.placements for value in tensors.values()]
    kept = [s for s in found.strategies if all(s.input_specs[i].placements == now[i] for i in written)]
    if not kept:
        names = [name for i, name in enumerate(tensors) if i in written]
        raise RuntimeError(
            f"{schema.name.partition('::')[2]}: expected {', '.join(names)}, which the op writes, to be replicated or "
            f"cut like the other tensors, got {', '.join(str(now[i]) for i in written)}"
        )
    return OpStrategy(kept)


def normalises_by_the_batch(given: dict[str, Any]) -> bool:
    return bool(given.get("batch_statistics") or given.get("training"))


def may_be_cut(cut: str, given: dict[str, Any]) -> bool:
    """A batch norm that is training mixes the samples, an excitation the channels."""
    return not ((cut == "N" and normalises_by_the_batch(given)) or (cut == "C" and "w1" in given))


def is_written(argument: Any, given: dict[str, Any]) -> bool:
    """The input of an op in place; running statistics, where the op normalises by the batch."""
    writes = argument.alias_info is not None and argument.alias_info.is_write
    return writes and ("training" not in given or given["training"])


def way(cut: str, schema: Any, given: dict[str, Any], tensors: dict[str, Any]) -> list[Any]:
    """The placements of the outputs, then of the tensors given, on one dim of a mesh, along which `cut` ("N", "C", or
    "" for nothing) is cut."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def placement(name: str) -> Any:
        dims = DIMS.get(name, "")
        return Shard(dims.index(cut)) if cut and cut in dims else Replicate()

    outputs: list[Any] = []
    for result in schema.returns:
        name = result.name or "output"
        if "mask" in given and cut == "N" and "N" not in DIMS.get(name, ""):
            outputs.append(Partial())  # a gradient of weights: each process has the sum over its samples
        elif name in _MAY_BE_EMPTY and is_empty(name, given):
            outputs.append(Replicate())
        else:
            outputs.append(placement(name))
    inputs = [
        Replicate() if name in _MAY_BE_EMPTY and 0 in value.shape else placement(name)
        for name, value in tensors.items()
    ]
    return [*outputs, *inputs]


def is_empty(name: str, given: dict[str, Any]) -> bool:
    """Whether an output has no elements: csrc/ops/adapters.h allocates them."""
    if name == "sample_means":
        return bool(given["pre_activation"] != "identity")
    return not normalises_by_the_batch(given)
