"""The format reward of R1-Zero: the completion is one thought and one answer in their tags, and
nothing else.

Source: DeepSeek-R1 (arXiv 2501.12948), section 2.2.2; the paper gives the rule no formula, this is
ours. Stands beside `rewards/accuracy.py`: `rewards/mixer.py` weighs the two.
"""

from __future__ import annotations

import re

from megatron_r1.config.data import Tags
from megatron_r1.types import Completion

_TAG = r"</?(?:think|answer)>"
_INSIDE = rf"(?:(?!{_TAG}).)*+"  # possessive: a miss costs one pass, however long the thought
_PATTERNS: dict[Tags, re.Pattern[str]] = {
    "think-answer": re.compile(rf"<think>{_INSIDE}</think>\s*<answer>(?P<answer>{_INSIDE})</answer>", re.DOTALL),
    "think": re.compile(rf"<think>{_INSIDE}</think>(?P<answer>{_INSIDE})", re.DOTALL),
}


def format_reward(completion: Completion, tags: Tags = "think-answer") -> int:
    """Return 1 if the completion has the strict format and ended by itself, else 0.

    tags = "think-answer": the text, after its surrounding whitespace is stripped, must be
    `<think>T</think><answer>A</answer>`, with optional whitespace between the two elements, nothing
    before and nothing after, where

    - T and A contain none of the four tags `<think>`, `</think>`, `<answer>`, `</answer>` (so each
      occurs once); tags are matched exactly: lower case, without spaces or attributes;
    - A is not empty after strip; T may be empty, since how much to think is for the accuracy reward
      to teach;
    - finish_reason is "stop": a completion cut by the length limit or aborted has no right format,
      even if the cut happens to fall behind `</answer>`.

    tags = "think" (R1's chat format): `<think>T</think>A` under the same rules.
    """
    if completion.finish_reason != "stop":
        return 0
    match = _PATTERNS[tags].fullmatch(completion.text.strip())
    return int(match is not None and match["answer"].strip() != "")
