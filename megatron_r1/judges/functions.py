"""Functions of the user's that judge or rewrite: found by name, loaded once, their errors explained."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_r1.config.errors import UserError


def load_function(spec: str, key: str) -> Callable[..., Any]:
    """The function that "package.module:function" or "path/to/file.py:function" names.

    key: where the recipe says so, e.g. "stage.cold.judge.call". Raises UserError when there is none.
    """
    place, _, name = spec.rpartition(":")
    try:
        module = _module(place)
    except UserError as error:
        raise UserError(f"{key} = {spec!r}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        offered = sorted(n for n, value in vars(module).items() if callable(value) and not n.startswith("_"))
        raise UserError(f"{key} = {spec!r}: {place} has no function {name!r}; it has {', '.join(offered) or 'none'}")
    function: Callable[..., Any] = found
    return function


@functools.cache
def _module(place: str) -> ModuleType:
    """The module of a name or a file, imported once a process."""
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UserError(
                f"no module {error.name!r}; install it, or give a file: path/to/file.py:function"
            ) from error
        except Exception as error:
            raise UserError(f"importing {place} raised {type(error).__name__}: {error}") from error
    path = Path(place)
    if not path.is_file():
        raise UserError(f"there is no file {path}; a relative path is seen from the recipe's folder")
    name = f"_function_of_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"running {path} raised {type(error).__name__}: {error}") from error
    return module
