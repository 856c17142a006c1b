"""Is a layout legal for an architecture? Known before any process starts, from a Hugging Face
config.json alone.

Megatron finds most of these violations too, one at a time, after every rank has started; some (the
group scores of the router) it never finds and computes something else than the published model.
`check_layout` lists them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.model import ParallelConfig

# Fields of [model.megatron] that place layers on uneven pipeline stages.
PIPELINE_KEYS = (
    "pipeline_model_parallel_layout",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)
EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")


@dataclass(frozen=True, slots=True)
class _Shape:
    """The numbers of a config.json that a layout divides; 0 where the architecture has no such
    part.
    """

    layers: int
    heads: int
    key_value_heads: int  # 0 with multi-head latent attention, which has none to divide
    hidden: int
    feed_forward: int
    experts: int
    expert_feed_forward: int
    shared_feed_forward: int


def check_layout(
    architecture: Mapping[str, Any],
    parallel: ParallelConfig,
    world_size: int | None = None,
    *,
    megatron: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a layout that cannot run this architecture, naming every violated rule.

    Args:
        architecture: the keys of a Hugging Face config.json.
        parallel: the `[parallel]` table.
        world_size: processes started; None: those that `parallel` asks for.
        megatron: the `[model.megatron]` table, whose pipeline keys allow uneven stages.

    Raises:
        UserError: one line per violated rule, with the numbers and the values that would be legal.
    """
    world = parallel.world_size if world_size is None else world_size
    shape = _shape(architecture)
    problems = [
        *_attention(shape, architecture, parallel.tensor),
        *_sequence(shape, architecture, parallel),
        *_experts(shape, architecture, parallel),
        *_pipeline(shape, parallel, megatron or {}),
        *_world(parallel, world),
    ]
    if problems:
        layout = (
            f"TP {parallel.tensor} x PP {parallel.pipeline} x CP {parallel.context}, EP "
            f"{parallel.expert}, "
            f"ETP {parallel.etp}, {world} processes"
        )
        count = "a rule" if len(problems) == 1 else f"{len(problems)} rules"
        raise UserError("\n  ".join([f"[parallel] ({layout}) breaks {count}:", *problems]))


def check_world(parallel: ParallelConfig, world_size: int) -> None:
    """Only the rules between the layout and the number of processes, which hold for every
    architecture.

    Raises:
        UserError: naming the sizes that would be legal.
    """
    problems = list(_world(parallel, world_size))
    if problems:
        raise UserError("\n  ".join([f"[parallel] does not fit {world_size} process(es):", *problems]))


def check_teacher(stage: str, student: Mapping[str, Any], teacher: Mapping[str, Any]) -> None:
    """Refuse a teacher that has no probability for some token or place that the student can sample.

    Args:
        stage: name of the `distill` stage.
        student: the keys of the student's config.json.
        teacher: those of the teacher's.

    Raises:
        UserError: one line per key, with both numbers and the cure.
    """
    cures = {
        "vocab_size": "both must come from the family of the run's one tokenizer, the teacher with as many rows at "
        "least; take another teacher",
        "max_position_embeddings": "the student's samples may be longer than what the teacher has seen; set the "
        "student's model.override.max_position_embeddings, or take another teacher",
    }
    problems = [
        f"stage.{stage}.teacher: its {key} is {teacher.get(key)}, below the student's {student.get(key)}: {cure}"
        for key, cure in cures.items()
        if (teacher.get(key) or 0) < (student.get(key) or 0)
    ]
    if problems:
        raise UserError("\n  ".join(problems))


def _shape(architecture: Mapping[str, Any]) -> _Shape:
    heads = _number(architecture, "num_attention_heads")
    experts_only = architecture.get("model_type") == "qwen3_moe"  # no layer is dense
    latent = architecture.get("kv_lora_rank") is not None
    expert = architecture.get("moe_intermediate_size") or 0
    experts = next((architecture[key] for key in EXPERT_COUNTS if architecture.get(key)), 0)
    return _Shape(
        layers=_number(architecture, "num_hidden_layers"),
        heads=heads,
        key_value_heads=0 if latent else architecture.get("num_key_value_heads") or heads,
        hidden=_number(architecture, "hidden_size"),
        feed_forward=0 if experts_only else architecture.get("intermediate_size") or 0,
        experts=experts,
        expert_feed_forward=expert if experts else 0,
        shared_feed_forward=(architecture.get("n_shared_experts") or 0) * expert if experts else 0,
    )


def _number(architecture: Mapping[str, Any], key: str) -> int:
    value = architecture.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        given = "nothing" if value is None else repr(value)
        raise UserError(f"the architecture's {key} must be a whole number above 0, got {given}; mend its config.json")
    return value


def _attention(shape: _Shape, architecture: Mapping[str, Any], tensor: int) -> Iterator[str]:
    yield from _divides("tensor", tensor, "num_attention_heads", shape.heads)
    if shape.key_value_heads:
        yield from _divides("tensor", tensor, "num_key_value_heads", shape.key_value_heads)
    if shape.feed_forward:
        yield from _divides("tensor", tensor, "intermediate_size", shape.feed_forward)
    if shape.shared_feed_forward:
        name = "n_shared_experts x moe_intermediate_size"
        yield from _divides("tensor", tensor, name, shape.shared_feed_forward)
    if shape.key_value_heads and shape.heads % shape.key_value_heads:
        yield (
            f"num_attention_heads ({shape.heads}) must be a multiple of num_key_value_heads "
            f"({shape.key_value_heads}): each key-value head serves the same number of query heads"
        )
    if shape.key_value_heads and not architecture.get("head_dim") and shape.hidden % shape.heads:
        yield (
            f"hidden_size ({shape.hidden}) must be a multiple of num_attention_heads "
            f"({shape.heads}), "
            "or the config.json must give head_dim"
        )


def _sequence(shape: _Shape, architecture: Mapping[str, Any], parallel: ParallelConfig) -> Iterator[str]:
    if parallel.tensor > 1 and not parallel.sequence and (shape.experts or architecture.get("kv_lora_rank")):
        yield (
            "sequence is false with tensor above 1: Megatron-Core refuses to train experts that way, and the "
            "replicated down-projections of multi-head latent attention get the right gradient only with it; set "
            "sequence = true"
        )


def _experts(shape: _Shape, architecture: Mapping[str, Any], parallel: ParallelConfig) -> Iterator[str]:
    if not shape.experts:
        for key, size in (("expert", parallel.expert), ("expert_tensor", parallel.etp)):
            if size > 1:
                yield (f"{key} is {size}, but this architecture is dense (no {EXPERT_COUNTS[0]}): {key} must be 1")
        return
    yield from _divides("expert", parallel.expert, "the number of routed experts", shape.experts)
    if shape.expert_feed_forward:
        size = shape.expert_feed_forward
        yield from _divides("expert_tensor", parallel.etp, "moe_intermediate_size", size)
    yield from _routing(shape.experts, architecture)


def _routing(experts: int, architecture: Mapping[str, Any]) -> Iterator[str]:
    """Rules of the router, among them the one that Megatron breaks silently."""
    top_k = architecture.get("num_experts_per_tok") or 0
    if top_k > experts:
        yield (f"num_experts_per_tok ({top_k}) must not exceed the number of routed experts ({experts})")
    groups = architecture.get("n_group") or 1
    if groups == 1:
        return
    chosen = architecture.get("topk_group") or 1
    if experts % groups:
        yield (f"n_group ({groups}) must divide the number of routed experts ({experts}; {_divisors(experts)})")
        return
    if chosen > groups:
        yield f"topk_group ({chosen}) must not exceed n_group ({groups})"
    if experts // groups < 2:
        yield (f"n_group ({groups}) leaves {experts // groups} expert in a group; a group's score is its best two")
    if top_k != 2 * chosen:
        yield (
            f"num_experts_per_tok ({top_k}) must be 2 x topk_group (2 x {chosen} = {2 * chosen}): "
            f"Megatron scores a "
            "group by its best num_experts_per_tok // topk_group experts, the published model by "
            "its best 2; "
            "otherwise the two route differently and an export would not be the model that was "
            "trained"
        )


def _pipeline(shape: _Shape, parallel: ParallelConfig, megatron: Mapping[str, Any]) -> Iterator[str]:
    stages, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual > 1 and stages == 1:
        yield (f"virtual_pipeline is {virtual}, but pipeline is 1: set pipeline above 1 or virtual_pipeline to 1")
        return
    chunks = stages * virtual
    name = "pipeline" if virtual == 1 else "pipeline x virtual_pipeline"
    uneven = [key for key in PIPELINE_KEYS if megatron.get(key)]
    if chunks > shape.layers and not uneven:
        yield (f"{name} is {chunks}, more than the {shape.layers} layers (num_hidden_layers): every chunk needs one")
    elif shape.layers % chunks and not uneven:
        yield (
            f"{name} ({chunks}) must divide num_hidden_layers ({shape.layers}; "
            f"{_divisors(shape.layers)}); for uneven "
            f"stages set [model.megatron] {PIPELINE_KEYS[0]} or {PIPELINE_KEYS[1]}"
        )


def _world(parallel: ParallelConfig, world: int) -> Iterator[str]:
    if parallel.dispatcher == "flex" and parallel.tensor * parallel.expert == 1:
        yield 'dispatcher = "flex" needs tensor x expert above 1 (Megatron-Core); use "alltoall"'
    dense, expert = parallel.model_size, parallel.expert * parallel.etp * parallel.pipeline
    if parallel.data is not None and world != dense * parallel.data:
        yield (
            f"tensor x pipeline x context x data = {dense * parallel.data}, but {world} processes; "
            f"start "
            f"{dense * parallel.data}, or leave `data` unset"
        )
        return
    for name, size in (
        ("tensor x pipeline x context", dense),
        ("expert x expert_tensor x pipeline", expert),
    ):
        if world % size:
            yield (f"{name} = {size} must divide the number of processes ({world}), e.g. {-(-world // size) * size}")


def _divides(key: str, size: int, name: str, whole: int) -> Iterator[str]:
    if whole % size:
        yield f"{key} ({size}) must divide {name} ({whole}; {_divisors(whole)})"


def _divisors(whole: int) -> str:
    """`allowed: 1, 2, 4` in short."""
    found = [n for n in range(1, whole + 1) if whole % n == 0]
    return f"allowed: {', '.join(map(str, found[:12]))}{', ...' if len(found) > 12 else ''}"
