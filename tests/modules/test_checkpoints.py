"""Checkpoints of other libraries, whose layers have other names and shapes, load into SqueezeExcitation as they are."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close, make_map, package
from torch import Tensor, nn

from se_ext import BatchNormSqueezeExcitation, SqueezeExcitation

pytestmark = pytest.mark.cpu_only

C, M = 16, 8
KEYS = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


def timm(name: str = "timm") -> Any:
    package("torchvision_shim")  # timm imports torchvision
    return package(name)


class Channelwise(nn.Module):
    """MONAI's ChannelSELayer, and many others': two Linear layers in a Sequential."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(C, M, bias), nn.ReLU(inplace=True), nn.Linear(M, C, bias), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class Named(nn.Module):
    """Layers of any kind under our names."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x.mean((2, 3)), self.fc1.weight.flatten(1), self.fc1.bias).relu()
        scale = nn.functional.linear(hidden, self.fc2.weight.flatten(1), self.fc2.bias).sigmoid()
        return x * scale[:, :, None, None]


THEIRS: dict[str, Callable[[], nn.Module]] = {
    "timm EfficientNet": lambda: timm("timm.models._efficientnet_blocks").SqueezeExcite(C, rd_channels=M),
    "timm channels-last": lambda: timm("timm.layers.squeeze_excite").SqueezeExciteCl(C, rd_channels=M),
    "MONAI": Channelwise,
    "no bias": lambda: Channelwise(bias=False),
    "Linear": lambda: Named(nn.Linear(C, M), nn.Linear(M, C)),
    "Conv1d": lambda: Named(nn.Conv1d(C, M, 1), nn.Conv1d(M, C, 1)),
    "Conv3d": lambda: Named(nn.Conv3d(C, M, 1), nn.Conv3d(M, C, 1)),
}


class Middle(nn.Module):
    """The block between two convolutions, two levels down."""

    def __init__(self, se: nn.Module) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.ModuleDict({"conv": nn.Conv2d(3, C, 3), "se": se, "out": nn.Conv2d(C, 2, 1)}))

    def forward(self, x: Tensor) -> Tensor:
        stage = self.stages[0]
        return stage["out"](stage["se"](stage["conv"](x)))


def ours(theirs: nn.Module) -> SqueezeExcitation:
    return SqueezeExcitation(C, M, bias=any(key.endswith("bias") for key in theirs.state_dict()))


def output(theirs: nn.Module, x: Tensor) -> Tensor:
    """timm's SqueezeExciteCl takes [N, H, W, C]."""
    if type(theirs).__name__ == "SqueezeExciteCl":
        return theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return theirs(x)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("library", THEIRS)
def test_a_block_of_another_library(library: str, assign: bool) -> None:
    theirs = THEIRS[library]().double()
    checkpoint = theirs.state_dict()
    keys = list(checkpoint)
    shapes = [value.shape for value in checkpoint.values()]
    module = ours(theirs).double()
    result = module.load_state_dict(checkpoint, strict=True, assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(checkpoint) == keys  # the caller's dict stays
    assert [value.shape for value in checkpoint.values()] == shapes
    assert list(module.state_dict()) == [key for key in KEYS if module.fc1.bias is not None or "weight" in key]
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf for p in module.parameters())
    shared = {value.data_ptr() for value in checkpoint.values()} & {p.data_ptr() for p in module.parameters()}
    assert len(shared) == (len(keys) if assign else 0)
    x = make_map((2, C, 5, 4), torch.float64)
    assert_close(module(x).detach(), output(theirs, x).detach(), torch.float64, summed=20 + C)
    again = ours(theirs).double()
    again.load_state_dict(module.state_dict())  # what was loaded is saved under our own keys
    assert torch.equal(again(x), module(x))


@pytest.mark.parametrize("library", ["timm EfficientNet", "MONAI"])
def test_a_block_at_any_depth(library: str) -> None:
    """In a network, by name, from a file; and into the block inside BatchNormSqueezeExcitation."""
    theirs = Middle(THEIRS[library]()).double()
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    checkpoint = torch.load(file)
    network = Middle(SqueezeExcitation(C, M)).double()
    network.load_state_dict(checkpoint)
    x = make_map((2, 3, 6, 7), torch.float64)
    assert_close(network(x).detach(), theirs(x).detach(), torch.float64, summed=1000)

    tail = BatchNormSqueezeExcitation(C, M).double()
    bn, block = nn.BatchNorm2d(C).double(), THEIRS[library]().double()
    values = {f"bn.{k}": v for k, v in bn.state_dict().items()} | {f"se.{k}": v for k, v in block.state_dict().items()}
    tail.load_state_dict(values)
    x = make_map((2, C, 5, 4), torch.float64)
    assert_close(tail(x).detach(), block(bn(x)).detach(), torch.float64, summed=1000)


def test_meta_modules_load_by_assignment() -> None:
    theirs = THEIRS["timm EfficientNet"]()
    with torch.device("meta"):
        module = SqueezeExcitation(C, M)
    module.load_state_dict(theirs.state_dict(), assign=True)
    x = make_map((2, C, 5, 4))
    assert_close(module(x).detach(), copy.deepcopy(theirs).double()(x.double()).detach(), torch.float32, summed=20 + C)


# ---- what does not fit is reported ----


def load_error(checkpoint: dict[str, Tensor], module: nn.Module | None = None) -> str:
    module = SqueezeExcitation(C, M) if module is None else module
    with pytest.raises(RuntimeError, match="Error\\(s\\) in loading state_dict") as caught:
        module.load_state_dict(checkpoint)
    return str(caught.value)


def timm_checkpoint() -> dict[str, Tensor]:
    return dict(THEIRS["timm EfficientNet"]().state_dict())


def test_a_missing_layer_is_reported() -> None:
    checkpoint = timm_checkpoint()
    del checkpoint["conv_expand.bias"]
    assert 'Missing key(s) in state_dict: "fc2.bias".' in load_error(checkpoint)
    module = SqueezeExcitation(C, M)
    result = module.load_state_dict(checkpoint, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["fc2.bias"], [])
    assert torch.equal(module.fc2.weight, checkpoint["conv_expand.weight"])


def test_a_key_too_many_is_reported() -> None:
    checkpoint = timm_checkpoint() | {"bn.weight": torch.ones(M)}
    assert 'Unexpected key(s) in state_dict: "bn.weight".' in load_error(checkpoint)
    both = timm_checkpoint() | dict(SqueezeExcitation(C, M).state_dict())
    text = load_error(both)
    for key in timm_checkpoint():
        assert f'"{key}"' in text
    module = SqueezeExcitation(C, M)
    assert sorted(module.load_state_dict(both, strict=False).unexpected_keys) == sorted(timm_checkpoint())
    assert torch.equal(module.fc1.weight, both["fc1.weight"])  # our own names come first
    nested = Middle(SqueezeExcitation(C, M))
    values = nested.state_dict() | {"stages.0.se.other.weight": torch.ones(1)}
    assert '"stages.0.se.other.weight"' in load_error(values, nested)


def test_a_bias_for_a_module_without_is_reported() -> None:
    text = load_error(timm_checkpoint(), SqueezeExcitation(C, M, bias=False))
    assert 'Unexpected key(s) in state_dict: "fc1.bias", "fc2.bias".' in text


def test_other_blocks_are_refused_as_before() -> None:
    layers = timm("timm.layers")
    effective = layers.EffectiveSEModule(C).state_dict()
    text = load_error(effective)
    assert 'Unexpected key(s) in state_dict: "fc.weight", "fc.bias".' in text
    assert 'Missing key(s) in state_dict: "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias".' in text
    normed = layers.SEModule(C, rd_channels=M, norm_layer=nn.BatchNorm2d).state_dict()
    assert '"bn.running_mean"' in load_error(normed)


@pytest.mark.parametrize("shape", [(M + 1, C), (M, C, 3, 3), (M, C, 3), (M, C, 2, 2, 2), (C * M,)])
def test_a_weight_of_another_shape_is_reported(shape: tuple[int, ...]) -> None:
    checkpoint = SqueezeExcitation(C, M).state_dict() | {"fc1.weight": torch.zeros(shape)}
    assert "size mismatch for fc1.weight" in load_error(checkpoint)


def test_a_weight_that_is_no_tensor_is_reported() -> None:
    checkpoint: dict[str, Any] = SqueezeExcitation(C, M).state_dict() | {"fc1.weight": [1.0]}
    assert "expected torch.Tensor" in load_error(checkpoint)


def test_a_layer_that_took_the_place_of_a_convolution_loads_its_own() -> None:
    module = SqueezeExcitation(C, M)
    module.fc1 = nn.Linear(C, M)
    checkpoint = {key: torch.randn_like(value) for key, value in module.state_dict().items()}
    module.load_state_dict(checkpoint)
    assert torch.equal(module.fc1.weight, checkpoint["fc1.weight"])


def test_loading_leaves_the_module_plain() -> None:
    """No hooks, which pickles and copies would carry: a copy loads as the module does."""
    module = SqueezeExcitation(C, M)
    assert not module._load_state_dict_pre_hooks
    checkpoint = timm_checkpoint()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.load_state_dict(checkpoint)
        assert torch.equal(twin.fc2.weight, checkpoint["conv_expand.weight"])


# ---- whole networks ----


def replace_blocks(network: nn.Module, block: type[nn.Module]) -> int:
    """Every SqueezeExcite by ours, made from the activation and the gate that it has."""
    replaced = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is block:
                channels, width = child.conv_reduce.in_channels, child.conv_reduce.out_channels
                setattr(parent, name, SqueezeExcitation(channels, width, child.act1, child.gate))
                replaced += 1
    return replaced


@pytest.mark.parametrize(("name", "blocks"), [("efficientnet_b0", 16), ("mobilenetv3_large_100", 8)])
def test_a_network_of_timms_loads_its_own_checkpoint(name: str, blocks: int, restore_threads: None) -> None:
    torch.set_num_threads(1)  # a hundred small layers: on a busy machine their threads wait for one another
    theirs = timm().create_model(name, num_classes=10).double().eval()
    network = copy.deepcopy(theirs)
    for p in theirs.parameters():
        if p.dim() == 1:  # biases are 0 and batch norms the identity until a network is trained
            nn.init.uniform_(p, 0.5, 1.0)
    assert replace_blocks(network, timm("timm.models._efficientnet_blocks").SqueezeExcite) == blocks
    network.double().load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(images)
        assert expected.std() > 1e-3
        assert torch.allclose(network(images), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
