"""Adapters of every kind are merged as PEFT means them, or refused by name; nothing in their folder is passed over.

The reference is the model that was in memory when the adapter was saved: PEFT's own, neither merged nor reloaded.
"""

from __future__ import annotations

import copy
import json
import sys

import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
tf = pytest.importorskip("transformers", reason="the toolchain needs transformers")
peft = pytest.importorskip("peft", reason="PEFT is the reference")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

from support.adapted import BOUND, off, rewrite, source_of

import edgeformer
from bench.sources import _adapters, adapters
from bench.sources._adapters import IDS, Try, base_folder, edit, load, logits, quiet, reload, train
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions, export
from edgeformer.export.sources.adapters import adapter_merge
from edgeformer.export.sources.adapters.adapter_folder import read_adapter
from edgeformer.export.sources.hub.hub import language_model
from edgeformer.export.sources.load import load_source

ODDITIES = {  # what is trained -> tries of the sweep that no other test has
    name: Try(kind=kind, **more)
    for name, kind, more in (
        ("IA3", "IA3", {"options": adapters.METHODS["IA3"]}),
        ("LoHa", "LOHA", {}),
        ("OFT", "OFT", {"options": adapters.METHODS["OFT"]}),
        ("VeRA", "VERA", {}),
        ("layer norms", "LN_TUNING", {"options": adapters.METHODS["LN_TUNING"]}),
        ("tokens", "TRAINABLE_TOKENS", {"options": adapters.METHODS["TRAINABLE_TOKENS"]}),
        ("experts", "LORA", {"options": {"target_parameters": ["mlp.experts.down_proj"]}, "base": "experts"}),
        ("biases of LoRA", "LORA", {"options": {"lora_bias": True}}),
        ("KaSA", "LORA", {"options": {"kasa_config": {}}}),
        ("PiSSA", "LORA", {"options": {"init_lora_weights": "pissa"}}),
        ("OLoRA", "LORA", {"options": {"init_lora_weights": "olora"}}),
        ("OLoRA, rank-stabilized", "LORA", {"options": {"init_lora_weights": "olora", "use_rslora": True}}),
        (
            "PiSSA of [in, out] layers", "LORA",
            {"options": {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True},
             "base": "conv1d"},
        ),
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The folder of the base models, made once."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture
def lora(tmp_path):
    """A trained LoRA of q and v, that a test may change."""
    return train(Try(), tmp_path, "adapter")


def test_every_setting_of_peft_is_tried_by_the_sweep():
    assert set(adapters.settings()) == set(adapters.tries())


@pytest.mark.parametrize("name", ODDITIES)
def test_what_peft_merges_gives_the_trained_model(name, work):
    trained = train(ODDITIES[name], work, name)
    assert off(logits(load(trained.base)), trained.logits) > 1e-3, "the adapter must change something"
    assert off(adapters.exported(trained), trained.logits) <= BOUND


@pytest.mark.parametrize(
    "kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT", "POLY", "LILY"]
)
def test_methods_that_change_no_weights_are_refused_by_name(kind, work):
    trained = train(Try(adapters.METHODS.get(kind, {}), kind=kind), work, kind)
    with pytest.raises(ExportError, match=f"is a {kind} adapter: it"):
        source_of(trained)


@pytest.mark.parametrize("init", ["pissa_niter_2", "corda", "lora_ga", "loftq"])
def test_a_base_that_cannot_be_changed_again_is_refused_with_a_way_out(init, lora):
    edit(lora.folder, {"init_lora_weights": init})
    with pytest.raises(ExportError, match=rf"init_lora_weights = '{init}'.*path_initial_model_for_weight_conversion"):
        source_of(lora)


def test_that_refusal_is_needed(work):
    """LoRA-GA changes the base by gradients; PEFT's reload silently omits the change."""
    base = load(base_folder("llama", work))
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig()
    )
    with quiet():
        ids = torch.tensor([IDS])
        peft.tuners.lora.preprocess_loraga(base, config, lambda: base(ids, labels=ids).loss.backward())
        model = peft.get_peft_model(base, config).eval()
        found = logits(model)
        model.save_pretrained(work / "lora-ga")
    trained = _adapters.Trained(base_folder("llama", work), work / "lora-ga", found)
    assert off(reload(trained, 0), trained.logits) > 10 * BOUND
    with pytest.raises(ExportError, match="depends on gradients"):
        source_of(trained)


def test_an_unknown_initialization_may_not_change_the_base(lora, monkeypatch, tmp_path):
    trained = train(Try({"init_lora_weights": "olora"}), tmp_path, "olora")
    monkeypatch.setattr(adapter_merge, "_REPEATABLE", ())
    with pytest.raises(
        ExportError, match=r"changes 4 weights of the base.*not known to repeat \(init_lora_weights = .olora"
    ):
        source_of(trained)
    assert off(adapters.exported(lora), lora.logits) <= BOUND


def test_a_converted_pissa_adapter_is_a_plain_one(work):
    with quiet():
        config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj"], init_lora_weights="pissa")
        model = peft.get_peft_model(load(base_folder("llama", work)), config).eval()
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(work / "initial")
        model.peft_config["default"].init_lora_weights = "pissa"
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        found = logits(model)
        model.save_pretrained(work / "converted", path_initial_model_for_weight_conversion=str(work / "initial"))
    trained = _adapters.Trained(base_folder("llama", work), work / "converted", found)
    source = source_of(trained)
    assert not source.notes and source.adapter["settings"]["r"] == 6
    assert off(logits(source.module), found) <= BOUND


def test_eva_changes_no_base(work):
    """Its data-driven A and ranks are in the file and the config."""
    with quiet():
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)
        )
        model = peft.get_peft_model(load(base_folder("llama", work)), config).eval()
        torch.manual_seed(0)
        batches = [{"input_ids": torch.randint(1, 64, (4, 16))} for _ in range(12)]
        peft.initialize_lora_eva_weights(model, batches, show_progress_bar=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        found = logits(model)
        model.save_pretrained(work / "eva")
    assert off(adapters.exported(_adapters.Trained(base_folder("llama", work), work / "eva", found)), found) <= BOUND


def test_a_changed_base_is_noted_in_the_manifest(work, tmp_path):
    trained = train(Try({"init_lora_weights": "pissa"}), work, "told")
    options = ExportOptions(str(trained.base), tmp_path / "b", adapter=trained.folder, quantize="none", tokens=0)
    manifest = export(options)
    assert any("'pissa' changes 4 weights" in note for note in manifest["notes"])
    found = manifest["provenance"]["adapter"]
    assert (found["name"], found["method"], found["base"]) == ("told", "LoRA", str(trained.base))
    assert found["settings"]["init_lora_weights"] == "pissa" and found["settings"]["r"] == 4
    assert off(edgeformer.load(tmp_path / "b", engine="cpu").logits(IDS), trained.logits) <= 1e-4


def test_replicated_layers_make_a_deeper_bundle(work, tmp_path):
    trained = train(Try({"layer_replication": [[0, 2], [0, 2]]}), work, "deep")
    export(ExportOptions(str(trained.base), tmp_path / "b", adapter=trained.folder, quantize="none", tokens=0))
    model = edgeformer.load(tmp_path / "b", engine="cpu")
    assert off(model.logits(IDS), trained.logits) <= 1e-4
    assert json.loads((tmp_path / "b/config.json").read_text())["num_hidden_layers"] == 4


# ------------------------------------------------------------------------------------------- what does not belong


def test_merged_and_unmerged_model_are_compared(work):
    """PVeRA may sample at inference, which merged weights cannot do."""
    trained = train(Try({"sample_at_inference": True}, kind="PVERA"), work, "sampling")
    with pytest.raises(ExportError, match=r"PEFT's merged model differs from its unmerged one.*sample_at_inference"):
        source_of(trained)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGE = {  # tensors to change (None: to remove), part of the message
    "not a number": ({f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)}, "NaN or infinity in 1 of 8"),
    "half a pair": ({f"{Q}.lora_B.weight": None}, r"has not 1 tensor \(.*lora_B.*\) that its adapter_config"),
    "another layer": ({f"{Q}x.lora_A.weight": torch.ones(4, 32)}, r"1 tensor \(.*q_projx.*\) that Llama.* has no p"),
    "another rank": ({f"{Q}.lora_A.weight": torch.ones(3, 32)}, r"size mismatch.*\[3, 32\].*\[4, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_adapter_is_refused_with_what_is_wrong(case, lora):
    changes, message = DAMAGE[case]
    rewrite(lora.folder, lambda tensors: [tensors.pop(n, None) for n in changes])
    rewrite(lora.folder, lambda tensors: tensors.update({n: v for n, v in changes.items() if v is not None}))
    with pytest.raises(ExportError, match=message):
        source_of(lora)


def test_an_empty_adapter_is_refused(lora):
    rewrite(lora.folder, lambda tensors: tensors.clear())
    with pytest.raises(ExportError, match="has no tensors"):
        source_of(lora)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"new_magic": 3}, r"new_magic = 3, which PEFT .* does not know.*update peft"),
        ({"peft_type": "NEWER"}, "NEWER adapter, which PEFT .* does not know"),
        ({"rank_pattern": {"q_proj": 2}}, "size mismatch"),
        ({"target_modules": ["nowhere"]}, "not found in the base model"),
        ({"modules_to_save": ["lm_head"]}, "it has no 'base_model.model.lm_head.weight'"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens = .* cannot be merged"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config = .* cannot be merged"),
        ({"megatron_config": {"a": 1}}, "megatron_config = .* cannot be merged"),
        ({"peft_type": None}, "names no peft_type"),
    ],
)
def test_unsupported_settings_are_refused_by_name(settings, message, lora):
    edit(lora.folder, settings)
    with pytest.raises(ExportError, match=message):
        source_of(lora)


def test_an_unknown_setting_that_is_off_changes_nothing(lora):
    edit(lora.folder, {"new_magic": None, "other": False, "more": {}})
    assert off(adapters.exported(lora), lora.logits) <= BOUND


def test_pickled_tensors_are_read_and_pickled_code_is_not(lora):
    from safetensors.torch import load_file

    file = lora.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, lora.folder / "adapter_model.bin")
    assert off(adapters.exported(lora), lora.logits) <= BOUND
    torch.save({"a": copy.deepcopy}, lora.folder / "adapter_model.bin")
    with pytest.raises(ExportError, match=r"adapter_model\.bin cannot be read: Weights only"):
        source_of(lora)


def test_folders_that_are_no_adapter_are_refused(lora, tmp_path):
    with pytest.raises(ExportError, match="there is no adapter folder"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(ExportError, match=r"no adapter_config\.json. Its subfolders adapter have adapters"):
        read_adapter(tmp_path)
    (lora.folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"no adapter_model\.safetensors or adapter_model\.bin"):
        read_adapter(lora.folder)
    (lora.folder / "adapter_config.json").write_text("{")
    with pytest.raises(ExportError, match="is not JSON"):
        read_adapter(lora.folder)


def test_without_peft_the_error_says_how_to_get_it(lora, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExportError, match=r"merged by PEFT.*pip install '?peft"):
        source_of(lora)


def test_an_adapter_for_a_model_that_is_loaded_already_is_refused(lora):
    """Only a source that the exporter loads gets its adapter."""
    options = ExportOptions("mine", lora.folder / "none", adapter=lora.folder)
    with quiet(), pytest.raises(ExportError, match=r"merges it into a model that it loads.*merge_and_unload"):
        export(options, traced=language_model(load(lora.base), "mine"))


def test_an_adapter_as_the_source_is_refused(lora):
    with pytest.raises(ExportError, match=r"is a PEFT adapter: name its base model as the source: .*base-llama"):
        load_source(ExportOptions(str(lora.folder), lora.folder / "none"))


def test_a_folder_of_model_and_adapter_is_refused(lora, tmp_path):
    """transformers would load the adapter's base, not the model in the folder."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (lora.base / name).write_bytes((lora.folder / name).read_bytes())
    with pytest.raises(ExportError, match="holds a model and a PEFT adapter"):
        load_source(ExportOptions(str(lora.base), tmp_path / "none"))
