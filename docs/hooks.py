"""Turn the pages of docs/ into those of the site: include the checkout's own files, and write the settings.

A line ``<!-- include: PATH -->`` stands for a file of the checkout: Markdown without its title, anything else
as code. With ``optional`` after the path the file may be missing. ``<!-- settings -->`` stands for the
settings reference. Links to files of the checkout lead to the page that includes them, or become text.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from docs.settings_reference import settings_reference

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"
INCLUDE: Final = re.compile(r"^<!-- include: (?P<path>\S+?)(?P<optional> optional)? -->$", re.MULTILINE)
SETTINGS: Final = "<!-- settings -->"
LOADED: Final = re.compile(
    r"""<(?:script|img|link|iframe|source)\b[^>]*?\b(?:src|href)=["']?(?P<html>(?:https?:)?//[^"'\s>]+)"""
    r"""|url\(["']?(?P<css>(?:https?:)?//[^"')]+)"""
)
LINK: Final = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Expand a page before it becomes HTML; called by mkdocs."""
    return expand(markdown, page.file.src_uri)


def on_post_build(*, config: Any, **_: Any) -> None:
    """Refuse a site that loads scripts, styles, fonts or images from elsewhere; called by mkdocs.

    Raises:
        PluginError: naming the pages and addresses.
    """
    from mkdocs.exceptions import PluginError

    site = Path(config.site_dir)
    files = [path for path in site.rglob("*") if path.suffix in {".html", ".css"}]
    found = {f"{path.relative_to(site)}: {url}" for path in files for url in foreign(path.read_text("utf-8"))}
    if found:
        raise PluginError("the site must open offline, but loads\n" + "\n".join(sorted(found)))


def foreign(text: str) -> list[str]:
    """List the addresses elsewhere that a page or a style sheet loads by itself; links do not count."""
    return [found["html"] or found["css"] for found in LOADED.finditer(text)]


def expand(markdown: str, page: str) -> str:
    """Expand the includes, the settings and the links of a page (its path within docs/)."""
    linked = _linked(markdown, posixpath.join("docs", posixpath.dirname(page)), page)
    included = INCLUDE.sub(lambda found: _included(found, page), linked)
    return included.replace(SETTINGS, settings_reference() if SETTINGS in included else "")


def includes(page: Path) -> Iterator[tuple[str, bool]]:
    """Each file that a page includes, and whether it must exist."""
    for found in INCLUDE.finditer(page.read_text(encoding="utf-8")):
        yield found["path"], not found["optional"]


def homes() -> dict[str, str]:
    """Map each Markdown file of the checkout that a page includes to that page."""
    pages = sorted(DOCS.rglob("*.md"))
    found = {path: page.relative_to(DOCS).as_posix() for page in pages for path, _ in includes(page)}
    return {path: page for path, page in found.items() if path.endswith(".md")}


def _included(found: re.Match[str], page: str) -> str:
    path = ROOT / found["path"]
    if found["optional"] and not path.is_file():
        return f"`{found['path']}` is not part of this checkout."
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        return f'```{path.suffix[1:]} title="{found["path"]}"\n{text.rstrip()}\n```'
    return _linked(_below_title(text), posixpath.dirname(found["path"]), page)


def _below_title(text: str) -> str:
    """Drop the first title; further ones, outside of code, go one level down."""
    lines, code, titles = [], False, 0
    for line in text.splitlines():
        code ^= line.lstrip().startswith("```")
        title = not code and line.startswith("# ")
        titles += title
        if not title or titles > 1:
            lines.append(f"#{line}" if title else line)
    return "\n".join(lines)


def _linked(text: str, folder: str, page: str) -> str:
    """Lead links, relative to a folder of the checkout, to pages of the site."""
    here, known = posixpath.dirname(page) or ".", homes()

    def lead(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found["target"]))
        home = target.removeprefix("docs/") if target.startswith("docs/") else known.get(target)
        if home is None:
            return found["text"]
        return f"[{found['text']}]({posixpath.relpath(home, here)}{found['anchor'] or ''})"

    return LINK.sub(lead, text)
