"""What flows between the rooms: Prompt -> Completion (with its Score) -> Group -> Sample; PreferencePair,
LabelledAnswer, Conversation -> Sample.

Every list marked [T] is aligned with `Completion.token_ids`. A group is an object, never a reshape of a flat
list, so uneven or failed groups stay correct by construction. Nothing here imports torch: a `Sample` becomes
tensors only in `data/batching.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length", "abort"]
VerdictStatus = Literal["correct", "wrong", "unknown"]
Role = Literal["system", "user", "assistant"]


@dataclass(kw_only=True, slots=True)
class Prompt:
    """One question put to the policy.

    Example: Prompt(id="chain_sum:17", question="5-6+9=?", text="5-6+9=?", token_ids=[...], answer="8",
    verifier="integer", metadata={"terms": 3}).
    """

    id: str  # stable across runs: "<source>:<index>"; held-out checks and resume rely on it
    question: str  # the raw question, before the template
    text: str  # what the model is given, template applied
    token_ids: list[int]  # `text` as the tokenizer sees it, never empty
    answer: str | None  # the reference answer; None where only a verifier knows
    verifier: str  # key in `rewards.accuracy.VERIFIERS`
    metadata: dict[str, Any] = field(default_factory=dict)
    language: str | None = None  # code (`config/languages.py`) where the source says it; None: read it off the question
    domain: str = "reasoning"  # of its source; rewards name the domains that they score
    source: int = 0  # number of the stage's prompt source that it comes from


@dataclass(kw_only=True, slots=True)
class LanguageUse:
    """The words of one chain of thought, and those of the language it should be in.

    Example: LanguageUse(target="zh", words=12.5, target_words=10.0), whose share is 0.8.
    """

    target: str  # code (`config/languages.py`)
    words: float  # >= 0; not whole, as Han characters are divided by a constant
    target_words: float  # <= words

    @property
    def share(self) -> float:
        """target_words / words; 1 for a thought without words, which mixes nothing."""
        return self.target_words / self.words if self.words else 1.0


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What a verifier says of one completion; `unknown` is never silently counted as wrong."""

    status: VerdictStatus
    extracted: str | None = None  # the answer as read from the completion; majority votes count these
    detail: str = ""  # why it is unknown: "deadline 1.0 s", "ValueError: ..."


@dataclass(kw_only=True, slots=True)
class Score:
    """The reward of one completion with its breakdown.

    Example: Score(total=1.5, parts={"accuracy": 1.0, "format": 0.5}, verdict=Verdict(status="correct")).
    `parts` holds the weighted contributions, so that sum(parts.values()) == total.
    """

    total: float
    parts: dict[str, float]
    verdict: Verdict
    language: LanguageUse | None = None  # None: not asked for
    in_format: bool | None = None  # whether it is well-formed; None: not asked for


@dataclass(kw_only=True, slots=True)
class Completion:
    """One sampled answer. Example: Completion(token_ids=[7, 9, 1], log_probs=[-0.1, -2.3, -0.0], ...)."""

    token_ids: list[int]  # [T]; ends with the end-of-sequence id exactly when finish_reason == "stop" by that id
    log_probs: list[float]  # [T] natural log, under the distribution really sampled from (temperature, top-p, top-k)
    finish_reason: FinishReason
    weight_versions: tuple[int, int]  # (oldest, newest) policy version that sampled its tokens
    text: str  # decoded, without the end-of-sequence token
    score: Score | None = None  # None until the rewards have run
    values: dict[str, float] = field(default_factory=dict)  # reward model's name -> its value, before weight
    # int16 [P + T, MoE layers, top-k]: experts that prompt and answer were routed to; -1: not known; None: not recorded
    routed_experts: np.ndarray | None = None


@dataclass(kw_only=True, slots=True)
class Group:
    """All completions of one prompt: the unit over which GRPO compares."""

    prompt: Prompt
    completions: list[Completion]

    @property
    def rewards(self) -> list[float]:
        """[G] total rewards; every completion must have been scored."""
        scores = [c.score for c in self.completions]
        if any(s is None for s in scores):
            raise ValueError(f"group {self.prompt.id} has completions without a score")
        return [s.total for s in scores if s is not None]


@dataclass(kw_only=True, slots=True)
class Sample:
    """One training sequence: prompt and response, with what the loss needs at each response token.

    `log_probs` lists are aligned with the response, i.e. with token_ids[prompt_length:], length T.
    """

    token_ids: list[int]  # [P + T]
    prompt_length: int  # P >= 1
    advantage: float = 0.0
    rollout_log_probs: list[float] | None = None  # [T] of the engine that sampled it
    old_log_probs: list[float] | None = None  # [T] of the policy at the start of the phase, by the trainer
    reference_log_probs: list[float] | None = None  # [T] of the KL reference
    loss_mask: list[int] | None = None  # [P + T], 1 where a token is learned; None: exactly the response
    routed_experts: np.ndarray | None = None  # int16 [P + T, MoE layers, top-k] to replay in training; -1: not known

    @property
    def response_length(self) -> int:
        """T, the number of response tokens."""
        return len(self.token_ids) - self.prompt_length


@dataclass(kw_only=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, of which the first is preferred.

    Example: PreferencePair(id="pairs.jsonl:17", question="5-6+9=?", chosen=Sample(...), rejected=Sample(...)).
    """

    id: str  # "<source>:<index>"
    question: str  # the raw prompt, before the template
    chosen: Sample  # prompt, answer, end-of-sequence
    rejected: Sample

    @property
    def samples(self) -> list[Sample]:
        """What a reward model scores: chosen, rejected."""
        return [self.chosen, self.rejected]


@dataclass(kw_only=True, slots=True)
class LabelledAnswer:
    """An answer that is good (safe) or not. Example: LabelledAnswer(id="labels.jsonl:3", ..., good=False)."""

    id: str  # "<source>:<index>"
    question: str  # the raw prompt, before the template
    sample: Sample  # prompt, answer, end-of-sequence
    good: bool

    @property
    def samples(self) -> list[Sample]:
        """What a reward model scores."""
        return [self.sample]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. Example: Message("assistant", "It is 8.", reasoning="5-6=-1; -1+9=8")."""

    role: Role
    content: str  # never blank; may hold the thought itself, in <think> tags
    reasoning: str | None = None  # the thought, where it is given apart from the answer; assistant only


@dataclass(kw_only=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant in turn; the assistant has the last word.

    Example: Conversation(id="mix.jsonl:17", where="mix.jsonl:18", messages=[Message("user", "5-6+9=?"), ...]).
    """

    id: str  # "<source>:<index>"
    where: str  # file and line, for messages to people
    messages: list[Message]

    @property
    def questions(self) -> list[str]:
        """What the user says, turn by turn."""
        return [message.content for message in self.messages if message.role == "user"]

    @property
    def question(self) -> str:
        """The user's last turn."""
        return self.questions[-1]
