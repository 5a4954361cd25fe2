"""Every setting of tokenizer_config.json, and every argument of a chat template."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils.chat_template_utils import _compile_jinja_template

from bench.sources import _tokenizers as tiny
from bench.sources.row import Outcome, Row
from edgeformer.errors import ExportError

TITLE = "Tokenizers and chat templates"
ABOUT = (
    "The settings that transformers' tokenizer classes read from tokenizer_config.json, found in their source and "
    "signatures; each is set for every class that has it. Compared are the ids with and without special tokens, "
    "decoded texts, a truncated text, a pair, a chat, a chat with control tokens in its content, and a text cut "
    "to the tokenizer's limit. Then the arguments of `apply_chat_template` and what its templates can use."
)
TESTS = (
    "tests/processing/test_tokenizer_families.py, tests/processing/test_chat_templates.py, "
    "tests/processing/test_tokenizer.py"
)

# Arguments that from_pretrained passes itself or reads before any class; not settings of the file.
_NO_SETTING = {
    *("name_or_path", "is_local", "local_files_only", "files_loaded", "gguf_file", "args", "kwargs", "_commit_hash"),
    *("tokenizer_object", "tokenizer_file", "tokenizer_padding", "tokenizer_truncation", "tokenizer", "vocab"),
    *("merges", "vocab_file", "merges_file", "post_processor", "_json_padding", "_json_truncation"),
    "_spm_precompiled_charsmap",
}
_CARRIERS = ("TokenizersBackend", "BertTokenizer", "LlamaTokenizer", "GPT2Tokenizer", "T5Tokenizer")
_VALUES: dict[str, Any] = {
    "add_prefix_space": [True, False], "added_tokens_decoder": [{"5": {"content": "hello", "special": True}}],
    "additional_special_tokens": [["<new>"]], "auto_map": [{"AutoTokenizer": ["own.Own", None]}], "backend": ["own"],
    "chat_control_tokens": [["<think>"]], "chat_template": ["{{ messages | length }}"], "errors": ["strict", "ignore"],
    "extra_special_tokens": [["<new>"], {"image_token": "<new>"}], "model_input_names": [["input_ids"]],
    "model_specific_special_tokens": [{"image_token": "<new>"}], "padding_side": ["left", "right"],
    "processor_class": ["Own"], "response_schema": [{}], "response_template": ["{{ x }}"],
    "src_lang": ["de_DE", "deu_Latn", "deu"], "tgt_lang": ["de_DE", "deu_Latn", "deu"],
    "tokenizer_class": ["BertTokenizer", "TokenizersBackend"], "truncation_side": ["left", "right"],
    "truncation_strategy": ["only_first"], "init_inputs": [[]], "language": ["german"], "task": ["transcribe"],
    "strip_accents": [True, False], "clean_up_tokenization_spaces": [True], "split_special_tokens": [True],
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": [True], "verbose": [True],
    "fix_mistral_regex": [True], "wordpieces_prefix": ["@@"], "tags_dict": [{"a": 1}], "entity_vocab": [{"a": 1}],
}  # fmt: skip
_WITH: dict[str, dict[str, Any]] = {
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": {"clean_up_tokenization_spaces": True},
    "chat_control_tokens": {"added_tokens_decoder": {"900": {"content": "<think>", "special": False}}},
    "max_len": {"model_max_length": ...},
}
_WHY = {  # no result depends on it
    "padding_side": "a batch is padded at the end and masked, so that each row gives what it gives alone",
    "pad_to_multiple_of": "a batch is padded to its longest row, and masked",
    "pad_token_type_id": "padding is masked",
    "response_template": "of parse_response: how answers are read, not how prompts are made",
    "response_schema": "transformers drops it",
    "processor_class": "of AutoProcessor",
    "verbose": "log lines",
    "add_bos_token": "transformers passes over it where there is a tokenizer.json; of folders without one, see "
    "tests/processing/test_tokenizer_families.py",
    "add_eos_token": "as add_bos_token",
    "auto_map": "own code is never run; the class is taken from transformers, and proven",
    "errors": "the tokenizers library always replaces wrong bytes by U+FFFD",
}

_ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "tools": [{"tools": [{"type": "function", "function": {"name": "é"}}]}],
    "documents": [{"documents": [{"title": "T", "text": "x"}]}],
    "chat_template": [{"chat_template": "{{ messages | length }}"}],
    "add_generation_prompt": [{"add_generation_prompt": True}, {"add_generation_prompt": False}],
    "continue_final_message": [{"continue_final_message": True}, {"continue_final_message": "content"}],
    "sanitize_control_tokens": [{"sanitize_control_tokens": True}],
    "kwargs": [{"enable_thinking": False}],
}
_NO_ARGUMENT = {
    "conversation": "the messages", "tokenize": "render_chat or encode_chat",
    "padding": "of batches", "truncation": "a prompt is never cut silently: one that is too long is refused",
    "max_length": "as truncation", "return_tensors": "of batches", "return_dict": "ids are returned",
    "return_assistant_tokens_mask": "for training", "tokenizer_kwargs": "of the call",
}  # fmt: skip
_TEMPLATE = (
    "{{ tools | tojson }}{{ documents | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ enable_thinking is defined and enable_thinking }}"
)
_USES = {
    "raise_exception": "{{ raise_exception('no') }}", "strftime_now": "{{ strftime_now('%d %b %Y') }}",
    "dict": "{{ dict(a=1) | tojson }}{{ dict.fromkeys([1]) }}", "namespace": "{% set n = namespace(a=1) %}{{ n.a }}",
    "range": "{{ range(3) | list }}", "cycler": "{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}",
    "joiner": "{% set j = joiner() %}{{ j() }}{{ j() }}", "lipsum": "{{ lipsum(n=1) }}",
    "tojson": "{{ {'b': 'é<', 'a': [1]} | tojson(indent=2, sort_keys=true) }}",
    "generation": "{% generation %}x{% endgeneration %}",
    "break, continue": "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}"
    "{% if i == 3 %}{% break %}{% endif %}{% endfor %}",
}  # fmt: skip


def _read_by_source() -> set[str]:
    """Keys that the code of the classes reads from the file."""
    code = "".join(
        inspect.getsource(part)
        for part in (
            PreTrainedTokenizerBase.__init__,
            PreTrainedTokenizerBase._from_pretrained,
            TokenizersBackend.__init__,
        )
    )
    return set(re.findall(r'kwargs(?:\.pop|\.get|\.setdefault)?[(\[]"(\w+)"', code))


def _keys() -> list[str]:
    keys = _read_by_source() | set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES) | {"tokenizer_class", *_WITH}
    for kind in tiny.classes().values():
        keys |= set(tiny.parameters(kind))
    return sorted(keys - _NO_SETTING)


def settings() -> list[str]:
    """The keys, then the arguments of apply_chat_template and the features of templates."""
    arguments = [
        name for name in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters if name != "self"
    ]
    uses = dict.fromkeys([*_compile_jinja_template("").environment.globals, *_USES])
    return [*_keys(), *(f"apply_chat_template({name})" for name in arguments), *(f"template: {name}" for name in uses)]


def rows(work: Path) -> Iterator[Row]:
    transformers.logging.set_verbosity_error()
    bases = _Bases(work)
    for setting in settings():
        if setting.startswith("apply_chat_template("):
            yield _argument(setting, bases)
        elif setting.startswith("template: "):
            yield _use(setting, bases)
        else:
            yield _key(setting, bases)


class _Bases:
    """(folder, transformers' results) of each class; None if it does not tokenize plain text."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.made: dict[str, tuple[Path, list[Any]] | None] = {}
        self.count = 0

    def get(self, name: str) -> tuple[Path, list[Any]] | None:
        if name not in self.made:
            try:
                folder = tiny.make(tiny.classes()[name], self.work / name)
                self.made[name] = folder, tiny.reference(folder)
            except Exception:
                self.made[name] = None
        return self.made[name]

    def changed(self, name: str, **change: Any) -> Path:
        base = self.get(name)
        assert base is not None
        self.count += 1
        return tiny.changed(base[0], self.work / f"{name}-{self.count}", **change)


def _key(key: str, bases: _Bases) -> Row:
    having = [name for name, kind in tiny.classes().items() if key in tiny.parameters(kind)]
    names = dict.fromkeys([*having, *(_CARRIERS if not having or key in _read_by_source() else ())])
    outcomes: dict[Outcome, list[str]] = {}
    said: dict[Outcome, str] = {}
    usable = [name for name in names if bases.get(name) is not None]
    for name in usable or names:
        for value in _values(key, name):
            outcome, detail = _tried(key, value, name, bases)
            outcomes.setdefault(outcome, []).append(name)
            said.setdefault(outcome, f"{value!r}: {detail}")
    order: tuple[Outcome, ...] = ("ignored", "honoured", "refused", "irrelevant")
    outcome = next(o for o in order if o in outcomes)
    detail = "; ".join(f"{o} for {_names(outcomes[o])} ({said[o]})" for o in order if o in outcomes)
    return Row(
        key, outcome, f"{_WHY[key]}. {detail}" if key in _WHY and outcome == "irrelevant" else detail, "transformers"
    )


def _names(names: list[str]) -> str:
    unique = [name.removesuffix("Tokenizer") for name in dict.fromkeys(names)]
    return ", ".join(unique) if len(unique) <= 4 else f"{', '.join(unique[:3])} and {len(unique) - 3} classes more"


def _values(key: str, name: str) -> list[Any]:
    if key in _VALUES:
        values: list[Any] = _VALUES[key]
        return values
    default = tiny.parameters(tiny.classes()[name]).get(key)
    if key.endswith("_token"):
        return [True, False] if key.startswith("add_") else ["<new>"]
    if isinstance(default, bool):
        return [not default]
    return [3, True] if default is None or default is inspect.Parameter.empty else [3]


def _tried(key: str, value: Any, name: str, bases: _Bases) -> tuple[Outcome, str]:
    base = bases.get(name)
    if base is None:
        return "refused", "transformers itself takes no plain text with this class"
    folder = bases.changed(name, **{key: value}, **_WITH.get(key, {}))
    before = tiny.reference(bases.changed(name, **_WITH[key])) if key in _WITH else base[1]
    try:
        expected = tiny.reference(folder)
    except Exception as error:
        return "refused", f"by transformers: {_line(error)}"
    try:
        found = tiny.bundled(folder)
    except ExportError as error:
        return "refused", _line(error)
    if found != expected:
        return "ignored", f"{_first_difference(found, expected)}"
    return ("honoured", "as there") if expected != before else ("irrelevant", "nothing changes there either")


def _argument(setting: str, bases: _Bases) -> Row:
    name = setting.partition("(")[2].removesuffix(")")
    if name in _NO_ARGUMENT:
        return Row(setting, "irrelevant", _NO_ARGUMENT[name], "")
    folder = bases.changed("LlamaTokenizer", chat_template=_TEMPLATE)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), tiny.runtime(folder)
    chat = [*tiny.STRANGE_CHAT, {"role": "assistant", "content": "go on"}]
    for more in _ARGUMENTS.get(name, []):
        expected = theirs.apply_chat_template(chat, return_dict=False, **more)
        given = {"template" if key == "chat_template" else key: value for key, value in more.items()}
        found = ours.encode_chat(chat, given.pop("add_generation_prompt", False), **given)
        if found != expected:
            return Row(setting, "ignored", f"{more}: {found}, expected {expected}", "transformers")
    if name not in _ARGUMENTS:
        return Row(setting, "ignored", "nobody has looked at it", "transformers")
    return Row(setting, "honoured", "; ".join(map(str, _ARGUMENTS[name])), "transformers")


def _use(setting: str, bases: _Bases) -> Row:
    source = _USES.get(setting.removeprefix("template: "))
    if source is None:
        return Row(setting, "ignored", "nobody has looked at it", "transformers")
    base = bases.get("LlamaTokenizer")
    assert base is not None
    theirs, ours = transformers.AutoTokenizer.from_pretrained(base[0]), tiny.runtime(base[0])
    expected = tiny.or_refused(lambda: theirs.apply_chat_template(tiny.CHAT, chat_template=source, tokenize=False))
    try:
        found = ours.render_chat(tiny.CHAT, False, template=source)
    except Exception as error:
        honoured = expected == "refused"
        return Row(setting, "honoured" if honoured else "refused", f"{source}: {_line(error)}", "transformers")
    return Row(setting, "honoured" if found == expected else "ignored", f"{source}: {found!r}", "transformers")


def _first_difference(found: list[Any], expected: list[Any]) -> str:
    ours, theirs = next((a, b) for a, b in zip(found, expected, strict=True) if a != b)
    return f"{str(ours)[:80]}, expected {str(theirs)[:80]}"


def _line(error: Exception) -> str:
    text = re.sub(r"/\S+/", "", " ".join(str(error).split()))  # removes paths
    return f"{type(error).__name__}: {text}"[:160]
