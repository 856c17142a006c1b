"""The one exception for mistakes a user can mend: it becomes one readable message and exit status 2."""

from __future__ import annotations


class UserError(Exception):
    """A bad input. The text names the key or file, what was given, what is allowed, and the cure."""
