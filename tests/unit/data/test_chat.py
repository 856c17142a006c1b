"""Chat formats: the exact tokens, which of them are learned, and what no format may do silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.data.chat import ASSISTANT, END, USER, ChatFormat, build_format, encode_conversation
from megatron_r1.data.templates import TEMPLATES
from megatron_r1.data.tokenizers import Tokenizer, build_tokenizer
from megatron_r1.types import Message, Sample
from tests.unit.data.chat_folders import (
    CHATML,
    DELETING,
    ENDLESS,
    FORGETFUL,
    REFUSING,
    SAMPLING_ONLY,
    write_tokenizer,
)

TAGS = ["<think>", "</think>", "<answer>", "</answer>", USER, ASSISTANT]
CHAR = build_tokenizer(TokenizerConfig(kind="char", tags=TAGS))
SHORT = [Message("user", "1+1=?"), Message("assistant", "2", reasoning="easy")]
LONG = [
    Message("system", "Be brief."),
    Message("user", "1+1=?"),
    Message("assistant", "2", reasoning="easy"),
    Message("user", "And 2+2?"),
    Message("assistant", "<think>hm</think>4"),
]
PLAIN = [Message(m.role, m.content.rpartition("</think>")[2]) for m in LONG]


def shown(sample: Sample, tokenizer: Tokenizer, eos: str = "$") -> str:
    """The text of a sequence, what is learned in [brackets]."""
    assert sample.loss_mask is not None and len(sample.loss_mask) == len(sample.token_ids)
    assert sample.loss_mask[-1] == 1 and sample.prompt_length == sample.loss_mask.index(1) > 0
    text, inside = "", 0
    runs: list[tuple[int, list[int]]] = []
    for token, learned in zip(sample.token_ids, sample.loss_mask, strict=True):
        if not runs or runs[-1][0] != learned:
            runs.append((learned, []))
        runs[-1][1].append(token)
    for inside, ids in runs:
        piece = ""
        for token in ids:
            backend = getattr(tokenizer, "backend", None)
            if token == tokenizer.eos_id:
                piece += eos
            else:
                piece += backend.decode([token]) if backend is not None else tokenizer.decode([token])
        text += f"[{piece}]" if inside else piece
    return text


def written(
    messages: list[Message], chat: ChatFormat, tokenizer: Tokenizer, turns: Literal["all", "last"] = "all"
) -> list[str]:
    return [shown(sample, tokenizer) for sample in encode_conversation(messages, chat, turns)]


def hugging_face(folder: Path, template: str | None, **keys: Any) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(kind="huggingface", path=write_tokenizer(folder, template, **keys)))


def test_tokens_by_hand() -> None:
    """Ids of the char tokenizer: eos 1, tags 2 to 7 in order, newline 8, then ASCII from 9 (a space) on."""
    (sample,) = encode_conversation(
        [Message("user", "1?"), Message("assistant", "2")], build_format("deepseek", "", CHAR)
    )
    one, two, question = (9 + ord(char) - ord(" ") for char in "12?")
    assert sample.token_ids == [6, one, question, 7, two, 1]
    assert sample.loss_mask == [0, 0, 0, 0, 1, 1]
    assert sample.prompt_length == 4


def test_r1_keeps_every_thought_in_one_sequence() -> None:
    r1 = build_format("r1", "plain", CHAR)
    assert written(SHORT, r1, CHAR) == ["1+1=?[<think>easy</think><answer>2</answer>$]"]
    first = "Be brief.\n\n1+1=?[<think>easy</think><answer>2</answer>$]"
    assert written(LONG, r1, CHAR) == [f"{first}And 2+2?[<think>hm</think>4$]"]
    unlearned = first.replace("[", "").replace("]", "")
    assert written(LONG, r1, CHAR, "last") == [f"{unlearned}And 2+2?[<think>hm</think>4$]"]
    tagged = [SHORT[0], Message("assistant", "So <answer>2</answer>", reasoning="easy")]
    assert written(tagged, r1, CHAR) == ["1+1=?[<think>easy</think>So <answer>2</answer>$]"]


def test_r1_asks_as_prompts_of_the_same_template_do() -> None:
    """R1-Zero's introduction stands once; the first question is the text that rollouts of that template begin with."""
    text = written(PLAIN[1:], build_format("r1", "r1-zero", CHAR), CHAR)[0]
    prompt = TEMPLATES["r1-zero"].replace("{prompt}", "1+1=?")
    assert text == f"{prompt}[2$]User: And 2+2?. Assistant:[4$]"
    own = written(PLAIN[1:], build_format("r1", "Q {prompt} A", CHAR), CHAR)
    assert own == ["Q 1+1=? A[2$]Q And 2+2? A[4$]"]


def test_deepseek_deletes_earlier_thoughts_and_so_needs_a_sequence_a_turn() -> None:
    deepseek = build_format("deepseek", "", CHAR)
    last = f"Be brief.{USER}1+1=?{ASSISTANT}2${USER}And 2+2?{ASSISTANT}[<think>hm</think>4$]"
    assert written(LONG, deepseek, CHAR, "last") == [last]
    assert written(LONG, deepseek, CHAR) == [f"Be brief.{USER}1+1=?{ASSISTANT}[<think>\neasy\n</think>\n\n2$]", last]
    # Without thoughts nothing is deleted: one sequence teaches both turns.
    assert written(PLAIN, deepseek, CHAR) == [
        f"Be brief.{USER}1+1=?{ASSISTANT}[2$]{USER}And 2+2?{ASSISTANT}[4$]",
    ]


def test_a_chat_template_learns_content_and_end_of_turn(tmp_path: Path) -> None:
    tokenizer = hugging_face(tmp_path, CHATML)
    chat = build_format("chat", "", tokenizer)
    assert written(LONG, chat, tokenizer) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
        "[<think>\neasy\n</think>\n\n2<|im_end|>]\n<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n"
        "[<think>hm</think>4<|im_end|>]"
    ]
    for messages in (SHORT, LONG):
        (sample,) = encode_conversation(messages, chat)
        given = [
            {
                "role": m.role,
                "content": f"<think>\n{m.reasoning}\n</think>\n\n{m.content}" if m.reasoning else m.content,
            }
            for m in messages
        ]
        whole = tokenizer.backend.apply_chat_template(given, tokenize=True, return_dict=False)  # type: ignore[attr-defined]
        assert whole[: len(sample.token_ids)] == sample.token_ids
        assert whole[len(sample.token_ids) :] == tokenizer.encode("\n")  # after the end of the turn: nobody says it


def test_a_forgetful_template_gets_a_sequence_a_turn(tmp_path: Path) -> None:
    tokenizer = hugging_face(tmp_path, FORGETFUL)
    chat = build_format("chat", "", tokenizer)
    first = "<|im_start|>user\n1+1=?<|im_end|>\n<|im_start|>assistant\n"
    second = f"{first}2<|im_end|>\n<|im_start|>user\nAnd 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert written(LONG[1:], chat, tokenizer) == [
        f"{first}[<think>\neasy\n</think>\n\n2<|im_end|>]",
        f"{second}[<think>\nhm\n</think>\n\n4<|im_end|>]",
    ]
    assert written(LONG[1:], chat, tokenizer, "last") == [f"{second}[<think>\nhm\n</think>\n\n4<|im_end|>]"]


def test_built_in_formats_begin_with_the_tokenizers_bos(tmp_path: Path) -> None:
    tokenizer = hugging_face(tmp_path, None, bos=True)
    assert tokenizer.bos_id == 0
    chat = build_format("deepseek", "", tokenizer)
    (sample,) = encode_conversation(SHORT, chat)
    assert shown(sample, tokenizer) == f"<s>{USER}1+1=?{ASSISTANT}[<think>\neasy\n</think>\n\n2$]"
    assert sample.token_ids[:2] == [0, 6] and sample.token_ids[-1] == tokenizer.eos_id


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (SAMPLING_ONLY, r'asks for an answer with .*<think>.*; set format = "deepseek"'),
        (DELETING, r"chat template leaves 'easy' out of the assistant's turn; set format"),
        (ENDLESS, r"ends the assistant's turn without a special token .*never learn to stop"),
        (REFUSING, r"chat template of .* refuses the roles user: roles must be nice"),
    ],
)
def test_templates_that_cannot_be_learned_from(tmp_path: Path, template: str, message: str) -> None:
    chat = build_format("chat", "", hugging_face(tmp_path, template))
    with pytest.raises(UserError, match=message):
        encode_conversation(SHORT, chat)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='char tokenizer has no chat template; set format = "r1" or "deepseek"'):
        build_format("chat", "", CHAR)
    with pytest.raises(UserError, match="huggingface tokenizer has no chat template"):
        build_format("chat", "", hugging_face(tmp_path, None))
    with pytest.raises(UserError, match=r"which this tokenizer cannot encode: add .* to tokenizer\.tags"):
        build_format("deepseek", "", build_tokenizer(TokenizerConfig(kind="char")))
    poisoned = [Message("user", f"1{END}"), Message("assistant", "2")]
    with pytest.raises(UserError, match=r"a message of the user holds .*, which would end the turn there"):
        encode_conversation(poisoned, build_format("r1", "plain", CHAR))


def test_marks_that_are_no_tokens_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    build_format("deepseek", "", build_tokenizer(TokenizerConfig(kind="byte")))
    assert f"no token for {USER}" in caplog.text
