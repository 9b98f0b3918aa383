"""Parts of pages that open offline as a single file, with styles, scripts and Plotly inside."""

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
    """Load the templates of a folder with the report's filters; an undefined name in them is an error."""
    templates = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(show=show, duration=duration)
    return templates


def assets() -> dict[str, Markup]:
    """Load the styles and scripts of a page, which are inserted unescaped."""
    own = {name: (_TEMPLATES / f"report.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return {name: Markup(text) for name, text in (own | {"plotly": get_plotlyjs()}).items()}


def script_json(value: Any) -> Markup:
    """Write a value as JSON for a script element, which a `</script>` in the data must not end."""
    return Markup(json.dumps(value, separators=(",", ":")).replace("<", "\\u003c"))
