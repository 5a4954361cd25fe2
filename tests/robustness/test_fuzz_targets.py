"""Replays the seeds of the fuzz targets, small changes of them, and inputs that once ended with an untyped error."""

from __future__ import annotations

import ast
import importlib.util
import random
from pathlib import Path

import pytest
from support import fuzz_targets

import edgeformer

CRASHES = Path(__file__).parent / "crashes"
HAS_TORCH = importlib.util.find_spec("torch") is not None
TARGETS = [name for name in fuzz_targets.TARGETS if HAS_TORCH or name not in fuzz_targets.NEED_TORCH]


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_of_a_target_are_taken(name):
    assert [fuzz_targets.run(fuzz_targets.TARGETS[name], seed) for seed in fuzz_targets.seeds(name)] == ["ok"] * len(
        fuzz_targets.seeds(name)
    )


def changed(rng, data):
    """A few bytes are others, are gone, or stand twice."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(4)
        if how == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[at : at + rng.choice((1, 4, 100))]
        elif how == 2:
            data[at:at] = data[at : at + rng.choice((1, 8, 60))]
        else:
            data[at:at] = rng.choice((b"\0", b"\xff" * 8, b"-1", b"1e999", b'"', b"{}", b"[", b"null", b"\xed\xa0\x80"))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_changed_seeds_give_typed_errors(name):
    rng, target = random.Random(name), fuzz_targets.TARGETS[name]
    outcomes = set()
    for _ in range(6 if name == "gguf" else 25):
        outcomes.add(fuzz_targets.run(target, changed(rng, rng.choice(fuzz_targets.seeds(name)))))
    if name not in ("cache_entry", "request", "generation"):  # these take what is no JSON, or no entry, as none
        assert outcomes != {"ok"}


@pytest.mark.parametrize("path", sorted(CRASHES.glob("*/*")) or [None], ids=lambda p: p and f"{p.parent.name}/{p.name}")
def test_an_input_that_once_failed_gives_a_typed_error(path):
    if path is None:
        pytest.skip("no such input is known")
    fuzz_targets.run(fuzz_targets.TARGETS[path.parent.name], path.read_bytes())


def test_a_target_lets_untyped_errors_through():
    with pytest.raises(KeyError):
        fuzz_targets.run(lambda data: {}[data], b"x")


# --------------------------------------------------------------------------------------------------------- no code runs

RUNTIME = Path(edgeformer.__file__).parent
PICKLERS = ("pickle", "marshal", "shelve", "dill", "joblib")
TOOLCHAIN = ("export", "train", "models")


def unpickles(source):
    """Where a module could run code from data: (line, what)."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [
            (node.lineno, n) for n in names if n.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "joblib")
        ]
        if isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("eval", "exec") and isinstance(node.func, ast.Name):
                found.append((node.lineno, called))
            if called == "load" and getattr(getattr(node.func, "value", None), "id", "") in ("np", "numpy", "torch"):
                safe = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                if safe.get("allow_pickle") is not False and safe.get("weights_only") is not True:
                    found.append((node.lineno, f"{called} without a guard"))
    return found


def test_the_runtime_unpickles_nothing_and_the_toolchain_only_tensors():
    for path in RUNTIME.rglob("*.py"):
        assert not unpickles(path.read_text()), path


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from pickle import loads", "np.load(p)", "np.load(p, allow_pickle=True)", "torch.load(p)",
     "torch.load(p, weights_only=False)", "eval(x)", "exec(x)", "import joblib"],
)  # fmt: skip
def test_the_search_finds(line):
    assert unpickles(line)


def test_templates_are_compiled_in_the_immutable_sandbox_alone():
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from edgeformer.processing.chat_template import _environment

    assert isinstance(_environment(), ImmutableSandboxedEnvironment)
    others = [p for p in RUNTIME.rglob("*.py") if "jinja2" in p.read_text() and p.name != "chat_template.py"]
    texts = [p.read_text() for p in others if not set(p.relative_to(RUNTIME).parts) & set(TOOLCHAIN)]
    assert not [text for text in texts if "Environment(" in text or "Template(" in text.replace("ChatTemplate(", "")]
