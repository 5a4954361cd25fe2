"""Loads damaged bundles in this process and says what came of each, one JSON line a case.

    python -m support.damage_worker SOURCE FOLDER FIRST COUNT [ENGINES [unchecked]]

`unchecked` leaves out onnx's checker, so that the second line is tried: the checks of lowering and of the C++ module.

Each case is announced before it runs, so that the parent knows which one killed or blocked the process. The address
space may grow by `ROOM` bytes only: an allocation from a number in a damaged file fails instead of taking the machine.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
from support.damage import damaged

from edgeformer import load
from edgeformer.bundle import check
from edgeformer.errors import EdgeformerError

ROOM = 2 << 30
EVERY = 25  # cases: then the undamaged bundle must still give its tokens


def outcome(path: Path, engine: str) -> tuple[str, str]:
    """("ok" or the class of the error, its text) of loading the bundle and generating four tokens."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = load(path, engine=engine, threads=1)
            if model.is_language_model:
                if model.tokenizer is not None:
                    model.generate("hello", max_new_tokens=1)
                    if model.tokenizer.has_chat_template:
                        model.tokenizer.encode_chat([{"role": "user", "content": "x"}])
                model.generate([5, 40, 17], max_new_tokens=4)
            model.explain(), model.info
    except EdgeformerError as error:
        return type(error).__name__, str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return "UNTYPED " + type(error).__name__, traceback.format_exc()
    return "ok", ""


def main(source: Path, folder: Path, first: int, count: int, engines: tuple[str, ...]) -> None:
    """Runs the cases `first` to `first + count`."""
    expected = {engine: load(source, engine=engine, threads=1).generate([5, 40, 17], max_new_tokens=8).ids
                for engine in engines}  # fmt: skip
    faulthandler.enable()
    np.seterr(all="ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    for seed in range(first, first + count):
        print(json.dumps({"start": seed}), flush=True)
        what = damaged(source, folder / "case", seed)
        for engine in engines:
            kind, text = outcome(folder / "case", engine)
            print(json.dumps({"seed": seed, "engine": engine, "damage": what, "kind": kind, "text": text}), flush=True)
        if seed % EVERY == 0:
            for engine in engines:
                found = load(source, engine=engine, threads=1).generate([5, 40, 17], max_new_tokens=8).ids
                if found != expected[engine]:
                    print(json.dumps({"seed": seed, "engine": engine, "damage": what, "kind": "UNTYPED tokens",
                                      "text": f"{found}, before {expected[engine]}"}), flush=True)  # fmt: skip


if __name__ == "__main__":
    if "unchecked" in sys.argv:
        check.structure_problem = lambda _: None
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]),
         tuple(sys.argv[5].split(",") if len(sys.argv) > 5 else ("cpu", "native", "auto")))  # fmt: skip
