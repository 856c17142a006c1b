"""The few pieces of HTML that every section of the report is made of."""

from __future__ import annotations

import html
from collections.abc import Sequence


def escape(text: object) -> str:
    """Text for any place in HTML, attributes included; half a surrogate pair becomes "?"."""
    return html.escape(str(text).encode("utf-8", "replace").decode())


def element(tag: str, body: str, kind: str = "") -> str:
    """<tag class="kind">body</tag>; `body` is HTML already."""
    return f'<{tag} class="{kind}">{body}</{tag}>' if kind else f"<{tag}>{body}</{tag}>"


def note(text: str) -> str:
    """A grey line of explanation; `text` is HTML already."""
    return element("p", text, "note")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls sideways on a narrow screen; all cells are HTML already."""
    head = "".join(element("th", column) for column in columns)
    body = "".join(element("tr", "".join(element("td", cell) for cell in row)) for row in rows)
    inside = element("thead", element("tr", head)) + element("tbody", body)
    return element("div", element("table", inside, kind), "scroll")


_BADGES = {
    "done": "✓ done",
    "running": "▶ running",
    "failed": "✗ failed",
    "pending": "· pending",
    "correct": "✓ correct",
    "wrong": "✗ wrong",
    "unknown": "? unknown",
}


def badge(state: str) -> str:
    """The state of a run or stage, or a verdict, as a coloured label with a sign and a word."""
    return element("span", escape(_BADGES.get(state, state)), f"badge {escape(state)}")
