"""The same calls on a local directory and on the mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.posix.both import Both


@pytest.fixture
def both(folder: Path, tmp_path: Path) -> Both:
    """An empty directory of a local file system, and one of the mount."""
    local = tmp_path / folder.name
    local.mkdir()
    return Both(local, folder)
