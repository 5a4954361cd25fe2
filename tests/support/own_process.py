"""Scripts that change limits and signals of their whole process, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from support import damage_study

START = """
import gc, os, resource, signal, sys, threading, time
import numpy as np
from edgeformer import load
from edgeformer.errors import EdgeformerError, OutOfMemory, StateError
PATH, ENGINE = sys.argv[1:3]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
IDS = [5, 40, 17, 88]
def tokens(model, n=8):
    return model.generate(IDS, max_new_tokens=n, ignore_eos=True).ids
def used():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def limit(extra):
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if extra is None else used() + extra, hard))
"""


def run(script, path, engine, timeout=600):
    """The output of `script` in a new process, which must end with 0 and write no error."""
    code = START + textwrap.dedent(script)
    env = {**os.environ, "PYTHONPATH": str(damage_study.ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), engine], capture_output=True, text=True, timeout=timeout, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]  # also of an exception that Python ignored
    return done.stdout
