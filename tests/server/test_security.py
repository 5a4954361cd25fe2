"""The API key, the names of this machine, CORS, limits, TLS files and the unix socket."""

from __future__ import annotations

import httpx
import pytest
from support.serving import running

from edgeformer.errors import InputError
from edgeformer.server.app import GROUPS
from edgeformer.server.options import ServeOptions
from edgeformer.server.security import read_key

KEY = "s3cret"
CHAT = {"model": "lm", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(served):
    """A server with a key, one origin and a small limit of bodies."""
    options = {"api_key": KEY, "cors": ["https://app.example"], "max_body": 2000, "max_messages": 3}
    with running([f"lm={served['lm']}"], options) as one:
        yield one


ROUTES = [(one.method, one.path) for group in GROUPS for one in group.ENDPOINTS] + [("GET", "/openapi.json")]


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/nothing")])
def test_every_route_but_health_needs_the_key(locked, method, path):
    url = locked.url + path.replace("{model:path}", "lm")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}, {"x-api-key": "no"}):
        found = httpx.request(method, url, headers=headers)
        assert found.status_code == (200 if path == "/health" else 401)
    for headers in ({"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}):
        assert httpx.request(method, url, headers=headers).status_code != 401


def test_the_clients_get_an_authentication_error(locked):
    import openai

    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=locked.url + "/v1", api_key="wrong", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"
    assert openai.OpenAI(base_url=locked.url + "/v1", api_key=KEY).models.list().data[0].id == "lm"


def test_a_named_origin_may_call_and_no_other(locked):
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    url = locked.url + "/v1/chat/completions"
    allowed = httpx.options(url, headers={"Origin": "https://app.example"} | ask)
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in allowed.headers
    other = httpx.options(url, headers={"Origin": "https://evil.example"} | ask)
    assert "access-control-allow-origin" not in other.headers
    key = {"Authorization": f"Bearer {KEY}"}
    found = httpx.post(url, json=CHAT, headers=key | {"Origin": "https://app.example"})
    assert found.headers["access-control-allow-origin"] == "https://app.example"


def test_without_a_named_origin_there_are_no_cors_headers(server):
    found = httpx.get(server.url + "/v1/models", headers={"Origin": "https://app.example"})
    assert not [name for name in found.headers if name.startswith("access-control")]
    assert httpx.options(server.url + "/v1/models").status_code == 405


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1", "a:b:c"]
)
def test_a_foreign_name_of_this_machine_is_refused(server, host):
    assert httpx.get(server.url + "/v1/models", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.1.2.3:9", "[::1]:80", "a.localhost"])
def test_own_names_are_taken(server, host):
    assert httpx.get(server.url + "/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_body_that_a_page_may_send_unasked_is_refused(server, kind):
    found = httpx.post(server.url + "/v1/chat/completions", content=b"{}", headers={"Content-Type": kind})
    assert found.status_code == 415


def test_a_compressed_body_is_refused_by_name(server):
    import gzip

    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    found = httpx.post(server.url + "/tokenize", content=gzip.compress(b'{"content": "a"}'), headers=headers)
    assert found.status_code == 415 and "gzip" in found.json()["error"]["message"]


def test_a_large_body_is_refused_whether_its_length_is_said_or_not(locked):
    def parts():
        for _ in range(50):
            yield b"a" * 100

    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for content in (b"a" * 5000, parts()):
        assert httpx.post(locked.url + "/tokenize", content=content, headers=headers).status_code == 413


def test_too_many_messages_are_refused(locked):
    headers = {"Authorization": f"Bearer {KEY}"}
    found = httpx.post(
        locked.url + "/v1/chat/completions", json=CHAT | {"messages": CHAT["messages"] * 4}, headers=headers
    )
    assert found.status_code == 400 and found.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_need_a_key(host, monkeypatch, tmp_path):
    monkeypatch.delenv("EDGEFORMER_API_KEY", raising=False)
    with pytest.raises(InputError, match="--insecure"):
        read_key(ServeOptions(host=host))
    assert read_key(ServeOptions(host=host, insecure=True)) is None
    assert read_key(ServeOptions(host=host, api_key=KEY)) == KEY
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    assert read_key(ServeOptions(host=host, api_key_file=file)) == KEY
    monkeypatch.setenv("EDGEFORMER_API_KEY", "other")
    assert read_key(ServeOptions(host=host)) == "other"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_none(host, monkeypatch):
    monkeypatch.delenv("EDGEFORMER_API_KEY", raising=False)
    assert read_key(ServeOptions(host=host)) is None


def test_an_empty_key_is_refused(tmp_path):
    (tmp_path / "key").write_text("\n")
    with pytest.raises(InputError):
        read_key(ServeOptions(api_key_file=tmp_path / "key"))
    with pytest.raises(InputError):
        ServeOptions(api_key="")
    with pytest.raises(InputError):
        ServeOptions(tls_cert=tmp_path / "cert")


def test_a_unix_socket_serves(served, tmp_path):
    path = tmp_path / "s"
    with running([f"lm={served['lm']}"], {"uds": path}):
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://anything") as client:
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_tls_files_serve_https(served, tmp_path):
    import shutil
    import ssl
    import subprocess

    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "1"]
    more = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*made, *more], check=True, capture_output=True)
    with running([f"lm={served['lm']}"], {"tls_cert": cert, "tls_key": key}) as one:
        context = ssl.create_default_context(cafile=cert)
        url = f"https://localhost:{one.port}/v1/models"
        assert httpx.get(url, verify=context).json()["data"][0]["id"] == "lm"
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
