"""Model folders, complete and broken, each with the model whose tensors an export must have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Situation:
    """A source and its expected result."""

    name: str
    make: Callable[[Path], str]  # writes the source to a folder, returns its name
    model: Callable[[], torch.nn.Module] | None  # the module with the expected tensors; None: refused
    words: tuple[str, ...] = ()  # in the error message, or in edgeformer.json
    options: Mapping[str, Any] = field(default_factory=dict)


def llama(**more: Any) -> torch.nn.Module:
    return _made(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 2} | more))


def tied() -> torch.nn.Module:
    return llama(tie_word_embeddings=True)


def untied_by_values() -> torch.nn.Module:
    """The model of a config that ties the head and a file with another head."""
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.copy_(_other_head())
    return model


def bert(kind: str = "BertForSequenceClassification", **more: Any) -> torch.nn.Module:
    return _made(getattr(transformers, kind), transformers.BertConfig(**SIZES, num_labels=3, **more))


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return _made(transformers.GPT2LMHeadModel, config)


def mixtral() -> torch.nn.Module:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    return _made(transformers.MixtralForCausalLM, config)


def clip(kind: str = "CLIPModel") -> torch.nn.Module:
    side = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config={**side, "vocab_size": 64, "max_position_embeddings": 16, "projection_dim": 16, **ids},
        vision_config={**side, "image_size": 16, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    whole = _made(transformers.CLIPModel, config)
    if kind == "CLIPModel":
        return whole
    part = getattr(transformers, kind)(config.text_config)
    part.load_state_dict(whole.state_dict(), strict=False)
    return part


def _made(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():  # so that no tensor has its initial values
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def _other_head() -> torch.Tensor:
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(7))


def saved(model: Callable[[], Any], change: Callable[[State], State | None] | None = None, **config: Any) -> Any:
    """A function that writes the model's folder, with changed tensors and config."""

    def make(work: Path) -> str:
        model().save_pretrained(work / "model")
        if change is not None:
            state = load_file(work / "model" / WEIGHTS)
            state = change(state) or state
            state = {k: v.clone().contiguous() for k, v in state.items()}
            save_file(state, work / "model" / WEIGHTS, metadata={"format": "pt"})
        _config(work / "model", **config)
        return str(work / "model")

    return make


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edited(model: Callable[[], Any], edit: Callable[[Path], object], **save: Any) -> Any:
    """A function that writes the model's folder and applies `edit(folder)`."""

    def make(work: Path) -> str:
        model().save_pretrained(work / "model", **save)
        edit(work / "model")
        return str(work / "model")

    return make


def torch_file(change: Callable[[State], Any] = lambda state: state) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        torch.save(change(load_file(folder / WEIGHTS)), folder / "pytorch_model.bin")
        (folder / WEIGHTS).unlink()

    return edit


def _torch_shards(folder: Path) -> None:
    state = load_file(folder / WEIGHTS)
    names = sorted(state)
    parts = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def _edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / f"{WEIGHTS}.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def _cut(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate((folder / WEIGHTS).stat().st_size - 100)


def _renamed(pattern: str) -> Callable[[State], State]:
    return lambda state: {pattern.format(name): value for name, value in state.items()}


def _without(*parts: str) -> Callable[[State], State]:
    return lambda state: {n: v for n, v in state.items() if not any(part in n for part in parts)}


def _with(**tensors: torch.Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): value for name, value in tensors.items()}


def _as(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: llama().to(dtype)


def _poisoned(value: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    return change


class Code:  # an object in a pickle
    pass


SHARDS = {"max_shard_size": 20_000}
ONE, TWO = torch.ones(4), torch.ones(8, 8)


def situations() -> Iterator[Situation]:
    """Every situation of a model folder."""
    yield Situation("one .safetensors", saved(llama), llama)
    yield Situation("shards with an index", edited(llama, lambda _: None, **SHARDS), llama)
    yield Situation("pytorch_model.bin", edited(llama, torch_file()), llama)
    yield Situation("shards of pytorch_model.bin", edited(llama, _torch_shards), llama)
    for dtype in (torch.float16, torch.bfloat16):
        yield Situation(str(dtype).removeprefix("torch."), saved(_as(dtype)), lambda d=dtype: _as(d)().float())  # type: ignore[misc]
    for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "base_model.model.", "_fsdp_wrapped_module."):
        yield Situation(
            f"prefix {prefix}", saved(llama, _renamed(prefix + "{}")), llama, (prefix.split(".")[0], "stripped")
        )
    inside = lambda s: {n.replace(".layers.1.", ".layers.1._orig_mod."): v for n, v in s.items()}  # noqa: E731
    yield Situation("_orig_mod. inside of names", saved(llama, inside), llama, ("_orig_mod.", "stripped"))
    strange = lambda s: {(f"module.{n}" if "mlp" in n else n): v for n, v in s.items()}  # noqa: E731
    yield Situation("a prefix on some names", saved(llama, strange), None, ("module.", "DataParallel"))
    short = lambda s: {n.removeprefix("transformer."): v for n, v in s.items()}  # noqa: E731
    yield Situation("names of the base model", saved(gpt2, short), gpt2)
    yield Situation("experts, fused on load", saved(mixtral), mixtral)

    yield Situation("a missing head", saved(bert, _without("classifier")), None, ("classifier.bias", "no such head"))
    base = lambda: bert("BertModel")  # noqa: E731
    asked = {"architectures": ["BertForSequenceClassification"]}
    yield Situation("a base model for a task", saved(base, **asked), None, ("classifier.weight", "base model"))
    yield Situation(
        "a missing layer", saved(llama, _without(".layers.1.")), None, ("9 tensors", "layers.1.", "shard is missing")
    )
    yield Situation("a missing norm", saved(llama, _without("model.norm")), None, ("1 tensor", "model.norm.weight"))
    yield Situation("a missing output layer", saved(llama, _without("lm_head")), None, ("tie_word_embeddings",))
    yield Situation("no tensor at all", saved(llama, lambda _: {"x": ONE}), None, ("and 17 more", "another model"))
    yield Situation("another model", saved(llama, lambda _: load_other(gpt2)), None, ("another model",))
    yield Situation(
        "a missing tensor, allowed", saved(llama, _without("lm_head")), llama, ("lm_head.weight",),
        {"allow_missing": ("lm_head.*",)},
    )  # fmt: skip
    yield Situation(
        "an allowance that nothing needs", saved(llama), None, ("matches no tensor",), {"allow_missing": ("x.*",)}
    )

    yield Situation("a tied head, stored once", saved(tied), tied, ("lm_head.weight",))
    both = lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"]}  # noqa: E731
    yield Situation("a tied head, stored twice", saved(tied, both), tied)
    swap = lambda s: {n.replace("model.embed_tokens", "lm_head"): v for n, v in s.items()}  # noqa: E731
    yield Situation("a tied head, stored as the head", saved(tied, swap), tied)
    other = _with(lm_head__weight=_other_head())
    yield Situation("a config that ties, a head of its own", saved(tied, other), untied_by_values, ("untied",))
    yield Situation("a tied pair, both missing", saved(tied, _without("embed")), None, ("embed_tokens.weight",))

    yield Situation("a layer too many", saved(lambda: llama(num_hidden_layers=3), num_hidden_layers=2), None,
                    ("9 tensors of it are not used", "smaller model"))  # fmt: skip
    masked = lambda: bert("BertForMaskedLM")  # noqa: E731
    extra = _with(cls__seq_relationship__weight=torch.ones(2, 32))
    yield Situation("an unused head", saved(masked, extra), None, ("cls.seq_relationship.weight", "--allow-missing"))
    yield Situation(
        "an unused head, allowed", saved(masked, extra), masked, ("cls.seq_relationship.weight",),
        {"allow_missing": ("cls.seq_relationship.*",)},
    )  # fmt: skip
    masks = _with(transformer__h__0__attn__bias=torch.ones(1, 1, 64, 64))
    inverse = _with(model__layers__0__self_attn__rotary_emb__inv_freq=ONE)
    yield Situation("masks that the library ignores", saved(gpt2, masks), gpt2, ("attn.bias",))
    yield Situation("tables that the library ignores", saved(llama, inverse), llama, ("inv_freq",))
    positions = _with(bert__embeddings__position_ids=torch.arange(64)[None])
    yield Situation("positions that the library ignores", saved(bert, positions), bert, ("position_ids",))
    tower = "CLIPTextModelWithProjection"
    one = {"architecture": tower}
    yield Situation("one tower of two", saved(clip), lambda: clip(tower), ("vision_model",), one)
    more = _with(text_model__encoder__layers__2__mlp__fc1__bias=ONE)
    yield Situation("one tower, and a layer too many", saved(clip, more), None, ("encoder.layers.2.mlp.fc1.bias",), one)

    yield Situation("a smaller vocabulary", saved(llama, vocab_size=60), None, ("(64, 32), expected (60, 32)",))
    yield Situation("wider layers in config.json", saved(llama, hidden_size=64), None, ("another shape",))
    yield Situation(
        "a missing shard", edited(llama, lambda f: _second(f).unlink(), **SHARDS), None, ("-of-", "missing")
    )
    lose = _edit_index(lambda shards: shards.pop("model.norm.weight"))
    yield Situation("a tensor that the index lacks", edited(llama, lose, **SHARDS), None, ("model.norm.weight",))
    invent = _edit_index(lambda shards: shards.update({"model.more.weight": next(iter(shards.values()))}))
    yield Situation("a tensor that no shard has", edited(llama, invent, **SHARDS), None, ("model.more.weight",))
    leave = _edit_index(lambda shards: shards.update({"model.norm.weight": "../other.safetensors"}))
    yield Situation("a shard outside of the folder", edited(llama, leave, **SHARDS), None, ("../other", "beside"))
    stale = lambda f: (f / f"{WEIGHTS}.index.json").write_text("{}")  # noqa: E731
    yield Situation("one file and an index", edited(llama, stale), None, ("holds both",))
    yield Situation("a file cut short", edited(llama, _cut), None, (WEIGHTS, "cut short"))
    garbage = lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 8 + b"{")  # noqa: E731
    yield Situation("a header that is none", edited(llama, garbage), None, (WEIGHTS, "damaged"))
    yield Situation("no weights", edited(llama, lambda f: (f / WEIGHTS).unlink()), None, ("save_pretrained",))

    yield Situation(
        "a pickle with code", edited(llama, torch_file(lambda s: s | {"x": Code()})), None, ("Code", "torch.save")
    )
    yield Situation("an optimizer around it", edited(llama, torch_file(lambda s: {"model": s})), None, ("top level",))
    yield Situation("a .ckpt alone", edited(llama, lambda f: (f / WEIGHTS).rename(f / "x.ckpt")), None, ("x.ckpt",))
    lora = _with(model__layers__0__self_attn__q_proj__lora_A__weight=TWO)
    yield Situation("an adapter among the weights", saved(llama, lora), None, ("adapter", "merge_and_unload"))
    beside = lambda f: (f / "adapter_config.json").write_text("{}")  # noqa: E731
    yield Situation("an adapter beside the weights", edited(llama, beside), None, ("--adapter",))
    for method in ("bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors"):
        quantized = saved(llama, quantization_config={"quant_method": method})
        yield Situation(f"quantized by {method}", quantized, None, (method, "dequantize"))
    packed = _with(model__norm__qweight=TWO)
    yield Situation("quantized, and not said", saved(llama, packed), None, ("model.norm.qweight", "quantized weights"))
    eight = lambda s: s | {"model.layers.0.mlp.up_proj.weight": TWO.to(torch.int8)}  # noqa: E731
    yield Situation("int8 instead of floats", saved(llama, eight), None, ("up_proj.weight (int8)", "scale"))
    for value in (float("nan"), float("inf")):
        yield Situation(f"a weight that is {value}", saved(llama, _poisoned(value)), None, ("up_proj", "1 of 2,048"))

    for key, count in (("num_hidden_layers", 10**9), ("vocab_size", 10**12), ("hidden_size", 10**9)):
        yield Situation(f"{key} of {count:.0e}", saved(llama, **{key: count}), None, (f"{key} is {count:,}",))
    yield Situation(
        "num_hidden_layers of 5e+04", saved(llama, num_hidden_layers=50_000), None, ("describes a model of",)
    )
    labels = {"num_labels": 10**9}
    yield Situation("num_labels of 1e+09", saved(lambda: bert(), **labels), None, ("num_labels is",))


def load_other(model: Callable[[], Any]) -> State:
    return {name: value.clone() for name, value in model().state_dict().items()}


def _second(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def prepared(situation: Situation, work: Path) -> tuple[str, dict[str, Any]]:
    """(the source's name, the options of its export); writes its files to `work`."""
    name, options = situation.make(work), dict(situation.options)
    if "weights" in options:
        options["weights"] = options["weights"](work)
    return name, options
