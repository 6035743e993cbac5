"""``svdbank env``: what svdbank runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank.core.units import size
from svdbank_cli.options import with_output
from svdbank_cli.output import Output

if TYPE_CHECKING:
    from svdbank.verbs.env import DeviceReport, Environment


@click.command("env", short_help="Show versions, processors, devices and folders, for a bug report.")
@click.option("--check", is_flag=True, help="Solve and certify a small weight on each device; exit 1 if one fails.")
@click.option(
    "--rates",
    metavar="FILE",
    type=click.Path(),
    help="Measure what a build's steps take here, in a minute, and write it to FILE, for svdbank plan --device-rate. The disk is FILE's.",
)
@click.option(
    "--device", default="auto", show_default=True, help="With --rates: the device, auto (CUDA if there), cpu, cuda, cuda:1 …"
)
@with_output
def env_command(check: bool, rates: str | None, device: str, output: Output) -> None:
    """Show versions, processors, devices and folders: paste this into a bug report.

    With --rates nothing else should be running: the real solver is timed on random matrices, and small banks are written.

    \b
    Examples:
      svdbank env
      svdbank env --check
      svdbank env --rates here.json
      svdbank env --rates gpu.json --device cuda
      svdbank env --json
    """
    import svdbank
    from svdbank.core.errors import DeviceError

    with output.progress() as progress:
        found = svdbank.env(check=check, rates=rates, device=device, progress=progress)
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
        *((f"rates            {env.rates}",) if env.rates is not None else ()),
    ]
    return "\n".join(lines)


def _outcome(check: DeviceReport) -> str:
    """What came of a device's small weight, in one line."""
    if check.problem is not None:
        return f"{check.name} FAILED {check.problem}"
    paths = ", ".join(f"{path} {residual:.0e}" for path, residual in check.residuals.items())
    return f"{check.name}, kind {check.kind}: solves and certifies in {check.seconds:.1f} s (residuals: {paths})"
