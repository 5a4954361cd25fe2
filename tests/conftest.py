"""Fixtures for the whole suite: tiny real bundles, made once."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny


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
    """`reseal(bundle)`: make the manifest right again for whatever the files now hold."""

    def seal_again(bundle):
        from edgeformer.bundle import seal

        manifest = json.loads((bundle / "edgeformer.json").read_text())
        del manifest["files"]
        return seal(bundle, manifest)

    return seal_again
