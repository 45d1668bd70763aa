"""What is known is fused, everything else is called: with whatever is attached to a layer, a batch norm, an activation
or a block, a network computes and trains as the same network made of torch's modules does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Watch, make_map, package
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import se_ext
from se_ext import BatchNormSqueezeExcitation, SqueezeExcitation
from se_ext.models import BasicBlock, Bottleneck, Projection

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

C, M = 16, 8
Log = list[Tensor]


# ---- the same, made of torch's modules ----


class Plain(nn.Module):
    """SqueezeExcitation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(C, M, 1), nn.Conv2d(M, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid() * x


class PlainTail(nn.Module):
    """BatchNormSqueezeExcitation with SiLU before the block."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.se = nn.BatchNorm2d(C), Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.se(F.silu(self.bn(x)))


class PlainBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.finish(x, out)

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        if self.se is not None:
            out = self.se(out)
        drop_scale = self.drop_scale(x)
        if drop_scale is not None:
            out = out * drop_scale[:, None, None, None].to(out.dtype)
        return F.relu(out + self.shortcut(x))


def basic_block(cls: type[BasicBlock] = BasicBlock, drop_path: float = 0.0) -> BasicBlock:
    block = cls(C, C, 1, None, reduction=2, se_bias=True, drop_path=drop_path)
    if cls is PlainBasicBlock:
        block.se = Plain()
    block.act1.inplace = False  # behind a module with a backward hook autograd refuses it, and a hook sees it
    return block


def between_convolutions(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, C, 3, padding=1), module, nn.Conv2d(C, 2, 3))


Pair = tuple[nn.Sequential, nn.Sequential]
MAKE: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "block": lambda: (SqueezeExcitation(C, M), Plain()),
    "tail": lambda: (BatchNormSqueezeExcitation(C, M, pre_activation="silu"), PlainTail()),
    "network": lambda: (basic_block(), basic_block(PlainBasicBlock)),
}


def pair(name: str) -> Pair:
    """Ours and torch's, with the same float64 weights, in training mode."""
    ours, theirs = (between_convolutions(module).double() for module in MAKE[name]())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def block_of(network: nn.Sequential) -> Any:
    return getattr(network[1], "se", network[1])


# ---- what other libraries attach ----


class Adapter(nn.Module):
    """A low-rank adapter around a layer, with the properties that adapter libraries give it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        out_channels, in_channels = base.weight.shape[:2]
        layer: Any = nn.Linear if isinstance(base, nn.Linear) else (lambda i, o, bias: nn.Conv2d(i, o, 1, bias=bias))
        self.down, self.up = layer(in_channels, 2, bias=False).double(), layer(2, out_channels, bias=False).double()

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, z: Tensor) -> Tensor:
        return self.base(z) + self.up(self.down(z))


class ByHook(nn.Module):
    """Half a weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


def adapter(se: Any, log: Log) -> None:
    se.fc1 = Adapter(se.fc1)


def forward_hook(module: str) -> Callable[[Any, Log], None]:
    def attach(se: Any, log: Log) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            log.extend([args[0].detach().clone(), output.detach().clone()])
            return 1.5 * output

        se.get_submodule(module).register_forward_hook(hook)

    return attach


def pre_hook(module: str) -> Callable[[Any, Log], None]:
    def attach(se: Any, log: Log) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            log.append(args[0].detach().clone())
            return (args[0] * 0.75,)

        se.get_submodule(module).register_forward_pre_hook(hook)

    return attach


def backward_hook(module: str, pre: bool = False) -> Callable[[Any, Log], None]:
    def attach(se: Any, log: Log) -> None:
        def hook(_: nn.Module, *grads: Any) -> Any:
            log.extend(g.detach().clone() for group in grads for g in group)
            return tuple(2 * g for g in grads[0])

        target = se.get_submodule(module)
        (target.register_full_backward_pre_hook if pre else target.register_full_backward_hook)(hook)

    return attach


def weights_by_hook(se: Any, log: Log) -> None:
    """As offloading does: the weights are there only while the layer is called."""
    stored = nn.Parameter(se.fc2.weight.detach().clone())
    se.register_parameter("stored", stored)
    se.fc2.weight = nn.Parameter(torch.zeros_like(stored))

    def bring(layer: Any, _: Any) -> None:
        del layer._parameters["weight"]
        layer.weight = stored * 1.0

    def take_away(layer: Any, *_: Any) -> None:
        del layer.weight
        layer.register_parameter("weight", nn.Parameter(torch.zeros_like(stored)))

    se.fc2.register_forward_pre_hook(bring)
    se.fc2.register_forward_hook(take_away)


def own_forward(module: str) -> Callable[[Any, Log], None]:
    def attach(se: Any, log: Log) -> None:
        target = se.get_submodule(module)
        old = target.forward
        target.forward = lambda z: log.append(z.detach().clone()) or old(z) * 2  # type: ignore[func-returns-value]

    return attach


def another_class(se: Any, log: Log) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, z: Tensor) -> Tensor:
            return 2 * super().forward(z)

    se.fc1.__class__ = Doubled


def padded(se: Any, log: Log) -> None:
    se.fc1 = nn.Conv2d(C, M, 3, padding=1).double()


def padded_second(se: Any, log: Log) -> None:
    se.fc2 = nn.Conv2d(M, C, 3, padding=1).double()


def grouped(se: Any, log: Log) -> None:
    se.fc1 = nn.Conv2d(C, M, 1, groups=2).double()


LAYERS: dict[str, Callable[[Any, Log], Any]] = {
    "adapter": adapter,
    "spectral_norm": lambda se, _: torch.nn.utils.spectral_norm(se.fc1),
    "weight_norm": lambda se, _: torch.nn.utils.weight_norm(se.fc2),
    "pruned": lambda se, _: prune.l1_unstructured(se.fc1, "weight", 0.5),
    "parametrized spectral_norm": lambda se, _: parametrizations.spectral_norm(se.fc1),
    "parametrized weight_norm": lambda se, _: parametrizations.weight_norm(se.fc2),
    "parametrized spectral_norm and hook": lambda se, log: (
        parametrizations.spectral_norm(se.fc1),
        forward_hook("fc2")(se, log),
    ),
    "hook": forward_hook("fc1"),
    "pre-hook": pre_hook("fc2"),
    "backward hook": backward_hook("fc1"),
    "backward pre-hook": backward_hook("fc2", pre=True),
    "weights by a hook": weights_by_hook,
    "forward of its own": own_forward("fc1"),
    "subclass": another_class,
    "padded": padded,
    "padded second": padded_second,
    "grouped": grouped,
}


def train(network: nn.Module, steps: int = 2) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses, gradients and weights of a few steps; and the state that is left."""
    torch.manual_seed(5)
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    found: list[Tensor] = []
    for _ in range(steps):
        images = torch.randn(4, 3, 7, 6, dtype=torch.float64)
        optimizer.zero_grad()
        output = network(images)
        output.square().mean().backward()
        found.append(output.detach())
        found.extend(p.grad.clone() for p in network.parameters() if p.grad is not None)
        optimizer.step()
    return found, {key: value.clone() for key, value in network.state_dict().items()}


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape, i
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), (i, (a - b).abs().max())


def compare(networks: Pair, attach: Callable[[Any, Log], Any], to: Callable[[Any], Any]) -> list[Log]:
    """Attaches the same to both, and trains both."""
    logs: list[Log] = [[], []]
    unchanged, _ = train(copy.deepcopy(networks[0]))
    for network, log in zip(networks, logs, strict=True):
        torch.manual_seed(3)
        attach(to(network), log)
    (ours, state), (theirs, expected) = (train(network) for network in networks)
    assert_same(ours, theirs)
    assert list(state) == list(expected)
    assert_same(list(state.values()), list(expected.values()))
    assert_same(*logs)
    assert len(ours) != len(unchanged) or not torch.equal(ours[-1], unchanged[-1])  # it had an effect at all
    return logs


@pytest.mark.parametrize("network", MAKE)
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_attached_to_a_layer_takes_effect(name: str, network: str) -> None:
    logs = compare(pair(network), LAYERS[name], block_of)
    assert bool(logs[0]) is any(word in name for word in ("hook", "own")) or name == "weights by a hook"


@pytest.mark.parametrize("name", ["adapter", "hook", "forward of its own", "weights by a hook"])
def test_in_place_of_a_called_layer(name: str) -> None:
    ours, theirs = pair("block")
    ours[1].inplace = True
    for network in (ours, theirs):
        torch.manual_seed(3)
        LAYERS[name](network[1], [])
    x = make_map((2, C, 5, 4), torch.float64)
    with torch.no_grad():
        expected = theirs[1](x.clone())
        y = ours[1](x)
    assert y is x
    assert torch.allclose(x, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["adapter", "hook", "none"])
def test_linear_layers(name: str) -> None:
    """An nn.Linear in a layer's place gets [N, C]; two plain ones are fused."""
    theirs = nn.Sequential(nn.Linear(C, M), nn.ReLU(), nn.Linear(M, C), nn.Sigmoid()).double()
    ours = SqueezeExcitation(C, M).double()
    ours.fc1, ours.fc2 = copy.deepcopy(theirs[0]), copy.deepcopy(theirs[2])
    x, log = make_map((2, C, 5, 4), torch.float64), []
    with torch.no_grad():
        assert operators(ours, x) == ["se_ext::squeeze_excite"]
    if name == "adapter":
        torch.manual_seed(1)
        ours.fc1 = Adapter(ours.fc1)
        theirs[0] = copy.deepcopy(ours.fc1)
    if name == "hook":
        ours.fc1.register_forward_hook(lambda _, args, output: log.append(args[0].shape))
    expected = theirs(x.mean((2, 3)))[:, :, None, None] * x
    assert torch.allclose(ours(x), expected, rtol=1e-12)
    assert log == ([(2, C)] if name == "hook" else [])


# ---- batch norms, activations and blocks ----


def replace_se(make: Callable[[], nn.Module | None]) -> Callable[[Any, Log], None]:
    def attach(block: Any, log: Log) -> None:
        new = make()
        block.se = new if new is None else new.double()

    return attach


class Halved(SqueezeExcitation):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return super().forward(input, residual) / 2


def timm_block() -> nn.Module:
    package("torchvision_shim")
    return package("timm.layers").SEModule(C, rd_channels=M)


def torchvision_block() -> nn.Module:
    return package("torchvision_shim").torchvision.ops.SqueezeExcitation(C, M)


BLOCKS: dict[str, Callable[[Any, Log], Any]] = {
    "identity": replace_se(nn.Identity),
    "none": replace_se(lambda: None),
    "timm": replace_se(timm_block),
    "torchvision": replace_se(torchvision_block),
    "subclass": replace_se(lambda: Halved(C, M)),
    "post_activation": replace_se(lambda: SqueezeExcitation(C, M, post_activation="tanh")),
    "in place": replace_se(lambda: SqueezeExcitation(C, M, inplace=True)),
    **{f"hook on {name}": forward_hook(name) for name in ("bn1", "act1", "bn2", "se")},
    **{f"pre-hook on {name}": pre_hook(name) for name in ("bn1", "act1", "bn2", "se")},
    **{f"backward hook on {name}": backward_hook(name) for name in ("bn1", "bn2", "se")},
    **{f"own forward of {name}": own_forward(name) for name in ("bn1", "act1", "bn2", "se")},
    "another activation": lambda block, _: setattr(block, "act1", nn.ELU()),
    "pruned batch norm": lambda block, _: prune.l1_unstructured(block.bn2, "weight", 0.5),
    "no batch norm": lambda block, _: setattr(block, "bn2", nn.Identity()),
}


@pytest.mark.parametrize("drop_path", [0.0, 0.5], ids=["", "drop path"])
@pytest.mark.parametrize("name", BLOCKS)
def test_what_is_put_into_a_network_takes_effect(name: str, drop_path: float) -> None:
    ours, theirs = pair("network")
    for network in (ours, theirs):
        network[1].drop_path = drop_path
        nn.init.uniform_(network[1].bn2.weight, 0.5, 1.0)
    theirs.load_state_dict(ours.state_dict())
    compare((ours, theirs), BLOCKS[name], lambda network: network[1])


@pytest.mark.parametrize("name", ["adapter", "hook", "pruned"])
def test_stochastic_depth_behind_called_layers(name: str) -> None:
    ours, theirs = pair("network")
    for network in (ours, theirs):
        network[1].drop_path = 0.5
        nn.init.uniform_(network[1].bn2.weight, 0.5, 1.0)
    theirs.load_state_dict(ours.state_dict())
    compare((ours, theirs), LAYERS[name], block_of)


def replace_downsample(block: Any, log: Log) -> None:
    block.downsample = nn.Dropout(0.5)


def random_block_and_shortcut(block: Any, log: Log) -> None:
    block.se, block.downsample = nn.Dropout(0.5), nn.Dropout(0.5)


@pytest.mark.parametrize("attach", [replace_downsample, random_block_and_shortcut])
def test_random_numbers_are_drawn_in_timms_order(attach: Callable[[Any, Log], None]) -> None:
    """The block first, then stochastic depth, then the shortcut."""
    ours, theirs = pair("network")
    for network in (ours, theirs):
        network[1].drop_path = 0.5
        nn.init.uniform_(network[1].bn2.weight, 0.5, 1.0)
    theirs.load_state_dict(ours.state_dict())
    compare((ours, theirs), attach, lambda network: network[1])


def test_a_script_draws_random_numbers_in_eagers_order() -> None:
    """Stochastic depth before the shortcut."""
    block = basic_block(drop_path=0.5)
    block.downsample = nn.Dropout(0.5)
    nn.init.uniform_(block.bn2.weight, 0.5, 1.0)
    script = torch.jit.script(block)
    x = make_map((8, C, 6, 6))
    torch.manual_seed(1)
    expected = block(x)
    torch.manual_seed(1)
    torch.testing.assert_close(script(x), expected)


@pytest.mark.parametrize("name", ["bn", "se"])
@pytest.mark.parametrize("hook", [forward_hook, pre_hook, backward_hook, own_forward])
def test_hooks_in_the_tail_run(hook: Any, name: str) -> None:
    logs = compare(pair("tail"), hook(name), lambda network: network[1])
    assert logs[0]


def test_hooks_in_a_bottleneck_and_a_projection_run() -> None:
    width = 4 * 8
    block = Bottleneck(
        C, 8, 1, Projection(C, width, 1), groups=1, base_width=64, reduction=4, se_bias=True, drop_path=0
    )
    expected = block.double()(x := make_map((2, C, 5, 4), torch.float64))
    seen: list[str] = []
    names = ["downsample.1", "bn1", "act1", "bn2", "act2", "bn3", "se", "se.fc1", "se.fc2"]
    for name in names:
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    assert torch.allclose(block(x), expected, rtol=1e-10, atol=1e-12)
    assert seen == ["bn1", "act1", "bn2", "act2", "bn3", "se.fc1", "se.fc2", "se", "downsample.1"]  # timm's order


def test_a_backward_hook_before_an_activation_in_place() -> None:
    """Torch's own network would fail here. Ours works without the hook, and so it does with it."""
    block, x = basic_block().double(), make_map((2, C, 5, 4), torch.float64)
    expected = block(x)
    seen: list[tuple[Tensor, ...]] = []
    block.bn1.register_full_backward_hook(lambda _, grads, __: seen.append(grads))
    block.act1.inplace = True
    y = block(x)
    y.sum().backward()
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)
    assert len(seen) == 1


def test_synchronised_batch_norms_are_called() -> None:
    ours, theirs = pair("network")
    ours[1] = nn.SyncBatchNorm.convert_sync_batchnorm(ours[1])
    assert isinstance(ours[1].bn2, nn.SyncBatchNorm)
    ours.eval(), theirs.eval()  # training wants a process group
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-10)


# ---- for all modules ----

GLOBAL = {
    "forward": nn.modules.module.register_module_forward_hook,
    "forward pre": nn.modules.module.register_module_forward_pre_hook,
    "backward": nn.modules.module.register_module_full_backward_hook,
    "backward pre": nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("network", MAKE)
@pytest.mark.parametrize("kind", GLOBAL)
def test_hooks_for_all_modules_run_for_every_child(kind: str, network: str) -> None:
    ours, theirs = pair(network)
    x = torch.randn(4, 3, 7, 6, dtype=torch.float64)
    orders, outputs = [], []
    for net in (ours, theirs):
        names = {module: name for name, module in net.named_modules()}
        order: list[str] = []
        handle = GLOBAL[kind](lambda module, *_, names=names, order=order: order.append(names[module]))
        try:
            outputs.append(net(x))
            outputs[-1].sum().backward()
        finally:
            handle.remove()
        orders.append(order)
    assert orders[0] == orders[1]
    assert set(names.values()) == set(orders[0])
    assert torch.allclose(*outputs, rtol=1e-10, atol=1e-12)


# ---- one op, and again one op ----


def operators(module: nn.Module, *args: Tensor) -> list[str]:
    with Watch() as watch:
        module(*args)
    return watch.names


def pruned_for_good(se: Any) -> None:
    prune.l1_unstructured(se.fc1, "weight", 0.5)
    prune.remove(se.fc1, "weight")


def spectrally_normed_once(se: Any) -> None:
    torch.nn.utils.spectral_norm(se.fc1)
    torch.nn.utils.remove_spectral_norm(se.fc1)


def test_what_was_removed_leaves_one_op() -> None:
    se, x = SqueezeExcitation(C, M), make_map((2, C, 5, 4))
    one = ["se_ext::squeeze_excite"]
    with torch.no_grad():
        assert operators(se, x) == one
        for hook in (forward_hook, pre_hook, backward_hook):
            for layer in ("fc1", "fc2"):
                hook(layer)(se, [])
                assert operators(se, x).count("aten::convolution") == 2
                for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                    getattr(se.get_submodule(layer), hooks).clear()
                assert operators(se, x) == one
        own_forward("fc1")(se, [])
        assert "aten::convolution" in operators(se, x)
        del se.fc1.forward
        for change in (pruned_for_good, spectrally_normed_once):
            change(se)
            assert operators(se, x) == one
        parametrize.register_parametrization(se.fc1, "weight", ByHook())
        assert operators(se, x) == ["aten::mul", *one]


def test_a_called_layer_leaves_two_ops_of_ours() -> None:
    se, x = SqueezeExcitation(C, M, post_activation="relu"), make_map((2, C, 5, 4))
    se.fc1 = nn.Sequential(se.fc1)
    with torch.no_grad():
        names = operators(se, x, x)
    assert [name for name in names if "se_ext" in name] == ["se_ext::squeeze", "se_ext::rescale"]
    assert "aten::add" not in names


def test_a_tail_stays_fused_around_what_is_called() -> None:
    tail, x = (
        BatchNormSqueezeExcitation(C, M, pre_activation="silu", post_activation="relu").eval(),
        make_map((2, C, 5, 4)),
    )

    def ours() -> list[str]:
        with torch.no_grad():
            return [name for name in operators(tail, x, x) if "se_ext" in name]

    assert ours() == ["se_ext::bn_squeeze_excite"]
    handle = tail.bn.register_forward_hook(lambda *_: None)
    assert ours() == ["se_ext::bn_squeeze_excite"]
    handle.remove()
    handle = tail.se.fc2.register_forward_hook(lambda *_: None)
    assert ours() == ["se_ext::_bn_activation", "se_ext::squeeze", "se_ext::rescale"]
    handle.remove()
    handle = tail.se.register_forward_hook(lambda *_: None)
    assert ours() == ["se_ext::_bn_activation", "se_ext::squeeze_excite"]
    handle.remove()
    assert ours() == ["se_ext::bn_squeeze_excite"]


# ---- copies, functional calls, other tensors ----


def test_a_copy_of_a_hooked_module_is_hooked() -> None:
    se, seen = SqueezeExcitation(C, M), []
    se.fc1.register_forward_hook(lambda *_: seen.append(1))
    copy.deepcopy(se)(make_map((2, C, 5, 4)))
    assert seen == [1]


def test_functional_call_puts_tensors_in() -> None:
    se, x = SqueezeExcitation(C, M).double(), make_map((2, C, 5, 4), torch.float64)
    other = SqueezeExcitation(C, M).double()
    given = {key: value.detach() for key, value in other.named_parameters()}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(se, given, (x,)), other(x))
        with Watch() as watch:
            torch.func.functional_call(se, given, (x,))
    assert watch.names == ["se_ext::squeeze_excite"]


class Negated(Tensor):
    """Stands for a quantised or sharded weight: what it holds is not what it means."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.conv2d, F.conv2d):
            input, weight, bias = args[:3]
            return func(input, -weight.as_subclass(Tensor), bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_wrapped_weight_is_left_to_its_layer() -> None:
    ours, theirs = pair("block")
    for network in (ours, theirs):
        weight = network[1].fc1.weight
        network[1].fc1.weight = nn.Parameter(weight.detach().as_subclass(Negated))
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    assert type(ours[1].fc1.weight) is Negated
    assert torch.allclose(ours(x), theirs(x), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_hook_leaves_float32_weights_beside_a_half_typed_map(dtype: torch.dtype) -> None:
    se, x = SqueezeExcitation(C, M), make_map((2, C, 5, 4), dtype)
    fused = se(x)
    seen: list[torch.dtype] = []
    se.fc1.register_forward_hook(lambda _, args, output: seen.append(output.dtype))
    called = se(x)
    assert seen == [torch.float32]
    assert called.dtype is dtype
    assert (called - fused).abs().max() <= 4 * torch.finfo(dtype).eps * fused.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        se(x.float() if dtype is torch.float16 else x)
    assert seen[1:] == [torch.bfloat16]


# ---- tracing and compiling ----


@pytest.mark.parametrize("attach", [adapter, forward_hook("fc1"), own_forward("fc1")], ids=["adapter", "hook", "own"])
@pytest.mark.parametrize("network", MAKE)
def test_trace_compile_and_export_call_too(network: str, attach: Callable[[Any, Log], None]) -> None:
    net, theirs = (net.eval() for net in pair(network))
    for one in (net, theirs):
        torch.manual_seed(3)
        attach(block_of(one), log := [])
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    expected = theirs(x)
    traced = torch.jit.trace(net, (x,))
    assert torch.allclose(traced(torch.cat([x, x]))[:2], expected, rtol=1e-9)
    torch._dynamo.reset()
    log.clear()
    if attach is adapter:
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), expected, rtol=1e-9)
        program = torch.export.export(net, (x,), strict=False)
        assert torch.allclose(program.module()(x), expected, rtol=1e-9)
        graph = torch.fx.symbolic_trace(net)
        assert torch.allclose(graph(x), expected, rtol=1e-9)


@pytest.mark.parametrize("guarded", [False, True])
def test_a_hook_added_after_compiling_is_noticed_as_for_torchs_own_modules(guarded: bool) -> None:
    """By default torch does not guard its modules' hooks; where it does, ours are guarded. Some versions of torch
    notice a hook of ours by what else is guarded, which is no mistake."""
    x = make_map((2, C, 5, 4))
    noticed = []
    for module in (SqueezeExcitation(C, M), Plain()):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guarded):
            compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
            compiled(x)
            module.fc1.register_forward_hook(lambda _, args, output: output + 1)
            noticed.append(torch.allclose(compiled(x), module(x)))
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))
    ours, torchs = noticed
    assert torchs == guarded
    assert ours or not guarded


@pytest.mark.parametrize(
    ("network", "names"), [("block", ["fc1"]), ("tail", ["bn", "se", "se.fc2"]), ("network", ["bn2", "se", "se.fc1"])]
)
def test_a_script_that_would_leave_out_a_hook_is_refused(network: str, names: list[str]) -> None:
    for name in names:
        module = MAKE[network]()[0]
        torch.jit.script(module)
        module.get_submodule(name).register_forward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match=rf"torch.jit.script: expected .*{name[-3:-1]}.* to be plain"):
            torch.jit.script(module)
    block = SqueezeExcitation(C, M).double()
    adapter(block, [])
    with pytest.raises(RuntimeError, match=r"torch.jit.script: expected fc1 or fc2 of SqueezeExcitation to be plain"):
        torch.jit.script(block)


@pytest.mark.parametrize("training", [False, True])
def test_a_script_of_a_synchronised_batch_norm_is_refused(training: bool) -> None:
    """torch cannot script it either, and says so less clearly."""
    tail = nn.SyncBatchNorm.convert_sync_batchnorm(MAKE["tail"]()[0])
    assert isinstance(tail.bn, nn.SyncBatchNorm)
    with pytest.raises(RuntimeError, match=r"torch.jit.script: expected bn of BatchNormSqueezeExcitation to be plain"):
        torch.jit.script(tail.train(training))


# ---- running statistics ----

STEPS = [(True, True), (True, False), (False, True), (True, True), (False, False), (True, False), (True, True)]
TAIL = {"tail": True, "batch norm": False}


class Folded(nn.Module):
    """The batch norm as the networks call it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C, **options)

    def forward(self, x: Tensor) -> Tensor:
        return se_ext._fusion.batch_norm(self.bn, None, x)


def normalised(kind: str, module: Any, x: Tensor) -> Tensor:
    """What the batch norm gave. In the tail the block's gate is 1/2."""
    return 2 * module(x) if kind == "tail" else module(x)


def build(kind: str, **options: Any) -> Any:
    if kind != "tail":
        return Folded(**options).double()
    tail = BatchNormSqueezeExcitation(C, M, **options).double()
    nn.init.zeros_(tail.se.fc2.weight)
    nn.init.zeros_(tail.se.fc2.bias)
    return tail


def assert_statistics(ours: nn.BatchNorm2d, theirs: nn.BatchNorm2d) -> None:
    for (name, a), b in zip(ours._buffers.items(), theirs._buffers.values(), strict=True):
        assert (a is None) is (b is None), name
        assert a is None or torch.allclose(a, b, rtol=1e-11, atol=1e-14), name


def drop(buffers: tuple[str, ...]) -> Callable[[Any], None]:
    def apply(bn: Any) -> None:
        for name in buffers:
            bn._buffers[name] = None

    return apply


ALL = ("running_mean", "running_var", "num_batches_tracked")
GONE = [(), ALL[2:], ALL[:2], ALL]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("gone", GONE, ids=str)
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0, 0.7])
@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("kind", TAIL)
def test_running_statistics_are_torchs(
    kind: str, tracked: bool, momentum: Any, gone: tuple[str, ...], affine: bool
) -> None:
    """Every combination, and whatever is changed between steps."""
    options = {"momentum": momentum, "track_running_stats": tracked, "affine": affine}
    ours, theirs = build(kind, **options), nn.BatchNorm2d(C, **options).double()
    if affine:
        nn.init.uniform_(ours.bn.weight)
        nn.init.normal_(ours.bn.bias)
        theirs.load_state_dict(ours.bn.state_dict())
    for bn in (ours.bn, theirs):
        drop(gone)(bn)
    for step, (training, tracking) in enumerate(STEPS):
        x = make_map((4, C, 3, 2), torch.float64) * (1 + step)
        for bn in (ours.bn, theirs):
            bn.train(training)
            bn.track_running_stats = tracking
        assert torch.allclose(normalised(kind, ours, x), theirs(x), rtol=1e-9, atol=1e-11)
        assert_statistics(ours.bn, theirs)


@pytest.mark.parametrize("form", ["script", "compile"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", TAIL)
def test_running_statistics_in_other_forms(kind: str, momentum: Any, form: str) -> None:
    if (kind, form) == ("batch norm", "script"):
        pytest.skip("TorchScript leaves batch norms without a block to torch")
    torch._dynamo.reset()
    theirs = nn.BatchNorm2d(C, momentum=momentum).double()
    state = build(kind, momentum=momentum).state_dict()
    for training, tracking in STEPS:  # a script has its own copy of the flags
        ours = build(kind, momentum=momentum)
        ours.load_state_dict(state)
        ours.train(training)
        ours.bn.track_running_stats = theirs.track_running_stats = tracking
        theirs.train(training)
        run = torch.jit.script(ours) if form == "script" else torch.compile(ours, backend="aot_eager", fullgraph=True)
        x = make_map((4, C, 3, 2), torch.float64)
        assert torch.allclose(normalised(kind, run, x), theirs(x), rtol=1e-9, atol=1e-11)
        assert_statistics(ours.bn, theirs)
        state = ours.state_dict()


def test_a_compiled_batch_norm_follows_what_is_toggled() -> None:
    torch._dynamo.reset()
    ours, theirs = build("tail"), nn.BatchNorm2d(C).double()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for training, tracking in STEPS:
        x = make_map((4, C, 3, 2), torch.float64)
        for bn in (ours.bn, theirs):
            bn.train(training)
            bn.track_running_stats = tracking
        assert torch.allclose(normalised("tail", compiled, x), theirs(x), rtol=1e-9, atol=1e-11)
        assert_statistics(ours.bn, theirs)


@pytest.mark.parametrize(("missing", "training", "kind"), list(itertools.product(ALL[:2], [False, True], TAIL)))
def test_one_statistic_without_the_other_is_refused(missing: str, training: bool, kind: str) -> None:
    ours, theirs = build(kind).train(training), nn.BatchNorm2d(C).double().train(training)
    x = make_map((4, C, 3, 2), torch.float64)
    for bn, call in ((ours.bn, ours), (theirs, theirs)):
        drop((missing,))(bn)
        with pytest.raises((ValueError, RuntimeError), match=r"running_(mean|var)"):
            call(x)
    if kind == "tail":
        with pytest.raises(Exception, match=r"running_(mean|var)"):
            torch.jit.script(ours)(x)


def test_an_eps_that_torch_refuses_is_refused() -> None:
    for kind in TAIL:
        with pytest.raises(ValueError, match="eps must be"):
            build(kind, eps=0.0)(make_map((4, C, 3, 2), torch.float64))


@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid, nn.Tanh])
def test_called_layers_have_second_derivatives(gate: type[nn.Module]) -> None:
    se = SqueezeExcitation(4, 2, nn.Tanh, gate).double()
    se.fc1.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(se, (x,))
