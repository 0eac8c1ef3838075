"""Puts runs' data into one HTML file that loads nothing and runs no script but ours.

Whatever comes from a run (settings, prompts, tokens) is escaped in the HTML, cannot close the JSON block that it is
embedded in, and reaches the document only as text. A content security policy allows the page's own script, by its
hash, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_r1_capo.runs.exit import UserError

HERE = Path(__file__).resolve().parent
SCRIPTS = ("format.js", "curves.js", "panel.js", "scatter.js", "microscope.js", "page.js")
STYLES = ("style.css", "curves.css", "tokens.css")
LIMIT = 5_000_000  # bytes of a page
METRICS_LIMIT = 2_000_000  # bytes of the metrics within it


@contextmanager
def file_errors() -> Iterator[None]:
    """Turn a file that cannot be read or written into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename2 or error.filename} cannot be read or written ({error.strerror})") from None


def render(title: str, sections: dict[str, str], data: dict[str, Any]) -> str:
    """Put a page together from a plain-text title, escaped HTML parts by name, and the data that the script draws."""
    script, style = (
        "\n".join((HERE / name).read_text(encoding="utf-8") for name in names) for names in (SCRIPTS, STYLES)
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": html.escape(title),
        "policy": html.escape(f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"),
        "style": style,
        "data": embed(data),
        "script": script,
        **sections,
    }
    template = (HERE / "page.html").read_text(encoding="utf-8")
    # one pass: a value that looks like a placeholder stays what it is
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts.get(match.group(1), ""), template)


def embed(data: Any) -> str:
    """JSON for a script element: no `<`, `>` or `&`, so that no text can end the element; ASCII only."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def fit_metrics(
    table: dict[str, list], drawn: set[str], steps: set[int], limit: int = METRICS_LIMIT
) -> tuple[dict[str, list], str]:
    """Make the metrics of a long run fit into `limit` bytes; returns them and a sentence on what is missing, or "".

    Columns that are not `drawn` go first, then steps other than `steps`.
    """
    if len(embed(table)) <= limit:
        return table, ""
    table = {key: column for key, column in table.items() if key in drawn}
    size, count = len(embed(table)), len(table["step"])
    if size <= limit:
        return table, "Only the metrics of the panels are on this page: the run is long."
    every = -(-size // limit)
    kept = [i for i in range(count) if i % every == 0 or i == count - 1 or table["step"][i] in steps]
    thinned = {key: [column[i] for i in kept] for key, column in table.items()}
    return thinned, f"The run is long: one of {every} steps is drawn ({len(kept):,} of {count:,})."


def table_html(rows: list[list[str]], head: list[str]) -> str:
    """A table of HTML cells under a plain-text head; the first cell of a row is its header."""
    header = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    lines = (
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    body = f"<thead><tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def notes_html(notes: list[str]) -> str:
    """Sentences about what is missing or odd, one paragraph each."""
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes if note)


def text(value: Any) -> str:
    """A value for a table cell, escaped."""
    if isinstance(value, float):
        value = f"{value:.4g}"
    return html.escape("–" if value is None else str(value))
