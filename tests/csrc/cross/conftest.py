"""Runners for this and other architectures, built when first asked for."""

from __future__ import annotations

import pytest
from support.cross import build


@pytest.fixture(scope="session")
def runners(tmp_path_factory: pytest.TempPathFactory):
    """`runner(architecture, name, ...)`: the executable of tests/native_cross/<name>.cpp, see `cross.build`."""
    folder = tmp_path_factory.mktemp("runners")
    return lambda architecture, name="runner", *options: build(folder, architecture, name, *options)
