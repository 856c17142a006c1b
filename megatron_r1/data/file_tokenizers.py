"""Tokenizers that are files: Hugging Face's and sentencepiece's. Nothing is ever downloaded.

The second half of `data/tokenizers.py`, whose protocol they fill. Each library is imported by the
one tokenizer that needs it, and its absence names the package to install.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.data.tokenizers import Tokenizer, fingerprint, ids_info

logger = logging.getLogger(__name__)

PROBE_TEXT = "two  spaces,\na new line: 12+3=15 <think> </think>"
"""What a tokenizer must give back unchanged if format rewards are to see what the model wrote."""
OPENING_TOKEN = r"<\|?(im_start|bos|s|start_of_turn|begin_of_text|start_header_id)\|?>"
"""Tokens that no tokenizer may call its end of sequence."""


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
        text: str = self.backend.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def render_chat(self, messages: list[dict[str, str]], answering: bool) -> str:
        """The text that the chat template makes of {role, content} messages; answering: up to the next answer.

        Raises:
            UserError: the template refuses them.
        """
        try:
            from jinja2 import TemplateError
        except ImportError as error:
            raise UserError("chat templates need the library jinja2: pip install jinja2") from error
        try:
            text = self.backend.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(f"the chat template of {self.path} refuses the roles {roles}: {error}") from error
        return str(text)

    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens: end of sequence, ends of turns and the like."""
        added = self.backend.added_tokens_decoder.items()
        return frozenset([self.eos_id, *(index for index, token in added if token.special)])

    def info(self) -> dict[str, Any]:
        """Kind, path, sizes and the fingerprint of the whole vocabulary."""
        vocabulary = (f"{token}\t{index}" for token, index in sorted(self.backend.get_vocab().items()))
        described: dict[str, Any] = {"kind": self.name, "path": str(self.path)}
        return described | ids_info(self) | {"fingerprint": fingerprint(vocabulary)}


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
                'tokenizer.kind = "sentencepiece" needs the library of that name: pip install sentencepiece'
            ) from error
        self.name = "sentencepiece"
        self.path = path
        try:
            self.backend = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, TypeError) as error:
            raise UserError(f"tokenizer.path: {path} is not a sentencepiece model: {error}") from error
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
        return described | ids_info(self) | {"fingerprint": digest}


def _load_huggingface(path: Path) -> Any:
    """The `transformers` tokenizer of a folder, or of a tokenizer.json with what lies beside it."""
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError as error:
        raise UserError(
            'tokenizer.kind = "huggingface" needs the library transformers: pip install transformers'
        ) from error
    folder = path if path.is_dir() else path.parent
    try:
        if path.is_dir() or (path.name == "tokenizer.json" and (folder / "tokenizer_config.json").exists()):
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
