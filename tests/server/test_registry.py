"""Several models in one server: loaded at first use, unloaded when idle or when memory is short."""

from __future__ import annotations

import threading

import openai
import pytest
from support.serving import running, wait_for

from edgeformer.errors import BundleError, InputError
from edgeformer.server import registry
from edgeformer.server.options import ServeOptions
from edgeformer.server.registry import Registry

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


def loaded(server):
    return [name for name, entry in server.registry.entries.items() if entry.loaded is not None]


def test_a_model_is_loaded_at_first_use_and_once(served, monkeypatch):
    count = []
    load = registry.load

    def counted(*arguments, **more):
        count.append(arguments)
        return load(*arguments, **more)

    monkeypatch.setattr(registry, "load", counted)
    with running([f"lm={served['lm']}", f"encoder={served['encoder']}"]) as one, one.client() as client:
        assert loaded(one) == []
        threads = [
            threading.Thread(target=client.chat.completions.create, kwargs={"model": "lm", **CHAT}) for _ in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert loaded(one) == ["lm"] and len(count) == 1


def test_all_are_loaded_before_if_asked(served):
    with running([f"lm={served['lm']}", f"encoder={served['encoder']}"], {"preload": True}) as one:
        assert loaded(one) == ["lm", "encoder"]


def test_an_idle_model_is_unloaded_and_comes_again(served):
    with running([f"lm={served['lm']}"], {"idle_timeout": 0.2}) as one, one.client() as client:
        first = client.chat.completions.create(model="lm", **CHAT).choices[0].message.content
        scheduler = one.scheduler("lm")
        wait_for(lambda: loaded(one) == [])
        wait_for(lambda: scheduler._worker._closing)
        assert client.chat.completions.create(model="lm", **CHAT).choices[0].message.content == first


def test_a_model_in_use_is_not_unloaded(served, slow):
    with running([f"lm={served['lm']}"], {"idle_timeout": 0.1}) as one, one.client() as client:
        found = client.chat.completions.create(
            model="lm", messages=CHAT["messages"], max_tokens=60, extra_body={"ignore_eos": True, "speculation": "off"}
        )
        assert found.usage.completion_tokens == 60


def test_memory_that_is_short_unloads_the_one_that_was_idle_for_longest(served):
    size = Registry([str(served["lm"])], ServeOptions()).entries["lm"].size
    names = ["lm", "calls", "reasons"]
    with (
        running([f"{name}={served[name]}" for name in names], {"memory_limit": int(size * 2.8)}) as one,
        one.client() as client,
    ):
        for name in ("lm", "calls", "lm", "reasons"):
            client.chat.completions.create(model=name, **CHAT)
            assert one.registry.used_bytes <= size * 2.8
        assert "calls" not in loaded(one) and "reasons" in loaded(one)


def test_a_model_that_does_not_fit_is_refused_with_numbers(served):
    with running([f"lm={served['lm']}"], {"memory_limit": 1000}) as one, one.client() as client:
        with pytest.raises(openai.InternalServerError, match=r"needs .* bytes and 1,000 are free") as caught:
            client.chat.completions.create(model="lm", **CHAT)
        assert caught.value.code == "out_of_memory"


def test_steps_with_prompts_may_take_ten_times_as_long_as_without(served):
    """The server's own `stretch`: a step of 1 s without prompts has 9 s for them, 88 rows of 0.1 s."""
    with running([f"lm={served['lm']}"], {"preload": True}) as one:
        scheduler = one.scheduler("lm")
        assert scheduler.options.stretch == registry.STRETCH == 10.0
        budget = scheduler._worker._scheduler._budget
        budget.observe(4, 0, 1.0)
        budget.observe(4, 10, 2.0)
        assert budget.prompt_rows(4, 1) == 88  # a multiple of 4; `Model.scheduler` itself would give 8


def test_the_only_model_needs_no_name(served):
    import httpx

    with running([f"lm={served['lm']}"]) as one:
        assert httpx.post(one.url + "/v1/chat/completions", json=CHAT).json()["model"] == "lm"


def test_a_damaged_bundle_is_503_and_the_others_work(served, tmp_path):
    import shutil

    bad = shutil.copytree(served["lm"], tmp_path / "bad")
    with running([str(bad), f"lm={served['lm']}"]) as one, one.client() as client:
        (bad / "model.onnx").write_bytes(b"no graph")
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="bad", **CHAT)
        assert client.chat.completions.create(model="lm", **CHAT).choices[0].message.content


def test_names_and_paths(served, tmp_path):
    with pytest.raises(InputError, match="Two bundles"):
        Registry([str(served["lm"]), f"lm={served['calls']}"], ServeOptions())
    with pytest.raises(BundleError):
        Registry([str(tmp_path)], ServeOptions())
    with pytest.raises(InputError):
        Registry([], ServeOptions())
    assert list(Registry([str(served["lm"]), f"b={served['calls']}"], ServeOptions()).entries) == ["lm", "b"]
