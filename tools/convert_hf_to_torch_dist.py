#!/usr/bin/env python3
"""Hugging Face folder -> Megatron torch_dist checkpoint: the same as `megatron-r1 convert import`; --help says more."""

import sys

from megatron_r1.cli import main

sys.exit(main(["convert", "import", *sys.argv[1:]]))
