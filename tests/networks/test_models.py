"""se_ext.models are timm's networks: the same names, numbers of parameters, logits, gradients and interface."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from helpers import package
from timm_networks import random_statistics
from torch import nn

from se_ext import models

NAMES = [name for name in models.__all__ if name != "SEResNet"]
COMPARED = ["seresnet18", "seresnet50", "seresnext50_32x4d"]


def timm() -> Any:
    package("torchvision_shim")  # timm imports torchvision
    return package("timm")


def build(name: str, **options: Any) -> models.SEResNet:
    return getattr(models, name)(**options)


def pair(name: str = "seresnet18", **options: Any) -> tuple[models.SEResNet, Any]:
    """Ours and timm's in float64, with the same weights."""
    options = {"num_classes": 10, **options}
    ours, theirs = build(name, **options).double(), timm().create_model(name, **options).double()
    random_statistics(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, dtype=torch.float64)


def assert_same(ours: Any, theirs: Any) -> None:
    """Tensors, or sequences of them, equal up to the order in which sums are taken."""
    if isinstance(ours, torch.Tensor):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)
        return
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_and_parameters_are_timm_s(name):
    library = timm()
    with torch.device("meta"):
        ours, theirs = build(name), library.create_model(name)
    shapes = [{key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])  # an optimizer's checkpoint knows parameters by their order
    counts = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert counts[0] == counts[1]


def test_initialisation_is_timm_s():
    """From the same seed the same weights."""
    weights = []
    for create in (build, timm().create_model):
        torch.manual_seed(11)
        weights.append(create("seresnet50", num_classes=10).state_dict())
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


@pytest.mark.parametrize("name", COMPARED)
@pytest.mark.parametrize("to_timm", [False, True], ids=["timm's weights here", "ours in timm"])
def test_logits_and_a_training_step_are_timm_s(name, to_timm):
    ours, theirs = build(name, num_classes=10).double(), timm().create_model(name, num_classes=10).double()
    source, target = (ours, theirs) if to_timm else (theirs, ours)
    random_statistics(source)
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
    random_statistics(network)
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
    random_statistics(theirs)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    logits = []
    for network in (ours, theirs):
        torch.manual_seed(3)
        logits.append(network.train()(images))
    rates = [block.drop_path for block in ours.modules() if isinstance(block, models.BasicBlock)]
    assert rates == pytest.approx([0.8 * i / 7 for i in range(8)])
    assert torch.allclose(*logits, rtol=1e-9, atol=1e-9)


def test_a_block_that_always_drops_gives_its_shortcut():
    """Without a division by the keep probability of 0."""
    ours, theirs = pair(drop_path_rate=1.0)
    images = pictures()
    logits = []
    for network in (ours, theirs):
        torch.manual_seed(3)
        logits.append(network.train()(images))
        logits[-1].square().sum().backward()
    assert logits[0].isfinite().all()
    assert_same(*logits)
    gradients = [[p.grad for p in network.parameters()] for network in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-7 * float(b.abs().max()))
    assert not gradients[0][-3].any()  # of the last block, behind which only fc's weight and bias come


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_drop_scale_is_not_rounded_to_a_half_type(dtype):
    block = build("seresnet18", drop_path_rate=0.3).layer4[1].train()
    scale = block.drop_scale(torch.randn(64, 2, 1, 1, dtype=dtype))
    assert scale.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    kept = (torch.ones((), dtype=scale.dtype) / 0.7).item()
    assert set(scale.tolist()) == {0.0, kept}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_torchscript_and_compile(train):
    network = build("seresnet18", num_classes=10, drop_path_rate=0.1)
    random_statistics(network)
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
    random_statistics(network)
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


# ---- the interface of timm's models ----

NOT_OURS = {"default_cfg", "pretrained_cfg", "pretrained_model_args"}  # of timm's downloads, from its create_model


def test_public_names_are_timm_s():
    ours, theirs = pair()
    names = {name for name in dir(theirs) if not name.startswith("_")} - NOT_OURS
    assert not names - set(dir(ours))
    plain = [name for name in names if isinstance(getattr(theirs, name), (bool, int, float, str, list, dict))]
    assert {"num_classes", "num_features", "head_hidden_size", "in_chans", "drop_rate", "feature_info"} <= {*plain}
    for name in plain:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert [ours.group_matcher(coarse) for coarse in (0, 1)] == [theirs.group_matcher(coarse) for coarse in (0, 1)]
    assert ours.get_classifier() is ours.fc
    assert ours.get_classifier(name_only=True) == theirs.get_classifier(name_only=True)


@pytest.mark.parametrize("name", COMPARED)
def test_feature_info_is_timm_s(name):
    with torch.device("meta"):
        ours, theirs = build(name), timm().create_model(name)
    assert ours.feature_info == theirs.feature_info


@pytest.mark.parametrize(("pool", "num_classes"), [*product(["avg", "max", "avgmax", "catavgmax"], [0, 10]), ("", 0)])
def test_head_is_timm_s(pool, num_classes):
    """Built so, and reset to it from another head."""
    built = pair(global_pool=pool, num_classes=num_classes)
    reset = pair(global_pool="max", num_classes=3)
    for network in reset:
        network.eval().reset_classifier(num_classes, pool)
        assert not network.fc.training
        assert not network.global_pool.training
        assert all(p.dtype is torch.float64 for p in network.fc.parameters())
    reset[0].load_state_dict(reset[1].state_dict())
    images = pictures()
    for ours, theirs in (built, reset):
        for name in ("num_classes", "num_features", "head_hidden_size"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert type(ours.fc) is type(theirs.fc)
        assert ours.global_pool.pool_type == theirs.global_pool.pool_type == pool
        assert ours.global_pool.feat_mult() == theirs.global_pool.feat_mult()
        assert ours.global_pool.is_identity() == theirs.global_pool.is_identity()
        with torch.no_grad():
            features = [network.eval().forward_features(images) for network in (ours, theirs)]
            assert_same(*features)
            assert_same(ours.forward_head(features[0]), theirs.forward_head(features[1]))
            assert_same(ours.forward_head(features[0], pre_logits=True), theirs.forward_head(features[1], True))
            assert_same(ours(images), theirs(images))
            assert_same(torch.jit.script(ours)(images), ours(images))


def test_reset_classifier_keeps_the_pooling():
    ours, theirs = pair(global_pool="catavgmax")
    for network in (ours, theirs):
        network.reset_classifier(7)
    assert ours.fc.weight.shape == theirs.fc.weight.shape == (7, 1024)
    assert ours.fc.training


def test_an_unknown_pooling_raises():
    with pytest.raises(ValueError, match=r"expected global_pool to be one of .*'avg'.*, got 'fast'"):
        build("seresnet18", global_pool="fast")


def test_dropout_is_timm_s():
    ours, theirs = pair(drop_rate=0.5)
    images = pictures()
    logits = []
    for network in (ours, theirs):
        torch.manual_seed(5)
        logits.append(network.train()(images))
    assert_same(*logits)
    assert_same(ours.eval()(images), theirs.eval()(images))


INDICES = [None, 1, 3, [0], [0, 2], [-1], [3, 1], (-5, 4)]


@pytest.mark.parametrize("stop_early", [False, True], ids=["to the end", "early"])
@pytest.mark.parametrize("indices", INDICES, ids=str)
def test_intermediates_are_timm_s(indices, stop_early):
    ours, theirs = (network.eval() for network in pair())
    images = pictures()
    for only in (False, True):
        options = {"indices": indices, "stop_early": stop_early, "intermediates_only": only}
        with torch.no_grad():
            assert_same(ours.forward_intermediates(images, **options), theirs.forward_intermediates(images, **options))


@pytest.mark.parametrize("indices", INDICES, ids=str)
@pytest.mark.parametrize("prune_head", [False, True])
def test_pruned_networks_are_timm_s(indices, prune_head):
    if indices is None:
        indices = 5
    ours, theirs = (network.eval() for network in pair())
    kept = [network.prune_intermediate_layers(indices, prune_head=prune_head) for network in (ours, theirs)]
    assert kept[0] == kept[1]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name in ("num_classes", "num_features", "head_hidden_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    images = pictures()
    with torch.no_grad():
        assert_same(ours(images), theirs(images))
        options = {"indices": kept[0], "stop_early": True}
        assert_same(ours.forward_intermediates(images, **options), theirs.forward_intermediates(images, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": [5]}, "expected indices from -5 to 4, got 5"),
        ({"indices": 6}, "expected indices, the number of last maps, from 1 to 5, got 6"),
        ({"output_fmt": "NLC"}, "expected output_fmt \"NCHW\", got 'NLC'"),
    ],
)
def test_intermediates_that_there_are_not_raise(options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build("seresnet18").forward_intermediates(torch.empty(1, 3, 32, 32), **options)


@pytest.mark.parametrize("wrapper", ["FeatureListNet", "FeatureGetterNet"])
def test_timm_s_feature_extractors_take_them(wrapper):
    """What create_model(..., features_only=True) wraps a network in."""
    timm()
    images = pictures()
    extract = getattr(package("timm.models._features"), wrapper)
    ours, theirs = (extract(network.eval(), out_indices=(0, 2, 4)) for network in pair())
    assert ours.feature_info.channels() == theirs.feature_info.channels() == [64, 128, 512]
    with torch.no_grad():
        assert_same(ours(images), theirs(images))


def test_layer_wise_learning_rates_are_timm_s():
    timm()
    groups = [
        package("timm.optim").param_groups_layer_decay(network, weight_decay=0.1, layer_decay=0.5) for network in pair()
    ]
    summaries = [
        [(group["lr_scale"], group["weight_decay"], sorted(p.numel() for p in group["params"])) for group in one]
        for one in groups
    ]
    assert len(summaries[0]) > 10
    assert summaries[0] == summaries[1]


# ---- gradient checkpointing ----


def step(network: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """Logits, gradients and statistics of a training step."""
    torch.manual_seed(9)  # for stochastic depth
    logits = network.train()(images)
    logits.square().sum().backward()
    gradients = [p.grad / p.grad.abs().max().clamp_min(1e-30) for p in network.parameters()]
    return [logits.detach(), *gradients, *(b.clone() for b in network.buffers())]


def test_checkpointing_gives_the_same_step_and_timm_s_statistics():
    ours, theirs = pair(drop_path_rate=0.3)
    images = pictures(4)
    plain = step(copy.deepcopy(ours), images)
    for network in (ours, theirs):
        network.set_grad_checkpointing()
        assert network.grad_checkpointing
    with torch.profiler.profile() as prof:
        checkpointed = step(ours, images)
    calls = {event.key: event.count for event in prof.key_averages()}
    assert calls["se_ext::_bn_squeeze_excite_forward"] == 2 * 8  # each block's tail computed again in backward
    others = 1 + len(list(ours.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain[:others], checkpointed[:others], strict=True))
    expected = step(theirs, images)
    for a, b in zip(checkpointed, expected, strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-7)
    counts = [
        [int(m.num_batches_tracked) for m in n.modules() if isinstance(m, nn.BatchNorm2d)] for n in (ours, theirs)
    ]
    assert counts[0] == counts[1]
    assert set(counts[0]) == {1, 2}
    ours.set_grad_checkpointing(False)
    assert not ours.grad_checkpointing


def test_checkpointing_in_evaluation_and_of_intermediates():
    ours, theirs = pair()
    images = pictures()
    expected = ours.eval()(images)
    for network in (ours, theirs):
        network.set_grad_checkpointing()
    assert torch.equal(ours.eval()(images), expected)
    with torch.no_grad():
        assert torch.equal(ours(images), expected)
    maps = [network.train().forward_intermediates(images)[1] for network in (ours, theirs)]
    assert_same(*maps)
    for found in maps:
        found[2].square().sum().backward()
    assert_same(ours.conv1.weight.grad, theirs.conv1.weight.grad)


def test_checkpointing_compiles():
    """In one graph, with eager's logits and gradients. The compiler moves the statistics once."""
    network = build("seresnet18", num_classes=10, drop_path_rate=0.3).double()
    random_statistics(network)
    network.set_grad_checkpointing()
    twin = copy.deepcopy(network)
    images = pictures(4)
    expected = step(network, images)
    torch.manual_seed(9)
    logits = torch.compile(twin, backend="aot_eager", fullgraph=True)(images)
    logits.square().sum().backward()
    assert torch.allclose(logits, expected[0], rtol=1e-9, atol=1e-9)
    for p, q in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-9 * float(p.grad.abs().max()))
    assert {int(m.num_batches_tracked) for m in twin.modules() if isinstance(m, nn.BatchNorm2d)} == {1}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_user_s_checkpoint_around_a_stage(reentrant):
    """With recomputation that stops at the last tensor wanted."""
    network = build("seresnet18", num_classes=10).double()
    random_statistics(network)
    images = pictures(4)
    plain = step(copy.deepcopy(network), images)
    stage = network.layer2.forward
    network.layer2.forward = lambda x: torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=reentrant)
    others = 1 + len(list(network.parameters()))
    checkpointed = step(network, images)
    assert all(torch.equal(a, b) for a, b in zip(plain[:others], checkpointed[:others], strict=True))


# ---- copies ----


def saved_and_loaded(network: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", ["seresnet18", "seresnet50"])
def test_a_copy_trains_apart(name, how):
    network = build(name, num_classes=10, drop_path_rate=0.2, drop_rate=0.1, global_pool="catavgmax").double()
    random_statistics(network)
    twin = COPIES[how](network)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    images = pictures(4)
    of_the_twin = step(twin, images)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(of_the_twin, step(network, images), strict=True))


@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_moving_averages_of_the_weights(version):
    """timm's, by its own formula, statistics included; and the average computes by itself."""
    timm()
    network = build("seresnet18", num_classes=10).double()
    random_statistics(network)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    average = getattr(package("timm.utils"), version)(network, decay=0.75)
    images = pictures()
    network.train()(images)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    average.update(network)
    for key, value in network.state_dict().items():
        found = average.module.state_dict()[key]
        if value.is_floating_point():
            assert torch.allclose(found, 0.75 * before[key] + 0.25 * value, rtol=1e-12, atol=1e-12), key
            assert not torch.equal(found, before[key]), key
    other = build("seresnet18", num_classes=10).double().eval()
    other.load_state_dict(average.module.state_dict())
    assert torch.equal(average.module.eval()(images), other(images))
