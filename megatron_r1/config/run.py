"""The whole run: model, tokenizer, layout and an ordered list of stages, as one validated object."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.base import Table
from megatron_r1.config.data import (
    R1_ZERO_TEMPLATE,
    ConversationsConfig,
    CorpusConfig,
    PairsConfig,
    PromptsConfig,
    RewardConfig,
    check_template,
)
from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.languages import HAN_PER_WORD, check_language
from megatron_r1.config.model import ModelConfig, ParallelConfig, TokenizerConfig
from megatron_r1.config.optim import (
    CheckpointConfig,
    EvalSamplingConfig,
    OptimizerConfig,
    SamplingConfig,
    SftOptimizerConfig,
)


class StageBase(Table):
    """What every stage has."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the stage and of its folder in the run directory."""
    init_from: str | None = Field(default=None, alias="from")
    """Where its weights come from: an earlier stage's name or a checkpoint folder. None: the stage before it, or
    random weights for the first."""


class TrainStage(StageBase):
    """What every training stage has."""

    steps: PositiveInt
    """Optimizer steps in all."""
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    micro_batch_tokens: PositiveInt = 8192
    """Most tokens of a micro-batch: memory of activations against speed. Context-parallel ranks share them."""
    packing: bool = True
    """Sequences of any length share a row, each attending to itself only. false: one padded row a sequence."""
    log_every: PositiveInt = 1
    """Steps between two lines of metrics."""


class PretrainStage(TrainStage):
    """Next-token prediction on generated documents."""

    kind: Literal["pretrain"]
    corpus: list[CorpusConfig] = Field(min_length=1)
    batch_tokens: PositiveInt = 1024
    """Tokens of a global batch, about; documents are batched by length."""
    mtp_loss: float = Field(default=0.1, ge=0)
    """Weight of the multi-token-prediction loss, where the model has such layers (V3: 0.3, later 0.1)."""


class SftStage(TrainStage):
    """Supervised fine-tuning on conversations: cold start, the 800K mix, distillation.

    The loss is the mean over all learned tokens of the global batch, so a long answer weighs more than a short one.
    """

    kind: Literal["sft"]
    steps: NonNegativeInt = 0
    """Optimizer steps in all. 0: as `epochs` says."""
    epochs: PositiveFloat | None = None
    """Instead of `steps`: passes over the data (the paper: 2 to 3), in ceil(rows x epochs / batch) steps. Rows that are
    left out only when their turn comes (held out, too long) make the passes over the others a little more than this."""
    optimizer: SftOptimizerConfig = SftOptimizerConfig()
    data: ConversationsConfig
    heldout: ConversationsConfig | None = None
    """Conversations to measure the loss on after the last step; training leaves out every conversation that asks one
    of their questions."""
    format: Literal["chat", "r1", "deepseek"] = "chat"
    """How a conversation is written. chat: the chat template of a Hugging Face tokenizer; r1: each question in
    `template`, answers and thoughts in this project's <think> and <answer> tags; deepseek: DeepSeek's chat format. The
    last two need no template in the tokenizer (char and byte: put their marks into tokenizer.tags)."""
    template: str = R1_ZERO_TEMPLATE
    """format = "r1" only: what a question is wrapped in: "r1-zero", "plain", or a text that contains `{prompt}`, as
    `prompts.template` of the stages that sample from the model later. Later turns leave out r1-zero's introduction."""
    turns: Literal["all", "last"] = "all"
    """Assistant turns that are learned. A format that deletes the thoughts of earlier turns (DeepSeek's, Qwen3's) shows
    the model each answer after a history without them: then "all" makes one sequence of each turn, "last" only one."""
    batch: PositiveInt = 128
    """Conversations of an optimizer step (the paper: 128; distillation: 64)."""
    max_length: PositiveInt = 32768
    """Longest sequence that is trained on, never more than the model has positions."""
    too_long: Literal["skip", "truncate"] = "skip"
    """A conversation with a longer sequence is left out, or cut there, which leaves its last answer without an end;
    counted either way."""
    mtp_loss: float = Field(default=0.1, ge=0)
    """Weight of the multi-token-prediction loss, where the model has such layers (V3: 0.3, later 0.1)."""
    expert_bias: Literal["frozen", "updated"] = "frozen"
    """The aux-loss-free balancing bias of the router; DeepSeek-V3 left it alone from the end of pre-training on."""

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> SftStage:
        if (self.steps > 0) == (self.epochs is not None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        return self

    @model_validator(mode="after")
    def _template(self) -> SftStage:
        check_template(self.template)
        if self.format != "r1" and self.template != R1_ZERO_TEMPLATE:
            raise ValueError(f'`template` has no effect with format = "{self.format}"; it belongs to "r1"')
        return self

    def planned_steps(self, rows: int) -> int:
        """Optimizer steps for a file of so many well-formed rows."""
        return self.steps or math.ceil(rows * (self.epochs or 0) / self.batch)


class GrpoStage(TrainStage):
    """Reinforcement learning from rule rewards (R1-Zero; with the language reward, R1's first RL stage)."""

    kind: Literal["grpo"]
    prompts: PromptsConfig
    reward: list[RewardConfig] = Field(min_length=1)
    verifier_workers: PositiveInt = 4
    """Processes a replica judges answers in; none is started before a verifier needs one."""
    sampling: SamplingConfig = SamplingConfig()
    grpo: GrpoConfig = GrpoConfig()

    @model_validator(mode="after")
    def _whole_distribution(self) -> GrpoStage:
        if self.sampling.top_p < 1 or self.sampling.top_k > 0:
            raise ValueError(
                f"sampling.top_p = {self.sampling.top_p:g}, top_k = {self.sampling.top_k}: the loss takes "
                "probabilities of the whole distribution, so truncated sampling would be off-policy without a word; "
                "use top_p = 1 and top_k = 0 in a grpo stage (eval stages may truncate)"
            )
        return self


class RewardModelStage(TrainStage):
    """A scalar reward model from preference pairs (Bradley-Terry), on the same trunk as the policy."""

    kind: Literal["reward_model"]
    pairs: PairsConfig
    batch: PositiveInt = 256
    """Pairs of an optimizer step (the paper: a batch of 256, lr = 6e-6, one epoch)."""
    max_length: PositiveInt = 8192
    """Longest sequence (prompt with template, answer, end) that is trained on, never more than the model has
    positions; a pair with a longer one is left out and counted."""
    heldout: PairsConfig | None = None
    """Pairs to measure the model on after the last step; training leaves their prompts out."""

    def longest(self, positions: int) -> int:
        """Most tokens of a sequence, for a model of so many positions."""
        return min(self.max_length, positions)


class EvalStage(StageBase):
    """pass@1, cons@k and pass@k on held-out problems."""

    kind: Literal["eval"]
    prompts: PromptsConfig
    problems: PositiveInt = 256
    """Held-out problems, the first of the source; training prompts are checked never to contain them."""
    k: PositiveInt = 16
    """Samples a problem."""
    sampling: EvalSamplingConfig = EvalSamplingConfig()
    deadline: float = Field(default=1.0, gt=0)
    """Seconds a verifier may take."""
    verifier_workers: PositiveInt = 4
    """Processes a replica judges answers in; none is started before a verifier needs one."""
    default_language: str | None = None
    """Measure language consistency as the reward of kind "language" does, with this target for prompts whose language
    neither a column nor the words of the question tell. None: not measured."""
    han_per_word: PositiveFloat = HAN_PER_WORD
    """With default_language: Chinese characters that count as one word."""

    @model_validator(mode="after")
    def _language(self) -> EvalStage:
        if self.default_language is not None:
            check_language(self.default_language)
        elif self.han_per_word != HAN_PER_WORD:
            raise ValueError(
                f"han_per_word = {self.han_per_word:g} without effect: set default_language too, or remove it"
            )
        return self


class ExportStage(StageBase):
    """The weights as a Hugging Face folder, `<stage>/hf`, that transformers, SGLang and vLLM load."""

    kind: Literal["export"]
    dtype: Literal["bf16", "fp16", "fp32", "fp8"] | None = None
    """Of the weights; fp8: DeepSeek-V3's 128x128 blocks. None: as the model that `like` names, else as config.json
    says, else as trained."""
    scales: Literal["fp32", "power-of-2"] | None = None
    """Of FP8 blocks: amax / 448, or the next power of two (ue8m0). None: as config.json says, else fp32."""
    like: Path | None = None
    """Hugging Face folder that the model came from: gives config.json, tokenizer, dtypes, file names and the FP8 scales
    of what training left alone. None: `model.config` where that is a folder, else the run's own architecture."""
    shard_gb: float = Field(default=5.0, gt=0)
    """Most of a file, in 10^9 bytes."""
    workers: PositiveInt = 4
    """Files that rank 0 writes at a time."""


Stage = Annotated[
    PretrainStage | SftStage | GrpoStage | RewardModelStage | EvalStage | ExportStage, Field(discriminator="kind")
]


class RunConfig(Table):
    """A recipe file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is runs/<name> unless --run-dir says otherwise."""
    seed: int = 1234
    """Seed of weights, data order and sampling."""
    model: ModelConfig
    tokenizer: TokenizerConfig
    parallel: ParallelConfig = ParallelConfig()
    stage: list[Stage] = Field(min_length=1)
    threads: PositiveInt = 1
    """CPU threads a rank (OMP_NUM_THREADS)."""
    timeout_minutes: PositiveInt = 30
    """Longest a collective may wait before the run ends with an error."""

    @model_validator(mode="after")
    def _stages(self) -> RunConfig:
        names = [stage.name for stage in self.stage]
        for i, stage in enumerate(self.stage):
            if stage.name in names[:i]:
                raise ValueError(f"two stages are called {stage.name!r}; names must differ")
            if stage.kind in ("eval", "export") and i == 0 and stage.init_from is None:
                raise ValueError(f"stage {stage.name!r} {stage.kind}s nothing: set `from` to a checkpoint folder")
        return self
