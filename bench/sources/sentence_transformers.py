"""Every setting of a sentence-transformers folder, against the library that reads and writes it."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.sources import _sentences as tiny
from bench.sources.row import Row
from edgeformer.errors import EdgeformerError

TITLE = "sentence-transformers"
ABOUT = (
    "The settings that sentence-transformers writes and reads: its modules, their configuration keys, and the "
    "keys of config_sentence_transformers.json. Each is set on a tiny model, and the vectors or scores are "
    "compared with `SentenceTransformer.encode` and `CrossEncoder.predict` of the same folder."
)
TESTS = (
    "`tests/export/sources/test_sentence_transformers.py`, `tests/tasks/test_cross_encoders.py`, "
    "`tests/export/sources/test_positions.py`"
)

CLOSE = 2e-5  # for elements of size 1; an ignored setting changes them by 1e-2 and more
PROMPTS = {"query": "query : ", "passage": "passage : "}
Edit = Callable[[Path], Any]


def settings() -> list[str]:
    """From the library: its modules, the keys that they and their models write, and their arguments."""
    from sentence_transformers import CrossEncoder, SentenceTransformer, SimilarityFunction
    from sentence_transformers.cross_encoder import modules as pairs
    from sentence_transformers.multi_vector_encoder import modules as several
    from sentence_transformers.sentence_transformer import modules
    from sentence_transformers.sparse_encoder import modules as sparse

    names = [*modules.__all__, *sparse.__all__, *pairs.__all__, *getattr(several, "__all__", ())]
    found = [f"module {name}" for name in names if name not in ("Module", "InputModule")]  # base classes
    found += [f"Pooling: {mode}" for mode in modules.Pooling.POOLING_MODES]
    arguments = inspect.signature(modules.Transformer.__init__).parameters
    keys = [*modules.Transformer.config_keys, *arguments]
    left_out = ("self", "model_name_or_path", "backend")  # not settings of the model
    found += [f"Transformer: {key}" for key in keys if key not in left_out]
    for name in ("Pooling", "Dense", "LayerNorm", "Normalize", "Dropout"):
        found += [f"{name}: {key}" for key in getattr(modules, name).config_keys]
    for model in (SentenceTransformer, CrossEncoder):
        source = inspect.getsource(model._get_model_config) + inspect.getsource(model.__mro__[1]._get_model_config)
        written = [key for key in inspect.signature(model.__init__).parameters if f'"{key}"' in source]
        found += [f"{model.__name__}: {key}" for key in [*written, "model_type", "__version__", "requirements"]]
    found += [f"similarity: {function.value}" for function in SimilarityFunction]
    found += [f"CrossEncoder: {name}" for name in ("num_labels", "max_length", "token types")]
    return list(dict.fromkeys(found))


def rows(work: Path) -> Iterator[Row]:
    """One row per setting."""
    trials = _trials()
    plain = _embedder(work / "plain", [])
    scorer = _scorer(work / "scorer")
    for number, setting in enumerate(settings()):
        if setting.startswith("similarity"):
            yield _similarity_row(setting, plain)
            continue
        if setting not in trials:
            continue  # reported as not tried
        trial = trials[setting]
        base = scorer if setting.startswith("CrossEncoder") else plain
        folder = work / str(number)
        before = base
        if isinstance(trial, tuple):  # a trial with its own modules
            before = _embedder(work / f"{number} before", trial[0])
            trial = trial[1]
        shutil.copytree(before, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield _row(setting, before, folder, trial)


def _row(setting: str, before: Path, folder: Path, edit: Edit) -> Row:
    pairs = setting.startswith("CrossEncoder")
    value = str(edit(folder)).replace("\n", " ")
    expected: Any = None
    try:
        expected = _reference(folder, pairs)
        reference = "CrossEncoder.predict" if pairs else "SentenceTransformer.encode"
    except Exception as error:
        reference = f"the library: {type(error).__name__}"
    try:
        model = tiny.read(folder)
        found = model.score(tiny.PAIRS) if pairs else model.embed(tiny.TEXTS)
    except EdgeformerError as error:
        return Row(setting, "refused", f"{value}: {' '.join(str(error).split())[:160]}", reference)
    if expected is None:
        return Row(setting, "ignored", f"{value}: the library cannot load it, and it is read", reference)
    if found.shape != expected.shape or np.abs(found - expected).max() > CLOSE * max(1, np.abs(expected).max()):
        return Row(setting, "ignored", f"{value}: shape {found.shape}, the library {expected.shape}", reference)
    usual = _reference(before, pairs)
    moved = usual.shape != expected.shape or np.abs(usual - expected).max() > 100 * CLOSE
    off = f"off by {np.abs(found - expected).max():.0e}"
    if moved:
        return Row(setting, "honoured", f"{value}: {off}", reference)
    return Row(setting, "irrelevant", f"{value}: the library's result is the same, {off}", reference)


def _similarity_row(setting: str, folder: Path) -> Row:
    from sentence_transformers import SentenceTransformer

    name = setting.removeprefix("similarity: ")
    tiny.change(folder, "config_sentence_transformers.json", similarity_fn_name=name)
    try:
        model = tiny.read(folder)
    except EdgeformerError as error:
        return Row(setting, "refused", str(error)[:160], "the library: it is MultiVectorEncoder's")
    vectors = model.embed(tiny.TEXTS)
    expected = SentenceTransformer(str(folder), device="cpu").similarity(vectors, vectors).numpy()
    off = np.abs(model.similarity(vectors, vectors) - expected).max()
    fine = off <= CLOSE * np.abs(expected).max()
    return Row(setting, "honoured" if fine else "ignored", f"off by {off:.0e}", "SentenceTransformer.similarity")


def _reference(folder: Path, pairs: bool) -> Any:
    from sentence_transformers import CrossEncoder, SentenceTransformer

    if pairs:
        return CrossEncoder(str(folder), device="cpu").predict(tiny.PAIRS)
    return SentenceTransformer(str(folder), device="cpu").encode(tiny.TEXTS)


def _embedder(folder: Path, following: list[Any]) -> Path:
    base = tiny.base(folder.with_name(f"{folder.name} base"))
    tiny.saved(folder, base, [make() for make in following] or None, prompts=PROMPTS)
    return folder


def _scorer(folder: Path) -> Path:
    import transformers as tf
    from sentence_transformers import CrossEncoder

    config = tf.BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=64, num_labels=1, **tiny.SIZES)
    base = tiny.base(folder.with_name("scorer base"), lambda: tf.BertForSequenceClassification(config))
    CrossEncoder(str(base), prompts=PROMPTS, device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder


# -------------------------------------------------------------------------------------------------------------- trials


def _set(file: str, **values: Any) -> Edit:
    def edit(folder: Path) -> str:
        tiny.change(folder, file, **values)
        return ", ".join(f"{key} = {json.dumps(value)[:60]}" for key, value in values.items())

    return edit


def _listed(kind: str, config: dict[str, Any] | None = None) -> Edit:
    """modules.json with this class as its last module; with `first`, as its only one."""

    def edit(folder: Path) -> str:
        from sentence_transformers.sentence_transformer import modules

        listed = json.loads((folder / "modules.json").read_text())
        inputs = ("StaticEmbedding", "BoW", "WordEmbeddings", "Router", "Asym", "CLIPModel", "SparseStaticEmbedding")
        if kind in inputs or kind == "MLMTransformer":
            listed = []
        home = (
            "sentence_transformers.models" if hasattr(modules, kind) else "sentence_transformers.sparse_encoder.models"
        )
        listed.append({"idx": len(listed), "name": str(len(listed)), "path": f"9_{kind}", "type": f"{home}.{kind}"})
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / f"9_{kind}").mkdir()
        (folder / f"9_{kind}" / "config.json").write_text(json.dumps(config or {}))
        return "listed in modules.json"

    return edit


def _adds(make: Callable[[], Any]) -> Edit:
    """Adds one module with its weights to the folder."""
    return lambda folder: _add(folder, make())


def _add(folder: Path, module: Any) -> str:
    kind = type(module)
    listed = json.loads((folder / "modules.json").read_text())
    place = f"{len(listed)}_{kind.__name__}"
    listed.append(
        {"idx": len(listed), "name": str(len(listed)), "path": place, "type": f"{kind.__module__}.{kind.__name__}"}
    )
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / place).mkdir()
    module.save(str(folder / place))
    return f"added {kind.__name__} {json.dumps(module.get_config_dict())[:60]}"


def _without_pooling(folder: Path) -> None:
    listed = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(listed[:1]))


def _labels(folder: Path) -> str:
    """Replaces the folder's model by one with three labels."""
    import transformers as tf

    config = tf.BertConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=64, num_labels=3, **tiny.SIZES)
    tiny.base(folder, lambda: tf.BertForSequenceClassification(config))
    return "3"


def _unchanged(_: Path) -> str:
    return "as the library saves it"


def _trials() -> dict[str, Any]:
    from sentence_transformers.sentence_transformer import modules

    def mean() -> Any:
        return modules.Pooling(32)

    def dense(**more: Any) -> Callable[[], Any]:
        return lambda: modules.Dense(32, 8, **more)

    transformer, model = "sentence_bert_config.json", "config_sentence_transformers.json"
    pooling, second = "1_Pooling/config.json", "2_{}/config.json"
    text = {"method": "forward", "method_output_name": "pooler_output"}
    message = {"text": text, "message": {**text, "format": "flat"}}
    found: dict[str, Any] = {name: _listed(name.removeprefix("module ")) for name in settings() if "module " in name}
    found |= {
        "module Transformer": _unchanged,
        "module Pooling": _set(pooling, pooling_mode="max"),
        "module Dense": ([mean], _adds(dense())),
        "module LayerNorm": ([mean], _adds(lambda: modules.LayerNorm(32))),
        "module Normalize": ([mean], _adds(modules.Normalize)),
        "module Dropout": ([mean], _adds(lambda: modules.Dropout(0.9))),
    }
    found |= {f"Pooling: {mode}": _set(pooling, pooling_mode=mode) for mode in modules.Pooling.POOLING_MODES}
    found["Pooling: mean"] = _set(pooling, pooling_mode=["mean", "max"])
    found |= {
        "Pooling: embedding_dimension": _set(pooling, embedding_dimension=16),
        "Pooling: pooling_mode": _set(pooling, pooling_mode=["cls", "lasttoken"]),
        "Pooling: include_prompt": lambda folder: (
            _set(model, default_prompt_name="query")(folder),
            _set(pooling, include_prompt=False)(folder),
        )[1],
        "Transformer: transformer_task": _set(transformer, transformer_task="fill-mask"),
        "Transformer: modality_config": _set(transformer, modality_config=message),
        "Transformer: module_output_name": lambda folder: (
            _without_pooling(folder),
            _set(transformer, modality_config={"text": text}, module_output_name="sentence_embedding")(folder),
        )[1],
        "Transformer: processing_kwargs": _set(transformer, processing_kwargs={"text": {"max_length": 4}}),
        "Transformer: unpad_inputs": _set(transformer, unpad_inputs=False),
        "Transformer: query_length": _set(transformer, query_length=8),
        "Transformer: document_length": _set(transformer, document_length=8),
        "Transformer: query_expansion": _set(transformer, query_expansion={"length": 32, "strategy": "fixed"}),
        "Transformer: max_seq_length": _set(transformer, max_seq_length=5),
        "Transformer: do_lower_case": _set(transformer, do_lower_case=True),
        "Transformer: tokenizer_name_or_path": _set(transformer, tokenizer_name_or_path="."),
        "Transformer: model_kwargs": _set(transformer, model_kwargs={"dtype": "float32"}),
        "Transformer: processor_kwargs": _set(transformer, processor_kwargs={"model_max_length": 6}),
        "Transformer: config_kwargs": _set(transformer, config_kwargs={"hidden_act": "relu"}),
    }
    linear = second.format("Dense")
    found |= {
        "Dense: in_features": ([lambda: modules.Pooling(32, ["max", "cls"])], _adds(lambda: modules.Dense(64, 8))),
        "Dense: out_features": ([mean, dense()], _adds(lambda: modules.Dense(8, 4))),
        "Dense: bias": ([mean], _adds(dense(bias=False))),
        "Dense: activation_function": (
            [mean, dense()],
            _set(linear, activation_function="torch.nn.modules.activation.GELU"),
        ),
        "Dense: module_input_name": (
            [lambda: modules.Dense(32, 32, module_input_name="token_embeddings"), mean],
            _set("1_Dense/config.json", activation_function="torch.nn.modules.linear.Identity"),
        ),
        "Dense: module_output_name": ([mean, dense()], _set(linear, module_output_name="projected")),
        "Dense: use_residual": ([mean, lambda: modules.Dense(32, 32)], _set(linear, use_residual=True)),
        "LayerNorm: dimension": ([mean, dense()], _adds(lambda: modules.LayerNorm(8))),
        "Normalize: module_input_name": (
            [lambda: modules.Normalize("token_embeddings"), mean],
            _set(
                "1_Normalize/config.json",
                module_input_name="sentence_embedding",
                module_output_name="sentence_embedding",
            ),
        ),
        "Normalize: module_output_name": (
            [mean, modules.Normalize],
            _set(second.format("Normalize"), module_output_name="unit_embedding"),
        ),
        "Dropout: dropout": ([mean, lambda: modules.Dropout(0.1)], _set(second.format("Dropout"), dropout=0.9)),
    }
    pair = {"model_type": "CrossEncoder"}
    for name, extra in (("SentenceTransformer", {}), ("CrossEncoder", pair)):
        found |= {
            f"{name}: prompts": _set(model, prompts={"query": "blue : "}, default_prompt_name="query", **extra),
            f"{name}: default_prompt_name": _set(model, default_prompt_name="passage", **extra),
            f"{name}: model_type": _set(model, model_type="SparseEncoder"),
            f"{name}: __version__": _set(model, __version__={"sentence_transformers": "2.0.0"}, **extra),
            f"{name}: requirements": _set(model, requirements={"transformers": ">=99"}, **extra),
        }
    found |= {
        "SentenceTransformer: similarity_fn_name": _set(model, similarity_fn_name="maxsim"),
        "SentenceTransformer: truncate_dim": _set(model, truncate_dim=8),
        "CrossEncoder: activation_fn": _set(model, activation_fn="torch.nn.modules.linear.Identity"),
        "CrossEncoder: keep_in_fp32_modules": _set(model, keep_in_fp32_modules=["0.model.classifier"], **pair),
        "CrossEncoder: num_labels": _labels,
        "CrossEncoder: max_length": _set("tokenizer_config.json", model_max_length=7),
        "CrossEncoder: token types": _set(
            "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"]
        ),
    }
    return found
