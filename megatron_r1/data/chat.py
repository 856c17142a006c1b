"""A conversation as token sequences in which only what the assistant says is learned.

Between `data/conversations.py` and the batches of an `sft` stage. A format renders messages to text: the tokenizer's
own chat template, or one of two that are built in. What is learned follows from the format alone: an answer is what the
rendering with it has beyond the rendering up to it, which is what the model is given when it has to answer. So training
shows every answer after exactly the text that sampling would show.

Formats that delete the thoughts of earlier turns (DeepSeek's, Qwen3's) render an answer with its thought while it is
the last message, and without it as history. No one sequence then teaches two turns, and each gets one of its own; the
turns of other conversations share one sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from megatron_r1.config.data import R1_ZERO_TEMPLATE
from megatron_r1.config.errors import UserError
from megatron_r1.data.file_tokenizers import HuggingFaceTokenizer
from megatron_r1.data.templates import ASSISTANT, USER, render
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.types import Message, Sample

logger = logging.getLogger(__name__)

END = "<｜end▁of▁sentence｜>"  # noqa: RUF001 - how built-in formats write the end of a turn: the tokenizer's eos
THINK_END = "</think>"
LATER_TEMPLATES = {R1_ZERO_TEMPLATE: "User: {prompt}. Assistant:"}
"""Template -> what wraps the questions after the first; other templates wrap all alike."""


class ChatFormat(Protocol):
    """How messages become text, and text token ids."""

    name: str

    def render(self, messages: Sequence[Message], *, answering: bool) -> str:
        """The text of the messages; answering: up to where the assistant's next turn begins."""
        ...

    def start(self) -> list[int]:
        """Ids before the text."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of the text."""
        ...

    def learned(self, answer_ids: list[int]) -> int:
        """How many of an answer's ids are the assistant's own: up to the end of its turn. 0: the turn has no end."""
        ...


class _BuiltIn:
    """What the built-in formats share: the tokenizer's bos, and its eos where a turn ends."""

    name: str

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def start(self) -> list[int]:
        """bos, where the tokenizer has one."""
        return [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]

    def encode(self, text: str) -> list[int]:
        """Ids, with eos for each `END`."""
        first, *others = (self.tokenizer.encode(part) for part in text.split(END))
        return first + [token for part in others for token in (self.tokenizer.eos_id, *part)]

    def learned(self, answer_ids: list[int]) -> int:
        """All of them: an answer ends with eos."""
        return len(answer_ids)

    @staticmethod
    def _content(message: Message) -> str:
        if END in message.content or END in (message.reasoning or ""):
            raise UserError(f"a message of the {message.role} holds {END}, which would end the turn there; remove it")
        return message.content


class R1Format(_BuiltIn):
    """This project's own: questions in a prompt template, `<think>..</think><answer>..</answer>`, thoughts kept.

    A thought that is given apart gets these tags; an answer without one is written as it stands, with its tags if any.
    """

    name = "r1"

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        super().__init__(tokenizer)
        self.template, self.later = template, LATER_TEMPLATES.get(template, template)

    def render(self, messages: Sequence[Message], *, answering: bool) -> str:
        """System message and blank line, then question and answer in turn; after a question an answer begins."""
        text, template = "", self.template
        for message in messages:
            content = self._content(message)
            if message.role == "system":
                text += f"{content}\n\n"
            elif message.role == "user":
                text += render(template, content)
                template = self.later
            elif message.reasoning is None:
                text += content + END
            else:
                answer = content if "<answer>" in content else f"<answer>{content}</answer>"
                text += f"<think>{message.reasoning}</think>{answer}{END}"
        return text


class DeepSeekFormat(_BuiltIn):
    """DeepSeek-V3 and -R1's chat format, as their tokenizer's template writes it.

    As there, of an earlier answer only what follows `</think>` is kept. Unlike there, the last answer keeps its
    thought: the released template, made for sampling, would delete what is to be learned.
    """

    name = "deepseek"

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer)
        for mark in (USER, ASSISTANT):
            try:
                pieces = len(tokenizer.encode(mark))
            except UserError as error:
                raise UserError(
                    f'format = "deepseek" writes {mark}, which this tokenizer cannot encode: add {USER} and '
                    f"{ASSISTANT} to tokenizer.tags"
                ) from error
            if pieces > 1:
                logger.warning("format = deepseek: this tokenizer has no token for %s and takes %d", mark, pieces)

    def render(self, messages: Sequence[Message], *, answering: bool) -> str:
        """System message, then USER question ASSISTANT answer END in turn, without white space between them."""
        text = ""
        for index, message in enumerate(messages):
            content = self._content(message)
            if message.role == "assistant":
                if index < len(messages) - 1:
                    content = content.rpartition(THINK_END)[2]
                elif message.reasoning is not None:
                    content = f"<think>\n{message.reasoning}\n</think>\n\n{content}"
                text += ASSISTANT + content + END
            else:
                text += (USER if message.role == "user" else "") + content
        return text + (ASSISTANT if answering else "")


class TemplateFormat:
    """The chat template of a Hugging Face tokenizer.

    A thought that is given apart is put into the answer's text in <think> tags: templates that know thoughts take it
    from there, and the others write it out.
    """

    name = "chat"

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self.tokenizer = tokenizer
        self._special = tokenizer.special_ids()

    def render(self, messages: Sequence[Message], *, answering: bool) -> str:
        """What apply_chat_template writes."""
        return self.tokenizer.render_chat(
            [{"role": message.role, "content": _with_thought(message)} for message in messages], answering
        )

    def start(self) -> list[int]:
        """None: a template writes bos itself."""
        return []

    def encode(self, text: str) -> list[int]:
        """Ids, special tokens among them."""
        return self.tokenizer.encode(text)

    def learned(self, answer_ids: list[int]) -> int:
        """Up to the last special token, if nothing but white space follows."""
        last = max((i for i, token in enumerate(answer_ids) if token in self._special), default=-1)
        return 0 if self.tokenizer.decode(answer_ids[last + 1 :]).strip() else last + 1


def build_format(name: Literal["chat", "r1", "deepseek"], template: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format of this name.

    Raises:
        UserError: "chat" without a chat template, or marks that the tokenizer cannot encode.
    """
    if name == "r1":
        return R1Format(tokenizer, template)
    if name == "deepseek":
        return DeepSeekFormat(tokenizer)
    if not isinstance(tokenizer, HuggingFaceTokenizer) or not tokenizer.backend.chat_template:
        raise UserError(
            f'format = "chat": the {tokenizer.name} tokenizer has no chat template; set format = "r1" or "deepseek", '
            "or give a Hugging Face tokenizer with a chat_template"
        )
    return TemplateFormat(tokenizer)


@dataclass(slots=True)
class _Sequence:
    """A sequence that grows turn by turn."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)

    def add(self, ids: list[int], learned: int) -> None:
        """Append ids of which the first `learned` are learned."""
        self.ids += ids
        self.mask += [1] * learned + [0] * (len(ids) - learned)

    def sample(self) -> Sample:
        """The tokens up to the last learned one."""
        end = len(self.mask) - self.mask[::-1].index(1)
        return Sample(token_ids=self.ids[:end], prompt_length=self.mask.index(1), loss_mask=self.mask[:end])


def encode_conversation(
    messages: Sequence[Message], chat: ChatFormat, turns: Literal["all", "last"] = "all"
) -> list[Sample]:
    """Sequences with a loss mask over the assistant's answers, the end of each turn included.

    Args:
        messages: as `Conversation` promises.
        chat: how they are written.
        turns: "last" learns the last answer only, in one sequence; "all" learns each, in as few sequences as the format
            allows: one where history is rendered as it was when it was the last turn, else one for each turn.

    Returns:
        One `Sample` a sequence. Question and answer are encoded apart, as they are when the model is asked.

    Raises:
        UserError: the template fails, renders an answer otherwise than it asks for it, loses a part of it, or gives the
        turn no end token; or the tokenizer cannot encode the text.
    """
    found: list[_Sequence] = []
    for index, message in enumerate(messages):
        if message.role != "assistant" or (turns == "last" and index < len(messages) - 1):
            continue
        before = chat.render(messages[:index], answering=True)
        whole = chat.render(messages[: index + 1], answering=False)
        answer = _answer(before, whole, message, chat.name)
        if not (found and before.startswith(found[-1].text)):
            found.append(_Sequence(ids=chat.start(), mask=[0] * len(chat.start())))
        sequence = found[-1]
        sequence.add(chat.encode(before[len(sequence.text) :]), learned=0)
        ids = chat.encode(answer)
        learned = chat.learned(ids)
        if not learned:
            raise UserError(
                f'format = "{chat.name}" ends the assistant\'s turn without a special token ({_end(answer)!r}), so the '
                'model would never learn to stop; mend the chat template, or set format = "deepseek" or "r1"'
            )
        if not sequence.ids:
            raise UserError(f'format = "{chat.name}" leaves no token before the answer for the model to start from')
        sequence.add(ids, learned)
        sequence.text = whole
    return [sequence.sample() for sequence in found]


def _answer(before: str, whole: str, message: Message, name: str) -> str:
    """What `whole` has beyond `before`, checked to be the assistant's message."""
    cure = 'set format = "deepseek" or "r1", which keep it, or mend the chat template'
    if not whole.startswith(before):
        raise UserError(
            f'format = "{name}": the tokenizer\'s chat template asks for an answer with {_end(before)!r} and does not '
            f"write the answer {message.content[:40]!r} after it, so what the model is to say is not known (a template "
            f"that deletes the thought, as DeepSeek-R1's does, is made for sampling only); {cure}"
        )
    answer = whole[len(before) :]
    for part in _parts(message):
        if part not in answer:
            raise UserError(
                f"format = \"{name}\": the tokenizer's chat template leaves {part[:40]!r} out of the assistant's turn; "
                f"{cure}"
            )
    return answer


def _with_thought(message: Message) -> str:
    if message.reasoning is None:
        return message.content
    return f"<think>\n{message.reasoning}\n</think>\n\n{message.content}"


def _parts(message: Message) -> list[str]:
    """The thought and the answer, without the white space around them, which a template may change."""
    thought, tag, rest = message.content.partition(THINK_END)
    parts = [message.reasoning or "", *((thought.rpartition("<think>")[2], rest) if tag else (message.content,))]
    return [part.strip() for part in parts]


def _end(text: str) -> str:
    return text[-40:]
