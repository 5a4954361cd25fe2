"""The examples of docs/generation.md run, in their order, on SmolLM2."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "generation.md"


def test_the_examples_of_the_generation_page_run(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").symlink_to(smollm2("keep"))
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith(" Paris")
    assert "get_weather {'city'" in printed
    assert len(blocks) > 8
