"""Which of transformers' causal language models make the road: `python -m bench.coverage`.

Each architecture is built tiny and random from its own config class, exported in float and in q4, run from the bundle
on every engine, and compared with transformers' own logits and greedy tokens. One subprocess a model, with a time
limit; results are kept in a JSON, so that a run cut short goes on where it stopped. `docs/coverage.md` is written last.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
ENGINES = ("cpu", "native")
PROMPTS = ([3, 17, 33, 90, 5], [3, 110, 7, 7, 7, 64, 12, 9, 41])
TOKENS = 10
LARGEST = 120_000_000  # parameters
FLOAT_TOLERANCE = 1e-4  # of the logits' range
NATIVE_TOLERANCE = 5e-2  # int8 activations and cache: what quantized arithmetic costs, not a graph's fault
Q4_TOLERANCE = 0.5

# What every config is shrunk to, by its own names of fields.
SIZES: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "emb_dim": 64, "hidden_dim": 64,
    "n_embed": 64, "embedding_size": 64, "word_embed_proj_dim": 64, "input_embedding_size": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "d_kv": 16, "attention_head_dim": 16, "d_head": 16,
    "global_head_dim": 16, "num_global_key_value_heads": 2, "kv_channels": 16,
    "swa_head_dim": 16, "swa_v_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "intermediate_size": 96, "ffn_dim": 96, "d_ff": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "n_inner": 96,
    "ffn_hidden_size": 96, "d_inner": 96, "dim_ff": 96, "dff": 96, "intermediate_size_mlp": 96,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "moe_ffn_hidden_size": 32, "shared_intermediate_size": 32, "dense_intermediate_size": 96,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_top_k": 2, "moe_k": 2, "top_k_experts": 2, "num_experts_per_token": 2, "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "zero_expert_num": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32,
    "v_head_dim": 16, "o_lora_rank": 32, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64,
    "max_position_embeddings": 96, "n_positions": 96, "max_seq_len": 96, "n_ctx": 96, "max_sequence_length": 96,
    "seq_length": 96, "max_target_positions": 96,
    "sliding_window": 6, "attention_chunk_size": 6, "attention_window": 6, "sliding_window_size": 6, "window_size": 6,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "sep_token_id": 2,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0,
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 120, "num_kv_shared_layers": 0,
    "image_size": 32, "patch_size": 8, "unpadded_vocab_size": 120,
    "laurel_rank": 8, "type_vocab_size": 1, "rotary_dim": 8, "max_window_layers": 1,
}  # fmt: skip

INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
# Where the fields of one config depend on each other in a way that their names do not say.
OVERRIDES: dict[str, dict[str, Any]] = {
    "xglm": {"attention_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mpt": {"expansion_ratio": 2},
    "reformer": {"axial_pos_shape": [8, 12], "axial_pos_embds_dim": [32, 32]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16, "moe_topk": [2, 2], "num_experts": 4},
    "ministral": {"head_dim": 16}, "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "roc_bert": {"pronunciation_vocab_size": 30, "shape_vocab_size": 30},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "mamba2": {"num_heads": 8, "head_dim": 16}, "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "blt": {
        "encoder_hash_byte_group_vocab": 200, "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "zamba": {"layer_types": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "moshi": {"audio_vocab_size": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
            "full_attention": None,
        },
    },
    "qwen4_exp_text": INDEXER, "qwen4_exp": {"text_config": INDEXER},
    "dory": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "inkling2_loop_text": {
        "loop_layer_index_start": 1, "loop_layer_index_end": 2, "n_layers_per_attn_res_block": 1,
    },
}  # fmt: skip


def names() -> list[str]:
    """All model types that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(name: str) -> Any:
    """A model of this type with seeded random weights, large enough for every part to show in the logits."""
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    torch.manual_seed(0)
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    class_name = named if isinstance(named, str) else named[0]
    config = _config(transformers.CONFIG_MAPPING[name], OVERRIDES.get(name, {}))
    cls = getattr(transformers, class_name)
    if config.__class__ is not cls.config_class:  # the language model is a part of it
        parts = (getattr(config, part, None) for part in getattr(config, "sub_configs", ()))
        config = next((part for part in parts if isinstance(part, cls.config_class)), config)
    with torch.device("meta"):
        count = sum(p.numel() for p in cls._from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"the config is still {count:,} parameters large after shrinking")
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.nan_to_num(parameter, 0.0, 0.0, 0.0).clamp(-3, 3))
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def _peek(config: Any, field: str) -> Any:
    """The field's value; some configs raise where it differs from layer to layer, and then it is set for all."""
    try:
        return getattr(config, field, None)
    except Exception:
        return 0


def _config(config_class: Any, overrides: dict[str, Any]) -> Any:
    default = config_class()
    parts = getattr(default, "sub_configs", None) or {}
    chosen: dict[str, Any] = {}
    known = set(default.to_dict()) | set(inspect.signature(config_class.__init__).parameters)
    known |= set(getattr(default, "attribute_map", {}))
    for field, value in SIZES.items():
        before = _peek(default, field)
        if field in known and before is not None and not isinstance(before, (list, dict, bool)):
            chosen[field] = value
    if (_peek(default, "num_key_value_heads") or 0) == _peek(default, "num_attention_heads"):
        chosen["num_key_value_heads"] = 4
    if _peek(default, "num_key_value_heads") == 1:
        chosen["num_key_value_heads"] = 1
    if "is_decoder" in known or not getattr(default, "is_encoder_decoder", False):
        chosen["is_decoder"] = True
    kinds = getattr(default, "layer_types", None)
    fields = ("layer_types", "layers_block_type")
    derived = any(isinstance(inspect.getattr_static(config_class, name, None), property) for name in fields)
    if isinstance(kinds, list) and kinds and not derived:
        unique = list(dict.fromkeys(kinds))
        chosen["layer_types"] = unique if len(unique) > 1 else unique * 2
        chosen["num_hidden_layers"] = len(chosen["layer_types"])
        mlp = getattr(default, "mlp_layer_types", None)
        if isinstance(mlp, list) and mlp:
            both = list(dict.fromkeys(mlp))
            chosen["mlp_layer_types"] = [both[min(i, len(both) - 1)] for i in range(chosen["num_hidden_layers"])]
    for part, part_class in parts.items():
        value = getattr(default, part, None)
        if hasattr(value, "model_type"):  # what the default holds, where the class only says "any config"
            part_class = part_class if hasattr(part_class, "model_type") else type(value)
            chosen[part] = _config(part_class, overrides.get(part, {})).to_dict()
    overrides = {field: value for field, value in overrides.items() if field not in parts}
    chosen |= overrides
    # Fields that the signature or the defaults know; what is left is set as given, as `from_dict` would.
    return config_class(**chosen)


def examine(name: str) -> dict[str, Any]:
    """One row: {status, engines: {cpu, native}, cause, seconds}."""
    import numpy as np
    import torch
    from transformers import GenerationConfig

    torch.set_num_threads(1)
    row: dict[str, Any] = {"engines": {}, "stage": "build"}
    try:
        model = tiny(name)
        row["class"], row["parameters"] = type(model).__name__, sum(p.numel() for p in model.parameters())
        row["stage"] = "run in transformers"
        model.generation_config = GenerationConfig()  # no forced or suppressed tokens: the plain greedy path
        expected, greedy = [], []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                expected.append(model(ids, use_cache=False).logits[0].numpy())
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, use_cache=True,
                    eos_token_id=None, pad_token_id=0,
                )  # fmt: skip
            greedy.append(_plain_greedy(torch, model, prompt))
            # Where transformers feeds generate() other positions than forward counts, the forward is the truth.
            row["generate_differs"] = row.get("generate_differs", False) or out[0, len(prompt) :].tolist() != greedy[-1]
        row["stage"] = "export"

        import edgeformer
        from edgeformer.errors import EngineUnavailable
        from edgeformer.export import ExportOptions, export
        from edgeformer.export.hub import language_model
        from edgeformer.export.pipeline import float_graph

        traced = float_graph(language_model(model, f"tiny {name}"))
        row["layers"] = traced.layers
        for scheme, tolerance in (("none", FLOAT_TOLERANCE), ("q4", Q4_TOLERANCE)):
            row["stage"] = "export" if scheme == "none" else "q4"
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "bundle"
                manifest = export(ExportOptions(name, path, quantize=scheme, tokens=0), traced=traced)
                row[f"parity_{scheme}"] = (manifest["parity"]["dequantized"] or manifest["parity"]["float"])["worst"]
                for engine in ENGINES:
                    key = f"{engine} {'f32' if scheme == 'none' else scheme}"
                    try:
                        loaded = edgeformer.load(path, engine=engine, threads=1, kv="float32")
                    except EngineUnavailable as error:
                        row["engines"][key] = f"no: {error}"
                        continue
                    except Exception as error:
                        row["engines"][key] = f"fails to load: {_told(error)}"
                        continue
                    allowed = tolerance if engine == "cpu" else max(tolerance, NATIVE_TOLERANCE)
                    try:
                        row["engines"][key] = _compare(np, loaded, expected, greedy, allowed, scheme == "none")
                    except Exception as error:
                        row["engines"][key] = f"fails: {_told(error)}"
        row["stage"] = "done"
    except Exception as error:
        row["cause"] = _told(error)
        row["trace"] = "".join(traceback.format_exc(limit=-4))[-1500:]  # for who mends it; not written to the page
    row["status"] = "works" if row["engines"].get("cpu f32") == "ok" and row["engines"].get("cpu q4") == "ok" else "no"
    return row


def _plain_greedy(torch: Any, model: Any, prompt: Any) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def _compare(np: Any, loaded: Any, expected: Any, greedy: Any, tolerance: float, exact: bool) -> str:
    for prompt, reference, tokens in zip(PROMPTS, expected, greedy, strict=True):
        found = loaded.logits(prompt)
        span = float(reference.max() - reference.min())
        worst = float(np.abs(found - reference).max()) / span
        if not worst <= tolerance:
            return f"logits off by {worst:.1e} of their range"
        ids = loaded.generate(prompt, max_new_tokens=len(tokens), ignore_eos=True).ids
        if exact and ids != tokens and tolerance < 1e-3:
            return f"tokens {ids} instead of {tokens}"
    return "ok"


def _told(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"/\S*/site-packages/", "", f"{type(error).__name__}: {(lines or [''])[0][:400]}")


def _worker(name: str, pipe: Any) -> None:
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    pipe.send(examine(name))


def sweep(chosen: list[str], results: Path, limit: float, redo: str) -> dict[str, Any]:
    """Examines each name that has no result yet; writes the results after each one."""
    import torch
    import transformers  # noqa: F401
    from tqdm import tqdm

    import edgeformer.export.pipeline  # noqa: F401  loaded once: the subprocesses are forks of this one

    torch.set_num_threads(1)
    rows: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {}
    todo = [n for n in chosen if n not in rows or redo == "all" or (redo == "failed" and rows[n]["status"] != "works")]
    context = multiprocessing.get_context("fork")
    for name in (bar := tqdm(todo, unit="model")):
        works = sum(row["status"] == "works" for row in rows.values())
        bar.set_postfix_str(f"{name}, {works} work")
        start = time.monotonic()
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(name, there))
        process.start()
        there.close()
        try:
            row = (
                here.recv()
                if here.poll(limit)
                else {"status": "no", "cause": f"not done in {limit:.0f} s", "engines": {}}
            )
        except EOFError:
            row = {"status": "no", "cause": "the process died", "engines": {}}
        process.kill()
        process.join()
        rows[name] = row | {"seconds": round(time.monotonic() - start, 1)}
        results.parent.mkdir(exist_ok=True)
        kept = {n: {k: v for k, v in r.items() if k != "trace" or results != RESULTS} for n, r in rows.items()}
        results.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    return rows


CAUSES = (  # words of a row's cause -> what stands in the way; the first that fits
    (r"recurrent or convolution|LinearAttention layers|MiniMax uses cache of its own|matC_old",
     "keeps a recurrent or convolution state (state-space, linear attention): no key-value cache can hold it"),
    (r"index or compressed blocks", "selects its keys by a cached index or compresses them: no standard operator"),
    (r"does not run with a plain key-value cache", "keeps more than keys and values from step to step"),
    (r"s_aux", "attention sinks without a mask"),
    (r"No decompositions registered for the complex", "computes its rotary embedding with complex numbers"),
    (r"data-dependent|branches on the values", "chooses its experts or layers by a Python branch on values"),
    (r"was frozen at", "uses the length as a Python number: a scan over the text, or a table of one length"),
    (r"requires the timm library", "not examined: its picture tower needs the package timm"),
    (r"shared_kv_states|hidden_size_per_layer_input must be 0",
     "drafts for another model, whose keys and values it reads: it has no input of its own"),
    (r"shape '\[-1, 4, 5\]' is invalid", "reads the codes of several codebooks at once, not one sequence of token ids"),
)  # fmt: skip


def why(row: dict[str, Any]) -> str:
    """The cause in plain words, with the message it comes from where none fits."""
    cause = row.get("cause") or next((v for k, v in row["engines"].items() if k.startswith("cpu") and v != "ok"), "")
    for words, told in CAUSES:
        if re.search(words, cause):
            return told
    if row.get("stage") in ("build", "run in transformers"):
        return f"not examined: its config alone gives no tiny model that transformers itself can run ({cause[:80]})"
    return cause


def page(rows: dict[str, Any]) -> str:
    """docs/coverage.md"""
    import transformers

    works = [name for name, row in rows.items() if row["status"] == "works"]
    native = [name for name in works if all(rows[name]["engines"].get(f"native {s}") == "ok" for s in ("f32", "q4"))]
    lines = [
        "# Coverage of transformers' causal language models",
        "",
        "Written by `python -m bench.coverage`; do not edit. Each architecture is built tiny and random from its own",
        "config class, exported in float and in q4, and run from the bundle. **Works** means: on the CPU engine the",
        "float logits equal PyTorch's to 1e-4 of their range and ten greedy tokens are the same ones; the q4 bundle",
        "passed the gate with the same dequantized weights. The native engine computes with int8 activations, so its",
        "logits are compared to 5e-2. No line of the exporter names an architecture.",
        "",
        f"transformers {transformers.__version__}: **{len(works)} of {len(rows)} work on `cpu`, "
        f"{len(native)} of them on `native` too.**",
        "",
        "| model type | class | cpu | native | remark |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(rows):
        row = rows[name]
        fits = "yes" if name in works else "no"
        fast = "yes" if name in native else "no"
        remark = why(row) if name not in works else ""
        if name in works and name not in native:
            remark = next(v for k, v in row["engines"].items() if k.startswith("native") and v != "ok")
            remark = remark.removeprefix("no: ").split(". Run this")[0]
        if row.get("generate_differs"):
            remark = f"{remark}; transformers' generate() feeds other positions than its forward".strip("; ")
        if name in works and not row.get("layers"):
            remark = f"without a cache; {remark}".strip("; ")
        lines.append(f"| {name} | {row.get('class', '')} | {fits} | {fast} | {remark.replace('|', '/')[:220]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="model types; all by default")
    parser.add_argument("--limit", type=float, default=240, help="seconds for one model")
    parser.add_argument("--redo", choices=("none", "failed", "all"), default="none", help="examine these again")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = sweep(options.names or names(), options.results, options.limit, options.redo)
    if options.results == RESULTS:
        PAGE.write_text(page(rows), encoding="utf-8")
    for name in options.names:
        print(name, json.dumps({k: v for k, v in rows[name].items() if k != "trace"}, indent=1))
    works = sum(row["status"] == "works" for row in rows.values())
    print(f"{works} of {len(rows)} work")


if __name__ == "__main__":
    main()
