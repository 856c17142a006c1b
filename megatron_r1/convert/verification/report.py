"""What a verification found: checks, each with its own result, for people and for machines. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "failed", "not done"]
_SHOWN = 8  # details of a check that people get; machines get all
_WORDS: dict[State, str] = {"ok": "ok", "failed": "FAILED", "not done": "not done"}


@dataclass(frozen=True)
class Check:
    """One check. summary: what was looked at, or why nothing was; details: a line a problem; notes: remarks that are
    no problem; numbers: more for machines.
    """

    name: str
    state: State
    summary: str
    details: Sequence[str] = ()
    notes: Sequence[str] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


def not_done(name: str, why: str) -> Check:
    """A check that could not be made, or that nobody asked for."""
    return Check(name, "not done", why)


def failed(name: str, why: str) -> Check:
    """A check that failed as a whole."""
    return Check(name, "failed", why)


@dataclass(frozen=True)
class Report:
    """All checks of one folder."""

    target: str
    source: str | None
    checks: Sequence[Check]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(check.state != "failed" for check in self.checks)

    def lines(self) -> list[str]:
        """For people: a line a check, problems and notes below it, and the verdict."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{_WORDS[check.state]:8}  {check.name:{width}}  {check.summary}")
            lines += [f"{'':10}{line}" for line in check.details[:_SHOWN]]
            if len(check.details) > _SHOWN:
                lines.append(f"{'':10}and {len(check.details) - _SHOWN} more (all of them with --json)")
            lines += [f"{'':10}note: {line}" for line in check.notes]
        bad = [check.name for check in self.checks if check.state == "failed"]
        return [*lines, f"{self.target}: {'FAILED: ' + ', '.join(bad) if bad else 'ok'}"]

    def as_dict(self) -> dict[str, Any]:
        """For machines: everything, in types of JSON."""
        return {
            "ok": self.ok,
            "target": self.target,
            "source": self.source,
            "checks": [
                {
                    "name": check.name,
                    "state": check.state,
                    "summary": check.summary,
                    "details": list(check.details),
                    "notes": list(check.notes),
                    **check.numbers,
                }
                for check in self.checks
            ],
        }
