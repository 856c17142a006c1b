"""What a completion's answer is: the one rule that every accuracy reward and every majority vote
shares.

Stands between the decoded completion and the verifiers (`rewards/accuracy.py`). Reading the answer
ourselves, instead of handing the whole completion to a maths parser, closes the holes that such
parsers have: an answer found inside an unfinished thought, two boxes read as one set, a hedge ("41
or 42") accepted for either number.
"""

from __future__ import annotations

import re

MAX_ANSWER = 512
"""Longest answer in characters. A longer one is no answer: it is prose, or an attempt to drown the
verifier.
"""

_ANSWER_TAG = re.compile(r"<(/?)answer>")
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)


def extract_answer(text: str) -> str | None:
    """Return the answer of a completion, or None if it gives none. Linear in len(text).

    1. Only what follows the last `</think>` is read; without one, the whole text. If an `<think>`
       is left in that part, the thought was never closed and there is no answer, whatever it
       contains.
    2. If that part has an `<answer>...</answer>` pair, the content of the last pair is read and
       nothing else. A pair is an `<answer>` whose next answer tag is `</answer>`: of nested tags
       the innermost counts, an unclosed `<answer>` is ignored.
    3. In the content of 2, or else in the part of 1, the last `\\boxed{...}` or `\\fbox{...}` with
       balanced braces is the answer (escaped braces `\\{` `\\}` do not count; of nested boxes the
       outermost counts, and boxes around nothing but a box are taken off). If a box was opened and
       not closed there is no answer.
    4. Without any box the content of 2 itself is the answer; without 2 there is none.
    5. Surrounding whitespace is stripped. An empty answer, or one over 512 characters, is none.
    """
    _, _, rest = text.rpartition("</think>")
    if "<think>" in rest:
        return None
    tagged = _last_tagged(rest)
    answer, has_box = _last_box(rest if tagged is None else tagged)
    if not has_box:
        answer = tagged
    if answer is None:
        return None
    answer = answer.strip()
    return answer if 0 < len(answer) <= MAX_ANSWER else None


def summary_of(text: str) -> str:
    """Return what a completion says after its thought: what helpful reward models and their judges are given.

    DeepSeek-R1 (arXiv 2501.12948, v2 section 3.2.2): helpfulness is judged by the final summary alone. It is what
    follows the last `</think>` (without one, the whole text), less every `<answer>` and `</answer>` tag and surrounding
    whitespace. Empty where a `<think>` is left in that part, whose thought was never closed. Linear in len(text).

    Example: "<think>5-6=-1</think> <answer>8</answer>" -> "8".
    """
    _, _, rest = text.rpartition("</think>")
    return "" if "<think>" in rest else _ANSWER_TAG.sub("", rest).strip()


def thought_of(text: str) -> str:
    """Return the thought of a completion: what stands before the last `</think>`, less an `<think>` at its start and
    surrounding whitespace. Empty where no thought was closed. Linear in len(text).

    Example: "<think>5-6=-1</think> <answer>8</answer>" -> "5-6=-1".
    """
    thought, _, _ = text.rpartition("</think>")
    return thought.strip().removeprefix("<think>").strip()


def _last_tagged(text: str) -> str | None:
    """Return the content of the last `<answer>` whose next answer tag is `</answer>`."""
    content = None
    opened: int | None = None  # where the content of the last `<answer>` seen begins
    for tag in _ANSWER_TAG.finditer(text):
        if tag[1] == "":
            opened = tag.end()
        elif opened is not None:
            content = text[opened : tag.start()]
            opened = None
    return content


def _last_box(text: str) -> tuple[str | None, bool]:
    """Return (content of the last outermost box, whether the text has a box at all); content None
    if one is unclosed.

    One pass with a stack of open braces, so that thousands of unclosed boxes cost no more than
    thousands of letters.
    """
    # Per open brace: where the content of its box begins, or -1 for a plain brace.
    stack: list[int] = []
    open_boxes = 0
    span: tuple[int, int] | None = None
    has_box = False
    for token in _BRACE.finditer(text):
        if token["box"] is not None:
            stack.append(token.end())
            open_boxes += 1
            has_box = True
        elif token["open"] is not None:
            stack.append(-1)
        elif token["close"] is not None and stack:
            begin = stack.pop()
            if begin >= 0:
                open_boxes -= 1
                if open_boxes == 0:
                    span = (begin, token.start())
    if open_boxes or span is None:
        return None, has_box
    return _unwrap(text[span[0] : span[1]].strip()), has_box


def _unwrap(content: str) -> str:
    """Take off boxes around nothing but a box: "\\boxed{2}" -> "2", "\\boxed{2}+1" unchanged."""
    while len(content) <= MAX_ANSWER and (first := _BRACE.match(content)) and first["box"] is not None:
        depth, end = 0, -1
        for token in _BRACE.finditer(content):
            depth += (token["box"] or token["open"]) is not None
            depth -= token["close"] is not None
            if depth == 0 and token["close"] is not None:
                end = token.end()
                break
        if end != len(content):
            return content
        content = content[first.end() : end - 1].strip()
    return content
