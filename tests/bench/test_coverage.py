"""A sample of the sweep over transformers' architectures, and that the sweep itself refuses what is wrong."""

from __future__ import annotations

import datetime
import json
import os
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the workshop half needs torch")
transformers = pytest.importorskip("transformers", reason="the workshop half needs transformers")
pytest.importorskip("onnxruntime", reason="the exporter's checks need onnxruntime")

from support import architectures

import edgeformer
from bench.coverage.examine import (
    FLOAT_TOLERANCE,
    PROMPTS,
    QUANTIZED_TOLERANCE,
    QUICK,
    Answer,
    compare_float,
    compare_quantized,
    examine,
)
from bench.coverage.models import tiny
from bench.coverage.page import page, why
from bench.coverage.sweep import PAGE, RESULTS, draw, what_differs
from edgeformer.export import ExportOptions, export, language_model

TABLE = json.loads(RESULTS.read_text())
# Attention by hand with a bias by distance; experts, and sinks beside a sliding window; attention in small steps; a
# cache of latents; a decoder whose context has a name of its own; positions that start at two.
FIXED = ("bloom", "gpt_oss", "xglm", "minicpm3", "whisper", "xlm-roberta")
# Ten others every day, the same all day.
DAY = os.environ.get("EDGEFORMER_SAMPLE_DAY", datetime.date.today().isoformat())
DRAWN = draw(sorted(TABLE.keys() - set(FIXED)), DAY)


def must_be_as_in_the_table(name, drawn):
    row = TABLE[name]
    found = examine(name, QUICK)
    made = f"made from commit {row.get('commit')} with transformers {row.get('transformers')}"
    assert not what_differs(found, row), (
        f"docs/coverage.md ({made}) is older than the code: {name}{drawn} is another today (transformers "
        f"{transformers.__version__}): {'; '.join(what_differs(found, row))}. {found.get('cause', '')} "
        f"Mend it, or write the table again: python -m bench.coverage --redo all {name}"
    )


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_sample_of_the_table_still_holds(name):
    must_be_as_in_the_table(name, "")
    assert TABLE[name]["status"] == "works", "the sample is of models that work"


@pytest.mark.parametrize("place", range(10))
def test_a_sample_of_the_table_that_changes_every_day_still_holds(place):
    must_be_as_in_the_table(DRAWN[place], f" (drawn by EDGEFORMER_SAMPLE_DAY={DAY})")


def test_the_drawn_sample_depends_on_the_date_alone():
    names = [f"model {i}" for i in range(190)]
    day = draw(names, "2026-11-29")
    assert day == draw(names[::-1], "2026-11-29") == draw(list(names), "2026-11-29")
    assert len(set(day)) == 10
    year = [draw(names, (datetime.date(2026, 1, 1) + datetime.timedelta(i)).isoformat()) for i in range(365)]
    assert {name for day in year for name in day} == set(names), "all have their turn in a year"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, []),
        ({"status": "no"}, ["status is 'no', the table says 'works'"]),
        ({"layers": 0}, ["layers is 0, the table says 2"]),
        ({"engines": {"cpu f32": "ok"}}, ["native f32: not reached; the table says ok"]),
        ({"engines": {"cpu f32": "ok", "native f32": "ok", "cpu q4a": "no"}}, []),  # the row is of an older form
        ({"engines": {"cpu f32": "ok", "native f32": "logits off"}}, ["native f32: logits off; the table says ok"]),
    ],
)
def test_a_stale_row_of_the_table_is_told(change, told):
    row = {"status": "works", "class": "X", "layers": 2, "engines": {"cpu f32": "ok", "native f32": "ok"}}
    assert what_differs(row | change, row) == told


def test_other_numbers_in_a_fault_are_no_other_row():
    row = {"status": "no", "engines": {"native f32": "logits off by 1.0e-03"}}
    assert what_differs(row | {"engines": {"native f32": "logits off by 1.1e-03"}}, row) == []


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text(encoding="utf-8") == page(TABLE), "write it again: python -m bench.coverage"


def test_recurrent_models_are_refused_by_name_of_the_cause():
    row = examine("lfm2_moe", QUICK)
    assert row["status"] == "no"
    assert "recurrent or convolution state" in row["cause"]


class Loaded:
    """A model that answers with these logits and tokens."""

    def __init__(self, logits, ids=()):
        self.table, self.ids = logits, list(ids)

    def logits(self, prompt):
        return self.table[len(prompt)]

    def generate(self, _prompt, **_options):
        return self


def right_logits():
    generator = np.random.default_rng(0)
    return {len(p): generator.standard_normal((len(p), 50)).astype(np.float32) for p in PROMPTS}


def test_float_bundles_with_wrong_logits_or_tokens_are_told():
    right = right_logits()
    answers = [Answer(right[len(p)], [1, 2, 3], [0.1, FLOAT_TOLERANCE, 0.1]) for p in PROMPTS]
    assert compare_float(Loaded(right, [1, 2, 3]), answers) == ("ok", 0.0)
    assert compare_float(Loaded(right, [1, 4, 5]), answers)[0] == "ok", "two tokens as good as equal"
    assert compare_float(Loaded(right, [4, 2, 3]), answers)[0] == "tokens [4, 2, 3] instead of [1, 2, 3] after 5"
    off = {n: value.copy() for n, value in right.items()}
    off[150][149, 7] += 1.1 * FLOAT_TOLERANCE * np.ptp(right[150])
    told = compare_float(Loaded(off, [1, 2, 3]), answers)[0]
    assert re.fullmatch(r"logits off by 1.1e-04 of their range at 150 tokens", told)
    off[5][0, 0] = np.nan
    assert "nan" in compare_float(Loaded(off, [1, 2, 3]), answers)[0]


def test_quantized_bundles_with_wrong_logits_are_told():
    right = right_logits()
    references = list(right.values())
    noise = {n: np.random.default_rng(n).standard_normal(value.shape) for n, value in right.items()}

    def told(size, rows=slice(None)):
        off = {n: value.astype(np.float64) for n, value in right.items()}
        for n in off:
            off[n][rows] += size * noise[n][rows]
        return compare_quantized(Loaded(off), references)[0]

    assert told(0.8 * QUANTIZED_TOLERANCE) == "ok"
    assert told(0.5, rows=slice(3, 4)) == "ok", "the choice of an expert tipped"
    assert told(2 * QUANTIZED_TOLERANCE).startswith("half of the logits off by")
    assert told(0.5, rows=slice(7, 40)) == "ok", "fewer than half of 201 rows"
    assert told(0.5, rows=slice(0, 100)).startswith("half of the logits off by")
    assert told(np.nan, rows=slice(150, 0, -1)) == "logits are not finite at 5 tokens"


def test_the_page_names_every_model_its_cause_and_its_commit():
    keys = ("cpu f32", "cpu q4a", "native f32")
    rows = {
        "one": {"status": "works", "class": "One", "layers": 2, "engines": dict.fromkeys(keys, "ok")},
        "two": {"status": "no", "stage": "export", "cause": "ExportError: Two keeps a recurrent or convolution state"},
        "three": {"status": "no", "stage": "export", "cause": "ExportError: why", "engines": {}},
    }
    rows["one"]["engines"] |= {"native q4a": "no: TopK. Run this bundle with cpu"}
    rows["two"]["engines"] = {}
    for name, row in rows.items():
        row |= {"commit": "aaaa of 2026-11-29" if name != "two" else "bbbb of 2026-11-28", "transformers": "5.24.0"}
    text = page(rows)
    assert "**1 of 3 work on `cpu`, 0 of them on `native` too.**" in text
    assert "| one | One | yes | no | TopK |" in text
    assert "| two |  | no | no | has a recurrent or convolution state (state-space, linear attention)" in text
    flat = " ".join(text.split())
    assert "Made from commit aaaa of 2026-11-29, with transformers 5.24.0: 2 rows." in flat
    assert "1 row is from commit bbbb of 2026-11-28, with transformers 5.24.0. The remarks say which." in flat
    assert text.rstrip().endswith("which is no KV cache; from commit bbbb of 2026-11-28 |")


def test_the_parts_of_a_composite_config_are_shrunk_too():
    model = tiny("fuyu")  # 9 billion parameters by default, in a part whose class only says "any config"
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert model(torch.tensor([[3, 5]])).logits.shape == (1, 2, 120)


@pytest.mark.parametrize(
    ("stage", "cause", "told"),
    [
        ("export", "ExportError: X keeps a recurrent or convolution state", "has a recurrent or convolution state"),
        (
            "export",
            "ExportError: X does not run with a plain key-value cache: IndexError",
            "more state than keys and values",
        ),
        ("build", "ImportError: TimmWrapperModel requires the timm library", "needs the package timm"),
        ("build", "ValueError: unknown", "not examined: .*(ValueError: unknown)"),
        ("export", "ValueError: unknown", "^ValueError: unknown$"),
    ],
)
def test_causes_are_told_in_plain_words(stage, cause, told):
    assert re.search(told, why({"stage": stage, "cause": cause, "engines": {}}))


ROPE = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_rotary_embeddings_hold_up_to_the_models_length(kind, tmp_path):
    torch.manual_seed(0)
    rope = ROPE[kind] | {"rope_theta": 1e4}
    config = transformers.LlamaConfig(**architectures._COMMON, rope_parameters=rope)
    module = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    options = ExportOptions(kind, tmp_path / "b", quantize="none", tokens=0)
    manifest = export(options, traced=language_model(module, kind))
    assert any("rotary frequencies" in note for note in manifest.get("notes", ())) == (kind == "dynamic")
    model = edgeformer.load(tmp_path / "b", engine="cpu")
    for length in (20, 60, 128):  # before, behind and far behind the length that the scaling starts from
        ids = [(7 * i) % 119 + 1 for i in range(length)]
        with torch.no_grad():
            expected = module(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        assert np.abs(model.logits(ids) - expected).max() <= 1e-4 * np.ptp(expected)
