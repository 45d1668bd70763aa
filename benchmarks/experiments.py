"""What there is to measure: every experiment, with its question, its method and what it varies. No torch needed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure.allocator import ENVIRONMENTS
from benchmarks.measure.case import Work
from benchmarks.measure.timing import Plan

RESULTS = Path(__file__).resolve().parent / "results"
# Does it work, not how fast it is.
QUICK = Plan(rounds=2, block_ms=0.1, warmup_ms=0.1, lead_in_calls=0)

INFERENCE, TRAIN = "inference", "train"
MODES = (INFERENCE, TRAIN)
LAYOUTS = ("nchw", "nhwc")
OWN_NETWORK = "seresnet50"  # se_ext.models has it
NETWORK_NAMES = ("efficientnet_b0", "mobilenetv3_large_100", "regnety_008", OWN_NETWORK)
VARIANTS = ("eager_conv", "eager_linear", "compile", "compile_linear")
TAILS = ("bn_se_residual_relu", "bn_silu_se", "bias_silu_se")
GRAD_INPUT, GRAD_WEIGHT = "grad_input", "grad_weight"
CONV_BLOCK = "conv_bn_silu_se"  # forward + backward of these four layers
PASSES = (INFERENCE, GRAD_INPUT, GRAD_WEIGHT, TRAIN, CONV_BLOCK)
# The values that an axis can have; a batch is any whole number.
CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("cpu", "cuda"),
    "dtype": ("float32", "float64", "bfloat16", "float16"),
    "environment": tuple(ENVIRONMENTS),
    "layout": LAYOUTS,
    "mode": MODES,
    "passes": PASSES,
    "tail": TAILS,
    "variants": VARIANTS,
}

ROUNDS = (
    "Variants take turns (A B C, B C A, ...), one block of calls each per round, all in one process; samples_us has "
    "the time per call of each block, and a ratio is the median of the ratios round by round. other_cpu_share is the "
    "part of all CPU time that other programs used. Compile time is not included. "
)
BLOCKS = ROUNDS + (
    "Inputs are random and stay the same from call to call, so what fits in cache of working_set_bytes (x, y, weights; "
    "in training also their gradients) is warm. gb_per_s is 2 (training: 5; clone: 2) times bytes_x over the median "
    "time. se_ext's output and gradients matched the float64 formula on the same data before timing."
)
AROUND = ROUNDS + (
    "bn_se_residual_relu and bn_silu_se are forward + backward in training mode, gradients for the map, the shortcut "
    "and every weight; bias_silu_se is inference. Eager writes the activations and the shortcut's sum in place, as "
    "timm does. se_ext's output, gradients and running statistics matched the float64 formula on the same data before "
    "timing, within 0.1 % in the Euclidean norm (but for a few in a million values, on another side of a ReLU's kink)."
)
NETWORKS = ROUNDS + (
    "as_is is timm's network with random weights, se_ext and se_ext_inplace the same with its SE blocks swapped (same "
    "weights), se_ext_models the network of that name from se_ext.models, no_se the same with every SE block replaced "
    "by the identity. train is forward + backward + SGD step. cost_us is the time of a variant minus that of no_se, "
    "round by round, cost_ratio the ratio of the median costs to that of as_is. The swapped networks gave the logits "
    "(training: in float64, and the gradient of the images) of the network as it is before timing. peak_bytes is the "
    "most that tensors hold during a training step."
)
WHOLE_NETWORKS = ROUNDS + (
    "Each row has a process of its own. eager is timm's network with random weights, as a user runs it on a CPU: "
    "channels_last, glibc's allocator with nothing set. eager_se_ext is the same network, with the same weights, with "
    "se_ext's block in place of timm's, or se_ext.models' network of that name; where there is one, "
    "eager_se_ext_blocks is timm's network with se_ext's blocks, in inference. compile, compile_se_ext and "
    "compile_se_ext_blocks are the same under torch.compile, compile_no_se is timm's network without its SE blocks; "
    "with isolate_recompiles, so that no call tries the guards of another variant, and inference with "
    "torch._inductor.config.freezing. onnxruntime and openvino run timm's network, exported by "
    "torch.onnx.export(dynamo=True) for the batch of the row, in float32 on contiguous (NCHW) images and on torch's "
    "number of threads; those of ONNX Runtime do not spin between calls. train is forward + backward + SGD step. "
    "Before timing, eager_se_ext and eager_se_ext_blocks gave the logits (training: in float64, and the gradient of "
    "the images) of eager, the compiled networks the logits of their eager form, and the other runtimes those of "
    "eager."
)
CONVERTED = ROUNDS + (
    "Each row has a process of its own, with glibc's allocator and nothing set. eager is timm's network with random "
    "weights, eager_converted a copy of it after se_ext.convert; compile and compile_converted are the same under "
    "torch.compile (training, channels_last), with isolate_recompiles, so that no call tries the guards of the other. "
    "train is forward + backward + SGD step. Before timing, every SE block was converted, eager_converted gave the "
    "logits (training: in float64, and the gradient of the images) of eager, and the compiled networks the logits of "
    "their eager form. peak_bytes is the most that tensors hold during a training step; conversion_s the seconds of "
    "the first call of se_ext.convert in the process."
)
DEPTHWISE = ROUNDS + (
    "The depthwise convolutions are those of efficientnet_b0, mobilenetv3_large_100, mnasnet_100, convnext_tiny and "
    "tf_efficientnet_b0 of timm at 224x224, each shape once. se_ext is the op depthwise_conv, eager_onednn ATen's "
    "convolution, eager_native the same without oneDNN, timed only where a call takes less than three times as long "
    "as with it. Where the padding is “same” and the stride 2, both are timm's Conv2dSame, which pads x and calls "
    "ATen's convolution. compile is the same under torch.compile, which calls ATen's convolution too (NCHW: in "
    "channels_last, between copies), so it is timed on three shapes only, as bfloat16 is. inference is a forward pass "
    "without autograd; grad_input and grad_weight are autograd's backward alone, of a forward pass made before; train "
    "is both, with all gradients. A multiplication and an addition count as two operations. conv_bn_silu_se is "
    "forward + backward in training mode of the layers around SE in efficientnet_b0: eager has Conv2d, BatchNorm2d, "
    "SiLU in place and timm's SqueezeExcite, se_ext depthwise_conv and BatchNormSqueezeExcitation. Before timing, "
    "every variant matched the float64 formula on the same data; the four layers within 0.1 % of the largest value."
)
IMPORTS = (
    "Each import is timed in a fresh process that has imported torch before; one that is not counted comes first, and "
    "leaves the files in memory and the bytecode on disk, as an installation does. other_cpu_share is the part of all "
    "CPU time that other programs used."
)
LARGE_INPUTS = ROUNDS + (
    "Every row is measured in a fresh process with its environment, because glibc and torch read their settings at "
    "start-up only. The gate's bias is so large that every gate is 1 and x stays what it is when the block is applied "
    "in place again and again; with ordinary weights se_ext's output, in place or not, matched the float64 formula "
    "before timing. speedup is se_ext's, speedup_inplace se_ext_inplace's."
)
STAGES = ROUNDS + (
    "Inference: clone is x.clone(), mean and multiply are eager's two passes over the map, squeeze, excite and rescale "
    "se_ext's ops by themselves, fused the whole block, rescale_in_place and fused_in_place write into x (every scale "
    "is 1, so that x stays what it is). Training: compile_linear and se_ext are forward and backward of the block, the "
    "rest se_ext's ops, called without autograd: forward and backward of the block, backward_of_x the same without the "
    "gradients of the weights, excite and rescale with their backward by themselves."
)
GPU = ROUNDS + (
    "A block replays one CUDA graph of calls_per_step calls, so that its time is the device's. The calls of a graph "
    "have inputs and outputs of their own, over more memory than the cache holds; where warm, they share one input, "
    "and what fits stays in the L2 cache. Rows of the group wall are of one sample, called from Python without a graph "
    "until the device is done: the time at the host. The yardstick is the faster of x.clone() and out.copy_(x). "
    "forward + backward asks for the gradients of every map and weight. se_ext's output and gradients matched the "
    "float64 formula on the same data before timing; behind a shortcut's ReLU within 0.1 % in the Euclidean norm "
    "(bfloat16: 2 %). A batch repeats eight samples."
)


@dataclass(frozen=True)
class Experiment:
    """One question and how it is answered. `kind` says what rows the answer has, and names the module of
    benchmarks.cases that measures them: one for each workload and each combination of the values of `axes`."""

    name: str
    question: str
    kind: str
    method: str
    plan: Plan
    axes: Mapping[str, tuple[Any, ...]]
    page_faults_out: bool = True
    keep_going: bool = False  # after a row that failed
    budget_s: float | None = None

    @property
    def results(self) -> Path:
        """The file that holds the answer."""
        return RESULTS / f"{self.name}.json"

    def work(self, workload: str, axes: Mapping[str, Any], quick: bool) -> Work:
        """The cases of the workloads that have `workload` in their or a network's name."""
        module = importlib.import_module(f"benchmarks.cases.{self.kind}")
        work: Work = module.work(workload, quick=quick, **axes)
        return work


def _blocks(name: str, question: str, rounds: int, **axes: tuple[Any, ...]) -> Experiment:
    axes = {"dtype": ("float32",), **axes, "layout": LAYOUTS, "variants": VARIANTS, "device": ("cpu",)}
    return Experiment(name, question, "blocks", BLOCKS, Plan(rounds=rounds), axes)


ALL = (
    Experiment(
        name="whole_networks",
        question="what do a user's inference and training step take, without and with se_ext, eager and compiled?",
        kind="whole_networks",
        method=WHOLE_NETWORKS,
        plan=Plan(rounds=25, block_ms=20, warmup_ms=0, lead_in_calls=0),
        axes={"mode": MODES, "batch": (1, 8)},
        page_faults_out=False,
        keep_going=True,
    ),
    Experiment(
        name="converted",
        question="what do a user's inference and training step take after se_ext.convert?",
        kind="converted",
        method=CONVERTED,
        plan=Plan(rounds=25, block_ms=20, warmup_ms=0, lead_in_calls=0),
        axes={"mode": MODES, "batch": (8,), "layout": LAYOUTS},
        page_faults_out=False,
        keep_going=True,
    ),
    Experiment(
        name="imports",
        question="what does the import of se_ext take beyond torch's?",
        kind="imports",
        method=IMPORTS,
        plan=Plan(rounds=11, block_ms=0, warmup_ms=0, lead_in_calls=0),
        axes={},
        page_faults_out=False,
    ),
    _blocks(
        name="inference",
        question="what do the SE blocks of seven networks take in inference?",
        rounds=8,
        mode=(INFERENCE,),
        batch=(1, 32),
    ),
    _blocks(
        name="inference-batch8",
        question="what do they take at batch 8, also in bfloat16?",
        rounds=8,
        mode=(INFERENCE,),
        batch=(8,),
        dtype=("float32", "bfloat16"),
    ),
    _blocks(
        name="train",
        question="what do they take forward and backward?",
        rounds=5,
        mode=(TRAIN,),
        batch=(8, 32),
    ),
    Experiment(
        name="tails",
        question="what does the block take together with the batch norm, activation and shortcut around it?",
        kind="tails",
        method=AROUND,
        plan=Plan(rounds=8, block_ms=3.0, warmup_ms=5.0, lead_in_calls=1),
        axes={"tail": TAILS, "batch": (8,), "layout": LAYOUTS},
    ),
    Experiment(
        name="depthwise",
        question="what do the depthwise convolutions of five networks take, alone and with what follows them?",
        kind="depthwise",
        method=DEPTHWISE,
        plan=Plan(rounds=15, block_ms=2.0, warmup_ms=2.0, lead_in_calls=1),
        axes={"dtype": ("float32", "bfloat16"), "batch": (8,), "layout": LAYOUTS, "passes": PASSES},
        keep_going=True,
    ),
    Experiment(
        name="networks",
        question="what does SE cost in whole networks, as they are and with se_ext?",
        kind="networks",
        method=NETWORKS,
        plan=Plan(rounds=25, block_ms=10, warmup_ms=0, lead_in_calls=0),
        axes={"layout": LAYOUTS},
    ),
    Experiment(
        name="allocators",
        question="what do inputs larger than 64 MB take under three settings of the allocator?",
        kind="allocators",
        method=LARGE_INPUTS,
        plan=Plan(rounds=10, block_ms=20, warmup_ms=20, lead_in_calls=1),
        axes={"environment": tuple(ENVIRONMENTS), "layout": LAYOUTS},
        page_faults_out=False,
    ),
    Experiment(
        name="stages",
        question="what do the stages of the block take one by one, and what bounds its speedup?",
        kind="stages",
        method=STAGES,
        plan=Plan(rounds=8, block_ms=3.0, warmup_ms=5.0),
        axes={"mode": MODES, "batch": (8, 32), "layout": LAYOUTS},
    ),
    Experiment(
        name="gpu",
        question="what does the block take on a GPU, alone and with what stands around it?",
        kind="gpu",
        method=GPU,
        plan=Plan(rounds=7, block_ms=2.0, warmup_ms=4.0, lead_in_calls=1),
        axes={"layout": LAYOUTS, "device": ("cuda",), "variants": ("eager_conv", "eager_linear", "compile_linear")},
        page_faults_out=False,
        keep_going=True,
        budget_s=220,
    ),
)
BY_NAME = {experiment.name: experiment for experiment in ALL}
