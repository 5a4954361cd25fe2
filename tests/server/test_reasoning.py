"""How much a model reasons: variables reach its chat template under every API's name for them, or are refused."""

from __future__ import annotations

import httpx
import pytest
from support import serving

import edgeformer
from edgeformer.errors import InputError

CHAT = [{"role": "user", "content": "What is the time?"}]
BODY = {"model": "effort", "messages": CHAT, "max_tokens": 8}
PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "messages": "/v1/messages"}


@pytest.fixture(scope="module")
def model(served):
    return edgeformer.load(served["effort"], threads=1)


def prompt(model, **variables):
    """The text that the template gives, counted in tokens: what `usage` shows."""
    text = model.tokenizer.render_chat(CHAT, **variables)
    assert all(f"effort {variables[name]}" in text for name in variables if name == "reasoning_effort")
    return text


@pytest.mark.parametrize(
    ("route", "fields", "variables"),
    [
        ("chat", {"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ("chat", {"chat_template_kwargs": {}}, {}),
        ("chat", {"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        (
            "chat",
            {"reasoning_effort": "high", "chat_template_kwargs": {"reasoning_effort": "low", "enable_thinking": False}},
            {"reasoning_effort": "low", "enable_thinking": False},
        ),
        ("responses", {"reasoning": {"effort": "minimal", "summary": "auto"}}, {"reasoning_effort": "minimal"}),
        ("messages", {"output_config": {"effort": "max"}}, {"reasoning_effort": "max"}),
        ("messages", {"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ("messages", {"thinking": {"type": "enabled", "budget_tokens": 8}}, {"enable_thinking": True}),
        ("messages", {"thinking": {"type": "adaptive"}}, {}),
    ],
)
def test_the_template_gets_the_variables(server, model, route, fields, variables):
    body = {**BODY, **fields}
    if route == "responses":
        body = {"model": "effort", "input": CHAT, "max_output_tokens": 8, **fields}
    found = httpx.post(server.url + PATHS[route], json=body).json()
    expected = model.generate(prompt(model, **variables), max_new_tokens=8)
    text = {
        "chat": lambda: found["choices"][0]["message"]["content"],
        "responses": lambda: found["output"][0]["content"][0]["text"],
        "messages": lambda: found["content"][0]["text"],
    }[route]()
    assert text == expected.text
    if route == "chat":
        assert found["usage"]["prompt_tokens"] == expected.timings.prompt_tokens
    if route == "responses":
        assert found["reasoning"] == {"effort": "minimal", "summary": None}
    plain = prompt(model)
    assert (prompt(model, **variables) != plain) == bool(variables.keys() - {"enable_thinking"}) or (
        variables.get("enable_thinking") is False
    )


def test_counted_and_rendered_prompts_have_them_too(server, model):
    body = {"model": "effort", "messages": CHAT, "output_config": {"effort": "low"}}
    found = httpx.post(server.url + "/v1/messages/count_tokens", json=body).json()
    text = prompt(model, reasoning_effort="low")
    assert found["input_tokens"] == len(model.tokenizer.encode(text, add_special_tokens=False))
    body = {"model": "effort", "messages": CHAT, "chat_template_kwargs": {"reasoning_effort": "low"}}
    assert httpx.post(server.url + "/apply-template", json=body).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("chat", {"chat_template_kwargs": {"enable_thinkng": False}}, "chat_template_kwargs"),
        ("chat", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ("chat", {"chat_template_kwargs": {"bos_token": "a"}}, "chat_template_kwargs"),
        ("chat", {"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ("chat", {"model": "lm", "reasoning_effort": "low"}, "reasoning_effort"),
        ("chat", {"model": "lm", "reasoning_effort": "none"}, "reasoning_effort"),
        ("responses", {"model": "lm", "reasoning": {"effort": "low"}}, "reasoning.effort"),
        ("responses", {"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ("messages", {"model": "lm", "output_config": {"effort": "low"}}, "output_config.effort"),
        ("messages", {"model": "reasons", "thinking": {"type": "disabled"}}, "thinking.type"),
    ],
)
def test_what_no_template_reads_is_refused(server, route, fields, param):
    body = {**BODY, **fields}
    if route == "responses":
        body = {"model": "effort", "input": CHAT, **fields}
    found = httpx.post(server.url + PATHS[route], json=body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert param in error["message"] if route == "messages" else error["param"] == param


def test_no_effort_is_what_a_switch_says(served, tmp_path):
    """A template that reads a switch and no effort: "none" switches off, other efforts are refused."""
    only = serving.SWITCHED.partition("{% endif %}")[2]
    bundle = serving.with_text(served["lm"], tmp_path / "switch", only)
    with serving.running([bundle]) as one:
        url = one.url + PATHS["chat"]
        body = {"messages": CHAT, "max_tokens": 4}
        counts = [
            httpx.post(url, json=body | more).json()["usage"]["prompt_tokens"]
            for more in ({}, {"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}})
        ]
        assert counts[0] < counts[1] == counts[2]
        assert httpx.post(url, json=body | {"reasoning_effort": "low"}).json()["error"]["param"] == "reasoning_effort"


def test_the_argument_of_generate(model):
    found = model.generate(CHAT, chat_template_kwargs={"reasoning_effort": "low"}, max_new_tokens=6)
    assert found.text == model.generate(prompt(model, reasoning_effort="low"), max_new_tokens=6).text
    assert model.tokenizer.chat_variables == {"enable_thinking", "reasoning_effort"}
    with pytest.raises(InputError, match="reads no effort; it reads enable_thinking, reasoning_effort"):
        model.generate(CHAT, chat_template_kwargs={"effort": "low"})
    with pytest.raises(InputError, match="chat_template_kwargs is for a chat"):
        model.generate("hello", chat_template_kwargs={"reasoning_effort": "low"})
