"""The JSON-Schema-Test-Suite, from the source distribution of the package jsonschema, and what constraints make of it.

    PYTHONPATH=.:tests python -m support.json_schema_suite      writes tests/decoding/constraints/ratchet.json again

Each schema of the suite is in one of four categories, the worst first:

    wrong      a document that is invalid is accepted
    refused    the schema is refused
    strict     some valid documents are rejected, in every order of their properties
    enforced   exactly the valid documents are accepted
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tokenizer_families as families
from tokenizers import Tokenizer as Backend

from edgeformer.decoding.constraints import ConstraintSpec, Grammar, compile_constraint
from edgeformer.errors import InputError
from edgeformer.processing.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
RATCHET = ROOT / "tests/decoding/constraints/ratchet.json"
PACKAGE = "jsonschema==4.26.0"  # its wheel has no suite, its source distribution has
KEPT = ROOT / "build/json-schema-suite"
DRAFTS = {
    "draft4": "http://json-schema.org/draft-04/schema#",
    "draft7": "http://json-schema.org/draft-07/schema#",
    "draft2020-12": "https://json-schema.org/draft/2020-12/schema",
}
RANKS = ("wrong", "refused", "strict", "enforced")
EOS = 0


def suite() -> Path:
    """The folder of the suite, downloaded once. Skips where there is no network; in CI, fails."""
    found = KEPT / "tests"
    if found.is_dir():
        return found
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", PACKAGE]
        done = subprocess.run([*command, "-d", place], capture_output=True, text=True, timeout=600)
        if done.returncode:
            message = f"the source of {PACKAGE} cannot be downloaded: {done.stderr[-500:]}"
            pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
        with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
            archive.extractall(place, filter="data")
        KEPT.mkdir(parents=True, exist_ok=True)
        next(Path(place).glob("*/json/tests")).rename(found)
    return found


def cases(draft: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, case) of a draft; a case has a schema, and tests with a document each."""
    folder = suite() / draft
    for path in sorted(folder.rglob("*.json")):
        for case in json.loads(path.read_text()):
            yield path.relative_to(folder).as_posix(), case


def letters() -> Tokenizer:
    """A byte-level tokenizer that can write every text."""
    backend = families.byte_bpe(["<|endoftext|>"])
    return Tokenizer(Backend.from_str(backend.to_str()), {})


def written(document: Any, draft: str = "draft2020-12") -> Iterator[str]:
    """The document as JSON in all orders of its properties (of large ones: some).

    Whole floats are also written as integers, which are the same numbers since draft 6.
    """
    for value in itertools.islice(_orders(document), 400):
        text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        yield text
        if draft != "draft4" and ".0" in text:
            yield json.dumps(_whole(value), separators=(",", ":"), ensure_ascii=False)


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return {name: _whole(part) for name, part in value.items()} if isinstance(value, dict) else value


def _orders(value: Any) -> Iterator[Any]:
    if not isinstance(value, list | dict):
        yield value
    elif isinstance(value, list):
        yield from map(list, itertools.product(*map(list, map(_orders, value))))
    elif isinstance(value, dict):
        for names in itertools.islice(itertools.permutations(value), 120):
            for parts in itertools.product(*(list(itertools.islice(_orders(value[name]), 24)) for name in names)):
                yield dict(zip(names, parts, strict=True))


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the whole text is an answer."""
    try:
        ids = tokenizer.encode(text)
    except InputError:  # a lone surrogate
        return False
    return grammar.start().valid([*ids, EOS]) == len(ids) + 1


def outcome(tokenizer: Tokenizer, draft: str, case: dict[str, Any]) -> dict[str, list[str]] | str:
    """The category of a case; with the descriptions of the documents for "wrong" and "strict"."""
    schema = case["schema"]
    if isinstance(schema, dict):
        schema = {"$schema": DRAFTS[draft], **schema}
    try:
        spec = ConstraintSpec.of(json_schema=schema)
        assert spec is not None
        grammar = compile_constraint(tokenizer, [EOS], tokenizer.size, spec)
    except InputError:
        return "refused"
    wrong, strict = [], []
    for test in case["tests"]:
        accepted = any(accepts(grammar, tokenizer, text) for text in written(test["data"], draft))
        if accepted and not test["valid"]:
            wrong.append(test["description"])
        elif test["valid"] and not accepted:
            strict.append(test["description"])
    if wrong:
        return {"wrong": wrong}
    return {"strict": strict} if strict else "enforced"


def outcomes() -> dict[str, dict[str, dict[str, Any]]]:
    """Draft -> file -> description of the case -> outcome."""
    tokenizer, found = letters(), {}
    for draft in DRAFTS:
        files: dict[str, dict[str, Any]] = {}
        for file, case in cases(draft):
            files.setdefault(file, {})[case["description"]] = outcome(tokenizer, draft, case)
        found[draft] = files
    return found


def category(found: Any) -> str:
    return found if isinstance(found, str) else next(iter(found))


if __name__ == "__main__":
    RATCHET.write_text(json.dumps(outcomes(), indent=1, ensure_ascii=False, sort_keys=True) + "\n")
