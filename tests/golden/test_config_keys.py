"""Every configuration key and its default is a surface: a change must be meant, and be in the
changelog.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1.config.run import RunConfig

GOLDEN = Path(__file__).parent / "config_keys.txt"


def config_keys() -> list[str]:
    """`Table.key = default` (or `required`) for every key of every table."""
    schema = RunConfig.model_json_schema(by_alias=True)
    tables: dict[str, Any] = {"RunConfig": schema, **schema["$defs"]}
    lines = []
    for table, body in tables.items():
        for key, field in body.get("properties", {}).items():
            value = json.dumps(field["default"]) if "default" in field else "required"
            factory = key not in body.get("required", []) and "default" not in field
            lines.append(f"{table}.{key} = {'made anew' if factory else value}")
    return sorted(lines)


def test_config_keys_are_those_of_the_golden_file() -> None:
    golden = GOLDEN.read_text(encoding="utf-8").splitlines()
    now = config_keys()
    gone, new = sorted(set(golden) - set(now)), sorted(set(now) - set(golden))
    assert not gone and not new, (
        f"gone: {gone}, new: {new}. If meant: note it in CHANGELOG.md and run `python -m tests.golden.test_config_keys`"
    )


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(config_keys()) + "\n", encoding="utf-8")
