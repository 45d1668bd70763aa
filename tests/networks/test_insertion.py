"""insert_se: where blocks go, what the network computes then, and what becomes of what was there before."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Watch, assert_near, assert_same_bits, package
from paper_networks import BNInception, ShuffleNet
from timm_networks import random_statistics
from torch import Tensor, nn

import se_ext
from se_ext import SqueezeExcitation, insert_se
from se_ext.conversion.places import PLACEMENTS, find

pytestmark = pytest.mark.cpu_only


def torchvision(name: str, **options: Any) -> nn.Module:
    if name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": False}
    return getattr(package("torchvision_shim").torchvision.models, name)(num_classes=10, **options)


def timm(name: str) -> nn.Module:
    package("torchvision_shim")  # timm imports torchvision
    return package("timm").create_model(name, num_classes=10)


def sequential() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 48, 3, bias=False), nn.ReLU(), nn.Conv2d(48, 64, 3), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )


def blocks_of(network: nn.Module) -> dict[str, SqueezeExcitation]:
    return {path: m for path, m in network.named_modules() if isinstance(m, SqueezeExcitation)}


def open_gates(network: nn.Module) -> nn.Module:
    """The network, its gates no longer all 1."""
    for block in blocks_of(network).values():
        nn.init.normal_(block.fc2.weight, std=0.5)
        nn.init.normal_(block.fc2.bias, std=0.5)
    return network


# ---- families: where blocks go ----

# For each network: how many blocks, and of a few of them the path and the channels.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "resnet18": (lambda: torchvision("resnet18"), 8, {"layer1.0.se": 64, "layer4.1.se": 512}),
    "wide_resnet50_2": (lambda: torchvision("wide_resnet50_2"), 16, {"layer1.0.se": 256}),
    "resnext50_32x4d": (lambda: torchvision("resnext50_32x4d"), 16, {"layer4.2.se": 2048}),
    "vgg11": (lambda: torchvision("vgg11"), 8, {"features.1.se": 64, "features.19.se": 512}),
    "vgg11_bn": (lambda: torchvision("vgg11_bn"), 8, {"features.2.se": 64, "features.27.se": 512}),
    "mobilenet_v2": (
        lambda: torchvision("mobilenet_v2"),
        17,
        {"features.1.conv.0.se": 32, "features.2.conv.1.se": 96, "features.17.conv.1.se": 960},
    ),
    "shufflenet_v2_x1_0": (
        lambda: torchvision("shufflenet_v2_x1_0"),
        16,
        {"stage2.0.se": 116, "stage2.1.branch2.se": 58, "stage4.3.branch2.se": 232},
    ),
    "densenet121": (
        lambda: torchvision("densenet121"),
        4,
        {"features.denseblock1.se": 256, "features.denseblock4.se": 1024},
    ),
    "googlenet": (lambda: torchvision("googlenet"), 9, {"inception3a.se": 256, "inception5b.se": 1024}),
    "inception_v3": (lambda: torchvision("inception_v3"), 11, {"Mixed_5b.se": 256, "Mixed_7c.se": 2048}),
    "convnext_tiny": (lambda: torchvision("convnext_tiny"), 18, {"features.1.0.block.se": 96}),
    "squeezenet1_1": (lambda: torchvision("squeezenet1_1"), 8, {"features.3.se": 128, "features.12.se": 512}),
    "mnasnet0_5": (lambda: torchvision("mnasnet0_5"), 15, {"layers.8.1.layers.5.se": 48}),
    "timm resnet18": (lambda: timm("resnet18"), 8, {"layer1.0.se": 64, "layer4.1.se": 512}),
    "timm resnetv2_50": (lambda: timm("resnetv2_50"), 16, {"stages.0.blocks.0.se": 256}),
    "timm mobilenetv1_100": (lambda: timm("mobilenetv1_100"), 13, {"blocks.0.0.se_2": 64, "blocks.4.1.se_2": 1024}),
    "timm mobilenetv2_100": (lambda: timm("mobilenetv2_100"), 17, {"blocks.0.0.se": 32, "blocks.1.0.se": 96}),
    "timm convnext_atto": (lambda: timm("convnext_atto"), 12, {"stages.0.blocks.0.se": 40}),
    "timm vgg11_bn": (lambda: timm("vgg11_bn"), 8, {"features.2.se": 64}),
    "timm densenet121": (lambda: timm("densenet121"), 4, {"features.denseblock1.se": 256}),
    "timm regnetx_002": (lambda: timm("regnetx_002"), 12, {"s2.b1.se_2": 56}),  # s1 has 24 channels
    "BN-Inception": (BNInception, 10, {"inception.0.se": 256}),
    "ShuffleNet": (ShuffleNet, 16, {"units.0.expand.se": 216, "units.1.expand.se": 240}),
    "sequential": (sequential, 3, {"2.se": 32, "5.se": 48, "8.se": 64}),
}
# Small or odd enough to be run here; the others are for the meta device.
RUN = [
    *("resnet18", "vgg11_bn", "mobilenet_v2", "shufflenet_v2_x1_0", "densenet121", "googlenet", "squeezenet1_1"),
    *("timm resnet18", "timm mobilenetv1_100", "timm mobilenetv2_100", "timm convnext_atto", "sequential"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_where_blocks_go(name):
    make, count, some = FAMILIES[name]
    with torch.device("meta"):
        network = make()
        report = insert_se(network)
    blocks = blocks_of(network)
    assert len(blocks) == len(report.inserted) == count
    assert {path: blocks[path].fc1.in_channels for path in some if path in blocks} == some
    assert {row.outcome for row in report.inserted} == blocks.keys()
    assert report.parameters == sum(p.numel() for block in blocks.values() for p in block.parameters())


@pytest.mark.parametrize("name", RUN)
def test_the_network_computes_what_it_did(name):
    network = random_statistics(FAMILIES[name][0]()).eval()
    for path, parameter in network.named_parameters():
        if path.endswith("gamma"):  # ConvNeXt's layer scale, which would hide the blocks
            nn.init.constant_(parameter, 0.5)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = network(x)
    keys = list(before)
    insert_se(network)
    after = network.state_dict()
    assert [key for key in after if key in before] == keys
    assert_same_bits([after[key] for key in before], list(before.values()))
    assert all(".se" in key or key.startswith("se.") for key in after.keys() - before.keys())
    with torch.no_grad():
        assert_near(network(x), plain.double(), allowed=1e-5)
    with torch.no_grad():
        assert (open_gates(network)(x) - plain).abs().max() > 1e-3 * plain.abs().max()  # the blocks are called


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("name", ["resnet18", "timm resnet18", "mobilenet_v2", "densenet121", "timm resnetv2_50"])
def test_a_second_call_changes_nothing(name, placement):
    with torch.device("meta"):
        network = FAMILIES[name][0]()
        if (name, placement) == ("densenet121", "identity"):
            pytest.skip("has no shortcuts that are added")
        insert_se(network, placement=placement)
        keys, classes = list(network.state_dict()), [type(m) for m in network.modules()]
        report = insert_se(network, placement=placement)
    assert report.inserted == []
    assert list(network.state_dict()) == keys
    assert [type(m) for m in network.modules()] == classes


def test_networks_with_se_blocks_stay_as_they_are():
    with torch.device("meta"):
        for network in (timm("efficientnet_b0"), torchvision("mobilenet_v3_large"), se_ext.models.seresnet18()):
            count = sum(1 for _ in network.modules())
            report = insert_se(network, where=lambda path, module: "has none" in path)
            assert report.inserted == []
            assert report.message or any(row.outcome == "has an SE block already" for row in report.skipped)
            assert sum(1 for _ in network.modules()) == count


def test_the_outer_of_units_that_do_not_stand_alone():
    """Res2Net's inner sums are between pieces of one map; Xception's separable convolutions are in residual blocks."""
    with torch.device("meta"):
        for name, kind, count in (("res2net50_26w_4s", "residual block", 16), ("xception41", "residual block", 12)):
            places, missed, _ = find(timm(name), "standard")
            assert not missed
            assert sum(place.kind == kind for place in places) == count


# ---- placements ----


class Unit(nn.Module):
    """A residual block, written so that every placement can be written down beside it."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if in_channels != channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.branch(x)
        out += identity
        return self.relu(out)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "standard": lambda f, shortcut, se, x: torch.relu(se(f(x)) + shortcut(x)),
    "pre": lambda f, shortcut, se, x: torch.relu(f(se(x)) + shortcut(x)),
    "post": lambda f, shortcut, se, x: se(torch.relu(f(x) + shortcut(x))),
    "identity": lambda f, shortcut, se, x: torch.relu(f(x) + se(shortcut(x))),
}


def plain_se(block: SqueezeExcitation) -> Callable[[Tensor], Tensor]:
    def se(x: Tensor) -> Tensor:
        hidden = torch.relu(block.fc1(x.mean((2, 3), keepdim=True)))
        return x * (2 * torch.sigmoid(block.fc2(hidden)))

    return se


@pytest.mark.parametrize("projected", [False, True], ids=["", "projection"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements_are_those_of_the_paper(placement, training, projected):
    """Values and gradients, with gates that are not 1, against the paper's formulas in float64."""
    plain = random_statistics(Unit(32, 48 if projected else 32)).double().train(training)
    unit = copy.deepcopy(plain)
    insert_se(unit, placement=placement)
    (block,) = blocks_of(open_gates(unit)).values()
    shortcut = plain.downsample if projected else lambda x: x
    inputs = [torch.randn(3, 32, 6, 5, dtype=torch.float64).requires_grad_() for _ in range(1)] * 2
    grad = torch.randn(3, 48 if projected else 32, 6, 5, dtype=torch.float64)
    ours = unit(inputs[0])
    expected = FORMULAS[placement](plain.branch, shortcut, plain_se(block), inputs[1])
    assert_near(ours, expected, allowed=1e-12)
    theirs = dict(plain.named_parameters())
    own = {name: p for name, p in unit.named_parameters() if name in theirs}
    gradients = torch.autograd.grad(ours, [inputs[0], *own.values(), *block.parameters()], grad)
    wanted = torch.autograd.grad(expected, [inputs[1], *(theirs[name] for name in own), *block.parameters()], grad)
    for name, actual, exact in zip(("input", *own, "w1", "b1", "w2", "b2"), gradients, wanted, strict=True):
        assert_near(actual, exact, f"gradient of {name}", allowed=1e-10)
    for (name, a), b in zip(plain.named_buffers(), [unit.get_buffer(n) for n, _ in plain.named_buffers()], strict=True):
        assert_near(b, a.double(), name, allowed=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11_bn", "timm convnext_atto"])
def test_a_training_step_is_that_of_the_unfused_network(name):
    torch.manual_seed(1)
    network = FAMILIES[name][0]().double().train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    insert_se(network)
    open_gates(network)
    unfused = copy.deepcopy(network)
    se_ext.revert(unfused)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    results = []
    for each in (network, unfused):
        each(x).square().mean().backward()
        results.append({n: p.grad for n, p in each.named_parameters()} | dict(each.named_buffers()))
    largest = max(p.grad.abs().max().item() for p in network.parameters())
    for what, expected in results[1].items():
        # What a batch norm takes out again, as the bias of the convolution in front, has no gradient but roundings.
        allowed = 1e-6 * expected.abs().max().item() + 1e-10 * largest
        assert (results[0][what] - expected).abs().max().item() <= allowed, what


def test_blocks_are_fused_with_their_neighbours():
    network = insert_and_watch(Unit(32, 32))
    assert network.count("se_ext::bn_squeeze_excite") == 1  # bn2, SE, shortcut, ReLU
    assert network.count("se_ext::_bn_activation") == 1  # bn1, ReLU
    assert not {"aten::native_batch_norm", "aten::batch_norm", "aten::add_", "aten::mean", "aten::relu_"} & {*network}
    vgg = insert_and_watch(sequential(), (2, 3, 24, 24))
    assert vgg.count("se_ext::bn_squeeze_excite") == 2
    assert vgg.count("se_ext::squeeze_excite") == 1


def insert_and_watch(network: nn.Module, shape: tuple[int, ...] = (2, 32, 6, 5)) -> list[str]:
    insert_se(network.eval())
    with torch.no_grad(), Watch() as watch:
        network(torch.randn(shape))
    return watch.names


# ---- how blocks start ----


def test_gates_are_one_and_can_be_trained():
    network = sequential()
    insert_se(network)
    for block in blocks_of(network).values():
        z = torch.randn(5, block.fc1.in_channels) * 10
        weights = block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias
        gate = se_ext.excite(z, *weights, gate=block.scale_activation)
        assert torch.equal(gate, torch.ones_like(gate))
        (gradient,) = torch.autograd.grad(gate.sum(), block.fc2.bias)
        assert torch.equal(gradient, torch.full_like(gradient, 5 / 2))  # the largest slope of 2 sigmoid
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network(torch.randn(4, 3, 24, 24)).square().mean().backward()
    optimizer.step()
    assert all(block.fc2.bias.abs().max() > 0 for block in blocks_of(network).values())


def test_the_paper_s_start():
    network = sequential()
    insert_se(network, start="paper")
    for block in blocks_of(network).values():
        assert block.scale_activation == "sigmoid"
        assert block.fc2.weight.std() > 0


def test_widths_dtypes_and_devices():
    network = sequential().to(torch.bfloat16).eval()
    insert_se(network, reduction=12)
    assert [b.fc1.out_channels for b in blocks_of(network).values()] == [3, 4, 5]  # 32, 48, 64 by 12, rounded
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert not any(m.training for m in network.modules())
    with torch.device("meta"):
        network = sequential()
    insert_se(network, reduction=1000)
    assert [b.fc1.out_channels for b in blocks_of(network).values()] == [1, 1, 1]
    assert {p.device.type for p in network.parameters()} == {"meta"}


@pytest.mark.parametrize(("conv", "bn", "shape"), [
    (nn.Conv1d, nn.BatchNorm1d, (2, 3, 32)),
    (nn.Conv3d, nn.BatchNorm3d, (2, 3, 5, 6, 7)),
])  # fmt: skip
def test_maps_of_one_and_three_dims(conv, bn, shape):
    network = nn.Sequential(conv(3, 32, 3), bn(32), nn.ReLU(), conv(32, 32, 1), nn.ReLU()).eval()
    x = torch.randn(shape)
    plain = network(x)
    assert len(insert_se(network).inserted) == 2
    assert_near(network(x), plain.double(), allowed=1e-5)


# ---- arguments ----


def test_where_and_min_channels():
    with torch.device("meta"):
        network = torchvision("resnet18")
        asked = []
        report = insert_se(
            network, min_channels=128, where=lambda path, m: asked.append((path, m)) or path.startswith("layer4")
        )
    assert [row.path for row in report.inserted] == ["layer4.0", "layer4.1"]
    assert asked == [(p, network.get_submodule(p)) for p in [f"layer{i}.{j}" for i in (2, 3, 4) for j in (0, 1)]]
    reasons = {row.path: row.outcome for row in report.skipped}
    assert reasons["layer1.0"] == "fewer channels than min_channels=128"
    assert reasons["layer2.0"] == "where said no"
    assert [row.outcome for row in insert_se(network).inserted] == [
        f"layer{i}.{j}.se" for i in (1, 2, 3) for j in (0, 1)
    ]


def test_report():
    report = insert_se(sequential(), where=lambda path, module: path != "5")
    assert str(report).split("\n") == [
        "path  class        shape   SE block",
        "2     convolution  32 → 2  2.se",
        "8     convolution  64 → 4  8.se",
        "",
        "path  class        shape  no SE block",
        "5     convolution  48     where said no",
        "",
        "2 SE blocks with 742 parameters",
    ]


def test_new_parameters_join_the_groups_of_their_neighbours():
    network = sequential()
    vectors = [p for p in network.parameters() if p.dim() == 1]
    matrices = [p for p in network.parameters() if p.dim() > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 0.5}], lr=0.25
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    def step() -> None:
        network(torch.randn(4, 3, 24, 24)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    states = {id(p): optimizer.state[p]["exp_avg"] for p in matrices}
    insert_se(network, optimizers=optimizer)
    blocks = blocks_of(network).values()
    weights = {id(p) for b in blocks for p in (b.fc1.weight, b.fc2.weight)}
    biases = {id(p) for b in blocks for p in (b.fc1.bias, b.fc2.bias)}
    assert [{id(p) for p in group["params"]} for group in optimizer.param_groups] == [
        weights | {id(p) for p in matrices},
        biases | {id(p) for p in vectors},
    ]
    assert all(optimizer.state[p]["exp_avg"] is states[id(p)] for p in matrices)
    before = [b.fc2.bias.clone() for b in blocks]
    step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.05]
    assert not any(torch.equal(a, b.fc2.bias) for a, b in zip(before, blocks, strict=True))


def test_of_several_optimizers_the_one_that_trains_the_neighbours():
    network = sequential()
    for p in network[:4].parameters():
        p.requires_grad_(False)
    first = torch.optim.SGD(network[4:9].parameters(), 0.1)
    second = torch.optim.Adam([{"params": network[11].weight}, {"params": network[11].bias}])
    insert_se(network, optimizers=[second, first])
    blocks = [*blocks_of(network).values()]
    trained = {id(p) for p in first.param_groups[0]["params"]}
    assert {id(p) for b in blocks[1:] for p in b.parameters()} <= trained
    # Its own convolution is frozen: then any layer of the module that holds the unit.
    assert {id(p) for p in blocks[0].parameters()} <= trained | {
        id(p) for g in second.param_groups for p in g["params"]
    }


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "placement": (
        lambda: insert_se(sequential(), placement="behind"),
        ValueError,
        "insert_se: expected placement to be one of standard, pre, post, identity, got 'behind'",
    ),
    "start": (
        lambda: insert_se(sequential(), start="zero"),
        ValueError,
        "insert_se: expected start to be one of plain, paper, got 'zero'",
    ),
    "reduction": (
        lambda: insert_se(sequential(), 0),
        ValueError,
        "insert_se: expected reduction to be a positive number, got 0",
    ),
    "min_channels": (
        lambda: insert_se(sequential(), min_channels=0),
        ValueError,
        "insert_se: expected min_channels to be at least 1, got 0",
    ),
    "min_channels' type": (
        lambda: insert_se(sequential(), min_channels=1.5),
        TypeError,
        "insert_se: expected min_channels to be an integer, got 1.5",
    ),
    "optimizers": (
        lambda: insert_se(sequential(), optimizers="adam"),
        TypeError,
        "insert_se: expected optimizers to be a torch.optim.Optimizer or several, got str",
    ),
    "no CNN": (
        lambda: insert_se(Wrapper()),
        ValueError,
        "insert_se: expected a CNN of residual blocks, separable convolutions, concatenated branches or plain "
        "convolutions, got a Wrapper with no place for an SE block",
    ),
    "no shortcut": (
        lambda: insert_se(sequential(), placement="identity"),
        ValueError,
        "got a Sequential with no place for an SE block; with placement='identity' each of its units has no shortcut "
        "that is added",
    ),
    "no module": (
        lambda: insert_se("resnet18"),
        TypeError,
        "insert_se: expected model to be a torch.nn.Module, got str",
    ),
    "scripted": (
        lambda: insert_se(torch.jit.script(sequential())),
        TypeError,
        "insert_se: expected a network that is not scripted, got a RecursiveScriptModule",
    ),
    "compiled": (
        lambda: insert_se(torch.compile(sequential())),
        TypeError,
        "insert_se: expected a network that is not compiled, got a OptimizedModule; insert_se the network first",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


def test_an_error_leaves_the_network_as_it_was():
    network = sequential()
    keys = list(network.state_dict())
    for call, _, _ in ERRORS.values():
        with pytest.raises((TypeError, ValueError)):
            call()
    with pytest.raises(ValueError, match="no place"):
        insert_se(network, placement="identity")
    assert list(network.state_dict()) == keys
    assert type(network[2]) is nn.ReLU


# ---- what else is done to a network ----


@pytest.mark.parametrize("name", ["resnet18", "timm resnet18", "timm convnext_atto", "densenet121", "vgg11_bn"])
def test_copies_and_files(name):
    network = random_statistics(FAMILIES[name][0]()).eval()
    insert_se(network)
    open_gates(network)
    x = torch.randn(2, 3, 64, 64)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    with torch.no_grad():
        expected = network(x)
        copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network)), torch.load(file, weights_only=False)]
        for other in copies:
            assert torch.equal(other(x), expected)
            assert [type(m) for m in other.modules()] == [type(m) for m in network.modules()]
        fresh = FAMILIES[name][0]().eval()
        insert_se(fresh)
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh(x), expected)


def test_checkpoints_of_the_plain_network_load():
    plain, network = sequential(), sequential()
    insert_se(network)
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(".se." in key for key in missing)
    x = torch.randn(2, 3, 24, 24)
    assert_near(network.eval()(x), plain.eval()(x).double(), allowed=1e-5)


@pytest.mark.parametrize("what", ["", "bn2", "se", "se.fc1", "conv1", "relu"])
def test_hooks_run(what):
    """With a hook a module is called, whatever is fused around it, and nothing else changes."""
    unit = random_statistics(Unit(32, 32)).eval()
    insert_se(unit)
    open_gates(unit)
    x = torch.randn(2, 32, 6, 5)
    with torch.no_grad():
        expected = unit(x)
        calls = []
        unit.get_submodule(what).register_forward_hook(lambda m, args, output: calls.append(m))
        assert_near(unit(x), expected.double(), allowed=1e-5)
    assert calls == [unit.get_submodule(what)] * (2 if what == "relu" else 1)


def test_a_setting_that_the_forward_was_made_of_cannot_be_changed():
    unit = Unit(32, 32)
    insert_se(unit)
    with pytest.raises(AttributeError, match=r"Unit\.downsample: insert_se made this module's forward for None, got a"):
        unit.downsample = nn.Identity()
    unit.train().eval()
    unit.bn2 = nn.BatchNorm2d(32).eval()  # another module in the same place
    unit.bn2.weight.data.zero_()
    x = torch.randn(2, 32, 6, 5)
    assert torch.equal(unit(x), torch.relu(x))
    unit.unrelated = 3


def test_convert_and_revert():
    """A converted network gets blocks, and stays converted; reverted, it keeps them and computes the same."""
    network = random_statistics(torchvision("resnet18")).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = network(x)
        se_ext.convert(network)
        insert_se(network)
        assert_near(network(x), plain.double(), allowed=1e-5)
        opened = open_gates(network)(x)
        se_ext.revert(network)
        assert len(blocks_of(network)) == 8
        assert_near(network(x), opened.double(), allowed=1e-5)
        se_ext.convert(network)
        assert_near(network(x), opened.double(), allowed=1e-5)


def test_sequentials_keep_their_length_and_indices():
    network = sequential()
    layers = list(network)
    insert_se(network)
    assert len(network) == len(layers)
    assert network[0] is layers[0]
    assert network[2][0] is layers[2]
    assert isinstance(network[:4], nn.Sequential)
    assert network[:4](torch.randn(1, 3, 9, 9)).shape == (1, 32, 3, 3)


def test_a_batch_norm_in_the_middle_of_a_sequential():
    """It has a state, whose keys another nn.Sequential around it would change: it calls the block itself."""
    network = random_statistics(nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32)
    )).eval()  # fmt: skip
    keys = list(network.state_dict())
    x = torch.randn(2, 3, 9, 9)
    plain = network(x)
    report = insert_se(network)
    assert [row.outcome for row in report.inserted] == ["1.se", "se"]
    assert [key for key in network.state_dict() if "se." not in key] == keys
    assert isinstance(network[1], nn.BatchNorm2d)
    assert_near(network(x), plain.double(), allowed=1e-5)
    expected = open_gates(network)(x)
    assert_near(pickle.loads(pickle.dumps(network))(x), expected.double(), allowed=1e-6)
    assert not torch.allclose(expected, plain)


def test_compiled_exported_and_traced():
    unit = random_statistics(Unit(32, 48)).eval()
    insert_se(unit)
    open_gates(unit)
    x = torch.randn(2, 32, 6, 5)
    with torch.no_grad():
        expected = unit(x).double()
        assert_near(torch.compile(unit, fullgraph=True, backend="aot_eager")(x), expected, allowed=1e-5)
        assert_near(torch.export.export(unit, (x,)).module()(x), expected, allowed=1e-5)
        assert_near(torch.jit.trace(unit, (x,))(x), expected, allowed=1e-5)
