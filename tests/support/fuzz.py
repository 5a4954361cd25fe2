"""Runs a fuzz target under atheris (libFuzzer with the coverage of Python code).

    python -m support.fuzz TARGET SECONDS [FOLDER]

Inputs that end with an exception are written to FOLDER (default: out/fuzz/TARGET). Put such a file into
tests/robustness/crashes/TARGET/ when its cause is fixed: the tests replay it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main(name: str, seconds: int, found: Path) -> None:
    """Fuzzes one target for so many seconds; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["edgeformer", "json", "gguf", "jinja2"]):
        from support import fuzz_native, fuzz_targets
    module = fuzz_native if name in fuzz_native.TARGETS else fuzz_targets
    target = module.TARGETS[name]
    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    for number, seed in enumerate(module.seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    with atheris.instrument_imports(include=["edgeformer", "json", "gguf", "jinja2"]):
        for seed in module.seeds(name):  # imports what the target needs, with coverage
            fuzz_targets.run(target, seed)
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=4096", f"-artifact_prefix={found}/"]
    options += ["-print_final_stats=1", f"-max_len={fuzz_targets.LARGEST // 4}", "-close_fd_mask=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: void(fuzz_targets.run(target, data)))
    atheris.Fuzz()


def void(_: object) -> None:
    """libFuzzer takes 0 or nothing for an input that it keeps."""


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3] if len(sys.argv) > 3 else f"out/fuzz/{sys.argv[1]}"))
