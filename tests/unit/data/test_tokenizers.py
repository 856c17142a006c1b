"""Round trips by value, ids by hand, and the text of every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.data.templates import TEMPLATES
from megatron_r1.data.tokenizers import CHARACTERS, Tokenizer, build_tokenizer, encode_prompt

TEXTS = [
    "",
    "5-6+9=?",
    "<think>5-6=-1;-1+9=8</think><answer>8</answer>",
    'A < B & "quoted" {x} \\boxed{42}\n\n  two spaces, <thin> and </answer',
    *(text for text in TEMPLATES.values() if text.isascii()),  # DeepSeek's marks are tokens of their own
]


def char() -> Tokenizer:
    return build_tokenizer(TokenizerConfig(kind="char"))


def byte(tags: list[str] | None = None) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(kind="byte", **({} if tags is None else {"tags": tags})))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("make", [char, byte])
def test_symbol_round_trip(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(2 <= token < tokenizer.vocab_size for token in ids)


def test_char_ids_by_hand() -> None:
    # pad 0, eos 1, tags 2-5, newline 6, space 7, then ASCII in order, so "0" is 7 + 48 - 32.
    assert char().encode("<answer>0\n9 </answer>") == [4, 23, 6, 32, 7, 5]
    assert char().vocab_size == 2 + 4 + 1 + 95 == 102
    assert len(set(CHARACTERS)) == len(CHARACTERS) == 96
    assert (char().pad_id, char().eos_id, char().bos_id) == (0, 1, None)


def test_byte_ids_by_hand() -> None:
    tokenizer = byte(["<think>"])
    assert tokenizer.vocab_size == 2 + 1 + 256
    assert tokenizer.encode("A<think>é") == [3 + 65, 2, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("因为 12 🙂 ok")) == "因为 12 🙂 ok"
    assert tokenizer.decode([3 + 0xC3]) == "\ufffd"  # a sampled half of a character


def test_decode_skips_eos_and_padding_anywhere() -> None:
    tokenizer = byte()
    accented = tokenizer.encode("é")
    assert tokenizer.decode([0, accented[0], 1, accented[1], 1, 0, 0]) == "é"


def test_decode_refuses_ids_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="token id 102 is outside the char vocabulary of 102"):
        char().decode([5, 102])
    with pytest.raises(ValueError, match="token id -1 is outside"):
        char().decode([-1])


def test_longest_tag_wins_whatever_their_order() -> None:
    for tags in (["<a", "<a>"], ["<a>", "<a"]):
        tokenizer = byte(tags)
        assert tokenizer.encode("<a>") == [2 + tags.index("<a>")]
        assert tokenizer.encode("<a<a>") == [2 + tags.index("<a"), 2 + tags.index("<a>")]


def test_no_tags() -> None:
    assert byte([]).encode("<t") == [2 + ord("<"), 2 + ord("t")]


def test_char_names_the_unknown_character_and_its_position() -> None:
    with pytest.raises(UserError) as caught:
        char().encode("<think>x = é")
    text = str(caught.value)
    assert "'é' (U+00E9) at position 11" in text
    assert 'tokenizer.kind = "byte"' in text


def test_byte_refuses_half_a_surrogate_pair() -> None:
    with pytest.raises(UserError, match=r"'\\ud800' at position 8"):
        byte().encode("<think>a\ud800")


@pytest.mark.parametrize(
    ("tags", "message"),
    [(["x"], "'x' is too short"), (["<t>", "<t>"], "'<t>' is given twice"), ([""], "too short")],
)
def test_bad_tags(tags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tokenizer(TokenizerConfig(kind="char", tags=tags))


def test_info_is_json_and_tells_vocabularies_apart() -> None:
    infos = [char().info(), byte().info(), byte(["<think>"]).info()]
    assert json.loads(json.dumps(infos)) == infos
    assert len({info["fingerprint"] for info in infos}) == 3
    assert char().info() == infos[0]
    assert infos[0]["vocab_size"] == 102


def test_missing_path(tmp_path: Path) -> None:
    config = TokenizerConfig(kind="huggingface", path=tmp_path / "none")
    with pytest.raises(UserError, match="none' does not exist; kind 'huggingface' needs a local"):
        build_tokenizer(config)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with <s> prepended by default, digits split, tags as tokens."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>", "<think>", "</think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the sum of the terms is so and so"] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("hf")
    backend.save(str(folder / "tokenizer.json"))
    return folder


def write_config(folder: Path, target: Path, **keys: Any) -> Path:
    target.mkdir()
    (target / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **keys}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def huggingface(path: Path) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(kind="huggingface", path=path))


def test_huggingface_round_trip_ids_and_bos(hf_folder: Path, tmp_path: Path) -> None:
    folder = write_config(hf_folder, tmp_path / "t", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = huggingface(path)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
        saved = json.loads((folder / "tokenizer.json").read_text())
        assert tokenizer.vocab_size == len(saved["model"]["vocab"]) > 256 + 5
        for text in [*TEXTS, "因为 12 🙂"]:
            assert tokenizer.decode(tokenizer.encode(text)) == text
        # Neither bos nor eos is added, the tag stays one token, eos and padding vanish.
        ids = tokenizer.encode("<think>12</think>")
        assert ids[0] == 3 and ids[-1] == 4 and len(ids) == 4
        assert tokenizer.decode([*ids, 1, 2, 2]) == "<think>12</think>"
        assert encode_prompt(tokenizer, "12") == [0, *ids[1:3]]


def test_huggingface_without_bos_by_default(hf_folder: Path, tmp_path: Path) -> None:
    """A bos token that the tokenizer itself never prepends is not ours to prepend either."""
    folder = write_config(hf_folder, tmp_path / "t", bos_token="<pad>", eos_token="</s>")
    tokenizer = huggingface(folder)
    assert tokenizer.bos_id is None
    assert tokenizer.pad_id == tokenizer.eos_id == 1
    assert encode_prompt(tokenizer, "ab") == tokenizer.encode("ab")


def test_huggingface_without_eos(hf_folder: Path) -> None:
    with pytest.raises(UserError, match="names no end-of-sequence token") as caught:
        huggingface(hf_folder / "tokenizer.json")
    assert "tokenizer_config.json" in str(caught.value)


def test_huggingface_gguf_eos_trap(hf_folder: Path, tmp_path: Path) -> None:
    folder = write_config(hf_folder, tmp_path / "t", eos_token="<s>")
    with pytest.raises(UserError, match="'<s>' as its end-of-sequence token") as caught:
        huggingface(folder)
    assert "GGUF" in str(caught.value)


def test_huggingface_broken_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as a Hugging Face tokenizer"):
        huggingface(tmp_path / "tokenizer.json")


@pytest.fixture(scope="module")
def sp_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sp")
    text = [f"the sum of {i} and {i * 7 % 13} is so and so" for i in range(200)]
    for name, extra in {
        "exact": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        "lossy": {},
        "endless": {"eos_id": -1},
    }.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_prefix=str(folder / name),
            vocab_size=300,
            byte_fallback=True,
            split_digits=True,
            minloglevel=2,
            user_defined_symbols=["<think>", "</think>"],
            model_type="bpe",
            **extra,
        )
    return folder


def test_sentencepiece_round_trip(sp_folder: Path) -> None:
    config = TokenizerConfig(kind="sentencepiece", path=sp_folder / "exact.model")
    tokenizer = build_tokenizer(config)
    for text in [*TEXTS, "因为 12 🙂"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.decode([*tokenizer.encode("so"), 2, 2]) == "so"
    assert encode_prompt(tokenizer, "so") == [1, *tokenizer.encode("so")]
    assert tokenizer.vocab_size == 300


def test_sentencepiece_says_when_it_changes_text(sp_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_tokenizer(TokenizerConfig(kind="sentencepiece", path=sp_folder / "exact.model"))
    assert not caplog.records
    build_tokenizer(TokenizerConfig(kind="sentencepiece", path=sp_folder / "lossy.model"))
    assert "changes text" in caplog.text


def test_sentencepiece_refusals(sp_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no end-of-sequence piece"):
        build_tokenizer(TokenizerConfig(kind="sentencepiece", path=sp_folder / "endless.model"))
    bad = tmp_path / "bad.model"
    bad.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        build_tokenizer(TokenizerConfig(kind="sentencepiece", path=bad))


def test_further_characters_of_the_char_tokenizer() -> None:
    more = build_tokenizer(TokenizerConfig(kind="char", characters="计算é"))
    assert more.vocab_size == 102 + 3
    text = "<think>计算 5é</think>"
    assert more.encode(text) == [2, 102, 103, 7, 28, 104, 3]  # the alphabet's own ids stay
    assert more.decode(more.encode(text)) == text
    assert more.info()["characters"] == "计算é"
    others = [char(), build_tokenizer(TokenizerConfig(kind="char", characters="算计é"))]
    assert len({tokenizer.info()["fingerprint"] for tokenizer in [more, *others]}) == 3
    with pytest.raises(UserError, match=r"tokenizer\.characters adds"):
        more.encode("所")


def test_without_further_characters_the_vocabulary_is_what_it_was() -> None:
    """Checkpoints compare fingerprints."""
    assert char().info()["fingerprint"] == "0fba365c5393d817" and "characters" not in char().info()
    assert byte().info()["fingerprint"] == "bd8b0ed630573a4a"


@pytest.mark.parametrize("characters", ["所所", "5", "\n"])
def test_a_character_may_not_be_given_twice(characters: str) -> None:
    with pytest.raises(UserError, match="is there already"):
        build_tokenizer(TokenizerConfig(kind="char", characters=characters))


def test_further_characters_are_for_char_alone() -> None:
    with pytest.raises(ValueError, match="characters extends the alphabet"):
        TokenizerConfig(kind="byte", characters="é")
