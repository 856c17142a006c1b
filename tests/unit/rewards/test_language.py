"""The language reward: words counted by hand, in every way that texts mix; shares, targets and metrics."""
# ruff: noqa: RUF001 - letters that look like others are what is tested

from __future__ import annotations

import time
import unicodedata
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.config.languages import LANGUAGES
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.rewards.language import (
    chain_of_thought,
    detect_language,
    language_metrics,
    language_use,
    target_language,
)
from megatron_r1.rewards.mixer import Scorer
from megatron_r1.rewards.words import count_words, prose
from megatron_r1.rewards.workers import VerifierPool
from megatron_r1.types import Completion, Group, LanguageUse, Prompt

HAN = 1.6


def completion(text: str) -> Completion:
    return Completion(token_ids=[1], log_probs=[-0.1], finish_reason="stop", weight_versions=(0, 0), text=text)


def use(text: str, target: str, han_per_word: float = HAN) -> LanguageUse:
    return language_use(completion(text), target, han_per_word)


def han(characters: int) -> float:
    return characters / HAN


# thought, target, its words of the target, all its words
BY_HAND: list[tuple[str, str, float, float]] = [
    ("First, let us compute the sum of the two numbers, then divide by three.", "en", 14, 14),
    ("首先,我们计算这两个数的和,然后除以三。", "zh", han(17), han(17)),
    ("首先,我们计算这两个数的和,然后除以三。", "en", 0, han(17)),
    ("First 我们计算 the sum 然后 divide by three 得到答案", "en", 6, 6 + han(10)),
    ("First 我们计算 the sum 然后 divide by three 得到答案", "zh", han(10), 6 + han(10)),
    ("因此 the derivative 是 2x, 所以 the answer is 4", "zh", han(5), 5 + han(5)),
    ("The GCD 最大公约数 of 12 and 18 is 6", "en", 5, 5 + han(5)),
    ("等等,让我重新检查一下:7+5=12,12*3=36。对。", "zh", han(11), han(11)),
    # no words: numbers, nothing, variables
    ("7+5=12\n12*3=36\n36/4=9", "en", 0, 0),
    ("", "zh", 0, 0),
    ("x = 3, A + B; I, a ٣ ３ Σ ⅔ ① Ⅳ 5 µm", "zh", 0, 0),
    # maths
    ("设 $x = \\frac{1}{2}$, 则 $f(x) = \\sin x$, 所以答案是 3。", "zh", han(7), han(7)),
    ("Let $x$ be 设的数. Then $ x = \\sin 3 $.", "en", 3, 3 + han(3)),
    ("So $$\\sum_{foo}\n bar$$ and \\(\\log n\\) or \\[\\max\n y\\] 完", "zh", han(1), 3 + han(1)),
    ("所以 sin(x) 的导数是 cos(x), 因此 f'(x) = cos(x)。", "zh", han(8), 3 + han(8)),  # not in maths: words
    ("\\begin{align*}\\begin{cases} foo \\end{cases} bar\\end{align*} 完", "zh", han(1), han(1)),
    ("\\begin{itemize} \\item first \\textbf{step} \\boxed{三} \\end{itemize}", "en", 2, 2 + han(1)),
    ("It costs $5 and then $7 more, or \\$8 and \\$9 less", "en", 8, 8),
    ("$no end and \\(none \\[ either ``` `nor here \\begin{align} so", "en", 8, 8),
    ("𝑥𝑦𝑧 ∈ ℝℂ, ok ²ⁿ", "en", 1, 1),
    # code and addresses
    ("先写代码:\n```python\ndef f(x): return x\n```\n然后运行 `f(2) or g`。", "zh", han(8), han(8)),
    ("def f(x):\n    return x*2\n这个函数返回两倍的值", "zh", han(10), 2 + han(10)),
    ("见https://a.example/b?c=d。然后继续 www.example.org/x", "zh", han(5), han(5)),
    # what a word is
    ("don't re-check l'homme f'(x) I’m", "en", 5, 5),
    ("ＧＣＤ 7th naïve", "en", 3, 3),
    (unicodedata.normalize("NFD", "résumé é"), "en", 1, 1),
    ("人々〇", "zh", han(3), han(3)),
    # other languages
    ("Сначала вычислим сумму then divide", "ru", 3, 5),
    ("я и в", "ru", 3, 3),
    ("まず合計を計算します then", "ja", 3 + han(4), 4 + han(4)),
    ("まず合計を計算します then", "zh", han(4), 4 + han(4)),
    ("コンピューター", "ja", 3.5, 3.5),
    ("首先计算", "ja", 0, han(4)),  # no kana: Chinese
    ("首先计算合计的和 を", "ja", 0.5 + han(3), 0.5 + han(8)),  # three kanji to a kana at most
    ("먼저 합을 구한다 so 12", "ko", 3, 4),
    ("أولاً نحسب المجموع", "ar", 3, 3),
    ("پس می‌خواهم", "fa", 2, 2),
    ("पहले योग निकालें।", "hi", 3, 3),
    ("คำนวณผลรวม", "th", 2.5, 2.5),
    ("άρα α + β = 5", "el", 1, 1),
    ("נחשב סכום so", "he", 2, 3),
    ("ვთვლით", "ka", 1, 1),
    ("ᏣᎳᎩ so", "en", 1, 2),  # a script of no language of the table
    # the limit of the rule: Latin-script languages are one
    ("The sum is twelve", "de", 4, 4),
    ("La somme est douze", "en", 4, 4),
]


@pytest.mark.parametrize(("text", "target", "target_words", "words"), BY_HAND)
def test_words_by_hand(text: str, target: str, target_words: float, words: float) -> None:
    found = use(text, target)
    assert (found.target, found.target_words, found.words) == (
        target,
        pytest.approx(target_words),
        pytest.approx(words),
    )
    assert found.share == pytest.approx(target_words / words if words else 1.0)


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        ("<think>so</think><answer>8</answer>", "<think>so"),
        ("so</think>然后", "so"),  # the prompt ended in <think>
        ("so<think>so</think>然后", "so<think>so"),
        ("<think>so</think>then</think>然后", "<think>so</think>then"),
        ("<think>so 然后", "<think>so 然后"),  # cut
        ("so 8.", "so 8."),  # no tags
        ("<think></think>然后", "<think>"),
        ("", ""),
    ],
)
def test_the_chain_of_thought(text: str, thought: str) -> None:
    assert chain_of_thought(text) == thought


def test_only_the_thought_counts_and_tags_are_no_words() -> None:
    assert use("<think>所以</think> so <answer>eight</answer>", "zh") == LanguageUse(
        target="zh", words=1.25, target_words=1.25
    )
    assert use("<think></think>然后", "en").words == 0
    assert use("<think>所以 then", "zh").share == 1.25 / 2.25


def test_han_per_word() -> None:
    assert use("所以我们 so", "zh", han_per_word=2.0).share == 2 / 3
    assert use("所以我们 so", "zh", han_per_word=1.0).share == 4 / 5


@pytest.mark.parametrize(
    ("question", "default", "language"),
    [
        ("What is the sum of 3 and 4?", "zh", "en"),
        ("3加4等于几?", "en", "zh"),
        ("compute 5-6+9=?", "zh", "en"),
        ("计算5-6+9=?", "en", "zh"),
        ("5-6+9=?", "en", "en"),
        ("$\\text{the sum}$ 5-6=?", "ko", "ko"),  # maths is in no language
        ("What is 最大公约数 of 12 and 18?", "zh", "en"),  # 4 words against 3.125
        ("求 sin 与 cos 的最大公约数", "en", "zh"),  # 2 against 5.625
        ("ab 所以 cd 合", "zh", "en"),  # 2 against 1.875
        ("ab 所以我们", "de", "zh"),
        ("Сумма чисел", "en", "ru"),
        ("Сума чисел", "uk", "uk"),
        ("Was ist die Summe?", "de", "de"),
        ("Was ist die Summe?", "zh", "en"),
        ("合計はいくつですか", "en", "ja"),
        ("合計", "ja", "zh"),
        ("ཀ", "en", "en"),  # words of no language of the table
        ("ab cd ef 所以我们说", "zh", "zh"),  # 3 against 3.125
    ],
)
def test_detection(question: str, default: str, language: str) -> None:
    assert detect_language(question, default, HAN) == language


def test_a_draw_goes_to_the_default() -> None:
    text = "ab cd 所以我们"  # 2 words each with 2 characters a word
    assert [detect_language(text, default, 2.0) for default in ("en", "zh")] == ["en", "zh"]


def prompt(question: str, language: str | None = None) -> Prompt:
    return Prompt(
        id=question, question=question, text="", token_ids=[1], answer="8", verifier="integer", language=language
    )


def test_the_target_is_given_or_read_or_the_default() -> None:
    assert target_language(prompt("计算 5+3", "ko"), "en", HAN) == "ko"
    assert target_language(prompt("计算 5+3"), "en", HAN) == "zh"
    assert target_language(prompt("5+3"), "ru", HAN) == "ru"


WORDS = {
    "en": ["so", "then", "don't", "naïve"],
    "zh": ["所以", "等", "我们计算"],
    "ja": ["まず", "カタカナ", "合計を", "計算する"],
    "ko": ["그래서", "합을"],
    "ru": ["и", "потом"],
    "ar": ["ثم"],
    "th": ["ดังนั้น"],
}
TEXTS = st.one_of(
    st.text(max_size=40),
    st.text(alphabet=" so所以は$`\\[](){}/aбก1.'\n", max_size=40),
    st.lists(st.sampled_from([word for words in WORDS.values() for word in words]), max_size=8).map(" ".join),
)


@given(text=TEXTS, target=st.sampled_from(sorted(WORDS)), data=st.data())
def test_target_words_never_lower_the_share_and_others_never_raise_it(
    text: str, target: str, data: st.DataObject
) -> None:
    before = use(text, target)
    assert 0 <= before.target_words <= before.words + 1e-9 and 0 <= before.share <= 1 + 1e-9
    own = data.draw(st.sampled_from(WORDS[target]))
    assert use(f"{text} {own}", target).share >= before.share - 1e-12
    # Han and kana belong to two languages each, so a foreign word is one of another script.
    scripts = set(LANGUAGES[target]) | ({"kana"} if target == "zh" else set())
    foreign = [word for code, words in WORDS.items() if not scripts & set(LANGUAGES[code]) for word in words]
    other = data.draw(st.sampled_from(foreign))
    after = use(f"{text} {other}", target)
    assert after.share <= before.share + 1e-12
    assert after.words > before.words


@given(text=TEXTS, more=TEXTS.filter(lambda text: not set(text) & set("$`\\<[](){}")))
def test_counts_add_up(text: str, more: str) -> None:
    together = count_words(prose(f"{text} {more}"), HAN)
    one, two = count_words(prose(text), HAN), count_words(prose(more), HAN)
    if not set(text) & set("$`\\<"):
        assert together == pytest.approx({key: one.get(key, 0) + two.get(key, 0) for key in {*one, *two}})


@pytest.mark.parametrize(
    "text",
    [
        *("\\begin{align}" * 30_000, "\\[" * 200_000, "\\(" * 200_000, "$ x" * 130_000, "$" * 400_000, "$\\" * 200_000),
        *(
            "`" * 400_000,
            "```a " * 80_000,
            "a'" * 200_000,
            "\\begin" + " " * 400_000,
            "<think>" * 50_000,
            "字a" * 200_000,
        ),
        "\\begin{align}" * 15_000 + "\\end{align}" * 15_000,
        "$" + "a " * 200_000,
    ],
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    begin = time.process_time()
    use(text, "en")
    assert time.process_time() - begin < 1.0


def group(name: Prompt, *texts: str) -> Group:
    return Group(prompt=name, completions=[completion(text) for text in texts])


def scored(*groups: Group, weight: float = 1.0) -> list[Group]:
    rewards = [RewardConfig(kind="accuracy"), RewardConfig(kind="language", weight=weight, default_language="zh")]
    with VerifierPool(1) as pool:
        Scorer(rewards, pool).score_groups(groups)
    return list(groups)


def test_the_share_is_added_to_the_total_whatever_the_answer() -> None:
    (one,) = scored(
        group(
            prompt("compute 5+3"),
            "<think>so we</think><answer>8</answer>",
            "<think>so 所以我们我们我们</think><answer>9</answer>",  # 1 of 1 + 5
            "<think>5+3=8</think><answer>8</answer>",
        ),
        weight=0.5,
    )
    assert one.rewards == [1.5, 0.5 * float(Fraction(1, 6)), 1.5]
    score = one.completions[1].score
    assert score is not None
    assert score.parts == {"accuracy": 0.0, "language": 0.5 / 6}
    assert score.language == LanguageUse(target="en", words=6.0, target_words=1.0)


def test_metrics_by_hand() -> None:
    groups = scored(
        group(prompt("compute 5+3"), "<think>so 所以我们我们我们</think>", "<think>5</think>"),  # 1/6 and no words
        group(prompt("5+3"), "<think>所以</think>", "<think>so ab 所以我们我们我们</think>"),  # default zh: 1 and 5/7
        group(prompt("5+4", language="zh"), "so", "然"),  # given: 0 and 1
    )
    found = language_metrics(groups, "reward/language")
    assert found == pytest.approx(
        {
            "reward/language": (1 / 6 + 1 + 1 + 5 / 7 + 0 + 1) / 6,
            "reward/language_no_words": 1 / 6,
            "reward/language/en": (1 / 6 + 1) / 2,
            "reward/language_prompts/en": 1 / 3,
            "reward/language/zh": (1 + 5 / 7 + 0 + 1) / 4,
            "reward/language_prompts/zh": 2 / 3,
        }
    )


def test_without_the_reward_nothing_is_measured() -> None:
    one = group(prompt("5+3"), "so")
    with VerifierPool(1) as pool:
        Scorer([RewardConfig(kind="accuracy")], pool).score_groups([one])
    assert one.completions[0].score is not None and one.completions[0].score.language is None
    assert language_metrics([one], "reward/language") == {}
