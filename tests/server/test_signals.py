"""`edgeformer serve` as a process: it starts, answers, and ends as a service should."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.serving import wait_for

SLOW = """
import sys, time
from edgeformer.decoding.scheduler import Scheduler
step = Scheduler.step
def slower(self):
    time.sleep(0.02)
    step(self)
Scheduler.step = slower
from edgeformer.cli import main
sys.exit(main(sys.argv[1:]))
"""
LONG = {
    "messages": [{"role": "user", "content": "hello"}], "max_tokens": 100, "ignore_eos": True, "speculation": "off",
    "stream": True,
}  # fmt: skip


class Process:
    def __init__(self, *arguments):
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SLOW, "serve", *map(str, arguments), "--port", "0", "--threads", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines = []
        threading.Thread(target=self._read, daemon=True).start()
        wait_for(lambda: self.port is not None or self.process.poll() is not None, 60)

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def port(self):
        found = re.search(r"running on http://127.0.0.1:(\d+)", "".join(self.lines))
        return int(found[1]) if found else None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture
def start(request):
    def make(*arguments):
        one = Process(*arguments)
        request.addfinalizer(lambda: (one.process.kill(), one.process.wait()))
        return one

    return make


def streaming(one):
    """(the lines of a stream that runs, filled by a thread; the thread)"""
    lines = []

    def read():
        try:
            with httpx.stream("POST", one.url + "/v1/chat/completions", json=LONG, timeout=60) as response:
                lines.extend(response.iter_lines())
        except httpx.HTTPError as error:
            lines.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    wait_for(lambda: '"/v1/chat' in "".join(one.lines) or is_busy(one), 60)
    return lines, thread


def is_busy(one):
    return any(slot["is_processing"] for slot in httpx.get(one.url + "/slots").json())


def test_sigterm_lets_running_answers_end(start, served):
    one = start(served["lm"])
    lines, thread = streaming(one)
    one.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in "".join(one.lines))
    time.sleep(0.3)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", one.port)).close()
    thread.join(30)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert sum('"content":' in str(line) for line in lines) > 20
    assert one.process.wait(20) == 0


def test_answers_that_take_too_long_are_cut(start, served):
    one = start(served["lm"], "--grace", "1")
    lines, thread = streaming(one)
    one.process.send_signal(signal.SIGTERM)
    thread.join(30)
    assert "data: [DONE]" not in lines
    assert one.process.wait(20) == 0


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(start, served, second):
    one = start(served["lm"])
    streaming(one)
    one.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in "".join(one.lines))
    one.process.send_signal(second)
    assert one.process.wait(10) == 128 + second  # 0 if it had waited for the answer


def test_the_log_is_json(start, served):
    one = start(served["lm"])
    httpx.get(one.url + "/v1/models")
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait(20) == 0
    messages = [json.loads(line) for line in one.lines]
    assert {"starting", "request", "stopping"} <= {line["message"] for line in messages}


def test_a_port_in_use_is_said(start, served):
    one = start(served["lm"])
    command = [sys.executable, "-m", "edgeformer", "serve", str(served["lm"]), "--port", str(one.port)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert found.returncode != 0 and "address already in use" in found.stderr


@pytest.mark.parametrize("arguments", [["--host", "0.0.0.0"], ["--tls-cert", "cert.pem"], ["--threads", "0"]])
def test_wrong_arguments_are_refused(edgeformer, served, arguments, monkeypatch):
    monkeypatch.delenv("EDGEFORMER_API_KEY", raising=False)
    code, _, error = edgeformer("serve", served["lm"], *arguments)
    assert code == 2 and error
