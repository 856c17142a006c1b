"""One spelling for answers that mean the same: the cheap, in-process half of judging, and the key
of majority votes.

Used by `rewards/accuracy.py`. Nothing here evaluates the model's text: it is a fixed number of
regular expressions over at most 512 characters, so it cannot hang.
"""

from __future__ import annotations

import re
from fractions import Fraction

_MAX_NUMBER = 64  # characters; longer digit strings are compared as text
_LEAD = re.compile(
    r"(?:(?:so|thus|hence|therefore)\b,?\s*)?(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|:|=)\s*:?\s*"
    r"|(?:最终|最后)?(?:的)?答案\s*(?:是|为|:|=)\s*:?\s*",
    re.IGNORECASE,
)
_MATH_MODE = re.compile(r"\$\$(.*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\*\*(.*)\*\*", re.DOTALL)
_MONEY = re.compile(r"\\?\$\s*(?=[0-9.+-])|(?<=[0-9])\s*(?:\\text\s*\{\s*dollars?\s*\}|dollars?)\s*$", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACE = re.compile(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\s+")
_NOTHING = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!|\^\s*\{?\s*\\circ\s*\}?|°|\\?%")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(\{[^{}]*\}|[0-9a-zA-Z])\s*(\{[^{}]*\}|[0-9a-zA-Z])")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]+)?")
_LOOSE_SPACE = re.compile(r"(?<![0-9]) +| +(?![0-9])")  # "1 2" must not become 12
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)")
_RATIO = re.compile(r"([+-]?)(?:([+-]?[0-9]+)/([0-9]+)|\\frac\{([+-]?[0-9]+)\}\{([+-]?[0-9]+)\})")
# Full-width forms and signs, frequent in Chinese answers; NFKC would also turn x² into x2.
_FOLD = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: " ",
    0x2212: "-",
    0x3002: ".",
}


def plain(text: str) -> str:
    """Take off what surrounds an answer: "The answer is $x=3$." -> "x=3", "\\$10" -> "10"."""
    text = text.translate(_FOLD).strip()
    if lead := _LEAD.match(text):
        text = text[lead.end() :].strip()
    text = text.rstrip(".").strip()
    if wrapped := _MATH_MODE.fullmatch(text):
        text = next(part for part in wrapped.groups() if part is not None).strip().rstrip(".")
    return _MONEY.sub("", text).strip()


def canonical(text: str) -> str:
    """Return the one spelling of an answer. Equal spellings mean equal answers; the converse does
    not hold.

    Dropped: what `plain` drops, spacing, `\\left` and `\\right`, degree and percent signs,
    `\\text{}` and its like, thousands separators, the case of words (not of one or two letters,
    which are variables, choices or points; "no" is a word).
    Unified: `\\dfrac12` -> `\\frac{1}{2}`. Example: "1{,}234.50" -> "1234.50".
    """
    text = _TEXT.sub(r"\1", plain(text))
    text = _NOTHING.sub("", text.replace("{,}", ","))
    text = _SPACE.sub(" ", text).strip().rstrip(".")
    text = _FRACTION.sub(lambda m: rf"\frac{{{m[1].strip('{} ')}}}{{{m[2].strip('{} ')}}}", text)
    if _GROUPED.fullmatch(text):
        return text.replace(",", "").replace(" ", "")
    text = _LOOSE_SPACE.sub("", text)
    is_word = text.isalpha() and (len(text) > 2 or text.lower() == "no")
    return text.casefold() if is_word else text


def number(spelling: str) -> Fraction | None:
    """Return the value of a canonical integer, decimal or ratio ("-3", ".5", "2/4",
    "\\frac{-1}{2}"), else None.

    Exact: "0.333333" is 333333/1000000 and not a third. Exponents, roots and sums are no numbers
    here.
    """
    if len(spelling) > _MAX_NUMBER:
        return None
    if _DECIMAL.fullmatch(spelling):
        return Fraction(spelling)
    if ratio := _RATIO.fullmatch(spelling):
        numerator, denominator = int(ratio[2] or ratio[4]), int(ratio[3] or ratio[5])
        if denominator == 0 or (ratio[1] and ratio[2] and ratio[2][0] in "+-"):
            return None
        return Fraction(numerator, denominator) * (-1 if ratio[1] == "-" else 1)
    return None


def vote_key(answer: str) -> str:
    """Return what a majority vote counts: "042", "42.0" and "\\frac{84}{2}" are all "42"; other
    text is canonical.
    """
    spelling = canonical(answer)
    value = number(spelling)
    return spelling if value is None else str(value)


def same(answer: str, reference: str) -> bool | None:
    """Judge by spelling and exact value alone: True or False when that settles it, None when a
    parser must look.

    Settled: equal spellings, also when only one side names its variable ("x=3" and "3"); two equal
    numbers; two decimals that differ (no percent sign on either side: 25% may mean 25 or 0.25). Not
    settled: a decimal against a fraction, since references may be rounded, and everything else.
    """
    ours, theirs = canonical(answer), canonical(reference)
    if ("=" in ours) != ("=" in theirs):
        ours, theirs = (re.sub(r"^[a-zA-Z]=", "", side) for side in (ours, theirs))
    if ours == theirs:
        return True
    left, right = number(ours), number(theirs)
    if left is None or right is None:
        return None
    if left == right:
        return True
    if "%" in answer or "%" in reference:
        return None
    return False if _DECIMAL.fullmatch(ours) and _DECIMAL.fullmatch(theirs) else None
