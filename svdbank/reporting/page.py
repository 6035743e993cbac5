"""The report as one HTML file: nothing is loaded, no script runs, and what comes from outside is text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from svdbank.core import disk
from svdbank.core.errors import OptionError, missing_extra
from svdbank.core.version import __version__
from svdbank.reporting.document import Chapter, visible

#: How a report of ours begins to differ from any other page; what is written over without being asked.
MARK = '<meta name="generator" content="svdbank report '


def render(title: str, chapters: Sequence[Chapter], notes: Sequence[str] = ()) -> str:
    """The page. Every text is escaped by the template; figures are SVG that was parsed and written anew by ``drawing``."""
    template = load_template()
    entries = [{"id": f"part-{number}", "value": chapter} for number, chapter in enumerate(chapters, 1)]
    page: str = template.render(
        title=visible(title),
        entries=entries,
        notes=[visible(note) for note in notes],
        style=_markup()(_file("report.css")),
        version=__version__,
    )
    return page


def checked_place(output: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Where the file goes; OptionError where it cannot, or where something else than a report stands."""
    path = disk.expanded(output)
    if not os.fspath(output).strip() or path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(f"{os.fspath(output)!r}: a report's file ends in .html", hint="-o report.html")
    if not path.absolute().parent.is_dir():
        raise OptionError(f"{path}: its folder does not exist", hint="make it, or choose another place with -o")
    if path.is_dir():
        raise OptionError(f"{path} is a folder", hint="choose another place with -o")
    if path.exists() and not force:
        with path.open("rb") as file:
            if MARK.encode() not in file.read(4096):
                raise OptionError(
                    f"{path} is there and is no report of svdbank", hint="--force replaces it, or choose another -o"
                )
    return path.absolute()


def load_template() -> Any:
    """The template, or the error that names the command which installs Jinja."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as cause:
        raise missing_extra("jinja2", "report") from cause
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False, finalize=_shown)
    return environment.from_string(_file("report.html.jinja"))


def _shown(value: Any) -> Any:
    """Control characters are no HTML, and marks of direction would turn what follows; what is safe already stays as it is."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _markup() -> Any:
    from markupsafe import Markup

    return Markup


def _file(name: str) -> str:
    return files("svdbank.reporting").joinpath(name).read_text(encoding="utf-8")
