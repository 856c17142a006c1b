"""Procedural tasks: problems without end, with answers a rule can check and worked solutions.

Prompt sources take their questions from here, and the pre-training corpus (`data/corpus.py`) also
takes worked solutions. Problem i of a seed is a pure function of (task, seed, i). A further task
(`data/tasks.py` says what it must do) is one class and one line in `TASKS`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.data.requests import Requests
from megatron_r1.data.tasks import Problem, Task, check_options, integer_range
from megatron_r1.data.wording import Languages, question_in

CHAIN_SLIPS = (-10, -2, -1, 1, 2, 10)
"""How far a wrong step lands from the right number: a miscount or a lost carry."""


class ChainSum:
    """Sums of several numbers: "5-6+9=?" -> "8".

    Options: terms (6), an integer or [fewest, most]; digits (1) of each number, likewise;
    allow_negation (true), whether terms after the first may be subtracted; languages, a table of
    language = weight: questions then begin with a word, "compute 5-6+9=?" or "计算5-6+9=?", and
    metadata["language"] names the language. One-digit terms run from 1 to 9.
    """

    name = "chain_sum"
    verifier = "integer"

    def __init__(self, options: Mapping[str, Any]) -> None:
        check_options(self.name, options, ("terms", "digits", "allow_negation", "languages"))
        self.terms = integer_range(self.name, options, "terms", default=6, least=2)
        self.digits = integer_range(self.name, options, "digits", default=1, least=1)
        self.allow_negation = options.get("allow_negation", True)
        if not isinstance(self.allow_negation, bool):
            raise UserError(f"task chain_sum: allow_negation = {self.allow_negation!r}; allowed are true and false")
        self.languages = Languages(self.name, options["languages"]) if "languages" in options else None

    def draw(self, rng: random.Random) -> Problem:
        """Terms and digits uniform in their ranges, each sign a fair coin; then a language, where there are any."""
        operands = []
        for i in range(rng.randint(*self.terms)):
            digits = rng.randint(*self.digits)
            number = rng.randint(10 ** (digits - 1), 10**digits - 1)
            negative = i > 0 and self.allow_negation and rng.random() < 0.5
            operands.append(-number if negative else number)
        question = str(operands[0]) + "".join(map(_signed, operands[1:])) + "=?"
        metadata = {"operands": operands, "terms": len(operands)}
        if self.languages is None:
            return Problem(question, str(sum(operands)), metadata)
        language = self.languages.draw(rng)
        return Problem(question_in(language, question), str(sum(operands)), metadata | {"language": language})

    def work(self, problem: Problem, rng: random.Random, error_rate: float, backwards: bool) -> tuple[str, str]:
        """Partial sums: "5-6=-1;-1+9=8"."""
        operands: list[int] = problem.metadata["operands"]
        first, *rest = reversed(operands) if backwards else operands
        total = first
        steps = []
        for operand in rest:
            result = total + operand
            if rng.random() < error_rate:
                result += rng.choice(CHAIN_SLIPS)
            steps.append(f"{total}{_signed(operand)}={result}")
            total = result
        return ";".join(steps), str(total)

    def near_miss(self, problem: Problem, rng: random.Random) -> str:
        """The sum, off by 1, 2 or 10."""
        return str(int(problem.answer) + rng.choice(CHAIN_SLIPS))


class CountLetters:
    """Counting a letter: "a in bacab=?" -> "2".

    Options: length (8) of the word, an integer or [shortest, longest]; letters (3), the size of
    its alphabet.
    """

    name = "count_letters"
    verifier = "integer"

    def __init__(self, options: Mapping[str, Any]) -> None:
        check_options(self.name, options, ("length", "letters"))
        self.length = integer_range(self.name, options, "length", default=8, least=1)
        letters, most = integer_range(self.name, options, "letters", default=3, least=2)
        if letters != most or letters > 26:
            raise UserError(
                f"task count_letters: letters = {options['letters']!r}; allowed is one integer from 2 to 26"
            )
        self.languages: Languages | None = None
        self.alphabet = "abcdefghijklmnopqrstuvwxyz"[:letters]

    def draw(self, rng: random.Random) -> Problem:
        """Letters uniform in the alphabet; the one asked for need not occur."""
        word = "".join(rng.choice(self.alphabet) for _ in range(rng.randint(*self.length)))
        letter = rng.choice(self.alphabet)
        metadata = {"word": word, "letter": letter}
        return Problem(f"{letter} in {word}=?", str(word.count(letter)), metadata)

    def work(self, problem: Problem, rng: random.Random, error_rate: float, backwards: bool) -> tuple[str, str]:
        """A running count: "b=0;a=1;c=1;a=2;b=2"."""
        word: str = problem.metadata["word"]
        count = 0
        steps = []
        for letter in reversed(word) if backwards else word:
            hit = letter == problem.metadata["letter"]
            if rng.random() < error_rate:
                hit = not hit
            count += hit
            steps.append(f"{letter}={count}")
        return ";".join(steps), str(count)

    def near_miss(self, problem: Problem, rng: random.Random) -> str:
        """The count, off by one, never negative."""
        count = int(problem.answer)
        return str(count + 1 if count == 0 else count + rng.choice((-1, 1)))


TASKS: dict[str, type[ChainSum] | type[CountLetters] | type[Requests]] = {
    ChainSum.name: ChainSum,
    CountLetters.name: CountLetters,
    Requests.name: Requests,
}


def build_task(name: str, options: Mapping[str, Any]) -> Task:
    """The task of this name at this difficulty.

    Raises:
        UserError: an unknown task or option, or an option's value out of range.
    """
    if name not in TASKS:
        raise UserError(f"task: {name!r} is unknown; allowed are {', '.join(TASKS)}")
    return TASKS[name](options)


def problem_at(task: Task, seed: int, index: int) -> Problem:
    """Problem `index` of a seed, whatever was asked before it."""
    return task.draw(keyed_random("problem", task.name, seed, index))


def keyed_random(*key: str | int) -> random.Random:
    """Random numbers that depend on the key alone: not on order, process or Python's hash seed."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _signed(number: int) -> str:
    return f"{number:+d}"
