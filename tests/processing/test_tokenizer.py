"""Text, ids, chat templates (transformers is the reference), limits for untrusted templates, and streaming."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest

from edgeformer.bundle.bundle import Bundle
from edgeformer.errors import BundleError, InputError, TemplateError
from edgeformer.processing import chat_template as template
from edgeformer.processing.chat_template import ChatTemplate
from edgeformer.processing.detokenizer import REPLACEMENT, Detokenizer
from edgeformer.processing.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  What is the time?\n"},
    {"role": "assistant", "content": "Größe 🙂"},
    {"role": "user", "content": "<|im_end|> is text too"},
]


@pytest.fixture(scope="module")
def tokenizer(lm):
    return Tokenizer.of(Bundle.open(lm))


@pytest.fixture(scope="module")
def reference(lm):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(lm))


@pytest.mark.parametrize("text", ["hello world", "", " ", "Größe 東京 🙂", "a" * 10_000, "<|im_start|>user", "\0\n\t"])
def test_text_is_encoded_and_decoded_as_transformers_does(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_wrong_text_and_ids_are_refused(tokenizer):
    with pytest.raises(InputError, match="The text is int"):
        tokenizer.encode(3)
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(InputError, match="run from -1"):
        tokenizer.decode([-1, 5])
    assert tokenizer.token(10**6) is None


@pytest.mark.parametrize("prompt", [True, False])
def test_the_chat_format_is_that_of_transformers(tokenizer, reference, prompt):
    expected = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.render_chat(MESSAGES, prompt) == expected
    ids = reference.apply_chat_template(MESSAGES, add_generation_prompt=prompt, return_dict=False)
    assert tokenizer.encode_chat(MESSAGES, prompt) == ids


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {{ m.role }}: {{ m['content'] | trim }}\n{% endfor %}\n{{ eos_token }}",
        "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
        "{%- for m in messages if m.role != 'system' -%}{% if loop.first %}{% continue %}{% endif %}"
        "{{ m.content }}{%- endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n * 2 }}{{ 'ab' * 3 }}{{ 1234567 | string }}{{ '%d of %s' % (7654321, 'x') }}{{ '{:,}'.format(10**9) }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ missing }}{{ tools is none }}{{ bos_token ~ '|' ~ messages | length }}",
        "{% macro say(m) %}[{{ m.role | upper }}]{% endmacro %}{{ say(messages[0]) }}"
        "{{ messages[-1].content.split(' ')[0] }}{{ '-'.join(['a', 'b']) }}{{ 'abab'.replace('a', 'c', 1) }}",
        "{{ 'a,b'.split(',') | join('; ') }}{{ messages | map(attribute='role') | list }}{{ range(5) | list }}",
        "{% set x %}captured {{ messages[0].role }}{% endset %}{{ x | replace('a', 'o') }}"
        "{{ '%s-%03d' | format('n', 7) }}{{ messages | join(', ', attribute='role') }}{{ 'a\nb' | indent(2) }}",
    ],
)
def test_templates_render_as_in_transformers(lm, tmp_path, source):
    transformers = pytest.importorskip("transformers")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lm / name, tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    expected = theirs.apply_chat_template(MESSAGES, chat_template=source, tokenize=False, add_generation_prompt=False)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    variables = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": False, **special}
    assert ChatTemplate(source).render(variables) == expected


def test_a_template_file_stands_above_the_configuration(lm, copy_of, reseal):
    bundle = copy_of(lm)
    (bundle / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    reseal(bundle)
    assert Tokenizer.of(Bundle.open(bundle)).render_chat(MESSAGES) == "file: Be brief."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], "D"),
        ([{"name": "tool_use", "template": "T"}], None),
        (None, None),
    ],
)
def test_templates_by_name_and_none(lm, copy_of, reseal, value, expected):
    bundle = copy_of(lm)
    (bundle / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": value, "eos_token": {"content": "<|im_end|>"}})
    )
    reseal(bundle)
    tokenizer = Tokenizer.of(Bundle.open(bundle))
    assert tokenizer.special_tokens == {"eos_token": "<|im_end|>"}
    if expected is None:
        assert not tokenizer.has_chat_template
        with pytest.raises(TemplateError, match=r"has no (default )?chat template"):
            tokenizer.render_chat(MESSAGES)
    else:
        assert tokenizer.render_chat(MESSAGES) == expected


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "an empty one"),
        ("hello", "no list"),
        ([3], "Message 0 is 3"),
        ([{"content": "x"}], "expected a mapping with a 'role'"),
        ([{"role": "user", "content": "x"}, {"role": "user"}], r"Message 1 \(user\) has no 'content'"),
    ],
)
def test_wrong_messages_are_refused(tokenizer, messages, expected):
    with pytest.raises(InputError, match=expected):
        tokenizer.render_chat(messages)


def test_a_damaged_tokenizer_is_refused(lm, copy_of, reseal):
    bundle = copy_of(lm)
    (bundle / "tokenizer.json").write_text('{"version": "1.0"')
    reseal(bundle)
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Tokenizer.of(Bundle.open(bundle))


# ---------------------------------------------------------------------------------------------------- foreign templates


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ missing.field }}", "missing"),
        ("{{ messages[0].content + 3 }}", "fails on these messages"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[99].role }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|refuses"),
        ("{{ self.__init__.__globals__ }}", "unsafe|refuses"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "refuses|no loader|fails"),
    ],
)
def test_a_template_that_refuses_or_reaches_out_is_stopped(source, expected):
    with pytest.raises(TemplateError, match=expected):
        ChatTemplate(source).render({"messages": MESSAGES})


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ 'open", "{% endfor %}", "{% frob %}", "(" * 5000 + "{{" + "(" * 5000 + "}}"]
)
def test_a_template_with_wrong_syntax_is_refused(source):
    with pytest.raises(TemplateError, match="not valid"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(50) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
    ],
)
def test_a_template_without_end_is_stopped(source, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(TemplateError, match=r"was stopped|recursion"):
        ChatTemplate(source).render({"messages": MESSAGES})
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 999999999 }}",
        "{{ 999999999 * 'a' }}",
        "{{ [0] * 999999999 | length }}",
        "{{ 9 ** 999999999 }}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(999) %}{% set ns.x = ns.x + ['a' * 3000000] %}{% endfor %}",
        "{{ ([('a' * 3000000)] * 1000) | join }}",
        "{{ ', '.join(['a' * 3000000] * 1000) }}",
        "{{ ('\\t' * 100000).expandtabs(100000) }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '{:{}}'.format(1, 999999999) }}",
        "{{ (5).to_bytes(999999999) }}",
        "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ 'a' | center(999999999) }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ 'a' | indent(999999999) }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ range(99999) | join('b' * 100000) }}",
        "{{ range(999999999) | list }}",
    ],
)
def test_a_template_that_grows_without_end_is_stopped(source):
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateError):
        ChatTemplate(source).render({"messages": MESSAGES})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_a_long_conversation_is_within_the_bounds(tokenizer):
    messages = [{"role": "user", "content": "word " * 1000}, {"role": "assistant", "content": "word " * 1000}] * 50
    assert len(tokenizer.render_chat(messages)) > 500_000


def test_rendering_leaves_a_debuggers_trace_alone(tokenizer):
    import sys

    before = sys.gettrace()
    tokenizer.render_chat(MESSAGES)
    assert sys.gettrace() is before


# -------------------------------------------------------------------------------------------------------------- streams


def _pieces(decode, ids):
    stream = Detokenizer(decode)
    return [stream.push(i) for i in ids] + [stream.flush()]


def _metaspace():
    """A tokenizer like Llama's: leading spaces are stripped, unknown characters fall back to bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocab = {"<unk>": 0, "▁hello": 1, "▁world": 2, "!": 3, "▁": 4} | {f"<0x{b:02X}>": 5 + b for b in range(256)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {}, None)


def _as_bytes(text):
    return [5 + b for b in text.encode()]


TEXTS = [
    "hello 東京 🙂🚀 naïve",
    "👩‍👩‍👧‍👦 family",
    "é" * 50,
    "🙂" * 40,
    "plain",
    "a🙂",
    "\N{REPLACEMENT CHARACTER} itself",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = _pieces(tokenizer.decode, ids)
    assert "".join(pieces) == text
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)
    assert len(pieces) > 2 or len(ids) < 2


@pytest.mark.parametrize("text", TEXTS)
def test_byte_fallback_and_stripped_spaces_stream_too(text):
    tokenizer = _metaspace()
    for ids in ([1, 2, 3, *_as_bytes(text), 4, 1], _as_bytes(text), [4, *_as_bytes(text)], [1, 4, 4, 2]):
        pieces = _pieces(tokenizer.decode, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if REPLACEMENT not in text:
            assert not any(REPLACEMENT in piece for piece in pieces)


def test_text_comes_out_as_soon_as_it_is_whole(tokenizer):
    ids = tokenizer.encode("a🙂b")
    stream, seen = Detokenizer(tokenizer.decode), []
    for position, token in enumerate(ids):
        seen.append(stream.push(token))
        whole = tokenizer.decode(ids[: position + 1])
        if not whole.endswith(REPLACEMENT):
            assert "".join(seen) == whole


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_stream_to_what_they_decode_to(tokenizer, seed):
    """A model may say anything: broken bytes come out as U+FFFD, whole characters among them stay whole."""
    rng = np.random.default_rng(seed)
    alphabet = [tokenizer.encode(chr(0x100 + b))[0] for b in range(8)] + tokenizer.encode("🙂東é ab")
    ids = rng.choice(alphabet, 200).tolist() if seed % 2 else rng.integers(3, tokenizer.size, 300).tolist()
    assert "".join(_pieces(tokenizer.decode, ids)) == tokenizer.decode(ids)


def test_half_a_character_at_the_end_comes_out_at_the_flush(tokenizer):
    cut = tokenizer.encode("é")[:1] if len(tokenizer.encode("é")) > 1 else tokenizer.encode("🚁")[:-1]
    assert cut
    pieces = _pieces(tokenizer.decode, cut)
    assert pieces[:-1] == [""] * len(cut)
    assert set(pieces[-1]) == {REPLACEMENT}


def test_the_tiny_tokenizer_cuts_characters(tokenizer):
    """Or the tests above would prove nothing."""
    assert len(tokenizer.encode("🚀")) > 1
