#!/usr/bin/env python3
"""list the tensors of a checkpoint: the same as `megatron-r1 convert inspect`; --help says more."""

import sys

from megatron_r1.cli import main

sys.exit(main(["convert", "inspect", *sys.argv[1:]]))
