"""Exceptions that become one readable message instead of a traceback."""

from __future__ import annotations


class RunFailed(Exception):
    """The run cannot go on, through nobody's wrong input: one readable message and exit status 1."""


class UserError(Exception):
    """A bad input, exit status 2. The text names the key or file, what was given, what is allowed, and the cure."""
