"""The report as one HTML file: nothing is loaded, no script runs, and what comes from outside is text."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from svdbank.core.errors import missing_extra
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
