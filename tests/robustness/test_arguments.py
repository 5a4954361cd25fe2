"""Arguments of every public function that are out of range, of a wrong type, rank or order of bytes.

Each gives an error of edgeformer's own that names the argument, and leaves the model as it was.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import edgeformer
from edgeformer import Model, load
from edgeformer.decoding.session import Session
from edgeformer.errors import ContextError, EdgeformerError, InputError
from edgeformer.tasks.scheduler import GenerationScheduler

IDS = [5, 40, 17, 88]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module", params=["cpu", "native"])
def model(request, bundles):
    return load(bundles / "float", request.param, threads=1)


@pytest.fixture(scope="module", params=["cpu", "native"])
def forecast(request, bundles):
    return load(bundles / "forecast", request.param, threads=1)


def unchanged(model):
    return model.generate(IDS, max_new_tokens=4).ids


# ------------------------------------------------------------------------------------------------------------ token ids

PROMPTS = {
    "-1": [5, -1],
    "the vocabulary's size": [5, 320],
    "2**31": [2**31],
    "2**63": [2**63],
    "2**64": [2**64],
    "-2**63": [-(2**63)],
    "a float": [5.0, 7],
    "NaN": [NAN],
    "a bool": [True, False],
    "a text in a list of ids": [5, "x"],
    "None in a list": [5, None],
    "a batch": np.array([[5, 7]]),
    "rank 0": np.array(5),
    "floats": np.array([5.0, 7.0]),
    "bools": np.array([True]),
    "complex": np.array([1j]),
    "objects": np.array([5, 7], object),
    "texts": np.array(["5"]),
    "ids beyond int64": np.array([2**63], np.uint64),
    "bytes": b"hello",
    "None": None,
    "a number": 7,
    "a set": {5, 7},
    "a lone surrogate": "\ud800",
    "a message without a role": [{"content": "x"}],
    "a message that is text": [{"role": "user", "content": "x"}, "x"],
    "a message with bytes": [{"role": "user", "content": b"x"}],
}


def scheduled(model, prompt):
    with model.scheduler(max_sequences=1) as scheduler:
        scheduler.add(prompt, max_new_tokens=1).result()


HOW = {
    "generate": lambda model, prompt: model.generate(prompt, max_new_tokens=1),
    "stream": lambda model, prompt: list(model.stream(prompt, max_new_tokens=1)),
    "generate_each": lambda model, prompt: next(iter(model.generate_each([prompt], max_new_tokens=1))).answers(),
    "scheduler": scheduled,
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", PROMPTS)
def test_a_wrong_prompt_is_refused(model, case, how):
    prompt = PROMPTS[case]
    with pytest.raises(EdgeformerError, match=r".{20}"):
        HOW[how](model, prompt)


@pytest.mark.parametrize(
    "ids",
    [
        np.array(IDS, ">i8"),
        np.array(IDS, np.uint8),
        np.array(IDS, np.int16),
        np.array([[5, 0], [40, 0], [17, 0], [88, 0]])[:, 0],
        np.asfortranarray(np.array([IDS]))[0],
        tuple(IDS),
        [np.int32(i) for i in IDS],
    ],
    ids=["big-endian", "uint8", "int16", "not contiguous", "Fortran", "a tuple", "numpy numbers"],
)
def test_the_same_ids_in_another_form_give_the_same_tokens(model, ids):
    if isinstance(ids, np.ndarray):
        ids.setflags(write=False)
    assert model.generate(ids, max_new_tokens=4).ids == unchanged(model)
    assert np.array_equal(model.logits(ids), model.logits(IDS))


# --------------------------------------------------------------------------------------------------- generation options

OPTIONS = {
    "temperature": (-1, NAN, INF, "1", None.__class__, [1], True),
    "top_p": (-0.1, 1.1, NAN, INF, "x", []),
    "min_p": (-0.1, 1.1, NAN),
    "typical_p": (-0.1, 1.1, NAN),
    "top_k": (-1, 1.5, NAN, "5", 2**70),
    "repetition_penalty": (0, -1, NAN, INF),
    "max_new_tokens": (-1, 1.5, NAN, "5", True, 2**70),
    "min_new_tokens": (-1, 1.5, "x"),
    "num_beams": (0, -1, 1.5, 2**40),
    "n": (0, -1, 1.5, 10**9),
    "seed": (-1, 1.5, "x", NAN),
    "logprobs": (-1, 21, 1.5, "x"),
    "prompt_logprobs": (-1, 21, 1.5, "x"),
    "stop": (5, [5], [""], [None], b"x"),
    "eos_token_id": (-1, 320, 1.5, "x", [2**63]),
    "no_repeat_ngram_size": (-1, 1.5, "x"),
    "max_time": (-1, NAN, "x"),
    "context_policy": ("wrap", 5, ""),
    "context_protect": (-1, 1.5, "x"),
    "speculation": ("fast", 5),
    "session": (5, "x"),
    "json_schema": ("x", 5),
    "regex": (5, "("),
    "choices": ([], [5], "x"),
    "logit_bias": ({}, 5),
    "unknown_option": (1,),
}
CASES = [(name, value) for name, values in OPTIONS.items() for value in values]
# What these mean is harmless: transformers takes them too, or they are values of the option.
MEANT = {
    "max_new_tokens=1180591620717411303424": "until the context ends",
    "top_k=1180591620717411303424": "all tokens",
    "eos_token_id=-1": "an end that never comes",
    "eos_token_id=320": "an end that never comes",
    "eos_token_id=[9223372036854775808]": "an end that never comes",
    "logit_bias={}": "no bias",
}
# Where the message has another name for it.
NAMED = {"json_schema": "(?i)json.schema"}


@pytest.fixture(scope="module")
def scheduler(model):
    with model.scheduler() as made:
        yield made


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}={value!r:.20}" for name, value in CASES])
def test_an_option_out_of_its_range_is_refused_by_name(model, scheduler, name, value):
    before = unchanged(model)
    options = {"max_new_tokens": 2, "do_sample": name in SAMPLED, "seed": 1, name: value}
    if f"{name}={value!r}" in MEANT:
        assert model.generate(IDS, **options).ids == scheduler.add(IDS, **options).result().ids
    else:
        # A scheduler refuses at once, and not when the answer is asked for.
        for call in (model.generate, scheduler.add, scheduler.stream):
            with pytest.raises(EdgeformerError, match=NAMED.get(name, name)):
                call(IDS, **options)
        assert (scheduler.running, scheduler.waiting) == (0, 0)
    assert unchanged(model) == before


@pytest.mark.parametrize("answer", [None, 5, "x", []], ids=repr)
def test_only_an_answer_can_be_cancelled(scheduler, answer):
    with pytest.raises(InputError, match="cancel"):
        scheduler.cancel(answer)


SAMPLED = ("temperature", "top_p", "min_p", "typical_p", "top_k")


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 1e-30}, {"top_p": 0.0}, {"top_p": 1}, {"top_k": 0}, {"top_k": 10**6}],
    ids=str,
)
def test_limits_of_sampling_are_values(model, options):
    greedy = unchanged(model)
    found = model.generate(IDS, max_new_tokens=4, seed=1, **{"temperature": 1.0, **options}).ids
    assert len(found) == 4 or 0 in found or 2 in found
    if options.get("temperature", 1) < 1e-3 or options.get("top_p") == 0:
        assert found == greedy


# --------------------------------------------------------------------------------------------------------------- arrays

ARRAYS = {
    "another size": np.zeros((1, 4, 6), np.float32),
    "another rank": np.zeros((4, 5), np.float32),
    "rank 0": np.float32(1),
    "integers": np.zeros((1, 4, 5), np.int64),
    "texts": np.full((1, 4, 5), "x"),
    "objects": np.full((1, 4, 5), None),
    "complex": np.zeros((1, 4, 5), np.complex64),
    "no rows": np.zeros((1, 0, 5), np.float32),
    "no batch": np.zeros((0, 4, 5), np.float32),
    "a ragged list": [[[1.0] * 5, [1.0] * 4]],
    "a text": "x",
    "None": None,
}


@pytest.mark.parametrize("case", ARRAYS)
def test_a_wrong_array_is_refused(forecast, case):
    with pytest.raises(InputError, match="values"):
        forecast(values=ARRAYS[case])


def test_names_of_inputs_are_checked(forecast):
    good = np.zeros((1, 4, 5), np.float32)
    with pytest.raises(InputError, match="missing"):
        forecast()
    with pytest.raises(InputError, match="other"):
        forecast(values=good, other=good)


@pytest.mark.parametrize("form", ["big-endian", "Fortran", "not contiguous", "read-only", "float64", "a list"])
def test_the_same_array_in_another_form_gives_the_same_numbers(forecast, form):
    good = np.random.default_rng(0).standard_normal((2, 4, 5)).astype(np.float32)
    frozen = good.copy()
    frozen.setflags(write=False)
    forms = {
        "big-endian": good.astype(">f4"),
        "Fortran": np.asfortranarray(good),
        "not contiguous": np.repeat(good, 2, axis=1)[:, ::2],
        "read-only": frozen,
        "float64": good.astype(np.float64),
        "a list": good.tolist(),
    }
    assert np.array_equal(forecast(values=forms[form])["forecast"], forecast(values=good)["forecast"])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_numbers_that_are_none_pass_through_and_stay_in_their_row(forecast, bad):
    """The arrays are the caller's: a NaN is an answer about them. Other rows of the batch are as without it."""
    values = np.random.default_rng(0).standard_normal((2, 4, 5)).astype(np.float32)
    clean = forecast(values=values)["forecast"]
    values[0, 1, 2] = bad
    found = forecast(values=values)["forecast"]
    assert np.array_equal(found[1], clean[1])
    assert np.array_equal(np.delete(found[0], 1, axis=0), np.delete(clean[0], 1, axis=0))


# -------------------------------------------------------------------------------------------------------------- context


@pytest.mark.parametrize("length", [255, 256, 257, 1000])
@pytest.mark.parametrize("policy", [None, "stop", "error", "slide"])
def test_a_full_context_does_what_was_asked(model, length, policy):
    """The model has 256 positions; a prompt of all of them still gives one token."""
    ids = [3 + i % 300 for i in range(length)]

    def run():
        return model.generate(ids, max_new_tokens=4, ignore_eos=True, context_policy=policy)

    if length > 256 and policy != "slide":
        with pytest.raises(ContextError, match=rf"{length}.*256|256.*{length}"):
            run()
    elif policy == "error":
        with pytest.raises(ContextError, match="256"):
            run()
    elif policy == "slide":
        assert (run().finish_reason, len(run().ids)) == ("length", 4)
    else:
        assert run().finish_reason == "context"
        assert len(run().ids) == 257 - length


# ------------------------------------------------------------------------------------------------- load, and the others

LOADS = {
    "engine": ("gpu", "", 5, None),
    "threads": (0, -1, 1.5, "2", True, 2**40),
    "kv": ("int4", 5),
    "context": (0, -1, 2**40, "x", 1.5),
    "memory_limit": (0, -5, 1000, "x"),
    "isa": ("sse9", 5),
    "check": ("all", 5),
    "prefix_cache": (-1, 1.5),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in LOADS.items() for value in values], ids=lambda v: repr(v)[:20]
)
def test_an_option_of_load_out_of_its_range_is_refused(lm, name, value):
    options = {"engine": "native", name: value}
    with pytest.raises(EdgeformerError):
        load(lm, **options)


@pytest.mark.parametrize("path", [None, 5, b"\xff", "", "/nowhere", "\0", ["x"]], ids=repr)
def test_a_path_that_is_none_is_refused(path):
    with pytest.raises(EdgeformerError):
        load(path)


SCHEDULERS = {
    "max_sequences": (0, -1, 1.5, "x", True),
    "token_budget": (0, -1, 1.5),
    "memory_limit": (0, -1, 1.5),
    "queue_limit": (-1, 1.5, "x"),
    "stretch": (0, 1, -2.5, float("nan"), float("inf"), "x", True),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in SCHEDULERS.items() for value in values],
    ids=lambda v: repr(v)[:20],
)
def test_an_option_of_a_scheduler_out_of_its_range_is_refused(model, name, value):
    with pytest.raises(InputError, match=name):
        model.scheduler(**{name: value})


OTHERS = {
    "logits": [([],), ([[5]],), ([320],), ([-1],), (None,), ("x",), ([5.0],)],
    "encode_prompt": [(None,), (5,), ([5, "x"],)],
    "embed": [("x",), (None,), (5,)],
    "classify": [("x",), (None,)],
    "classify_tokens": [("x",), (None,)],
    "score": [([("x", "y")],), (None,)],
    "rank": [("x", ["y"]), (None, None)],
    "similarity": [("x", "y"), (None, None)],
    "transcribe": [(None,), ("nowhere.wav",), (5,)],
    "transcribe_each": [([None],)],
    "transcribe_stream": [(None,), (5,)],
    "__call__": [()],
    "memory": [(-1,), ("x",), (2**70,), (1.5,)],
}


@pytest.mark.parametrize(("method", "arguments"), [(m, a) for m, cases in OTHERS.items() for a in cases], ids=repr)
def test_other_methods_refuse_what_they_cannot_take(model, method, arguments):
    call = getattr(model, method)
    with pytest.raises(EdgeformerError):
        list(call(*arguments)) if method.endswith(("each", "stream")) else call(*arguments)


TRIED = {
    Model: {*OTHERS, "generate", "stream", "generate_each", "scheduler"},
    GenerationScheduler: {"add", "stream", "cancel"},
}
# What `session` refuses is in test_session_files.py.
NO_ARGUMENTS = {Model: {"explain", "session", "pair"}, GenerationScheduler: {"close", "count_in"}}


@pytest.mark.parametrize("owner", TRIED)
def test_no_public_method_is_left_out(owner):
    public = {name for name, _ in inspect.getmembers(owner, inspect.isfunction) if not name.startswith("_")}
    assert public - TRIED[owner] - NO_ARGUMENTS[owner] == set()


def test_functions_of_the_package_are_known():
    functions = {n for n in edgeformer.__all__ if inspect.isfunction(getattr(edgeformer, n))}
    assert functions == {"load"}
    assert Session.__name__ == "Session"
