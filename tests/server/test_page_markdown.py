"""The page's Markdown beside markdown-it-py, which follows CommonMark and GitHub's tables, and shares no code."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess

import pytest
from support.page import SCENARIOS, page_folder

from edgeformer.server import page

markdown_it = pytest.importorskip("markdown_it")

CASES = [
    "one\ntwo\n\nthree",
    "# A\n## B ##\n####### no\n#no\n#",
    "Title\n=====\nSub\n---\ntext",
    "a\n***\nb\n- - -\nc",
    "**bold** *it* __bold__ _it_ ***both*** ~~gone~~",
    "snake_case_name and 2 * 3 * 4 and a*b*c",
    "**a*b**c*d*",
    "*a **b** c* **a *b* c**",
    "**open and *closed*",
    "****",
    "** a** b **",
    '"**x**" (**y**)',
    "*a*b* c",
    "~one~ ~~~~",
    "`code` ``a ` b`` ` a ` `a\nb` `open",
    "`*no*` \\*no\\* \\a \\`x\\`",
    "a  \nb\\\nc\nd ",
    "a &amp; b &lt;i&gt; &quot;",
    "<b>bold</b> <script>x</script>",
    "[a](http://b.c) [d](<http://e f> \"t\") [g](http://h/(i)) [j]( http://k 'l' )",
    "[no] [a] (b) [c](d e) [**x** `y`](http://z)",
    "[a [b](http://c) d](/e)",
    "*[a*](http://b)",
    "- a\n- b\n  c\n- d",
    "* a\n* b\n\n* c",
    "+ a\n- b",
    "1. a\n2. b\n10. c",
    "3) a\n4) b",
    "- a\n  - b\n    - c\n  - d\n- e",
    "1. a\n   - b\n\n   c\n2. d",
    "- a\n\n  b\n\nc",
    "a\n- b\n- c",
    "a\n1. b",
    "a\n2. b",
    "- a\n> b",
    "-",
    "- a\n-\n- b",
    "- ```\n  x\n\n  y\n  ```\n- z",
    "> a\n> b\n\n> c",
    "> a\nb",
    "> - a\n> - b\n\nc",
    "> > a\n> b",
    "> ```\n> x\n> ```",
    "```\na\n\nb\n```\nc",
    "```python title\nx\n```",
    "~~~\n```\n~~~",
    "````\n```\n````",
    "```\nopen",
    "  ```\n  a\n b\n  ```",
    "    code\n\n    more\n\ntext",
    "a\n    b",
    "```\n<b>&amp;</b>\n```",
    "| a | b |\n|---|--:|\n| 1 | 2 |\n| 3 |\n\nx",
    "a | b\n:-: | :--\n*c* | `d`",
    "| a |\n|---|\n| b \\| c |",
    "| a | b |\n|---|\nc",
    "a | b\nc | d",
    "x\n| a | b |\n|---|---|\n| 1 | 2 |",
    "- a\n\n\n\n- b\n\n\nc",
    "1. a\n\n   ```\n   b\n   ```\n\n2. c",
    "**Note:** a\n\n* **x**: y\n* **z**: `w`",
    "a\n\n---\n\n## b",
    "1. **One**\n\n   a\n\n2. **Two**\n\n   b",
    "\ta\n\n- b\n\n\tc",
]
LONG = [  # each would take minutes, or the whole stack, without a bound
    "[" * 20_000, "*a " * 20_000, "a**" * 20_000, "_a*" * 20_000, "[a](" * 10_000, "[" * 9_000 + "](x)" * 9_000,
    "![" * 9_000 + "](x)" * 9_000, "*a " * 20_000 + " b*" * 20_000, "> " * 5_000 + "x", "- a\n\n" * 5_000,
    "`a``b```c" * 10_000, "| " * 9_000 + "\n" + "|-" * 9_000, "".join(" " * n + "- a\n" for n in range(300)),
]  # fmt: skip


def parse(texts):
    place = page_folder()
    for name, source in (("static", page.STATIC), ("scenarios", SCENARIOS)):
        shutil.copytree(source, place / name, dirs_exist_ok=True)
    command = ["node", "scenarios/parse.mjs"]
    done = subprocess.run(command, cwd=place, input=json.dumps(texts), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def parsed():
    return dict(zip(CASES, parse(CASES), strict=True))


@pytest.fixture(scope="module")
def long():
    return dict(zip(LONG, parse(LONG), strict=True))


def inside(parts):
    found = ""
    for part in parts:
        match part["type"]:
            case "text":
                found += html.escape(part["text"], quote=False)
            case "code":
                found += f"<code>{html.escape(part['text'], quote=False)}</code>"
            case "break":
                found += "<br>"
            case "link":
                found += f'<a href="{part["href"]}">{inside(part["children"])}</a>'
            case kind:
                tag = "s" if kind == "del" else kind
                found += f"<{tag}>{inside(part['children'])}</{tag}>"
    return found


def shown(blocks, is_item=False):
    found = ""
    for block in blocks:
        match block["type"]:
            case "paragraph":
                text = inside(block["inside"])
                found += f"{text}\n" if is_item else f"<p>{text}</p>"
            case "heading":
                found += f"<h{block['level']}>{inside(block['inside'])}</h{block['level']}>"
            case "code":
                found += f"<pre><code>{html.escape(block['text'], quote=False).rstrip()}</code></pre>"
            case "quote":
                found += f"<blockquote>{shown(block['blocks'], is_item)}</blockquote>"
            case "rule":
                found += "<hr>"
            case "list":
                tag = "ul" if block["start"] is None else "ol"
                start = "" if block["start"] in (None, 1) else f' start="{block["start"]}"'
                items = "".join(f"<li>{shown(one, True)}</li>" for one in block["items"])
                found += f"<{tag}{start}>{items}</{tag}>"
            case "table":
                rows = [("th", block["head"]), *(("td", row) for row in block["rows"])]
                for tag, row in rows:
                    for align, cell in zip(block["align"], row, strict=True):
                        style = f' style="text-align:{align}"' if align else ""
                        found += f"<{tag}{style}>{inside(cell)}</{tag}>"
    return found


def reference(text):
    """markdown-it-py's HTML without what the page has no use for: paragraphs of items, languages, rows."""
    made = markdown_it.MarkdownIt("js-default", {"html": False, "linkify": False}).render(text)
    made = re.sub(r' title="[^"]*"| class="[^"]*"|</?t(able|head|body|r)>', "", made.replace("&quot;", '"'))
    made = made.replace("%20", " ").replace("<br />", "<br>").replace("<hr />", "<hr>")
    found, depth = "", 0
    for part in re.split(r"(</?\w+[^>]*>)", made):
        depth += part == "<li>"
        depth -= part == "</li>"
        if not (depth and part in ("<p>", "</p>")):
            found += part
    found = re.sub(r"\s*(</?(?:p|h\d|ul|ol|li|blockquote|hr|pre|t[hd]|br)\b[^>]*>)\s*", r"\1", found)
    return re.sub(r"\s*</code></pre>", "</code></pre>", found).strip()


def squeezed(text):
    return re.sub(r"\s*(</?(?:p|h\d|ul|ol|li|blockquote|hr|pre|t[hd]|br)\b[^>]*>)\s*", r"\1", text).strip()


@pytest.mark.parametrize("text", CASES)
def test_markdown_is_read_as_the_reference_reads_it(parsed, text):
    assert squeezed(shown(parsed[text])) == reference(text)


def test_a_difference_is_seen(parsed):
    assert squeezed(shown(parsed["- a\n- b\n  c\n- d"])) != reference("- a\n- b\n- c\n- d")


def letters(value):
    if isinstance(value, dict):
        return "".join(letters(value[key]) for key in value if key not in ("type", "text" if "inside" in value else ""))
    if isinstance(value, list):
        return "".join(map(letters, value))
    return "".join(re.findall("[a-e]", value)) if isinstance(value, str) else ""


def test_no_text_is_lost():
    draw = random.Random(0)
    marks = [
        *"abcdeabcde*_)!<&\n\t \\`",
        "**",
        "```",
        "~~",
        "[",
        "](",
        "> ",
        "- ",
        "1. ",
        "# ",
        "\n\n",
        "    ",
        "---",
        "===",
    ]
    texts = ["".join(draw.choices(marks, k=40)) for _ in range(1500)]
    for text, blocks in zip(texts, parse(texts), strict=True):
        assert sorted(letters(blocks)) == sorted(letters(text)), text


def depth(value):
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(depth, children), default=0)


@pytest.mark.parametrize("text", LONG, ids=range(len(LONG)))
def test_hostile_texts_nest_to_a_bounded_depth(long, text):
    assert depth(long[text]) <= 80


def test_depth_is_seen():
    assert depth([[{"children": [{"children": ["x"]}]}]]) == 7
