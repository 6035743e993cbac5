"""``svdbank env``: what svdbank runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank_cli.options import with_output
from svdbank_cli.output import Output, size

if TYPE_CHECKING:
    from svdbank.verbs.env import DeviceReport, Environment


@click.command("env", short_help="Show versions, processors, devices and folders, for a bug report.")
@click.option("--check", is_flag=True, help="Solve and certify a small weight on each device; exit 1 if one fails.")
@with_output
def env_command(check: bool, output: Output) -> None:
    """Show versions, processors, devices and folders: paste this into a bug report.

    \b
    Examples:
      svdbank env
      svdbank env --check
      svdbank env --json
    """
    import svdbank
    from svdbank.core.errors import DeviceError

    found = svdbank.env(check=check)
    output.data(found, _text)
    if failed := [one.device for one in found.checks if one.problem is not None]:
        raise DeviceError(
            f"{', '.join(failed)} cannot be built on", hint="svdbank build MODEL --device cpu, or another device that passed"
        )


def _text(env: Environment) -> str:
    lines = [
        f"svdbank          {env.svdbank}",
        f"python           {env.python} on {env.platform}",
        f"processors       {env.processors} usable, {env.torch_threads} torch threads",
        f"memory           {size(env.memory_bytes) if env.memory_bytes else 'unknown'}",
        f"devices          {', '.join(env.devices)}",
        f"banks            {env.home} ({size(env.home_free_bytes)} free)",
        f"hub cache        {env.hub_cache}{' (offline)' if env.hub_offline else ''}",
        *(f"{name:<16} {version or 'not installed'}" for name, version in env.packages.items()),
        *(f"{name}={value}" for name, value in env.variables.items()),
        *(f"check {one.device:<10} {_outcome(one)}" for one in env.checks),
    ]
    return "\n".join(lines)


def _outcome(check: DeviceReport) -> str:
    """What came of a device's small weight, in one line."""
    if check.problem is not None:
        return f"{check.name} FAILED {check.problem}"
    paths = ", ".join(f"{path} {residual:.0e}" for path, residual in check.residuals.items())
    return f"{check.name}, kind {check.kind}: solves and certifies in {check.seconds:.1f} s (residuals: {paths})"
