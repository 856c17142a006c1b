"""Each source gives the same prompts by value; each broken one says what is wrong and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.data.cursor import PromptCursor
from megatron_r1.data.generators import build_task, problem_at
from megatron_r1.data.prompts import PromptSource, PromptStream, open_prompts
from megatron_r1.data.templates import render
from megatron_r1.data.tokenizers import Tokenizer, build_tokenizer

ROWS = [{"question": f"{i}+{i}=?", "answer": f"add\n#### {2 * i}", "level": i} for i in range(12)]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the `datasets` cache of these tests out of the user's home."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer(TokenizerConfig(kind="char"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same rows in every format."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("files")
    lines = [json.dumps(row) for row in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet")
    parts = folder / "parts"
    parts.mkdir()
    (parts / "a.jsonl").write_text("\n".join(lines[:5]) + "\n")
    (parts / "b.jsonl").write_text("\n".join(lines[5:]) + "\n")
    (parts / "README.md").write_text("not data")
    csv = ["question,answer,level"] + [f"{i}+{i}=?,{2 * i},{i}" for i in range(12)]
    (folder / "rows.csv").write_text("\n".join(csv))
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(folder / "saved"))
    both = datasets.DatasetDict({"train": saved, "test": saved.select(range(3))})
    both.save_to_disk(str(folder / "splits"))
    return {path.name: path for path in folder.iterdir()}


def config(source: Any, path: Path | None = None, **keys: Any) -> PromptsConfig:
    return PromptsConfig(source=source, path=path, **{"template": "plain", **keys})


def check_rows(prompts: list[Any], name: str, tokenizer: Tokenizer) -> None:
    assert [prompt.id for prompt in prompts] == [f"{name}:{i}" for i in range(12)]
    assert [prompt.question for prompt in prompts] == [f"{i}+{i}=?" for i in range(12)]
    assert [prompt.answer for prompt in prompts] == [str(2 * i) for i in range(12)]
    assert [prompt.metadata for prompt in prompts] == [{"level": i} for i in range(12)]
    assert {prompt.verifier for prompt in prompts} == {"math"}
    for prompt in prompts:
        assert prompt.text == prompt.question
        assert prompt.token_ids == tokenizer.encode(prompt.text) != []


@pytest.mark.parametrize(
    ("source", "name", "options"),
    [
        ("jsonl", "rows.jsonl", {}),
        ("parquet", "rows.parquet", {}),
        ("datasets", "rows.jsonl", {}),
        ("datasets", "rows.parquet", {}),
        ("datasets", "rows.csv", {}),
        ("datasets", "parts", {}),
        ("datasets", "saved", {}),
        ("datasets", "splits", {"split": "train"}),
    ],
)
def test_files_by_index(
    files: dict[str, Path], tokenizer: Tokenizer, source: str, name: str, options: dict[str, Any]
) -> None:
    prompts = open_prompts(config(source, files[name], options=options), tokenizer)
    assert isinstance(prompts, PromptSource)
    assert len(prompts) == 12
    backwards = [prompts[index] for index in reversed(range(12))]  # any order of access
    check_rows(backwards[::-1], name, tokenizer)
    with pytest.raises(IndexError, match="prompt 12 of"):
        prompts[12]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv", "parts", "saved"])
def test_streaming_in_order(files: dict[str, Path], tokenizer: Tokenizer, name: str) -> None:
    prompts = open_prompts(config("datasets", files[name], options={"streaming": True}), tokenizer)
    assert isinstance(prompts, PromptStream) and not isinstance(prompts, PromptSource)
    check_rows(list(prompts.stream(0, None)), name, tokenizer)
    check_rows(PromptCursor(prompts, False, 0).take(24)[12:], name, tokenizer)  # and the 2nd epoch


@pytest.mark.parametrize("buffer", [1, 4, 100])
def test_streaming_shuffles_and_resumes(files: dict[str, Path], tokenizer: Tokenizer, buffer: int) -> None:
    options = {"streaming": True, "shuffle_buffer": buffer}
    source = open_prompts(config("datasets", files["parts"], options=options), tokenizer)
    assert isinstance(source, PromptStream)
    whole = PromptCursor(source, True, 5)
    everything = [prompt.id for prompt in whole.take(24)]
    epochs = [everything[:12], everything[12:]]
    in_order = [f"parts:{i}" for i in range(12)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(in_order)
        # A prompt cannot come before the buffer has reached it.
        assert all(int(name[6:]) < place + buffer for place, name in enumerate(epoch))
    if buffer == 1:
        assert epochs == [in_order, in_order]
    else:
        assert epochs[0] != epochs[1] and in_order not in epochs
    for cut in range(25):
        first = PromptCursor(source, True, 5)
        first.take(cut)
        second = PromptCursor(source, True, 5)
        second.restore(first.state())
        assert [prompt.id for prompt in second.take(24 - cut)] == everything[cut:]


def test_size_is_an_upper_bound(files: dict[str, Path], tokenizer: Tokenizer) -> None:
    for source, name in (("jsonl", "rows.jsonl"), ("parquet", "rows.parquet")):
        for size, length in ((5, 5), (99, 12)):
            prompts = open_prompts(config(source, files[name], size=size), tokenizer)
            assert isinstance(prompts, PromptSource) and len(prompts) == length
    options = {"streaming": True}
    stream = open_prompts(config("datasets", files["saved"], size=5, options=options), tokenizer)
    assert isinstance(stream, PromptStream)
    assert sorted(one.id for one in stream.stream(0, 1)) == [f"saved:{i}" for i in range(5)]


def test_the_only_split_needs_no_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import datasets

    one = datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})
    one.save_to_disk(str(tmp_path / "one"))
    prompts = open_prompts(config("datasets", tmp_path / "one"), tokenizer)
    assert isinstance(prompts, PromptSource) and len(prompts) == 12


def test_jsonl_with_bom_blank_lines_crlf_and_unicode(tmp_path: Path) -> None:
    byte = build_tokenizer(TokenizerConfig(kind="byte"))
    path = tmp_path / "odd.jsonl"
    lines = ['{"question": "因为 1?", "answer": "1"}', "", '{"question": "b", "answer": 2}', " "]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    prompts = open_prompts(config("jsonl", path), byte)
    assert isinstance(prompts, PromptSource)
    assert [(prompts[i].question, prompts[i].answer) for i in range(len(prompts))] == [
        ("因为 1?", "1"),
        ("b", "2"),
    ]


def test_generator(tokenizer: Tokenizer) -> None:
    keys: dict[str, Any] = {"task": "chain_sum", "options": {"terms": 3}, "seed": 7, "size": 9}
    prompts = open_prompts(config("generator", template="r1-zero", **keys), tokenizer)
    assert isinstance(prompts, PromptSource) and len(prompts) == 9
    task = build_task("chain_sum", {"terms": 3})
    for index in (8, 0, 4):
        problem = problem_at(task, 7, index)
        prompt = prompts[index]
        assert prompt.id == f"chain_sum@7:{index}"
        assert (prompt.question, prompt.answer, prompt.metadata) == problem
        assert prompt.verifier == "integer"
        assert prompt.text == render("r1-zero", problem.question)
        assert prompt.token_ids == tokenizer.encode(prompt.text)


def test_generator_defaults_and_own_verifier(tokenizer: Tokenizer) -> None:
    prompts = open_prompts(config("generator", task="chain_sum", verifier="math"), tokenizer)
    assert isinstance(prompts, PromptSource)
    assert len(prompts) == 100_000 and prompts[99_999].verifier == "math"


def test_bos_starts_a_prompt() -> None:
    class WithBos:
        name, vocab_size, eos_id, pad_id, bos_id = "own", 9, 1, 0, 7

        def encode(self, text: str) -> list[int]:
            return [3] * len(text)

        def decode(self, ids: Any) -> str:
            return ""

        def info(self) -> dict[str, Any]:
            return {}

    prompts = open_prompts(config("generator", task="chain_sum", options={"terms": 2}), WithBos())
    assert isinstance(prompts, PromptSource)
    assert prompts[0].token_ids == [7, 3, 3, 3, 3, 3]


def test_unencodable_prompt_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "zh.jsonl"
    path.write_text('{"question": "1 因 2", "answer": "1"}', encoding="utf-8")
    prompts = open_prompts(config("jsonl", path), tokenizer)
    assert isinstance(prompts, PromptSource)
    with pytest.raises(UserError, match=r"prompt zh.jsonl:0: the char tokenizer has no token"):
        prompts[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", r"bad.jsonl:3: not valid JSON \(.*\); write one object per line"),
        ("[1, 2]", "bad.jsonl:3: a JSON list; each line must be an object"),
        ('{"q": "x", "answer": "1"}', "bad.jsonl:3: no column 'question'; it has 'q', 'answer'"),
        ('{"question": "x", "answer": null}', "bad.jsonl:3: column 'answer' is empty"),
        ('{"question": "", "answer": "1"}', "bad.jsonl:3: column 'question' holds ''"),
    ],
)
def test_bad_jsonl_line(tmp_path: Path, tokenizer: Tokenizer, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        open_prompts(config("jsonl", path), tokenizer)


def test_jsonl_not_utf8(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"question": "é", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.jsonl:1: not valid JSON .*in UTF-8"):
        open_prompts(config("jsonl", path), tokenizer)


@pytest.mark.parametrize("source", ["jsonl", "parquet", "datasets"])
def test_missing_file(tmp_path: Path, tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(UserError, match=r"prompts.path: .*none' does not exist"):
        open_prompts(config(source, tmp_path / "none"), tokenizer)


def test_missing_columns_in_tables(files: dict[str, Path], tokenizer: Tokenizer) -> None:
    for source, name in (("parquet", "rows.parquet"), ("datasets", "saved")):
        with pytest.raises(UserError, match="no column 'q'; it has 'question', 'answer', 'level'"):
            open_prompts(config(source, files[name], question_key="q"), tokenizer)


def test_missing_column_in_a_stream(files: dict[str, Path], tokenizer: Tokenizer) -> None:
    options = {"streaming": True}
    wrong = config("datasets", files["saved"], answer_key="gold", options=options)
    stream = open_prompts(wrong, tokenizer)
    with pytest.raises(UserError, match="saved, row 0: no column 'gold'; it has 'question'"):
        PromptCursor(stream, False, 0).take(1)


def test_empty_sources(tmp_path: Path, tokenizer: Tokenizer) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "empty.jsonl").write_text("\n\n")
    schema = pa.schema([("question", pa.string()), ("answer", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    for source, name in (("jsonl", "empty.jsonl"), ("parquet", "empty.parquet")):
        with pytest.raises(UserError, match=rf"{name} holds no rows"):
            open_prompts(config(source, tmp_path / name), tokenizer)
    options = {"streaming": True}
    (tmp_path / "empty.csv").write_text("question,answer\n")
    stream = open_prompts(config("datasets", tmp_path / "empty.csv", options=options), tokenizer)
    with pytest.raises(UserError, match="a whole epoch gives no prompt"):
        PromptCursor(stream, True, 0).take(1)


def test_bad_line_in_a_stream(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n{bad\n')
    options = {"streaming": True}
    with pytest.raises(UserError, match=r"bad.jsonl: `datasets` cannot read it"):
        stream = open_prompts(config("datasets", path, options=options), tokenizer)
        PromptCursor(stream, False, 0).take(2)


def test_unreadable_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"bad.parquet: cannot be read as parquet"):
        open_prompts(config("parquet", tmp_path / "bad.parquet"), tokenizer)
    with pytest.raises(UserError, match=r"bad.parquet: `datasets` cannot read it"):
        open_prompts(config("datasets", tmp_path / "bad.parquet"), tokenizer)
    with pytest.raises(UserError, match='is a folder; source "jsonl" reads one file'):
        open_prompts(config("jsonl", tmp_path), tokenizer)


def test_datasets_folder_without_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"nor data files; allowed are .jsonl, .json, .parquet"):
        open_prompts(config("datasets", tmp_path), tokenizer)
    (tmp_path / "a.csv").write_text("question,answer\n1,2\n")
    (tmp_path / "b.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"files of several kinds \(csv, json\)"):
        open_prompts(config("datasets", tmp_path), tokenizer)


@pytest.mark.parametrize(
    ("source", "name", "options", "message"),
    [
        ("jsonl", "rows.jsonl", {"x": 1}, "source 'jsonl' has no option x; allowed are none"),
        (
            "datasets",
            "saved",
            {"stream": True},
            "has no option stream; allowed are split, streaming, shuffle_buffer",
        ),
        ("datasets", "saved", {"streaming": 1}, "streaming = 1; allowed are true and false"),
        ("datasets", "saved", {"shuffle_buffer": 0}, "shuffle_buffer = 0; allowed is an integer"),
        ("datasets", "splits", {}, r"split None is not there.*\['train', 'test'\]"),
        ("datasets", "splits", {"split": "dev"}, r"split 'dev' is not there"),
    ],
)
def test_bad_options(
    files: dict[str, Path],
    tokenizer: Tokenizer,
    source: str,
    name: str,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        open_prompts(config(source, files[name], options=options), tokenizer)


def test_unknown_task_and_option(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="task: 'nope' is unknown; allowed are chain_sum"):
        open_prompts(config("generator", task="nope"), tokenizer)
    with pytest.raises(UserError, match="unknown option term; allowed are terms"):
        open_prompts(config("generator", task="chain_sum", options={"term": 2}), tokenizer)


def test_the_language_column(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    codes = ["zh", "EN", "zh-CN", "zh_Hans", "", None]
    rows = [{"question": "1+1", "answer": "2", "lang": code, "level": 3} for code in codes]
    path.write_text("\n".join(map(json.dumps, rows)))
    source = open_prompts(config("jsonl", path, language_key="lang"), tokenizer)
    assert isinstance(source, PromptSource)
    prompts = [source[i] for i in range(len(rows))]
    assert [prompt.language for prompt in prompts] == ["zh", "en", "zh", "zh", None, None]
    assert {str(prompt.metadata) for prompt in prompts} == {"{'level': 3}"}
    without = open_prompts(config("jsonl", path), tokenizer)
    assert isinstance(without, PromptSource)
    assert without[0].language is None and without[0].metadata["lang"] == "zh"


@pytest.mark.parametrize("value", ["Chinese", "xx", 7])
def test_a_language_that_is_none(tmp_path: Path, tokenizer: Tokenizer, value: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "1+1", "answer": "2", "lang": value}))
    with pytest.raises(UserError, match=r"rows.jsonl:1: column 'lang' holds .*allowed are the codes"):
        source = open_prompts(config("jsonl", path, language_key="lang"), tokenizer)
        assert isinstance(source, PromptSource)
        source[0]


def test_a_missing_language_column(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "1+1", "answer": "2"}))
    with pytest.raises(UserError, match=r"no column 'lang'.*Set language_key"):
        open_prompts(config("jsonl", path, language_key="lang"), tokenizer)


def test_a_generator_says_its_language(tokenizer: Tokenizer) -> None:
    char = build_tokenizer(TokenizerConfig(kind="char", characters="计算"))
    options = {"languages": {"en": 1, "zh": 1}}
    source = open_prompts(config("generator", task="chain_sum", options=options), char)
    assert isinstance(source, PromptSource)
    prompts = [source[i] for i in range(40)]
    assert [prompt.language for prompt in prompts] == [prompt.metadata["language"] for prompt in prompts]
    assert {(prompt.language, prompt.text[:2]) for prompt in prompts} == {("en", "co"), ("zh", "计算")}
    plain = open_prompts(config("generator", task="chain_sum"), tokenizer)
    assert isinstance(plain, PromptSource) and plain[0].language is None


def test_a_language_column_needs_a_file() -> None:
    with pytest.raises(ValueError, match="language_key = 'lang' names a column, and source 'generator' has none"):
        config("generator", task="chain_sum", language_key="lang")
