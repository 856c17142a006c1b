"""Conversion under real layouts of Megatron: a model is the same however it is loaded, and comes back byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.checkpoint import folders as training_folders
from megatron_r1.config.model import ParallelConfig, Precision
from megatron_r1.convert.conversion import export_conversion, import_conversion, run
from tests.dist.conversion_workload import Folders, Proof, prove, samples
from tests.dist.harness import run_layouts
from tests.reference import synthetic_hf

VOCAB = 499  # odd: tensor parallelism pads it
LAYERS = 4  # enough for two stages of two chunks
ONE = ParallelConfig(data=1)
TP2 = ParallelConfig(tensor=2, data=1)
PP2 = ParallelConfig(pipeline=2, data=1)
VPP2 = ParallelConfig(pipeline=2, virtual_pipeline=2, data=1)
EP2 = ParallelConfig(data=2, expert=2)
TP2_EP2 = ParallelConfig(tensor=2, expert=2, data=1)
TP2_ETP2 = ParallelConfig(tensor=2, expert_tensor=2, data=1)
PP2_EP2 = ParallelConfig(pipeline=2, data=2, expert=2)
TP2_PP2 = ParallelConfig(tensor=2, pipeline=2, data=1)
TP2_EP4 = ParallelConfig(tensor=2, data=2, expert=4)
VPP2_EP2 = ParallelConfig(pipeline=2, virtual_pipeline=2, data=2, expert=2)
EXPERTS = ("deepseek_v3", "qwen3_moe")
DENSE = ("qwen2", "qwen2-tied", "qwen3", "llama")


@dataclass(frozen=True)
class Case:
    """One model under one layout. legacy: also in Megatron-LM's older format, which has the same ranks for all."""

    family: str
    layout: ParallelConfig
    precision: Precision = "fp32"
    first_stage: int | None = None  # its layers, where stages differ

    @property
    def megatron(self) -> dict[str, Any]:
        """`[model.megatron]`."""
        return {} if self.first_stage is None else {"num_layers_in_first_pipeline_stage": self.first_stage}

    @property
    def legacy(self) -> bool:
        """Experts divided by tensor parallelism in another way than the rest cannot be read from it."""
        return self.layout.tensor == 1 or self.layout.etp == self.layout.tensor or self.family in DENSE

    def __str__(self) -> str:
        given = self.layout.model_dump(exclude_defaults=True)
        sizes = " x ".join(f"{name} {size}" for name, size in given.items() if name != "data") or "one process"
        stages = "" if self.first_stage is None else f", {self.first_stage} layers first"
        return f"{self.family}, {sizes}{stages}, {self.precision}"


# One of each kind of parallelism for every run of the tests; the rest of the cross product is the slow tier's.
QUICK = (
    Case("deepseek_v3", TP2_EP2),
    Case("deepseek_v3", VPP2),
    Case("deepseek_v3", EP2, "bf16"),
    Case("qwen3_moe", TP2_ETP2),
    Case("qwen2", TP2),
)
SLOW = tuple(
    case
    for family in (*EXPERTS, *DENSE)
    for case in (
        *(Case(family, layout) for layout in (ONE, TP2, PP2, VPP2, TP2_PP2)),
        *(Case(family, layout) for layout in (EP2, TP2_EP2, TP2_ETP2, PP2_EP2, TP2_EP4, VPP2_EP2) if family in EXPERTS),
        Case(family, TP2_PP2, "bf16"),
        Case(family, PP2, first_stage=1),
    )
    if case not in QUICK
)


class Models:
    """The folders of each family, written and imported once for every dtype."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folders(self, case: Case) -> Folders:
        """Those of a case, with a place of its own for what it saves."""
        at = self.root / f"{case.family}-{case.precision}"
        if not at.is_dir():
            dtype = torch.float32 if case.precision == "fp32" else torch.bfloat16
            synthetic_hf.write_family(at / "hf", case.family, shards=3, dtype=dtype)
            for spec in ("te", "local"):
                run(import_conversion(at / "hf", spec=spec, file_bytes=1_000_000), at / spec)  # type: ignore[arg-type]
        return Folders(at / "hf", at / "te", at / "local", at / str(case))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for family, config in synthetic_hf.FAMILIES.items():
            sizes = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS}
            patch.setitem(synthetic_hf.FAMILIES, family, {**config, **sizes})
        yield Models(tmp_path_factory.mktemp("models"))


def proofs(cases: Sequence[Case], models: Models) -> list[tuple[Case, Folders, list[Proof]]]:
    """Every case, those of the same number of processes in one world."""
    made = []
    for size in sorted({case.layout.world_size for case in cases}):
        chosen = [case for case in cases if case.layout.world_size == size]
        each = [(models.folders(case), case.precision, case.megatron, case.legacy) for case in chosen]
        ranks = run_layouts(prove, [case.layout for case in chosen], each=each, timeout=600)
        made += [(case, where[0], found) for case, where, found in zip(chosen, each, ranks, strict=True)]
    return made


@pytest.fixture(scope="module")
def quick(models: Models) -> list[tuple[Case, Folders, list[Proof]]]:
    return proofs(QUICK, models)


@pytest.fixture(scope="module")
def slow(models: Models) -> list[tuple[Case, Folders, list[Proof]]]:
    return proofs(SLOW, models)


def assert_loaded(case: Case, ranks: list[Proof]) -> None:
    """Every way of loading gives every rank the same bits, and Megatron finds in an import just what it asks for."""
    for proof in ranks:
        assert proof.parameters > 5, str(case)
        assert proof.unequal == {"te": [], "local": [], "megatron": []}, str(case)
        assert proof.unread == (set(), set()), str(case)


def assert_comes_back(case: Case, folders: Folders, scratch: Path) -> None:
    """What was saved under the layout exports to the files that the model came from."""
    saved = {"training": training_folders.folder(folders.out / "training", 0)}
    if case.legacy:
        saved["legacy"] = folders.out / "legacy"
    for kind, folder in saved.items():
        run(export_conversion(folder, like=folders.hf), scratch / str(case) / kind)
        for file in folders.hf.glob("*.safetensors*"):
            back = scratch / str(case) / kind / file.name
            assert back.read_bytes() == file.read_bytes(), f"{case}, {kind}: {file.name}"


def assert_scores(case: Case, folders: Folders, ranks: list[Proof]) -> None:
    """Log-probs of given tokens are those of transformers on the same folder, in float32.

    bf16: of the median token, since rounding sends some tokens to other experts.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it lists the prediction layers, which it does not know
    theirs = AutoModelForCausalLM.from_pretrained(folders.hf, dtype=torch.float32).eval()
    differences = []
    for i, sample in enumerate(samples(VOCAB)):
        tokens = torch.tensor([sample.token_ids])
        with torch.no_grad():
            logits = theirs(tokens).logits[0, :-1]
        expected = torch.log_softmax(logits, -1).gather(1, tokens[0, 1:, None])[:, 0]
        assert expected.std() > 0.1, "the log-probs say something"
        differences += [(torch.tensor(proof.log_probs[i]) - expected).abs() for proof in ranks]
    every = torch.cat(differences)
    found, bound = (every.max(), 1e-4) if case.precision == "fp32" else (every.median(), 0.03)
    assert found <= bound, f"{case}: log-probs differ by up to {every.max():.2e}, in the median by {every.median():.2e}"


def test_every_way_of_loading_gives_the_same_model(quick: Any) -> None:
    for case, _, ranks in quick:
        assert_loaded(case, ranks)


def test_what_a_layout_saves_comes_back(quick: Any, tmp_path: Path) -> None:
    for case, folders, _ in quick:
        assert_comes_back(case, folders, tmp_path)


def test_layouts_score_as_transformers_does(quick: Any) -> None:
    for case, folders, ranks in quick:
        assert_scores(case, folders, ranks)


def test_a_training_checkpoint_knows_its_architecture(quick: Any, tmp_path: Path) -> None:
    """Without the folder that the model came from: other file names, the same tensors, in the checkpoint's dtype."""
    case, folders, _ = quick[0]
    run(export_conversion(training_folders.folder(folders.out / "training", 0)), tmp_path / str(case))
    found, expected = (
        {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
        for folder in (tmp_path / str(case), folders.hf)
    )
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


@pytest.mark.slow
def test_the_cross_product_loads(slow: Any) -> None:
    assert len(slow) > 35
    for case, _, ranks in slow:
        assert_loaded(case, ranks)


@pytest.mark.slow
def test_the_cross_product_comes_back(slow: Any, tmp_path: Path) -> None:
    for case, folders, _ in slow:
        assert_comes_back(case, folders, tmp_path)


@pytest.mark.slow
def test_the_cross_product_scores_as_transformers_does(slow: Any) -> None:
    for case, folders, ranks in slow:
        assert_scores(case, folders, ranks)
