"""bench.serving: its workload, its verdicts, its pages, and one run of it on a tiny bundle."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

for package in ("h11", "httpx", "starlette", "uvicorn", "msgspec", "prometheus_client", "matplotlib"):
    pytest.importorskip(package)

from bench.serving import load, servers, share, soak
from bench.serving.__main__ import STUDIES
from bench.serving.setting import Options
from bench.serving.workload import LONGEST, SHARED, SHORTEST, Workload, arrivals, clients

MACHINE = {"cpu": "a chip", "system": "a system", "versions": {"numpy": "1"}, "date": "2026-01-01"}


def words(count):
    """A workload over a toy tokenizer: a token is a word."""
    vocabulary: dict[str, int] = {}

    def encode(text):
        return [vocabulary.setdefault(word, len(vocabulary)) for word in text.split()]

    def decode(ids):
        names = list(vocabulary)
        return " ".join(names[i] for i in ids)

    work = Workload(encode, decode)
    return work, work.take(count), encode


def test_half_of_the_prompts_share_a_beginning_of_256_tokens():
    _, asks, encode = words(32)
    shared = [ask for ask in asks if ask.messages[0]["role"] == "system"]
    assert len(shared) == 16
    assert len({ask.messages[0]["content"] for ask in shared}) == 1
    assert len(encode(shared[0].messages[0]["content"])) == SHARED
    own = [ask.messages[-1]["content"] for ask in asks]
    assert len({tuple(encode(text)[:8]) for text in own}) == 32
    for ask in asks:
        assert ask.tokens == sum(len(encode(one["content"])) for one in ask.messages)
        assert SHORTEST <= ask.tokens <= LONGEST
    assert min(ask.tokens for ask in asks) < 2 * SHORTEST and max(ask.tokens for ask in asks) > 0.8 * LONGEST


def test_the_same_seed_asks_the_same_and_another_goes_on():
    work, asks, _ = words(8)
    _, again, _ = words(8)
    assert asks == again and work.take(8) != asks


def test_clients_share_the_requests_in_turn():
    _, asks, _ = words(8)
    found = clients(asks, 4, lambda ask: {"tokens": ask.tokens}, 0.2)
    assert [[body["tokens"] for body in one["bodies"]] for one in found] == [
        [asks[i].tokens, asks[i + 4].tokens] for i in range(4)
    ]
    assert all(0 <= one["at"] < 0.2 for one in found) and len({one["at"] for one in found}) == 4


def test_arrivals_come_at_the_asked_rate_and_wait_for_nobody():
    _, asks, _ = words(400)
    found = arrivals(asks, 2.0, lambda ask: {})
    assert all(len(one["bodies"]) == 1 for one in found)
    times = [one["at"] for one in found]
    assert times == sorted(times) and 399 / times[-1] == pytest.approx(2.0, rel=0.15)


# -------------------------------------------------------------------------------------------------------------- pages


def numbers(rate, first, gap):
    found = {"rate": rate, "first_p50": first / 2, "first_p95": first, "gap_p50": gap / 4, "gap_p99": gap / 2}
    found |= {
        "gap_longest_p99": gap,
        "gap_max": gap * 2,
        "errors": 0.0,
        "client_cores": 0.02,
        "server_cores": 1.9,
        "late": 0.0,
    }
    return {name: {"median": value, "min": value, "max": value, "n": 1} for name, value in found.items()}


def saved(ours=(1500.0, 0.5, 0.03)):
    cases = [f"{count} clients" for count in (1, 8, 16)]
    rows = {
        servers.DRAFTS: {case: numbers(*ours) for case in cases},
        "fast peer": {"1 clients": numbers(100.0, 0.2, 0.02)} | {case: numbers(500.0, 2.0, 0.2) for case in cases[1:]},
        "prompt peer": {case: numbers(100.0, 1.0, 0.05) for case in cases[1:]},
    }
    projects = {servers.DRAFTS: servers.OURS, "fast peer": "llama-server", "prompt peer": "OpenVINO GenAI"}
    return {
        "machine": MACHINE, "threads": 2, "rounds": 3, "others": 0.0, "cases": cases, "new": 128, "measured": rows,
        "projects": projects, "settings": dict.fromkeys(rows, "as it comes"), "absent": {"gone": "no package"},
    }  # fmt: skip


def verdicts(found):
    return {row[1]: (row[-2], row[-1].split()[-1]) for row in load.targets(found)}


def test_targets_are_judged_against_the_best_peer_of_each_number():
    found = verdicts(saved())
    assert found["8 clients, tokens/s"] == ("x 3.00", "reached")
    assert found["8 clients, first token p95"] == ("x 0.50", "reached")
    assert found["16 clients, longest gap p99"] == ("x 0.60", "missed")


@pytest.mark.parametrize(
    ("ours", "missed"),
    [
        ((1499.0, 0.5, 0.025), "tokens/s"),
        ((1500.0, 0.51, 0.025), "first token p95"),
        ((1500.0, 0.5, 0.026), "longest gap p99"),
    ],
)
def test_what_misses_a_target_is_said(ours, missed):
    found = verdicts(saved(ours))
    assert {name for name, (_, said) in found.items() if said == "missed"} == {
        f"{n} clients, {missed}" for n in (8, 16)
    }


def test_gaps_of_answers_that_come_when_they_have_ended_are_not_compared(tmp_path):
    found = saved()
    found["measured"]["buffer"] = {"1 clients": numbers(64.0, 3.8, 0.001), "8 clients": numbers(64.0, 9.0, 0.001)}
    found["projects"]["buffer"] = found["settings"]["buffer"] = "a server"
    assert verdicts(found) == verdicts(saved())  # half of 3.8 s before the first of 128 tokens, at 64 a second
    assert "buffer sends an answer after it has ended" in load.text(found, tmp_path)
    found["measured"]["buffer"]["1 clients"] = numbers(64.0, 1.8, 0.001)
    assert verdicts(found)["8 clients, longest gap p99"] == ("x 30.00", "missed")


def test_the_page_has_a_table_a_plot_and_who_is_absent(tmp_path):
    page = load.text(saved(), tmp_path)
    assert "| **16 clients** |" in page and "gone is absent: no package" in page
    assert (tmp_path / "serving-load.png").stat().st_size > 1000
    assert "Disturbed" not in page and "Disturbed" in load.text(saved() | {"others": 0.3}, tmp_path)


def test_the_share_is_judged_by_streams(tmp_path):
    def one(took):
        found = {"inside": 1000.0, "http": 1000.0 * (1 - took), "took": took, "client_cores": 0.03}
        return {name: {"median": value} for name, value in found.items()}

    found = {"machine": MACHINE, "threads": 2, "rounds": 3, "others": 0.0}
    found["measured"] = {"2": {"8": one(0.09), "1": one(0.06)}}
    page = share.text(found, tmp_path)
    assert "9.0%, reached (at most 10%)" in page and "6.0%, missed (at most 5%)" in page


@pytest.mark.parametrize("name", STUDIES.studies)
def test_the_page_has_the_block_of_each_study(name):
    content = STUDIES.page.read_text(encoding="utf-8")
    assert content.index(f"<!-- serving-{name}:begin -->") < content.index(f"<!-- serving-{name}:end -->")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], list(STUDIES.studies)), (["all"], list(STUDIES.studies)), (["soak", "load"], ["soak", "load"])],
)
def test_without_a_name_all_studies_are_taken(arguments, expected):
    parser = argparse.ArgumentParser()
    STUDIES.add_arguments(parser)
    assert STUDIES.chosen(parser.parse_args(arguments)) == expected


# ------------------------------------------------------------------------------------------------- on a tiny bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from support import serving

    return serving.write_long_lm(tmp_path_factory.mktemp("bench-serving") / "lm")


@pytest.fixture
def options(bundle, monkeypatch):
    """The least of everything, of ours alone; the tiny tokenizer makes more tokens of a text, so texts are short."""
    monkeypatch.setattr("bench.serving.workload.SHARED", 32)
    monkeypatch.setattr("bench.serving.workload.LONGEST", 128)
    return Options(bundle, threads=1, rounds=1, quick=True, peers=("edgeformer",), tiny=True)


def test_load_runs(options, tmp_path):
    found = load.measure(dataclasses.replace(options, peers=("no drafts",)))
    assert found["absent"] == {}
    row = found["measured"][servers.PLAIN]
    assert set(row) == set(found["cases"]) and all(one["errors"]["median"] == 0 for one in row.values())
    assert all(one["rate"]["median"] > 0 and one["first_p95"]["median"] > 0 for one in row.values())
    assert "2 clients" in load.text(found | {"machine": MACHINE, "threads": 1, "rounds": 1}, tmp_path)


def test_a_server_that_does_not_start_is_absent_with_its_reason(options, monkeypatch):
    broken = dataclasses.replace(
        servers.contestants(options.bundle)[0], command=lambda setting: ["sh", "-c", "echo no model here; exit 3"]
    )
    monkeypatch.setattr(servers, "contestants", lambda bundle: [broken])
    found = load.measure(options)
    assert found["measured"] == {} and "no model here" in found["absent"][broken.key]


def test_share_runs(options):
    found = share.pairs(options, 1, 2)
    assert found["inside"] > 0 and found["http"] > 0 and found["client_cores"] > 0


def test_growth_of_memory():
    assert soak.growth({"warm_mib": 200.0, "end_mib": 204.0}) == pytest.approx(0.02)
