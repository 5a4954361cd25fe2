"""The committed pages are what their generators print from the committed results."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bench import encoders, imports, smollm2
from bench.arm import __main__ as arm
from bench.coverage import page as coverage_page
from bench.coverage import sweep
from bench.decoding import __main__ as decoding
from bench.decoding import draft_bundle, sampling
from bench.decoding import plots as decoding_plots
from bench.peers import __main__ as peers
from bench.peers import pages, plots, studies
from bench.report import RESULTS, ROOT, put, runs
from bench.serving import __main__ as serving
from bench.serving import plots as serving_plots
from wheels import record

PAGES = ("README.md", "docs/performance.md", "docs/platforms.md", "docs/serving.md", "docs/smollm2.md")


def test_every_page_is_what_its_generators_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    for module in (pages, encoders, smollm2):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for module in (pages, arm):
        monkeypatch.setattr(module, "PAGE", tmp_path / "docs" / "performance.md")
    for module in (imports, record):
        monkeypatch.setattr(module, "PAGE", tmp_path / "docs" / "platforms.md")
    monkeypatch.setattr(pages, "IMAGES", tmp_path)
    for module in (plots, decoding_plots, serving_plots):
        monkeypatch.setattr(module, "_save", lambda _, path: path)
    for study in studies.ALL.values():
        peers.write_study(study)
    encoders.write()
    sampling.write()
    draft_bundle.write()
    for command in (decoding, serving):
        written = replace(command.STUDIES, page=tmp_path / "docs" / command.STUDIES.page.name, images=tmp_path)
        for study in written.studies:
            written.write(study)
    smollm2.write_pages(runs("smollm2")[0])
    arm.write()
    imports.write()
    put(record.PAGE, "wheels", record.page(record.read()))
    for page in PAGES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), f"{page} is not what bench prints"


def test_the_page_of_coverage_is_what_its_generator_prints() -> None:
    assert coverage_page.page(json.loads(sweep.RESULTS.read_text())) == sweep.PAGE.read_text()


def test_results_hold_no_rounds() -> None:
    for path in RESULTS.glob("*.json"):
        assert '"values"' not in path.read_text(), f"{path.name} holds raw rounds; save a summary"
        assert path.stat().st_size < 100_000, f"{path.name} is no summary"
