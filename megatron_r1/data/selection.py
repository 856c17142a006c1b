"""Which sampled answers are worth learning from: correct, readable, not twice the same, not too many of one prompt.

DeepSeek-R1 (arXiv 2501.12948 v2), appendices B.3.2 and B.3.3: only correct answers, without mixed languages, long
paragraphs, code blocks and repetition. The paper names the rules and gives no numbers; `FilterConfig` holds ours. In
the flow of a `sample` stage, between scoring and the conversations; pure functions.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_r1.config.sampling import FilterConfig
from megatron_r1.data.decontaminate import split_words
from megatron_r1.data.generators import keyed_random
from megatron_r1.data.heldout import question_hash
from megatron_r1.types import VerdictStatus

Reason = Literal[
    "wrong",
    "unknown verdict",
    "truncated",
    "format",
    "language",
    "paragraph",
    "code block",
    "repetition",
    "no thought",
    "duplicate",
    "over the cap",
    "rewrite",
]
"""Why a sample is dropped, in the order in which it is looked at: a sample counts under the first."""

_TAG = re.compile(r"</?(?:think|answer)>")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_FENCE = re.compile(r"```|^\s*~~~", re.MULTILINE)


@dataclass(kw_only=True, slots=True)
class Candidate:
    """A scored sample in parts. Example: Candidate(sample=0, thought="5-6=-1; -1+9=8", summary="8", tokens=31, ...)."""

    sample: int  # which of its prompt's samples
    thought: str  # without tags, stripped
    summary: str  # what follows the thought, without tags, stripped
    tokens: int
    status: VerdictStatus
    finished: bool  # ended by itself
    in_format: bool  # `<think>..</think><answer>..</answer>` and nothing else
    language_share: float  # of the thought's words, those in the question's language


def fault(candidate: Candidate, config: FilterConfig) -> Reason | None:
    """The first reason not to keep a sample, of those that can be seen in it alone; None: it may be kept.

    - truncated: it did not end by itself, whatever `config.format` says.
    - format: not of the format, where that is asked for; and always a blank summary or a tag inside of a part, which a
      conversation could not be written with.
    - paragraph: characters between two blank lines.
    - code block: a fence of three backticks anywhere, or of three tildes at the start of a line.
    """
    checks: list[tuple[Reason, bool]] = [
        ("wrong", candidate.status == "wrong"),
        ("unknown verdict", candidate.status == "unknown"),
        ("truncated", not candidate.finished),
        ("format", (config.format and not candidate.in_format) or not _writable(candidate)),
        ("language", config.language > 0 and candidate.language_share < config.language),
    ]
    for reason, holds in checks:
        if holds:
            return reason
    return _unreadable(candidate.thought, config)


def _writable(candidate: Candidate) -> bool:
    return bool(candidate.summary) and not _TAG.search(candidate.thought) and not _TAG.search(candidate.summary)


def _unreadable(thought: str, config: FilterConfig) -> Reason | None:
    if config.paragraph is not None and longest_paragraph(thought) > config.paragraph:
        return "paragraph"
    if not config.code_blocks and _FENCE.search(thought):
        return "code block"
    if config.repeats is not None and repeats(split_words(thought), config.repeat_words) > config.repeats:
        return "repetition"
    return "no thought" if len(thought) < config.thought else None


def longest_paragraph(text: str) -> int:
    """Characters of the longest piece between blank lines, without the white space around it."""
    return max(len(part.strip()) for part in _PARAGRAPHS.split(text))


def repeats(words: Sequence[str], least: int) -> int:
    """Most times that a passage of `least` words or more stands in a row; 1 where none is repeated.

    A passage may itself be a repeated shorter one: "wait" 40 times is a passage of 8 words 5 times. Time is quadratic
    in the words, in vectorised steps: 20,000 words take about a second.
    """
    numbers: dict[str, int] = {}
    words_T = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int32)
    most = 1
    period = least
    while period * (most + 1) <= len(words_T):  # a longer passage could not stand more often
        same_T = np.concatenate(([False], words_T[period:] == words_T[:-period], [False]))
        edges = np.flatnonzero(same_T[1:] != same_T[:-1])
        longest = int((edges[1::2] - edges[::2]).max()) if len(edges) else 0
        most = max(most, longest // period + 1)
        period += 1
    return most


def text_key(question: str, thought: str, summary: str) -> str:
    """32 hex digits, equal for the same answer to the same question: without regard to case, white space and Unicode
    form.
    """
    text = unicodedata.normalize("NFKC", f"{thought}\n\0\n{summary}").casefold()
    normal = f"{question_hash(question)} {' '.join(text.split())}"
    return hashlib.blake2b(normal.encode("utf-8", errors="surrogatepass"), digest_size=16).hexdigest()


def first_of_text(
    candidates: Iterable[Candidate], question: str, known: Container[str]
) -> tuple[dict[str, Candidate], list[Candidate]]:
    """({key of its text: candidate} for the first of each text that is not `known`, the others)."""
    first: dict[str, Candidate] = {}
    others = []
    for candidate in candidates:
        key = text_key(question, candidate.thought, candidate.summary)
        if key in known or key in first:
            others.append(candidate)
        else:
            first[key] = candidate
    return first, others


def choose(
    candidates: Sequence[Candidate], keep: int, prefer: Literal["random", "short", "long"], seed: int, prompt_id: str
) -> tuple[list[Candidate], list[Candidate]]:
    """(`keep` of a prompt's candidates at most, the others), each in the order sampled.

    prefer: short, long: by tokens, of equal ones the first sampled; random: drawn by (seed, prompt_id).
    """
    order = list(candidates)
    if prefer == "random":
        keyed_random("choose", seed, prompt_id).shuffle(order)
    else:
        order.sort(key=lambda candidate: candidate.tokens * (1 if prefer == "short" else -1))
    kept = {candidate.sample for candidate in order[:keep]}
    return [c for c in candidates if c.sample in kept], [c for c in candidates if c.sample not in kept]
