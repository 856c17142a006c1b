"""Text to token ids and back, behind one small protocol.

First in the flow: prompts (`data/prompts.py`) and pre-training text are encoded here, completions
are decoded here. `char` and `byte` need no file and give every tag one token, which is what makes
the recipe runnable on a CPU; `huggingface` and `sentencepiece` read local files only.
"""

from __future__ import annotations

import hashlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig

logger = logging.getLogger(__name__)

PAD_ID = 0
EOS_ID = 1
CHARACTERS = "\n" + "".join(chr(code) for code in range(ord(" "), ord("~") + 1))
"""Alphabet of the `char` tokenizer: the newline and printable ASCII."""

PROBE_TEXT = "two  spaces,\na new line: 12+3=15 <think> </think>"
"""What a tokenizer must give back unchanged if format rewards are to see what the model wrote."""

OPENING_TOKEN = r"<\|?(im_start|bos|s|start_of_turn|begin_of_text|start_header_id)\|?>"
"""Tokens that no tokenizer may call its end of sequence."""


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
        return CharTokenizer(config.tags)
    if config.kind == "byte":
        return ByteTokenizer(config.tags)
    path = config.path
    if path is None or not path.exists():
        raise UserError(
            f"tokenizer.path: {str(path)!r} does not exist; kind {config.kind!r} needs a local "
            f"{'folder or tokenizer.json' if config.kind == 'huggingface' else '.model file'} "
            "(nothing is downloaded)"
        )
    if config.kind == "huggingface":
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)


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
                raise ValueError(
                    f"token id {token} is outside the {self.name} vocabulary of {self.vocab_size}"
                )
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
        return described | _ids_info(self) | {"fingerprint": _fingerprint([self.name, *self.tags])}

    @abstractmethod
    def _encode_ordinary(self, text: str, start: int, end: int) -> list[int]:
        """Ids of text[start:end], which holds no tag."""

    @abstractmethod
    def _decode_ordinary(self, symbols: Sequence[int]) -> str:
        """Text of a run of ordinary tokens, counted from `offset`."""


class CharTokenizer(_SymbolTokenizer):
    """One token per character of `CHARACTERS`, one per tag: about 100 tokens."""

    def __init__(self, tags: Sequence[str]) -> None:
        super().__init__("char", tags, len(CHARACTERS))
        self._char_ids = {char: self.offset + i for i, char in enumerate(CHARACTERS)}

    def _encode_ordinary(self, text: str, start: int, end: int) -> list[int]:
        try:
            return [self._char_ids[char] for char in text[start:end]]
        except KeyError:
            at = next(i for i in range(start, end) if text[i] not in self._char_ids)
            raise UserError(
                f"the char tokenizer has no token for {text[at]!r} (U+{ord(text[at]):04X}) at "
                f"position {at} of {_excerpt(text, at)!r}; it knows newline and printable ASCII. "
                'Use tokenizer.kind = "byte" for any other text'
            ) from None

    def _decode_ordinary(self, symbols: Sequence[int]) -> str:
        return "".join([CHARACTERS[symbol] for symbol in symbols])


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


class HuggingFaceTokenizer:
    """A tokenizer.json or a folder that `transformers` can read; nothing is downloaded."""

    def __init__(self, path: Path) -> None:
        self.name = "huggingface"
        self.path = path
        self.backend = _load_huggingface(path)
        self.eos_id = _eos_of(self.backend, path)
        pad = self.backend.pad_token_id
        self.pad_id = self.eos_id if pad is None else int(pad)
        self.vocab_size = max(self.backend.get_vocab().values()) + 1
        bos = self.backend.bos_token_id
        prepends = bos is not None and list(self.backend("1")["input_ids"])[:1] == [bos]
        self.bos_id: int | None = int(bos) if prepends else None
        _warn_if_lossy(self, path)

    def encode(self, text: str) -> list[int]:
        """Ids of the text without special tokens around it."""
        return list(self.backend.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without eos and padding; other special tokens (`<think>`) stay."""
        kept = [token for token in ids if token not in (self.eos_id, self.pad_id)]
        text: str = self.backend.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def info(self) -> dict[str, Any]:
        """Kind, path, sizes and the fingerprint of the whole vocabulary."""
        vocabulary = (
            f"{token}\t{index}" for token, index in sorted(self.backend.get_vocab().items())
        )
        described: dict[str, Any] = {"kind": self.name, "path": str(self.path)}
        return described | _ids_info(self) | {"fingerprint": _fingerprint(vocabulary)}


class SentencePieceTokenizer:
    """A sentencepiece `.model` file.

    A model may put a dummy space before the text it encodes and drop it again when decoding. Train
    with normalization_rule_name="identity" and remove_extra_whitespaces=False, or text is changed.
    """

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise UserError(
                'tokenizer.kind = "sentencepiece" needs the library of that name: '
                "pip install sentencepiece"
            ) from error
        self.name = "sentencepiece"
        self.path = path
        try:
            self.backend = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, TypeError) as error:
            raise UserError(
                f"tokenizer.path: {path} is not a sentencepiece model: {error}"
            ) from error
        self.vocab_size = int(self.backend.vocab_size())
        self.eos_id = int(self.backend.eos_id())
        if self.eos_id < 0:
            raise UserError(
                f"tokenizer.path: {path} has no end-of-sequence piece, so no completion could ever "
                "end; train the model with an eos_id (the default is 2)"
            )
        pad, bos = int(self.backend.pad_id()), int(self.backend.bos_id())
        self.pad_id = pad if pad >= 0 else self.eos_id
        self.bos_id: int | None = bos if bos >= 0 else None
        _warn_if_lossy(self, path)

    def encode(self, text: str) -> list[int]:
        """Ids of the text without bos and eos."""
        return list(self.backend.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids without eos and padding."""
        text: str = self.backend.decode([i for i in ids if i not in (self.eos_id, self.pad_id)])
        return text

    def info(self) -> dict[str, Any]:
        """Kind, path, sizes and the fingerprint of the model file."""
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]
        described: dict[str, Any] = {"kind": self.name, "path": str(self.path)}
        return described | _ids_info(self) | {"fingerprint": digest}


def _load_huggingface(path: Path) -> Any:
    """The `transformers` tokenizer of a folder, or of a tokenizer.json with what lies beside it."""
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise UserError(
            'tokenizer.kind = "huggingface" needs the library transformers: '
            "pip install transformers"
        ) from error
    folder = path if path.is_dir() else path.parent
    try:
        if path.is_dir() or (
            path.name == "tokenizer.json" and (folder / "tokenizer_config.json").exists()
        ):
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # transformers and tokenizers raise bare Exception for a broken file
        raise UserError(
            f"tokenizer.path: {path} cannot be read as a Hugging Face tokenizer "
            f"({type(error).__name__}: {error}); give a folder with tokenizer.json and "
            "tokenizer_config.json, or one tokenizer.json"
        ) from error


def _eos_of(backend: Any, path: Path) -> int:
    """The end-of-sequence id, refused where missing or where it plainly opens a turn."""
    token = backend.eos_token
    if token is None or backend.eos_token_id is None:
        raise UserError(
            f"tokenizer.path: {path} names no end-of-sequence token, so no completion could ever "
            'end; put a tokenizer_config.json with "eos_token" beside tokenizer.json'
        )
    # Read from a GGUF file, eos comes out as <|im_start|>: no completion would ever end.
    if re.fullmatch(OPENING_TOKEN, token):
        raise UserError(
            f"tokenizer.path: {path} names {token!r} as its end-of-sequence token, but that one "
            "opens a text or a turn (tokenizers converted from GGUF have this fault); set "
            '"eos_token" in its tokenizer_config.json, for instance to "<|im_end|>"'
        )
    return int(backend.eos_token_id)


def _warn_if_lossy(tokenizer: Tokenizer, path: Path) -> None:
    got = tokenizer.decode(tokenizer.encode(PROBE_TEXT))
    if got != PROBE_TEXT:
        logger.warning(
            "tokenizer %s changes text: %r comes back as %r; format rewards see the changed text",
            path,
            PROBE_TEXT,
            got,
        )


def _check_tags(tags: Sequence[str]) -> None:
    for i, tag in enumerate(tags):
        if len(tag) < 2:
            raise UserError(
                f"tokenizer.tags: {tag!r} is too short; a tag has two characters or more, as in "
                "'<think>'"
            )
        if tag in tags[:i]:
            raise UserError(f"tokenizer.tags: {tag!r} is given twice; name each tag once")


def _ids_info(tokenizer: Tokenizer) -> dict[str, Any]:
    fields = ("vocab_size", "eos_id", "pad_id", "bos_id")
    return {field: getattr(tokenizer, field) for field in fields}


def _fingerprint(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", errors="surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def _excerpt(text: str, at: int) -> str:
    return text[max(0, at - 20) : at + 20]
