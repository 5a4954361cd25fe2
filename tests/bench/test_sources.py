"""docs/sources.md: a row for every setting, none ignored; and the sweep's own check refuses one that is."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

pytest.importorskip("torch", reason="the toolchain needs torch")
for package in ("transformers", "gguf", "peft", "sentence_transformers"):
    pytest.importorskip(package, reason="the lists of settings are these libraries' own")

from bench.sources.__main__ import PAGE, failures, section, sweeps
from bench.sources.row import Row

SWEEPS = sweeps()
ROW = re.compile(r"^\| `(.*?)` \| (\w+) \|", re.MULTILINE)


def rows_of(name: str) -> dict[str, str]:
    """setting -> what happens, as the page has it."""
    page = PAGE.read_text(encoding="utf-8")
    block = page.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]
    return dict(ROW.findall(block))


@pytest.mark.parametrize("name", SWEEPS)
def test_the_page_has_every_setting_of_the_installed_libraries(name):
    found = rows_of(name)
    assert set(SWEEPS[name].settings()) <= set(found), "run python -m bench.sources " + name
    assert set(found.values()) <= {"honoured", "refused", "irrelevant"}


def test_a_setting_that_is_ignored_or_not_tried_fails_the_sweep():
    sweep = SimpleNamespace(settings=lambda: ["a", "b", "c"], ABOUT="", TESTS="")
    rows = [Row("a", "honoured", ""), Row("b", "ignored", "the reference moved by 0.3, the bundle did not")]
    assert [line.partition(" ")[0] for line in failures(sweep, rows)] == ["b", "c"]
    assert failures(sweep, [*(Row(name, "refused", "") for name in "abc")]) == []


def test_a_row_reads_back_from_its_section():
    sweep = SimpleNamespace(ABOUT="About.", TESTS="tests")
    text = section(sweep, [Row("rope.scaling.type", "refused", "a | b", "numpy")])
    assert ROW.findall(text) == [("rope.scaling.type", "refused")]
