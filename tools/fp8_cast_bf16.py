#!/usr/bin/env python3
"""FP8 Hugging Face folder -> BF16: the same as `megatron-r1 convert cast --dtype bf16`; --help says more."""

import sys

from _convert import convert

sys.exit(convert("cast", "--dtype", "bf16"))
