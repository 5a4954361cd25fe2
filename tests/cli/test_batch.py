"""`edgeformer run --prompts`: forms of lines, options of a line, errors of a line, order, and going on."""

from __future__ import annotations

import json

import pytest
from support import tiny
from typer.testing import CliRunner

from edgeformer.cli.app import app
from edgeformer.errors import InputError
from edgeformer.model import load

LINES = [
    "hello world",
    [5, 17, 90],
    {"id": "chat", "messages": [{"role": "user", "content": "hello"}], "max_new_tokens": 3},
    {"prompt": "hello", "top_p": 7},
    {"prompt": [5, 17], "temperature": 1.0, "seed": 4, "n": 2},
    {"prompt": "hello", "regex": "[a-z]{2,4}"},
]


@pytest.fixture
def run(lm, tmp_path):
    def call(lines, *flags, output=tmp_path / "answers.jsonl"):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        arguments = ["run", str(lm), "--prompts", str(prompts), "-e", "cpu", "-n", "8", *flags]
        result = CliRunner().invoke(app, [*arguments, *([] if output is None else ["-o", str(output)])])
        answers = [json.loads(line) for line in output.read_text().splitlines()] if output and output.exists() else []
        return result, answers

    return call


def _quoted(lines):
    return [json.dumps(line) if isinstance(line, str) else line for line in lines]


def test_each_line_has_its_answer_in_order(run, lm):
    result, answers = run(_quoted(LINES), "--parallel", "3")
    assert result.exit_code == 1  # one line failed
    assert "1 of 6 prompts failed" in result.stderr
    assert [answer["line"] for answer in answers] == [1, 2, 3, 4, 5, 6]
    model = load(lm, "cpu")
    assert answers[0]["ids"] == model.generate("hello world", max_new_tokens=8).ids
    assert answers[1]["ids"] == model.generate([5, 17, 90], max_new_tokens=8).ids
    assert (answers[2]["id"], len(answers[2]["ids"]) <= 3) == ("chat", True)
    assert answers[3]["error"] == {
        "type": "InputError",
        "message": "top_p is 7, expected a number of at least 0 and at most 1.",
    }
    expected = model.generate([5, 17], temperature=1.0, seed=4, n=2, max_new_tokens=8)
    assert [answer["ids"] for answer in answers[4]["answers"]] == [one.ids for one in expected]
    assert answers[5]["text"].isalpha()


@pytest.mark.parametrize("cut", [0, 1, 40, 350, 10**6])
def test_a_run_that_was_interrupted_goes_on(run, tmp_path, cut):
    lines = _quoted(LINES[:3])
    _, whole = run(lines)
    path = tmp_path / "answers.jsonl"
    kept = path.read_bytes()[:cut]
    path.write_bytes(kept)
    result, again = run(lines)
    assert result.exit_code == 0

    def facts(answers):
        return [{key: value for key, value in answer.items() if key != "timings"} for answer in answers]

    assert facts(again) == facts(whole)
    assert path.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])  # what was whole is not written again


def test_the_answers_to_other_prompts_are_not_continued(run):
    run(_quoted(LINES[:2]))
    result, _ = run(_quoted(["another text", LINES[1]]))
    assert isinstance(result.exception, InputError)
    assert "line 1 is no answer to line 1 of the prompts" in str(result.exception)


def test_answers_of_other_options_or_another_bundle_are_not_continued(run, lm, tmp_path):
    run(_quoted(LINES[:1]))
    assert run(_quoted(LINES[:2]))[0].exit_code == 0
    result, answers = run(_quoted([*LINES[:2], "a"]), "--temperature", "0.5", "--seed", "1")
    assert isinstance(result.exception, InputError) and len(answers) == 2
    assert "with these options and this bundle" in str(result.exception)
    tiny.write_lm(tmp_path / "other", seed=5)
    flags = [
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "-e",
        "cpu",
        "-n",
        "8",
        "-o",
        str(tmp_path / "answers.jsonl"),
    ]
    result = CliRunner().invoke(app, ["run", str(tmp_path / "other"), *flags])
    assert isinstance(result.exception, InputError)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["hello"], "line 1 is not JSON"),
        (['{"text": 1}'], "either 'prompt' or 'messages'"),
        (['{"prompt": "a", "messages": []}'], "either 'prompt' or 'messages'"),
        (["5"], "expected a text, a list, or an object"),
        ([""], "has no prompts"),
    ],
)
def test_a_malformed_file_is_refused_before_anything_runs(run, lines, message):
    result, answers = run(lines)
    assert message in str(result.exception)
    assert answers == []


def test_answers_need_a_file(run):
    result, _ = run(['"a"'], output=None)
    assert "--prompts needs --output" in str(result.exception)


def test_lines_end_where_json_lines_do(run):
    """Python's splitlines() also cuts at U+2028 and U+0085, which JSON strings may hold as they are."""
    lines = [json.dumps({"prompt": f"a{mark}b", "id": mark}, ensure_ascii=False) for mark in "\u2028\u0085\x7f"]
    result, answers = run(["\ufeff" + lines[0], *lines[1:]])
    assert result.exit_code == 0
    assert [answer["id"] for answer in answers] == ["\u2028", "\u0085", "\x7f"]


def test_an_id_may_hold_what_utf_8_cannot(run):
    result, answers = run([r'{"prompt": "a", "id": "\ud800"}'])
    assert result.exit_code == 0
    assert answers[0]["id"] == "\ud800"


def test_a_finished_run_with_failures_still_fails(run):
    lines = _quoted([LINES[0], LINES[3]])
    assert run(lines)[0].exit_code == 1
    result, _ = run(lines)
    assert "has all 2 answers already; 1 of them failed" in result.stderr.replace("\n", " ")
    assert result.exit_code == 1


def test_without_a_terminal_there_is_no_progress_bar(run):
    result, _ = run(_quoted(LINES[:2]))
    assert "\r" not in result.stderr
    assert "prompt/s" not in result.stderr


@pytest.mark.parametrize(
    "flags", [["text"], ["--chat"], ["--ids", "1,2"], ["--system", "a"], ["--json"], ["--inputs", "a.npz"]]
)
def test_flags_that_prompts_would_ignore_are_refused(run, flags):
    result, answers = run(_quoted(LINES[:1]), *flags)
    assert "has no meaning with --prompts" in str(result.exception)
    assert answers == []


def test_an_output_without_prompts_is_refused(lm):
    result = CliRunner().invoke(app, ["run", str(lm), "hello", "-o", "answers.jsonl"])
    assert "--output is the file of --prompts" in str(result.exception)
