"""Every metric a run may write, with its unit and meaning: the one list that writers, progress,
report and docs use.

A name is `group/what`, `group/what/layer_N` for those in PER_LAYER, `group/what/zh` for those in
PER_LANGUAGE, or `group/what/<name>` for those in PER_NAME; the evaluation metrics of a benchmark have its name inside:
`eval/aime/pass_at_1`. `MetricsWriter` refuses a name that is not here, so a typing mistake cannot split a curve in two.
Means are over the whole rollout phase or global batch, never over one rank.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from megatron_r1.config.languages import LANGUAGES

Unit = Literal["share", "count", "tokens", "tokens/s", "nats", "s", "reward", "GiB", "ratio", "1"]
"""share: 0..1, shown as per cent; nats: per token, natural log; reward: in units of the weighted
reward; 1: pure.
"""


class Metric(NamedTuple):
    """Unit and one-line meaning of a metric."""

    unit: Unit
    meaning: str


METRICS: dict[str, Metric] = {
    # rewards of one rollout phase
    "reward/mean": Metric("reward", "mean total reward of the phase's completions"),
    "reward/std": Metric("reward", "mean over groups of the reward's standard deviation within a group"),
    "reward/accuracy": Metric("share", "completions whose answer the verifier calls correct (training pass@1)"),
    "reward/majority": Metric("share", "groups whose most frequent answer is correct (training cons@G)"),
    "reward/format": Metric("share", "completions in the asked format"),
    "reward/language": Metric("share", "mean share of the target language in the words of a chain of thought"),
    "reward/language_no_words": Metric("share", "completions whose thought has no words (each counts 1 above)"),
    "reward/language_prompts": Metric("share", "prompts with a target language; written for each language alone"),
    "reward/model": Metric("1", "mean value of a reward model, before transform and weight; written for each alone"),
    "reward/model_std": Metric("1", "standard deviation of a reward model's values; written for each alone"),
    "reward/model_cut": Metric("share", "completions too long for a reward model, scored cut; written for each alone"),
    "reward/model_unfinished": Metric(
        "share", "completions cut off or empty, which get a reward model's lowest value; written for each alone"
    ),
    "reward/hacking_watch": Metric("share", "1: a reward model's mean value has risen and the accuracy has fallen"),
    "reward/overlong": Metric("reward", "mean penalty for too long completions, zero or negative"),
    # groups and verdicts
    "groups/no_signal": Metric("share", "groups whose rewards are all equal: no gradient from the reward"),
    "groups/all_correct": Metric("share", "groups whose completions are all correct"),
    "groups/all_wrong": Metric("share", "groups without one correct completion"),
    "groups/prompts": Metric("count", "groups; written for each domain of prompts alone"),
    "groups/dropped": Metric("count", "groups left out of training"),
    "groups/rounds": Metric("count", "rollout rounds that the phase took (dynamic sampling)"),
    "verdict/unknown": Metric("share", "completions on which the verifier gave no verdict (deadline, error)"),
    # sampling
    "rollout/length": Metric("tokens", "mean length of a completion"),
    "rollout/length_max": Metric("tokens", "longest completion"),
    "rollout/length_correct": Metric("tokens", "mean length of the correct completions"),
    "rollout/length_wrong": Metric("tokens", "mean length of the other completions"),
    "rollout/truncated": Metric("share", "completions cut at max_new_tokens"),
    "rollout/completions": Metric("count", "completions of the phase"),
    "rollout/tokens": Metric("tokens", "tokens sampled in the phase"),
    "rollout/tokens_per_second": Metric("tokens/s", "tokens sampled a second, all ranks together"),
    # the policy update
    "policy/kl": Metric("nats", "KL(policy || reference) a token, by the k3 estimator"),
    "policy/entropy": Metric("nats", "mean entropy of the policy's next-token distribution"),
    "policy/ratio": Metric("ratio", "mean probability ratio policy / old policy"),
    "policy/clip_low": Metric("share", "tokens whose ratio is clipped from below"),
    "policy/clip_high": Metric("share", "tokens whose ratio is clipped from above"),
    "policy/dual_clip": Metric("share", "tokens whose loss the dual clip bounds"),
    "policy/engine_gap": Metric("nats", "mean |log-prob of the trainer - log-prob of the sampling engine|"),
    "policy/engine_k3": Metric("nats", "KL(sampling engine || trainer) a token, by the k3 estimator"),
    "policy/engine_ratio_max": Metric("ratio", "largest factor between a token's two probabilities, either way round"),
    "policy/engine_ess": Metric("share", "effective sample size of w = trainer / sampling engine, of the tokens"),
    "policy/engine_outliers": Metric("share", "tokens with w above 2 or below 1/2"),
    "policy/correction_weight": Metric("ratio", "mean weight of a token's policy-gradient term"),
    "policy/correction_masked": Metric("share", "tokens whose weight is 0, for whatever reason"),
    "policy/correction_vetoed": Metric("share", "responses left out whole: veto, off-policy mask, mismatch limit"),
    # on-policy distillation
    "distill/reverse_kl": Metric("nats", "KL(student || teacher) a token that the student samples, k1 estimator"),
    "distill/reverse_kl_k3": Metric("nats", "the same by the k3 estimator, which is never negative"),
    "policy/old_pass": Metric("share", "samples of the phase that needed a pass for their old log-probs"),
    # losses
    "loss/total": Metric("1", "the loss that was differentiated"),
    "loss/lm": Metric("nats", "next-token cross-entropy"),
    "loss/heldout": Metric("nats", "next-token cross-entropy of learned tokens that were not trained on"),
    "loss/mtp": Metric("nats", "cross-entropy of the multi-token-prediction layers, mean over depths"),
    "loss/pairwise": Metric("nats", "Bradley-Terry loss of the preference pairs; log 2 = 0.693: no preference learned"),
    "loss/pointwise": Metric("nats", "binary cross-entropy of labelled answers; log 2 = 0.693: nothing learned"),
    # reward models, over the pairs, or the labelled answers, of the global batch
    "reward_model/accuracy": Metric(
        "share", "pairs whose chosen answer has the larger value, or answers on their label's side of 0; a tie: half"
    ),
    "reward_model/margin": Metric("1", "mean value of chosen answers - mean value of rejected ones"),
    "reward_model/chosen": Metric("1", "mean value of chosen answers"),
    "reward_model/rejected": Metric("1", "mean value of rejected answers"),
    "reward_model/good": Metric("1", "mean value of answers labelled good"),
    "reward_model/bad": Metric("1", "mean value of answers labelled bad"),
    "reward_model/heldout_accuracy": Metric("share", "the same accuracy on rows that were not trained on"),
    "reward_model/heldout_loss": Metric("nats", "the same loss on rows that were not trained on"),
    # data that a mix or preferences stage wrote
    "mix/rows": Metric("count", "conversations of the mix"),
    "mix/tokens": Metric("tokens", "tokens of their texts, thoughts included"),
    "mix/duplicates": Metric("count", "rows left out because the same messages were there before"),
    "mix/contaminated": Metric("count", "rows left out because they share words with an evaluation"),
    "mix/bad_rows": Metric("count", "rows left out: malformed, or not to be written by the tokenizer"),
    "mix/missing": Metric("count", "rows that sources could not give of their shares"),
    "preferences/kept": Metric("share", "pairs, or answers, that became a row of data.jsonl"),
    "preferences/truncated": Metric("share", "pairs, or answers, dropped because an answer did not end by itself"),
    "preferences/unreadable": Metric("share", "pairs, or answers, dropped because the judge could not be understood"),
    "preferences/undecided": Metric("share", "pairs dropped because the mean verdict is within the margin"),
    "preferences/verdict": Metric("1", "mean size of a pair's mean verdict, 0 to 3"),
    "preferences/good": Metric("share", "rows that the judge calls good"),
    "preferences/rows": Metric("count", "rows of data.jsonl"),
    "preferences/held_out": Metric("count", "prompts that were not asked, as an evaluation asks them"),
    # answers sampled as training data, over a chunk of prompts
    "sample/accepted": Metric("share", "samples that became a row of data.jsonl"),
    "sample/wrong": Metric("share", "samples dropped for a wrong answer"),
    "sample/prompts_kept": Metric("share", "prompts with a row at least"),
    "sample/rows": Metric("count", "rows of data.jsonl"),
    "sample/length": Metric("tokens", "mean length of the answers kept"),
    "sample/held_out": Metric("count", "prompts that were not asked, as an evaluation asks them"),
    # optimizer
    "optim/grad_norm": Metric("1", "global L2 norm of the gradient before clipping"),
    "optim/lr": Metric("1", "learning rate"),
    # mixture-of-experts layers: training forwards of the step, padding not counted
    "moe/max_violation": Metric("1", "largest load of an expert / mean load - 1, of the worst layer (MaxVio)"),
    "moe/max_violation_mean": Metric("1", "the same, mean over layers"),
    "moe/load_min": Metric("ratio", "smallest load of an expert / mean load, of the worst layer; 0: an idle expert"),
    "moe/entropy": Metric("nats", "mean entropy of the gate scores normalised over all experts; log E: even"),
    "moe/dropped": Metric("share", "assignments to experts dropped for lack of capacity"),
    "moe/replay_coverage": Metric("share", "assignments replayed, of those that replay was asked for"),
    "moe/replay_agreement": Metric("share", "replayed assignments that the router would have chosen itself"),
    "data/held_out_skips": Metric("count", "prompts, documents, pairs, conversations skipped so far as held out"),
    "data/too_long": Metric("count", "pairs or conversations left out so far for a sequence longer than max_length"),
    "data/truncated": Metric("count", "conversations cut so far at max_length"),
    "data/bad_rows": Metric("count", "rows left out: malformed, or not to be written in the chat format"),
    "data/epoch": Metric("1", "passes over the data so far"),
    # speed
    "train/tokens": Metric("tokens", "tokens of the global batch, padding not counted"),
    "train/learned_share": Metric("share", "tokens of the global batch that the loss covers"),
    "train/tokens_per_second": Metric("tokens/s", "tokens trained on a second, all ranks together"),
    "time/step": Metric("s", "wall time of the optimizer step, everything included"),
    "time/rollout": Metric("s", "wall time of sampling"),
    "time/reward": Metric("s", "wall time of scoring"),
    "time/old_log_probs": Metric("s", "pass for the old policy's log-probs, once a rollout phase"),
    "time/reference_log_probs": Metric("s", "pass for the KL reference's log-probs, once a rollout phase"),
    "time/teacher_log_probs": Metric("s", "pass for the teacher's log-probs (on-policy distillation)"),
    "memory/reference": Metric("GiB", "the KL reference's weights on a rank, in host memory or on the device"),
    "time/train": Metric("s", "wall time of forward, backward and optimizer"),
    # evaluation on held-out problems
    "eval/pass_at_1": Metric("share", "mean accuracy of a single sample"),
    "eval/cons_at_k": Metric("share", "problems whose most frequent answer of k is correct"),
    "eval/pass_at_k": Metric("share", "problems with at least one correct answer of k"),
    "eval/format": Metric("share", "completions in the asked format"),
    "eval/language": Metric("share", "mean share of the target language in the words of a chain of thought"),
    "eval/language_no_words": Metric("share", "completions whose thought has no words (each counts 1 above)"),
    "eval/language_prompts": Metric("share", "problems with a target language; written for each language alone"),
    "eval/truncated": Metric("share", "completions cut at max_new_tokens"),
    "eval/unknown": Metric("share", "completions on which the verifier gave no verdict"),
    "eval/length": Metric("tokens", "mean length of a completion"),
    "eval/k": Metric("count", "samples a problem"),
    "eval/problems": Metric("count", "problems"),
}


PER_LAYER = frozenset(("moe/max_violation", "moe/load_min", "moe/entropy", "moe/dropped"))
"""Metrics that may also be written for one decoder layer, counted from 0: "moe/entropy/layer_3"."""


PER_LANGUAGE = frozenset(("reward/language", "reward/language_prompts", "eval/language", "eval/language_prompts"))
"""Metrics that may also be written for the prompts of one target language: "reward/language/zh"."""


PER_NAME = frozenset(
    ("reward/model", "reward/model_std", "reward/model_cut", "reward/model_unfinished", "reward/mean", "groups/prompts")
)
"""Metrics that may also be written for one reward model or one domain: "reward/model/helpful", "reward/mean/safety"."""


_BENCHMARK = re.compile(r"[a-z0-9][a-z0-9_-]*")


def is_known(name: str) -> bool:
    """Whether a run may write this name: one of METRICS, one layer's, language's, model's or domain's own of those in
    PER_LAYER, PER_LANGUAGE and PER_NAME, or a benchmark's.
    """
    whole, _, layer = name.partition("/layer_")
    return (
        metric_of(name) is not None
        or (whole in PER_LAYER and layer.isascii() and layer.isdigit())
        or of_benchmark(name)[0] is not None
    )


def metric_of(name: str) -> Metric | None:
    """Unit and meaning of a name, whichever benchmark, language, reward model or domain it is for; None for an unknown
    one.
    """
    _, name = of_benchmark(name)
    return METRICS.get(name if language_of(name) is None and name_of(name) is None else name.rpartition("/")[0])


def of_benchmark(name: str) -> tuple[str | None, str]:
    """Benchmark and plain name of an evaluation metric: "eval/aime/pass_at_1" -> ("aime", "eval/pass_at_1"); names of
    no benchmark give (None, name).
    """
    group, _, rest = name.partition("/")
    benchmark, _, what = rest.partition("/")
    plain = f"eval/{what}"
    known = plain in METRICS or language_of(plain) is not None
    return (benchmark, plain) if group == "eval" and known and _BENCHMARK.fullmatch(benchmark) else (None, name)


def for_benchmark(name: str, benchmark: str | None) -> str:
    """The name that a benchmark's evaluation metric is written under; the inverse of `of_benchmark`."""
    return name if benchmark is None else f"eval/{benchmark}/{name.removeprefix('eval/')}"


def language_of(name: str) -> str | None:
    """The language that a per-language name ends in: "reward/language/zh" -> "zh"; None for any other."""
    whole, _, code = name.rpartition("/")
    return code if whole in PER_LANGUAGE and code in LANGUAGES else None


def name_of(name: str) -> str | None:
    """The reward model or domain that a name ends in: "reward/model/helpful" -> "helpful"; None for any other."""
    whole, _, last = name.rpartition("/")
    return last if whole in PER_NAME and _BENCHMARK.fullmatch(last) else None


def check_names(names: list[str]) -> None:
    """Raise ValueError when a name is not known: a programmer's mistake, not a user's."""
    unknown = sorted(name for name in set(names) if not is_known(name))
    if unknown:
        raise ValueError(
            f"unknown metrics {unknown}: list them in megatron_r1/observe/names.py with their unit and meaning"
        )


def format_value(value: float, unit: Unit) -> str:
    """Short text of a value for people: 0.8125 share -> "81.2%", 15230 -> "15.2k", 3e-6 ->
    "3e-06".
    """
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if unit == "share":
        return f"{100 * value:.1f}%"
    size = abs(value)
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e3 if letter == 'k' else bound):.1f}{letter}"
    if unit == "tokens" and size >= 1:
        return f"{value:.1f}"
    if unit == "count" or (value == int(value) and size >= 1):
        return f"{value:.0f}" if value == int(value) else f"{value:.1f}"
    if size >= 100:
        return f"{value:.1f}"
    if size >= 1:
        return f"{value:.2f}"
    if size >= 1e-3:
        return f"{value:.4f}"
    return "0" if value == 0 else f"{value:.1e}"
