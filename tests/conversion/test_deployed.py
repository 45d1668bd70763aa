"""Converted networks in the hands of PyTorch's tools: compiled, exported, traced, scripted, distributed."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import se_ext
from conversion.small import assert_same, images, network, pair, results

pytestmark = pytest.mark.cpu_only

BLOCKS, NORMS, CONVOLUTIONS = 4, 8, 2


@pytest.fixture(autouse=True)
def _no_old_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ops_of(graph: torch.fx.Graph) -> Counter[str]:
    """How often a graph has each op of ours, and torch's batch norm."""
    names = (str(node.target).removesuffix(".default") for node in graph.nodes if node.op == "call_function")
    return Counter(name for name in names if name.startswith("se_ext") or "batch_norm" in name)


def counting(counts: list[Counter[str]]) -> Callable[..., Any]:
    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(ops_of(module.graph))
        return module.forward

    return backend


def test_compiled_training_step_has_one_node_for_each_step() -> None:
    plain, ours = pair()
    counts: list[Counter[str]] = []
    ours.compile(backend=counting(counts), fullgraph=True)
    assert_same(results(ours), results(plain))
    (ops,) = counts
    assert ops["se_ext._bn_squeeze_excite_running"] == BLOCKS
    assert ops["se_ext._bn_activation_running"] == NORMS
    assert ops["se_ext.depthwise_conv"] == CONVOLUTIONS
    assert ops.total() == BLOCKS + NORMS + CONVOLUTIONS


def test_compiled_inference_leaves_batch_norms_to_the_compiler() -> None:
    plain, ours = pair()
    counts: list[Counter[str]] = []
    compiled = torch.compile(ours.eval(), backend=counting(counts), fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), plain.eval()(images()))
    assert counts[0]["se_ext.squeeze_excite"] == BLOCKS
    assert not any("bn_" in name or "depthwise" in name for name in counts[0])


def test_compiled_by_inductor() -> None:
    plain, ours = pair(torch.float32)
    ours.compile(fullgraph=True)
    x = images(torch.float32)
    assert_same(results(ours, x), results(plain, x), 1e-3)


def test_hooks_after_compilation() -> None:
    """A hook on a module inside, registered when the network was compiled already."""
    plain, ours = pair()
    compiled = torch.compile(ours.eval(), backend="eager")
    x = images()
    with torch.no_grad(), torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled(x)
        for model in (plain.eval(), ours):
            model.blocks[0].bn1.register_forward_hook(lambda m, args, out: out * 2)
        torch.testing.assert_close(compiled(x), plain(x))


@pytest.mark.parametrize("training", [True, False])
def test_exported(training: bool) -> None:
    plain, ours = pair()
    plain.train(training), ours.train(training)
    for model in (plain, ours):
        model.blocks[2].drop_path.drop_prob = 0.0  # random numbers would not be the same
    exported = torch.export.export(copy.deepcopy(ours), (images(),), dynamic_shapes=({0: torch.export.Dim("n")},))
    counts = ops_of(exported.graph)
    assert sum(count for name, count in counts.items() if "squeeze_excite" in name) == BLOCKS
    if not training:
        assert not any("bn_" in name for name in counts)
    x = images(batch=5)
    torch.testing.assert_close(exported.module()(x), plain(x))


def test_traced_by_torchscript() -> None:
    plain, ours = pair()
    plain.eval(), ours.eval()
    traced = torch.jit.trace(ours, images())
    assert str(traced.inlined_graph).count("se_ext::squeeze_excite") == BLOCKS
    torch.testing.assert_close(traced(images(batch=2)), plain(images(batch=2)))


def test_scripted() -> None:
    """The blocks are ops in a script, the batch norms torch's, which torch.jit.freeze folds."""
    plain, ours = pair()
    plain.eval(), ours.eval()
    modules = list(ours.modules())
    scripted = torch.jit.script(ours)
    assert all(a is b for a, b in zip(ours.modules(), modules, strict=True))
    assert str(scripted.inlined_graph).count("se_ext::squeeze_excite") == BLOCKS
    assert list(scripted.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(scripted(images()), plain(images()))
    frozen = torch.jit.freeze(scripted)
    assert "batch_norm" not in str(frozen.inlined_graph)
    torch.testing.assert_close(frozen(images()), plain(images()))
    assert_same(results(ours), results(plain))
    assert [type(m) for m in ours.modules()] != [type(m) for m in plain.modules()]


def test_symbolically_traced() -> None:
    plain, ours = pair()
    plain.eval(), ours.eval()
    traced = torch.fx.symbolic_trace(ours)
    torch.testing.assert_close(traced(images()), plain(images()))
    assert ops_of(traced.graph) == {"se_ext._bn_squeeze_excite_running": BLOCKS, "se_ext._bn_activation_running": NORMS}


def test_functional_call_and_transforms() -> None:
    plain, ours = pair()
    plain.eval(), ours.eval()
    parameters = {name: p.detach() * 1.1 for name, p in plain.named_parameters()}

    def loss(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda p: torch.func.functional_call(model, p, (images(),)).square().sum()

    expected = torch.func.grad(loss(plain))(parameters)
    for name, g in torch.func.grad(loss(ours))(parameters).items():
        torch.testing.assert_close(g, expected[name])


def test_distributed_data_parallel(tmp_path: Any) -> None:
    plain, ours = pair()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(ours)
        torch.manual_seed(2)
        parallel(images()).sum().backward()
        torch.manual_seed(2)
        plain(images()).sum().backward()
        for name, p in plain.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name).grad, p.grad, atol=1e-9, rtol=1e-7)
        assert "nothing" not in str(se_ext.convert(nn.parallel.DistributedDataParallel(network())))
    finally:
        torch.distributed.destroy_process_group()


def test_gradient_checkpointing_of_blocks() -> None:
    plain, ours = pair()
    for model in (plain, ours):
        model.blocks[2].drop_path.drop_prob = 0.0
        blocks = model.blocks
        model.blocks = nn.Sequential()

        def forward(x: Tensor, model: nn.Module = model, blocks: nn.Module = blocks) -> Tensor:
            return torch.utils.checkpoint.checkpoint(blocks, model.stem(x), use_reentrant=False)

        x = images().requires_grad_()
        forward(x).sum().backward()
        model.gradient = x.grad
    torch.testing.assert_close(ours.gradient, plain.gradient)
