#!/usr/bin/env python3
"""BF16 Hugging Face folder -> block FP8: the same as `megatron-r1 convert cast --dtype fp8`; --help says more."""

import sys

from _convert import convert

sys.exit(convert("cast", "--dtype", "fp8"))
