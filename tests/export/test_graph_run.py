"""Graph files on plain onnxruntime: what it cannot load or run is an ExportError that names the node."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

from support.graphs import parse

from edgeformer.errors import ExportError
from edgeformer.export.check.graph_run import OrtGraph
from edgeformer.export.write import save_graph

ADDS = """(float16[n] x, int64[m,1] place, float16[m] more) => (float16[n] y) {
    y = ScatterND<reduction="add">(x, place, more)
}"""


def test_an_operator_without_a_kernel_for_its_type_is_named(tmp_path):
    """The CPU provider loads this graph and has no kernel for it when it runs: experts of JetMoE in float16."""
    save_graph(parse(ADDS), tmp_path / "g.onnx")
    graph = OrtGraph(tmp_path / "g.onnx")
    feeds = {"x": np.zeros(3, np.float16), "place": np.array([[1]]), "more": np.ones(1, np.float16)}
    with pytest.raises(ExportError, match=r"cannot run the exported graph: .*ScatterND"):
        graph(feeds)


def test_a_graph_of_wrong_types_is_refused(tmp_path):
    save_graph(parse("(float[n] x, float16[n] z) => (float[n] y) { y = Add(x, z) }"), tmp_path / "g.onnx")
    with pytest.raises(ExportError, match="cannot load the exported graph"):
        OrtGraph(tmp_path / "g.onnx")
