"""The in-process rollout engine: batched decoding with a KV cache on the training weights themselves.

There is no second copy of the weights and no other implementation of the model: the trainer's own modules decode, so
the log-probs are those of training up to rounding. Rows that have finished are dropped from the batch and the cache.

Every replica decodes its share of the prompts; under context parallelism, where ranks share sequences in training,
each of them is a replica here. Tensor-parallel ranks compute the same tokens from gathered logits;
with pipeline stages, hidden states travel forward and the last stage's tokens back; with expert parallelism the
replicas step together until all have finished, since their experts serve each other.

MLA caches the up-projected keys and values, not the latent: Megatron's latent cache needs a GPU kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.utils import set_model_to_sequence_parallel

from megatron_r1.config.errors import UserError
from megatron_r1.config.optim import SamplingConfig
from megatron_r1.data.tokenizers import Tokenizer
from megatron_r1.model.attention import TorchCoreAttention
from megatron_r1.model.build import unwrap
from megatron_r1.model.fp8 import any_token_count
from megatron_r1.model.gpt import PolicyModel
from megatron_r1.model.specs import transformer_engine_available
from megatron_r1.parallel.world import World
from megatron_r1.rollout.engine import Progress
from megatron_r1.rollout.expert_record import ExpertRecord, Recorder
from megatron_r1.rollout.sampling import UniformStreams, sample_tokens
from megatron_r1.types import Completion, Prompt

logger = logging.getLogger(__name__)

_COMPACT_BELOW = 0.8  # drop finished rows once fewer than this share of the batch is alive


@dataclass(slots=True)
class _Row:
    """One completion being decoded."""

    prompt: Prompt
    number: int  # which completion of its prompt
    index: int  # place in the result
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: str = ""
    experts: np.ndarray | None = None  # int16 [P + T, MoE layers, top-k]


class MegatronEngine:
    """Samples from the trainer's model chunks. See `RolloutEngine`; every rank of the world calls `generate`.

    recorder: fills `routed_experts` of the completions (the trainer's `RoutingTaps`); None: they stay empty.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        world: World,
        tokenizer: Tokenizer,
        vocab_size: int,
        max_length: int,
        recorder: Recorder | None = None,
    ) -> None:
        if world.layout.context > 1 and transformer_engine_available():
            raise UserError(
                f"parallel.context = {world.layout.context}: the in-process engine decodes whole sequences on each "
                "context rank, which has not been tried with Transformer Engine's attention; set parallel.context = 1 "
                "for stages that sample, or run them without Transformer Engine"
            )
        self.recorder = recorder
        self.models = [unwrap(chunk) for chunk in chunks]
        self.world, self.tokenizer, self.vocab_size, self.max_length = world, tokenizer, vocab_size, max_length
        self._version = 0
        if world.rank == 0 and self.models[0].config.multi_latent_attention:
            logger.info("rollout: MLA decodes from cached keys and values (the latent cache needs a GPU kernel)")

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next `generate` samples from."""
        return self._version

    def update_weights(self, version: int) -> None:
        """Nothing moves: the weights are the trainer's own."""
        self._version = version

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: SamplingConfig,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """n completions of each of this replica's prompts. Collective over the world.

        Replicas may pass different prompts, but the same number of them where expert parallelism joins them. Raises
        UserError when a prompt leaves no room for a single token.
        """
        rows = [_Row(p, j, i * n + j) for i, p in enumerate(prompts) for j in range(n)]
        self._check_room(prompts)
        # Rows of similar prompt length share a batch: the shorter prompts wait for the longest.
        queue = sorted(rows, key=lambda row: len(row.prompt.token_ids))
        done = 0
        with self._decoding():
            for start in range(0, len(queue), sampling.batch_size):
                self._decode(queue[start : start + sampling.batch_size], sampling, seed)
                done += len(queue[start : start + sampling.batch_size])
                if progress is not None:
                    progress(done, len(queue))
        finished = [self._completion(row) for row in rows]
        return [finished[i * n : (i + 1) * n] for i in range(len(prompts))]

    def _check_room(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if len(prompt.token_ids) >= self.max_length:
                raise UserError(
                    f"prompt {prompt.id} has {len(prompt.token_ids)} tokens, but the model's max_position_embeddings "
                    f"is {self.max_length}: nothing is left to answer with"
                )

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Models in evaluation mode, each rank with whole sequences: no sequence and no context parallelism."""
        sharded = self.world.layout.shards_sequence
        cut = _context_parallel_modules(self.models) if self.world.layout.context > 1 else []
        for model in self.models:
            model.eval()
            if sharded:
                set_model_to_sequence_parallel(model, False)
        for module, name, alone, _ in cut:
            setattr(module, name, alone)
        try:
            with any_token_count(self.models):
                yield
        finally:
            for module, name, _, together in cut:
                setattr(module, name, together)
            for model in self.models:
                if sharded:
                    set_model_to_sequence_parallel(model, True)

    def _decode(self, rows: list[_Row], sampling: SamplingConfig, seed: int) -> None:
        streams = UniformStreams(seed, [(row.prompt.id, row.number) for row in rows])
        longest = max(len(row.prompt.token_ids) for row in rows)
        limit = min(longest + sampling.max_new_tokens, self.max_length)
        context = _Cache(len(rows), limit)
        record = ExpertRecord(self.recorder, self.world.device) if self.recorder is not None else None
        alive = np.arange(len(rows))  # which rows the batch holds
        shortest = self._prefill(min(len(row.prompt.token_ids) for row in rows))
        tokens_BT = torch.tensor([row.prompt.token_ids[:shortest] for row in rows], device=self.world.device)
        position = 0
        while True:
            logits_BV = self._forward(tokens_BT, position, context, record)
            if record is not None:
                record.take(position, alive)
            position += tokens_BT.shape[1]
            next_B = self._next_tokens(logits_BV, rows, alive, position, streams, sampling)
            running = np.array([not rows[i].finish_reason for i in alive])
            if not self._anyone(bool(running.any()) and position < limit):
                break
            keep = np.flatnonzero(running)
            if len(keep) < _COMPACT_BELOW * len(alive) and not self._equal_shapes:
                keep = keep if len(keep) else np.array([0])  # with experts shared, a finished replica keeps one row
                context.keep(torch.from_numpy(keep).to(self.world.device))
                alive, next_B = alive[keep], next_B[torch.from_numpy(keep).to(next_B.device)]
            if position >= limit:
                context.rewind(position := limit - 1)
            tokens_BT = next_B[:, None]
        if record is not None:
            for i, row in enumerate(rows):
                length = len(row.prompt.token_ids) + len(row.token_ids)
                row.experts = record.of_row(i, length, self.world.pipeline_group)

    @property
    def _equal_shapes(self) -> bool:
        """Whether replicas that share experts must pass equally many tokens in every forward."""
        layout = self.world.layout
        return layout.dispatcher == "allgather" and layout.expert * layout.etp > 1

    def _prefill(self, shortest: int) -> int:
        """Prompt tokens of the first forward, given the batch's shortest prompt."""
        if not self._equal_shapes:
            return shortest
        least = torch.tensor(shortest, device=self.world.device)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.world.expert_group)
        return int(least.item())

    def _next_tokens(
        self,
        logits_BV: torch.Tensor | None,
        rows: list[_Row],
        alive: np.ndarray,
        position: int,
        streams: UniformStreams,
        sampling: SamplingConfig,
    ) -> torch.Tensor:
        """The next token of every row of the batch: prompt tokens while there are any, then sampled ones."""
        sampled = torch.zeros(2, len(alive), dtype=torch.float64, device=self.world.device)
        if logits_BV is not None:
            uniform = streams.at(max(0, position), alive)
            logits_BV[:, self.vocab_size :] = -torch.inf  # padding of the vocabulary
            ids, log_probs = sample_tokens(logits_BV, uniform, sampling)
            sampled[0], sampled[1] = ids, log_probs
        if self.world.layout.pipeline > 1:
            dist.broadcast(sampled, src=self.world.last_stage_rank, group=self.world.pipeline_group)
        ids_list, log_probs_list = sampled[0].long().tolist(), sampled[1].tolist()
        for place, i in enumerate(alive):
            row = rows[i]
            if position < len(row.prompt.token_ids):
                ids_list[place] = row.prompt.token_ids[position]
            elif not row.finish_reason:
                self._append(row, ids_list[place], log_probs_list[place], sampling)
        return torch.tensor(ids_list, device=self.world.device)

    def _append(self, row: _Row, token: int, log_prob: float, sampling: SamplingConfig) -> None:
        row.token_ids.append(token)
        row.log_probs.append(log_prob)
        length = len(row.token_ids)
        if token == self.tokenizer.eos_id or (sampling.stop and self._hit_stop(row, sampling.stop)):
            row.finish_reason = "stop"
        elif length >= sampling.max_new_tokens or len(row.prompt.token_ids) + length >= self.max_length:
            row.finish_reason = "length"

    def _hit_stop(self, row: _Row, stops: list[str]) -> bool:
        # A stop string of n bytes ends within the last n tokens, each being at least a byte of text.
        tail = self.tokenizer.decode(row.token_ids[-max(len(stop.encode()) for stop in stops) :])
        return any(stop in tail for stop in stops)

    def _forward(
        self, tokens_BT: torch.Tensor, position: int, context: _Cache, record: ExpertRecord | None
    ) -> torch.Tensor | None:
        """Logits [B, V] of the last position on the last stage, None elsewhere."""
        rows, length = tokens_BT.shape
        positions_BT = torch.arange(position, position + length, device=tokens_BT.device).expand(rows, length)
        output: torch.Tensor | None = None
        for model in self.models:
            if not model.pre_process:
                model.set_input_tensor(self._receive(rows, length))
            if record is not None:
                record.announce(rows, length)
            output = model(tokens_BT, positions_BT, None, inference_context=context, runtime_gather_output=True)
            if not model.post_process:
                self._send(output)
        context.increment_sequence_len_offset(length)
        context.enable_decode_mode()
        return output[:, -1] if self.models[-1].post_process and output is not None else None

    def _receive(self, rows: int, length: int) -> torch.Tensor:
        config = self.models[0].config
        hidden = torch.empty(length, rows, config.hidden_size, dtype=config.pipeline_dtype, device=self.world.device)
        ranks = dist.get_process_group_ranks(self.world.pipeline_group)
        dist.recv(hidden, src=ranks[self.world.pipeline_rank - 1], group=self.world.pipeline_group)
        return hidden

    def _send(self, hidden: torch.Tensor) -> None:
        ranks = dist.get_process_group_ranks(self.world.pipeline_group)
        target = ranks[(self.world.pipeline_rank + 1) % len(ranks)]
        dist.send(hidden.contiguous(), dst=target, group=self.world.pipeline_group)

    def _anyone(self, running: bool) -> bool:
        """Whether this replica goes on: while any that shares experts with it does."""
        if self.world.layout.expert * self.world.layout.etp == 1:
            return running
        flag = torch.tensor(int(running), device=self.world.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.world.expert_group)
        return bool(flag.item())

    def _completion(self, row: _Row) -> Completion:
        return Completion(
            token_ids=row.token_ids,
            log_probs=row.log_probs,
            finish_reason=row.finish_reason,  # type: ignore[arg-type]
            weight_versions=(self._version, self._version),
            text=self.tokenizer.decode(row.token_ids),
            routed_experts=row.experts,
        )


def _context_parallel_modules(models: Sequence[PolicyModel]) -> list[tuple[torch.nn.Module, str, Any, Any]]:
    """(module, attribute, value for whole sequences, value for slices) of all that cuts sequences over ranks."""
    found: list[tuple[torch.nn.Module, str, Any, Any]] = []
    for model in models:
        for module in model.modules():
            if isinstance(module, TorchCoreAttention):
                found.append((module, "context_size", 1, module.context_size))
            elif isinstance(module, RotaryEmbedding):
                found.append((module, "cp_group", None, module.cp_group))
    return found


class _Cache(StaticInferenceContext):
    """Megatron's static KV cache whose finished rows can be dropped."""

    def __init__(self, rows: int, length: int) -> None:
        super().__init__(rows, length)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows [K] int64 of every layer's keys and values."""
        self.max_batch_size = len(rows)
        self.key_value_memory_dict: dict[int, Any] = {
            layer: (keys[:, rows], values[:, rows]) for layer, (keys, values) in self.key_value_memory_dict.items()
        }

    def rewind(self, position: int) -> None:
        """Write the next token at `position` again: a finished replica has no room to go on, but must step."""
        self.sequence_len_offset = position
