"""The language reward of R1's first RL stage: does the chain of thought keep to the language of the question?

Source: DeepSeek-R1 (arXiv 2501.12948), section 2.3.2 of version 1: R_language = Num(words of the target language) /
Num(words) over the chain of thought, added to the accuracy reward. What a word is, how a language is told, and what
becomes of maths and code the paper does not say; the answers here are ours (`rewards/words.py` counts).

Stands beside `rewards/accuracy.py` and `rewards/format.py`: `rewards/mixer.py` weighs them.

Limits. A language is told by its script alone, so Latin-script languages are all alike, as are the Cyrillic ones.
Whatever is no prose (maths, code) is neither paid nor punished, so words can hide there; and what follows `</think>` is
not judged, which is for the format reward to keep short. `reward/language_no_words` shows how many thoughts have no
words left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_r1.config.languages import LANGUAGES
from megatron_r1.rewards.words import CHARACTERS_A_WORD, count_words, prose
from megatron_r1.types import Completion, Group, LanguageUse, Prompt

KANJI_A_KANA = 3
"""Most Han characters for each kana that are taken for Japanese; Japanese prose has about one, Chinese has no kana."""


def chain_of_thought(text: str) -> str:
    """The part of a completion that thinks: all before the last `</think>`, where the answer begins (`extract_answer`
    reads what is left).

    Without `</think>` it is the whole text: a thought cut by the length limit, or one that bears no tags, counts in
    full. What stands before `<think>` belongs to it, as prompts may end in `<think>` and completions begin without one.
    """
    thought, closed, _ = text.rpartition("</think>")
    return thought if closed else text


def language_use(completion: Completion, target: str, han_per_word: float) -> LanguageUse:
    """The words of the completion's chain of thought and those of the target; `.share` is R_language.

    A thought without a word (empty, only formulas) has the share 1. Names and terms in another language count against
    it like any other word.
    """
    counts = count_words(prose(chain_of_thought(completion.text)), han_per_word)
    return LanguageUse(
        target=target,
        words=sum(counts.values(), 0.0),
        target_words=words_of(target, counts, han_per_word),
    )


def words_of(language: str, counts: Mapping[str, float], han_per_word: float) -> float:
    """Of words by script, those of a language: the words of its scripts.

    Han characters are Chinese. For Japanese they count as kanji, as far as there are at most KANJI_A_KANA of them to a
    kana, so that a Chinese thought is none in Japanese.
    """
    if language != "ja":
        return sum(counts.get(script, 0.0) for script in LANGUAGES[language])
    kana = counts.get("kana", 0.0)
    kanji = KANJI_A_KANA * kana * CHARACTERS_A_WORD["kana"] / han_per_word
    return kana + min(counts.get("han", 0.0), kanji)


def detect_language(text: str, default: str, han_per_word: float) -> str:
    """The language that most words of a text are in; `default` for one without words, and in a draw.

    Of the languages of one script it is the default, if that is one of them, else the first of the table: English for
    Latin, Russian for Cyrillic. Han beside enough kana is Japanese, else Chinese.
    """
    counts = count_words(prose(text), han_per_word)
    japanese = words_of("ja", counts, han_per_word) if "kana" in counts else 0.0
    votes = {"ja": japanese, "zh": counts.pop("han", 0.0) + counts.pop("kana", 0.0) - japanese}
    for script, words in counts.items():
        code = default if LANGUAGES[default] == (script,) else _FIRST.get(script)
        if code is not None:
            votes[code] = words
    best = max(votes.values())
    winners = [code for code, words in votes.items() if words == best]
    return default if best == 0 or default in winners else winners[0]


_FIRST: dict[str, str] = {}
for _code, _scripts in LANGUAGES.items():
    _FIRST.setdefault(_scripts[0], _code)


def target_language(prompt: Prompt, default: str, han_per_word: float) -> str:
    """The language that the thought is to keep to: the one that the prompt's source gives, else that of the question,
    else the default.
    """
    return prompt.language or detect_language(prompt.question, default, han_per_word)


def language_metrics(groups: Sequence[Group], name: str) -> dict[str, float]:
    """Language consistency of scored groups under the names `name`, `name`_no_words, and for each target language
    `name`/<code> and `name`_prompts/<code>; nothing where it was not measured.

    Means over completions; `name`_prompts is a share of the prompts.
    """
    rows = [[c.score.language for c in group.completions if c.score and c.score.language] for group in groups]
    uses = [use for row in rows for use in row]
    if not uses:
        return {}
    targets = [row[0].target for row in rows if row]  # one a prompt
    metrics = {name: _mean_share(uses), f"{name}_no_words": sum(use.words == 0 for use in uses) / len(uses)}
    for code in sorted(set(targets)):
        metrics[f"{name}/{code}"] = _mean_share([use for use in uses if use.target == code])
        metrics[f"{name}_prompts/{code}"] = targets.count(code) / len(targets)
    return metrics


def _mean_share(uses: Sequence[LanguageUse]) -> float:
    return sum(use.share for use in uses) / len(uses)
