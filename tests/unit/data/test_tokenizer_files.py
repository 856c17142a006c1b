"""The files of a built-in tokenizer read back by transformers: the same ids for the same text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from megatron_r1.data.tokenizer_files import EOS, write_tokenizer_files
from megatron_r1.data.tokenizers import CHARACTERS, ByteTokenizer, CharTokenizer

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
CHAR = CharTokenizer(TAGS, "计算首先")
BYTE = ByteTokenizer(TAGS)
PIECES = [*TAGS, "  ", "\n", " \n\n ", "计算", "first 5-6=-1;", "<", "think>"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for tokenizer in (CHAR, BYTE):
        found[tokenizer.name] = tmp_path_factory.mktemp(tokenizer.name)
        write_tokenizer_files(tokenizer, found[tokenizer.name])
    return found


@pytest.mark.parametrize("ours", [CHAR, BYTE], ids=lambda tokenizer: tokenizer.name)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_ids_and_text_are_the_same(
    ours: CharTokenizer | ByteTokenizer, folders: dict[str, Path], data: st.DataObject
) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(folders[ours.name])
    alphabet = st.sampled_from(CHARACTERS + "计算首先") if ours is CHAR else st.characters(exclude_categories=["Cs"])
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES) | st.text(alphabet, max_size=8), max_size=8)))
    ids = ours.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text == ours.decode(ids)


@pytest.mark.parametrize("ours", [CHAR, BYTE], ids=lambda tokenizer: tokenizer.name)
def test_special_ids(ours: CharTokenizer | ByteTokenizer, folders: dict[str, Path]) -> None:
    theirs = AutoTokenizer.from_pretrained(folders[ours.name])
    assert (theirs.pad_token_id, theirs.eos_token_id, len(theirs)) == (0, 1, ours.vocab_size)
    assert theirs.decode([ours.encode("5")[0], 1], skip_special_tokens=True) == "5"
    assert theirs(EOS)["input_ids"] == [1]
    assert GenerationConfig.from_pretrained(folders[ours.name]).eos_token_id == 1


def test_which_models_autotokenizer_reads_them_for(folders: dict[str, Path], tmp_path: Path) -> None:
    """If this changes for qwen2, the export stage need not warn any more."""
    found = {}
    for model_type in ("deepseek_v3", "llama", "qwen2", "qwen3", "qwen3_moe"):
        folder = shutil.copytree(folders["char"], tmp_path / model_type)
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        found[model_type] = AutoTokenizer.from_pretrained(folder)("compute 5-6=?")["input_ids"]
    right = CHAR.encode("compute 5-6=?")
    assert {model_type for model_type, ids in found.items() if ids != right} == {"qwen2"}
