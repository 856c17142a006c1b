#!/usr/bin/env python3
"""list the tensors of a checkpoint: the same as `megatron-r1 convert inspect`; --help says more."""

import sys

from _convert import convert

sys.exit(convert("inspect"))
