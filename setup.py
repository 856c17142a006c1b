"""Packaging of megatron_r1: what is installed, what it needs, and the `megatron-r1` command.

Requirements here are ranges that the code supports; `constraints/cpu.txt` holds the exact versions
the tests ran with.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"

REQUIRES = [
    "torch>=2.6,<2.15",
    # The newest that supports Python 3.11; the CPU backend is written against it.
    "megatron-core==0.16.1",
    "transformers>=4.57,<6",
    "tokenizers>=0.22,<1",
    "datasets>=4,<6",
    "sentencepiece>=0.2,<1",
    "tensorboard>=2.18,<3",
    "pydantic>=2.10,<3",
    "tomli-w>=1.1,<2",
    "psutil>=6,<8",  # Megatron's checkpoint writer hangs without it
    # Its LaTeX parser cannot be imported without an ANTLR runtime.
    "math-verify[antlr4_13_2]>=0.9,<0.10",
    "rich>=13,<16",
    "numpy>=1.26,<3",
    "safetensors>=0.5,<1",
    "pyarrow>=18",
    "xxhash>=3,<5",  # checksums of converted files
    "httpx2>=2,<3",  # judge servers
]

EXTRAS = {
    # Fused kernels, FP8 and the layer specs of a CUDA run; the range that Megatron-Core 0.16.1 is made for.
    "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],
    # The roll-out server.
    "sglang": ["sglang>=0.5.4,<0.6"],
    # Nothing beyond the base install, which already holds math-verify: kept so that `[math]` may be
    # asked for by name.
    "math": ["math-verify[antlr4_13_2]>=0.9,<0.10"],
    # Procedural reasoning tasks as prompt sources.
    "tasks": ["reasoning-gym==0.1.25"],
    # TRL is the outside reference that the loss tests compare with; transformers reads the weights of a test with gguf.
    "dev": [
        *("pytest>=8,<10", "hypothesis>=6.100,<7", "ruff>=0.9,<1", "mypy>=1.13,<3", "trl>=1.16,<1.17", "types-psutil"),
        "gguf>=0.10,<1",
    ],
}
EXTRAS["all"] = sorted({requirement for name in EXTRAS for requirement in EXTRAS[name]})


def version() -> str:
    """The version in megatron_r1/__init__.py, read without importing the package."""
    text = (HERE / "megatron_r1" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError('megatron_r1/__init__.py has no line `__version__ = "..."`')
    return match.group(1)


setup(
    name="megatron-r1",
    version=version(),
    description="The DeepSeek-R1 training recipe on Megatron-Core, from one CPU to a Slurm cluster",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_namespace_packages(include=["megatron_r1", "megatron_r1.*"]),
    package_data={"": ["*.json", "*.html", "*.css", "*.js"]},
    python_requires=">=3.11",
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-r1 = megatron_r1.cli:main"]},
)
