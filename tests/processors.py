"""The numerical tests as other processors would round them: ``make soak-processors``.

``python -m tests.processors [--all] [--only TEXT] [--dry-run] [path …]``. MKL is told which instructions to use (``MKL_CBWR``), torch's own
kernels likewise (``ATEN_CPU_CAPABILITY``), each with one thread and with two: sums run in another order, and whatever a test owes to the
roundings of one machine shows. AVX2 is near what MKL does on an AMD processor. By default every pair of two settings is tried, in six
runs; ``--all`` tries all twelve. A processor without AVX-512 runs what it has in its place.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
MKL = ("AVX2", "AVX512", "COMPATIBLE")
ATEN = ("default", "avx2")
THREADS = (1, 2)
#: What computes, and compares with something computed otherwise.
NUMERICAL = (
    "tests/solver",
    "tests/building/test_accuracy.py",
    "tests/building/test_tied.py",
    "tests/adapter/test_algebra.py",
    "tests/initialisation/test_allocation.py",
    "tests/composition/test_comparing.py",
    "tests/composition/test_merging.py",
    "tests/fusion/test_extract.py",
    "tests/peft/test_methods.py",
)


@dataclass(frozen=True)
class Processor:
    """One way of rounding."""

    mkl: str
    aten: str
    threads: int

    @property
    def environment(self) -> dict[str, str]:
        count = str(self.threads)
        return {
            "MKL_CBWR": self.mkl,
            "ATEN_CPU_CAPABILITY": self.aten,
            "OMP_NUM_THREADS": count,
            "MKL_NUM_THREADS": count,
            "SVDBANK_TEST_THREADS": count,
            "OMP_WAIT_POLICY": "PASSIVE",  # two threads that spin for each other take minutes where the machine is shared
            "CUDA_VISIBLE_DEVICES": "",
        }

    @property
    def name(self) -> str:
        return f"MKL_CBWR={self.mkl:<10} ATEN_CPU_CAPABILITY={self.aten:<7} threads={self.threads}"


@dataclass(frozen=True)
class Outcome:
    """What pytest counted; ``code`` is its exit code, so that a run that counts nothing cannot pass."""

    passed: int
    failed: int
    skipped: int
    code: int
    seconds: float
    failures: tuple[str, ...]


def processors(everything: bool) -> Iterator[Processor]:
    """All twelve, or the six in which every two settings meet once."""
    for place, (mkl, aten, threads) in enumerate(product(MKL, ATEN, THREADS)):
        # Odd and even in turn: of the four of each MKL the two in which ATEN and threads differ from one another's.
        if everything or place % 4 in ((0, 3) if MKL.index(mkl) % 2 else (1, 2)):
            yield Processor(mkl, aten, threads)


def run(processor: Processor, paths: Sequence[str]) -> Outcome:
    """pytest in a process of its own: both libraries read their variables once, when they are loaded."""
    begun = time.monotonic()
    workers = max(1, min(os.cpu_count() or 1, 4) // processor.threads)
    with tempfile.TemporaryDirectory(prefix="svdbank-processors-") as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "not soak", "-q", f"--junit-xml={report}", *paths]
        if workers > 1:
            command += ["-n", str(workers), "--dist", "loadfile"]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, **processor.environment}).returncode
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    failures = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return Outcome(
        len(cases) - len(failures) - len(skipped),
        len(failures),
        len(skipped),
        code,
        time.monotonic() - begun,
        tuple(f"{case.get('classname')}::{case.get('name')}" for case in failures),
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.processors", description="The numerical tests as other processors round."
    )
    parser.add_argument("--all", action="store_true", help="all twelve combinations instead of six in which all pairs meet")
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="environments whose name holds TEXT, such as AVX2 or threads=2"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the environments and run nothing")
    parser.add_argument("paths", nargs="*", default=NUMERICAL, help="what to run (default: the numerical tests)")
    options = parser.parse_args(arguments)
    chosen = [processor for processor in processors(options.all) if options.only in processor.name]
    if not chosen:
        parser.error(f"no environment's name holds {options.only!r}")
    if options.dry_run:
        for processor in chosen:
            print(processor.name)
        return 0
    outcomes = []
    for processor in chosen:
        print(f"== {processor.name}", flush=True)
        outcomes.append(run(processor, options.paths))
    print("\nenvironment".ljust(68) + "passed  failed  skipped  seconds")
    for processor, outcome in zip(chosen, outcomes, strict=True):
        counts = f"{outcome.passed:6}  {outcome.failed:6}  {outcome.skipped:7}  {outcome.seconds:7.0f}"
        print(processor.name.ljust(67) + counts + ("" if outcome.code == 0 else f"  pytest exited with {outcome.code}"))
        for failure in outcome.failures:
            print(f"    {failure}")
    return 0 if all(outcome.code == 0 and outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
