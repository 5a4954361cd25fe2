"""examples/ray_batch.py and ray_serve.py on a local Ray cluster of two workers, one of which is killed meanwhile."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

for package in ("ray", "pyarrow", "starlette", "uvicorn", "openai"):
    if os.environ.get("CI") != "true":
        pytest.importorskip(package)

from support import serving
from support.serving import wait_for

import edgeformer

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS, BLOCK, TOKENS = 160, 8, 120
PROMPTS = [{"id": f"row {number}", "prompt": f"{number} quick brown"} for number in range(ROWS)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return serving.write_long_lm(tmp_path_factory.mktemp("ray") / "lm")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head without CPUs and two workers of one CPU each, all on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(EXAMPLES.parent))
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else a token is written to the home folder
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        for limit in ("READY_CHECK", "HEALTH_CHECK"):  # seconds that a busy machine may need
            patch.setenv(f"RAY_SERVE_PROXY_{limit}_TIMEOUT_S", "120")
        from ray.cluster_utils import Cluster

        one = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        one.workers = [one.add_node(num_cpus=1) for _ in range(2)]
        yield one
        one.shutdown()


def kill_a_worker(cluster):
    cluster.remove_node(cluster.workers.pop(0), allow_graceful=False)


def start_a_worker(cluster):
    """Takes a second or two, in which the other worker goes on."""
    cluster.workers.append(cluster.add_node(num_cpus=1))


class Script:
    """An example that runs."""

    def __init__(self, name, cluster, *arguments):
        command = [sys.executable, "-u", str(EXAMPLES / name), *map(str, arguments), "--address", cluster.address]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()

    def end(self, seconds=180):
        code = self.process.wait(seconds)
        self._reader.join(10)
        assert code == 0, "".join(self.lines)

    def kill(self):
        self.process.kill()
        self.process.wait(60)


def parts(folder):
    return list(folder.glob("part-*.jsonl"))


def rows(folder):
    return [json.loads(line) for part in parts(folder) for line in part.read_text().splitlines()]


@pytest.fixture(scope="module")
def batch():
    spec = importlib.util.spec_from_file_location("ray_batch", EXAMPLES / "ray_batch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(600)
def test_a_batch_survives_its_driver_and_a_worker(cluster, bundle, tmp_path):
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    arguments = [bundle, prompts, "-o", answers, "--threads", 1, "--block", BLOCK, "--max-new-tokens", TOKENS]
    first = Script("ray_batch.py", cluster, *arguments)
    wait_for(lambda: len(parts(answers)) >= 2 or first.process.poll() is not None, 120)
    first.kill()
    done = len(rows(answers))
    assert 2 * BLOCK <= done < ROWS, "".join(first.lines)

    second = Script("ray_batch.py", cluster, *arguments)
    wait_for(lambda: len(rows(answers)) > done or second.process.poll() is not None, 120)
    kill_a_worker(cluster)
    assert len(rows(answers)) < ROWS  # it did not end before
    start_a_worker(cluster)
    second.end()
    assert f"{done} answered before, {ROWS - done} to do\n" in second.lines

    found = rows(answers)
    assert sorted(row["id"] for row in found) == sorted(row["id"] for row in PROMPTS)  # each once
    model = edgeformer.load(bundle, threads=1)
    expected = model.generate([row["prompt"] for row in PROMPTS], max_new_tokens=TOKENS)
    by_id = {row["id"]: row for row in found}
    for row, result in zip(PROMPTS, expected, strict=True):
        own = by_id[row["id"]]
        assert (own["answer"], own["tokens"], own["finish_reason"]) == (
            result.text, len(result.ids), result.finish_reason,
        )  # fmt: skip


def test_an_unfinished_file_is_not_counted(batch, tmp_path):
    batch.write_part(tmp_path, ['{"id": 1, "answer": ""}', '{"id": "a", "answer": ""}'])
    (tmp_path / "unfinished-x.jsonl").write_text('{"id": 2, "answer": ""}\n{"id": 3')
    assert batch.answered(tmp_path) == {"1", '"a"'}


def test_rows_are_read_from_both_formats(batch, tmp_path):
    import pyarrow
    import pyarrow.parquet

    chat = [{"role": "user", "content": "hi"}]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": "x"}) + "\n\n" + json.dumps({"id": 7, "prompt": chat}) + "\n"
    )
    assert list(batch.read_rows(tmp_path / "a.jsonl")) == [(0, "x"), (7, chat)]
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a", "b"], "prompt": [chat, chat]}), tmp_path / "a.parquet")
    assert list(batch.read_rows(tmp_path / "a.parquet")) == [("a", chat), ("b", chat)]


def test_a_prompt_that_fails_does_not_stop_the_others(batch, bundle):
    import numpy as np

    actor = batch.Answers(str(bundle), 1, {"max_new_tokens": 3})
    block = {"id": np.array(["1", "2"]), "prompt": np.array([json.dumps("a " * 3000), json.dumps("a")])}
    first, second = (json.loads(line) for line in actor(block)["line"])
    assert first["id"] == 1 and "context" in first["error"]
    assert second["id"] == 2 and second["tokens"] == 3


@pytest.mark.timeout(600)
def test_replicas_serve_and_a_killed_one_is_replaced(cluster, bundle):
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ("ray_serve.py", cluster, f"lm={bundle}", "--threads", 1, "--port", port, "--head-only")
    script = Script(*command)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: script.process.poll() is not None or len(replicas(cluster, url)) == 2, 180)
        if "HTTP proxies not available" in "".join(script.lines):  # a busy machine needs longer than Ray's 60 seconds
            script = Script(*command)
            wait_for(lambda: script.process.poll() is not None or len(replicas(cluster, url)) == 2, 180)
        assert script.process.poll() is None, "".join(script.lines)
        model = edgeformer.load(bundle, threads=1)
        expected = model.generate("The quick brown", max_new_tokens=12).text
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8) as client:
            ask = {"model": "lm", "prompt": "The quick brown", "max_tokens": 12}
            assert client.completions.create(**ask).choices[0].text == expected
            stream = client.completions.create(**ask, stream=True)
            assert "".join(one.choices[0].text for one in stream) == expected
            before = replicas(cluster, url)
            kill_a_worker(cluster)
            start_a_worker(cluster)
            for _ in range(10):  # meanwhile the other one answers
                assert client.completions.create(**ask).choices[0].text == expected
            wait_for(lambda: len(replicas(cluster, url) - before) == 1, 120)
            assert client.completions.create(**ask).choices[0].text == expected
            with pytest.raises(openai.NotFoundError, match="There is no model"):
                client.completions.create(model="no", prompt="a")
    finally:
        script.kill()


def replicas(cluster, url):
    """The logs of the replicas that answered some of these requests: each replica has its own."""
    logs = Path(cluster.head_node.get_session_dir_path(), "logs", "serve")
    before = {path: path.stat().st_size for path in logs.glob("replica_*.log")}
    for _ in range(12):
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(f"{url}/metrics", timeout=10)
    grown = (path for path in logs.glob("replica_*.log") if path.stat().st_size > before.get(path, 0))
    return {path for path in grown if "GET /metrics 200" in path.read_text()[before.get(path, 0) :]}
