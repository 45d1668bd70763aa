"""torch.fx: modules and networks traced, copied, saved, loaded and traced again compute and train as before, and
torchvision's feature extractor takes them apart."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import make_map, package
from torch import Tensor, nn

import se_ext
from se_ext import models

pytestmark = pytest.mark.cpu_only

C, M = 16, 8


def between_convolutions(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(C, C, 3, padding=1), module, nn.Conv2d(C, 4, 3))


def network() -> nn.Module:
    """With a random number in every block: stochastic depth and dropout are traced too."""
    return models.seresnet18(num_classes=10, drop_path_rate=0.4, drop_rate=0.3)


def one_map() -> list[Tensor]:
    return [make_map((3, C, 7, 6), torch.float64)]


# A module and what it is called with.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "SE": (lambda: se_ext.SqueezeExcitation(C, M, nn.SiLU), one_map),
    "SE and a residual": (
        lambda: se_ext.SqueezeExcitation(C, M, bias=False, post_activation=nn.ReLU),
        lambda: one_map() + one_map(),
    ),
    "SE between convolutions": (lambda: between_convolutions(se_ext.SqueezeExcitation(C, M)), one_map),
    "batch norm and SE": (lambda: se_ext.BatchNormSqueezeExcitation(C, M, pre_activation=nn.SiLU), one_map),
    "batch norm, SE and a residual": (
        lambda: se_ext.BatchNormSqueezeExcitation(C, M, post_activation=nn.ReLU),
        lambda: one_map() + one_map(),
    ),
    "batch norm and SE between convolutions": (
        lambda: between_convolutions(se_ext.BatchNormSqueezeExcitation(C, M)),
        one_map,
    ),
    "a block": (lambda: models.seresnet50().layer1[0], lambda: [make_map((2, 64, 8, 8), torch.float64)]),
    "seresnet18": (network, lambda: [torch.randn(2, 3, 64, 64, dtype=torch.float64)]),
}


def trace(module: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(module)


def saved_and_loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "traced": trace,
    "copied": lambda module: copy.deepcopy(trace(module)),
    "saved": lambda module: saved_and_loaded(trace(module)),
    "traced again": lambda module: trace(trace(module)),
    "saved, traced again and saved": lambda module: saved_and_loaded(trace(saved_and_loaded(trace(module)))),
}


def randomize(module: nn.Module) -> None:
    """Weights and statistics such that every block's branch counts, and that no weight is as initialised."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)


def step(module: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    """Output, gradients and buffers after a step, by name."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    torch.manual_seed(5)
    output = module(*inputs)
    output.square().sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    gradients.update({f"gradient of input {i}": x.grad for i, x in enumerate(inputs)})
    return {"output": output.detach(), **gradients, **dict(module.named_buffers())}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_and_gradients(case, form, train):
    build, draw = CASES[case]
    module = build().double().train(train)
    randomize(module)
    inputs = draw()
    found = step(FORMS[form](copy.deepcopy(module)), inputs)
    expected = step(module, inputs)
    unread = set() if train else {name for name in expected if name.endswith("num_batches_tracked")}
    assert expected.keys() - unread <= found.keys() <= expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_one_node_per_op():
    graph = trace(models.seresnet18(num_classes=10)).graph
    ops = [node.target for node in graph.nodes if node.op == "call_function"]
    tails = sum("_bn_squeeze_excite_running" in str(op) for op in ops)
    assert (tails, len(ops)) == (8, 8 + 1 + 8 + 3)  # the stem, each block's first batch norm, the projections


# ---- torchvision's feature extractor ----


def feature_extraction() -> Any:
    package("torchvision_shim")
    return package("torchvision.models.feature_extraction")


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
def test_create_feature_extractor(copied):
    """It traces both modes: what it extracts follows train() and eval(), statistics included."""
    original = network().double()
    randomize(original)
    extractor = feature_extraction().create_feature_extractor(
        copy.deepcopy(original), {"layer1.0": "a", "layer2": "b", "layer4": "c"}
    )
    if copied:
        extractor = copy.deepcopy(extractor)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for train in (True, False, True):
        for module in (original, extractor):
            module.train(train)
        torch.manual_seed(7)
        found = extractor(images)
        torch.manual_seed(7)
        x = original.layer1[0](original.maxpool(original.forward_stem(images)))
        expected = {"a": x}
        expected["b"] = original.layer2(original.layer1[1](x))
        expected["c"] = original.layer4(original.layer3(expected["b"]))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
        buffers = dict(extractor.named_buffers())
        assert buffers
        for name, value in original.named_buffers():
            assert torch.equal(buffers[name], value), name
    for outputs in (found, expected):
        sum(value.square().sum() for value in outputs.values()).backward()
    gradients = {name: p.grad for name, p in extractor.named_parameters()}
    for name, p in original.named_parameters():
        if not name.startswith("fc"):
            assert torch.equal(gradients[name], p.grad), name


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
def test_graph_node_names():
    """A block's nodes carry the block's name; without random numbers both modes have the same."""
    train, evaluation = feature_extraction().get_graph_node_names(models.seresnet18())
    assert train == evaluation
    assert [name.removesuffix("_default") for name in train if name.startswith("layer2.0")] == [
        "layer2.0.conv1",
        "layer2.0._bn_activation_running",
        "layer2.0.conv2",
        "layer2.0.downsample.0",
        "layer2.0.downsample._bn_activation_running",
        "layer2.0._bn_squeeze_excite_running",
    ]
    train, evaluation = feature_extraction().get_graph_node_names(network())
    assert "layer4.1.bernoulli_" in train
    assert "layer4.1.bernoulli_" not in evaluation
