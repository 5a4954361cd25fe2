"""Calibration: GPTQ's integers against a plain loop, inputs against PyTorch's hooks, samples against the model."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
pytest.importorskip("transformers", reason="the toolchain needs transformers")
pytest.importorskip("onnxruntime", reason="calibration runs the graph on onnxruntime")

from support import tiny

from edgeformer.bundle.bundle import Bundle
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions, blocks, export, read_recipe
from edgeformer.export.check import accuracy
from edgeformer.export.graphs import trace_model
from edgeformer.export.passes.linear_layers import linear_layers
from edgeformer.export.progress import Silent
from edgeformer.export.quantize import calibrate, gptq
from edgeformer.export.sources.hub.hub import language_model
from edgeformer.export.write import save_graph

FOUR_BITS = ("q4", "q4a")


def correlated(tokens: int, k: int, seed: int = 0) -> np.ndarray:
    """float32 [tokens, k]: inputs that share a few directions and differ in size, as a layer's do."""
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal((tokens, 4)) @ generator.standard_normal((4, k))
    return ((shared + 0.5 * generator.standard_normal((tokens, k))) * generator.uniform(0.2, 2, k)).astype(np.float32)


def weights(n: int, k: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def hessian(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.T @ x)


def textbook(row: np.ndarray, h: np.ndarray, scale: np.ndarray, minimum: np.ndarray, low: int, high: int):
    """(integers [K], loss) of one row: Optimal Brain Quantization in column order, in float64.

    Equations (2) and (3) of the GPTQ paper, with the inverse for the remaining columns computed anew at each column.
    `scale` and `minimum` are [K].
    """
    left, q, loss = row.astype(np.float64), np.zeros(len(row), int), 0.0
    for j in range(len(row)):
        inverse = np.linalg.inv(h[j:, j:])
        q[j] = np.clip(np.rint((left[j] - minimum[j]) / scale[j]), low, high)
        off = left[j] - (scale[j] * q[j] + minimum[j])
        loss += off**2 / inverse[0, 0]
        left[j:] -= off / inverse[0, 0] * inverse[0]
    return q, loss


def damped(h: torch.Tensor, damping: float = gptq.DAMPING) -> np.ndarray:
    h = h.double().numpy()
    return h + damping * np.diag(h).mean() * np.eye(len(h))


@pytest.mark.parametrize(("k", "block_size"), [(64, 32), (70, 32), (31, 16), (128, 64)])
@pytest.mark.parametrize("scheme", FOUR_BITS)
def test_the_integers_are_those_of_the_textbook_loop(scheme, k, block_size):
    w, h = weights(9, k), hessian(correlated(300, k))
    found = gptq.fit_blocks(w, gptq.inverse_factor(h), scheme, block_size)
    low, high = {"q4": (-8, 7), "q4a": (0, 15)}[scheme]
    scale = np.repeat(found.scale, block_size, axis=1)[:, :k].astype(np.float64)
    none = np.zeros_like(scale)
    minimum = none if found.minimum is None else np.repeat(found.minimum, block_size, axis=1)[:, :k].astype(np.float64)
    for row in range(len(w)):
        expected, _ = textbook(w[row], damped(h), scale[row], minimum[row], low, high)
        np.testing.assert_array_equal(found.q[row], expected)
    for part in filter(lambda part: part is not None, (found.scale, found.minimum)):
        assert part.shape == (9, -(-k // block_size))
        np.testing.assert_array_equal(part, part.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("scheme", FOUR_BITS)
def test_the_candidate_scale_with_the_least_loss_is_taken(scheme):
    """One block, so that its loss is the whole loss; every candidate scale is tried by the textbook's loop."""
    w, h = weights(6, 32), hessian(correlated(200, 32))
    factor = gptq.inverse_factor(h)
    found = gptq.fit_blocks(w, factor, scheme, 32)
    low, high = {"q4": (-8, 7), "q4a": (0, 15)}[scheme]
    candidates = list(blocks.grids(torch.from_numpy(w), factor.diagonal() ** -2.0, scheme, gptq._RANGES[scheme]))
    assert len(candidates) >= 8
    for row in range(len(w)):

        def loss(scale, minimum, row=row):
            full = [np.full(32, value, np.float64) for value in (scale, minimum)]
            return textbook(w[row], damped(h), *full, low, high)[1]

        every = [loss(float(s[row, 0]), 0.0 if m is None else float(m[row, 0])) for s, m in candidates]
        taken = loss(found.scale[row, 0], 0.0 if found.minimum is None else found.minimum[row, 0])
        # float32 in the search: two scales may tie there to a part in a million
        assert taken <= min(every) * (1 + 1e-5) < max(every)


@pytest.mark.parametrize("scheme", FOUR_BITS)
def test_outputs_on_the_calibration_inputs_lose_less_than_by_rounding(scheme):
    x, w = correlated(500, 128), weights(48, 128)
    fitted = gptq.fit_blocks(w, gptq.inverse_factor(hessian(x)), scheme, 32)
    rounded = blocks.quantize(w, scheme, 32)
    lost = [((x @ (w - found.dequantize()).T) ** 2).sum() for found in (fitted, rounded)]
    assert lost[0] < 0.5 * lost[1]
    alone = gptq.fit_blocks(w, gptq.inverse_factor(torch.eye(128)), scheme, 32)
    np.testing.assert_allclose(alone.dequantize(), rounded.dequantize(), atol=0.5 * np.abs(rounded.scale).max() * 15)
    off = [((w - found.dequantize()) ** 2).sum() for found in (alone, rounded)]
    # Inputs that do not correlate leave nothing to make good. Only the ranges searched are not the same.
    assert abs(off[0] / off[1] - 1) < 0.05


@pytest.mark.parametrize("scheme", FOUR_BITS)
def test_inputs_that_are_always_zero_leave_a_weight_near_where_it_was(scheme):
    x = correlated(200, 64)
    x[:, [3, 40]] = 0
    w = weights(5, 64)
    w[2] = 0
    for seen in (x, np.zeros_like(x)):
        found = gptq.fit_blocks(w, gptq.inverse_factor(hessian(seen)), scheme, 32)
        assert np.isfinite(found.dequantize()).all()
        step = np.repeat(np.abs(found.scale), 32, axis=1)
        dead = [3, 40] if seen is x else slice(None)
        # Rounded to the nearest, or clipped at an end of the range, which the fit may leave one more step away.
        assert (np.abs(found.dequantize() - w)[:, dead] <= 1.5 * step[:, dead] + 1e-6).all()
        np.testing.assert_array_equal(found.dequantize()[2], 0)


def test_rows_do_not_depend_on_each_other(monkeypatch):
    w, factor = weights(11, 64), gptq.inverse_factor(hessian(correlated(200, 64)))
    whole = gptq.fit_blocks(w, factor, "q4a", 32)
    monkeypatch.setattr(gptq, "_ROWS", 4)
    pieces = gptq.fit_blocks(w, factor, "q4a", 32)
    np.testing.assert_array_equal(whole.q, pieces.q)


def test_a_weight_that_is_not_finite_is_refused():
    w = weights(3, 32)
    w[1, 2] = np.nan
    with pytest.raises(ExportError, match="NaN"):
        gptq.fit_blocks(w, gptq.inverse_factor(torch.eye(32)), "q4", 32)


def test_inputs_that_are_not_finite_are_refused():
    h = torch.eye(32)
    h[3, 3] = torch.inf
    with pytest.raises(ExportError, match="NaN or infinite"):
        gptq.inverse_factor(h)


# ---------------------------------------------------------------------------------------- inputs and samples


@pytest.fixture(scope="module")
def graph(traced, tmp_path_factory):
    """`graph(name)`: (what was traced, the path of its float graph)."""

    def get(name):
        path = tmp_path_factory.mktemp(name) / "model.onnx"
        save_graph(traced(name).models["model"].clone(), path)
        return traced(name), path

    return get


@pytest.mark.parametrize("memory", [1 << 30, 4 * 64 * 64], ids=["one group", "a group for each"])
@pytest.mark.parametrize("name", ["qwen3", "gpt_neox"])
def test_hessians_are_those_of_pytorchs_own_inputs(name, memory, graph, monkeypatch):
    monkeypatch.setattr(calibrate, "_MEMORY", memory)
    shared, path = graph(name)
    ids = np.random.default_rng(3).integers(0, 120, (3, 20))
    seen: dict[str, torch.Tensor] = {}
    module = shared.source.module
    hooks = [
        part.register_forward_pre_hook(lambda _, given, key=key: seen.update({f"{key}.weight": given[0]}))
        for key, part in module.named_modules()
        if isinstance(part, torch.nn.Linear)
    ]
    with torch.no_grad():
        module(torch.from_numpy(ids))
    for hook in hooks:
        hook.remove()
    layers = {layer.weight.name: layer for layer in linear_layers(shared.models["model"])}
    assert layers.keys() == seen.keys()
    sizes = {(layer.x.name,): layer.weight.shape[1] for layer in layers.values()}
    text = calibrate.Calibration(path, ids, "test")
    groups = list(calibrate.hessians(text, sizes, Silent()))
    assert len(groups) == (1 if memory == 1 << 30 else len(sizes))
    found = {key: value for group in groups for key, value in group.items()}
    for weight, layer in layers.items():
        x = seen[weight].flatten(0, -2).double()
        expected = (x.T @ x / ids.size).numpy()
        np.testing.assert_allclose(found[(layer.x.name,)].numpy(), expected, atol=1e-4 * np.abs(expected).max())
    assert [file.name for file in path.parent.iterdir() if "calibration" in file.name] == []


def test_own_samples_follow_the_models_distribution(graph):
    """A drawn token's log-probability has minus the entropy as its mean, and a variance that the distribution gives; a
    draw of anything else (uniform tokens, the likeliest) has another mean, by many deviations."""
    shared, path = graph("gpt2")
    ids = calibrate.own_samples(path, 120, 500, 4, Silent())
    assert ids.shape == (500, 4) and ids.min() >= 0 and ids.max() < 120
    np.testing.assert_array_equal(ids, calibrate.own_samples(path, 120, 500, 4, Silent()))
    with torch.no_grad():
        every = torch.log_softmax(shared.source.module(torch.from_numpy(ids)).logits.double(), -1)[:, :-1]
    drawn = every.gather(-1, torch.from_numpy(ids[:, 1:, None])).squeeze(-1)
    entropy = -(every.exp() * every).sum(-1)
    variance = (every.exp() * every**2).sum(-1) - entropy**2
    deviations = float((drawn + entropy).sum() / variance.sum().sqrt())
    assert abs(deviations) < 4
    for other in (every.mean(-1), every.amax(-1)):
        assert abs(float((other + entropy).sum() / variance.sum().sqrt())) > 10


# ---------------------------------------------------------------------------------------- exports


@pytest.fixture(scope="module")
def with_tokenizer(traced):
    """Tiny Qwen3 with a byte-level tokenizer whose ids are cut to its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.train_from_iterator(
        [tiny.TEXT], trainers.BpeTrainer(vocab_size=120, special_tokens=["?"], show_progress=False)
    )
    shared = traced("qwen3")
    source = dataclasses.replace(shared.source, files={"tokenizer.json": made.to_str().encode()})
    return dataclasses.replace(shared, source=source)


def integers(folder) -> dict[str, np.ndarray]:
    import onnx_ir as ir

    initializers = ir.load(folder / "model.onnx").graph.initializers
    return {name: value.const_value.numpy() for name, value in initializers.items() if name.endswith(".q")}


@pytest.mark.parametrize("scheme", FOUR_BITS)
def test_the_same_export_twice_gives_the_same_bytes(scheme, traced, tmp_path):
    for name in ("a", "b"):
        found = export(ExportOptions("x", tmp_path / name, quantize=scheme, tokens=0), traced=traced("qwen3"))
    assert found["quantization"]["calibration"] == {
        "method": "GPTQ", "tensors": 2 * 7 + 1, "tokens": 512, "source": "own samples",
    }  # fmt: skip
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_without_calibration_weights_are_rounded_to_the_nearest(traced, tmp_path):
    shared = traced("qwen3")
    for name, options in (("plain", {"calibration": "none"}), ("fitted", {})):
        manifest = export(ExportOptions("x", tmp_path / name, quantize="q4", tokens=0, **options), traced=shared)
        assert (manifest["quantization"]["calibration"] is None) is (name == "plain")
    plain, fitted, state = (
        integers(tmp_path / "plain"),
        integers(tmp_path / "fitted"),
        shared.source.module.state_dict(),
    )
    for name, q in plain.items():
        scheme = "q8" if "embed" in name else "q4"
        expected = blocks.quantize(state[name.removesuffix(".q")].numpy(), scheme, 32).q
        np.testing.assert_array_equal(q.astype(np.int8), expected)
        assert (q != fitted[name]).any() == (scheme == "q4"), "the table of embeddings is rounded in both"


def test_a_tied_heads_own_copy_is_calibrated_and_its_table_is_not(tmp_path):
    import transformers
    from support import architectures

    config = transformers.AutoConfig.for_model(
        "qwen3", **architectures.CONFIGS["qwen3"] | {"tie_word_embeddings": True}
    )
    shared = trace_model(language_model(transformers.AutoModelForCausalLM.from_config(config).eval(), "tied"))
    found = {}
    for name in ("none", "samples"):
        options = ExportOptions("x", tmp_path / name, quantize="q8", head="q4", calibration=name, tokens=0)
        manifest = export(options, traced=shared)
        found[name] = integers(tmp_path / name)
    assert manifest["quantization"]["calibration"]["tensors"] == 1
    differs = [name for name, q in found["none"].items() if (q != found["samples"][name]).any()]
    assert [found["none"][name].dtype.name for name in differs] == ["int4"]
    assert sorted({q.dtype.name for q in found["none"].values()}) == ["int4", "int8"]


def test_a_users_text_is_calibrated_on(with_tokenizer, tmp_path, monkeypatch):
    seen = []
    original = calibrate.hessians
    from edgeformer.export.quantize import plan

    monkeypatch.setattr(plan, "hessians", lambda text, *rest: seen.append(text.ids) or original(text, *rest))
    (tmp_path / "mine.txt").write_text(tiny.TEXT * 20)
    found = {}
    for name, options in (
        ("own", {}),
        ("text", {"calibration": str(tmp_path / "mine.txt"), "calibration_tokens": 300}),
    ):
        manifest = export(
            ExportOptions("x", tmp_path / name, quantize="q4", tokens=0, **options), traced=with_tokenizer
        )
        found[name] = integers(tmp_path / name)
    report = manifest["quantization"]["calibration"]
    assert (report["source"], report["tokens"]) == ("mine.txt", 256), (
        "whole sequences of half the model's 128 positions"
    )
    expected = accuracy.read_tokens(with_tokenizer.source, tmp_path / "mine.txt", 300)[:256]
    np.testing.assert_array_equal(seen[1].ravel(), expected)
    assert any((q != found["text"][name]).any() for name, q in found["own"].items())


def test_the_text_that_measures_accuracy_is_not_calibrated_on(with_tokenizer, tmp_path, monkeypatch):
    def refuse():
        raise AssertionError("the text for accuracy was read")

    monkeypatch.setattr(accuracy, "_language_reference", refuse)
    export(ExportOptions("x", tmp_path / "b", quantize="q4", tokens=0), traced=with_tokenizer)
    with pytest.raises(AssertionError, match="was read"):
        export(ExportOptions("x", tmp_path / "c", quantize="q4", tokens=64), traced=with_tokenizer)
    (tmp_path / "same.txt").write_text(tiny.TEXT)
    with pytest.raises(ExportError, match="accuracy would be measured on"):
        ExportOptions("x", tmp_path / "b", calibration=str(tmp_path / "same.txt"), text=tmp_path / "same.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "q8", "calibration": "samples"}, "with q8 no weight"),
        ({"quantize": "none", "calibration": "samples"}, "with none no weight"),
        ({"quantize": "q8", "calibration_tokens": 100}, "with q8 no weight"),
        ({"calibration": "no/such/file.txt"}, "no text no/such/file.txt"),
        ({"calibration": __file__}, "no tokenizer"),
    ],
)
def test_calibration_is_refused_where_it_makes_no_sense(options, message, traced, tmp_path):
    with pytest.raises(ExportError, match=message):
        export(ExportOptions("x", tmp_path / "b", **options), traced=traced("qwen3"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"calibration_tokens": 0}, {"calibration": "none", "calibration_tokens": 10}])
def test_tokens_that_nothing_reads_are_refused(options, tmp_path):
    with pytest.raises(ExportError, match="calibration_tokens is"):
        ExportOptions("x", tmp_path / "b", **options)


class Forecaster(torch.nn.Module):
    """No language model, and no cache."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def test_a_model_that_is_no_language_model_is_rounded_unless_calibration_is_asked_for(tmp_path):
    from edgeformer.export.sources.user.factory import module_source

    options = ExportOptions("x", tmp_path / "b", quantize="q4", input=("x=float32[batch,sequence,32]",))
    source = module_source(Forecaster().eval(), options, "test", {})
    assert export(options, traced=source)["quantization"]["calibration"] is None
    asked = dataclasses.replace(options, output=tmp_path / "c", calibration="samples")
    with pytest.raises(ExportError, match="calibration runs a language model"):
        export(asked, traced=source)


def test_a_recipe_can_set_calibration(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text('source = "x"\ncalibration = "mine.txt"\ncalibration_tokens = 2048\n')
    options = read_recipe(recipe)
    assert options.calibration_text == tmp_path / "mine.txt" and options.calibration_tokens == 2048
    recipe.write_text('source = "x"\ncalibration = "none"\n')
    assert read_recipe(recipe).calibration == "none"


def test_the_manifest_opens_as_a_bundle(traced, tmp_path):
    export(ExportOptions("x", tmp_path / "b", quantize="q4", tokens=0), traced=traced("qwen3"))
    stored = json.loads((tmp_path / "b" / "edgeformer.json").read_text())
    assert Bundle.open(tmp_path / "b").manifest["quantization"] == stored["quantization"]
