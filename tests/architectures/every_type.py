"""Every causal and image-text model type of the installed Transformers, made small by rule, through everything that we do with a model.

``python -m tests.architectures.every_type [TYPE…] [--json FILE] [--jobs N]``
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import queue
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.architectures.stages import STAGES, Result, Type, run

#: Seconds of a processor that a type may take.
TIMEOUT = 60.0
#: What a worker may take to import everything, on a machine that does other things too.
_START = 600.0


def every(
    types: Sequence[str], *, jobs: int = 1, timeout: float = TIMEOUT, told: Callable[[Type], None] | None = None
) -> list[Type]:
    """What came of each of the types, in their order. A type that hangs or ends its process fails alone."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in types:
        waiting.put(name)
    found: dict[str, Type] = {}

    def serve() -> None:
        worker = None
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                break
            worker = worker or _Worker()
            found[name] = worker.ask(name, timeout)
            if told is not None:
                told(found[name])
            if not worker.alive:
                worker = None
        if worker is not None:
            worker.end()

    threads = [threading.Thread(target=serve) for _ in range(max(1, min(jobs, len(types))))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[name] for name in types if name in found]


class _Worker:
    """A process that takes one type after another; imports are paid once."""

    def __init__(self) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started now
        os.environ["HF_HUB_OFFLINE"] = "1"
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there,), daemon=True)
        self._process.start()
        there.close()
        self.alive = True
        if not self._here.poll(_START):
            raise TimeoutError(f"a worker did not start in {_START:.0f} s")
        self._here.recv()

    def ask(self, name: str, timeout: float) -> Type:
        self._here.send(name)
        started, used = time.monotonic(), self._used()
        try:
            while not self._here.poll(0.5):
                # A busy machine is slow and hangs nobody: processor time counts, and wall time only far beyond it.
                if self._used() - used > timeout or time.monotonic() - started > 10 * timeout:
                    raise TimeoutError(f"took more than {timeout:.0f} s")
            answer: Type = self._here.recv()
            return answer
        except TimeoutError as error:
            ended = str(error)
        except (EOFError, OSError):
            self._process.join(5)
            ended = f"ended its process (exit code {self._process.exitcode})"
        self.end()
        report = Type(name)
        report.stages = {stage: Result("failed" if stage == STAGES[0] else "skipped", ended) for stage in STAGES}
        return report

    def _used(self) -> float:
        """Processor time of the process so far, in seconds; 0 where the system does not say."""
        try:
            after = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(after[11]) + int(after[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.alive = False
        self._here.close()
        self._process.join(1)
        self._process.kill()
        self._process.join()


def _work(line: Connection) -> None:
    import peft  # noqa: F401 - here, where no type is measured
    import torch
    import transformers

    import svdbank.peft  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()
    with contextlib.suppress(EOFError, OSError):  # whoever asked is gone
        line.send("ready")
        while True:
            name = line.recv()
            work = Path(tempfile.mkdtemp(prefix="every-type-"))
            try:
                line.send(run(name, work))
            finally:
                shutil.rmtree(work, ignore_errors=True)


def sample(types: Sequence[str], count: int = 20, *, always: Iterable[str] = ()) -> list[str]:
    """``count`` types by rule: ``always`` (those with experts, say, as far as they fit), then the last of each n of the sorted others."""
    first = sorted(set(always) & set(types))[:count]
    others = [name for name in sorted(types) if name not in first]
    left = count - len(first)
    return sorted(first + [others[(i + 1) * len(others) // left - 1] for i in range(left)]) if left else first


def with_experts(types: Sequence[str]) -> list[str]:
    """Types whose configuration speaks of experts, without making a model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return [name for name in types if "experts" in " ".join(getattr(CONFIG_MAPPING[name], "__annotations__", {}))]


def table(reports: Sequence[Type]) -> str:
    """Counts by stage, and the reasons of what is not well, each with its types."""
    states = ("ok", "refused", "wrong", "failed", "cannot", "skipped")
    lines = [f"{'':10}" + "".join(f"{state:>9}" for state in states)]
    for stage in STAGES:
        counts = Counter(report.stages[stage].state for report in reports)
        lines.append(f"{stage:10}" + "".join(f"{counts[state] or '·':>9}" for state in states))
    attached = [report for report in reports if report.stages["peft"].state == "ok"]
    passed = sum(report.passed for report in attached)
    share = 100 * passed / len(attached) if attached else 0.0
    lines += [
        "",
        f"{len(reports)} types; PEFT attaches a plain LoRA to {len(attached)}; {passed} of those pass everything ({share:.1f} %)",
    ]
    for stage in STAGES:
        reasons: dict[str, list[str]] = defaultdict(list)
        for report in reports:
            result = report.stages[stage]
            if result.state not in ("ok", "skipped"):
                reasons[f"{result.state}: {_reason(result.message)}"].append(report.name)
        if reasons:
            lines += ["", f"{stage}:"]
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(names):3}  {reason}\n       {' '.join(names)}")
    return "\n".join(lines)


def _reason(message: str) -> str:
    """A message without the names and numbers of one type, so that equal reasons meet."""
    text = re.sub(r"\b[\w]+(\.[\w*]+)+(\[\d+\])?", "NAME", message)
    text = re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", text)
    return re.sub(r"NAME(:? ?N? ?(apart)?[,;]? (and N more)?(NAME)?)*", "NAME ", text)[:160].strip()


def as_json(reports: Sequence[Type]) -> dict[str, Any]:
    """Everything, for a file."""
    import peft
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}
    return {"versions": versions, "types": {report.name: {**asdict(report), "passed": report.passed} for report in reports}}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    asked = parser.parse_args(arguments)
    from tests.architectures.small import model_types

    started = time.perf_counter()

    done: list[Type] = []

    def told(report: Type) -> None:
        done.append(report)
        if asked.json is not None and len(done) % 10 == 0:  # what there is, should the rest be stopped
            asked.json.write_text(json.dumps(as_json(done), indent=1) + "\n")
        said = " ".join(f"{stage}:{report.stages[stage].state}" for stage in STAGES if report.stages[stage].state != "ok")
        print(f"{report.name:28} {report.seconds:5.1f} s  {said or 'ok'}", flush=True)
        if asked.types:
            for stage in STAGES:
                if report.stages[stage].message:
                    print(f"    {stage:8} {report.stages[stage].seconds:5.2f} s  {report.stages[stage].message}")

    reports = every(asked.types or model_types(), jobs=asked.jobs, told=told)
    print(f"\n{table(reports)}\n\n{time.perf_counter() - started:.0f} s")
    if asked.json is not None:
        asked.json.write_text(json.dumps(as_json(reports), indent=1) + "\n")
    return int(not all(report.passed for report in reports if report.stages["peft"].state == "ok"))


if __name__ == "__main__":
    sys.exit(main())
