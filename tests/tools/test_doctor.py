"""The doctor: what can run is said to run, and each thing that cannot has its reason."""

from __future__ import annotations

import os
import sys

import onnx
import pytest

from edgeformer import machine
from edgeformer.bundle.bundle import Bundle
from edgeformer.tools import doctor, toolchain
from edgeformer.tools.doctor import examine, examine_bundle, fused_weights


def _topics():
    return {finding.topic: finding for finding in examine()}


def test_this_machine_runs_the_cpu_engine():
    found = _topics()
    assert found["engine cpu"].verdict == "yes"
    assert {"python", "cpu", "memory", "onnxruntime", "engine cuda", "engine native", "export"} <= set(found)
    assert all(finding.text for finding in found.values())


def test_cuda_is_yes_only_where_a_graph_ran_on_it():
    from edgeformer.engines.ort_install import cuda_driver_problem

    finding = _topics()["engine cuda"]
    if cuda_driver_problem():
        assert finding.verdict == "no"
        assert "NVIDIA" in finding.text


def test_a_provider_that_is_offered_but_does_not_run_is_no():
    """A GPU wheel without CUDA libraries lists CUDA, and runs on the CPU."""
    import onnxruntime

    class Pretending:
        SessionOptions = onnxruntime.SessionOptions

        @staticmethod
        def InferenceSession(model, options, providers):  # noqa: N802 (onnxruntime's name)
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    problem = doctor._try_provider(Pretending, "CUDAExecutionProvider")
    assert "offers CUDAExecutionProvider but runs on CPUExecutionProvider" in problem
    assert doctor._try_provider(onnxruntime, "CPUExecutionProvider") is None


def test_a_missing_onnxruntime_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = _topics()
    assert found["onnxruntime"].verdict == found["engine cpu"].verdict == "no"


def test_an_old_onnxruntime_is_a_warning(monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    assert "too old for quantized bundles" in _topics()["engine cpu"].text


def test_both_wheels_are_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "both_wheels", lambda: "onnxruntime 1 and onnxruntime-gpu 2 are both installed")
    assert any(f.verdict == "warning" and "both installed" in f.text for f in examine())


def test_a_missing_extension_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "edgeformer._native", None)
    monkeypatch.delattr("edgeformer._native", raising=False)
    finding = _topics()["engine native"]
    assert finding.verdict == "no"
    assert "not built" in finding.text


def test_a_forced_isa_that_cannot_run_is_reported(monkeypatch):
    pytest.importorskip("edgeformer._native")
    monkeypatch.setenv("EDGEFORMER_ISA", "avx9000")
    finding = _topics()["engine native"]
    assert finding.verdict == "no"
    assert "EDGEFORMER_ISA=avx9000 cannot be used here" in finding.text


def test_missing_toolchain_packages_are_named(monkeypatch):
    monkeypatch.setattr(toolchain, "find_spec", lambda name: None if name == "torch" else object())
    found = _topics()
    assert found["export"].verdict == found["training"].verdict == "no"
    assert "torch not installed: pip install" in found["export"].text


def test_a_bundles_engines_are_tried(q8):
    findings = list(examine_bundle(q8))
    assert any(f.topic == "engine cpu" and f.text == "loads this bundle" for f in findings)
    assert any(f.text == "all 15 quantized linears are fused" for f in findings)


def test_a_linear_that_is_not_fused_is_a_warning(q8, copy_of, reseal, monkeypatch):
    """The natural order, DequantizeLinear before Transpose, runs right and many times slower, without a word."""
    monkeypatch.setitem(sys.modules, "edgeformer._native", None)  # this is about onnxruntime
    slow = copy_of(q8)
    model = onnx.load(str(slow / "model.onnx"), load_external_data=False)
    graph = model.graph
    made_by = {output: node for node in graph.node for output in node.output}
    linear = next(
        n for n in graph.node if n.op_type == "DequantizeLinear" and made_by[n.input[0]].op_type == "Transpose"
    )
    q, s = (made_by[name] for name in linear.input[:2])
    result = linear.output[0]
    linear.input[0], linear.input[1], linear.output[0] = q.input[0], s.input[0], result + ".rows"
    next(a for a in linear.attribute if a.name == "axis").i = 1
    q.input[0], q.output[0] = result + ".rows", result
    nodes = [n for n in graph.node if n is not s and n is not q and n is not linear]
    place = next(i for i, n in enumerate(nodes) if result in n.input)
    ordered = [*nodes[:place], linear, q, *nodes[place:]]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in ordered]
    del graph.node[:]
    graph.node.extend(copies)
    (slow / "model.onnx").write_bytes(model.SerializeToString())
    reseal(slow)
    assert fused_weights(Bundle.open(slow)) == (14, 1)
    assert any(f.verdict == "warning" and "1 quantized linears are not fused" in f.text for f in examine_bundle(slow))


# --------------------------------------------------------------------------------------------------------- the machine


def test_threads_stay_within_what_the_process_may_use(monkeypatch):
    assert 1 <= machine.default_threads() <= (os.cpu_count() or 1)
    monkeypatch.setattr(machine, "usable_cpus", lambda: [0])
    assert machine.default_threads() == 1
    monkeypatch.setattr(machine, "usable_cpus", lambda: list(range(10_000, 10_008)))  # no such CPUs in /sys
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    assert machine.default_threads() == 8
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    assert machine.default_threads() == 2
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.3)
    assert machine.default_threads() == 1


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("cpu.max", "max 100000\n", None),
        ("cpu.max", "150000 100000\n", 1.5),
        ("cpu.max", "nonsense", None),
        (None, None, None),
    ],
)
def test_the_control_groups_quota(tmp_path, file, text, expected):
    if file:
        (tmp_path / file).write_text(text)
    assert machine.cpu_quota(tmp_path) == expected


def test_the_old_control_groups_quota(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("50000")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert machine.cpu_quota(tmp_path) == 0.5
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1")
    assert machine.cpu_quota(tmp_path) is None


def test_memory_figures_are_plausible():
    total, available, peak = machine.total_memory(), machine.available_memory(), machine.peak_memory()
    assert total > 256 << 20
    assert available is None or available > 0
    assert 10 << 20 < peak < 1 << 40
    assert machine.cpu_name()
