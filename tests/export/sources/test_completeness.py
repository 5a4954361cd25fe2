"""Every weight of the model comes from the source and every weight of the source is used, or the export stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support import tiny

torch = pytest.importorskip("torch", reason="the toolchain needs torch")
transformers = pytest.importorskip("transformers", reason="the toolchain needs transformers")

from bench.sources import _hub_checkpoints as hub
from bench.sources import _user_checkpoints as user
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions
from edgeformer.export.sources.load import load_source

HUB, OWN = list(hub.situations()), list(user.situations())


@pytest.mark.parametrize("situation", HUB, ids=[s.name for s in HUB])
def test_a_model_folder_loads_completely_or_is_refused_by_name(situation, tmp_path):
    check(situation, tmp_path)


@pytest.mark.parametrize("situation", OWN, ids=[s.name for s in OWN])
def test_a_checkpoint_of_a_training_loop_loads_completely_or_is_refused_by_name(situation, tmp_path):
    check(situation, tmp_path)


def check(situation, folder):
    name, options = hub.prepared(situation, folder)
    options = ExportOptions(name, folder / "b", **options)
    if situation.model is None:
        with pytest.raises(ExportError) as refused:
            load_source(options)
        text = str(refused.value)
    else:
        source = load_source(options)
        text = str(dict(source.completeness))
        same_tensors(source.module, situation.model(), except_for=situation.options.get("allow_missing", ()))
    assert not [word for word in situation.words if word not in text], text


HUB_CACHE = """
import sys
from edgeformer.errors import ExportError
from edgeformer.export import ExportOptions
from edgeformer.export.sources.load import load_source

for name in ("tiny/whole", "tiny/sharded", "tiny/headless", "tiny/nothing"):
    try:
        print(name, load_source(ExportOptions(name, "b")).completeness["tensors"])
    except ExportError as error:
        print(name, error)
"""


def test_a_model_of_the_hub_is_checked_as_a_folder_is(tmp_path):
    """Uses a hub cache in the layout of the hub's client, in a process with no other cache."""
    for name, keep, more in (
        ("whole", "", {}),
        ("sharded", "", hub.SHARDS),
        ("headless", "lm_head", {}),
    ):
        repository = tmp_path / f"models--tiny--{name}"
        folder = repository / "snapshots" / ("0" * 40)
        hub.llama().save_pretrained(folder, **more)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        if keep:
            state = hub.load_file(folder / hub.WEIGHTS)
            left = {n: v for n, v in state.items() if keep not in n}
            hub.save_file(left, folder / hub.WEIGHTS, metadata={"format": "pt"})
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", HUB_CACHE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole, sharded, headless, nothing = done.stdout.splitlines()
    assert (whole, sharded) == ("tiny/whole 21", "tiny/sharded 21")
    assert "1 tensor of LlamaForCausalLM is not in it" in headless
    assert "the hub did not return it" in nothing


class Versioned(torch.nn.Linear):
    """A module whose version 1 stored weights with the opposite sign."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version") != 2:
            state[prefix + "weight"] = -state[prefix + "weight"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_the_versions_of_modules_are_kept(tmp_path):
    """torch.save stores them with a state_dict; modules need them to read older layouts."""
    from edgeformer.export.sources.user.user_weights import load_user_weights

    right, module = Versioned(3, 4), Versioned(3, 4)
    torch.save(right.state_dict(), tmp_path / "w.pt")
    load_user_weights(module, tmp_path / "w.pt")
    same_tensors(module, right)


@pytest.mark.parametrize("option", ["weights", "input", "allow_missing"])
def test_an_option_for_another_kind_of_source_is_refused(option, tmp_path):
    if option == "allow_missing":
        (tmp_path / "own.py").write_text(user.SOURCE)
        options = {"source": f"{tmp_path / 'own.py'}:make", "allow_missing": ("x.*",)}
    else:
        options = {
            "source": hub.saved(hub.llama)(tmp_path),
            option: tmp_path if option == "weights" else ("x=int64[a]",),
        }
    with pytest.raises(ExportError, match="is for"):
        load_source(ExportOptions(output=tmp_path / "b", **options))


def test_a_bundle_of_stripped_names_has_the_numbers_of_the_model(tmp_path):
    """Compares the bundle's logits with the model's; the manifest notes the removed prefix."""
    import edgeformer
    from edgeformer.export import export

    name = hub.saved(hub.llama, lambda state: {f"_orig_mod.{n}": v for n, v in state.items()})(tmp_path)
    manifest = export(ExportOptions(name, tmp_path / "b", quantize="none", tokens=0))
    assert "_orig_mod." in manifest["completeness"]["notes"][0]
    ids = torch.arange(5, 16)[None]
    with torch.no_grad():
        expected = hub.llama()(ids).logits.numpy()
    engine = edgeformer.load(tmp_path / "b", engine="cpu").engine
    found = tiny.logits(engine, ids.numpy())
    assert abs(found - expected[:, -found.shape[1] :]).max() < 1e-5 * abs(expected).max()  # as parity.TOLERANCE


def test_an_untied_head_stays_untied_in_the_bundle(tmp_path):
    """The config ties it, the file does not: the bundle has the file's values, and its config is untied."""
    from edgeformer.export import export

    name = hub.saved(hub.tied, hub._with(lm_head__weight=hub._other_head()))(tmp_path)
    manifest = export(ExportOptions(name, tmp_path / "b", quantize="none", tokens=0))
    assert json.loads((tmp_path / "b" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "untied" in manifest["completeness"]["notes"][0]


def same_tensors(module, reference, except_for=()):
    found, expected = module.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    skipped = [pattern.removesuffix("*") for pattern in except_for]
    names = [name for name in expected if not name.startswith(tuple(skipped) or ("-",))]
    assert not [name for name in names if not torch.equal(found[name], expected[name])]
