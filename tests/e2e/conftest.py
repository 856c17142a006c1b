"""One uninterrupted run that the end-to-end tests share; nobody writes into it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e.recipes import finish, write_recipe


class Finished(NamedTuple):
    """A run that has ended by itself."""

    recipe: Path
    folder: Path
    process: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("reference")
    recipe = write_recipe(folder)
    process = finish("run", recipe, "--run-dir", folder / "run")
    assert process.returncode == 0, process.stderr
    return Finished(recipe, folder / "run", process)


@pytest.fixture(autouse=True)
def quiet_checkpoint_reader(caplog: pytest.LogCaptureFixture) -> None:
    """torch's checkpoint reader logs a dictionary a call at DEBUG, which would bury the reason of a failure."""
    caplog.set_level("WARNING")
