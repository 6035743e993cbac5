"""A Chromium for the tests of reports: found where one is, installed by Debian's package manager where there is that and the right to.

python -m tests.reporting.chromium            prints where it is; exit code 1 and what to do where there is none
python -m tests.reporting.chromium --install  installs it first where there is none
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
_PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
_CACHES = (
    "~/.cache/ms-playwright/chromium-*/chrome-linux*/chrome",
    "~/Library/Caches/ms-playwright/chromium-*/*/*.app/Contents/MacOS/*",
)
HINT = (
    "The tests of reports need a Chromium, and none was found. Install one: `apt-get install chromium` on Debian, "
    "`python -m playwright install chromium` elsewhere; or name one in SVDBANK_TEST_CHROMIUM."
)


def found() -> str | None:
    """The executable, or None."""
    if named := os.environ.get("SVDBANK_TEST_CHROMIUM"):
        return named if Path(named).exists() else None
    for name in _NAMES:
        if path := shutil.which(name):
            return path
    for place in _PLACES:
        if Path(place).exists():
            return place
    for pattern in _CACHES:
        home, _, rest = str(Path(pattern).expanduser()).partition("ms-playwright/")
        for path in sorted(Path(home, "ms-playwright").glob(rest), reverse=True):
            return str(path)
    return None


def install() -> None:
    """Three attempts: mirrors fail now and then."""
    if shutil.which("apt-get") is None:
        return
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if sudo and (shutil.which("sudo") is None or subprocess.run([*sudo, "true"], capture_output=True).returncode):
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    options = ["-qq", "-o", "Acquire::Retries=3", "-o", "DPkg::Lock::Timeout=300"]
    keep = ["env", "DEBIAN_FRONTEND=noninteractive"] if sudo else []
    for attempt in range(3):
        update = [*sudo, *keep, "apt-get", *options, "update"]
        add = [*sudo, *keep, "apt-get", *options, "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]
        subprocess.run(update, env=environment, stdout=subprocess.DEVNULL)
        if subprocess.run(add, env=environment, stdout=subprocess.DEVNULL).returncode == 0:
            return
        time.sleep(5 * (attempt + 1))


def main() -> int:
    if found() is None and "--install" in sys.argv[1:]:
        print("installing a Chromium for the tests of reports", flush=True)
        install()
    path = found()
    print(path or HINT, file=sys.stdout if path else sys.stderr)
    return 0 if path else 1


if __name__ == "__main__":
    sys.exit(main())
