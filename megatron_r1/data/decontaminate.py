"""Which texts share a run of words with an evaluation's questions.

Used by the `mix` stage on every row. DeepSeek-R1 leaves out training data that has a 10-gram in common with an
evaluation (arXiv 2501.12948, v2 appendix D.1). Memory is linear in the evaluation sets; a text is read once.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

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


class Contamination:
    """Finds the evaluation sets of which a text has n words in a row, or a whole question that is shorter.

    Args:
        questions: evaluation set -> its questions; one without any word is left out.
        n: words in a row.
    """

    def __init__(self, questions: Mapping[str, Iterable[str]], n: int) -> None:
        self.sets = list(questions)
        # "word word ..." (words hold no space) -> bit i: set i asks that
        self._grams: dict[str, int] = {}
        lengths: dict[str, set[int]] = {}  # first word -> lengths of the runs that begin with it
        self._known: set[str] = set()
        for number, name in enumerate(self.sets):
            for question in questions[name]:
                words = split_words(question)
                length = min(n, len(words))
                self._known.update(words)
                for start in range(len(words) - length + 1 if words else 0):
                    gram = " ".join(words[start : start + length])
                    self._grams[gram] = self._grams.get(gram, 0) | 1 << number
                    lengths.setdefault(words[start], set()).add(length)
        self._lengths = {word: sorted(found) for word, found in lengths.items()}

    def __bool__(self) -> bool:
        return bool(self._grams)

    def find(self, texts: Iterable[str]) -> tuple[list[str], str]:
        """The evaluation sets that the texts share words with, in their order, and the first shared run; [] and ""."""
        found, shown = 0, ""
        for text in texts:
            words = split_words(text)
            end = 0  # words[start:end] are all words of some evaluation
            for start, word in enumerate(words):
                for length in self._lengths.get(word, ()):
                    while end < start + length and end < len(words) and words[end] in self._known:
                        end += 1
                    if end < start + length:
                        break
                    gram = " ".join(words[start : start + length])
                    if (sets := self._grams.get(gram, 0)) != 0:
                        found, shown = found | sets, shown or gram
                end = max(end, start + 1)
        return [name for number, name in enumerate(self.sets) if found >> number & 1], shown
