"""Documents by style, at the right rates, resumable by index."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from typing import Any

import pytest

from megatron_r1.config.data import CorpusConfig
from megatron_r1.config.errors import UserError
from megatron_r1.data.corpus import STYLES, Corpus, Document, _in_words, classify_style
from megatron_r1.data.generators import build_task
from megatron_r1.data.heldout import question_hash
from megatron_r1.data.tasks import Problem, Task

ALL = {"direct": 0.4, "plain": 0.3, "steps": 0.15, "plain_steps": 0.1, "check": 0.05}


def config(styles: dict[str, float] | None = None, **keys: Any) -> CorpusConfig:
    return CorpusConfig(styles=styles or ALL, **keys)


def total(question: str) -> int:
    """An independent reading of the question."""
    return sum(int(number) for number in re.findall(r"[+-]?\d+", question))


def answer_of(body: str) -> int:
    matched = re.search(r"(?:<answer>|so |^)(-?\d+)(?:</answer>|\.)$", body)
    assert matched, body
    return int(matched.group(1))


def test_mixture_follows_the_weights() -> None:
    count = 8000
    corpus = Corpus(config(), seed=0)
    styles = Counter(next(corpus).style for _ in range(count))
    assert set(styles) == set(ALL)
    for style, weight in ALL.items():
        deviation = (weight * (1 - weight) / count) ** 0.5
        assert abs(styles[style] / count - weight) < 4 * deviation, style


def test_weight_zero_never_occurs_and_weights_need_not_sum_to_one() -> None:
    corpus = Corpus(config({"direct": 3, "plain": 0, "steps": 1}), seed=0)
    styles = Counter(next(corpus).style for _ in range(2000))
    assert set(styles) == {"direct", "steps"}
    assert 0.71 < styles["direct"] / 2000 < 0.79


@pytest.mark.parametrize("style", ["steps", "plain_steps", "check"])
def test_worked_documents_without_errors_are_always_right(style: str) -> None:
    corpus = Corpus(config({style: 1}, error_rate=0.0, options={"terms": [2, 6]}), seed=1)
    for _ in range(500):
        document = next(corpus)
        assert answer_of(document.body) == total(document.prompt)
        steps = re.findall(r"(-?\d+)([+-]\d+)=(-?\d+)", document.body)
        assert steps and all(int(a) + int(b) == int(c) for a, b, c in steps)


def test_error_rate_is_that_of_a_step() -> None:
    corpus = Corpus(config({"steps": 1}, error_rate=0.1), seed=2)
    steps = [
        int(a) + int(b) == int(c)
        for _ in range(1000)
        for a, b, c in re.findall(r"(-?\d+)([+-]\d+)=(-?\d+)", next(corpus).body)
    ]
    assert len(steps) == 5000
    assert 0.083 < 1 - sum(steps) / 5000 < 0.117  # 0.1 +- 4 deviations


@pytest.mark.parametrize("style", ["direct", "plain"])
@pytest.mark.parametrize("accuracy", [0.0, 0.3, 1.0])
def test_guess_accuracy(style: str, accuracy: float) -> None:
    corpus = Corpus(config({style: 1}, guess_accuracy=accuracy), seed=3)
    found = [next(corpus) for _ in range(1500)]
    right = sum(answer_of(document.body) == total(document.prompt) for document in found) / 1500
    assert abs(right - accuracy) <= 4 * (accuracy * (1 - accuracy) / 1500) ** 0.5


class _Scripted:
    """A task whose attempts are written down in advance."""

    name, verifier, languages = "scripted", "integer", None

    def __init__(self, attempts: list[tuple[str, str]]) -> None:
        self.attempts = attempts

    def draw(self, rng: random.Random) -> Problem:
        return Problem("q", "3", {})

    def work(self, problem: Problem, rng: random.Random, error_rate: float, backwards: bool) -> tuple[str, str]:
        return self.attempts.pop(0)

    def near_miss(self, problem: Problem, rng: random.Random) -> str:
        return "4"


@pytest.mark.parametrize(
    ("style", "attempts", "body"),
    [
        ("direct", [], "<think></think><answer>3</answer>"),
        ("plain", [], "3."),
        ("steps", [("1+2=3", "3")], "<think>1+2=3</think><answer>3</answer>"),
        ("plain_steps", [("1+2=3", "3")], "1+2=3; so 3."),
        ("check", [("A", "3"), ("B", "3")], "<think>A;wait B;yes</think><answer>3</answer>"),
        (
            "check",
            [("A", "4"), ("B", "3"), ("C", "5")],
            "<think>A;wait B;wait C</think><answer>5</answer>",
        ),
    ],
)
def test_bodies_by_hand(style: str, attempts: list[tuple[str, str]], body: str) -> None:
    corpus = Corpus(config({style: 1}, guess_accuracy=1.0), seed=0)
    corpus.task = _Scripted(attempts)
    assert next(corpus) == ("q", body, style)
    assert not attempts
    assert classify_style(body) == style


def test_documents_are_a_function_of_seed_and_index() -> None:
    corpus = Corpus(config(), seed=5)
    in_order = [next(corpus) for _ in range(60)]
    fresh = Corpus(config(), seed=5)
    assert [fresh.document(index) for index in reversed(range(60))] == in_order[::-1]
    assert fresh.position == 0
    for other in (Corpus(config(), seed=6), Corpus(config(seed=1), seed=5)):
        assert sum(other.document(i) == in_order[i] for i in range(60)) < 5


def test_resume_at_every_position() -> None:
    exclude = frozenset({question_hash(Corpus(config(), 0).document(3).prompt)})
    whole = Corpus(config(), 0, exclude)
    everything = [next(whole) for _ in range(20)]
    for cut in range(20):
        first = Corpus(config(), 0, exclude)
        for _ in range(cut):
            next(first)
        second = Corpus(config(), 0, exclude)
        second.restore(first.state())
        assert [next(second) for _ in range(20 - cut)] == everything[cut:]
        assert second.state() == whole.state() == {"position": 21, "excluded": 1}


def test_excluded_questions_are_skipped_and_counted() -> None:
    keys: dict[str, Any] = {"options": {"terms": [2, 3]}}
    plain = Corpus(config(**keys), seed=0)
    everything = [next(plain) for _ in range(3000)]
    frequent = Counter(document.prompt for document in everything).most_common(40)
    exclude = frozenset(question_hash(question) for question, _ in frequent)
    held_out = {question for question, _ in frequent}
    kept = [i for i, document in enumerate(everything) if document.prompt not in held_out]
    corpus = Corpus(config(**keys), 0, exclude)
    assert [next(corpus) for _ in kept] == [everything[i] for i in kept]
    assert corpus.excluded == kept[-1] + 1 - len(kept) > 100


def test_everything_held_out_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_r1.data.corpus.MAX_EXCLUDED_RUN", 50)
    small = config(task="count_letters", options={"length": 1, "letters": 2})
    words = [f"{a} in {b}=?" for a in "ab" for b in "ab"]
    corpus = Corpus(small, 0, frozenset(map(question_hash, words)))
    with pytest.raises(UserError, match=r"corpus count_letters.*50 documents in a row ask held-out"):
        next(corpus)
    assert corpus.excluded == 50


def test_other_tasks_have_every_style() -> None:
    task: Task = build_task("count_letters", {})
    corpus = Corpus(config(task="count_letters", error_rate=0.0), seed=0)
    assert isinstance(corpus.task, type(task))
    for _ in range(200):
        document = next(corpus)
        assert classify_style(document.body) == document.style


def test_classify_every_generated_document() -> None:
    corpus = Corpus(config(error_rate=0.3, options={"terms": [2, 6]}), seed=9)
    for _ in range(1000):
        document = next(corpus)
        assert classify_style(document.body) == document.style, document


@pytest.mark.parametrize(
    ("text", "style"),
    [
        ("<think> </think> <answer>3</answer>", "direct"),
        ("<think>I Wait here</think>\n<answer></answer>\n", "check"),
        ("<think>waiting</think><answer>3</answer>", "steps"),
        ("<think>1+2=3</think><answer>3", "other"),
        ("<think>1+2=3<answer>3</answer>", "other"),
        ("<think>a</think><answer>3</answer><answer>4</answer>", "other"),
        ("<think>a</think></think><answer>4</answer>", "other"),
        ("x <think>a</think><answer>4</answer>", "other"),
        ("3 </answer>", "other"),
        ("  ", "other"),
        ("-12", "plain"),
        ("1+2=3", "plain_steps"),
    ],
)
def test_classify_what_models_write(text: str, style: str) -> None:
    assert classify_style(text) == style


@pytest.mark.parametrize(
    ("styles", "message"),
    [
        (
            {"stepz": 1.0, "steps": 1.0},
            f"corpus.styles: unknown style stepz; allowed are {', '.join(STYLES)}",
        ),
        ({"steps": -1.0}, r"corpus.styles: steps = -1.0; weights are 0 or more"),
        ({"steps": float("nan")}, r"corpus.styles: steps = nan"),
        ({"steps": 0.0}, "corpus.styles: no style has a weight"),
    ],
)
def test_bad_styles(styles: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Corpus(CorpusConfig(styles=styles), 0)


def test_bad_task_and_option() -> None:
    with pytest.raises(UserError, match="task: 'nope' is unknown"):
        Corpus(config(task="nope"), 0)
    with pytest.raises(UserError, match="unknown option term"):
        Corpus(config(options={"term": 3}), 0)


@pytest.mark.parametrize(
    ("task", "options", "digest"),
    [
        ("chain_sum", {"terms": [2, 6], "digits": 1}, "bf0a07f95c944ff4"),
        ("count_letters", {}, "5217aa632cfd8fd7"),
    ],
)
def test_documents_without_languages_are_what_they_were(task: str, options: dict[str, Any], digest: str) -> None:
    """To the byte, since the first corpora: a stored base model stays the one that its recipe makes."""
    styles = {"steps": 0.40, "plain_steps": 0.40, "check": 0.10, "direct": 0.05, "plain": 0.05}
    corpus = Corpus(config(styles, task=task, options=options), seed=1)
    documents = [corpus.document(index) for index in range(400)]
    text = "\n".join(f"{d.style} {d.prompt} {d.body}" for d in documents)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


BOTH = {"terms": [2, 4], "languages": {"en": 0.7, "zh": 0.3}}
ENGLISH, CHINESE = r"first |then |so |wait |yes", "首先|然后|所以|等等|对"


def in_english(document: Document) -> bool:
    return document.prompt.startswith("compute ")


def test_languages_of_prompts_and_thoughts() -> None:
    corpus = Corpus(config({"steps": 1, "plain_steps": 1, "check": 1}, options=BOTH, error_rate=0.2), seed=4)
    documents = [corpus.document(index) for index in range(2000)]
    assert abs(sum(map(in_english, documents)) / 2000 - 0.7) < 4 * (0.7 * 0.3 / 2000) ** 0.5
    for document in documents:
        own, foreign = (ENGLISH, CHINESE) if in_english(document) else (CHINESE, ENGLISH)
        assert re.search(own, document.body) and not re.search(foreign, document.body)
        assert document.prompt.startswith(("compute ", "计算"))
        assert classify_style(document.body) == document.style


@pytest.mark.parametrize("style", ["direct", "plain"])
def test_guesses_have_no_words(style: str) -> None:
    corpus = Corpus(config({style: 1}, options=BOTH, mixed=1.0), seed=4)
    assert not any(re.search(f"{ENGLISH}|{CHINESE}", corpus.document(index).body) for index in range(100))


def test_mixed_thoughts_change_once_midway() -> None:
    corpus = Corpus(config({"steps": 1, "check": 1}, options=BOTH, error_rate=0, mixed=0.4), seed=5)
    mixed = 0
    for index in range(2000):
        document = corpus.document(index)
        said = [
            "e" if re.fullmatch(ENGLISH, word) else "c" for word in re.findall(f"{ENGLISH}|{CHINESE}", document.body)
        ]
        begin = "e" if in_english(document) else "c"
        assert re.fullmatch(r"e+c*" if begin == "e" else r"c+e*", "".join(said)), document
        mixed += len(set(said)) == 2
        assert answer_of(document.body) == total(document.prompt.removeprefix("compute ").removeprefix("计算"))
        assert classify_style(document.body) == document.style
    assert abs(mixed / 2000 - 0.4) < 4 * (0.4 * 0.6 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("body", "languages", "words"),
    [
        ("<think>1+2=3</think><answer>3</answer>", "en", "<think>first 1+2=3;so 3</think><answer>3</answer>"),
        ("1+2=3;3+4=7; so 7.", "zh", "首先1+2=3;然后3+4=7;所以7."),
        (
            "<think>1+2=3;wait 2+1=4;wait 1+2=3</think><answer>3</answer>",
            "en",
            "<think>first 1+2=3;wait first 2+1=4;wait first 1+2=3;so 3</think><answer>3</answer>",
        ),
        (
            "<think>1+2=3;wait 2+1=3;yes</think><answer>3</answer>",
            "zh",
            "<think>首先1+2=3;等等首先2+1=3;对;所以3</think><answer>3</answer>",
        ),
    ],
)
def test_words_of_a_body_by_hand(body: str, languages: str, words: str) -> None:
    assert _in_words(body, (languages, languages), random.Random(0)) == words


def test_mixing_needs_two_languages() -> None:
    for options in ({}, {"languages": {"en": 1.0}}, {"languages": {"en": 1.0, "zh": 0}}):
        with pytest.raises(UserError, match=r"corpus.mixed = 0.4 needs two languages"):
            Corpus(config(options=options, mixed=0.4), 0)
