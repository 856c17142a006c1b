"""Proof that no held-out question is ever trained on.

A procedural source has some 10^7 problems, too many to list, so the held-out side is the small
one: the hashes of its questions. `data/cursor.py` and `data/corpus.py` skip, and count, whatever
hashes into that set while training; `check_disjoint` proves the same of a finite list.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Iterable

from megatron_r1.config.errors import UserError
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


def check_disjoint(train: Iterable[Prompt | str], heldout: Collection[str]) -> None:
    """Check that no training question is held out; `train` is read once, so it may be a stream.

    Raises:
        UserError: with the number of shared questions and the first of them.
    """
    shared = 0
    first = ""
    for prompt in train:
        if question_hash(_question(prompt)) in heldout:
            shared += 1
            first = first or _describe(prompt)
    if shared:
        raise UserError(
            f"{shared} training questions are held out for evaluation, the first is {first}; give "
            "the evaluation other problems (another seed or file) or exclude them from training"
        )


def _question(prompt: Prompt | str) -> str:
    return prompt if isinstance(prompt, str) else prompt.question


def _describe(prompt: Prompt | str) -> str:
    return repr(prompt) if isinstance(prompt, str) else f"{prompt.id}: {prompt.question!r}"
