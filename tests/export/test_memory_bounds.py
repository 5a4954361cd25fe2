"""An export reports the memory it needs, refuses what does not fit, and a source cannot make it allocate more."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
transformers = pytest.importorskip("transformers", reason="the toolchain needs transformers")

from bench.sources._hub_checkpoints import bert, llama, saved, torch_file
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions
from edgeformer.export.sizes import parse_size, shown
from edgeformer.export.sources import memory_bounds as bounds
from edgeformer.export.sources.load import load_source

OWN = """
from torch import nn

def make():
    return nn.Linear(8, 16)
"""


class Recorded:
    """A progress that records its stages."""

    def __init__(self):
        self.stages = []

    def stage(self, text):
        self.stages.append(text)

    def track(self, items, name):
        return items


def test_the_need_is_reported_before_the_weights_are_loaded(tmp_path, monkeypatch):
    name, progress = saved(llama)(tmp_path), Recorded()
    loads = []
    original = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: (loads.append(list(progress.stages)), original(*a, **k))[1],
    )
    load_source(ExportOptions(name, tmp_path / "b"), progress)
    parameters = sum(parameter.numel() for parameter in llama().parameters())
    assert len(loads) == 1
    assert loads[0] == [f"needs for {bounds.need_of(parameters)}"]
    assert f"{parameters:,} parameters" in loads[0][0]


@pytest.mark.parametrize("kind", ["folder", "factory", "gguf"])
def test_more_memory_than_the_limit_is_refused(kind, tmp_path):
    if kind == "folder":
        name, more = saved(llama)(tmp_path), {}
    elif kind == "factory":
        (tmp_path / "own.py").write_text(OWN)
        name, more = f"{tmp_path / 'own.py'}:make", {"input": ("input=float32[batch,8]",)}
    else:
        name, more = str(gguf_file(tmp_path)), {}
    with pytest.raises(ExportError, match=r"needs about 7\d\d.\d MiB of memory; --memory-limit allows 100.0 MiB"):
        load_source(ExportOptions(name, tmp_path / "b", memory_limit="100M", **more))
    load_source(ExportOptions(name, tmp_path / "b", memory_limit="2G", **more))


def test_more_memory_or_disk_than_the_machine_has_is_refused(tmp_path):
    with pytest.raises(ExportError, match="this machine has"):
        bounds.require_room(10**13, tmp_path / "b", None, Recorded())
    with pytest.raises(ExportError, match=r"of disk at .* free; "):
        bounds.require_room(10**13, tmp_path / "b", 10**15, Recorded())


@pytest.mark.parametrize(
    ("text", "size"),
    [("6G", 6 << 30), ("500M", 500 << 20), ("2.5GiB", 5 << 29), ("1 kb", 1024), ("123", 123), (7, 7), (None, None)],
)
def test_a_size_reads_as_people_write_it(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1G", "0", "1e9", "6 gallons"])
def test_a_text_that_is_no_size_is_refused(text):
    with pytest.raises(ExportError, match="write 6G, 500M"):
        ExportOptions("x", "b", memory_limit=text)


def test_sizes_are_shown_for_people():
    assert [shown(size) for size in (5, 2048, 3 << 20, 5 << 29, 1 << 42)] == [
        "5 bytes", "2.0 KiB", "3.0 MiB", "2.5 GiB", "4.0 TiB"
    ]  # fmt: skip


HOSTILE = """
import resource, sys
from edgeformer.export import ExportOptions
from edgeformer.export.sources.load import load_source
from edgeformer.errors import ExportError
import transformers, torch, transformers.models.llama.modeling_llama, transformers.models.bert.modeling_bert
import torch._dynamo

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for source in sys.argv[1:]:
    try:
        load_source(ExportOptions(source, "b"))
        print("loaded", source)
    except ExportError as error:
        print("refused")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_hostile_source_makes_nothing_grow(tmp_path):
    """Measured in a separate process: its peak memory may grow by far less than what the sources claim."""
    sources = []

    def hostile(maker):
        folder = tmp_path / str(len(sources))
        folder.mkdir()
        sources.append(maker(folder))

    for claim in (
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 60_000},
        {"vocab_size": 10**11},
        {"hidden_size": 10**8, "num_attention_heads": 4},
        {"intermediate_size": 10**10},
        {"num_key_value_heads": 10**9},
        {"head_dim": 10**9},
    ):
        hostile(saved(llama, **claim))
    hostile(saved(bert, num_labels=10**9))
    hostile(saved(bert, max_position_embeddings=10**11))
    hostile(saved(bert, type_vocab_size=10**11))
    # A view of one number that claims 10**10 of them.
    view = torch.ones(1).expand(10**5, 10**5)
    hostile(lambda folder: claimed(folder, lambda state: state | {"lm_head.weight": view}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, *sources], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *outcomes, grown = done.stdout.split("\n")[:-1]
    assert outcomes == ["refused"] * len(sources)
    # KiB. The guard stops at 16 MiB of numbers that are never allocated, and at 4,096 tensors of Python objects, some
    # 5 KiB each with their module: 20 MiB. The rest is what the libraries import when they are first used.
    assert int(grown) < 300 << 10


@pytest.mark.parametrize("claim", [{"num_hidden_layers": 60_000}, {"vocab_size": 10**10}])
def test_a_checkpoint_of_the_trainer_is_bounded_too(claim, tmp_path):
    from safetensors.torch import save_file

    from edgeformer.models.checkpoint import stored_tensors
    from edgeformer.models.decoder import CausalLM, DecoderConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    module = CausalLM(config := DecoderConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    save_file({n: v.detach().clone() for n, v in stored_tensors(module).items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    load_source(ExportOptions(str(tmp_path), tmp_path / "b"))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | claim))
    with pytest.raises(ExportError, match="describes a model of more than"):
        load_source(ExportOptions(str(tmp_path), tmp_path / "b"))


def claimed(folder, change):
    name = saved(llama)(folder)
    torch_file(change)(folder / "model")
    return name


def test_a_large_but_plausible_config_is_accepted(tmp_path):
    """Long contexts, large rotary bases and many token ids size no weights."""
    name = saved(llama, max_position_embeddings=10**7, rope_theta=5 * 10**8, pad_token_id=63, sliding_window=10**9)
    load_source(ExportOptions(name(tmp_path), tmp_path / "b"))


def test_only_tensors_of_the_same_thread_are_counted():
    with bounds.construction(10, 1, "it"), torch.device("meta"):
        torch.nn.Linear(8, 16)
        with pytest.raises(ExportError, match="it describes a model of more than"):
            torch.nn.Linear(4096, 4096)
    with bounds.construction(10, 1, "it"):
        torch.nn.Linear(2048, 2500)  # not on the meta device: real weights that a loader puts in
    with torch.device("meta"):
        torch.nn.Linear(4096, 4096)  # the guard is gone


def test_the_manifest_records_the_allowed_missing_tensors(tmp_path):
    from edgeformer.export import export

    name = saved(bert, lambda state: {n: v for n, v in state.items() if "classifier" not in n})(tmp_path)
    options = ExportOptions(
        name, tmp_path / "b", quantize="none", tokens=0, allow_missing=("classifier.*",), memory_limit="64G"
    )
    manifest = export(options)
    assert manifest == json.loads((tmp_path / "b" / "edgeformer.json").read_text()) | {"files": manifest["files"]}
    assert manifest["completeness"]["missing"] == ["classifier.bias", "classifier.weight"]
    assert manifest["completeness"]["allowed"] == ["classifier.*"]
    assert "classifier" in manifest["provenance"]["recipe"]["allow_missing"]


def test_the_command_line_and_a_recipe_take_the_options(tmp_path):
    from typer.testing import CliRunner

    from edgeformer.export.__main__ import app
    from edgeformer.export.options import read_recipe

    name = saved(llama, lambda state: {n: v for n, v in state.items() if "lm_head" not in n})(tmp_path)
    (tmp_path / "r.toml").write_text(f'source = "{name}"\nallow_missing = ["lm_head.*"]\nmemory_limit = "1G"\n')
    recipe = read_recipe(tmp_path / "r.toml")
    assert (recipe.allow_missing, recipe.memory_limit) == (("lm_head.*",), "1G")
    arguments = [name, "-o", str(tmp_path / "b"), "--allow-missing", "lm_head.*", "--memory-limit", "100M"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 5
    assert "--memory-limit allows" in result.output + str(result.stderr)


def gguf_file(folder):
    """A Llama of one layer in float32."""
    gguf = pytest.importorskip("gguf")
    writer, generator = gguf.GGUFWriter(folder / "m.gguf", "llama"), torch.Generator().manual_seed(0)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    writer.add_rope_freq_base(10000.0)
    shapes = {
        "token_embd": (64, 32), "output": (64, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32), "blk.0.attn_v": (32, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "m.gguf"
