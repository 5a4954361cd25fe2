"""Servers for the tests of this folder."""

from __future__ import annotations

import time

import pytest

for package in ("starlette", "uvicorn", "msgspec", "prometheus_client", "openai"):
    pytest.importorskip(package)

from support import serving

from edgeformer.decoding.scheduler import Scheduler


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """Folders by name: `lm`; `calls`, `reasons`, `effort` (the same with other chat templates); `encoder`."""
    folder = tmp_path_factory.mktemp("served")
    lm = serving.write_long_lm(folder / "lm")
    return {
        "lm": lm,
        "calls": serving.with_template(lm, folder / "calls", serving.CALLS),
        "reasons": serving.with_template(lm, folder / "reasons", serving.REASONS),
        "effort": serving.with_template(lm, folder / "effort", serving.EFFORT),
        "encoder": serving.write_text_encoder(folder / "encoder"),
    }


@pytest.fixture(scope="session")
def server(served):
    """A running server of all these models, with default options."""
    with serving.running([f"{name}={path}" for name, path in served.items()]) as one:
        yield one


@pytest.fixture
def client(server):
    with server.client() as one:
        yield one


@pytest.fixture(scope="session")
def model(served):
    """The model of the bundle `lm`, in this process without a server: what answers are compared with."""
    import edgeformer

    return edgeformer.load(served["lm"], threads=1)


@pytest.fixture
def slow(monkeypatch):
    """Each step of a scheduler takes 20 ms more, so that an answer of 200 tokens runs for seconds."""
    step = Scheduler.step

    def slower(self):
        time.sleep(0.02)
        step(self)

    monkeypatch.setattr(Scheduler, "step", slower)
