"""`Scorer`: what reaches the verifiers, how the terms add up, and that all is counted."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from megatron_r1.config.errors import UserError
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.rewards.mixer import RewardStats, Scorer
from megatron_r1.rewards.workers import Job, VerifierPool
from megatron_r1.train.phase_metrics import group_metrics
from megatron_r1.types import Completion, FinishReason, Group, Prompt, Score, Verdict


class RecordingPool(VerifierPool):
    """Gives the verdicts it was told by answer and remembers what it was asked."""

    def __init__(self, verdicts: dict[str, Verdict]) -> None:
        super().__init__(1)
        self.verdicts = verdicts
        self.asked: list[list[str]] = []
        self.deadlines: list[float | None] = []

    def verify_many(self, jobs: Sequence[Job], deadline: float | None = None) -> list[Verdict]:
        self.asked.append([f"{job.prompt.id}|{job.answer}" for job in jobs])
        self.deadlines.append(deadline)
        return [self.verdicts[job.answer] for job in jobs]


def completion(text: str, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(
        token_ids=[1],
        log_probs=[-0.1],
        finish_reason=finish_reason,
        weight_versions=(0, 0),
        text=text,
    )


def group(name: str, answer: str | None, texts: Sequence[str], verifier: str = "integer") -> Group:
    prompt = Prompt(id=name, question="?", text="?", token_ids=[1], answer=answer, verifier=verifier)
    return Group(prompt=prompt, completions=[completion(text) for text in texts])


def tagged(answer: str) -> str:
    return f"<think>hm</think><answer>{answer}</answer>"


def scores(group: Group) -> list[Score]:
    return [c.score for c in group.completions if c.score is not None]


ACCURACY = RewardConfig(kind="accuracy")
FORMAT = RewardConfig(kind="format", weight=0.5)


def test_worked_example_without_a_process() -> None:
    one = group("a", "8", [tagged("8"), tagged("7"), "<answer>8</answer>", "no idea"])
    two = group("b", "-1", [tagged("8"), tagged("-1.0"), tagged("")])
    two.completions.append(completion(tagged("-1"), "length"))
    with VerifierPool(2) as pool:
        stats = Scorer([ACCURACY, FORMAT], pool).score_groups([one, two])
        assert pool.pids == []
    assert one.rewards == [1.5, 0.5, 1.0, 0.0]
    assert two.rewards == [0.5, 1.5, 0.0, 1.0]
    assert scores(one)[0] == Score(
        total=1.5,
        parts={"accuracy": 1.0, "format": 0.5},
        verdict=Verdict(status="correct", extracted="8"),
        in_format=True,
    )
    assert scores(one)[3].verdict == Verdict(status="wrong", extracted=None, detail="no answer")
    assert scores(two)[1].verdict.extracted == "-1"
    assert stats.seconds > 0
    stats.seconds = 0.0
    assert stats == RewardStats(
        completions=8,
        verdicts={"correct": 4, "wrong": 4, "unknown": 0},
        unknown={},
        no_answer=2,
        judged=5,
        pooled=0,
    )


def test_only_what_is_unsettled_goes_to_the_pool_and_only_once() -> None:
    late = Verdict(status="unknown", extracted="9!", detail="deadline 0.3 s")
    broken = Verdict(status="unknown", extracted="x", detail="ValueError: x is odd")
    right = Verdict(status="correct", extracted="2+40")
    pool = RecordingPool({"9!": late, "x": broken, "2+40": right})
    texts = ["42", "41", "2+40", "9!", "2+40", "x", "9!", "042"]
    one = group("a", "42", [tagged(text) for text in texts], "math")
    again = group("a", "42", [tagged("2+40"), tagged("42")], "math")  # the same prompt, once more
    two = group("b", "42", [tagged("2+40")], "math")
    reward = RewardConfig(kind="accuracy", weight=2.0, deadline=0.3, unknown=-0.25)
    stats = Scorer([reward], pool).score_groups([one, again, two])
    assert pool.asked == [["a|2+40", "a|9!", "a|x", "b|2+40"]]
    assert pool.deadlines == [0.3]
    assert one.rewards == [2.0, 0.0, 2.0, -0.5, 2.0, -0.5, -0.5, 2.0]
    assert again.rewards == [2.0, 2.0]
    assert two.rewards == [2.0]
    assert stats.verdicts == {"correct": 7, "wrong": 1, "unknown": 3}
    assert stats.unknown == {"deadline 0.3 s": 2, "ValueError": 1}
    assert (stats.completions, stats.judged, stats.pooled) == (11, 7, 4)
    first, second = scores(one)[2].verdict, scores(one)[4].verdict
    assert first == second and first is not second  # no shared mutable object


def test_same_answers_to_different_references_are_different_jobs() -> None:
    one, two = group("a", "42", [tagged("42")]), group("a", "43", [tagged("42")])
    with VerifierPool(1) as pool:
        Scorer([ACCURACY], pool).score_groups([one, two])
    assert one.rewards == [1.0] and two.rewards == [0.0]


def test_a_bad_reference_is_unknown_in_process_and_in_a_worker() -> None:
    integer = group("a", "eight", [tagged("8")])
    math = group("b", None, [tagged("8")], "math")
    reward = RewardConfig(kind="accuracy", unknown=0.5)
    with VerifierPool(1, deadline=20.0) as pool:
        stats = Scorer([reward], pool).score_groups([integer, math])
    assert integer.rewards == [0.5] and math.rewards == [0.5]
    assert stats.unknown == {"ValueError": 2}
    assert stats.pooled == 1


def test_parts_always_sum_to_the_total() -> None:
    draw = random.Random(0)
    answers = ["8", "9", "", "8!", "x"]
    for _ in range(50):
        rewards = [
            RewardConfig(kind="accuracy", weight=draw.gauss(0, 3), unknown=draw.gauss(0, 1)),
            RewardConfig(kind="format", weight=draw.gauss(0, 3)),
        ]
        draw.shuffle(rewards)
        rewards = rewards[: draw.randint(1, 2)]
        pool = RecordingPool({a: Verdict(status=draw.choice(["correct", "wrong", "unknown"])) for a in answers})
        drawn = [draw.choice(answers) for _ in range(6)]
        texts = [tagged(text) if draw.random() < 0.5 else text for text in drawn]
        groups = [group(str(i), "8", texts, draw.choice(["integer", "math"])) for i in range(3)]
        stats = Scorer(rewards, pool).score_groups(groups)
        assert stats.completions == 18 == sum(stats.verdicts.values())
        assert sum(stats.unknown.values()) == stats.verdicts["unknown"]
        for g in groups:
            assert len(scores(g)) == 6
            for score in scores(g):
                assert set(score.parts) == {r.kind for r in rewards}
                assert sum(score.parts.values()) == score.total


def test_without_an_accuracy_reward_nothing_is_judged() -> None:
    pool = RecordingPool({})
    one = group("a", "8", [tagged("8!"), "8"], "math")
    stats = Scorer([FORMAT], pool).score_groups([one])
    assert one.rewards == [0.5, 0.0]
    assert pool.asked == []
    assert stats.unknown == {"no accuracy reward": 2} and stats.judged == 0
    assert scores(one)[0].verdict.extracted == "8!"  # still good for a vote


def test_scoring_again_replaces() -> None:
    one = group("a", "8", [tagged("8")])
    with VerifierPool(1) as pool:
        Scorer([ACCURACY], pool).score_groups([one])
        Scorer([FORMAT], pool).score_groups([one])
        assert one.rewards == [0.5]
        assert Scorer([FORMAT], pool).score_groups([]).completions == 0


def test_mistakes_in_the_configuration() -> None:
    pool = RecordingPool({})
    with pytest.raises(UserError, match="kind 'accuracy' is given 2 times"):
        Scorer([ACCURACY, FORMAT, RewardConfig(kind="accuracy", weight=2)], pool)
    with pytest.raises(UserError, match=r"no \[\[stage\.reward\]\] is given"):
        Scorer([], pool)
    with pytest.raises(UserError, match=r"prompt a: verifier 'sums' .* integer, .*math"):
        Scorer([ACCURACY], pool).score_groups([group("a", "8", [tagged("8")], "sums")])


def model(name: str, **keys: object) -> RewardConfig:
    return RewardConfig.model_validate({"kind": "model", "name": name, "url": "http://node7:8123", **keys})


def general(values: Sequence[float], label: str = "helpful", domain: str = "general") -> Group:
    """Completions without a reference answer, each with its value; every other one in the asked format."""
    one = group("g", None, [tagged("x") if i % 2 else "x" for i in range(len(values))], "none")
    one.prompt.domain = domain
    for c, value in zip(one.completions, values, strict=True):
        c.values[label] = value
    return one


ALL_SCENARIOS = [
    RewardConfig(kind="accuracy", domains=["reasoning"], unknown=-9.0),
    FORMAT,
    model("helpful", weight=0.25, domains=["general"]),
    model("safety", weight=2.0, transform="sigmoid", domains=["harmless"], last_steps=400),
]


def test_each_prompt_is_scored_by_the_terms_of_its_domain() -> None:
    reasoning = group("r", "8", [tagged("8"), tagged("7")])
    helpful, harmless = general([2.0, -3.0]), general([0.0, 4.0], "safety", "harmless")
    pool = RecordingPool({})
    stats = Scorer(ALL_SCENARIOS, pool).score_groups([reasoning, helpful, harmless])
    assert reasoning.rewards == [1.5, 0.5]
    assert helpful.rewards == [0.5, -0.25]
    assert harmless.rewards == pytest.approx([1.0, 0.5 + 2 * 0.98201379])  # sigmoid(4)
    assert scores(helpful)[1].parts == {"accuracy": 0.0, "format": 0.5, "helpful": -0.75, "safety": 0.0}
    for one in (reasoning, helpful, harmless):
        for score in scores(one):
            assert list(score.parts) == ["accuracy", "format", "helpful", "safety"]
            assert sum(score.parts.values()) == score.total and {type(part) for part in score.parts.values()} == {float}
    assert pool.asked == [] and stats.verdicts == {"correct": 1, "wrong": 1, "unknown": 4}
    assert stats.unknown == {"no accuracy reward": 4}


@pytest.mark.parametrize(("step", "counts"), [(0, False), (1299, False), (1300, True), (1699, True)])
def test_preference_rewards_count_in_the_last_steps(step: int, counts: bool) -> None:
    """The paper's schedule: 400 of 1,700. Before, no value is asked for."""
    one = general([4.0], "safety", "harmless")
    if not counts:
        one.completions[0].values = {}
    Scorer(ALL_SCENARIOS, RecordingPool({})).score_groups([one], step, 1700)
    assert one.rewards == pytest.approx([2 * 0.98201379 if counts else 0.0])
    assert list(scores(one)[0].parts) == ["accuracy", "format", "helpful", "safety"]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_missing_value_is_never_zero(value: float | None) -> None:
    one = general([1.0] if value is None else [value])
    if value is None:
        one.completions[0].values = {"safety": 1.0}
    with pytest.raises(ValueError, match=r"completion of prompt g has .* of the reward model 'helpful'.*'general'"):
        Scorer(ALL_SCENARIOS, RecordingPool({})).score_groups([one])


def test_the_sigmoid_does_not_overflow() -> None:
    one = general([-1000.0, 1000.0], "safety", "harmless")
    Scorer([model("safety", transform="sigmoid")], RecordingPool({})).score_groups([one])
    assert one.rewards == [0.0, 1.0]


def test_accuracy_is_judged_before_it_counts() -> None:
    one = group("a", "8", [tagged("8")])
    late = RewardConfig(kind="accuracy", last_steps=2)
    Scorer([late, FORMAT], RecordingPool({})).score_groups([one], 3, 6)
    assert one.rewards == [0.5] and scores(one)[0].verdict.status == "correct"


def test_the_format_is_measured_before_it_counts() -> None:
    one = group("a", "8", [tagged("8"), "8"])
    late = RewardConfig(kind="format", last_steps=2)
    Scorer([ACCURACY, late], RecordingPool({})).score_groups([one], 3, 6)
    assert [(score.parts["format"], score.in_format) for score in scores(one)] == [(0.0, True), (0.0, False)]
    assert group_metrics([one], [ACCURACY, late])["reward/format"] == 0.5
    Scorer([ACCURACY], RecordingPool({})).score_groups([one])
    assert scores(one)[0].in_format is None and "reward/format" not in group_metrics([one])


def test_two_reward_models_need_two_names() -> None:
    with pytest.raises(UserError, match="2 reward models are called 'helpful'"):
        Scorer([model("helpful"), ACCURACY, model("helpful")], RecordingPool({}))
