"""What a conversion changes, and what it does not: the modules stay the objects that they are, other libraries' hooks,
adapters and wrappers take effect, and revert gives everything back."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import package
from torch import Tensor, nn
from torch.nn.utils import prune

import se_ext
from conversion.small import CONVERTED, SE, Residual, assert_same, images, network, pair, results

pytestmark = pytest.mark.cpu_only


def ops_in(model: nn.Module, training: bool = True) -> list[str]:
    """The ops that a step runs, without those of torch."""
    model.train(training)
    with torch.profiler.profile() as profile:
        model(images(next(model.parameters()).dtype)).sum().backward()
    return [event.name for event in profile.events() if event.name.startswith("se_ext::")]


def sum_of_ops(model: nn.Module) -> int:
    return len(ops_in(model))


# ---- values ----


@pytest.mark.parametrize("training", [True, False])
def test_same_values_gradients_and_statistics(training: bool) -> None:
    plain, ours = pair()
    assert_same(results(ours, training=training), results(plain, training=training))


def test_every_block_and_batch_norm_is_fused() -> None:
    plain, ours = pair()
    names = ops_in(ours)
    assert names.count("se_ext::_bn_squeeze_excite_running") == 4
    # the stem; bn1 of four blocks; the projection; bn3 of timm's
    assert names.count("se_ext::_bn_activation_running") == 1 + 4 + 1 + 2
    assert ops_in(plain) == []


def test_without_neighbours_only_the_blocks_are_converted() -> None:
    plain = network()
    ours = copy.deepcopy(plain)
    report = se_ext.convert(ours, fuse=False)
    assert [row.path for row in report.converted] == [f"blocks.{i}.se" for i in range(4)]
    assert_same(results(ours), results(plain))


def test_half_types_and_channels_last() -> None:
    plain, ours = pair(torch.float32)
    x = images(torch.float32).to(memory_format=torch.channels_last)
    assert_same(results(ours, x), results(plain, x), 1e-3)
    plain, ours = plain.bfloat16().eval(), ours.bfloat16().eval()
    exact = copy.deepcopy(plain).double()(x.double())
    errors = [(m(x.bfloat16()).double() - exact).abs().max() for m in (ours, plain)]
    assert errors[0] <= 1.5 * errors[1]


# ---- what stays ----


def test_modules_stay_what_they_are() -> None:
    model = network()
    model.blocks[0].conv1.weight.requires_grad_(False)
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    versions = {name: t._version for name, t in tensors.items()}
    text, keys, training = repr(model), list(model.state_dict()), [m.training for m in model.modules()]
    attributes = {path: m.__dict__.copy() for path, m in modules.items()}
    classes = {path: type(m) for path, m in modules.items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    se_ext.convert(model)
    assert {path: id(m) for path, m in model.named_modules()} == {path: id(m) for path, m in modules.items()}
    assert all(isinstance(m, classes[path]) for path, m in model.named_modules())
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(now[name] is t and t._version == versions[name] for name, t in tensors.items())
    assert (repr(model), list(model.state_dict())) == (text, keys)
    assert [m.training for m in model.modules()] == training
    assert {path: m.__dict__ for path, m in modules.items()} == attributes
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert not model.blocks[0].conv1.weight.requires_grad


def test_nothing_but_the_model_changes() -> None:
    other = network()
    expected = results(copy.deepcopy(other))
    forwards = {cls: cls.forward for cls in {type(m) for m in other.modules()}}
    pair()
    assert {cls: cls.forward for cls in forwards} == forwards
    assert ops_in(copy.deepcopy(other)) == []
    assert all(torch.equal(value, expected[name]) for name, value in results(other).items())


def test_twice_changes_nothing() -> None:
    _, ours = pair()
    classes = [type(m) for m in ours.modules()]
    report = se_ext.convert(ours)
    assert (report.converted, report.skipped) == ([], [])
    assert "already" in str(report)
    assert [type(m) for m in ours.modules()] == classes


def test_a_block_added_later_is_converted_by_a_second_call() -> None:
    _, ours = pair()
    ours.blocks.append(Residual(16, 16).double())
    plain = copy.deepcopy(ours)
    se_ext.revert(plain)
    assert "blocks.4.se" in [row.path for row in se_ext.convert(ours).converted]
    assert_same(results(ours), results(plain))


def test_revert_gives_back_what_was_there() -> None:
    plain, ours = pair()
    se_ext.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in plain.modules()]
    assert {path: m.__dict__.keys() for path, m in ours.named_modules()} == {
        path: m.__dict__.keys() for path, m in plain.named_modules()
    }
    expected = results(plain)
    assert all(torch.equal(value, expected[name]) for name, value in results(ours).items())


def test_where_chooses() -> None:
    model = network()
    report = se_ext.convert(model, where=lambda path, module: path.startswith("blocks.0"))
    assert {row.path for row in report.converted} == {"blocks.0", "blocks.0.se"}
    assert {row.outcome for row in report.skipped} == {"where said no"}
    assert_same(results(model), results(network()))


def test_report_is_a_table() -> None:
    model = network()
    lines = str(se_ext.convert(model)).splitlines()
    assert lines[0].split() == ["path", "class", "shape", "converted"]
    assert len(lines) == 1 + len(CONVERTED)
    assert "Residual" in {line.split()[1] for line in lines}
    assert any("bn1 → act1, bn2 → se → + shortcut → act2" in line for line in lines)


def test_model_without_blocks_is_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    assert "found no SE block" in str(se_ext.convert(model))
    assert type(model) is nn.Sequential


def test_a_block_is_a_model_too() -> None:
    block = SE(8, 4)
    assert [row.path for row in se_ext.convert(block).converted] == [""]
    assert "(the model)" in str(se_ext.convert(SE(8, 4)))


# ---- copies and files ----


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_average(model: nn.Module) -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(model).module


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_save, by_average])
def test_copies_are_converted_and_independent(copied: Callable[[nn.Module], nn.Module]) -> None:
    plain, ours = pair()
    twin = copied(ours)
    assert [type(m) for m in twin.modules()] == [type(m) for m in ours.modules()]
    shared = {t.data_ptr() for t in ours.state_dict().values()} & {t.data_ptr() for t in twin.state_dict().values()}
    assert not shared
    assert_same(results(twin), results(plain))
    assert sum_of_ops(twin) == sum_of_ops(ours)
    se_ext.revert(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]


def test_a_shallow_copy_is_converted() -> None:
    _, ours = pair()
    assert type(copy.copy(ours.blocks[0])) is type(ours.blocks[0])


def test_a_saved_model_loads_where_se_ext_was_not_imported(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), se_ext.SqueezeExcitation(8, 4)).eval()
    se_ext.convert(model)
    x = torch.randn(2, 3, 5, 5)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    program = (
        f"import torch; m, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "assert torch.equal(m(x), y); print(type(m)._recipe.source)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tail" in done.stdout


def test_checkpoints_go_both_ways() -> None:
    plain, ours = pair()
    other = network()
    for p in other.parameters():
        nn.init.normal_(p, std=0.2)
    ours.load_state_dict(other.state_dict())
    assert_same(results(ours), results(other))
    plain.load_state_dict(ours.state_dict())
    assert_same(results(plain, training=False), results(other, training=False))


# ---- what others attach ----


HOOKABLE = ["stem", "stem.1", "stem.2", "blocks", "blocks.0", "blocks.0.bn1", "blocks.0.act1", "blocks.0.drop"]
HOOKABLE += ["blocks.0.bn2", "blocks.0.se", "blocks.0.se.fc1", "blocks.0.se.act", "blocks.0.se.gate", "blocks.0.act2"]
HOOKABLE += ["blocks.1.downsample", "blocks.1.downsample.1", "blocks.2.bn1", "blocks.2.bn1.act", "blocks.2.bn2.drop"]
HOOKABLE += ["blocks.2.se.conv_expand", "blocks.2.drop_path", "blocks.2.aa", "blocks.2.conv_pw"]


@pytest.mark.parametrize("path", HOOKABLE)
def test_hooks_take_effect(path: str) -> None:
    seen: list[list[str]] = [[], []]
    models = pair()
    for model, log in zip(models, seen, strict=True):
        for m in model.modules():  # torch allows none in place behind a backward hook
            m.__dict__.update({"inplace": False} if "inplace" in m.__dict__ else {})
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda m, args, log=log: log.append("pre"))
        module.register_forward_hook(lambda m, args, out, log=log: (log.append("forward"), out * 1.5)[1])
        module.register_full_backward_hook(lambda m, gin, gout, log=log: log.append("backward"))
    plain, ours = (results(model) for model in models)
    assert seen[0] == seen[1]
    assert set(seen[0]) == {"pre", "forward", "backward"}
    assert_same(ours, plain)


def test_hooks_are_reported() -> None:
    model = network()
    model.blocks[0].bn1.register_forward_hook(lambda *_: None)
    (row,) = [row for row in se_ext.convert(model).converted if row.path == "blocks.0"]
    assert row.outcome.endswith("; bn1 with hooks: called")


def weaker_conv(model: nn.Module) -> None:
    """An adapter in a convolution's place."""
    model.blocks[0].conv1 = nn.Sequential(model.blocks[0].conv1, nn.Conv2d(8, 8, 1).double())


def adapted_layer(model: nn.Module) -> None:
    model.blocks[2].se.conv_reduce = nn.Sequential(model.blocks[2].se.conv_reduce, nn.Identity())


def other_norm(model: nn.Module) -> None:
    model.blocks[0].bn1 = nn.GroupNorm(2, 8).double()


def other_activation(model: nn.Module) -> None:
    model.blocks[0].act2 = nn.ELU()


def other_known_activation(model: nn.Module) -> None:
    model.blocks[2].bn2.act = nn.Hardswish()


def no_block(model: nn.Module) -> None:
    model.blocks[0].se = None


def identity_for_block(model: nn.Module) -> None:
    model.blocks[2].se = nn.Identity()


def a_flag(model: nn.Module) -> None:
    model.blocks[0].doubled = True


def dropout_for_identity(model: nn.Module) -> None:
    model.blocks[0].drop = nn.Dropout(0.3)


def drop_probability(model: nn.Module) -> None:
    model.blocks[2].drop_path.drop_prob = 0.7


def longer_chain(model: nn.Module) -> None:
    model.stem.append(nn.Tanh())


def changed_chain(model: nn.Module) -> None:
    model.stem[2] = nn.SiLU()


def cut_chain(model: nn.Module) -> None:
    del model.stem[2]


def sliced_chain(model: nn.Module) -> None:
    model.stem = model.stem[:2]


def deleted_child(model: nn.Module) -> None:
    del model.blocks[0].se
    model.blocks[0].se = SE(8, 6).double()


def frozen_norm(model: nn.Module) -> None:
    model.blocks[0].bn2.weight.requires_grad_(False)


def own_forward(model: nn.Module) -> None:
    act = model.blocks[0].act2
    act.forward = lambda x: x.clamp(-0.5, 0.5)


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model.blocks[0].se.fc1, "weight", amount=0.5)


def spectral(model: nn.Module) -> None:
    torch.manual_seed(5)
    torch.nn.utils.parametrizations.spectral_norm(model.blocks[2].se.conv_expand)


def no_statistics(model: nn.Module) -> None:
    model.blocks[0].bn1.track_running_stats = False


CHANGES = [weaker_conv, adapted_layer, other_norm, other_activation, other_known_activation, no_block]
CHANGES += [identity_for_block, a_flag, dropout_for_identity, drop_probability, longer_chain, changed_chain, cut_chain]
CHANGES += [sliced_chain, deleted_child, frozen_norm, own_forward, pruned, spectral, no_statistics]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_changes_take_effect(change: Callable[[nn.Module], None], first: bool) -> None:
    """Whether a user changes the network before it is converted or afterwards, it is the changed network."""
    plain = network()
    ours = copy.deepcopy(plain)
    if not first:
        se_ext.convert(ours)
    for model in (plain, ours):
        torch.manual_seed(4)
        change(model)
    if first:
        se_ext.convert(ours)
    assert_same(results(ours), results(plain))
    expected = results(network(), training=False)["output"]
    assert change is frozen_norm or not torch.allclose(results(plain, training=False)["output"], expected)


def test_synchronised_batch_norms() -> None:
    """timm's conversion makes new modules of ours, and torch's of torch's: they are called."""
    _, ours = pair()
    expected = results(network(), training=False)
    synchronised = package("timm.layers").convert_sync_batchnorm(ours)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synchronised.modules()) == 12
    assert_same(results(synchronised, training=False), expected)


def test_half_converted_by_torchs_sync_batch_norm() -> None:
    plain, ours = pair()
    for model in (plain, ours):
        model.blocks[0] = nn.SyncBatchNorm.convert_sync_batchnorm(model.blocks[0])
    assert_same(results(ours, training=False), results(plain, training=False))


# ---- modules that stand in two places ----


class Shared(nn.Module):
    """One block, batch norm and activation for two places, and a ModuleList that is indexed."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)])
        self.blocks = nn.ModuleList([SE(8, 4)])
        self.bn, self.act, self.alias = nn.BatchNorm2d(8), nn.ReLU(), self.blocks[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.alias(self.bn(self.convs[0](x))))
        return self.act(self.blocks[0](self.bn(self.convs[1](x))) + x[:, :, 1:-1, 1:-1])


def test_shared_modules() -> None:
    torch.manual_seed(0)
    plain = Shared().double()
    ours = copy.deepcopy(plain)
    report = se_ext.convert(ours)
    assert len([row for row in report.converted if row.outcome == "SE block"]) == 1
    assert ours.alias is ours.blocks[0]
    assert_same(results(ours), results(plain))
    twin = copy.deepcopy(ours)
    assert twin.alias is twin.blocks[0]


class Broadcast(nn.Module):
    """A sum with something of another shape or dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.se, self.act = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), SE(8, 4), nn.ReLU()
        self.shift = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)) + self.shift)
        x = self.act(self.se(x) + self.shift)
        return self.se(x) + x.mean(1, keepdim=True)


def test_a_sum_that_broadcasts() -> None:
    torch.manual_seed(0)
    plain = Broadcast().double()
    ours = copy.deepcopy(plain)
    assert "shortcut" in str(se_ext.convert(ours))
    assert_same(results(ours), results(plain))


def test_batch_norm_of_vectors() -> None:
    """BatchNorm1d takes [N, C] and [N, C, L]."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        SE(8, 4),
        nn.Flatten(2),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
    )
    plain(images(torch.float32))
    plain = plain.double()
    ours = copy.deepcopy(plain)
    assert "3 → 4" in str(se_ext.convert(ours))
    assert_same(results(ours), results(plain))


# ---- verify ----


@pytest.mark.parametrize("batch", [True, images(torch.float32)], ids=["default images", "own batch"])
def test_verify_says_how_much_differs(batch: Any) -> None:
    model = network(torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = se_ext.convert(model, verify=batch)
    assert report.verified is not None
    assert report.verified < 1e-9
    assert "largest difference" in str(report)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.blocks[0].conv1.weight.grad is None


def test_verify_reverts_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One module computes something else; the others stay converted."""
    from se_ext.conversion import steps

    real = steps.batch_norm
    model = network()
    model.blocks[3].bn1.eps = 0.25

    @functools.wraps(real)
    def batch_norm(conv: Any, bn: Any, *others: Any) -> Tensor:
        return real(conv, bn, *others) * (1.5 if bn.eps == 0.25 else 1)

    monkeypatch.setattr(steps, "batch_norm", batch_norm)
    from se_ext.conversion import fused_class

    fused_class._class.cache_clear()
    report = se_ext.convert(model, verify=images())
    fused_class._class.cache_clear()
    assert report.verified > 1e-3
    reverted = [row.path for row in report.skipped]
    assert "blocks.3" in reverted
    assert "blocks.0" not in reverted
    assert "blocks.0" in [row.path for row in report.converted]
    plain = network()
    plain.blocks[3].bn1.eps = 0.25
    assert_same(results(model), results(plain))


# ---- bad input ----


def test_what_is_no_network() -> None:
    for function, name in ((se_ext.convert, "convert"), (se_ext.revert, "revert")):
        with pytest.raises(TypeError, match=f"^{name}: expected model to be a torch.nn.Module, got list"):
            function([])  # type: ignore[operator,arg-type]


def test_forms_in_which_forwards_do_not_run() -> None:
    block = SE(8, 4)
    scripted = torch.jit.script(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match="not scripted, got a RecursiveScriptModule"):
        se_ext.convert(scripted)
    with pytest.raises(TypeError, match=r"not scripted, got a RecursiveScriptModule \(at '1'\)"):
        se_ext.convert(nn.Sequential(block, scripted))
    with pytest.raises(TypeError, match=r"not compiled, got a OptimizedModule; convert the network first"):
        se_ext.convert(torch.compile(block))
    with pytest.raises(TypeError, match=r"not traced, got an fx.GraphModule"):
        se_ext.convert(torch.fx.symbolic_trace(block))
    assert type(block) is SE


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyConv2d(8, 1), SE(8, 4))
    with pytest.raises(ValueError, match=r"got a LazyConv2d \(at '0'\) without shapes; run a batch"):
        se_ext.convert(model)
    assert type(model[1]) is SE
    model(torch.randn(1, 3, 4, 4))
    assert len(se_ext.convert(model).converted) == 1


def test_meta_tensors() -> None:
    """A network without memory is converted as it is, and gets its weights afterwards."""
    package("torchvision_shim")
    plain = network()
    with torch.device("meta"):
        ours = type(plain)().double()
    assert len(se_ext.convert(ours).converted) == len(CONVERTED)
    ours = ours.to_empty(device="cpu")
    ours.load_state_dict(plain.state_dict())
    assert_same(results(ours), results(plain))
