"""A small Hugging Face tokenizer with the chat templates that the tests of chat formats need."""

from __future__ import annotations

import json
from pathlib import Path

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"]  # noqa: RUF001

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Qwen3's: only the last answer has its thought, and always has one.
FORGETFUL = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}"
    "{% set thought = '' %}"
    "{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}{% endif %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ said + '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As DeepSeek-R1's: every answer loses its thought, and the answer to come has its beginning in the prompt.
SAMPLING_ONLY = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}"  # noqa: RUF001
    "{% if m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '</s>' }}{% endif %}"  # noqa: RUF001
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"  # noqa: RUF001
)
DELETING = SAMPLING_ONLY.replace("<think>\\n", "")
ENDLESS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REFUSING = "{{ raise_exception('roles must be nice') }}"


def write_tokenizer(folder: Path, template: str | None, bos: bool = False) -> Path:
    """A byte-level tokenizer without merges: every special token one id, every other byte one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    thoughts = ("<think>", "</think>")
    backend.add_special_tokens([token for token in SPECIAL if token not in thoughts])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in thoughts])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
