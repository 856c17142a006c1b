"""Computes the logits of one model twice, in fp32 on the CPU: by transformers from its Hugging Face folder, and by
Megatron-Core from its checkpoint.

Both happen in a process of their own, one after the other, so that one model at a time is in memory: Megatron's groups
are global to a process, its CPU backend redirects names of torch, and both libraries write to stdout and stderr as they
like. Nothing heavy is imported before that process has set its environment.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1.config.errors import UserError

if TYPE_CHECKING:
    import torch

    from megatron_r1.parallel.world import World

TOLERANCE = 1e-4
"""Largest difference that counts as equal, in units of max(1, the largest logit)."""
SEQUENCES, LENGTH, SEED = 4, 64, 20250122
_LATENT_EPS = 1e-6  # what transformers gives the norms of latent attention, whatever rms_norm_eps says
_LATENT_NORMS = ("q_a_layernorm", "kv_a_layernorm")
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Logits:
    """How two computations of [tokens, vocabulary] logits compare."""

    tokens: int
    largest: float  # difference; inf where something is no number
    magnitude: float  # of the largest logit of transformers
    notes: tuple[str, ...] = ()

    @property
    def bound(self) -> float:
        """The largest difference that counts as equal."""
        return TOLERANCE * max(1.0, self.magnitude)

    @property
    def ok(self) -> bool:
        """Whether they are equal, up to rounding."""
        return self.largest <= self.bound


def memory_needed(parameters: int) -> int:
    """Bytes that comparing a model of so many parameters takes, about: it in fp32, once while the other is freed."""
    return 4 * parameters * 2


def compare_logits(hf: Path, megatron: Path, *, predictions: bool) -> Logits:
    """Compare the logits of random tokens; both folders hold one model, whose architecture hf/config.json says.

    predictions: whether the Megatron checkpoint has multi-token-prediction layers, which are not run. Takes the memory
    of `memory_needed`. Raises UserError for a folder that one of the two cannot load, and where the process is killed.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".log", errors="replace") as log:
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_enter, initargs=(log.name,))
        try:
            return pool.submit(_compute, hf, megatron, predictions).result()
        except BrokenProcessPool:
            said = log.read().strip().splitlines()[-3:]
            raise UserError(
                "the process that computes the logits was killed, most likely because memory ran out"
                + (f". It said: {' | '.join(said)}" if said else "")
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _enter(log: str) -> None:
    """The process's environment: no GPU, no ranks, its output in a file."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    with open(log, "w") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _compute(hf: Path, megatron: Path, predictions: bool) -> Logits:
    from megatron_r1.config.model import ModelConfig
    from megatron_r1.model.presets import architecture

    arch = json.loads((hf / "config.json").read_bytes())
    architecture(ModelConfig(config=hf), 1)  # conversion copies what Megatron here does not compute; this cannot
    tokens_BS = random_tokens(arch)
    theirs_BSV, notes = transformers_logits(hf, tokens_BS)
    gc.collect()
    with single_process() as world:
        ours_BSV = megatron_logits(megatron, hf, tokens_BS, world, predictions=predictions)
    return difference(ours_BSV, theirs_BSV, notes)


def random_tokens(arch: Mapping[str, Any]) -> torch.Tensor:
    """int64 [SEQUENCES, up to LENGTH] ids, always the same."""
    import torch

    length = min(LENGTH, int(arch.get("max_position_embeddings") or LENGTH))
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, int(arch["vocab_size"]), (SEQUENCES, length), generator=generator)


def difference(ours_BSV: torch.Tensor, theirs_BSV: torch.Tensor, notes: tuple[str, ...] = ()) -> Logits:
    """The numbers of two float32 [B, S, V]."""
    gap = (ours_BSV - theirs_BSV).abs().nan_to_num(nan=float("inf")).max()
    magnitude = theirs_BSV.abs().nan_to_num(nan=0.0, posinf=0.0).max()
    return Logits(ours_BSV[..., 0].numel(), float(gap), float(magnitude), notes)


def transformers_logits(folder: Path, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, tuple[str, ...]]:
    """float32 [B, S, V], and notes. The norms inside latent attention get `rms_norm_eps`, as they do in Megatron and
    in the serving engines.

    Raises UserError where transformers cannot load the folder or would draw weights that are not in it.
    """
    import torch

    from megatron_r1.convert.verification.structure import quiet_transformers

    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
        except Exception as error:  # whatever it thinks of these files
            raise UserError(f"transformers cannot load {folder}: {type(error).__name__}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"transformers does not find {', '.join(missing[:4])} ({len(missing)} in all) in {folder}")
    notes: tuple[str, ...] = ()
    eps = float(model.config.rms_norm_eps)
    norms = [module for name, module in model.named_modules() if name.endswith(_LATENT_NORMS)]
    if norms and eps != _LATENT_EPS:
        notes = (
            f"transformers computes the norms of latent attention with {_LATENT_EPS}; here with rms_norm_eps {eps}",
        )
        for module in norms:
            module.variance_epsilon = eps
    with torch.no_grad():
        return torch.cat([model.eval()(row[None]).logits for row in tokens_BS]), notes


def megatron_logits(
    checkpoint: Path, config: Path, tokens_BS: torch.Tensor, world: World, *, predictions: bool
) -> torch.Tensor:
    """float32 [B, S, V] over the true vocabulary, of any folder that `source.open_source` opens.

    config: config.json, or its folder. world: of one process, on the CPU. Raises UserError for a checkpoint that does
    not fill the model.
    """
    import torch

    from megatron_r1.config.model import ModelConfig
    from megatron_r1.convert.load import load_into
    from megatron_r1.convert.source import open_source
    from megatron_r1.model.build import build_model
    from megatron_r1.model.presets import architecture, load_architecture

    source = open_source(checkpoint, load_architecture(config), predictions=predictions)
    model = ModelConfig(config=config, mtp=False)
    arch = architecture(model, 1)
    (chunk,) = build_model(arch, model, world)
    metadata = {"dp_cp_group": world.data_context_group, "singleton_local_shards": False}
    if left := load_into([chunk], source, metadata):  # type: ignore[list-item]
        raise UserError(f"{checkpoint} has no weights for {', '.join(left[:6])} of Megatron's model")
    positions_1S = torch.arange(tokens_BS.shape[1])[None]
    with torch.no_grad():
        rows = [chunk.eval()(row[None], positions_1S, None) for row in tokens_BS]
    return torch.cat(rows)[..., : arch["vocab_size"]].float()


@contextmanager
def single_process() -> Iterator[World]:
    """A world of this process alone, stopped at the end; the environment is as it was."""
    from megatron_r1.config.model import ParallelConfig
    from megatron_r1.parallel import world as worlds

    before = dict(os.environ)
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    try:
        yield worlds.start(ParallelConfig(), seed=SEED, timeout_minutes=2)
    finally:
        worlds.stop()
        os.environ.clear()
        os.environ.update(before)
