"""The files of the chat page: their routes, headers, the key, the flag, and the package."""

from __future__ import annotations

import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import httpx
import pytest
from support.serving import running

from edgeformer.server import page
from edgeformer.server.app import GROUPS

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in page.STATIC.iterdir())
PATHS = [one.path for one in page.endpoints()]
KEY = "s3cret"


@pytest.fixture(scope="module")
def locked(served):
    with running([f"lm={served['lm']}"], {"api_key": KEY}) as one:
        yield one


def test_every_file_has_a_route_and_a_type():
    assert len(PATHS) == len(FILES) and "/" in PATHS
    assert {path.suffix for path in FILES} == set(page.KINDS)


@pytest.mark.parametrize("path", PATHS)
def test_files_come_with_the_policy(server, path):
    found = httpx.get(server.url + path)
    assert found.status_code == 200 and found.content
    assert found.headers["content-security-policy"] == page.POLICY
    assert found.headers["x-content-type-options"] == "nosniff"
    again = httpx.get(server.url + path, headers={"If-None-Match": found.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert again.headers["content-security-policy"] == page.POLICY


@pytest.mark.parametrize(
    "part",
    [
        "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:",
        "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'", "require-trusted-types-for 'script'",
    ],
)  # fmt: skip
def test_the_policy_is_strict(part):
    assert part in page.POLICY.split("; ")
    assert "unsafe" not in page.POLICY and "*" not in page.POLICY


@pytest.mark.parametrize("path", PATHS)
def test_files_need_no_key(locked, path):
    assert httpx.get(locked.url + path).status_code == 200
    assert httpx.head(locked.url + path).status_code == 200
    assert httpx.post(locked.url + path).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "/page", "/page/", "/page/nothing.js", "/page/index.html", "/page/../v1/models", "/page/..%2fv1/models", "//",
        "/page/app.js/", "/page//app.js", "/PAGE/app.js", "/page/%2e%2e/__init__.py", "/?key", "/v1/models", "/props",
        "/slots", "/metrics", "/openapi.json", "/ready",
    ],
)  # fmt: skip
def test_nothing_else_is_open(locked, path):
    status = httpx.get(locked.url + path).status_code
    assert status == (200 if path == "/?key" else 401)  # a query does not change what `/` is


def test_no_route_of_the_api_is_among_the_files():
    assert not {one.path for group in GROUPS for one in group.ENDPOINTS} & set(PATHS)


def test_a_foreign_name_of_this_machine_gets_no_page(server):
    assert httpx.get(server.url + "/", headers={"Host": "evil.example"}).status_code == 403


def test_no_page_if_none_is_wanted(served):
    with running([f"lm={served['lm']}"], {"page": False, "api_key": KEY}) as one:
        assert httpx.get(one.url + "/").status_code == 401
        for path in PATHS:
            assert httpx.get(one.url + path, headers={"x-api-key": KEY}).status_code == 404


def test_the_flag_is_on_the_command_line(capsys):
    from edgeformer.cli import main

    assert main(["serve", "--help"]) == 0
    assert "--no-page" in capsys.readouterr().out


def test_the_package_has_all_files():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["edgeformer"]
    for path in FILES:
        name = str(path.relative_to(ROOT / "edgeformer"))
        assert any(fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_short_and_asks_nobody_else(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    addresses = set(re.findall(r"https?://[\w.]+", text))
    assert addresses <= {"http://www.w3.org", "https://spec.commonmark.org", "https://html.spec.whatwg.org"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=[\"']", text)


def test_every_module_and_picture_is_there():
    names = {path.name for path in FILES}
    for path in FILES:
        text = path.read_text()
        assert {name for _, name in re.findall(r"""(from|import) "\./([\w.]+)";""", text)} <= names
        assert set(re.findall(r"""(?:src|href)="page/([\w.]+)\"""", text)) <= names
    index = (page.STATIC / "index.html").read_text()
    symbols = set(re.findall(r'id="icon-(\w+)"', index))
    used = set(re.findall(r"#icon-(\w+)\"", index))
    for path in page.STATIC.glob("*.js"):
        used |= set(re.findall(r"""\bicon(?:Button)?\("(\w+)\"""", path.read_text()))
    assert used <= symbols


def test_the_document_of_the_api_has_no_files(server):
    assert "/" not in json.loads(httpx.get(server.url + "/openapi.json").text)["paths"]
