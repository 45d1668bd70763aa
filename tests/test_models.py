"""se_ext.models are timm's networks: the same names, numbers of parameters, logits and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import package
from torch import nn

from se_ext import models

NAMES = [name for name in models.__all__ if name != "SEResNet"]
COMPARED = ["seresnet18", "seresnet50", "seresnext50_32x4d"]


def timm() -> Any:
    package("torchvision_shim")  # timm imports torchvision
    return package("timm")


def build(name: str, **options: Any) -> models.SEResNet:
    return getattr(models, name)(**options)


def randomize(network: nn.Module) -> None:
    """Weights and statistics such that every block's branch counts: as initialised, its last batch norm is zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_and_parameters_are_timm_s(name):
    library = timm()
    with torch.device("meta"):
        ours, theirs = build(name), library.create_model(name)
    shapes = [{key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    counts = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("to_timm", [False, True], ids=["timm's weights here", "ours in timm"])
def test_logits_and_a_training_step_are_timm_s(name, to_timm):
    ours, theirs = build(name, num_classes=10).double(), timm().create_model(name, num_classes=10).double()
    source, target = (ours, theirs) if to_timm else (theirs, ours)
    randomize(source)
    target.load_state_dict(source.state_dict())
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(ours.eval()(images), theirs.eval()(images), rtol=1e-9, atol=1e-9)
    losses = [nn.functional.cross_entropy(net.train()(images), torch.arange(4)) for net in (ours, theirs)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-9)
    parameters = dict(theirs.named_parameters())
    for key, a in ours.named_parameters():
        expected = parameters[key].grad
        assert (a.grad - expected).abs().max() <= 1e-7 * expected.abs().max() + 1e-12, key
    buffers = theirs.state_dict()
    for key, a in ours.named_buffers():
        assert torch.allclose(a.double(), buffers[key].double(), rtol=1e-9, atol=1e-12), key


def test_channels_last_gives_the_same_logits():
    network = build("seresnet18", num_classes=10).double().eval()
    randomize(network)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = network(images)
    last = network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    assert torch.allclose(last, expected, rtol=1e-9, atol=1e-9)


def test_parameters_are_those_of_the_paper():
    """Table 2 and the ablation of the reduction ratio, whose layers have no bias: to the digit printed, if batch norm's
    running statistics are counted. At r = 8 that gives 30.6, where the paper prints 30.7."""
    for reduction, millions in {2: 45.7, 4: 35.7, 8: 30.6, 16: 28.1, 32: 26.9}.items():
        with torch.device("meta"):
            network = build("seresnet50", se_bias=False, reduction=reduction)
        count = sum(t.numel() for t in network.state_dict().values() if t.dim())
        assert round(count / 1e6, 1) == millions, reduction
    with torch.device("meta"):
        network = build("seresnet50", se_bias=False)
    added = sum(p.numel() for name, p in network.named_parameters() if ".se." in name)
    assert added == 2_514_944  # (2 / r) Σ over the stages of blocks · C², r = 16


def test_stochastic_depth_is_timm_s():
    """The same rates per block, the same samples dropped, from the same random numbers."""
    options = {"num_classes": 10, "drop_path_rate": 0.8}
    ours, theirs = build("seresnet18", **options).double(), timm().create_model("seresnet18", **options).double()
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    logits = []
    for network in (ours, theirs):
        torch.manual_seed(3)
        logits.append(network.train()(images))
    rates = [block.drop_path for block in ours.modules() if isinstance(block, models.BasicBlock)]
    assert rates == pytest.approx([0.8 * i / 7 for i in range(8)])
    assert torch.allclose(*logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_torchscript_and_compile(train):
    network = build("seresnet18", num_classes=10, drop_path_rate=0.1)
    randomize(network)
    network.train(train)
    images = torch.randn(2, 3, 64, 64)
    state = {key: value.clone() for key, value in network.state_dict().items()}

    def run(form: nn.Module) -> torch.Tensor:
        network.load_state_dict(state)
        torch.manual_seed(1)
        return form(images)

    expected = run(network)
    scripted = torch.jit.script(network)
    assert torch.allclose(run(scripted), expected, atol=1e-5)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert torch.allclose(run(compiled), expected, atol=1e-5)
    counts = {int(m.num_batches_tracked) for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
    assert counts == {int(train)}


def test_torchscript_folds_batch_norms_into_convolutions():
    """All but those of the tails, which are not batch norms of ATen's; the results stay."""
    network = build("seresnet18", num_classes=10)
    randomize(network)
    images = torch.randn(2, 3, 64, 64)
    scripted = torch.jit.script(network.eval())
    frozen = torch.jit.freeze(scripted)
    assert str(scripted.inlined_graph).count("aten::batch_norm") == 1 + 8 + 3
    assert "aten::batch_norm" not in str(frozen.inlined_graph)
    assert torch.allclose(frozen(images), network(images), atol=1e-5)


def test_one_op_per_block():
    """The tail of each block is one node, and so is every other batch norm with its ReLU: ATen computes none."""
    network = build("seresnet18", num_classes=10)
    with torch.profiler.profile() as prof:
        network(torch.randn(2, 3, 64, 64)).sum().backward()
    counts = {event.key: event.count for event in prof.key_averages()}
    assert counts["se_ext::_bn_squeeze_excite_forward"] == counts["se_ext::_bn_squeeze_excite_backward"] == 8
    others = 1 + 8 + 3  # the stem's, each block's first, the projections'
    assert counts["se_ext::_bn_activation"] == counts["se_ext::_bn_activation_backward"] == others
    assert not {"aten::batch_norm", "aten::add", "aten::relu", "aten::relu_"} & counts.keys()
