#!/usr/bin/env python3
"""Hugging Face folder -> Megatron torch_dist checkpoint: the same as `megatron-r1 convert import`; --help says more."""

import sys

from _convert import convert

sys.exit(convert("import"))
