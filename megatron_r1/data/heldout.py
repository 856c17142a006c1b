"""Proof that no held-out question is ever trained on.

A procedural source has some 10^7 problems, too many to list, so the held-out side is the small
one: the hashes of its questions. `data/cursor.py` and `data/corpus.py` skip, and count, whatever
hashes into that set while training; `train/exclusions.py` checks an evaluation against it.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

from megatron_r1.types import Prompt


def question_hash(question: str) -> str:
    """32 hex digits, equal for questions that differ in case, white space or Unicode form only.

    Dropping all white space can only make more questions equal, so it errs on the side of
    excluding.
    """
    normal = unicodedata.normalize("NFKC", question).casefold()
    text = "".join(normal.split())
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=16).hexdigest()


def heldout_ids(prompts: Iterable[Prompt | str]) -> frozenset[str]:
    """Question hashes of the held-out prompts: the `exclude` of cursors and corpora."""
    return frozenset(question_hash(_question(prompt)) for prompt in prompts)


def _question(prompt: Prompt | str) -> str:
    return prompt if isinstance(prompt, str) else prompt.question
