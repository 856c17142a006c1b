"""The whole run: model, tokenizer, layout and an ordered list of stages, as one validated object."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_r1.config.base import Table
from megatron_r1.config.data import CorpusConfig, PairsConfig, PromptsConfig, RewardConfig
from megatron_r1.config.grpo import GrpoConfig
from megatron_r1.config.model import ModelConfig, ParallelConfig, TokenizerConfig
from megatron_r1.config.optim import CheckpointConfig, EvalSamplingConfig, OptimizerConfig, SamplingConfig


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


class GrpoStage(TrainStage):
    """Reinforcement learning from rule rewards (R1-Zero)."""

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


class ExportStage(StageBase):
    """The weights as a Hugging Face folder, `<stage>/hf`, that transformers, SGLang and vLLM load."""

    kind: Literal["export"]
    dtype: Literal["bf16", "fp16", "fp32", "fp8"] | None = None
    """Of the weights; fp8: DeepSeek-V3's 128x128 blocks. None: as the model that `like` names, else as config.json says,
    else as trained."""
    scales: Literal["fp32", "power-of-2"] | None = None
    """Of FP8 blocks: amax / 448, or the next power of two (ue8m0). None: as config.json says, else fp32."""
    like: Path | None = None
    """Hugging Face folder that the model came from: gives config.json, tokenizer, dtypes, file names and the FP8 scales
    of what training left alone. None: `model.config` where that is a folder, else the run's own architecture."""
    shard_gb: float = Field(default=5.0, gt=0)
    """Most of a file, in 10^9 bytes."""
    workers: PositiveInt = 4
    """Files that rank 0 writes at a time."""


Stage = Annotated[PretrainStage | GrpoStage | RewardModelStage | EvalStage | ExportStage, Field(discriminator="kind")]


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
