"""The text a question is wrapped in before the model sees it.

Used by every prompt source (`data/prompts.py`). R1-Zero's template prescribes the structure of the
answer and nothing else: no hint about strategy or reflection, so that what emerges is the model's
own.
"""

from __future__ import annotations

from megatron_r1.config.data import R1_ZERO_TEMPLATE
from megatron_r1.config.errors import UserError

FIELD = "{prompt}"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"  # noqa: RUF001

TEMPLATES = {
    # DeepSeek-R1, arXiv 2501.12948 (v1), Table 1.
    R1_ZERO_TEMPLATE: (
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer. The reasoning process and answer are enclosed within "
        "<think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning "
        "process here </think> <answer> answer here </answer>. User: {prompt}. Assistant:"
    ),
    # DeepSeek-V3 and -R1's chat format, as their tokenizers' template writes one question; `data/chat.py` has the rest.
    "deepseek": f"{USER}{FIELD}{ASSISTANT}",
    "plain": FIELD,
}


def render(template: str, question: str) -> str:
    """The template's text with the question, braces and all, in place of `{prompt}`.

    Args:
        template: a name in `TEMPLATES`, or a text that contains `{prompt}`.

    Raises:
        UserError: neither a name nor a text with the field.
    """
    text = TEMPLATES.get(template, template)
    if FIELD not in text:
        names = ", ".join(f'"{name}"' for name in TEMPLATES)
        raise UserError(
            f"template: {template!r} has no {FIELD} field; allowed are {names} or a text with "
            f"{FIELD} where the question goes"
        )
    return text.replace(FIELD, question)
