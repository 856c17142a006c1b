#!/usr/bin/env python3
"""FP8 Hugging Face folder -> BF16: the same as `megatron-r1 convert cast --dtype bf16`; --help says more."""

import sys

from megatron_r1.cli import main

sys.exit(main(["convert", "cast", "--dtype", "bf16", *sys.argv[1:]]))
