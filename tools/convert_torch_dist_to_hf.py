#!/usr/bin/env python3
"""Megatron checkpoint -> Hugging Face folder: the same as `megatron-r1 convert export`; --help says more."""

import sys

from _convert import convert

sys.exit(convert("export"))
