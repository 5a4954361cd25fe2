"""The command line: output, exit codes, one message and no traceback for a user's mistake."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from edgeformer.cli import exit_code, main
from edgeformer.errors import (
    BundleError,
    EdgeformerError,
    EngineUnavailable,
    ExportError,
    InputError,
    ParityError,
    StateError,
    TemplateError,
    TrainingError,
)
from edgeformer.model import load

COMMANDS = ("run", "chat", "embed", "classify", "transcribe", "inspect", "verify", "bench", "doctor")


def _process(*arguments, **options):
    command = [sys.executable, "-m", "edgeformer", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


# ---------------------------------------------------------------------------------------------------------------- run


def test_run_streams_the_answer_to_stdout_and_timings_to_stderr(edgeformer, lm):
    code, out, err = edgeformer("run", lm, "hello", "-n", 12, "-e", "cpu", "-t", 1, "--ignore-eos")
    assert code == 0
    assert out == load(lm, "cpu", 1).generate("hello", max_new_tokens=12, ignore_eos=True).text + "\n"
    assert "12 new tokens at" in err
    assert "(cpu), ended by length" in err
    assert edgeformer("run", lm, "hello", "-n", 3, "-e", "cpu", "--quiet")[2] == ""


def test_run_takes_every_option(edgeformer, lm):
    options = ["--temperature", 0.8, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1]
    code, out, _ = edgeformer("run", lm, "hello", "-n", 12, "-e", "cpu", "--seed", 5, "--stop", "§", *options)
    answer = load(lm, "cpu").generate(
        "hello",
        max_new_tokens=12,
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        seed=5,
        stop=["§"],
    )
    assert (code, out) == (0, answer.text + "\n")


def test_run_as_json(edgeformer, lm):
    code, out, _ = edgeformer("run", lm, "--ids", "5, 17,90", "-n", 4, "-e", "cpu", "--json", "--ignore-eos")
    facts = json.loads(out)
    assert code == 0
    assert facts["ids"] == load(lm, "cpu").generate([5, 17, 90], max_new_tokens=4, ignore_eos=True).ids
    assert facts["finish_reason"] == "length"
    assert facts["engine"] == "cpu"
    assert facts["timings"]["prompt_tokens"] == 3
    assert facts["timings"]["decode_tokens_per_second"] > 0


def test_run_reads_stdin_and_wraps_a_chat(edgeformer, lm, stdin):
    model = load(lm, "cpu")
    stdin("hello there")
    assert (
        edgeformer("run", lm, "-", "-n", 4, "-e", "cpu")[1]
        == model.generate("hello there", max_new_tokens=4).text + "\n"
    )
    stdin("hello there")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello there"}]
    code, out, _ = edgeformer("run", lm, "--chat", "--system", "Be brief.", "-n", 4, "-e", "cpu")
    assert (code, out) == (0, model.generate(messages, max_new_tokens=4).text + "\n")


def test_run_without_a_tokenizer_prints_ids(edgeformer, bundles):
    code, out, _ = edgeformer("run", bundles / "plain", "--ids", "5,6", "-n", 3, "-e", "cpu", "--ignore-eos")
    ids = load(bundles / "plain", "cpu").generate([5, 6], max_new_tokens=3, ignore_eos=True).ids
    assert (code, [int(part) for part in out.split()]) == (0, ids)


def test_run_with_arrays(edgeformer, bundles, tmp_path):
    values = np.random.default_rng(0).standard_normal((1, 4, 5)).astype(np.float32)
    np.savez(tmp_path / "in.npz", values=values)
    options = ["run", bundles / "forecast", "-e", "cpu", "--inputs", tmp_path / "in.npz"]
    code, out, _ = edgeformer(*options, "--outputs", tmp_path / "out.npz")
    assert (code, out) == (0, "forecast float32[1, 4, 3]\n")
    expected = load(bundles / "forecast", "cpu")(values=values)["forecast"]
    assert np.array_equal(np.load(tmp_path / "out.npz")["forecast"], expected)
    np.testing.assert_allclose(json.loads(edgeformer(*options, "--json")[1])["forecast"], expected, rtol=1e-6)
    assert edgeformer(*options)[1].startswith("forecast float32[1, 4, 3]\n[[[")


# --------------------------------------------------------------------------------------------------------------- chat


def test_a_chat_keeps_the_conversation(edgeformer, lm, stdin):
    stdin("hello\n\nand then?\n/help\n/frob\n/reset\nhello\n/exit\nnever read\n")
    code, out, err = edgeformer("chat", lm, "-n", 6, "-e", "cpu", "-t", 1)
    model, messages, answers = load(lm, "cpu", 1), [], []
    for line in ("hello", "and then?"):
        messages.append({"role": "user", "content": line})
        answers.append(model.generate(messages, max_new_tokens=6).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert code == 0
    assert out == "".join(answer + "\n" for answer in [*answers, answers[0]])
    assert "a new conversation" in err
    assert "unknown command /frob" in err
    assert re.search(r"prompt \d+ tokens \(\d+ reused\)", err)


def test_a_chat_with_a_bundle_that_searches_with_beams(edgeformer, lm, stdin, copy_of, reseal):
    bundle = copy_of(lm)
    path = bundle / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_beams": 2}))
    reseal(bundle)
    stdin("hello\n/reset\n")
    code, out, err = edgeformer("chat", bundle, "-n", 6, "-e", "cpu", "-t", 1)
    assert (code, "not taken" in err) == (0, False)
    chat = [{"role": "user", "content": "hello"}]
    assert out == load(lm, "cpu", 1).generate(chat, max_new_tokens=6, num_beams=2).text + "\n"


def test_a_message_that_is_too_long_is_refused_and_the_chat_goes_on(edgeformer, lm, stdin):
    stdin("hello\n" + "word " * 2000 + "\nhello again\n")
    code, out, err = edgeformer("chat", lm, "-n", 2, "-e", "cpu", "-q", "--system", "Be brief.")
    assert code == 0
    assert "Your last message was not taken" in err
    assert len(out.splitlines()) >= 2


def test_a_model_that_cannot_chat_says_so(edgeformer, bundles):
    code, _, err = edgeformer("chat", bundles / "plain", "-e", "cpu")
    assert code == 2
    assert "has no chat template" in err


# ------------------------------------------------------------------------------------------------------ look at things


def test_verify_tells_scripts_by_its_exit_code(edgeformer, lm, copy_of, reseal):
    code, out, _ = edgeformer("verify", lm, "-e", "cpu")
    assert code == 0
    assert "the numbers are the model's" in out
    damaged = copy_of(lm)
    with np.load(damaged / "reference.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["bundle.logits"][0, 0, 0] += 50
    np.savez(damaged / "reference.npz", **arrays)
    reseal(damaged)
    code, out, _ = edgeformer("verify", damaged, "-e", "cpu", "-e", "cpu")
    assert code == 1
    assert out.count("FAILED") == 2
    assert "at [0, 5, 0]" in out
    code, out, _ = edgeformer("verify", damaged, "-e", "cpu", "--json")
    assert code == 1
    assert json.loads(out)[0]["passed"] is False


def test_bench_prints_a_table_or_json(edgeformer, q8):
    options = ["bench", q8, "-p", "16,8", "-n", 4, "-d", "0,10", "-t", "1,2", "-r", 2, "-e", "cpu"]
    code, out, _ = edgeformer(*options)
    assert code == 0
    assert len(re.findall(r"pp16|pp8 |tg4", out)) == 12
    facts = json.loads(edgeformer(*options, "--json")[1])
    assert len(facts["rows"]) == 12
    assert [
        row["test"] for row in json.loads(edgeformer("bench", q8, "-p", 0, "-n", 2, "-r", 1, "--json")[1])["rows"]
    ] == ["tg2"]


def test_doctor_ends_well_where_an_engine_runs(edgeformer, q8):
    code, out, _ = edgeformer("doctor", q8)
    assert code == 0
    assert "loads this bundle" in out
    topics = {finding["topic"] for finding in json.loads(edgeformer("doctor", "--json")[1])}
    assert {"cpu", "engine cpu", "engine cuda", "engine native"} <= topics


def test_doctor_fails_where_no_engine_runs(edgeformer, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "edgeformer._native", None)
    monkeypatch.delattr("edgeformer._native", raising=False)
    code, out, _ = edgeformer("doctor")
    assert code == 1
    assert "needs onnxruntime" in out


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["run", "LM", "x", "--temperature", "-1"], 2, "temperature"),
        (["run", "LM", "x", "--frob"], 2, "No such option"),
        (["frob"], 2, "No such command"),
        (["run"], 2, "BUNDLE"),
        (["run", "LM", "x", "--repetition-penalty", "0"], 2, "repetition_penalty is 0.0"),
        (["run", "LM", "x", "-e", "gpu"], 2, "engine is 'gpu'"),
        (["run", "LM", "x", "-e", "cpu", "--isa", "avx2"], 2, "option of the native engine"),
        (["run", "LM", "x", "--ids", "1,2"], 2, "leave out the text"),
        (["run", "LM", "--ids", "1,x"], 2, "expected whole numbers"),
        (["run", "LM", "--ids", "99999", "-e", "cpu"], 2, "token id 99999"),
        (["run", "LM", "x", "--system", "y"], 2, "--system needs --chat"),
        (["run", "LM", "--inputs", "none.npz"], 2, "none.npz cannot be read"),
        (["run", "FORECAST", "x", "-e", "cpu"], 2, "is a forecasting model"),
        (["run", "nowhere", "x"], 3, "does not exist"),
        (["inspect", "DAMAGED"], 3, "2 problems"),
        (["run", "LM", "x", "-e", "cuda"], 4, "CUDA is not available"),
        (["bench", "LM", "-p", "x"], 2, "expected whole numbers"),
        (["bench", "LM", "-n", "-3"], 2, "at least 0"),
        (["bench", "LM", "-e", "cpu"], 2, "needs 512 positions"),
        (["bench", "LM", "-e", "cpu", "--profile"], 4, "has no profile"),
        (["verify", "LM", "-e", "tpu"], 2, "engine is 'tpu'"),
    ],
)
def test_a_mistake_gives_one_message_and_its_exit_code(
    edgeformer, bundles, lm, copy_of, monkeypatch, arguments, code, expected
):
    monkeypatch.setattr("edgeformer.engines.ort_install.cuda_driver_problem", lambda: "there is no NVIDIA driver")
    names = {"LM": lm, "FORECAST": bundles / "forecast"}
    if "DAMAGED" in arguments:
        names["DAMAGED"] = copy_of(lm)
        (names["DAMAGED"] / "config.json").unlink()
        (names["DAMAGED"] / "tokenizer.json").write_text("cut")
    got, out, err = edgeformer(*[names.get(argument, argument) for argument in arguments])
    assert (got, out) == (code, "")
    assert expected in re.sub(r"\s*[│\n]\s*", " ", err)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (InputError, 2),
        (TemplateError, 2),
        (BundleError, 3),
        (EngineUnavailable, 4),
        (ParityError, 1),
        (ExportError, 5),
        (TrainingError, 5),
        (StateError, 5),
        (EdgeformerError, 5),
    ],
)
def test_every_error_has_its_exit_code(kind, code):
    assert exit_code(kind("x")) == code


def test_a_disk_error_is_a_message(edgeformer, bundles, tmp_path):
    np.savez(tmp_path / "in.npz", values=np.zeros((1, 4, 5), np.float32))
    target = tmp_path / "no" / "such" / "out.npz"
    code, _, err = edgeformer(
        "run", bundles / "forecast", "-e", "cpu", "--inputs", tmp_path / "in.npz", "--outputs", target
    )
    assert code == 5
    assert "No such file or directory" in err


def test_a_defect_gives_a_traceback(lm, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("edgeformer.cli.run.run_prompt", broken)
    with pytest.raises(ZeroDivisionError):
        main(["run", str(lm), "x"])


# ------------------------------------------------------------------------------------------------------------ processes


def test_help_names_all_commands_and_starts_fast():
    resource = pytest.importorskip("resource")

    def timed():
        """Processor time in seconds, which does not depend on the load of the machine."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = _process("--help")
        out = process.communicate(timeout=60)[0]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process.returncode == 0
        assert all(name in out for name in ("export", "train", *COMMANDS))
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(timed() for _ in range(3)) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_examples(edgeformer, command):
    code, out, _ = edgeformer(command, "--help")
    assert code == 0
    assert "Examples" in out
    assert f"edgeformer {command}" in out


def test_the_version(edgeformer):
    import edgeformer as package

    assert edgeformer("--version")[:2] == (0, package.__version__ + "\n")


@pytest.mark.parametrize("half", ["export", "train"])
def test_export_and_train_have_their_own_options(half):
    pytest.importorskip("torch")
    process = _process(half, "--help")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Usage" in out
    process = _process(half, "--frobnicate")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "frobnicate" in out + err


def test_without_the_toolchains_packages_a_message_says_what_to_install(edgeformer, monkeypatch):
    monkeypatch.setattr("edgeformer.tools.toolchain.find_spec", lambda name: None if name == "torch" else object())
    code, _, err = edgeformer("export", "x", "-o", "y")
    assert code == 4
    assert "needs torch: pip install" in err


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_with_130_and_no_traceback(lm):
    # A shell starts background jobs with SIGINT ignored, and child processes inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = _process("chat", lm, "-n", 4, "-e", "cpu", stdin=subprocess.PIPE)  # waits for the next line
    signal.signal(signal.SIGINT, before)
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stderr.readline().startswith("prompt ")
    for _ in range(10):  # Python ignores an interrupt that is raised inside a finalizer
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            break
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "interrupted"


def test_a_closed_pipe_is_no_traceback(lm):
    process = _process(
        "run", lm, "hello", "-n", 200, "-e", "cpu", "--ignore-eos", env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    assert process.returncode == 5
    assert "Traceback" not in err
    assert "Broken pipe" not in err
