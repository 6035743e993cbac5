"""Peak memory of ``fuse`` is bounded by the largest tensor, however large the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fusion.shapes import LARGEST, write_8b, write_8b_adapter

# ru_maxrss would count what the parent held at the fork; VmHWM is this program's own.
PROGRAM = """
import json, re, sys
import svdbank
report = svdbank.fuse(sys.argv[1], sys.argv[2], sys.argv[3], dtype=sys.argv[4] or None)
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
print(json.dumps({"peak": peak, "changed": report.changed, "elements": report.elements, "nbytes": report.nbytes}))
"""


def _fuse(folder: Path, layers: int, dtype: str = "") -> dict[str, int]:
    base = write_8b(folder / "base", layers=layers)
    lora = write_8b_adapter(folder / "adapter", layers=layers)
    command = [sys.executable, "-c", PROGRAM, str(base), str(lora), str(folder / "fused"), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured: dict[str, int] = json.loads(done.stdout)
    print(json.dumps(measured | {"layers": layers, "bound": 8 * LARGEST + 500_000_000}))
    return measured


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["", "float32"])
def test_peak_memory_on_an_8b_shaped_checkpoint_is_bounded_by_its_largest_tensor(dtype: str, tmp_path: Path) -> None:
    """At most twice the largest tensor in float32 and 500 MB; four layers, since what each adds is only its factors."""
    measured = _fuse(tmp_path, 4, dtype)
    assert measured["changed"] == measured["elements"]
    assert measured["peak"] <= 2 * 4 * LARGEST + 500_000_000


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_peak_memory_on_all_of_an_8b_shaped_checkpoint(tmp_path: Path) -> None:
    measured = _fuse(tmp_path, 32)
    assert measured["nbytes"] > 16e9
    assert measured["peak"] <= 2 * 4 * LARGEST + 500_000_000
