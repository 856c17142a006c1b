#!/usr/bin/env python3
"""Megatron checkpoint -> Hugging Face folder: the same as `megatron-r1 convert export`; --help says more."""

import sys

from megatron_r1.cli import main

sys.exit(main(["convert", "export", *sys.argv[1:]]))
