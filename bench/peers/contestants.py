"""The contestants: each is one model file of one project, with the settings that the project recommends for a CPU.

A new peer is a row here and a runner in `runners/`. Settings that were slower are ALTERNATIVES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.peers import models
from bench.peers.environments import Environment

HERE = Environment("edgeformer")  # the interpreter that runs this
LLAMA = Environment(
    "llama.cpp",
    ("llama-cpp-python==0.3.36",),
    ("--no-binary", "llama-cpp-python"),
    {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
)
GENAI = Environment("onnxruntime-genai", ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0"))
OPENVINO = Environment("openvino", ("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"))
CTRANSLATE2 = Environment("ctranslate2", ("ctranslate2==4.8.5",))
OPENVINO_CONVERT = Environment(
    "openvino-convert",
    ("optimum-intel==2.2.0", "nncf==3.4.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0", "torch==2.13.0"),
    unwanted=("torchvision",),  # comes built for another torch where torch is the CPU build, and is not needed
)


@dataclass(frozen=True)
class Contestant:
    """One model file of one project."""

    project: str
    name: str  # name of the file in the tables
    runner: str  # module in runners/
    environment: Environment
    file: Callable[[], Path]  # makes it if it is not there
    settings: str  # for people: what was chosen
    options: dict[str, Any] = field(default_factory=dict)  # for the runner
    quality_file: Callable[[], Path] | None = None  # the same weights in a form that gives all logits
    needs: tuple[Environment, ...] = ()  # beside its own, to make the file
    size: str = ""  # of a model that is not SmolLM2-135M

    @property
    def key(self) -> str:
        return f"{self.project} {self.name}" + (f" ({self.size})" if self.size else "")


OPENVINO_INT4 = ("--weight-format", "int4", "--sym", "--group-size", "64", "--ratio", "1.0")
GENAI_INT4_HEAD = ("op_types_to_quantize=MatMul/Gather", "shared_embeddings=true")


def _genai(precision: str, options: tuple[str, ...], name: str) -> dict[str, Any]:
    # the pruned head computes the last position only, which is what a prompt needs; scoring needs them all
    return {
        "file": lambda: models.genai(GENAI, precision, (*options, "prune_lm_head=true"), name=name),
        "quality_file": lambda: models.genai(GENAI, precision, options, name=f"{name}-all-logits"),
    }


ALL = (
    Contestant(
        "edgeformer",
        "keep (the GGUF's blocks)",
        "with_edgeformer",
        HERE,
        lambda: models.bundle("keep"),
        "native engine, int8 cache",
    ),
    Contestant(
        "edgeformer",
        "q4, blocks of 64, q4 head",
        "with_edgeformer",
        HERE,
        lambda: models.bundle("q4", "q4", 64),
        "native engine, int8 cache; --block 64, as OpenVINO's groups",
    ),
    Contestant(
        "edgeformer",
        "keep, model.stream",
        "with_edgeformer",
        HERE,
        lambda: models.bundle("keep"),
        "the public Python loop, with sampling and detokenizing",
        {"loop": "stream"},
    ),
    *(
        Contestant(
            "llama.cpp",
            kind.replace("-", ", Q4_0 "),
            "with_llama",
            LLAMA,
            partial(models.gguf, LLAMA, kind),
            "built with GGML_NATIVE, repacking on, flash attention auto, ubatch 512",
        )
        for kind in ("Q4_1", "Q8_0", "Q4_0", "Q4_0-head")
    ),
    Contestant(
        "onnxruntime-genai",
        "int8",
        "with_genai",
        GENAI,
        **_genai("int8", (), "int8"),
        settings="model builder: block 32, accuracy level 4, last-token head (8 bits leave the embedding in float32)",
    ),
    Contestant(
        "onnxruntime-genai",
        "int4, int4 head",
        "with_genai",
        GENAI,
        **_genai("int4", GENAI_INT4_HEAD, "int4"),
        settings="model builder: block 32, accuracy level 4, shared int4 embedding, last-token head",
    ),
    Contestant(
        "OpenVINO GenAI",
        "int8",
        "with_openvino",
        OPENVINO,
        lambda: models.openvino(OPENVINO_CONVERT, ("--weight-format", "int8"), name="int8"),
        "optimum-cli int8; latency hint, u8 cache, dynamic quantization as the plugin sets it",
        needs=(OPENVINO_CONVERT,),
    ),
    Contestant(
        "OpenVINO GenAI",
        "int4",
        "with_openvino",
        OPENVINO,
        lambda: models.openvino(OPENVINO_CONVERT, OPENVINO_INT4, name="int4"),
        "optimum-cli int4, symmetric, group 64, int8 embedding and head; else as int8",
        needs=(OPENVINO_CONVERT,),
    ),
    Contestant(
        "CTranslate2",
        "int8",
        "with_ctranslate2",
        CTRANSLATE2,
        lambda: models.ctranslate2(CTRANSLATE2, "int8"),
        "converter int8; one worker, no cached prompt",
    ),
)


def _alternative(key: str, name: str, options: dict[str, Any], settings: str) -> Contestant:
    row = next(row for row in ALL if row.key == key)
    return replace(row, name=name, options=row.options | options, settings=settings)


# Other settings of the same projects, to check that the rows above have the best ones: --alternatives
ALTERNATIVES = (
    *(
        _alternative(f"llama.cpp {kind}", f"{kind}, {name}", options, settings)
        for kind in ("Q8_0", "Q4_0")
        for name, options, settings in (
            ("no flash attention", {"flash_attn": 0}, "flash attention off"),
            ("flash attention", {"flash_attn": 1}, "flash attention on"),
        )
    ),
    *(
        _alternative(f"OpenVINO GenAI {kind}", f"{kind}, SDPA", {"backend": "SDPA"}, "the pipeline's SDPA backend")
        for kind in ("int8", "int4")
    ),
    *(
        _alternative(
            f"OpenVINO GenAI {kind}",
            f"{kind}, no dynamic quantization",
            {"properties": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}},
            "activations stay float",
        )
        for kind in ("int8", "int4")
    ),
    *(
        _alternative(
            f"onnxruntime-genai {kind}",
            f"{kind}, no spinning",
            {"session": {"config_entries": {"session.intra_op.allow_spinning": "0"}}},
            "threads sleep between operations",
        )
        for kind in ("int8", "int4, int4 head")
    ),
    Contestant(
        "onnxruntime-genai",
        "int4 k_quant, int8 head",
        "with_genai",
        GENAI,
        **_genai("int4", ("algo_config=k_quant", "matmul_mixed_precision=last_matmul:int8"), "int4-k-quant"),
        settings="model builder: k_quant, int8 head",
    ),
)
