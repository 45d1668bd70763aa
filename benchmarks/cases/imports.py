"""What the import of a package takes where torch was imported before."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.measure.case import Case, Work
from benchmarks.measure.facts import ROOT
from benchmarks.measure.timing import OtherLoad, Plan
from benchmarks.summary import IMPORT, Row, add_times

PACKAGES = ("se_ext",)
PROGRAM = """
import sys, time, torch
package = sys.argv[1]
start = time.perf_counter()
__import__(package)
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class ImportCase(Case):
    package: str

    def measure(self, plan: Plan) -> Row:
        import_us(self.package)
        load = OtherLoad()
        samples_us = [round(import_us(self.package), 3) for _ in range(plan.rounds)]
        found = {IMPORT: {"samples_us": samples_us}}
        return add_times({"name": self.package, "other_cpu_share": load.share(), "variants": found})


def work(text: str, *, quick: bool) -> Work:
    return Work([ImportCase(package) for package in PACKAGES if text in package])


def import_us(package: str) -> float:
    """Microseconds, in a fresh process in the folder of the clone. Python keeps its bytecode, as pip would have."""
    line = [sys.executable, "-c", PROGRAM, package]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout) * 1e6
