"""Which texts share a run of words with an evaluation's questions and reference answers.

Used by the `mix` stage on every row. DeepSeek-R1 leaves out training data that has a 10-gram in common with an
evaluation's questions or solutions (arXiv 2501.12948, v2 appendix D.1). Memory is linear in the evaluation sets.
"""

from __future__ import annotations

import bisect
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

# Scripts without spaces: a character is a word. Thai to Tibetan, Burmese, Khmer, kana, Han.
_LONE = (
    r"\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"\d+(?:\.\d+)?|[^\W\d_{_LONE}]+|\S")


def split_words(text: str) -> list[str]:
    """The words of a text, without regard to case and Unicode form (NFKC). Linear in len(text).

    A number, with its decimals, is one word, as is a run of letters; every other sign is, and so is each character of
    the scripts that are written without spaces. "Is 3.5x > 2?" -> ["is", "3.5", "x", ">", "2", "?"].
    """
    # NFKC once more: casefold can undo it.
    return _WORD.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))


def spoken(words: Iterable[str]) -> list[str]:
    """Those of `split_words` that say something: numbers, runs of letters, characters of scripts without spaces.

    Signs do not, nor does the name of a LaTeX command: "\\frac{1}{2} x" says ["1", "2", "x"], as a formula of ten signs
    is nothing that a text has from an evaluation.
    """
    found, command = [], False
    for word in words:
        if word[0].isalnum() and not (command and word.isalpha()):
            found.append(word)
        command = word == "\\" and not command
    return found


class _Runs:
    """Finds known runs of words in others."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._runs: dict[str, int] = {}  # "word word ..." (words hold no space) -> bit i: set i has it
        self._lengths: dict[str, list[int]] = {}  # first word -> lengths of the runs that begin with it, ascending

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, words: Sequence[str], length: int, bit: int) -> None:
        """All runs of this length."""
        self._known.update(words)
        for start in range(len(words) - length + 1):
            run = " ".join(words[start : start + length])
            self._runs[run] = self._runs.get(run, 0) | bit
            lengths = self._lengths.setdefault(words[start], [])
            if length not in lengths:
                bisect.insort(lengths, length)

    def find(self, words: Sequence[str]) -> tuple[int, str]:
        """The bits of all runs that are found, and the first of them; 0 and ""."""
        found, shown, end = 0, "", 0  # words[start:end] are all known
        for start, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                while end < start + length and end < len(words) and words[end] in self._known:
                    end += 1
                if end < start + length:
                    break
                run = " ".join(words[start : start + length])
                if (bits := self._runs.get(run, 0)) != 0:
                    found, shown = found | bits, shown or run
            end = max(end, start + 1)
        return found, shown


class Contamination:
    """Finds the evaluation sets of which a text has n words in a row, signs between them left out, or a whole question
    of fewer words, its signs included.

    Args:
        questions: evaluation set -> its questions; one that says nothing is left out.
        n: words in a row (`spoken`).
        answers: evaluation set -> its reference answers and solutions; those of fewer than n words are left out, as a
            number or a formula is the answer to many questions.
    """

    def __init__(
        self, questions: Mapping[str, Iterable[str]], n: int, answers: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        self.sets = list(questions)
        self._runs, self._whole = _Runs(), _Runs()
        for number, name in enumerate(self.sets):
            bit = 1 << number
            for question in questions[name]:
                words = split_words(question)
                said = spoken(words)
                if len(said) >= n:
                    self._runs.add(said, n, bit)
                elif said:
                    self._whole.add(words, len(words), bit)
            for answer in (answers or {}).get(name, ()):
                self._runs.add(spoken(split_words(answer)), n, bit)

    def __bool__(self) -> bool:
        return bool(self._runs) or bool(self._whole)

    def find(self, texts: Iterable[str]) -> tuple[list[str], str]:
        """The evaluation sets that the texts share words with, in their order, and the first shared run; [] and ""."""
        found, shown = 0, ""
        for text in texts:
            words = split_words(text)
            for bits, run in (self._runs.find(spoken(words)), self._whole.find(words)):
                found, shown = found | bits, shown or run
        return [name for number, name in enumerate(self.sets) if found >> number & 1], shown
