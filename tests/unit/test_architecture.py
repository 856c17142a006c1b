"""The house rules, checked on the sources themselves: who imports whom, sizes, names, annotations,
docstrings.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_r1"
MAX_FILE, MAX_FUNCTION = 500, 80

# Room -> rooms it may import besides itself. Nothing points upwards.
ROOMS: dict[str, set[str]] = {
    "types": set(),
    "config": set(),
    "observe": {"types", "config"},
    "data": {"types", "config"},
    "parallel": {"config"},
    "model": {"parallel", "config"},
    "plan": {"model", "parallel", "config"},
    "convert": {"model", "parallel", "observe"},
    "checkpoint": {"model", "parallel", "convert"},
    "algorithms": {"types", "config"},
    "rewards": {"types", "config"},
    "judges": {"types", "config", "rewards"},
    "rollout": {"types", "config", "observe", "data"},
    "train": {
        *("model", "parallel", "algorithms", "rollout", "rewards", "data", "checkpoint", "convert", "observe"),
    },
    "cluster": {"config", "observe"},
}
# Rooms that build on rooms which themselves take configuration and UserError also take them.
for _room in ("convert", "checkpoint", "train"):
    ROOMS[_room] |= {"types", "config"}
ROOMS["pipeline"] = set(ROOMS)
ROOMS["cli"] = set(ROOMS)
EXCEPTIONS: dict[str, set[str]] = {
    "rollout/megatron.py": {"model", "parallel"},
    # The zig-zag rule, without torch: attention and batches must cut alike.
    "data/batching.py": {"parallel"},
}

MEGATRON_PLACES = (
    "model/",
    "parallel/",
    "train/",
    "checkpoint/",
    "convert/",
    "plan/",
    "rollout/megatron.py",
)
SGLANG_PLACES = ("rollout/sglang.py",)
GPU_ONLY = ("sglang", "transformer_engine", "apex")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imported(node: ast.AST) -> Iterator[str]:
    """Absolute names of the modules that an import statement loads."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of this package in a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name in imported(node):
                parts = name.split(".")
                if parts[0] == "megatron_r1" and len(parts) > 1 and parts[1] != "__version__":
                    yield node.lineno, parts[1]


def room_of(path: Path) -> str:
    return relative(path).split("/")[0].removesuffix(".py")


def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in python_files("megatron_r1")} - {"__init__"} <= set(ROOMS)


def test_imports_point_downwards() -> None:
    wrong = []
    for path in python_files("megatron_r1"):
        room = room_of(path)
        if room == "__init__":
            continue
        allowed = {room} | ROOMS[room] | EXCEPTIONS.get(relative(path), set())
        wrong += [
            f"{relative(path)}:{line} imports {target}" for line, target in own_imports(path) if target not in allowed
        ]
    assert wrong == []


def test_the_table_itself_has_no_cycle() -> None:
    order = list(ROOMS)
    for room in order:
        assert all(order.index(below) < order.index(room) for below in ROOMS[room] - {room}), room


def places_that_import(top: str) -> list[str]:
    return sorted(
        {
            relative(path)
            for path in python_files("megatron_r1")
            for node in ast.walk(tree(path))
            for name in imported(node)
            if name.split(".")[0] == top
        }
    )


def test_only_named_places_import_megatron() -> None:
    assert [place for place in places_that_import("megatron") if not place.startswith(MEGATRON_PLACES)] == []


def test_only_one_place_speaks_to_sglang() -> None:
    assert [place for place in places_that_import("sglang") if place not in SGLANG_PLACES] == []


@pytest.mark.parametrize("library", GPU_ONLY)
def test_gpu_only_libraries_are_imported_inside_a_function(library: str) -> None:
    wrong = []
    for path in python_files("megatron_r1"):
        inside = {id(node) for function in functions(path) for node in ast.walk(function)}
        wrong += [
            f"{relative(path)}:{node.lineno}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in inside
            for name in imported(node)
            if name.split(".")[0] == library
        ]
    assert wrong == []


def test_algorithms_and_types_touch_no_process_group_and_no_file() -> None:
    for path in [*python_files("megatron_r1/algorithms"), PACKAGE / "types.py"]:
        for node in ast.walk(tree(path)):
            for name in imported(node):
                assert not name.startswith(("torch.distributed", "pathlib", "os", "io")), f"{relative(path)}: {name}"


def test_file_sizes() -> None:
    sizes = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files("megatron_r1", "tests", "tools")
    }
    assert {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > MAX_FILE} == {}


def test_function_sizes() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in python_files("megatron_r1", "tests", "tools")
        for node in functions(path)
        if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert long == []


def test_every_function_is_annotated() -> None:
    bare = []
    for path in python_files("megatron_r1", "tests", "tools"):
        for node in functions(path):
            a = node.args
            arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            missing = [x.arg for x in arguments if x.annotation is None and x.arg not in ("self", "cls")]
            if missing or node.returns is None:
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {', '.join(missing) or 'return'}")
    assert bare == []


def test_every_module_says_what_it_does() -> None:
    modules = [p for p in python_files("megatron_r1", "tests", "tools") if p.stat().st_size]
    silent = [str(p.relative_to(ROOT)) for p in modules if not ast.get_docstring(tree(p))]
    assert silent == []


def test_no_module_is_a_drawer() -> None:
    names = {"utils.py", "helpers.py", "util.py", "helper.py", "misc.py"}
    assert [path for path in python_files("megatron_r1", "tools") if path.name in names] == []


def test_every_data_file_is_packaged() -> None:
    suffixes = {path.suffix for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert [suffix for suffix in sorted(suffixes - {".py"}) if f'"*{suffix}"' not in setup] == []


def test_config_and_cli_load_no_torch() -> None:
    names = [
        f"megatron_r1.config.{path.stem}" for path in python_files("megatron_r1/config") if path.stem != "__init__"
    ]
    modules = ["megatron_r1.cli", "megatron_r1.types", *names]
    code = f"import sys\nfor name in {modules!r}: __import__(name)\n"
    code += "print(sorted({'torch', 'megatron', 'numpy', 'transformers'} & set(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert shown.stdout.strip() == "[]"
