#!/usr/bin/env python3
"""prove a converted folder: the same as `megatron-r1 convert verify`; --help says more."""

import sys

from megatron_r1.cli import main

sys.exit(main(["convert", "verify", *sys.argv[1:]]))
