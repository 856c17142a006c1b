"""The GRPO objective as keys. Every default is the paper's; every other value is a departure that the run prints.

Sources: DeepSeek-R1 (arXiv 2501.12948) eq. 1-3 and its training details; DeepSeekMath (arXiv 2402.03300) for the
per-token form of the same objective.
"""

from __future__ import annotations

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

    @property
    def epsilon_high(self) -> float:
        """Upper clip with its default filled in."""
        return self.clip_low if self.clip_high is None else self.clip_high

    @property
    def needs_reference(self) -> bool:
        """Whether reference log-probs enter the loss."""
        return self.kl != "none" and self.kl_coefficient > 0


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
    """DAPO: sample further prompts until every group of the phase has signal."""
    max_resampling: int = Field(default=4, ge=1, le=64)
    """With dynamic_sampling: at most this many rollout rounds a phase, then go on with what there is."""
    expert_bias: Literal["frozen", "updated"] = "frozen"
    """The aux-loss-free balancing bias of the router during RL."""
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    overlong: OverlongConfig | None = None

    @model_validator(mode="after")
    def _minibatches(self) -> GrpoConfig:
        outputs = self.prompts * self.group_size
        if outputs % self.minibatches:
            raise ValueError(
                f"minibatches ({self.minibatches}) must divide prompts x group_size = {outputs}, "
                "so that every optimizer step sees the same number of completions"
            )
        if self.dynamic_sampling and self.no_signal == "keep":
            raise ValueError('dynamic_sampling replaces groups without signal: set no_signal = "drop" with it')
        return self
