"""The stages of a recipe, one table class a kind. `config/run.py` puts them together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_r1.config.base import Table
from megatron_r1.config.data import (
    R1_ZERO_TEMPLATE,
    ConversationsConfig,
    CorpusConfig,
    LabelsConfig,
    MixSource,
    PairsConfig,
    PromptsConfig,
    Tags,
    check_template,
)
from megatron_r1.config.grpo import GrpoConfig, RewardWatchConfig
from megatron_r1.config.judges import JudgeConfig, RewriteConfig
from megatron_r1.config.languages import HAN_PER_WORD, check_language
from megatron_r1.config.optim import (
    STUDENTS,
    CheckpointConfig,
    EvalSamplingConfig,
    OptimizerConfig,
    SamplingConfig,
    SftOptimizerConfig,
    Student,
)
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.config.sampling import DecontaminateConfig, FilterConfig
from megatron_r1.config.schedule import check_always, check_schedule

PromptSources = Annotated[
    list[PromptsConfig], BeforeValidator(lambda given: [given] if isinstance(given, dict | PromptsConfig) else given)
]
"""One source of prompts, written as a table, or several, as an array of tables."""


class StageBase(Table):
    """What every stage has."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    """Name of the stage and of its folder in the run directory."""
    init_from: str | None = Field(default=None, alias="from")
    """Where its weights come from: another stage's name or a checkpoint folder. None: the last stage written before it
    that trains a language model of the same `model`, or random weights where there is none."""
    model: str | None = None
    """Name of the `[models.<name>]` table that its weights belong to, e.g. a student. None: `[model]`."""


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
    interleave: bool = False
    """Draw each document from one of the corpora, by `share`, instead of visiting them in order."""
    batch_tokens: PositiveInt = 1024
    """Tokens of a global batch, about; documents are batched by length."""
    mtp_loss: float = Field(default=0.1, ge=0)
    """Weight of the multi-token-prediction loss, where the model has such layers (V3: 0.3, later 0.1)."""


class EpochStage(TrainStage):
    """What stages have that learn from a file of rows."""

    steps: NonNegativeInt = 0
    """Optimizer steps in all. 0: as `epochs` says."""
    epochs: PositiveFloat | None = None
    """Instead of `steps`: passes over the data (the paper: 2 to 3 in fine-tuning, 1 for reward models), in ceil(rows x
    epochs / batch) steps. Rows that are left out only when their turn comes (held out, too long) make the passes over
    the others a little more than this."""
    batch: PositiveInt
    """Rows of an optimizer step."""

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> EpochStage:
        if (self.steps > 0) == (self.epochs is not None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        return self

    def planned_steps(self, rows: int) -> int:
        """Optimizer steps for a file of so many well-formed rows."""
        return self.steps or math.ceil(rows * (self.epochs or 0) / self.batch)


class SftStage(EpochStage):
    """Supervised fine-tuning on conversations: cold start, the 800K mix, distillation.

    The loss is the mean over all learned tokens of the global batch, so a long answer weighs more than a short one.
    """

    kind: Literal["sft"]
    student: Student | None = None
    """One of the paper's distilled students: its learning rate (2e-5 to 1e-4), a batch of 64 and, without `steps`, two
    epochs, wherever the recipe does not say otherwise."""
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

    @model_validator(mode="before")
    @classmethod
    def _of_student(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("student") not in STUDENTS:
            return given
        optimizer = {"lr": STUDENTS[given["student"]], **given.get("optimizer", {})}
        length = {} if given.get("steps") or given.get("epochs") else {"epochs": 2.0}
        return {"batch": 64, **length, **given, "optimizer": optimizer}

    @model_validator(mode="after")
    def _template(self) -> SftStage:
        check_template(self.template)
        if self.format != "r1" and self.template != R1_ZERO_TEMPLATE:
            raise ValueError(f'`template` has no effect with format = "{self.format}"; it belongs to "r1"')
        return self


def check_untruncated(sampling: SamplingConfig, kind: str) -> None:
    """Raise ValueError for top-p or top-k sampling in a stage that learns from its samples."""
    if sampling.top_p < 1 or sampling.top_k > 0:
        raise ValueError(
            f"sampling.top_p = {sampling.top_p:g}, top_k = {sampling.top_k}: the loss takes probabilities of the "
            "whole distribution, so truncated sampling would be off-policy without a word; use top_p = 1 and "
            f"top_k = 0 in a {kind} stage (eval stages may truncate)"
        )


class GrpoStage(TrainStage):
    """Reinforcement learning: R1-Zero from rule rewards; with the language reward, R1's first RL stage; with general
    prompts and reward models, its second."""

    kind: Literal["grpo"]
    prompts: PromptSources = Field(min_length=1)
    """Where questions come from: one table, or several, whose `weight` says how a phase is shared out among them."""
    reward: list[RewardConfig] = Field(min_length=1)
    """The terms of the reward."""
    verifier_workers: PositiveInt = 4
    """Processes a replica judges answers in; none is started before a verifier needs one."""
    sampling: SamplingConfig = SamplingConfig()
    grpo: GrpoConfig = GrpoConfig()
    watch: RewardWatchConfig = RewardWatchConfig()

    @model_validator(mode="after")
    def _whole_distribution(self) -> GrpoStage:
        check_untruncated(self.sampling, "grpo")
        check_schedule(self.steps, self.grpo.minibatches * self.grpo.epochs, self.prompts, self.reward)
        return self

    @model_validator(mode="after")
    def _domains(self) -> GrpoStage:
        known = {source.domain for source in self.prompts}
        for reward in self.reward:
            if strange := sorted(set(reward.domains) - known):
                raise ValueError(
                    f"reward {reward.label!r} has domains = {strange}, which no prompt source has (theirs: "
                    f"{', '.join(sorted(known))}); set `domain` of a source, or remove it"
                )
        for domain in sorted(known):
            models = [reward.label for reward in self.reward if reward.kind == "model" and reward.covers(domain)]
            if len(models) > 1:
                raise ValueError(
                    f"prompts of the domain {domain!r} would be scored by {len(models)} reward models "
                    f"({', '.join(models)}); each prompt belongs to exactly one: set `domains` of the rewards"
                )
        return self


class RewardModelStage(EpochStage):
    """A scalar reward model on the same trunk as the policy: pairwise (Bradley-Terry, helpfulness) from preference
    pairs, or pointwise (safety) from labelled answers."""

    kind: Literal["reward_model"]
    loss: Literal["pairwise", "pointwise"] = "pairwise"
    """pairwise: -log sigmoid(chosen - rejected), from `pairs`; pointwise: binary cross-entropy of sigmoid(value), from
    `labels`. The paper: pairwise for helpfulness, pointwise for safety."""
    pairs: PairsConfig | None = None
    """loss = "pairwise" only: preference pairs."""
    labels: LabelsConfig | None = None
    """loss = "pointwise" only: answers labelled good (safe) or bad."""
    batch: PositiveInt = 256
    """Pairs, or labelled answers, of an optimizer step (the paper: a batch of 256, lr = 6e-6, one epoch)."""
    max_length: PositiveInt = 8192
    """Longest sequence (prompt with template, answer, end) that is trained on, never more than the model has
    positions; a pair with a longer one is left out and counted."""
    heldout: PairsConfig | None = None
    """Pairs to measure the model on after the last step; training leaves their prompts out."""
    heldout_labels: LabelsConfig | None = None
    """loss = "pointwise" only: the same with labelled answers."""

    @model_validator(mode="after")
    def _data_of_loss(self) -> RewardModelStage:
        pairwise = self.loss == "pairwise"
        wanted, other = ("pairs", "labels") if pairwise else ("labels", "pairs")
        strange = [
            key for key in (other, "heldout_labels" if pairwise else "heldout") if getattr(self, key) is not None
        ]
        if getattr(self, wanted) is None or strange:
            raise ValueError(
                f'loss = "{self.loss}" needs `{wanted}`' + (f" and takes no `{strange[0]}`" if strange else "")
            )
        return self

    @property
    def template(self) -> str:
        """What its answers follow."""
        rows = self.pairs or self.labels
        assert rows is not None, "the validator saw to it"
        return rows.template

    def longest(self, positions: int) -> int:
        """Most tokens of a sequence, for a model of so many positions."""
        return min(self.max_length, positions)


class ProblemSet(Table):
    """Held-out problems and how they are asked."""

    problems: PositiveInt = 256
    """Held-out problems, the first of the source; training prompts are checked never to contain them."""
    k: PositiveInt = 16
    """Samples a problem."""
    sampling: EvalSamplingConfig = EvalSamplingConfig()
    deadline: float = Field(default=1.0, gt=0)
    """Seconds a verifier may take."""
    tags: Tags = "think-answer"
    """What counts as well-formed, as in the reward of kind "format"."""
    default_language: str | None = None
    """Measure language consistency as the reward of kind "language" does, with this target for prompts whose language
    neither a column nor the words of the question tell. None: not measured."""
    han_per_word: PositiveFloat = HAN_PER_WORD
    """With default_language: Chinese characters that count as one word."""

    @model_validator(mode="after")
    def _language(self) -> ProblemSet:
        if self.default_language is not None:
            check_language(self.default_language)
        elif self.han_per_word != HAN_PER_WORD:
            raise ValueError(
                f"han_per_word = {self.han_per_word:g} without effect: set default_language too, or remove it"
            )
        return self


class BenchmarkConfig(ProblemSet):
    """`[[benchmark]]`: a problem set that several eval stages share, e.g. one a checkpoint. The first one gives the
    accuracy, cons@k, language and format columns of the closing table; each further one a column named after it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Its name: in eval stages, metrics (eval/<name>/...) and the closing table."""
    prompts: PromptsConfig

    @model_validator(mode="after")
    def _always(self) -> BenchmarkConfig:
        check_always([self.prompts], "a benchmark")
        return self


class AskedProblems(NamedTuple):
    """A problem set as an eval stage asks it, whether its own or a benchmark; see `RunConfig.problem_sets`."""

    benchmark: str | None
    """Name of the `[[benchmark]]`; None: the stage's own prompts."""
    key: str
    """Where it stands in the recipe, for messages: "benchmark.aime", "stage.eval-base"."""
    table: ProblemSet
    prompts: PromptsConfig


class EvalStage(ProblemSet, StageBase):
    """pass@1, cons@k and pass@k on held-out problems: of `prompts`, or of the benchmarks named."""

    kind: Literal["eval"]
    prompts: PromptsConfig | None = None
    """The problems of this stage alone."""
    benchmarks: list[str] = Field(default_factory=list)
    """Names of `[[benchmark]]` tables, instead of `prompts`."""
    row: str | None = None
    """Name of its row in the closing table. None: the stage that the weights come from."""
    verifier_workers: PositiveInt = 4
    """Processes a replica judges answers in; none is started before a verifier needs one."""

    @model_validator(mode="after")
    def _problems(self) -> EvalStage:
        if (self.prompts is None) == (not self.benchmarks):
            raise ValueError("give exactly one of `prompts` and `benchmarks`")
        check_always([] if self.prompts is None else [self.prompts], "an eval stage")
        if self.benchmarks:
            given = sorted(self.model_fields_set & set(ProblemSet.model_fields))
            if any(getattr(self, key) != ProblemSet.model_fields[key].default for key in given if key != "sampling"):
                raise ValueError(
                    f"{', '.join(given)} without effect beside `benchmarks`: those tables say how they are asked"
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


class SampleStage(StageBase):
    """Rejection sampling: n answers a prompt, of which the correct and readable ones become conversations to fine-tune
    on: `<stage>/data.jsonl`, with a dataset card. Cold-start data (R1-Zero's own samples, rewritten) and the reasoning
    data of the second fine-tuning are both made here. A prompt whose verifier is "judge" is judged by `judge`, one
    with "none" is always accepted."""

    kind: Literal["sample"]
    prompts: PromptSources = Field(min_length=1)
    """Where questions come from; each source is asked once, in its order, up to its `size`."""
    n: PositiveInt = 4
    """Answers sampled of each prompt (the paper: several)."""
    sampling: SamplingConfig = SamplingConfig()
    deadline: PositiveFloat = 1.0
    """Seconds a verifier may take."""
    verifier_workers: PositiveInt = 4
    """Processes a replica judges answers in; none is started before a verifier needs one."""
    judge: JudgeConfig | None = None
    """Compares answers with the reference where the source's verifier is "judge"."""
    filter: FilterConfig = FilterConfig()
    keep: PositiveInt = 1
    """Most conversations of one prompt."""
    prefer: Literal["random", "short", "long"] = "random"
    """Which of a prompt's good answers are kept, where there are more: drawn by the seed, or by length."""
    rewrite: RewriteConfig | None = None
    """Rewrites thought and summary of every kept answer (cold start: readable, conversational, in the question's
    language). None: kept as sampled."""
    chunk: PositiveInt = 64
    """Prompts between two points from which a killed stage goes on."""

    @model_validator(mode="after")
    def _always(self) -> SampleStage:
        check_always(self.prompts, "a sample stage")
        return self


class PreferencesStage(StageBase):
    """Training data of a reward model: several answers a prompt, compared by a judge into preference pairs, or
    labelled good or bad one by one: `<stage>/data.jsonl`, with a dataset card."""

    kind: Literal["preferences"]
    form: Literal["pairs", "labels"] = "pairs"
    """pairs: {prompt, chosen, rejected} for a pairwise loss; labels: {prompt, response, label} for a pointwise one."""
    prompts: PromptSources = Field(min_length=1)
    """General prompts; each source is asked once, in its order, up to its `size`."""
    n: int = Field(default=2, ge=1)
    """Answers sampled of each prompt; form = "pairs" compares the first with the second, the third with the fourth."""
    sampling: SamplingConfig = SamplingConfig()
    judge: JudgeConfig
    votes: PositiveInt = 4
    """Verdicts of a pair, each with the two answers in a random order, that are averaged (the paper: 4)."""
    margin: float = Field(default=1.0, ge=0)
    """Pairs are kept where the mean verdict is above this, on the scale of -3 (A<<B), -1, 0, 1, 3 (A>>B)."""
    balance_length: bool = True
    """Leave out pairs until chosen and rejected answers are about as long on average, as in the paper."""
    sees: Literal["summary", "response"] | None = None
    """What judge and reward model are given: what follows the thought, or all. None: as in the paper, the summary for
    pairs (helpfulness), the response for labels (safety)."""
    chunk: PositiveInt = 64
    """Prompts between two points from which a killed stage goes on."""

    @model_validator(mode="after")
    def _pairs(self) -> PreferencesStage:
        if self.form == "pairs" and self.n % 2:
            raise ValueError(f'n = {self.n}: form = "pairs" compares answers two by two; use an even number')
        check_always(self.prompts, "a preferences stage")
        return self

    @property
    def shown(self) -> Literal["summary", "response"]:
        """What judge and reward model are given; by default as in the paper (v2, section 3.1.2)."""
        return self.sees or ("summary" if self.form == "pairs" else "response")


class MixStage(StageBase):
    """Conversations of several sources, shares and caps, less what an evaluation asks: `<stage>/data.jsonl`."""

    kind: Literal["mix"]
    sources: list[MixSource] = Field(min_length=1)
    size: PositiveInt | None = None
    """Rows in all, shared out by `weight`; None: every source gives all it has, up to its `cap`."""
    decontaminate: DecontaminateConfig = DecontaminateConfig()


class DistillStage(TrainStage):
    """On-policy distillation: the student samples, and learns to give its own tokens the teacher's probabilities. The
    loss is the reverse KL divergence to the teacher, per token (its gradient is that of the k2 estimator)."""

    kind: Literal["distill"]
    teacher: str
    """Stage name or checkpoint folder of the teacher; it must share the tokenizer."""
    teacher_model: str | None = None
    """Name of the `[models.<name>]` table that the teacher's weights belong to. None: `[model]`."""
    prompts: PromptSources = Field(min_length=1)
    questions: PositiveInt = 32
    """Questions of an optimizer step."""
    n: PositiveInt = 4
    """Samples of each question."""
    sampling: SamplingConfig = SamplingConfig()
    teacher_memory: Literal["host", "device"] = "host"
    """Where the teacher's weights wait while the student samples and learns."""

    @model_validator(mode="after")
    def _whole_distribution(self) -> DistillStage:
        check_untruncated(self.sampling, "distill")
        check_always(self.prompts, "a distill stage")
        return self


Stage = Annotated[
    PretrainStage
    | SftStage
    | GrpoStage
    | RewardModelStage
    | DistillStage
    | SampleStage
    | PreferencesStage
    | MixStage
    | EvalStage
    | ExportStage,
    Field(discriminator="kind"),
]
LanguageModelStage = PretrainStage | SftStage | GrpoStage | DistillStage
"""Stages whose checkpoints hold a language model."""
