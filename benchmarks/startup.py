"""How long ``svdbank --help`` takes, against importing torch: the command line must not pay for what it does not use.

    python -m benchmarks.startup [--repeat N]

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "svdbank --help": [sys.executable, "-m", "svdbank_cli.main", "--help"],
    "svdbank build --help": [sys.executable, "-m", "svdbank_cli.main", "build", "--help"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7)
    repeat = parser.parse_args().repeat
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeat):
        for name, command in COMMANDS.items():
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - begun)
    for name, taken in seconds.items():
        print(f"{name:<28} {median(taken):7.3f} s  (min {min(taken):.3f}, max {max(taken):.3f})")
    print(json.dumps({"benchmark": "startup", "seconds": {name: median(taken) for name, taken in seconds.items()}}))


if __name__ == "__main__":
    main()
