"""A server on loopback in a thread, and tiny bundles for it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import threading
import time

import numpy as np
import pytest
import uvicorn
from onnx import TensorProto, helper
from support import tiny, tool_templates

from edgeformer.bundle.write import seal, write_bundle
from edgeformer.server.app import create_app
from edgeformer.server.options import ServeOptions
from edgeformer.server.registry import Registry
from edgeformer.server.run import uvicorn_config

CALLS = "tags around each JSON call"
REASONS = "invoke tags, the prompt opens reasoning"
EFFORT = "variables that say how to reason"
SWITCHED = (  # reads how much to reason, and whether to
    "{% if reasoning_effort is defined %}{{ 'effort ' + reasoning_effort + '\n' }}{% endif %}"
    + tiny.TEMPLATE
    + "{% if enable_thinking is defined and not enable_thinking %}{{ 'no thoughts\n' }}{% endif %}"
)


def require(module, how):
    """Skip the test if an optional package is missing; in CI, fail it."""
    if importlib.util.find_spec(module) is None:
        message = f"{module} is not installed: {how}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


class Running:
    """A server that runs in a thread: its address and what is inside."""

    def __init__(self, bundles, options=None, where=None):
        options = ServeOptions(port=0, **(options or {}))
        self.registry = Registry([str(bundle) for bundle in bundles], options, {"threads": 1, **(where or {})})
        self.app = create_app(self.registry, options)
        self.server = uvicorn.Server(uvicorn_config(self.app, options))
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    @property
    def port(self):
        return self.server.servers[0].sockets[0].getsockname()[1]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        self._thread.start()
        wait_for(lambda: self.server.started)
        return self

    def stop(self):
        self.server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def client(self, **more):
        import openai

        return openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0, timeout=60, **more)

    def loaded(self, name):
        entry = self.registry.entries[name]
        return entry.loaded

    def scheduler(self, name):
        return self.loaded(name).scheduler


@contextlib.contextmanager
def running(bundles, options=None, where=None):
    """A server of these bundles; `options` of ServeOptions, `where` of load."""
    one = Running(bundles, options, where).start()
    try:
        yield one
    finally:
        one.stop()


def wait_for(condition, seconds=20.0):
    """Returns once the condition holds; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


def write_long_lm(path):
    """The tiny decoder with a context of 1024 tokens."""
    return tiny.write_lm(path, seed=1, positions=1024)


def with_template(source, path, template):
    """A copy of a tiny bundle with another chat template."""
    return with_text(source, path, SWITCHED if template == EFFORT else tool_templates.TEMPLATES[template])


def with_text(source, path, text):
    """A copy of a tiny bundle with this chat template."""
    shutil.copytree(source, path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["chat_template"] = text
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    manifest = json.loads((path / "edgeformer.json").read_text())
    del manifest["files"]
    seal(path, manifest)
    return path


def write_text_encoder(path):
    """A tiny encoder of text: its states are rows of a table."""
    with write_bundle(path) as folder:
        vocab = tiny.tokenizer(folder)
        g = tiny.GraphBuilder()
        table = np.random.default_rng(0).standard_normal((vocab, tiny.HIDDEN)).astype(np.float32)
        g.add("Gather", [g.weight("embed.weight", table), "input_ids"], ["last_hidden_state"])
        info = helper.make_tensor_value_info
        inputs = [info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
        outputs = [info("last_hidden_state", TensorProto.FLOAT, ["batch", "sequence", tiny.HIDDEN])]
        made = tiny.model(g, inputs, outputs)
        (folder / "config.json").write_text(json.dumps({"vocab_size": vocab, "pad_token_id": 0}))
        tiny.save_graph(made, folder)
        processing = {"pooling": "mean", "normalize": True, "max_length": 64}
        seal(folder, tiny.manifest(made, task="feature-extraction", processing=processing))
    return path
