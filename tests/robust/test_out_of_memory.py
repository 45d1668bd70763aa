"""Where an allocation fails, the op raises, leaks nothing and changes nothing: neither its arguments, nor those that it
would have written, nor running statistics. The next call gives the right result."""

from __future__ import annotations

import subprocess
import sys

import programs
import pytest
from ops import CASES
from strategies import IS_LONG, TIMES

pytestmark = pytest.mark.cpu_only
EVERY = 1 if IS_LONG else 29


@pytest.fixture(scope="module")
def failing_malloc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library that makes allocations fail."""
    return programs.library_to_preload(
        "failing_malloc.c", tmp_path_factory.mktemp("malloc"), "-ftls-model=initial-exec"
    )


def test_every_op_survives_a_failing_allocation(failing_malloc: str) -> None:
    names = ",".join(case.name for case in CASES)
    done = programs.run("failing_calls.py", names, str(EVERY), timeout=120 + 60 * TIMES, LD_PRELOAD=failing_malloc)
    assert done.returncode == 0, f"{done.stdout[-500:]} ended by {done.returncode}: {done.stderr[-2000:]}"
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [case.name for case in CASES]
    assert all(line.endswith("; right") for line in lines), done.stdout
    raised = sum(int(line.split()[3]) for line in lines)
    assert raised > 500


LIMITED = """
import resource, sys
import torch
from helpers import make_weights
import se_ext

torch.set_num_threads(2)
# 40 MB: more than malloc keeps of what was freed.
x, scale, filters = torch.randn(5, 64, 128, 256), torch.rand(5, 64), torch.rand(64, 1, 3, 3)
weights = make_weights(64, 4)
mean, var, batches = torch.zeros(64), torch.ones(64), torch.tensor(0)
calls = {
    "rescale": lambda: se_ext.rescale(x, scale),
    "squeeze_excite": lambda: se_ext.squeeze_excite(x, *weights),
    "recorded": lambda: se_ext.squeeze_excite(x.requires_grad_(), *weights, post_activation="relu"),
    "norm": lambda: torch.ops.se_ext._bn_activation_running(
        x, None, None, mean, var, batches, True, 0.1, 1e-5, "relu", None, None),
    "convolution": lambda: se_ext.depthwise_conv(x, filters, padding=1),
}
before = x.clone()
expected = {name: call().detach().sum() for name, call in calls.items()}  # and the threads are there
for t in (mean, batches):
    t.zero_()
var.fill_(1)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (held + x.nbytes // 2, most[1]))
for name, call in calls.items():
    try:
        call()
    except (RuntimeError, MemoryError) as error:
        assert "memory" in str(error) or isinstance(error, MemoryError), error
    else:
        print(name, "found the memory")
assert torch.equal(x, before)
assert (mean == 0).all() and (var == 1).all() and batches == 0
with torch.no_grad():  # no more memory than there is
    x.requires_grad_(False)
    torch.ops.se_ext.rescale_(x, torch.ones(5, 64))
    assert torch.equal(x, before)
resource.setrlimit(resource.RLIMIT_AS, most)
for name, call in calls.items():
    assert call().detach().sum() == expected[name], name
print("right")
"""


def test_a_map_that_does_not_fit() -> None:
    """The output is larger than the address space that is left."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED],
        env=programs.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout == "right\n"
