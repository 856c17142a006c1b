"""The built-in tokenizers as the files of a Hugging Face tokenizer: for the export of a model trained on them.

Last in the flow of an `export` stage: transformers, SGLang and vLLM then read the model with its text.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megatron_r1.data.tokenizers import ByteTokenizer, CharTokenizer

PAD, EOS = "<|pad|>", "<|end|>"
"""How the two ids that stand for no text are spelled in the files."""


def write_tokenizer_files(tokenizer: CharTokenizer | ByteTokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json, the latter with the ids that end a text.

    transformers' PreTrainedTokenizerFast gives the same ids for every text that the tokenizer can encode, tags
    included; padding and end of sequence are special tokens, tags are not. AutoTokenizer does, too, except beside a
    config.json of model_type "qwen2", which transformers 5 reads with Qwen2Tokenizer whatever the files say.
    """
    vocab = {PAD: tokenizer.pad_id, EOS: tokenizer.eos_id} | {tag: 2 + i for i, tag in enumerate(tokenizer.tags)}
    if isinstance(tokenizer, CharTokenizer):
        vocab |= {char: tokenizer.offset + i for i, char in enumerate(tokenizer.characters)}
        backend = Backend(models.WordLevel(vocab, unk_token=PAD))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    else:
        vocab |= {_byte_char(byte): tokenizer.offset + byte for byte in range(256)}
        backend = Backend(models.BPE(vocab, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(PAD, normalized=False), AddedToken(EOS, normalized=False)])
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in tokenizer.tags])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    for name, content in (("tokenizer_config.json", settings), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _byte_char(byte: int) -> str:
    """The character that byte-level vocabularies write a byte as: itself where it is printable, else U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + [b for b in range(256) if b not in printable].index(byte))
