"""One model, many files: SmolLM2-135M-Instruct's Q4_1 GGUF, converted by each peer's own tools into out/peers.

The float weights are the dequantized GGUF, so every peer's loss is measured against the same model. The converters also
take the folder or GGUF of another model (random_models.py); `root` is then the folder for its files.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from bench.peers.environments import Environment, SetupFailed, run
from bench.report import ROOT
from bench.smollm2 import gguf_path

OUT = ROOT / "out" / "peers"
LOGS = OUT / "logs"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def write_whole(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made under a temporary name and renamed, so that it is complete."""
    if not path.exists():
        print(f"make {path.relative_to(ROOT)}", file=sys.stderr)
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        os.replace(partial, path)
    return path


def float_folder() -> Path:
    """A Hugging Face folder, float32, with the GGUF's dequantized weights and its tokenizer."""

    def make(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        source = gguf_path()
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        del model.hf_quantizer, model.config.quantization_config  # dequantized: an ordinary model again
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)

    return write_whole(OUT / "float", make)


def quantized(scheme: str, head: str | None, block: int | None) -> tuple[str, list[str]]:
    """A name for edgeformer's files of a scheme, and the exporter's options."""
    parts = {"": ("--quantize", scheme), f"-{head}-head": ("--head", head), f"-block-{block}": ("--block", block)}
    chosen = {text: option for text, option in parts.items() if option[1] is not None}
    return scheme + "".join(chosen), [str(part) for option in chosen.values() for part in option]


def bundle(scheme: str, head: str | None = None, block: int | None = None) -> Path:
    """edgeformer's export: of the GGUF itself for "keep", else of its dequantized weights."""
    name, options = quantized(scheme, head, block)
    if (shared := ROOT / "out" / "smollm2" / name).is_dir():  # bench.smollm2 has made it
        return shared

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "edgeformer.export", str(gguf_path()), "-o", str(folder), *options]
        run(command, LOGS / f"edgeformer-{name}.log", OFFLINE, f"export {name}")

    return write_whole(OUT / "edgeformer" / name, make)


def gguf(environment: Environment, kind: str, source: Path | None = None, root: Path = OUT) -> Path:
    """`source`, by default SmolLM2's GGUF as it is ("Q4_1"), requantized by llama.cpp's own quantizer."""
    if kind == "Q4_1" and source is None:
        return gguf_path()
    source = source or gguf_path()
    script = (
        "import llama_cpp, sys\n"
        "p = llama_cpp.llama_model_quantize_default_params()\n"
        "p.ftype, p.allow_requantize, p.nthread = int(sys.argv[3]), True, 2\n"
        "if len(sys.argv) > 4: p.token_embedding_type = p.output_tensor_type = int(sys.argv[4])\n"
        "sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))\n"
    )
    # llama.h's LLAMA_FTYPE_MOSTLY_*, and ggml.h's type of the tied embedding and head where it is not the default: that
    # is Q8_0, or beside Q4_0 Q6_K where rows are multiples of 256
    types = {"Q4_0": ["2"], "Q4_0-head": ["2", "2"], "Q8_0": ["7"]}[kind]

    def make(file: Path) -> None:
        command = [str(environment.python), "-c", script, str(source), str(file), *types]
        run(command, LOGS / f"llama-{log_name(root, kind)}.log", {}, f"quantize {kind}")

    return write_whole(root / "llama.cpp" / f"{kind}.gguf", make)


def log_name(root: Path, name: str) -> str:
    return name if root == OUT else f"{root.name}-{name}"


def genai(
    environment: Environment,
    precision: str,
    options: tuple[str, ...],
    *,
    name: str,
    source: Path | None = None,
    root: Path = OUT,
) -> Path:
    """onnxruntime-genai's model builder, run with this environment's torch and transformers."""
    source = source or float_folder()

    def make(folder: Path) -> None:
        builder = environment.site_packages / "onnxruntime_genai" / "models" / "builder.py"
        command = [sys.executable, str(builder), "-i", str(source), "-o", str(folder), "-p", precision, "-e", "cpu"]
        command += ["-c", str(OUT / "cache"), "--extra_options", "hf_token=false", *options]
        run(command, LOGS / f"genai-{log_name(root, name)}.log", OFFLINE, f"model builder {name}")

    return write_whole(root / "onnxruntime-genai" / name, make)


def openvino(
    environment: Environment, options: tuple[str, ...], *, name: str, source: Path | None = None, root: Path = OUT
) -> Path:
    """optimum-intel's exporter, in an environment of its own: it needs torch and an older transformers."""
    source = source or float_folder()

    def make(folder: Path) -> None:
        command = [str(environment.folder / "bin" / "optimum-cli"), "export", "openvino", "--model", str(source)]
        command += ["--task", "text-generation-with-past", *options, str(folder)]
        run(command, LOGS / f"openvino-{log_name(root, name)}.log", OFFLINE, f"optimum-cli {name}")

    return write_whole(root / "openvino" / name, make)


def ctranslate2(environment: Environment, kind: str) -> Path:
    """CTranslate2's converter, run with this environment's torch and transformers."""
    source = float_folder()
    script = (
        "import sys\n"
        "sys.path.append(sys.argv[1])\n"
        "from ctranslate2.converters import TransformersConverter\n"
        "TransformersConverter(sys.argv[2]).convert(sys.argv[3], quantization=sys.argv[4])\n"
    )

    def make(folder: Path) -> None:
        command = [sys.executable, "-c", script, str(environment.site_packages), str(source), str(folder), kind]
        run(command, LOGS / f"ctranslate2-{kind}.log", OFFLINE, f"convert {kind}")

    return write_whole(OUT / "ctranslate2" / kind, make)


def bytes_a_token(path: Path) -> int:
    """Bytes of weights that one decoded token reads, all of them but embedding rows; the head counts once.

    Raises:
        SetupFailed: the file's format is none of the known ones.
    """
    if path.suffix == ".gguf":
        import gguf as library

        tensors = {t.name: int(t.n_bytes) for t in library.GGUFReader(path).tensors}
        return sum(tensors.values()) - (tensors["token_embd.weight"] if "output.weight" in tensors else 0)
    if (path / "edgeformer.json").exists():
        return _packed_bytes(path / "model.onnx")
    if (path / "genai_config.json").exists():
        return _onnx_bytes(path / "model.onnx")
    if (path / "openvino_model.bin").exists():
        return _openvino_bytes(path)
    if (path / "model.bin").exists():  # CTranslate2 stores a tied table once
        return (path / "model.bin").stat().st_size
    raise SetupFailed(f"{path} is no model file that is known here")


def _packed_bytes(path: Path) -> int:
    """What the native engine makes of a bundle: it packs scales and minima as float16, where the file has float32."""
    from edgeformer.engines.native.profile import Profile
    from edgeformer.engines.native.program.lowering import lower_bundle

    program, _ = lower_bundle(path)
    return sum(map(Profile(program).weight_bytes, program.ops))


def _onnx_bytes(path: Path) -> int:
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    sizes = {}
    for tensor in graph.initializer:
        held = {entry.key: entry.value for entry in tensor.external_data}
        sizes[tensor.name] = int(held["length"]) if "length" in held else len(tensor.raw_data)
    gathered = {i for n in graph.node if n.op_type.startswith("Gather") for i in n.input}
    others = {i for n in graph.node if not n.op_type.startswith("Gather") for i in n.input}
    return sum(size for name, size in sizes.items() if name in others or name not in gathered)


def _openvino_bytes(path: Path) -> int:
    """Constants of the IR; those that only a Gather's chain of Convert, Multiply, Subtract, Reshape reads are rows."""
    import xml.etree.ElementTree as ElementTree

    tree = ElementTree.parse(path / "openvino_model.xml")
    layers = {layer.get("id"): layer for layer in tree.iter("layer")}
    readers: dict[str, list[str]] = {}
    for edge in tree.iter("edge"):
        readers.setdefault(edge.get("from-layer") or "", []).append(edge.get("to-layer") or "")

    def only_rows(layer: str) -> bool:
        kinds = [(reader, layers[reader].get("type")) for reader in readers.get(layer, [])]
        chain = ("Convert", "Multiply", "Subtract", "Reshape")
        return bool(kinds) and all(k == "Gather" or (k in chain and only_rows(r)) for r, k in kinds)

    total = 0
    for number, layer in layers.items():
        data = layer.find("data")
        if layer.get("type") == "Const" and data is not None and not only_rows(number or ""):
            total += int(data.get("size", 0))
    return total


def file_bytes(path: Path) -> int:
    """Size on disk."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files)


def describe(path: Path) -> dict[str, int]:
    """Size on disk, and bytes a token reads."""
    return {"file_bytes": file_bytes(path), "token_bytes": bytes_a_token(path)}


def fingerprint(path: Path) -> str:
    """Names, sizes and times of a model's files: changes when the model is made again."""
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return json.dumps([[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files])
