"""Bundles that are damaged at random: no crash, no hang, no huge allocation, and only errors of edgeformer's own."""

from __future__ import annotations

import random
import shutil

import pytest
from support import damage, damage_study, damage_worker

from edgeformer import load
from edgeformer.bundle import check

COUNT = 100  # damaged bundles, each loaded by three engines; `make fuzz` runs thousands


@pytest.mark.parametrize(("name", "first"), [("q8", 0), ("float", 100_000)])
def test_a_damaged_bundle_gives_a_typed_error_or_runs(bundles, name, first):
    found = damage_study.study(bundles / name, first, COUNT)
    assert not found.failures
    assert sum(found.kinds.values()) >= 3 * COUNT
    # The damage is neither always fatal nor always harmless, and different checks find it.
    assert {"ok", "BundleError", "EngineUnavailable", "WrongNumbers"} <= found.kinds.keys()


def test_what_onnxs_checker_lets_through_is_found_behind_it(q8):
    assert not damage_study.study(q8, 200_000, COUNT, "native", unchecked=True).failures


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        ("raise KeyError('x')", "KeyError"),  # an exception that is not ours
        ("import os; os.abort()", "the process ended with -6"),  # a crash
        ("import time; time.sleep(60)", "no answer"),  # a hang
        ("bytearray(8 << 30)", "MemoryError"),  # an allocation by a number in the file
    ],
)
def test_the_study_sees_planted_faults(tmp_path, lm, monkeypatch, fault, seen):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, edgeformer.model as m\n"
        "def load(*_, **__):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 2 and sys.argv[3] == '0':\n"  # call 1 is of the whole bundle
        f"        {fault}\n"
        "    return whole(*_, **__)\n"
        "calls, whole, m.load = 0, m.load, load\n"
        "import edgeformer; edgeformer.load = load\n"
    )
    monkeypatch.setattr(damage_study, "ROOT", tmp_path)
    (tmp_path / "tests").symlink_to(damage_study.__file__.rpartition("/support")[0])
    (tmp_path / "edgeformer").symlink_to(check.__file__.rpartition("/bundle")[0])
    monkeypatch.setattr(damage_study, "SECONDS", 20.0)
    found = damage_study.study(lm, 0, 2, "cpu")
    assert [failure[0] for failure in found.failures] == [0]
    assert seen in found.failures[0][3]
    assert sum(found.kinds.values()) >= 1  # the case behind it ran


def test_the_same_seed_gives_the_same_damage(lm, tmp_path):
    for seed in range(20):
        texts = [damage.damaged(lm, tmp_path / "one", seed) for _ in range(2)]
        assert texts[0] == texts[1]


def test_every_kind_of_damage_changes_something(lm, tmp_path):
    whole = {path.name: path.read_bytes() for path in lm.iterdir()}
    for kind in damage.KINDS:
        changed = 0
        for seed in range(10):
            damage.damaged(lm, tmp_path / "copy", 10**9)  # any: what follows copies it again
            shutil.rmtree(tmp_path / "copy")
            shutil.copytree(lm, tmp_path / "copy")
            kind(random.Random(seed), tmp_path / "copy")
            found = {
                p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir() if p.is_file() and not p.is_symlink()
            }
            changed += found != whole
        assert changed >= 5, kind


def test_the_outcome_of_an_undamaged_bundle_is_ok(lm, monkeypatch):
    assert damage_worker.outcome(lm, "cpu") == ("ok", "")
    assert load(lm, engine="cpu", threads=1).generate([5], max_new_tokens=1).ids
