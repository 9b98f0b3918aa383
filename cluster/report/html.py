"""Build pages that open offline as one file, with styles, script and Plotly inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from cluster.report.numbers import duration, show

_TEMPLATES: Final = Path(__file__).parent / "templates"


def environment(folder: Path = _TEMPLATES) -> Environment:
    """Templates of a folder with our filters; an undefined name in them is an error."""
    found = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(show=show, duration=duration)
    return found


def assets() -> dict[str, Markup]:
    """The parts of a page that are code, not text, and so stand in it unescaped."""
    own = {name: (_TEMPLATES / f"report.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return {name: Markup(text) for name, text in (own | {"plotly": get_plotlyjs()}).items()}


def script_json(value: Any) -> Markup:
    """JSON for a script element, which a `</script>` in the data must not end."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))
