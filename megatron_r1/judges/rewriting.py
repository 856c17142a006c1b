"""Cold-start data made readable: thought and summary in a person's words and the question's language.

DeepSeek-R1 (arXiv 2501.12948 v2), appendix B.3.2: a language model rewrites the thoughts of R1-Zero and writes the
final solution from them. In the flow of a `sample` stage, after the choice of what is kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_r1.judges.endpoint import well_formed
from megatron_r1.judges.hook import Hook

_REPLY = re.compile(r"<thought>(.*)</thought>\s*<summary>(.*)</summary>", re.DOTALL)


class Draft(NamedTuple):
    """What is to be rewritten; `language`: code of the question's."""

    question: str
    thought: str
    summary: str
    language: str


class Rewritten(NamedTuple):
    """What came of it; both are stripped, the summary is not empty."""

    thought: str
    summary: str


def rewrite(hook: Hook, drafts: Sequence[Draft]) -> list[Rewritten | None]:
    """Each draft rewritten; None: to be dropped, as a function says, because a reply could not be read or has a blank
    part. A thought that was blank before may stay so.

    Raises JudgeDown (see `judges/endpoint.py`), or UserError where a function fails.
    """
    written = hook.ask([draft._asdict() for draft in drafts], read_rewritten, _accept)
    return [
        None if text is None or (not text.thought and draft.thought.strip()) else text
        for draft, text in zip(drafts, written, strict=True)
    ]


def read_rewritten(reply: str) -> Rewritten | None:
    """Thought and summary of a reply in their tags; text around them is ignored. None without both, or a summary."""
    match = _REPLY.search(reply)
    if match is None:
        return None
    thought, summary = match[1].strip(), match[2].strip()
    return Rewritten(thought, summary) if summary else None


def _accept(result: Any) -> Rewritten | None:
    if result is None:
        return None
    if not isinstance(result, tuple | list) or len(result) != 2 or not all(isinstance(part, str) for part in result):
        raise ValueError(f"it returned {result!r}; a rewriting is (thought, summary), or None to drop the item")
    thought, summary = (well_formed(part).strip() for part in result)
    return Rewritten(thought, summary) if summary else None
