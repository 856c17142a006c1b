"""Evaluation on held-out problems: pass@1, cons@k and pass@k from k samples a problem.

DeepSeek-R1 (arXiv 2501.12948), section 3: k samples at temperature 0.6 and top-p 0.95; pass@1 is their mean accuracy,
cons@k the accuracy of the majority vote. pass@k is the unbiased estimator of Chen et al. (arXiv 2107.03374).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from megatron_r1.algorithms.pass_at_k import cons_at_k, pass_at_1, pass_at_k
from megatron_r1.config.errors import UserError
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.stages import AskedProblems, ProblemSet
from megatron_r1.data.corpus import classify_style
from megatron_r1.data.cursor import epoch_order
from megatron_r1.data.prompts import PromptSource, open_prompts
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.observe.names import for_benchmark
from megatron_r1.parallel.world import World
from megatron_r1.rewards.language import language_metrics
from megatron_r1.rewards.mixer import Scorer
from megatron_r1.rewards.workers import VerifierPool
from megatron_r1.rollout.engine import Progress, RolloutEngine
from megatron_r1.types import Group, Prompt


class Evaluation(NamedTuple):
    """What one problem set has shown."""

    metrics: dict[str, float]  # eval/<metric>, or eval/<benchmark>/<metric>
    styles: dict[str, int]  # style of the completion's work (`data/corpus.py`) -> completions
    groups: list[Group]  # scored, in the order of the prompts


def heldout_prompts(asked: AskedProblems, tokenizer: Tokenizer) -> list[Prompt]:
    """The problems of a set: the first of its source, in the order of its seed when shuffled.

    Raises:
        UserError: the source holds too few, or a row that cannot be asked.
    """
    config, wanted = asked.prompts, asked.table.problems
    source = open_prompts(config, tokenizer)
    seed = config.seed if config.shuffle else None
    if isinstance(source, PromptSource):
        prompts = [source[i] for i in epoch_order(len(source), seed, epoch=0)[:wanted]]
    else:
        prompts = list(islice(source.stream(0, seed, 0), wanted))
    if len(prompts) < wanted:
        raise UserError(
            f"{asked.key}.problems = {wanted}, but its source holds {len(prompts)}: "
            f"set problems = {len(prompts)} or name a larger source"
        )
    return prompts


def evaluate(
    asked: AskedProblems,
    prompts: list[Prompt],
    engine: RolloutEngine,
    world: World,
    seed: int,
    verifier_workers: int,
    progress: Progress | None = None,
) -> Evaluation:
    """Sample and judge one problem set; equal on all ranks. Collective."""
    # Every replica decodes equally many problems, as shared experts ask; a repeated one is judged once.
    table = asked.table
    share = -(-len(prompts) // world.replicas)
    mine = [prompts[(world.replica_rank + i * world.replicas) % len(prompts)] for i in range(share)]
    completions = engine.generate(mine, table.k, table.sampling, seed, progress)
    groups = [Group(prompt=p, completions=c) for p, c in zip(mine, completions, strict=True)]
    if world.is_leader:
        with VerifierPool(verifier_workers) as pool:
            Scorer(list(_measured(table)), pool).score_groups(groups)
    found = {g.prompt.id: g for part in world.all_gather_replicas(world.broadcast_in_replica(groups)) for g in part}
    judged = [found[prompt.id] for prompt in prompts]
    styles = Counter(classify_style(c.text) for group in judged for c in group.completions)
    metrics = evaluation_metrics(judged, table.k)
    return Evaluation({for_benchmark(n, asked.benchmark): v for n, v in metrics.items()}, dict(styles), judged)


def _measured(table: ProblemSet) -> Iterator[RewardConfig]:
    yield RewardConfig(kind="accuracy", deadline=table.deadline)
    yield RewardConfig(kind="format", tags=table.tags)
    if (language := table.default_language) is not None:
        yield RewardConfig(kind="language", default_language=language, han_per_word=table.han_per_word)


def evaluation_metrics(groups: list[Group], k: int) -> dict[str, float]:
    """pass@1, cons@k, pass@k and the shape of the completions; every completion must have been scored."""
    scores = [[c.score for c in group.completions if c.score is not None] for group in groups]
    correct = [[score.verdict.status == "correct" for score in row] for row in scores]
    answers = [[score.verdict.extracted for score in row] for row in scores]
    flat = [score for row in scores for score in row]
    completions = [c for group in groups for c in group.completions]
    return {
        "eval/pass_at_1": pass_at_1(correct),
        "eval/cons_at_k": cons_at_k(answers, correct, k),
        "eval/pass_at_k": sum(pass_at_k(len(row), sum(row), k) for row in correct) / len(correct),
        "eval/format": sum(score.parts["format"] for score in flat) / len(flat),
        "eval/truncated": sum(c.finish_reason == "length" for c in completions) / len(completions),
        "eval/unknown": sum(score.verdict.status == "unknown" for score in flat) / len(flat),
        "eval/length": sum(len(c.token_ids) for c in completions) / len(completions),
        "eval/k": float(k),
        "eval/problems": float(len(groups)),
        **language_metrics(groups, "eval/language"),
    }
