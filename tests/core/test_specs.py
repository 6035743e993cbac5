"""Documents may be read by several threads at a time, the first ones of their kind too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Types that nothing has decoded yet, each by eight threads at once that change places as often as they can. msgspec alone crashes here
#: ("msgspec" as argument: three of three runs).
_RACE = """
import sys, threading
from typing import Any
import msgspec
from svdbank.core.errors import OptionError
from svdbank.core.specs import Struct, from_json
sys.setswitchinterval(1e-6)
document = b'{"last": {"a": {"x": 1}}}'
decode = {"ours": lambda kind: from_json(document, kind, where="here", error=OptionError),
          "msgspec": lambda kind: msgspec.json.decode(document, type=kind, strict=True)}[sys.argv[1]]
for number in range(400):
    inner = [msgspec.defstruct(f"Inner{number}_{i}", [("a", dict[str, int])], bases=(Struct,), frozen=True) for i in range(8)]
    fields = [(f"f{i}", kind | None, None) for i, kind in enumerate(inner)]
    kind = msgspec.defstruct(f"Outer{number}", [*fields, ("last", inner[0] | None, None)], bases=(Struct,), frozen=True)
    barrier = threading.Barrier(8)
    def work():
        barrier.wait()
        decode(kind)
    threads = [threading.Thread(target=work) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
print("done")
"""


def test_the_first_document_of_a_type_may_be_read_by_many_threads() -> None:
    done = subprocess.run([sys.executable, "-c", _RACE, "ours"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
