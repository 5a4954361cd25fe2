"""The requests that editors and apps send, as their sources and logs show them, get useful answers.

docs/serving.md has the line of each that points it here. Each request has the fields that the client always sends, also
where they ask for nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
READ = {
    "type": "object",
    "properties": {"path": {"enum": ["a.py", "b.py"]}},
    "required": ["path"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "read_file", "description": "Reads.", "parameters": READ}}
SYSTEM = {"role": "system", "content": "You are a coding agent."}
USER = {"role": "user", "content": [{"type": "text", "text": "Read"}, {"type": "text", "text": "a.py"}]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": '{"path": "a.py"}'}}
TURNS = [
    SYSTEM,
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "print(1)"}]},
]
USAGE = {"include_usage": True}

# name in the docs -> chat requests
CHATS = {
    "Continue": [
        {"messages": [SYSTEM, USER], "max_tokens": 30, "temperature": 0.5, "stream": True, "stop": []},
        {"messages": TURNS, "max_tokens": 30, "stream": True, "tools": [TOOL], "parallel_tool_calls": False},
    ],
    "Cline": [
        {"messages": [SYSTEM, USER], "temperature": 0, "stream": True, "stream_options": USAGE, "max_tokens": 30},
        {
            "messages": TURNS,
            "temperature": 0,
            "stream": True,
            "stream_options": USAGE,
            "tools": [TOOL],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "max_completion_tokens": 30,
        },
    ],
    "Open WebUI": [
        {"messages": [USER], "stream": True, "stream_options": USAGE, "max_tokens": 30},
        {"messages": [USER], "stream": False, "max_completion_tokens": 30},  # titles and tags
    ],
    "aider": [  # as 0.86.2 sends it, but for max_tokens: examples of edits as turns, all contents texts
        {
            "messages": [
                SYSTEM,
                {"role": "user", "content": "Change the greeting."},
                {"role": "assistant", "content": "show_greeting.py\n```\nprint(1)\n```"},
                {"role": "user", "content": "I switched to a new code base."},
                {"role": "assistant", "content": "Ok."},
                {"role": "user", "content": "Change a.py."},
            ],
            "temperature": 0,
            "stream": True,
            "max_tokens": 30,
        }
    ],
    "Zed": [
        {
            "messages": TURNS,
            "max_completion_tokens": 30,
            "stop": [],
            "stream": True,
            "stream_options": USAGE,
            "temperature": 1.0,
            "tools": [TOOL],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
            "prompt_cache_key": "thread-1",
        }
    ],
    "JetBrains": [{"messages": [SYSTEM, USER], "stream": True, "temperature": 0.0, "max_tokens": 30}],
    "llm": [{"messages": [USER], "stream": True, "stream_options": USAGE, "max_tokens": 30}],
    "LiteLLM": [
        {
            "messages": TURNS,
            "stream": True,
            "stream_options": USAGE,
            "tools": [TOOL],
            "max_tokens": 30,
            "n": 1,
            "user": "a",
            "response_format": {"type": "text"},
        }
    ],
}


def chunks(text):
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("name", "body"),
    [pytest.param(name, body, id=f"{name}-{i}") for name, bodies in CHATS.items() for i, body in enumerate(bodies)],
)
def test_a_chat_of_an_editor_is_answered(server, name, body):
    headers = {"Authorization": "Bearer none", "User-Agent": name, "HTTP-Referer": "https://a.example", "X-Title": name}
    found = httpx.post(server.url + "/v1/chat/completions", json=body | {"model": "calls"}, headers=headers, timeout=60)
    assert found.status_code == 200, found.text
    if not body["stream"]:
        assert found.json()["choices"][0]["message"]["content"]
        return
    parts = chunks(found.text)
    assert any(choice["delta"].get("content") for part in parts for choice in part["choices"])
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    usage = [part["usage"] for part in parts if part.get("usage")]
    assert len(usage) == ("stream_options" in body)
    assert not usage or usage[0]["total_tokens"] > 30


@pytest.mark.parametrize("name", ["Open WebUI", "Continue", "JetBrains", "Zed"])
def test_an_editor_lists_the_models(server, name):
    found = httpx.get(server.url + "/v1/models", headers={"Authorization": "Bearer none", "User-Agent": name}).json()
    assert found["object"] == "list"
    assert {"calls", "encoder"} <= {one["id"] for one in found["data"]}
    assert all(one["object"] == "model" and one["owned_by"] for one in found["data"])


def test_documents_are_embedded(server):
    """Open WebUI's knowledge, Continue's index."""
    body = {"model": "encoder", "input": ["a", "b"], "encoding_format": "float"}
    assert len(httpx.post(server.url + "/v1/embeddings", json=body).json()["data"]) == 2


# ------------------------------------------------------------------------------------------------------ Claude Code

CLAUDE = {
    "model": "calls",
    "max_tokens": 60,
    "stream": True,
    "temperature": 1,
    "system": [
        {"type": "text", "text": "You are a coding agent.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral", "ttl": "1h"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "<system-reminder>x</system-reminder>"}]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t_1", "name": "Read", "input": {"path": "a.py"}}],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t_1",
                    "content": [{"type": "text", "text": "print(1)"}],
                    "is_error": False,
                    "cache_control": {"type": "ephemeral"},
                }
            ],
        },
    ],
    "tools": [
        {
            "name": "Read",
            "description": "Reads.",
            "input_schema": {**READ, "$schema": "https://json-schema.org/draft/2020-12/schema"},
            "eager_input_streaming": True,
        }
    ],
    "metadata": {"user_id": "user_1_account__session_2"},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
}
HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "Authorization": "Bearer none",
    "x-app": "cli",
}


@pytest.mark.parametrize("choice", [None, {"type": "any"}])
def test_claude_code_gets_its_events(server, choice):
    body = CLAUDE if choice is None else {**CLAUDE, "tool_choice": choice, "max_tokens": 200}
    found = httpx.post(server.url + "/v1/messages?beta=true", json=body, headers=HEADERS, timeout=60)
    assert found.status_code == 200, found.text
    kinds = re.findall(r"^event: (\w+)$", found.text, re.MULTILINE)
    assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
    assert ('"type":"tool_use"' in found.text) == (choice is not None)


def test_claude_code_counts_tokens(server):
    body = {name: CLAUDE[name] for name in ("model", "messages", "tools", "system", "thinking")}
    found = httpx.post(server.url + "/v1/messages/count_tokens?beta=true", json=body, headers=HEADERS)
    assert found.json()["input_tokens"] > 30


# ------------------------------------------------------------------------------------------------------------- Codex

CODEX = {
    "model": "calls",
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "<permissions>"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Read a.py."}]},
    ],
    "tools": [
        {"type": "function", "name": "shell", "description": "Runs.", "strict": False, "parameters": READ},
        {"type": "function", "name": "update_plan", "description": "Plans.", "strict": False, "parameters": READ},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": None,
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-conversation",
    "client_metadata": {"x-codex-installation-id": "1"},
}


@pytest.mark.parametrize("more", [{}, {"reasoning": {"summary": "auto"}}, {"include": [], "client_metadata": None}])
def test_codex_gets_its_events_and_goes_on(server, more):
    body = {**CODEX, **more, "max_output_tokens": 40}  # so that this random model ends
    found = httpx.post(server.url + "/v1/responses", json=body, headers={"originator": "codex_cli_rs"}, timeout=60)
    assert found.status_code == 200, found.text
    kinds = re.findall(r"^event: (\S+)$", found.text, re.MULTILINE)
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete")
    done = [part for part in re.findall(r"^data: ({.*)$", found.text, re.MULTILINE) if "output_item.done" in part]
    said = [json.loads(part)["item"] for part in done]
    assert said
    turn = [
        *said,
        {"type": "function_call", "name": "shell", "arguments": '{"path":"a.py"}', "call_id": "c_1"},
        {"type": "function_call_output", "call_id": "c_1", "output": "print(1)"},
    ]
    again = httpx.post(server.url + "/v1/responses", json={**body, "input": [*body["input"], *turn]}, timeout=60)
    assert again.status_code == 200, again.text


@pytest.mark.parametrize("name", [*CHATS, "Claude Code", "Codex"])
def test_the_page_says_how_to_point_it_here(name):
    section = PAGE[PAGE.index("## Editors and apps") :]
    assert f"| {name}" in section.partition("\n## ")[2] or f"| {name}" in section
