"""Conversations from files, as learned sequences, batch after batch.

First in the flow of an `sft` stage. Every row of a file is checked when it is opened; a conversation is written out by
the chat format (`data/chat.py`) and tokenised when its turn comes, and left out, and counted, when it asks a held-out
question, is too long, or cannot be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_r1.config.data import ConversationsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.stages import SftStage
from megatron_r1.data.chat import build_format, encode_conversation
from megatron_r1.data.checked_rows import CheckedRows
from megatron_r1.data.cursor import PromptCursor
from megatron_r1.data.heldout import heldout_ids, question_hash
from megatron_r1.data.records import read_messages
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.types import Conversation, Sample


class Conversations:
    """The well-formed rows of a file as conversations by index; ids are "<file name>:<row>", counted from 0.

    Raises:
        UserError: a missing or empty file, a missing column, more rows that are no conversation than `max_bad_rows`.
    """

    def __init__(self, config: ConversationsConfig) -> None:
        self._rows = CheckedRows(config, "conversation")
        self.name, self.bad = self._rows.name, self._rows.bad
        self._config = config

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Conversation:
        where = self._rows.where(index)
        messages = read_messages(self._rows[index], self._config, where)
        return Conversation(id=f"{self.name}:{self._rows.number(index)}", where=where, messages=messages)

    def row(self, index: int) -> Mapping[str, Any]:
        """All columns of that row."""
        return self._rows[index]


class ConversationBatches:
    """Endless batches of learned sequences, epoch after epoch.

    Args:
        stage: the format, what is learned, what becomes of long conversations.
        config: the stage's data or held-out conversations.
        max_tokens: longest sequence.
        seed: of the order of each epoch.
        exclude: question hashes (`data/heldout.py`); a conversation with one of them, in any of its turns, is left out.

    Raises:
        UserError: as `Conversations` and `build_format`.
    """

    def __init__(
        self,
        stage: SftStage,
        config: ConversationsConfig,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        seed: int = 0,
        exclude: frozenset[str] = frozenset(),
    ) -> None:
        self.source = Conversations(config)
        self._chat = build_format(stage.format, stage.template, tokenizer)
        self._stage, self._max_tokens, self._exclude = stage, max_tokens, exclude
        self._cursor = PromptCursor(self.source, config.shuffle, seed)
        self._read_bad = self.source.bad.count
        self._unwritable: set[str] = set()  # ids of rows that the format or the tokenizer cannot write
        self.excluded = self.too_long = self.truncated = 0  # conversations since the start, over all epochs

    def take(self, number: int) -> list[Sample]:
        """The sequences of the next `number` conversations that may be trained on: one each, or one a turn.

        Raises:
            UserError: a whole epoch gives none; too many rows cannot be written.
        """
        samples: list[Sample] = []
        taken = passed = 0  # passed: since one was last taken
        while taken < number:
            (conversation,) = self._cursor.take(1)
            found = self._sequences(conversation)
            samples += found
            taken, passed = (taken + 1, 0) if found else (taken, passed + 1)
            if passed >= len(self.source):
                raise UserError(
                    f"data: none of the {passed} conversations of {self.source.name} can be trained on: each asks a "
                    f"held-out question, is longer than {self._max_tokens} tokens (max_length, and the model's "
                    "max_position_embeddings), or cannot be written in this format"
                )
        return samples

    def all(self) -> list[Sample]:
        """The sequences of one pass in the order of the file."""
        return [sample for index in range(len(self.source)) for sample in self._sequences(self.source[index])]

    def metrics(self) -> dict[str, float]:
        """What was passed and left out so far."""
        return {
            "data/epoch": self._cursor.epoch + self._cursor.position / len(self.source),
            "data/held_out_skips": float(self.excluded),
            "data/too_long": float(self.too_long),
            "data/truncated": float(self.truncated),
            "data/bad_rows": float(self.source.bad.count),
        }

    def state(self) -> dict[str, Any]:
        """Where the next conversation comes from, as JSON."""
        counts = {"excluded": self.excluded, "too_long": self.too_long, "truncated": self.truncated}
        return {"cursor": self._cursor.state(), **counts, "unwritable": sorted(self._unwritable)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of the same conversations.

        Raises:
            UserError: they are others.
        """
        self._cursor.restore(state["cursor"])
        self.excluded, self.too_long, self.truncated = (state[key] for key in ("excluded", "too_long", "truncated"))
        self._unwritable = set(state["unwritable"])
        self.source.bad.count = self._read_bad + len(self._unwritable)

    def _sequences(self, conversation: Conversation) -> list[Sample]:
        """Those of one conversation; none where it is left out, which is counted."""
        if self._exclude and any(question_hash(question) in self._exclude for question in conversation.questions):
            self.excluded += 1
            return []
        samples = self._write(conversation)
        if all(len(sample.token_ids) <= self._max_tokens for sample in samples):
            return samples
        cut = [_cut(sample, self._max_tokens) for sample in samples] if self._stage.too_long == "truncate" else []
        kept = [sample for sample in cut if sample is not None]
        self.truncated += bool(kept)
        self.too_long += not kept
        return kept

    def _write(self, conversation: Conversation) -> list[Sample]:
        if conversation.id in self._unwritable:
            return []
        found: list[Sample] = []

        def write() -> None:
            try:
                found.extend(encode_conversation(conversation.messages, self._chat, self._stage.turns))
            except UserError as error:
                raise UserError(f"{conversation.where}: {error}") from error

        if not self.source.bad.passes(write):
            self._unwritable.add(conversation.id)
        return found


def open_batches(
    stage: SftStage, tokenizer: Tokenizer, positions: int, *, seed: int = 0, exclude: frozenset[str] = frozenset()
) -> ConversationBatches:
    """The stage's data, for a model of so many positions."""
    longest = min(stage.max_length, positions)
    return ConversationBatches(stage, stage.data, tokenizer, max_tokens=longest, seed=seed, exclude=exclude)


def open_heldout(stage: SftStage, tokenizer: Tokenizer, positions: int) -> ConversationBatches | None:
    """The held-out conversations, written and left out by the same rules."""
    if stage.heldout is None:
        return None
    return ConversationBatches(stage, stage.heldout, tokenizer, max_tokens=min(stage.max_length, positions))


def questions_of(batches: ConversationBatches | None) -> frozenset[str]:
    """Hashes of every question that they ask."""
    if batches is None:
        return frozenset()
    source = batches.source
    return heldout_ids(question for index in range(len(source)) for question in source[index].questions)


def _cut(sample: Sample, length: int) -> Sample | None:
    """The first `length` tokens, or None where none of them is learned."""
    if len(sample.token_ids) <= length:
        return sample
    mask = (sample.loss_mask or [])[:length]
    if not any(mask):
        return None
    return Sample(token_ids=sample.token_ids[:length], prompt_length=sample.prompt_length, loss_mask=mask)
