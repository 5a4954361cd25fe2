"""What a malformed bundle gives: the tokens of a short answer, or the text of a typed error."""

from __future__ import annotations

from edgeformer import load
from edgeformer.errors import EdgeformerError

ENGINES = ("cpu", "native")
IDS = [5, 40, 17, 88]


def answer(path, engine="cpu"):
    return load(path, engine=engine, threads=1).generate(IDS, max_new_tokens=6).ids


def typed(work):
    """What `work` gives, or the text of its error."""
    try:
        return work()
    except EdgeformerError as error:
        return str(error)
