"""One page for each command of the command line, from what ``--help`` shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from sphinx.application import Sphinx

GENERATED = Path("reference", "commands")


def commands(group: Any, name: str = "mirrorflow") -> Iterator[tuple[str, Any]]:
    """Yield every command with its full name."""
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} {key}")
        else:
            yield f"{name} {key}", command


def page(name: str, command: Any) -> str:
    """Return the page of a command: what it does, its usage, arguments and options."""
    context = command.make_context(name, [], resilient_parsing=True)
    usage = command.get_usage(context).removeprefix("Usage: ")
    lines = [f"# {name}", "", command.help or "", "", "```text", usage, "```", ""]
    rows = [record for p in command.params if (record := p.get_help_record(context))]
    if rows:
        lines += ["| | |", "|---|---|"]
        lines += [f"| `{first}` | {_cell(second)} |" for first, second in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Return text that does not end a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[")


def write_pages(app: Sphinx) -> None:
    """Write what has changed, so that other pages are not built again."""
    from mirrorflow.cli.app import app as program

    folder = Path(app.srcdir) / GENERATED
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in commands(typer.main.get_command(program)):
        path, text = folder / f"{name.replace(' ', '-')}.md", page(name, command)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for them."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
