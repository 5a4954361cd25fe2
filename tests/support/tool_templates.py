"""Chat templates in the styles that are in use, each with its tool calls; and a tokenizer for them."""

from __future__ import annotations

import functools

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgeformer.processing.tokenizer import Tokenizer as OurTokenizer

HEAD = "{{ bos_token }}{% if tools %}<|sys|>{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|end|>\n{% endif %}"
OTHERS = "{% for m in messages %}{% if m.role != 'assistant' %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% else %}"
PROMPT = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
CALLS = "{% for call in m.tool_calls %}{% set f = call.function %}"
END = "<|end|>\n"


def chat(body: str, prompt: str = PROMPT, start: str = "<|assistant|>\n", end: str = END) -> str:
    return HEAD + OTHERS + start + body + end + prompt


def tagged(before: str, call: str, between: str, after: str, content: str = "{{ m.content }}", **more) -> str:
    """Content, then all calls between `before` and `after`."""
    between = between.replace("\n", "{{ '\n' }}")  # a line break behind a block is removed
    joined = CALLS + call + "{% if not loop.last %}" + between + "{% endif %}{% endfor %}"
    return chat(content + "{% if m.tool_calls %}" + before + joined + after + "{% endif %}", **more)


def each(value: str, separator: str = "", items: str = "f.arguments | items") -> str:
    """A loop over the arguments."""
    joined = "{% if not loop.last %}" + separator + "{% endif %}" if separator else ""
    return "{% for k, v in " + items + " %}" + value + joined + "{% endfor %}"


JSON_CALL = '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}'
XML_VALUE = "{{ v if v is string else v | tojson }}"
THOUGHT = (
    "{% if loop.last or m.reasoning_content %}<think>\n{{ (m.reasoning_content or '').strip() }}\n</think>\n\n"
    "{% endif %}"
)
QUOTED = (
    "{% macro show(v) %}{% if v is string %}<|q|>{{ v }}<|q|>{% elif v is boolean %}{{ 'true' if v else 'false' }}"
    "{% elif v is none %}null{% elif v is mapping %}{ {%- for k, x in v | dictsort %}{{ k }}:{{ show(x) }}"
    "{{ ',' if not loop.last }}{% endfor -%} }{% elif v is sequence %}[{% for x in v %}{{ show(x) }}"
    "{{ ',' if not loop.last }}{% endfor %}]{% else %}{{ v }}{% endif %}{% endmacro %}"
)
PYTHON = (
    '{% macro show(v) %}{% if v is string %}{{ "\'" + v + "\'" }}{% elif v is mapping %}{{ v | tojson }}'
    "{% else %}{{ v | string }}{% endif %}{% endmacro %}"
)
ALONE = "{% if not m.tool_calls %}{{ m.content }}{% endif %}"  # a message has text or calls
RAISE_TWO = "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call only') }}{% endif %}"
NINE = "{% if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"

TEMPLATES: dict[str, str] = {
    "tags around each JSON call": tagged(
        "{% if m.content %}\n{% endif %}", "<tool_call>\n" + JSON_CALL + "\n</tool_call>", "\n", ""
    ),
    "tags, with reasoning": tagged(
        "{% if m.content %}\n{% endif %}", "<tool_call>\n" + JSON_CALL + "\n</tool_call>", "\n", "",
        content=THOUGHT + "{{ m.content }}",
    ),
    "a bare object, one call": tagged(
        RAISE_TWO, '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}', "", "", content=ALONE
    ),
    "a list with ids of nine characters": tagged(
        "[TOOL_CALLS] [",
        NINE + '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}, "id": "{{ call.id }}"}',
        ", ", "]", end="</s>",
    ),
    "a token, the name, a token, JSON": tagged("", "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}", "", ""),
    "a list on lines, numbered, after a plan": chat(
        "{% if m.tool_calls %}<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|><|START_ACTION|>[\n" + CALLS
        + '    {"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ f.name }}", "parameters": '
        "{{ f.arguments | tojson }}}{{ ',' if not loop.last }}\n{% endfor %}]<|END_ACTION|>"
        "{% else %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}"
    ),
    "a token and a list": tagged("<|tool_call|>[", "{{ f | tojson }}", ", ", "]", content=ALONE),
    "tokens around a list": tagged("<|tool_call|>[", JSON_CALL, ", ", "]<|/tool_call|>"),
    "a bare list": tagged("[", JSON_CALL, ", ", "]", content=ALONE),
    "nested tokens, a code fence, arguments as text": tagged(
        "<｜calls▁begin｜>",
        "<｜call▁begin｜>function<｜sep｜>{{ f.name + '\n```json\n' + f.arguments }}\n```<｜call▁end｜>", "\n",
        "<｜calls▁end｜>",
    ),
    "nested tokens, arguments as text": tagged(
        "<｜calls▁begin｜>", "<｜call▁begin｜>{{ f.name + '<｜sep｜>' + f.arguments }}<｜call▁end｜>", "",
        "<｜calls▁end｜>",
    ),
    "function tags, JSON": tagged("", "<function={{ f.name }}>{{ f.arguments | tojson }}</function>", "\n", ""),
    "a name and a line of JSON": tagged("", "{{ f.name }}\n{{ f.arguments | tojson }}", "\n", "", content=ALONE),
    "an arrow before the name": tagged("", ">>>{{ f.name }}\n{{ f.arguments | tojson }}", "", ""),
    "channels": chat(
        "{% if m.tool_calls %}"
        + CALLS + " to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{ f.arguments | tojson }}<|call|>"
        "{% endfor %}{% else %}<|channel|>final<|message|>{{ m.content }}<|end|>\n{% endif %}",
        PROMPT.replace("<|assistant|>\n", "<|start|>assistant"), "<|start|>assistant", "",
    ),
    "function and parameter tags": tagged(
        "{% if m.content %}\n\n{% endif %}",
        "<tool_call>\n<function={{ f.name }}>\n" + each("<parameter={{ k }}>\n" + XML_VALUE + "\n</parameter>\n")
        + "</function>\n</tool_call>",
        "\n", "",
    ),
    "key and value tags, with reasoning": chat(
        "\n<think>{{ (m.reasoning_content or '').strip() }}</think>"
        "{% if m.content %}\n{{ m.content.strip() }}{% endif %}" + CALLS + "{{ '\n' }}<tool_call>{{ f.name }}\n"
        + each("<arg_key>{{ k }}</arg_key>\n<arg_value>" + XML_VALUE + "</arg_value>\n") + "</tool_call>{% endfor %}",
        PROMPT.replace("<|assistant|>\n", "<|assistant|>"), "<|assistant|>", "",
    ),
    "invoke tags, the prompt opens reasoning": chat(
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
        "{% if m.tool_calls %}{{ '\n' }}<m:tool_call>\n" + CALLS + '<invoke name="{{ f.name }}">\n'
        + each('<parameter name="{{ k }}">' + XML_VALUE + "</parameter>\n") + "</invoke>\n{% endfor %}</m:tool_call>"
        "{% endif %}",
        PROMPT.replace("<|assistant|>\n", "<|assistant|>\n<think>\n"),
    ),
    "Python calls, JSON values": tagged("[", "{{ f.name }}(" + each("{{ k }}={{ v | tojson }}", ", ") + ")", ", ", "]"),
    "Python calls in tokens, plain quotes": PYTHON + tagged(
        "<|tool_call_start|>[", "{{ f.name }}(" + each("{{ k }}={{ show(v) }}", ", ") + ")", ", ",
        "]<|tool_call_end|>",
    ),
    "own quotes, sorted keys": QUOTED + tagged(
        "", "<|tool_call>call:{{ f.name }}{ {%- " + each("{{ k }}:{{ show(v) }}", ",", "f.arguments | dictsort")[3:]
        + "}<tool_call|>", "", "",
    ),
    "objects on lines in one frame": tagged(
        "<tool_calls>{{ '\n' }}", JSON_CALL, "\n", "{{ '\n' }}</tool_calls>"
    ),
    "an id behind the name": tagged(
        "", "[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ call.id }}[ARGS]{{ f.arguments | tojson }}", "", ""
    ),
    "an id before the name": tagged(
        "<calls>", "<call>{{ call.id }}<name>{{ f.name }}<args>{{ f.arguments | tojson }}</call>", "", "</calls>"
    ),
    "numbered names": tagged(
        "<calls>", "<call>functions.{{ f.name }}:{{ loop.index0 }}<args>{{ f.arguments | tojson }}</call>", "",
        "</calls>",
    ),
    "parameters that say whether they are texts": tagged(
        "\n\n<F|calls>\n",
        '<F|invoke name="{{ f.name }}">\n' + each(
            '<F|parameter name="{{ k }}" string="{{ \'true\' if v is string else \'false\' }}">' + XML_VALUE
            + "</F|parameter>\n"
        ) + "</F|invoke>",
        "\n", "\n</F|calls>",
    ),
    "what begins every answer": chat(
        "<begins>{{ m.content }}{% if m.tool_calls %}" + CALLS + "<tool_call>" + JSON_CALL + "</tool_call>{% endfor %}"
        "{% endif %}"
    ),
    "printed by Python": tagged("<tool>", "{{ {'name': f.name, 'arguments': f.arguments} }}", ", ", "</tool>"),
    "the name is a key": tagged("<calls>", '{"{{ f.name }}": {{ f.arguments | tojson }}}', ", ", "</calls>"),
    "in the shape of the API": tagged(
        "<calls>[", '{"type": "function", "function": ' + JSON_CALL + "}", ", ", "]</calls>"
    ),
}  # fmt: skip

# why: a part of the reason
UNKNOWN: dict[str, tuple[str, str]] = {
    "ignores calls": (chat("{{ m.content }}"), "does not show the tool calls"),
    "refuses calls": (
        chat("{% if m.tool_calls %}{{ raise_exception('no tools') }}{% endif %}{{ m.content }}"),
        "no tools",
    ),
    "an id instead of the name": (
        tagged("", "<c>{{ call.id }}<a>{{ f.arguments | tojson }}</c>", "", ""),
        "does not show",
    ),
    "shows names only": (tagged("", "<call>{{ f.name }}</call>", "", ""), "kq7a"),
    "values without an end": (tagged("", "@{{ f.name }}" + each(" {{ k }} {{ v }}"), "", ""), "without quotes"),
    "arguments first": (tagged("", "{{ f.arguments | tojson }} -> {{ f.name }}", "; ", ""), "before the name"),
    "wrong syntax": ("{% for %}", "not valid"),
    "refuses the answer": (HEAD + "{{ raise_exception('never') }}", "never"),
}

SPECIAL = [
    "<|sys|>", "<|user|>", "<|assistant|>", "<|end|>", "<s>", "</s>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<|START_ACTION|>", "<|END_ACTION|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>",
    "<|END_RESPONSE|>", "<|tool_call|>", "<|/tool_call|>", "<｜calls▁begin｜>", "<｜call▁begin｜>", "<｜sep｜>",
    "<｜call▁end｜>", "<｜calls▁end｜>", "<|tool_call_start|>", "<|tool_call_end|>", "<|q|>", "<|tool_call>",
    "<tool_call|>", "<|channel|>", "<|message|>", "<|call|>", "<|start|>",
]  # fmt: skip
PLAIN_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added, and not special


@functools.cache
def _backend_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_TOKENS])
    return backend.to_str()


def tokenizer(template: str | None) -> OurTokenizer:
    """One token a byte, and the tokens of the templates."""
    return OurTokenizer(Tokenizer.from_str(_backend_json()), {"bos_token": "<s>", "eos_token": "<|end|>"}, template)


def matcher_tokenizer():
    """The same vocabulary for llguidance. Byte-level BPE writes bytes as printable characters (GPT-2)."""
    from llguidance import LLTokenizer, TokenizerWrapper

    backend = Tokenizer.from_str(_backend_json())
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
    added = backend.get_added_tokens_decoder()
    size = backend.get_vocab_size()

    class Wrapped:
        eos_token_id = backend.token_to_id("<|end|>")
        bos_token_id = None
        tokens = tuple(
            added[n].content.encode() if n in added else bytes([letters[backend.id_to_token(n)]]) for n in range(size)
        )
        special_token_ids = tuple(n for n, token in added.items() if token.special)

        def __call__(self, text):
            text = text if isinstance(text, str) else text.decode()
            return backend.encode(text, add_special_tokens=False).ids

    return LLTokenizer(TokenizerWrapper(Wrapped()))


# Three tools: of many types, without arguments, and of a schema that refers to another.
WEATHER = {
    "name": "get_weather",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "days": {"type": "integer", "minimum": 1, "maximum": 500},
            "unit": {"enum": ["C", "F"]},
            "exact": {"type": "boolean"},
            "more": {
                "type": "object",
                "properties": {"tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2}},
                "additionalProperties": False,
            },
            "note": {"type": "string", "maxLength": 6, "nullable": True},
        },
        "required": ["city", "days"],
    },
}
STOP = {"name": "stop", "parameters": {"type": "object", "properties": {}}}
GET = {"name": "get", "parameters": {"type": "object", "properties": {"key": {"$ref": "#/$defs/key"}},
       "required": ["key"], "$defs": {"key": {"type": "integer", "minimum": 0, "maximum": 99}}}}  # fmt: skip
TOOLS = [WEATHER, STOP, GET]
