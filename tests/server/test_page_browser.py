"""The chat page in headless Chromium: real answers of a tiny model, and answers that try what they must not.

tests/server/page holds the scenarios, in JavaScript. Each also fails if the page asks for anything elsewhere, or has an
error.
"""

from __future__ import annotations

import json
import subprocess

import pytest
from support.page import Driver, ScenarioFailed, page_folder
from support.serving import running, wait_for

from edgeformer.server import page

pytestmark = pytest.mark.timeout(180)
KEY = "s3cret"

SAMPLE = (
    """# Title

Some **bold**, *slanted*, ~~old~~ and `code` with a [link](https://example.org/a) and <b>no HTML</b>.

1. one
   - inner
2. two

- [x] done
- [ ] open

> quoted

| name | size |
|:-----|-----:|
| a \\| b | 1 |

```python
print("a very long line " + "that goes on and on " * 3, "until it is far too wide for a telephone's screen")
```

---
Done. https://example.org/"""
    + "x" * 200
)

HOSTILE = [
    "<script>window.stolen = 1</script>",
    "<img src=x onerror='window.stolen = 1'><svg onload=window.stolen=1><iframe srcdoc='<script>1</script>'>",
    "[click](javascript:window.stolen=1) [b]( javascript:window.stolen=1) [c](JaVaScRiPt:window.stolen=1)",
    "[a](java\tscript:window.stolen=1) [b](&#106;avascript:window.stolen=1) [c](data:text/html,<script>1</script>)",
    "![x](https://elsewhere.example/x.png) ![y](javascript:window.stolen=1) <https://elsewhere.example>",
    '[q](https://a.example/"onmouseover="window.stolen=1) [r](https://b.example "t\\" onclick=window.stolen=1")',
    "```html\n</code></pre><script>window.stolen = 1</script>\n```\n`<script>window.stolen=1</script>`",
    '```" onmouseover="window.stolen=1\ntext\n```',
    "| <script>window.stolen=1</script> | b |\n|---|---|\n| <img src=x onerror=window.stolen=1> | `<i>` |",
    "# <style>*{display:none}</style>\n<form action=https://elsewhere.example><input></form>\n<base href=//evil>",
    "[f](file:///etc/passwd) [v](vbscript:x) [r](/v1/models) [p](//elsewhere.example) [m](mailto:a@b.example)",
    "<meta http-equiv=refresh content='0;url=https://elsewhere.example'><link rel=stylesheet href=//evil>",
]


@pytest.fixture(scope="module")
def driver():
    one = Driver()
    yield one
    one.close()


@pytest.fixture(scope="module")
def small(served):
    """A server for one answer at a time, without a queue."""
    with running([f"lm={served['lm']}"], {"max_sequences": 1, "queue": 0}) as one:
        yield one


def test_an_answer_streams_and_has_its_numbers(driver, server, client, slow):
    found = driver.run("answers.streams", server.url, model="lm")
    first, second = found["bodies"]
    assert first["stream"] and first["max_tokens"] == 130
    for body in (first, second):
        del body["stream"], body["stream_options"]
    answer = client.chat.completions.create(**second)
    assert found["text"] == answer.choices[0].message.content  # the law of the same tokens, through the page
    for line in found["numbers"]:
        assert "lm · 130 tokens · " in line and " tokens/s · " in line and " cached · first token after " in line
    assert f" of {answer.usage.prompt_tokens} prompt tokens cached" in found["numbers"][1]
    assert " 0 of " not in found["numbers"][1]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stopping_frees_the_sequence(driver, small, slow, way):
    driver.run("answers.stops", small.url, way=way)
    wait_for(lambda: small.loaded("lm").streams == 0 and not small.scheduler("lm").running)


@pytest.mark.parametrize("scenario", ["regenerates", "edits", "attaches", "refuses"])
def test_asking_again_and_otherwise(driver, server, scenario):
    driver.run(f"answers.{scenario}", server.url)


def test_settings_and_the_model_reach_the_request(driver, server):
    settings = {
        "System prompt": "Be brief.", "Temperature": 0.7, "Top p": 0.9, "Top k": 40, "Min p": 0.05, "Longest answer": 5,
        "Seed": 3, "Repeat penalty": 1.1, "Presence penalty": 0.5, "Frequency penalty": -0.5, "Stop at": "END\n###",
    }  # fmt: skip
    found = driver.run("answers.sends", server.url, settings=settings, model="calls")
    assert found["options"] == ["lm", "calls", "reasons"]  # the encoder does not chat
    assert found["numbers"].startswith("calls · ")
    assert found["body"] == {
        "model": "calls", "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 5, "seed": 3, "repeat_penalty": 1.1,
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "stop": ["END", "###"],
    }  # fmt: skip


def test_reasoning_is_folded(driver, server):
    assert driver.run("answers.reasons", server.url, model="reasons")


# ---------------------------------------------------------------------------------------------------------- safety


def test_a_hostile_answer_is_text(driver, server):
    texts = driver.run("safety.hostile", server.url, texts=HOSTILE)
    assert texts[0] == HOSTILE[0] and texts[1] == HOSTILE[1]
    assert "</code></pre><script>window.stolen = 1</script>" in texts[6]


def test_the_policy_holds(driver, server):
    with pytest.raises(ScenarioFailed) as caught:  # each refusal is also an error of the page, so the driver sees it
        driver.run("safety.policy", server.url)
    assert "AssertionError" not in str(caught.value), str(caught.value)
    assert str(caught.value).count("Content Security Policy") >= 3


@pytest.mark.parametrize(("scenario", "told"), [("elsewhere", "127.0.0.1:9"), ("broken", "undefined")])
def test_the_driver_sees_what_it_must_refuse(driver, server, scenario, told):
    with pytest.raises(ScenarioFailed, match=told):
        driver.run(f"safety.{scenario}", server.url)


def test_markdown_becomes_elements(driver, server):
    found = driver.run("safety.markdown", server.url, text=SAMPLE)
    for part in (
        '- heading "Title" [level=3]', "- strong: bold", "- emphasis: slanted", "- deletion: old", "- code: code",
        '- link "link":', "- /url: https://example.org/a", "<b>no HTML</b>", '- img "done"', "- blockquote:",
        "- separator",
        '- columnheader "size"', '- cell "a | b"', '- region "Code, python":',
    ):  # fmt: skip
        assert part in found["snapshot"], found["snapshot"]
    assert found["copied"].startswith('print("a very')
    assert found["numbers"] == "lm · 5 tokens · 50.0 tokens/s · 7 of 10 prompt tokens cached · first token after 13 ms"


# ----------------------------------------------------------------------------------------------- chats and errors


@pytest.mark.parametrize("scenario", ["survives", "lists", "files", "tabs"])
def test_chats_are_kept(driver, server, scenario):
    driver.run(f"chats.{scenario}", server.url)


def test_a_prompt_that_is_too_long_is_told_in_the_servers_words(driver, server):
    told = driver.run("errors.tooLong", server.url)
    assert "tokens" in told and "1024" in told


def test_a_full_server_is_told_and_tried_again(driver, small, slow):
    held = {
        "messages": [{"role": "user", "content": "hello"}], "max_tokens": 900, "ignore_eos": True, "speculation": "off",
        "stream": True,
    }  # fmt: skip
    found = driver.run("errors.busy", small.url, held=held)
    assert "Try again in " in found["told"] and found["told"].count(" s.") == 1
    assert found["spoken"].startswith("The answer failed: ")


@pytest.mark.parametrize("scenario", ["unreachable", "breaks"])
def test_what_breaks_is_told(driver, server, scenario):
    driver.run(f"errors.{scenario}", server.url)


def test_a_key_is_asked_for(driver, served):
    with running([f"lm={served['lm']}"], {"api_key": KEY}) as one:
        driver.run("errors.key", one.url, key=KEY)


# ------------------------------------------------------------------------------------------------------------ use


def test_the_keyboard_is_enough(driver, server):
    driver.run("use.keyboard", server.url)


def test_a_phone_shows_it_all(driver, server):
    phone = {"viewport": {"width": 360, "height": 700}, "hasTouch": True, "isMobile": True}
    driver.run("use.phone", server.url, text=SAMPLE, context=phone)


def test_themes(driver, server):
    driver.run("use.themes", server.url)


@pytest.mark.parametrize("colors", ["light", "dark"])
def test_axe_finds_nothing_serious(driver, server, colors):
    driver.run("use.accessible", server.url, text=SAMPLE, colors=colors)


def test_axe_finds_what_it_must(driver, server):
    with pytest.raises(ScenarioFailed, match="select-name"):
        driver.run("use.inaccessible", server.url)


def test_a_screen_reader_finds_its_way(driver, server):
    found = driver.run("use.tree", server.url)
    assert found["spoken"] == "Answer: Good **day**."
    assert not found["live"]  # else each token would be read
    for part in (
        '- complementary "Chats":', '- navigation "Earlier chats":', "- banner:", "- main:", '- combobox "Model":',
        '- list "Messages":', '- heading "You" [level=2]', '- heading "Answer" [level=2]', '- textbox "Message":',
        '- button "Send" [disabled]', '- button "Attach text files"', '- button "Settings"',
    ):  # fmt: skip
        assert part in found["tree"], found["tree"]


# ---------------------------------------------------------------------------------------------------------- types


def test_the_types_of_the_modules_hold(tmp_path):
    """TypeScript checks the JSDoc types."""
    options = {
        "allowJs": True, "checkJs": True, "noEmit": True, "strict": True, "noUnusedLocals": True,
        "noUnusedParameters": True, "target": "es2023", "module": "es2022", "moduleResolution": "bundler", "types": [],
        "lib": ["es2023", "dom", "dom.iterable", "dom.asynciterable"],
    }  # fmt: skip
    wrong = tmp_path / "wrong.js"
    wrong.write_text("/** @param {number} x */\nexport const f = (x) => x.length;\n")
    for include, is_right in ((f"{page.STATIC}/*.js", True), (str(wrong), False)):
        (tmp_path / "tsconfig.json").write_text(json.dumps({"compilerOptions": options, "include": [include]}))
        command = [page_folder() / "node_modules" / ".bin" / "tsc", "-p", tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (done.returncode == 0) == is_right, done.stdout
