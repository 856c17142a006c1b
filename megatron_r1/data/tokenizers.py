"""Text to token ids and back, behind one small protocol.

First in the flow: prompts (`data/prompts.py`) and pre-training text are encoded here, completions
are decoded here. `char` and `byte` need no file and give every tag one token, which is what makes
the recipe runnable on a CPU; `huggingface` and `sentencepiece` are in `data/file_tokenizers.py`.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig

PAD_ID = 0
EOS_ID = 1
CHARACTERS = "\n" + "".join(chr(code) for code in range(ord(" "), ord("~") + 1))
"""Alphabet of the `char` tokenizer: the newline and printable ASCII."""


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    name: str
    vocab_size: int  # every id is below this; the model may pad its embedding further
    eos_id: int
    pad_id: int  # equal to eos_id where the vocabulary has no padding token
    bos_id: int | None  # put before every sequence; None: the model is used without one

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: neither bos nor eos is added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; eos and padding are skipped."""
        ...

    def info(self) -> dict[str, Any]:
        """What a checkpoint records, as JSON; `fingerprint` differs where the vocabulary does."""
        ...


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of a `[tokenizer]` table.

    Raises:
        UserError: bad tags, a missing or unreadable file or library, no end-of-sequence token.
    """
    if config.kind == "char":
        return CharTokenizer(config.tags, config.characters)
    if config.kind == "byte":
        return ByteTokenizer(config.tags)
    path = config.path
    if path is None or not path.exists():
        raise UserError(
            f"tokenizer.path: {str(path)!r} does not exist; kind {config.kind!r} needs a local "
            f"{'folder or tokenizer.json' if config.kind == 'huggingface' else '.model file'} "
            "(nothing is downloaded)"
        )
    from megatron_r1.data import file_tokenizers  # builds on this module, so only now

    if config.kind == "huggingface":
        return file_tokenizers.HuggingFaceTokenizer(path)
    return file_tokenizers.SentencePieceTokenizer(path)


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids that start a sequence: bos where the tokenizer has one, then the text."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(text)


class _SymbolTokenizer(ABC):
    """pad = 0, eos = 1, then the tags, then `symbols` ordinary tokens that a subclass maps."""

    bos_id: int | None = None

    def __init__(self, name: str, tags: Sequence[str], symbols: int) -> None:
        _check_tags(tags)
        self.name = name
        self.pad_id = PAD_ID
        self.eos_id = EOS_ID
        self.tags = list(tags)
        self.offset = 2 + len(self.tags)  # id of the first ordinary token
        self.vocab_size = self.offset + symbols
        self._tag_ids = {tag: 2 + i for i, tag in enumerate(self.tags)}
        # Longest first: a tag may start with another. Without tags: a pattern that never matches.
        by_length = sorted(self.tags, key=len, reverse=True)
        self._tag_pattern = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")

    def encode(self, text: str) -> list[int]:
        """Ids of the text, each tag one id.

        Raises:
            UserError: a character that the alphabet lacks, with its position.
        """
        ids: list[int] = []
        done = 0
        for match in self._tag_pattern.finditer(text):
            ids += self._encode_ordinary(text, done, match.start())
            ids.append(self._tag_ids[match.group()])
            done = match.end()
        return ids + self._encode_ordinary(text, done, len(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without eos and padding.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        parts: list[str] = []
        ordinary: list[int] = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the {self.name} vocabulary of {self.vocab_size}")
            if token >= self.offset:
                ordinary.append(token - self.offset)
                continue
            if token not in (PAD_ID, EOS_ID):
                parts.append(self._decode_ordinary(ordinary))
                parts.append(self.tags[token - 2])
                ordinary = []
        return "".join([*parts, self._decode_ordinary(ordinary)])

    def info(self) -> dict[str, Any]:
        """Kind, tags, sizes and fingerprint."""
        described: dict[str, Any] = {"kind": self.name, "tags": list(self.tags)}
        return described | ids_info(self) | {"fingerprint": fingerprint([self.name, *self.tags])}

    @abstractmethod
    def _encode_ordinary(self, text: str, start: int, end: int) -> list[int]:
        """Ids of text[start:end], which holds no tag."""

    @abstractmethod
    def _decode_ordinary(self, symbols: Sequence[int]) -> str:
        """Text of a run of ordinary tokens, counted from `offset`."""


class CharTokenizer(_SymbolTokenizer):
    """One token per character of `CHARACTERS` and of `more`, one per tag: about 100 tokens.

    Raises UserError if `more` repeats a character.
    """

    def __init__(self, tags: Sequence[str], more: str = "") -> None:
        for i, char in enumerate(more):
            if char in CHARACTERS or char in more[:i]:
                raise UserError(
                    f"tokenizer.characters: {char!r} is there already; name each further character once, newline and "
                    "printable ASCII never"
                )
        self.more = more
        self.characters = CHARACTERS + more
        super().__init__("char", tags, len(self.characters))
        self._char_ids = {char: self.offset + i for i, char in enumerate(self.characters)}

    def info(self) -> dict[str, Any]:
        """Those of the alphabet and, where it was extended, by what."""
        if not self.more:
            return super().info()
        extended = {
            "characters": self.more,
            "fingerprint": fingerprint([self.name, *self.tags, "characters", self.more]),
        }
        return super().info() | extended

    def _encode_ordinary(self, text: str, start: int, end: int) -> list[int]:
        try:
            return [self._char_ids[char] for char in text[start:end]]
        except KeyError:
            at = next(i for i in range(start, end) if text[i] not in self._char_ids)
            raise UserError(
                f"the char tokenizer has no token for {text[at]!r} (U+{ord(text[at]):04X}) at "
                f"position {at} of {_excerpt(text, at)!r}; it knows newline, printable ASCII and what "
                'tokenizer.characters adds. Add it there, or use tokenizer.kind = "byte" for any text'
            ) from None

    def _decode_ordinary(self, symbols: Sequence[int]) -> str:
        return "".join([self.characters[symbol] for symbol in symbols])


class ByteTokenizer(_SymbolTokenizer):
    """One token per UTF-8 byte, one per tag: any text at all, 258 tokens and the tags."""

    def __init__(self, tags: Sequence[str]) -> None:
        super().__init__("byte", tags, 256)

    def _encode_ordinary(self, text: str, start: int, end: int) -> list[int]:
        try:
            return [self.offset + byte for byte in text[start:end].encode("utf-8")]
        except UnicodeEncodeError as error:
            at = start + error.start
            raise UserError(
                f"the byte tokenizer cannot encode {text[at]!r} at position {at} of "
                f"{_excerpt(text, at)!r}: half of a surrogate pair is no character; mend the text"
            ) from error

    def _decode_ordinary(self, symbols: Sequence[int]) -> str:
        # Sampled bytes need not be UTF-8; verifiers then see the replacement character.
        return bytes(symbols).decode("utf-8", errors="replace")


def _check_tags(tags: Sequence[str]) -> None:
    for i, tag in enumerate(tags):
        if len(tag) < 2:
            raise UserError(f"tokenizer.tags: {tag!r} is too short; a tag has two characters or more, as in '<think>'")
        if tag in tags[:i]:
            raise UserError(f"tokenizer.tags: {tag!r} is given twice; name each tag once")


def ids_info(tokenizer: Tokenizer) -> dict[str, Any]:
    """The size and special ids of a tokenizer, for its `info`."""
    fields = ("vocab_size", "eos_id", "pad_id", "bos_id")
    return {field: getattr(tokenizer, field) for field in fields}


def fingerprint(parts: Iterable[str]) -> str:
    """16 hex digits of a vocabulary."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", errors="surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def _excerpt(text: str, at: int) -> str:
    return text[max(0, at - 20) : at + 20]
