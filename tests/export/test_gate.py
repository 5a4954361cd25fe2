"""The parity gate refuses wrong numbers: one planted fault of each kind in the graph."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

import onnx_ir as ir
import transformers as tf
from onnx_ir.tape import Tape
from support import architectures
from torch import nn

from edgeformer.errors import ParityError
from edgeformer.export import ExportOptions, export, module_source
from edgeformer.export.check import one_graph, parity
from edgeformer.export.graphs import trace_model
from edgeformer.export.inputs import Input
from edgeformer.export.passes.edit import constant, nodes
from edgeformer.export.sources.hub.heads import encoder_source
from edgeformer.export.sources.hub.hub import language_model

FLOAT = {"quantize": "none", "tokens": 0}


class Scan(nn.Module):
    """Sums along the width, divided by the width: both sizes and their order matter. `bias` is added where `on`."""

    def __init__(self):
        super().__init__()
        image = "float32[batch,height,width]"
        self.input_spec = {"x": image, "bias": image, "on": "bool[batch,height]"}

    def forward(self, x, bias, on):
        return torch.cumsum(x, 2) / x.shape[2] + torch.where(on[..., None], bias, 0 * bias)


def made(name):
    """The traced float graph of one of the sources that faults are planted into."""
    if name == "decoder":
        return trace_model(language_model(architectures.make("mistral"), "tiny"))
    if name == "own":
        return trace_model(module_source(Scan(), ExportOptions("x", "x"), "Scan"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = tf.BertModel(tf.BertConfig(vocab_size=60, max_position_embeddings=64, **sizes))
    return trace_model(encoder_source(model, "tiny", "feature-extraction", {}))


@pytest.fixture(scope="module")
def sources():
    return {name: made(name) for name in ("decoder", "encoder", "own")}


def weight(model, *parts):
    """The one initializer whose name has all `parts`."""
    (found,) = [v for name, v in model.graph.initializers.items() if all(part in name for part in parts)]
    return found


def replace_values(value, array):
    value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)


def other_input(model, op, index, make):
    """Input `index` of every `op` becomes what `make(tape, input)` gives."""
    for node in nodes(model, op):
        tape = Tape()
        new = make(tape, node.inputs[index])
        model.graph.insert_before(node, tape.nodes)
        node.replace_input_with(index, new)


def instead_of(model, name, make):
    """All readers of the input `name` read what `make(tape, input)` gives."""
    (given,) = [value for value in model.graph.inputs if value.name == name]
    readers = [use.node for use in given.uses()]
    tape = Tape()
    new = make(tape, given)
    for node in readers:
        node.replace_input_with(list(node.inputs).index(given), new)
    model.graph.insert_before(next(node for node in model.graph if node in readers), tape.nodes)


def dropped_mask(model):
    for node in nodes(model, "Attention"):
        node.replace_input_with(3, None)


def ignored_tokens(model):
    """All token types count as 0."""
    zero = constant(model, "zero", np.array(0, np.int64))
    instead_of(model, "token_type_ids", lambda tape, given: tape.op("Mul", [given, zero]))


def ignored_positions(model):
    """Positions count from 0 again, whatever `position_ids` says."""
    instead_of(
        model,
        "position_ids",
        lambda tape, given: tape.op("Sub", [given, tape.op("ReduceMin", [given], {"keepdims": 1})]),
    )


def zeroed_head(model):
    value = weight(model, "layers.1.", "o_proj")
    array = value.const_value.numpy().copy()
    axis = 1 if array.shape[0] == 64 else 0
    np.moveaxis(array, axis, 0)[16:32] = 0
    replace_values(value, array)


def exchanged_layers(model):
    one, other = (weight(model, f"layers.{i}.", "up_proj") for i in (0, 1))
    before = one.const_value.numpy()
    replace_values(one, other.const_value.numpy())
    replace_values(other, before)


def wider_window(model):
    """Each query sees one key more: the mask is made of a window of 6 instead of 5."""
    (window,) = [v for v in model.graph.initializers.values() if v.shape == [] and v.const_value.numpy() == 5]
    replace_values(window, np.array(6, np.int64))


def fewer_logits(model):
    """`logits_to_keep` keeps one row more than it says; 0 still keeps all."""
    other_input(
        model,
        "Neg",
        0,
        lambda tape, keep: tape.op(
            "Add",
            [keep, tape.op("Cast", [tape.op("Cast", [keep], {"to": 9})], {"to": 7})],  # + 1 where it is not 0
        ),
    )


def swapped_height_and_width(model):
    for node in nodes(model, "CumSum"):
        node.replace_input_with(1, constant(model, "height", np.array(1, np.int64)))


def frozen_size(model):
    other_input(model, "Div", 1, lambda *_: constant(model, "size", np.array(5, np.float32)))


def ignored_bool(model):
    for node in nodes(model, "Where"):
        true = constant(model, "true", np.array([[[True]]]))
        node.replace_input_with(0, true)


FAULTS = {
    "encoder": (dropped_mask, ignored_tokens),
    "decoder": (ignored_positions, zeroed_head, exchanged_layers, wider_window, fewer_logits),
    "own": (swapped_height_and_width, frozen_size, ignored_bool),
}


@pytest.mark.parametrize(
    ("name", "fault"), [(n, f) for n, faults in FAULTS.items() for f in faults], ids=lambda v: getattr(v, "__name__", v)
)
def test_a_planted_fault_is_refused(sources, name, fault, tmp_path):
    right = sources[name]
    wrong = dataclasses.replace(right, models={"model": right.models["model"].clone()})
    fault(wrong.models["model"])
    with pytest.raises(ParityError):
        export(ExportOptions(name, tmp_path / "b", **FLOAT), traced=wrong)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", FAULTS)
def test_without_a_fault_every_engine_passes(sources, name, tmp_path):
    manifest = export(ExportOptions(name, tmp_path / "b", **FLOAT), traced=sources[name])
    engines = manifest["parity"]["engines"]
    assert [n for n, found in engines.items() if found["passed"]] == ["native", "cpu"]
    assert all(engines[n]["tolerance"] == parity.TOLERANCE for n in ("native", "cpu"))


# --------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("seed", range(4))
def test_a_sample_covers_the_range_of_its_input(seed):
    sizes = {"batch": 3, "sequence": 8}
    ids = Input("ids", torch.int64, ("batch", "sequence"), high=1000).sample(sizes, seed)
    assert (ids.min(), ids.max()) == (0, 999)
    flags = Input("flags", torch.bool, ("batch", "sequence")).sample(sizes, seed)
    assert flags.any()
    assert not flags.all()
    mask = Input("attention_mask", torch.int64, ("batch", "sequence")).sample(sizes, seed)
    assert mask[0].all()
    assert mask.any(1).all()
    padded = mask[1:][~mask[1:].all(1).bool()]
    assert all(row[-1 if seed % 2 else 0] == 1 for row in padded), "the padding is on one side"


def test_every_axis_of_a_sample_has_its_own_size(sources):
    for sample in one_graph.samples(sources["own"].source):
        batch, height, width = sample.feeds["x"].shape
        assert len({height, width, batch}) == 3


@pytest.mark.parametrize("length", [37, 67, 139, 267, 523, 1100])
def test_pieces_step_across_every_border(length):
    pieces = parity.long_pieces(length)
    assert sum(pieces) == length
    assert min(pieces) >= 1
    ends = set(np.cumsum(pieces))
    crossed = [border for border in (129, 257, 513) if border + 7 < length]
    assert all({border - 1, border, border + 1} <= ends for border in crossed)
    assert {length - 1, length} <= ends
