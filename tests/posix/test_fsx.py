"""A hundred thousand random calls on one file; --fsx-operations makes it more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.posix.fsx import Exerciser
from tests.support import Client

PART = 25_000  # calls of one test, which has to end in time


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    operations, seed = metafunc.config.getoption("--fsx-operations"), metafunc.config.getoption("--fsx-seed")
    if "part" in metafunc.fixturenames:
        parts = 1 if seed is not None else -(-operations // PART)
        metafunc.parametrize("part", range(parts))


@pytest.mark.semantics("content-is-what-was-written")
def test_fsx(folder: Path, client: Client, part: int, pytestconfig: pytest.Config) -> None:
    """What is read, mapped, copied and stored at the end is what the calls before have made of the file."""
    given = pytestconfig.getoption("--fsx-seed")
    seed = random.SystemRandom().randrange(1 << 32) if given is None else given
    print(f"--fsx-seed {seed}")
    exerciser = Exerciser(folder / "a", seed)
    exerciser.run(min(PART, pytestconfig.getoption("--fsx-operations")))
    assert client.read(folder.name, exerciser.path.name) == bytes(exerciser.model), exerciser.story()


def test_fsx_on_a_local_file_system(tmp_path: Path) -> None:
    """The model itself is right."""
    Exerciser(tmp_path / "a", 1).run(20_000)
