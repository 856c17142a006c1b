"""The `mix` stage: conversations of several sources, by weight and cap, less what an evaluation asks.

Reads the sources (`data/mixing.py`), writes data.jsonl and its dataset card. Rank 0 works. A killed stage begins again
from its sources and writes the same bytes: files are replaced as a whole, and nothing depends on time or order of
events.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.config.errors import UserError
from megatron_r1.config.stages import MixStage
from megatron_r1.data.dataset_card import DATA_FILE, Card, CardTable, Cell, card_files, shown_settings
from megatron_r1.data.decontaminate import Contamination
from megatron_r1.data.mixing import Draw, SourceRows, counts, draw, read_questions, read_references, read_sources
from megatron_r1.observe.metrics import MetricsWriter
from megatron_r1.observe.rundir import write_text
from megatron_r1.pipeline.making.aside import on_rank_0
from megatron_r1.train.context import RunContext
from megatron_r1.train.evaluate import heldout_prompts

logger = logging.getLogger(__name__)

COLUMNS = {
    "messages": "the conversation: {role, content} in turn, of the assistant also reasoning_content, its thought",
    "domain": "what the row is counted as: its own column of that name, else the source's `domain`",
    "source": "where it comes from: a stage of the recipe, or a file",
}


class Domain(NamedTuple):
    """What the mix has of a domain."""

    samples: int
    rounds: int
    tokens: int


def run_mix(stage: MixStage, context: RunContext, start: Path | None = None) -> dict[str, Any]:
    """Write <stage>/data.jsonl, README.md and card.json; returns counts, the same on all ranks. Collective.

    start: as other stages have it; a mix needs no weights.

    Raises:
        UserError: a source or a file of questions is missing or malformed beyond its `max_bad_rows`; no row is left.
    """
    work = partial(_mix, stage, context)
    result: dict[str, Any] = on_rank_0(work, context, stage.name, "the mix is made anew, alike, by the same command")
    return result


def source_names(stage: MixStage, context: RunContext) -> list[str]:
    """A name for each source: the stage that wrote it, as the recipe says, or its file; a second one gets "#2"."""
    names: list[str] = []
    for source, now in zip(_as_written(stage, context).sources, stage.sources, strict=True):
        name = source.stage or (now.path.name if now.path is not None else "")
        again = sum(name == earlier.partition("#")[0] for earlier in names)
        names.append(f"{name}#{again + 1}" if again else name)
    return names


def _as_written(stage: MixStage, context: RunContext) -> MixStage:
    """The stage as the recipe has it, with names of stages where `stage` has their files."""
    (written,) = [each for each in context.config.stage if each.name == stage.name] or [stage]
    assert isinstance(written, MixStage), "a stage keeps its kind"
    return written


def evaluation_texts(stage: MixStage, context: RunContext) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Evaluation set -> its questions, and -> its reference answers and solutions.

    Sets are every benchmark and eval stage of the recipe, and the stage's own files.
    """
    wanted = stage.decontaminate
    questions: dict[str, list[str]] = {}
    answers: dict[str, list[str]] = {}
    for asked in context.config.all_problem_sets() if wanted.evaluations else []:
        prompts = heldout_prompts(asked, context.tokenizer)
        questions[asked.key] = [prompt.question for prompt in prompts]
        answers[asked.key] = [prompt.answer for prompt in prompts if prompt.answer is not None]
    for path in wanted.files:
        questions.setdefault(path.name, []).extend(read_questions(path, wanted.key))
        answers.setdefault(path.name, []).extend(read_references(path, wanted.answer_key))
    return questions, answers


def _mix(stage: MixStage, context: RunContext) -> dict[str, Any]:
    questions, answers = evaluation_texts(stage, context)
    contamination = Contamination(questions, stage.decontaminate.n, answers)
    sources = read_sources(stage, source_names(stage, context), contamination, context.tokenizer)
    draws = counts(stage, [len(source.rows) for source in sources])
    for source, drawn in zip(sources, draws, strict=True):
        if drawn.short:
            logger.warning(
                "stage %s: source %s gives %d rows less than its share", stage.name, source.name, drawn.short
            )
    chosen = draw(sources, draws, context.config.seed)
    folder = context.run.stage(stage.name).path
    domains = _write_rows(folder / DATA_FILE, sources, chosen)
    card = _card(stage, context, sources, draws, domains, {name: len(asked) for name, asked in questions.items()})
    for name, text in card_files(card).items():
        write_text(folder / name, text)
    metrics = {
        "mix/rows": float(len(chosen)),
        "mix/tokens": float(sum(domain.tokens for domain in domains.values())),
        "mix/duplicates": float(sum(source.duplicates for source in sources)),
        "mix/contaminated": float(sum(source.contaminated for source in sources)),
        "mix/bad_rows": float(sum(source.bad for source in sources)),
        "mix/missing": float(sum(drawn.short for drawn in draws)),
    }
    with MetricsWriter(folder, context.attempt) as writer:
        writer.truncate_after(-1)  # an attempt that was killed here may have written already
        writer.write(0, metrics)
    if not chosen:
        raise _nothing_left(stage, sources, folder)
    return metrics


def _nothing_left(stage: MixStage, sources: Sequence[SourceRows], folder: Path) -> UserError:
    parts = [
        f"{source.name}: {source.bad} bad, {source.duplicates} duplicates, {source.contaminated} contaminated, "
        f"{len(source.rows)} left"
        for source in sources
    ]
    return UserError(
        f"stage {stage.name!r} has no row ({'; '.join(parts)}); {folder / 'README.md'} says more. Name other sources, "
        "raise `size`, or look at what [stage.decontaminate] compares with"
    )


def _write_rows(target: Path, sources: Sequence[SourceRows], chosen: Sequence[tuple[int, int]]) -> dict[str, Domain]:
    """Replace the file as a whole; returns what it holds by domain, in alphabetical order."""
    samples: Counter[str] = Counter()
    rounds: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(f".{target.name}.tmp")
    # "replace": half a surrogate pair, which JSON may hold, is no UTF-8
    with temp.open("w", encoding="utf-8", errors="replace") as stream:
        for number, place in chosen:
            record = sources[number].record(place)
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            domain = record["domain"]
            samples[domain] += 1
            rounds[domain] += sum(message["role"] == "user" for message in record["messages"])
            tokens[domain] += sources[number].tokens[place]
        stream.flush()
        os.fsync(stream.fileno())
    temp.replace(target)
    return {name: Domain(samples[name], rounds[name], tokens[name]) for name in sorted(samples)}


def _card(
    stage: MixStage,
    context: RunContext,
    sources: Sequence[SourceRows],
    draws: Sequence[Draw],
    domains: dict[str, Domain],
    evaluations: dict[str, int],
) -> Card:
    total = Domain(*map(sum, zip(*domains.values(), strict=True))) if domains else Domain(0, 0, 0)
    offered = [
        {
            "source": source.name,
            "rows": len(source.rows) + source.bad + source.duplicates + source.contaminated,
            "bad": source.bad,
            "duplicates": source.duplicates,
            "contaminated": source.contaminated,
            "left": len(source.rows),
            "share": drawn.wanted,
            "given": drawn.given,
        }
        for source, drawn in zip(sources, draws, strict=True)
    ]
    short = [
        f"{s.name}: {d.given} rows of a share of {d.wanted}" for s, d in zip(sources, draws, strict=True) if d.short
    ]
    facts = {
        "domains": {name: _averages(domain) for name, domain in domains.items()},
        "total": _averages(total),
        "sources": offered,
        "contamination": {source.name: dict(source.by_set) for source in sources},
        "evaluations": evaluations,
    }
    return Card(
        name=f"{context.config.name}/{stage.name}",
        what="Conversations for supervised fine-tuning, mixed from several sources in a random order. Rows that share "
        f"{stage.decontaminate.n} words in a row, or a whole shorter question, with an evaluation were left out.",
        rows=total.samples,
        columns=COLUMNS,
        tables=[
            _domain_table(domains, total),
            CardTable(
                title="Sources",
                columns=["source", "rows", "bad", "duplicates", "contaminated", "left", "share", "given"],
                rows=[list(row.values()) for row in offered],
                note=f"Too small, or capped, for their share: {'; '.join(short)}." if short else "",
            ),
            _contamination_table(sources, evaluations),
            _example_table(sources),
        ],
        settings=shown_settings(_as_written(stage, context)),
        facts=facts,
    )


def _averages(domain: Domain) -> dict[str, int | float]:
    """The columns of the paper's table of its fine-tuning data (DeepSeek-R1 v2, Table 5)."""
    rows = max(1, domain.samples)
    return {
        "samples": domain.samples,
        "average_rounds": round(domain.rounds / rows, 2),
        "average_tokens": round(domain.tokens / rows, 1),
    }


def _domain_table(domains: dict[str, Domain], total: Domain) -> CardTable:
    rows: list[list[Cell]] = [[name, *_averages(domain).values()] for name, domain in domains.items()]
    return CardTable(
        title="Domains",
        columns=["domain", "samples", "average rounds", "average tokens"],
        rows=[*rows, ["total", *_averages(total).values()]],
        note="Rounds: questions of a conversation. Tokens: of all its texts, thoughts included, without the marks of a "
        "chat format.",
    )


def _contamination_table(sources: Sequence[SourceRows], evaluations: dict[str, int]) -> CardTable:
    rows: list[list[Cell]] = [
        [name, asked, *(source.by_set[name] for source in sources)] for name, asked in evaluations.items()
    ]
    return CardTable(
        title="Left out for an evaluation",
        columns=["evaluation", "questions", *(source.name for source in sources)],
        rows=rows,
        note="Rows of each source. A row may share words with several evaluations.",
    )


def _example_table(sources: Sequence[SourceRows]) -> CardTable:
    rows: list[list[Cell]] = [
        [source.name, example.row, ", ".join(example.sets), _short(example.shared), _short(example.question)]
        for source in sources
        for example in source.examples
    ]
    return CardTable(
        title="Examples of them",
        columns=["source", "row", "evaluation", "shared words", "its last question"],
        rows=rows,
        note="The first ones of each source; rows count from 0.",
    )


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
