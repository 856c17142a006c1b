#!/usr/bin/env python3
"""prove a converted folder: the same as `megatron-r1 convert verify`; --help says more."""

import sys

from _convert import convert

sys.exit(convert("verify"))
