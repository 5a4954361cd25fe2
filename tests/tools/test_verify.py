"""The parity check on the device: right bundles pass, wrong numbers of every kind fail."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support import tiny

from edgeformer.bundle.bundle import Bundle
from edgeformer.engines.feed import feed, joined
from edgeformer.engines.onnxruntime import OrtEngine
from edgeformer.engines.reference import compare
from edgeformer.errors import BundleError
from edgeformer.tools.verify import verify


def _step_by_step(engine, ids):
    return joined(feed(engine, engine.new_state(), {"input_ids": ids}, steps=(5, 1, 1, 1, 2)))["logits"]


@pytest.mark.parametrize("name", ["float", "q8", "float16", "plain", "forecast"])
def test_a_right_bundle_passes(bundles, name):
    steps = []
    report = verify(bundles / name, "cpu", threads=1, progress=steps.append)
    assert report.passed
    assert report.engine == "cpu"
    runs = {check.run for check in report.checks}
    assert runs == ({"in one run"} if name == "forecast" else {"in one run", "step by step"})
    assert steps[0] == "checking hashes"
    assert any(check.tolerance is not None for check in report.checks)
    assert json.loads(json.dumps(report.as_dict()))["passed"] is True


def _spoil_reference(bundle, change):
    with np.load(bundle / "reference.npz") as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez(bundle / "reference.npz", **arrays)


def test_other_weights_fail_and_the_place_is_named(lm, copy_of, reseal):
    damaged = copy_of(lm)
    other = tiny.decoder(Bundle.open(lm).vocab_size, seed=1)
    tiny.save_graph(other, damaged)
    reseal(damaged)
    report = verify(damaged, "cpu", threads=1)
    assert not report.passed
    failed = [check for check in report.checks if not check.passed]
    assert {check.reference for check in failed} == {"bundle"}
    assert all(len(check.where) == 3 for check in failed)
    assert "allowed 0.001" in str(failed[0])


@pytest.mark.parametrize("amount", [0.5, 2.0])
def test_one_wrong_number_fails_from_the_tolerance_on(lm, copy_of, reseal, amount):
    damaged = copy_of(lm)

    def change(arrays):
        reference = arrays["bundle.logits"]
        reference[1, 2, 33] += amount * 1e-3 * np.ptp(reference)

    _spoil_reference(damaged, change)
    reseal(damaged)
    report = verify(damaged, "cpu", threads=1)
    assert report.passed == (amount < 1)
    if amount > 1:
        worst = [check for check in report.checks if not check.passed]
        assert {check.where for check in worst} == {(1, 7, 33)}  # the reference holds the last 4 of 9 positions


def test_a_broken_cache_fails_step_by_step_only(lm):
    """The whole run has no past; a cache that loses a token shows in the steps."""

    class Forgetful(OrtEngine):
        def forward(self, batch):
            for _, state in batch:
                if state.length > 5:
                    state.truncate(state.length - 1)
            return super().forward(batch)

    bundle = Bundle.open(lm)
    ids = np.random.default_rng(0).integers(3, 300, (1, 9))
    good = OrtEngine(bundle, threads=1)
    whole = good.forward([({"input_ids": ids}, good.new_state())])[0]["logits"]
    steps = _step_by_step(good, ids)
    assert compare("logits", "bundle", "", steps, whole, 1e-3).passed
    bad = _step_by_step(Forgetful(bundle, threads=1), ids)
    assert not compare("logits", "bundle", "", bad, whole, 1e-3).passed


@pytest.mark.parametrize(
    ("got", "passed"),
    [
        ([0.0, 1.0, 2.0], True),
        ([0.0, 1.0, 2.1], True),
        ([0.0, 1.0, 2.3], False),
        ([0.0, np.nan, 2.0], False),
        ([0.0, np.inf, 2.0], False),
        ([0.0, 1.0], False),
        ([[0.0, 1.0, 2.0]], False),
    ],
)
def test_compare(got, passed):
    check = compare("y", "float", "r", np.array(got, np.float32), np.array([0.0, 1.0, 2.0], np.float32), 0.1)
    assert check.passed == passed
    assert compare("y", "float", "r", np.array(got), np.array([0.0, 1.0, 2.0]), None).passed


def test_only_a_language_models_reference_may_hold_the_last_positions_alone():
    whole = np.random.default_rng(0).standard_normal((2, 9, 4))
    part = whole[:, -4:]
    assert compare("logits", "bundle", "r", whole, part, 1e-6, last=True).passed
    assert not compare("logits", "bundle", "r", whole, whole[:, :4], 1e-6, last=True).passed
    assert not compare("y", "bundle", "r", whole, part, 1e-6).passed


def test_a_constant_reference_is_compared_as_it_is():
    same = np.full((2, 3), 7.0)
    assert compare("y", "float", "r", same, same, 1e-6).passed
    assert not compare("y", "float", "r", same + 0.01, same, 1e-3).passed


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: a.clear(), "holds nothing to compare"),
        (lambda a: [a.pop(n) for n in list(a) if n.startswith("input.")], "holds nothing to compare"),
        (lambda a: a.update({"other": np.zeros(1)}), "expected input"),
        (lambda a: a.update({"bundle.y": np.zeros(1)}), "has an output 'y' that the graph does not"),
        (lambda a: a.update({"input.input_ids": np.array([{"a": 1}], object)}), "data for object"),
    ],
)
def test_a_reference_that_proves_nothing_is_refused(lm, copy_of, reseal, change, expected):
    damaged = copy_of(lm)
    _spoil_reference(damaged, change)
    reseal(damaged)
    with pytest.raises(BundleError, match=expected):
        verify(damaged, "cpu", threads=1)


def test_a_reference_file_that_is_none_is_refused(lm, copy_of, reseal, edit_manifest):
    damaged = copy_of(lm)
    (damaged / "reference.npz").write_bytes(b"PK\x03\x04 not a zip")
    reseal(damaged)
    with pytest.raises(BundleError, match="cannot be read"):
        verify(damaged, "cpu", threads=1)
    edit_manifest(damaged, lambda m: m.update(reference=None))
    with pytest.raises(BundleError, match="holds no reference values"):
        verify(damaged, "cpu", threads=1)


def test_no_tolerance_is_no_pass(lm, copy_of, edit_manifest):
    damaged = copy_of(lm)
    edit_manifest(damaged, lambda m: m["reference"].update(tolerance={"logits": None}))
    with pytest.raises(BundleError, match="holds nothing to compare"):
        verify(damaged, "cpu", threads=1)


def test_hashes_are_checked_first(lm, copy_of):
    damaged = copy_of(lm)
    data = bytearray((damaged / "model.onnx.data").read_bytes())
    data[5000] ^= 128
    (damaged / "model.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match="other content"):
        verify(damaged, "cpu", threads=1)
