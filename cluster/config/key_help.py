"""The keys of the configuration in a command's help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.config.keys import ENTRY, Key, Section, common, sections
from cluster.config.sources import preset_names

WIDTH: Final = 110
"""Columns of the help at most, since longer lines are hard to read."""


def print_keys(*, whole: bool, prog: str, console: Console | None = None) -> None:
    """Print the presets and every key of the configuration, or only the most common keys."""
    console = console or Console()
    width = min(console.width, WIDTH)
    console.print(f"\npresets: {', '.join(preset_names())}\n", highlight=False, soft_wrap=True)
    found = sections()
    if not whole:
        count = sum(len(section.keys) for section in found)
        console.print(f"the most common keys ({prog} --help-all lists all {count}):", highlight=False)
        console.print(_table(common()), width=width)
        return
    for section in found:
        console.print(_heading(section), width=width)
        console.print(_table(section.keys), width=width)
        console.print()


def _heading(section: Section) -> Text:
    """Format the name and purpose of a section and, for a list, its syntax."""
    name = ", ".join(section.names) or "the run"
    text = Text.assemble((name, "bold"), ": ", section.description)
    if name.endswith(ENTRY):
        list_name = section.names[0].partition(".")[0]
        text.append(f' In TOML [[{list_name}]]; on the command line --{list_name} \'[{{"name": "jpeg"}}]\'.')
    return text


def _table(keys: Sequence[Key]) -> Padding:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for key in keys:
        flag = key.name if f".{ENTRY}." in key.name else f"--{key.name}"
        table.add_row(Text(flag), Text.assemble(key.description, (f" ({_facts(key)})", "dim")))
    return Padding(table, (0, 0, 0, 2))


def _facts(key: Key) -> str:
    """Describe a key's values, and its default unless the description names one that depends on others."""
    if key.default == "required":
        return f"{key.values}; required"
    return key.values if "default:" in key.description else f"{key.values}; default: {key.default}"
