"""Whole networks in the benchmark: swaps compute the same, a wrong one is never timed, costs are worked out right."""

from __future__ import annotations

import copy
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import se_ext
from benchmarks import summary
from benchmarks.cases import networks, runtimes, whole_networks
from benchmarks.experiments import BY_NAME, NETWORK_NAMES, OWN_NETWORK
from benchmarks.measure import session
from benchmarks.measure.case import Work, WrongResult
from benchmarks.measure.timing import Plan
from benchmarks.report.networks import network_table

pytestmark = [pytest.mark.benchmark, pytest.mark.cpu_only]

BLOCKS = {
    "SEModule": lambda **kwargs: networks.SEModule(16, rd_channels=8, **kwargs),
    "SEModule no bias": lambda **kwargs: networks.SEModule(16, rd_channels=8, bias=False, **kwargs),
    "SqueezeExcite": lambda: networks.SqueezeExcite(16, act_layer=nn.SiLU, gate_layer=nn.Hardsigmoid),
}
TWO_ROUNDS = Plan(rounds=2, block_ms=0, warmup_ms=0, lead_in_calls=0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A hundred small layers: on a busy machine their threads wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_swapped_block_computes_the_same(name: str, inplace: bool) -> None:
    block = BLOCKS[name]()
    ours = networks.with_se_ext(block, inplace)
    assert isinstance(ours, se_ext.SqueezeExcitation)
    assert ours.inplace == inplace
    x = torch.randn(2, 16, 5, 4)
    with torch.inference_mode():
        expected = block(x)
        y = ours(x.clone())
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{"norm_layer": nn.BatchNorm2d}, {"add_maxpool": True}], ids=["norm", "maxpool"])
def test_a_block_that_computes_something_else_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="se_ext has no module for SEModule"):
        networks.with_se_ext(BLOCKS["SEModule"](**kwargs))


SMALL = "mobilenetv3_small_050"


def small_networks(mode: str) -> tuple[dict[str, nn.Module], torch.Tensor, torch.Tensor]:
    images, labels = networks.draw_images(2, 64, "nhwc")
    network = networks.build(SMALL, "nhwc", images, seed=1).train(mode == "train")
    return networks.variants(SMALL, network, "nhwc", mode), images, labels


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_swapped_networks_compute_the_same(mode: str) -> None:
    found, images, labels = small_networks(mode)
    in_place = ["se_ext_inplace"] if mode == "inference" else []
    assert list(found) == ["as_is", "se_ext", *in_place, "no_se"]
    blocks = {
        name: [type(m) for m in net.modules() if isinstance(m, se_ext.SqueezeExcitation)] for name, net in found.items()
    }
    counts = {name: len(types) for name, types in blocks.items()}
    theirs = len(networks.se_blocks(found["as_is"]))
    assert theirs > 5
    assert counts == {"as_is": 0, "no_se": 0} | dict.fromkeys(["se_ext", *in_place], theirs)
    assert networks.se_blocks(found["no_se"]) == []
    state = {key: value.clone() for key, value in found["as_is"].state_dict().items()}
    networks.check(found, images, labels)
    assert all(torch.equal(value, state[key]) for key, value in found["as_is"].state_dict().items())


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_a_wrong_swap_is_never_timed(mode: str) -> None:
    found, images, labels = small_networks(mode)
    with torch.no_grad():
        next(m for m in found["se_ext"].modules() if isinstance(m, se_ext.SqueezeExcitation)).fc2.bias.add_(0.1)
    with pytest.raises(WrongResult, match="se_ext: logits off by"):
        networks.check(found, images, labels)


def test_a_check_that_proves_nothing_is_refused() -> None:
    found, images, labels = small_networks("inference")
    found["no_se"] = found["as_is"]
    with pytest.raises(WrongResult, match="nothing is proved"):
        networks.check(found, images, labels)


def test_a_training_step_changes_the_weights() -> None:
    found, images, labels = small_networks("train")
    before = [p.detach().clone() for p in found["se_ext"].parameters()]
    networks.make_step(found["se_ext"], images, labels)()
    changed = [not torch.equal(p, q) for p, q in zip(found["se_ext"].parameters(), before, strict=True)]
    assert sum(changed) > len(changed) / 2


def test_the_peak_of_a_step_is_the_same_each_time() -> None:
    """What an earlier profile left behind does not count: the gradient of a large weight, freed in the next step."""
    network = nn.Linear(1000, 1000, bias=False)
    images = torch.randn(1, 1000)
    step = networks.make_step(network, images, torch.zeros(1, dtype=torch.long))
    step()
    peaks = [networks.peak_bytes(step, network) for _ in range(3)]
    assert len(set(peaks)) == 1
    assert 2 * network.weight.nbytes <= peaks[0] < 2.2 * network.weight.nbytes


def test_a_row_has_what_the_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "image_size", lambda name: 64)
    row = networks.NetworkCase(SMALL, "nchw", "train", 2).measure(TWO_ROUNDS)
    assert list(row["variants"]) == ["as_is", "se_ext", "no_se"]
    assert all(len(variant["samples_us"]) == 2 for variant in row["variants"].values())
    assert row["cost_us"].keys() == {"as_is", "se_ext"}
    assert (row["batch"], row["mode"], row["image_size"], row["dtype"]) == (2, "train", 64, "float32")
    assert row["se_blocks"] > 5


def cost_row(**samples_us: list[float]) -> dict[str, Any]:
    variants = {name: {"samples_us": times} for name, times in samples_us.items()}
    where = {"name": "net", "mode": "inference", "batch": 8, "layout": "nchw"}
    return summary.add_costs({**where, "variants": variants})


def test_costs_by_hand() -> None:
    row = cost_row(
        as_is=[30e3, 34e3, 90e3],
        se_ext=[22e3, 26e3, 99e3],
        se_ext_inplace=[21e3, 22e3, 23e3],
        no_se=[20e3, 22e3, 80e3],
    )
    assert row["cost_us"]["as_is"] == pytest.approx({"median": 10e3, "p10": 10e3, "p90": 11.6e3})  # 10, 12, 10
    assert row["cost_us"]["se_ext"] == pytest.approx({"median": 4e3, "p10": 2.4e3, "p90": 16e3})  # 2, 4, 19
    assert row["cost_ratio"] == pytest.approx({"se_ext": 0.4, "se_ext_inplace": 0.0})
    line = "| net | inference | 8 | nchw | 34.0 | 22.0 | 10.0 (10.0 to 11.6) | 4.0 (2.4 to 16.0) |"
    assert line in network_table([row])


def test_a_cost_in_the_noise_has_no_ratio() -> None:
    row = cost_row(as_is=[9.0, 9.0], se_ext=[8.0, 8.0], no_se=[10.0, 9.0])
    assert row["cost_us"]["as_is"]["median"] == -0.5
    assert row["cost_ratio"] == {"se_ext": None}
    assert network_table([row]).endswith("| – | – | – |")


# ---- as a user runs them ----


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How each network was compiled. Nothing is: a copy takes the place of what torch.compile would make of it."""
    found = []

    def pretend(network: nn.Module, **options: Any) -> nn.Module:
        found.append({**options, "freezing": torch._inductor.config.freezing})
        return network

    monkeypatch.setattr(networks, "image_size", lambda name: 64)
    monkeypatch.setattr(torch, "compile", pretend)
    return found


def user_case(mode: str, *others: str) -> whole_networks.WholeNetworkCase:
    return whole_networks.WholeNetworkCase(SMALL, "nhwc", mode, 2, others)


@pytest.mark.parametrize("mode", ["inference", "train"])
def test_a_user_s_network_is_timed_in_every_form(mode: str, compiled: list[dict[str, Any]]) -> None:
    row = user_case(mode).measure_here(TWO_ROUNDS)
    assert list(row["variants"]) == ["eager", "eager_se_ext", "compile", "compile_se_ext", "compile_no_se"]
    assert all(len(variant["samples_us"]) == 2 for variant in row["variants"].values())
    assert (row["batch"], row["mode"], row["image_size"], row["layout"]) == (2, mode, 64, "nhwc")
    # An inference with frozen weights; no call pays for the guards of the other networks.
    assert compiled == [{"freezing": mode == "inference", "isolate_recompiles": True}] * 3


def test_a_user_has_se_ext_s_own_network_or_its_blocks() -> None:
    found = {}
    for name in ("seresnet50", SMALL):
        network = networks.timm.create_model(name)
        assert list(whole_networks.user_s(name, network.train(), "nhwc")) == ["", "_se_ext"]
        forms = whole_networks.user_s(name, network.eval(), "nhwc")
        assert forms.pop("") is network
        for change, ours in forms.items():
            blocks = [type(module) for module in ours.modules() if isinstance(module, se_ext.SqueezeExcitation)]
            assert len(blocks) == len(networks.se_blocks(network)) > 5
            found[name + change] = type(ours).__module__.split(".")[0]
    assert found == {"seresnet50_se_ext": "se_ext", "seresnet50_se_ext_blocks": "timm", f"{SMALL}_se_ext": "timm"}
    own = [name for name in NETWORK_NAMES if hasattr(se_ext.models, name)]
    assert own == [OWN_NETWORK]


def test_each_network_is_inferred_at_two_batches_and_trained_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "installed", lambda: dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "1.0"))
    work = BY_NAME["whole_networks"].work("", BY_NAME["whole_networks"].axes, quick=True)
    assert {name: [str(case) for case in work.cases].count(name) for name in map(str, work.cases)} == {
        f"{name} nhwc {what}": 1
        for name in ("efficientnet_b0", "mobilenetv3_large_100", "regnety_008", "seresnet50")
        for what in ("inference 1 onnxruntime", "inference 8 onnxruntime", "train 8")
    }
    assert work.notes == ["openvino is left out, because these are not installed: openvino"]
    assert work.facts["runtimes"] == {"onnx": "1.0", "onnxscript": "1.0", "onnxruntime": "1.0"}


def test_a_runtime_without_the_exporter_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "openvino":
            raise importlib.metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert runtimes.installed() == {"onnx": "1.0", "onnxscript": "1.0", "onnxruntime": "1.0"}
    assert runtimes.available({"onnx": "1", "openvino": "1"}) == (
        (),
        [
            "onnxruntime is left out, because these are not installed: onnxscript, onnxruntime",
            "openvino is left out, because these are not installed: onnxscript",
        ],
    )


def wrong(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(p for name, p in network.named_parameters() if "classifier.bias" in name).add_(0.5)
    return network


@pytest.mark.parametrize("mode", ["inference", "train"])
@pytest.mark.parametrize("which", ["eager", "compile"])
def test_a_wrong_network_of_a_user_is_never_timed(
    which: str, mode: str, compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if which == "compile":
        monkeypatch.setattr(torch, "compile", lambda network, **_: wrong(network))
    else:
        right = whole_networks.user_s
        monkeypatch.setattr(
            whole_networks, "user_s", lambda *given: {c: wrong(net) if c else net for c, net in right(*given).items()}
        )
    said = "compile: logits off by .* from eager's" if which == "compile" else "eager_se_ext: logits off by"
    with pytest.raises(WrongResult, match=said):
        user_case(mode).measure_here(TWO_ROUNDS)


def test_other_runtimes_compute_the_same_and_take_turns(compiled: list[dict[str, Any]]) -> None:
    row = user_case("inference", "onnxruntime", "openvino").measure_here(TWO_ROUNDS)
    assert list(row["variants"])[-2:] == ["onnxruntime", "openvino"]
    assert all(len(variant["samples_us"]) == 2 for variant in row["variants"].values())


def test_a_wrong_runtime_is_never_timed(compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(names: Any, network: nn.Module, images: torch.Tensor) -> dict[str, Any]:
        other = wrong(copy.deepcopy(network))
        return {"openvino": lambda: other(images)}

    monkeypatch.setattr(runtimes, "load", load)
    with pytest.raises(WrongResult, match="openvino: logits off by"):
        user_case("inference", "openvino").measure_here(TWO_ROUNDS)


def test_a_crash_loses_the_other_runtimes_only(compiled: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has a fresh process; where one ends, the row is measured again without the other runtimes."""
    processes = []

    def in_environment(name: str, function: Callable[..., Any], plan: Plan) -> dict[str, Any]:
        case = function.__self__  # type: ignore[attr-defined]
        processes.append((name, function.__name__, case.runtimes))
        return allocator_in_environment(name, os._exit, 1) if case.runtimes else {"row": case.name}

    allocator_in_environment = whole_networks.in_environment
    monkeypatch.setattr(whole_networks, "in_environment", in_environment)
    work = Work([user_case("inference", "openvino"), user_case("train")])
    monkeypatch.setattr(whole_networks, "work", lambda *_, **__: work)
    results = session.run(BY_NAME["whole_networks"], quick=True)
    assert processes == [("default", "measure_here", others) for others in (("openvino",), (), ())]
    assert results["rows"] == [{"row": SMALL}] * 2
    (failed,) = results["failed"]
    assert failed.startswith(f"{SMALL} nhwc inference 2 openvino: BrokenProcessPool")
