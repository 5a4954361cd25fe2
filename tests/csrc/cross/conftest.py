"""Runners for this and other architectures, built on first use."""

from __future__ import annotations

import pytest
from support.cross import build


@pytest.fixture(scope="session")
def runners(tmp_path_factory: pytest.TempPathFactory):
    """`runner(architecture, name, ...)`: the executable of tests/csrc/cross/<name>.cpp, see `cross.build`."""
    folder = tmp_path_factory.mktemp("runners")
    return lambda architecture, name="runner", *options: build(folder, architecture, name, *options)
