"""Tasks of the library reasoning-gym, minus those whose scorer cannot be trusted.

Below `data/prompts.py`. The library is optional (extra `tasks`) and imported only here and in its
verifier. Its scorers read model text, so a scorer that evaluates it as Python, or pays for any
text, is refused before the run starts.
"""

from __future__ import annotations

import re
from typing import Any

from megatron_r1.config.errors import UserError
from megatron_r1.config.gym_tasks import REFUSED

# Found by feeding hostile and constant answers to every scorer of reasoning-gym 0.1.25.


class GymTask:
    """One task of reasoning-gym; problem i is a pure function of (options, seed, i).

    Raises:
        UserError: the library is missing, the task unknown or refused, or its options wrong.
    """

    verifier = "reasoning_gym"

    def __init__(self, name: str, options: dict[str, Any], size: int, seed: int) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise UserError(
                'source = "reasoning_gym" needs the library reasoning-gym, which is not installed: '
                "pip install 'megatron-r1[tasks]'"
            ) from error
        if name in REFUSED:
            raise UserError(f"task: reasoning_gym's {name!r} is refused: {REFUSED[name]}")
        if name not in DATASETS:
            allowed = ", ".join(sorted(set(DATASETS) - set(REFUSED)))
            raise UserError(f"task: reasoning_gym has no {name!r}; allowed are {allowed}")
        reserved = [key for key in ("size", "seed") if key in options]
        if reserved:
            raise UserError(
                f"prompts.options: {', '.join(reserved)} is a key of the prompts table itself; set it there"
            )
        self.name = name
        try:
            self._dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
        except (TypeError, AssertionError, ValueError) as error:
            raise UserError(
                f"prompts.options: reasoning_gym's {name!r} refuses {options} ({error}); it takes "
                f"{_option_names(DATASETS[name][1])}"
            ) from error

    def problem(self, index: int) -> tuple[str, str | None, dict[str, Any]]:
        """(question, answer or None, metadata).

        metadata = {"task": name, "entry": entry}, the entry being what the scorer wants back.

        Raises:
            UserError: the library fails to make this problem.
        """
        try:
            entry = self._dataset[index]
        except Exception as error:  # each of its hundred generators fails in its own way
            raise UserError(
                f"task: reasoning_gym's {self.name!r} cannot make problem {index} "
                f"({type(error).__name__}: {error}); choose other options or another seed"
            ) from error
        answer = entry["answer"]
        metadata = {"task": self.name, "entry": entry}
        return entry["question"], None if answer is None else str(answer), metadata


def _option_names(config_class: type) -> str:
    fields = vars(config_class).get("__dataclass_fields__", {})
    names = [name for name in fields if not re.fullmatch(r"seed|size", name)]
    return ", ".join(names) or "no options"
