"""The GRPO objective as keys. Every default is the paper's; every other value is a departure that the run prints.

Sources: DeepSeek-R1 (arXiv 2501.12948) eq. 1-3 and its training details; DeepSeekMath (arXiv 2402.03300) for the
per-token form of the same objective.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.base import Table


class AdvantageConfig(Table):
    """A_i = (r_i - mean(r)) / (std(r) + epsilon) within a group."""

    scale: Literal["std", "none"] = "std"
    """"none" keeps r_i - mean(r) (Dr. GRPO)."""
    std: Literal["population", "sample"] = "population"
    """Which standard deviation; the paper does not say. population divides by G, sample by G - 1."""
    epsilon: NonNegativeFloat = 1e-6
    """Added to the standard deviation; the paper does not say."""


class OverlongConfig(Table):
    """DAPO's soft penalty: 0 up to max_length - buffer, then linear down to -1 at max_length, -1 beyond."""

    max_length: PositiveInt
    buffer: PositiveInt
    factor: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _buffer(self) -> OverlongConfig:
        if self.buffer > self.max_length:
            raise ValueError(f"buffer ({self.buffer}) must not exceed max_length ({self.max_length})")
        return self


class LossConfig(Table):
    """The policy loss. Defaults: the paper's objective, token-wise, mean over a sequence, then over sequences."""

    aggregation: Literal["sequence-mean", "token-mean", "constant"] = "sequence-mean"
    """sequence-mean: 1/N sum_i 1/|o_i| sum_t (the paper); token-mean: 1/sum|o_i| sum_i sum_t (DAPO);
    constant: 1/N sum_i 1/length_constant sum_t (Dr. GRPO)."""
    length_constant: PositiveInt | None = None
    """Denominator of aggregation "constant"; None: the stage's max_new_tokens."""
    ratio: Literal["token", "sequence"] = "token"
    """token: each token's own probability ratio; sequence: exp of the mean log-ratio of the response (GSPO)."""
    clip_low: PositiveFloat = 10.0
    """Lower clip 1 - clip_low. R1's only stated value is 10, for its first RL stage (R1-Zero's is not stated)."""
    clip_high: PositiveFloat | None = None
    """Upper clip 1 + clip_high; None: clip_low. DAPO: 0.28 above a clip_low of 0.2."""
    dual_clip: float | None = Field(default=None, gt=1)
    """For A < 0, bound the loss at dual_clip * |A|; None: no bound (the paper)."""
    kl: Literal["k3", "k1", "k2", "none"] = "k3"
    """Estimator of KL(policy || reference) in the loss; the paper's is k3, unclamped."""
    kl_coefficient: NonNegativeFloat = 0.001
    """beta."""
    reference_every: NonNegativeInt = 400
    """Optimizer steps after which the reference becomes the current policy; 0: never."""
    reference_memory: Literal["host", "device"] = "host"
    """Where the reference's weights wait: host memory, swapped in for their pass, or a second copy on the device."""

    @property
    def epsilon_high(self) -> float:
        """Upper clip with its default filled in."""
        return self.clip_low if self.clip_high is None else self.clip_high

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs enter the loss."""
        return self.kl != "none" and self.kl_coefficient > 0

    @model_validator(mode="after")
    def _reference(self) -> LossConfig:
        if self.reference_memory != "host" and not self.needs_reference:
            off = 'kl = "none"' if self.kl == "none" else "kl_coefficient = 0"
            raise ValueError(
                f'reference_memory = "{self.reference_memory}" without effect: {off} keeps no reference; remove '
                "reference_memory, or switch the KL term on"
            )
        return self


MismatchMetric = Literal[
    "policy/engine_gap",
    "policy/engine_k3",
    "policy/engine_ratio_max",
    "policy/engine_ess",
    "policy/engine_outliers",
    "policy/correction_masked",
    "policy/correction_vetoed",
]
SEQUENCE_METRICS = ("policy/engine_gap", "policy/engine_k3", "policy/engine_ratio_max")
"""Metrics of a step that a single sequence has too, so that a limit may take that sequence out."""

BOUNDS: dict[str, tuple[float, float]] = {"tis": (0.0, 2.0), "mis": (0.5, 2.0), "cis": (0.5, 2.0), "icepop": (0.5, 5.0)}
"""(low, high) of each method at level token and sequence, where a recipe does not set them."""
GEOMETRIC_BOUNDS = (0.9999, 1.0001)
"""The same at level geometric, for every method: a mean over a long response is near 1."""


class CorrectionConfig(Table):
    """`[stage.grpo.correction]`: what is done about w = pi_trainer(o_t) / pi_engine(o_t), taken at the same weights.
    The weight multiplies the token's policy-gradient term and never its KL term. The paper corrects nothing."""

    method: Literal["none", "tis", "mis", "cis", "icepop"] = "none"
    """none: 1; tis: min(w, high), truncated importance sampling; mis: w inside [low, high] and 0 outside, masked
    importance sampling; cis: w clipped to [low, high]; icepop: as mis, under the bounds of its paper."""
    level: Literal["token", "sequence", "geometric"] = "token"
    """What w is: token: the token's own ratio; sequence: the product over the response, for each of its tokens;
    geometric: exp of the response's mean log-ratio. Log-ratios are clamped to [-20, 20] before exp."""
    low: NonNegativeFloat | None = None
    """Not set: 0.5 (mis, cis, icepop), at level geometric 0.9999. tis has no lower bound."""
    high: PositiveFloat | None = None
    """Not set: 2 (tis, mis, cis), 5 (icepop), at level geometric 1.0001, which under bf16 may well leave out most
    responses: look at policy/correction_masked."""
    veto: float | None = Field(default=None, gt=0, lt=1)
    """A response with a token of w below this leaves the policy gradient as a whole, e.g. 1e-4; not set: none does."""
    off_policy_mask: PositiveFloat | None = None
    """DeepSeek-V3.2's delta: a response of negative advantage leaves the policy gradient where its mean
    log(pi_engine / pi) exceeds this, pi being the policy in training; not set: none does."""
    old_policy: Literal["trainer", "rollout"] = "trainer"
    """Whose log-probs are the loss's old policy: the trainer's, recomputed at the start of the phase, or the sampling
    engine's own (no recomputation, and the clip answers for the mismatch too). With "rollout" the metrics of the
    mismatch, veto and limits compare the engine with the policy in training, earlier updates of the phase included."""

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) with the method's defaults filled in; (0, inf) for "none"."""
        if self.method == "none":
            return 0.0, math.inf
        low, high = BOUNDS[self.method] if self.level != "geometric" else GEOMETRIC_BOUNDS
        low = low if self.low is None else self.low
        return 0.0 if self.method == "tis" else low, high if self.high is None else self.high

    @property
    def is_active(self) -> bool:
        """Whether any weight can differ from 1."""
        return self.method != "none" or self.veto is not None or self.off_policy_mask is not None

    @model_validator(mode="after")
    def _combination(self) -> CorrectionConfig:
        if self.method == "none":
            given = [name for name in ("low", "high") if getattr(self, name) is not None]
            given += ["level"] if self.level != "token" else []
            if given:
                raise ValueError(
                    f'{", ".join(given)} without effect: method is "none"; set method = "tis", "mis", "cis" or '
                    f'"icepop", or remove {"it" if len(given) == 1 else "them"}'
                )
            return self
        if self.old_policy == "rollout":
            raise ValueError(
                f'method = "{self.method}" with old_policy = "rollout" would count the mismatch twice: the ratio of '
                'the loss is already taken against the engine; use method = "none" or old_policy = "trainer"'
            )
        if self.method == "tis" and self.low is not None:
            raise ValueError(
                f'low = {self.low:g}: "tis" only truncates from above; remove low, or use method = "cis" (clips both '
                'sides) or "mis" (zero outside)'
            )
        low, high = self.bounds
        if not low <= 1 <= high:
            raise ValueError(
                f"[low, high] = [{low:g}, {high:g}] must hold 1, the ratio of a token on which both sides agree"
            )
        return self


class MismatchLimit(Table):
    """`[[stage.grpo.mismatch_limit]]`: act when the sampling engine's log-probs stray from the trainer's."""

    metric: MismatchMetric
    """A metric of the optimizer step, by its name in metrics.jsonl."""
    above: NonNegativeFloat | None = None
    """Act above this value; for every metric but policy/engine_ess."""
    below: float | None = Field(default=None, gt=0, le=1)
    """Act below this value; for policy/engine_ess, the effective sample size as a share of the tokens."""
    action: Literal["warn", "mask", "stop"] = "warn"
    """warn: a line in the log; stop: write the batch to the stage's folder and end the run, before the step is saved;
    mask: leave out of the policy gradient each single response whose own value of the metric is above."""

    @model_validator(mode="after")
    def _side(self) -> MismatchLimit:
        side, other = ("below", "above") if self.metric == "policy/engine_ess" else ("above", "below")
        if getattr(self, other) is not None or getattr(self, side) is None:
            given = [f"{name} = {value:g}" for name in ("above", "below") if (value := getattr(self, name)) is not None]
            raise ValueError(f"a limit on {self.metric} needs `{side}` alone, got {', '.join(given) or 'neither'}")
        if self.metric == "policy/engine_ratio_max" and self.threshold < 1:
            raise ValueError(f"above = {self.threshold:g}: the largest ratio is never below 1; set above >= 1")
        if self.action == "mask" and self.metric not in SEQUENCE_METRICS:
            raise ValueError(
                f'action = "mask" looks at single responses, and {self.metric} is none of theirs (allowed: '
                f'{", ".join(SEQUENCE_METRICS)}); use action = "warn" or "stop"'
            )
        return self

    @property
    def threshold(self) -> float:
        """The value of `above` or `below`, whichever the metric has."""
        value = self.below if self.above is None else self.above
        assert value is not None  # the validator saw to it
        return value

    def exceeded_by(self, value: float) -> bool:
        """Whether a value of the metric calls for the action; NaN does."""
        return not (value >= self.threshold if self.above is None else value <= self.threshold)


class GrpoConfig(Table):
    """`[stage.grpo]`: one rollout phase samples prompts x group_size completions and feeds `minibatches` steps."""

    prompts: PositiveInt = 512
    """Questions of one rollout phase (the paper: 8,192 outputs = 512 x 16)."""
    group_size: int = Field(default=16, ge=2)
    """Completions of one question, G."""
    minibatches: PositiveInt = 16
    """Random minibatches, one optimizer step each, that one rollout phase is split into (the paper: 16 of 512)."""
    epochs: PositiveInt = 1
    """Passes over one rollout phase."""
    no_signal: Literal["keep", "drop"] = "keep"
    """Fate of groups whose rewards are all equal: keep their zero advantages (the paper; they still feel the KL
    term and count in denominators) or drop them from training. Counted either way."""
    dynamic_sampling: bool = False
    """DAPO: sample further prompts until every group of the phase has signal, of each source as many as its share."""
    max_resampling: int = Field(default=4, ge=1, le=64)
    """With dynamic_sampling: at most this many rollout rounds a phase, then go on with what there is: further groups of
    the other sources take the places of those that a source still lacks."""
    expert_bias: Literal["frozen", "updated"] = "frozen"
    """The aux-loss-free balancing bias of the router during RL."""
    routing_replay: Literal["none", "trainer", "rollout"] = "none"
    """Experts a training forward uses. none: its own choice; trainer: those that the old policy chose in the trainer
    (R2); rollout: those that the rollout engine chose while sampling (R3)."""
    mtp_loss: NonNegativeFloat = 0.0
    """Weight of the multi-token-prediction loss on responses. It trains the multi-token-prediction layers alone, to
    keep them useful for speculative decoding; 0: they are frozen."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    overlong: OverlongConfig | None = None
    correction: CorrectionConfig = CorrectionConfig()
    mismatch_limit: list[MismatchLimit] = Field(default_factory=list)
    """Any number of limits on the mismatch between sampling engine and trainer, each with its action."""

    @model_validator(mode="after")
    def _minibatches(self) -> GrpoConfig:
        outputs = self.prompts * self.group_size
        if outputs % self.minibatches:
            raise ValueError(
                f"minibatches ({self.minibatches}) must divide prompts x group_size = {outputs}, "
                "so that every optimizer step sees the same number of completions"
            )
        if self.routing_replay == "trainer" and self.minibatches * self.epochs == 1:
            raise ValueError(
                'routing_replay = "trainer" has nothing to replay: with minibatches = 1 and epochs = 1 the only step '
                'of a phase is taken by the policy that would be replayed; use "none", "rollout", or more steps a phase'
            )
        if self.dynamic_sampling and self.no_signal == "keep":
            raise ValueError('dynamic_sampling replaces groups without signal: set no_signal = "drop" with it')
        return self

    @property
    def corrects_mismatch(self) -> bool:
        """Whether any token's policy-gradient term can be multiplied by something other than 1."""
        return self.correction.is_active or any(limit.action == "mask" for limit in self.mismatch_limit)

    @model_validator(mode="after")
    def _limits(self) -> GrpoConfig:
        for limit in self.mismatch_limit:
            if limit.metric.startswith("policy/correction") and not self.corrects_mismatch:
                raise ValueError(
                    f"a mismatch_limit on {limit.metric} can never act: nothing is masked; set [stage.grpo.correction] "
                    'or a limit with action = "mask", or remove it'
                )
        return self


class RewardWatchConfig(Table):
    """`[stage.watch]`: reward hacking shows as a reward model's score that rises while the accuracy of the rule-judged
    prompts falls (DeepSeek-R1 v2, appendix B.5). It warns and draws both."""

    window: PositiveInt = 8
    """Phases that two means are taken over: the last so many, against the first so many with that reward model. Nothing
    is said before there are so many; the paper's last 400 steps are 25 phases or less."""
    rise: NonNegativeFloat = 0.1
    """Rise of a reward model's mean value, in its standard deviations over the first window, that counts."""
    fall: NonNegativeFloat = 0.02
    """Fall of the accuracy that counts."""
