"""``make bench``: every benchmark, one after another, each in its own process."""

from __future__ import annotations

import subprocess
import sys

NAMES = ("startup", "attach", "streaming", "solver", "training", "composition", "fusion", "proving")


def main() -> int:
    failed = []
    for name in NAMES:
        print(f"\n== {name}: python -m benchmarks.{name}\n", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
