"""From what a call asks for to a compiled grammar, kept for the next call."""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import numpy as np

from edgeformer.decoding.constraints.grammar import Grammar
from edgeformer.decoding.constraints.refusals import blamed
from edgeformer.decoding.constraints.spec import ConstraintSpec
from edgeformer.decoding.constraints.token_trie import TokenTrie, token_trie
from edgeformer.errors import InputError, StateError
from edgeformer.processing.tokenizer import Tokenizer

_KEPT = 64  # grammars of a tokenizer

_Key = tuple[ConstraintSpec, frozenset[int], int]
_kept: weakref.WeakKeyDictionary[Tokenizer, OrderedDict[_Key, Grammar]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def compile_constraint(tokenizer: Tokenizer, eos: Collection[int], vocab_size: int, spec: ConstraintSpec) -> Grammar:
    """The grammar of `spec` over the tokens of `tokenizer`; the last 64 are kept.

    `eos` are the ids that end an answer, `vocab_size` the length of the logits, which may be more than the tokenizer
    has. Takes about 1 ms, and once for each tokenizer 0.3 s. Other threads may compile at the same time.

    Raises:
        InputError: the grammar is malformed or too large, nothing fulfils it, or the tokenizer cannot write what does.
        EngineUnavailable: llguidance is not installed.
    """
    key = (spec, frozenset(eos), vocab_size)
    with _lock:
        kept = _kept.setdefault(tokenizer, OrderedDict())
        if key in kept:
            kept.move_to_end(key)
            return kept[key]
    trie = token_trie(tokenizer)
    grammar = Grammar(trie, _matcher(trie, spec), eos, vocab_size)
    try:
        grammar.start().apply(np.zeros(vocab_size, np.float32))
    except StateError as error:
        raise InputError(f"No answer can fulfil the {_NAMES[spec.kind]}. {error}") from error
    with _lock:
        kept[key] = grammar
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    return grammar


_NAMES = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar", "choices": "choice"}


def _matcher(trie: TokenTrie, spec: ConstraintSpec) -> Any:
    from llguidance import LLMatcher

    if spec.kind == "json":
        text = LLMatcher.grammar_from_json_schema(spec.text)
    elif spec.kind == "regex":
        text = LLMatcher.grammar_from_regex(spec.text)
    elif spec.kind == "lark":
        text = LLMatcher.grammar_from_lark(spec.text)
    else:
        text = LLMatcher.grammar_from_lark(_choice(trie, json.loads(spec.text)))
    matcher = LLMatcher(trie.ll, text, log_level=0)
    problem = matcher.get_error() or "\n".join(matcher.get_grammar_warnings())
    if problem:
        where = blamed(json.loads(spec.text), problem) if spec.kind == "json" else ""
        raise InputError(f"The {_NAMES[spec.kind]} is refused: {where}{_told(problem)}")
    return matcher


def _choice(trie: TokenTrie, choices: list[str]) -> str:
    """The Lark grammar of a choice."""
    for text in choices:
        if not trie.can_write(text.encode()):
            raise InputError(f"The tokenizer cannot write the choice {text!r}; change its letters or spaces.")
    # A Lark string is a JSON string, but for the control character that JSON leaves as it is.
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False).replace("\x7f", "\\x7f") for text in choices)


def _told(problem: str) -> str:
    """The engine's message without its dump of states."""
    lines = problem.strip().partition("<state>")[0].splitlines()
    return "\n".join(lines[:12])
