"""What goes into a mix: rows left out by reason against a slow reference, shares and caps by hand, the draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import TokenizerConfig
from megatron_r1.config.stages import MixStage
from megatron_r1.data.decontaminate import Contamination, split_words
from megatron_r1.data.mixing import Draw, SourceRows, counts, draw, read_questions, read_references, read_sources
from megatron_r1.data.tokenizers import build_tokenizer

TOKENIZER = build_tokenizer(TokenizerConfig(kind="char"))
NOTHING = Contamination({}, 10)


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def stage(*sources: dict[str, Any], **keys: Any) -> MixStage:
    return MixStage.model_validate({"name": "mix", "kind": "mix", "sources": list(sources), **keys})


def read(folder: Path, *rows: list[Any], keys: dict[str, Any] | None = None) -> list[SourceRows]:
    """Sources of these rows in files 0.jsonl, 1.jsonl, ..."""
    paths = [write(folder / f"{i}.jsonl", given) for i, given in enumerate(rows)]
    table = stage(*({"path": path, **(keys or {})} for path in paths))
    return read_sources(table, [path.name for path in paths], NOTHING, TOKENIZER)


def test_rows_are_kept_with_their_domain_and_tokens(tmp_path: Path) -> None:
    rows = [
        chat("1+1=?", "2", domain="maths", other="x"),
        {"prompt": "2+2=?", "response": "4", "reasoning_content": "two and two"},
    ]
    (source,) = read(tmp_path, rows, keys={"domain": "talk"})
    assert (list(source.rows), source.domains) == ([0, 1], ["maths", "talk"])
    assert list(source.tokens) == [5 + 1, 5 + 11 + 1]
    assert source.record(0) == chat("1+1=?", "2") | {"domain": "maths", "source": "0.jsonl"}
    assert source.record(1)["messages"][1] == {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "two and two",
    }


def test_of_equal_messages_the_first_stays(tmp_path: Path) -> None:
    same, other = chat("1+1=?", "2"), chat("1+1=?", "3")
    first, second = read(tmp_path, [same, other, {**same, "domain": "maths"}], [other, same, chat("5", "6")])
    assert (list(first.rows), first.duplicates) == ([0, 1], 1)
    assert (list(second.rows), second.duplicates) == ([2], 2)


def test_bad_rows_are_counted_and_too_many_end_it(tmp_path: Path) -> None:
    rows = [chat("1", "2"), {"messages": []}, chat("é", "2"), chat("3", "4", domain="No Name"), chat("5", "6")]
    (source,) = read(tmp_path, rows, keys={"max_bad_rows": 3})
    assert (list(source.rows), source.bad) == ([0, 3], 3), "places among the well-formed rows of the file"
    assert source.record(1)["messages"][0]["content"] == "5"
    with pytest.raises(UserError, match=r"0\.jsonl:4: column 'domain' holds 'No Name'.*bad row 3; max_bad_rows = 2"):
        read(tmp_path, rows, keys={"max_bad_rows": 2})
    with pytest.raises(UserError, match=r"0\.jsonl:3: .*'é'.*bad row 2; max_bad_rows = 1"):
        read(tmp_path, rows, keys={"max_bad_rows": 1})
    with pytest.raises(UserError, match=r"0\.jsonl:2: column 'messages' holds \[\]"):
        read(tmp_path, rows)


WORDS = st.lists(st.sampled_from(["a", "b", "1", "+", "z"]), min_size=1, max_size=7).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(WORDS, WORDS, WORDS, WORDS), min_size=1, max_size=8),
    sets=st.dictionaries(st.sampled_from(["x", "y"]), st.lists(WORDS, max_size=2)),
)
def test_contamination_equals_a_slow_reference(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]], sets: dict[str, list[str]]
) -> None:
    """User's turns, thoughts and answers count; system messages do not."""
    given_rows = [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": user},
                {"role": "assistant", "content": answer, "reasoning_content": thought},
            ]
        }
        for system, user, thought, answer in rows
    ]
    path = write(tmp_path_factory.mktemp("mix") / "rows.jsonl", given_rows)
    (source,) = read_sources(stage({"path": path}), ["s"], Contamination(sets, 3), TOKENIZER)

    def asks(question: str, text: str) -> bool:
        wanted, have = split_words(question), split_words(text)
        said = [word for word in wanted if word.isalnum()]
        if len(said) >= 3:
            wanted, have = said, [word for word in have if word.isalnum()]
        n = 3 if len(said) >= 3 else len(wanted)
        if not said:
            return False
        grams = {tuple(wanted[i : i + n]) for i in range(len(wanted) - n + 1)}
        return any(tuple(have[i : i + n]) in grams for i in range(len(have) - n + 1))

    kept, seen, dirty, by_set = [], set(), 0, dict.fromkeys(sets, 0)
    for index, row in enumerate(rows):
        if row in seen:
            continue
        seen.add(row)
        found = [name for name in sets if any(asks(q, text) for q in sets[name] for text in row[1:])]
        for name in found:
            by_set[name] += 1
        if found:
            dirty += 1
        else:
            kept.append(index)
    assert list(source.rows) == kept
    assert (source.contaminated, source.duplicates) == (dirty, len(rows) - len(seen))
    assert {name: source.by_set[name] for name in sets} == by_set
    assert len(source.examples) == min(5, dirty)


def test_shares_caps_and_sources_that_are_too_small() -> None:
    three = [{"path": f"{i}.jsonl", "weight": weight} for i, weight in enumerate((3, 2, 1))]
    assert counts(stage(*three), [7, 8, 9]) == [Draw(None, 7), Draw(None, 8), Draw(None, 9)]
    # 10 x 3/6 = 5, 10 x 2/6 = 3.33, 10 x 1/6 = 1.67: the largest remainder is the last one's
    assert counts(stage(*three, size=10), [7, 8, 9]) == [Draw(5, 5), Draw(3, 3), Draw(2, 2)]
    found = counts(stage(*three, size=10), [4, 0, 9])
    assert found == [Draw(5, 4), Draw(3, 0), Draw(2, 2)] and [one.short for one in found] == [1, 3, 0]
    three[0]["cap"] = 2
    assert counts(stage(*three), [7, 8, 1]) == [Draw(None, 2), Draw(None, 8), Draw(None, 1)]
    assert counts(stage(*three, size=10), [7, 8, 9])[0] == Draw(5, 2)


def test_the_draw_is_random_by_seed_and_keeps_every_row_once(tmp_path: Path) -> None:
    first, second = read(tmp_path, [chat(str(i), "x") for i in range(40)], [chat(str(i), "y") for i in range(40)])
    chosen = draw([first, second], [Draw(10, 10), Draw(40, 40)], seed=1)
    assert len(set(chosen)) == len(chosen) == 50
    assert {place for number, place in chosen if number} == set(range(40))
    assert {place for number, place in chosen if not number} != set(range(10))
    assert chosen == draw([first, second], [Draw(10, 10), Draw(40, 40)], seed=1)
    assert chosen != draw([first, second], [Draw(10, 10), Draw(40, 40)], seed=2)
    assert [number for number, _ in chosen] != sorted(number for number, _ in chosen)


def test_without_shuffle_a_source_gives_its_first_rows(tmp_path: Path) -> None:
    (source,) = read(tmp_path, [chat(str(i), "x") for i in range(40)], keys={"shuffle": False})
    assert sorted(draw([source], [Draw(5, 5)], seed=1)) == [(0, place) for place in range(5)]


def test_files_of_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "eval.jsonl", [{"question": "Why?", "answer": "so"}, {"question": "How?"}])
    assert read_questions(path, "question") == ["Why?", "How?"]
    assert read_references(path, "answer") == ["so"] and read_references(path, "solution") == []
    with pytest.raises(UserError, match=r"eval\.jsonl:2: column 'answer' holds None.*set decontaminate\.key"):
        read_questions(path, "answer")
    with pytest.raises(UserError, match=r"decontaminate\.files: there is no file .*none\.jsonl"):
        read_questions(tmp_path / "none.jsonl", "question")
    path.write_text("{broken\n")
    with pytest.raises(UserError, match=r"eval\.jsonl:1: not valid JSON"):
        read_questions(path, "question")
