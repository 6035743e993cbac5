"""``svdbank env``: what svdbank runs on."""

from __future__ import annotations

from typing import Any

import click

from svdbank_cli.options import with_output
from svdbank_cli.output import Output, size


@click.command("env", short_help="Show versions, processors, devices and folders, for a bug report.")
@with_output
def env_command(output: Output) -> None:
    """Show versions, processors, devices and folders: paste this into a bug report.

    \b
    Examples:
      svdbank env
      svdbank env --json
    """
    import svdbank

    output.data(svdbank.env(), _text)


def _text(env: Any) -> str:
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
    ]
    return "\n".join(lines)
