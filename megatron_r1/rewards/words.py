"""The words of a text, by script: what the language reward counts.

Below `rewards/language.py`. Pure functions of the text, and linear in its length: a policy may write anything, and
nothing here runs under a deadline.
"""

from __future__ import annotations

import re
import unicodedata

_CODE = r"```.*?```|(?<!`)`[^`\n]++`(?!`)"
_URL = r"(?:https?://|www\.)[!-~]++"
# `$x$` and `$ x $`, on one line. Not `$5 and $7`: no space on one side only, and no digit after.
_INLINE = r"(?<![\\$])\$(?:(?=\s)(?:[^$\n\\]|\\[^\n])++(?<=\s)|(?!\s)(?:[^$\n\\]|\\[^\n])++(?<!\s))\$(?![\d$])"
_MATHS = rf"\$\$.*?\$\$|\\\[(?:(?!\\\[).)*?\\\]|\\\((?:(?!\\\().)*?\\\)|{_INLINE}"
_NO_PROSE = re.compile(rf"{_CODE}|{_URL}|{_MATHS}", re.DOTALL)
_ENVIRONMENT = re.compile(
    r"\\(?P<side>begin|end)\s*\{(?:align(?:ed|at|edat)?|array|[bBpvV]?(?:small)?matrix|[dr]?cases|displaymath|eqnarray|"
    r"equation|flalign|gather(?:ed)?|math|multline|split|lstlisting|minted|tabular|tikzpicture|verbatim)\*?\}"
)
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{[^{}\n]*\}|\\[A-Za-z]++\*?|</?(?:think|answer)>")

_LETTERS: dict[str, str] = {
    "latin": r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02af\u1e00-\u1eff\u2c60-\u2c7f\ua722-\ua7ff\ufb00-\ufb06"
    r"\uff21-\uff3a\uff41-\uff5a",
    "greek": r"\u0370-\u037d\u037f-\u0386\u0388-\u03ff\u1f00-\u1fff",
    "cyrillic": r"\u0400-\u0481\u048a-\u052f\u1c80-\u1c8f\u2de0-\u2dff\ua640-\ua69f",
    "armenian": r"\u0531-\u0556\u0560-\u0588",
    "georgian": r"\u10a0-\u10fa\u10fc-\u10ff\u1c90-\u1cbf\u2d00-\u2d2f",
    "hebrew": r"\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u05d0-\u05f2",
    "arabic": r"\u0620-\u065f\u066e-\u06d3\u06d5-\u06ef\u06fa-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff"
    r"\ufe70-\ufefe",
    "devanagari": r"\u0900-\u0963\u0971-\u097f",
    "bengali": r"\u0980-\u09e5\u09f0\u09f1",
    "gurmukhi": r"\u0a00-\u0a65\u0a70-\u0a75",
    "gujarati": r"\u0a80-\u0ae5\u0af9-\u0aff",
    "tamil": r"\u0b80-\u0be5",
    "telugu": r"\u0c00-\u0c65",
    "kannada": r"\u0c80-\u0ce5\u0cf1\u0cf2",
    "malayalam": r"\u0d00-\u0d65\u0d7a-\u0d7f",
    "sinhala": r"\u0d80-\u0de5",
    "ethiopic": r"\u1200-\u135f\u1380-\u139f\u2d80-\u2ddf",
    "hangul": r"\u1100-\u11ff\u3131-\u318e\ua960-\ua97f\uac00-\ud7ff",
    "thai": r"\u0e01-\u0e3a\u0e40-\u0e4e",
    "lao": r"\u0e80-\u0ece\u0edc-\u0edf",
    "myanmar": r"\u1000-\u103f\u1050-\u108f\ua9e0-\ua9ef\uaa60-\uaa7f",
    "khmer": r"\u1780-\u17d3",
    "kana": r"\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f",
    "han": r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
}
_MATHS_LETTERS = r"\u00aa\u00b5\u00ba\u02b0-\u02ff\u2070-\u209f\u2100-\u214f\U0001d400-\U0001d7ff"
_JOINERS = r"\u0300-\u036f\u200c\u200d"  # accents that no precomposed letter has, and the joiners of Persian and Hindi
CHARACTERS_A_WORD = {"kana": 2.0, "thai": 4.0, "lao": 4.0, "myanmar": 4.0, "khmer": 4.0}
"""Scripts without spaces, beside Han: characters, about, that make a word."""


def _pattern(script: str, letters: str) -> re.Pattern[str]:
    """Of one word, or of a run of characters in a script without spaces."""
    if script == "han" or script in CHARACTERS_A_WORD:
        return re.compile(f"[{letters}]++")
    more = f"[{letters}{_JOINERS}]"
    apostrophe = f"(?:['\u2019][{letters}]{more}*+)"
    if script in ("latin", "greek"):  # a single letter is a variable
        return re.compile(f"[{letters}](?:{more}++{apostrophe}*+|{apostrophe}++)")
    return re.compile(f"[{letters}]{more}*+{apostrophe}*+")


_OTHER = rf"^\W\d_{''.join(_LETTERS.values())}{_MATHS_LETTERS}"
_WORDS = {script: (re.compile(f"[{letters}]"), _pattern(script, letters)) for script, letters in _LETTERS.items()}
_WORDS["other"] = (re.compile(f"[{_OTHER}]"), re.compile(f"[{_OTHER}]++"))


def prose(text: str) -> str:
    """The text with everything that is in no language replaced by a space, in this order:

    1. TeX environments of maths, tables and code (equation, align, cases, matrix, array, tabular, verbatim, ...), with
       all that is in them. Only what has both ends; of others, as itemize or proof, the content is prose.
    2. From left to right: code between ``` or single backticks, URLs, and maths between `$$`, `\\[ \\]`, `\\( \\)` or
       `$`. What has no end is no delimiter, `\\$` is none, and `$5 and $7` are prices: an inline `$` needs both its
       ends on one line, spaces inside both or neither, and no digit after it.
    3. Names of TeX commands (the text in their braces stays) and the tags think and answer.

    Numbers, signs and letters of mathematical alphabets stay and are no words.
    """
    text = unicodedata.normalize("NFC", text)
    if "\\begin" in text:
        text = _without_environments(text)
    return _COMMAND.sub(" ", _NO_PROSE.sub(" ", text))


def _without_environments(text: str) -> str:
    """One pass with a stack of open environments, so that thousands of unclosed ones cost no more than letters."""
    opened: list[int] = []
    spans: list[tuple[int, int]] = []  # complete environments, none inside another
    for mark in _ENVIRONMENT.finditer(text):
        if mark["side"] == "begin":
            opened.append(mark.start())
        elif opened:
            begin = opened.pop()
            while spans and spans[-1][0] > begin:
                spans.pop()
            spans.append((begin, mark.end()))
    kept, done = [], 0
    for begin, end in spans:
        kept.append(text[done:begin])
        done = end
    return " ".join([*kept, text[done:]])


def count_words(text: str, han_per_word: float) -> dict[str, float]:
    """Words by script, of those scripts that occur; the keys are those of `config/languages.py` and "other".

    - Latin, Greek, Cyrillic, Hangul and other scripts with spaces: a run of letters, joined by apostrophes, is a word
      ("don't" is one, "re-check" two). A single Latin or Greek letter is a variable and no word, "a" and "I" too.
    - Han: characters / han_per_word. Kana: characters / 2; Thai, Lao, Burmese, Khmer: characters / 4.
    - Digits in any script are no words. Letters of scripts that no language of the table has are runs under "other".
    """
    alphabet = "".join(set(text))  # most texts have one script or two: what has no letter here needs no pass
    counts: dict[str, float] = {}
    for script, (letter, word) in _WORDS.items():
        if not letter.search(alphabet):
            continue
        found = word.findall(text)
        if script == "other":  # \w has more numerals than \d: 2/3 in one sign, 1 in a circle
            found = [run for run in found if any(map(str.isalpha, run))]
        if not found:
            continue
        characters = han_per_word if script == "han" else CHARACTERS_A_WORD.get(script)
        counts[script] = float(len(found)) if characters is None else sum(map(len, found)) / characters
    return counts
