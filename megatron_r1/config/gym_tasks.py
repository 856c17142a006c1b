"""Tasks of the library reasoning-gym that must not be rewards: neither as a prompt source nor as a verifier."""

from __future__ import annotations

_EVALUATES = "its scorer evaluates the model's answer as Python code"

REFUSED = {
    "binary_matrix": _EVALUATES,
    "countdown": _EVALUATES,
    "intermediate_integration": _EVALUATES,
    "n_queens": _EVALUATES,
    "polynomial_multiplication": _EVALUATES,
    "puzzle24": _EVALUATES,
    "simple_integration": _EVALUATES,
    "spiral_matrix": _EVALUATES,
    "string_insertion": _EVALUATES,
    "game_of_life_halting": "its scorer pays full reward for any answer that is not empty",
    "coin_flip": 'its scorer pays full reward for a prefix of the answer, so for "0"',
    "composite": "it mixes tasks and so would let refused ones in",
}
