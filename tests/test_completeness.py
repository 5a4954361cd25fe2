"""Every weight of the model comes from the source, and every weight of the source is used; or the export stops."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the workshop half needs torch")
transformers = pytest.importorskip("transformers", reason="the workshop half needs transformers")

from bench.sources import _hub_checkpoints as hub  # noqa: E402
from bench.sources import _own_checkpoints as own  # noqa: E402
from edgeformer.errors import ExportError  # noqa: E402
from edgeformer.export import ExportOptions  # noqa: E402
from edgeformer.export.sources import load_source  # noqa: E402

HUB, OWN = list(hub.situations()), list(own.situations())


@pytest.mark.parametrize("situation", HUB, ids=[s.name for s in HUB])
def test_a_model_folder_loads_whole_or_is_refused_by_name(situation, tmp_path):
    check(situation, tmp_path)


@pytest.mark.parametrize("situation", OWN, ids=[s.name for s in OWN])
def test_a_checkpoint_of_a_training_loop_loads_whole_or_is_refused_by_name(situation, tmp_path):
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


def same_tensors(module, reference, except_for=()):
    found, expected = module.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    skipped = [pattern.removesuffix("*") for pattern in except_for]
    names = [name for name in expected if not name.startswith(tuple(skipped) or ("-",))]
    assert not [name for name in names if not torch.equal(found[name], expected[name])]
