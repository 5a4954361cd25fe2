"""The run-time contract of docs/contract.md: processes, threads, interrupts, memory, the end of the interpreter.

Each case runs in a process of its own, because it changes limits and signals of the whole process.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from support.own_process import run

from edgeformer import load

ENGINES = ("cpu", "native")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forked_child_works_or_says_why_not_and_the_parent_goes_on(lm, engine):
    run(
        """
        model = load(PATH, ENGINE, threads=2)
        before = tokens(model)
        child = os.fork()
        if not child:
            try:
                code = 0 if tokens(model) == before else 1
            except StateError as error:
                code = 2 if "fork" in str(error) else 3
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == {"native": 0, "cpu": 2}[ENGINE], code
        assert tokens(model) == before
        """,
        lm,
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_spawned_process_loads_for_itself(lm, engine, tmp_path):
    (tmp_path / "job.py").write_text(
        "from edgeformer import load\n"
        "def work(where):\n"
        "    return load(*where, threads=1).generate([5, 40, 17, 88], max_new_tokens=8, ignore_eos=True).ids\n"
    )
    run(
        f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import multiprocessing, job
        expected = tokens(load(PATH, ENGINE, threads=1))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.map(job.work, [(PATH, ENGINE)] * 2) == [expected] * 2
        """,
        lm,
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_models_engines_and_states_are_not_pickled(lm, engine):
    model = load(lm, engine, threads=1)
    for thing in (model, model.engine, model.session()):
        with pytest.raises(TypeError, match="pickle"):
            pickle.dumps(thing)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("where", ["load", "prefill", "decode", "stream", "scheduler"])
def test_ctrl_c_raises_and_the_model_goes_on(lm, engine, where):
    run(
        f"""
        where = {where!r}
        model = load(PATH, ENGINE, threads=1)
        before, session = tokens(model), model.session()
        long = [3 + i % 300 for i in range(250)]
        def work():
            while True:
                if where == "load":
                    load(PATH, ENGINE, threads=1)
                elif where == "prefill":
                    model.logits(long)
                elif where == "decode":
                    model.generate(IDS, max_new_tokens=200, ignore_eos=True, session=session)
                elif where == "stream":
                    list(model.stream(IDS, max_new_tokens=200, ignore_eos=True))
                else:
                    with model.scheduler(max_sequences=2) as scheduler:
                        scheduler.add(IDS, max_new_tokens=200, ignore_eos=True).result()
        for wait in (0.05, 0.02, 0.08):
            timer = threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                work()
            except KeyboardInterrupt:
                pass
            timer.join()
            assert tokens(model) == before
            # What the session holds is the beginning of what it would hold without the interrupt.
            found = model.generate(IDS, max_new_tokens=8, ignore_eos=True, session=session).ids
            # On ONNX Runtime the last bits depend on how many rows run together.
            assert found == before or (ENGINE == "cpu" and len(found) == 8), (found, before)
        for _ in range(600):  # a scheduler whose close was interrupted ends on its own
            if threading.active_count() > 1:
                time.sleep(0.1)
        assert threading.active_count() == 1, threading.enumerate()
        """,
        lm,
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_the_interpreter_ends_while_threads_generate(lm, engine):
    out = run(
        """
        model = load(PATH, ENGINE, threads=2)
        scheduler = model.scheduler()
        scheduler.add(IDS, max_new_tokens=200, ignore_eos=True)
        started = threading.Barrier(4)
        def work():
            started.wait()
            while True:
                tokens(model, 100)
        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        started.wait()
        stream = model.stream(IDS, max_new_tokens=100)
        next(iter(stream))
        print("end")
        """,
        lm,
        engine,
    )
    assert out.strip() == "end"


@pytest.mark.parametrize("engine", ENGINES)
def test_generators_that_are_dropped_free_their_states(lm, engine):
    run(
        """
        model = load(PATH, ENGINE, threads=1)
        before = tokens(model)
        def drop(n):
            for i in range(n):
                stream = model.stream(IDS, max_new_tokens=50, ignore_eos=True)
                for _ in range(i % 7):
                    next(stream)
                del stream
        drop(100)
        first = resident()
        drop(500)
        grown = resident() - first
        assert grown < 3 << 20, grown  # 500 states that stay would be 20 MB
        assert tokens(model) == before
        """,
        lm,
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exception_between_two_pieces_leaves_the_model_as_it_was(lm, engine):
    run(
        """
        model = load(PATH, ENGINE, threads=1)
        before, session = tokens(model), model.session()
        for stop in range(5):
            try:
                for i, piece in enumerate(model.stream(IDS, max_new_tokens=20, ignore_eos=True, session=session)):
                    if i == stop:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            assert tokens(model) == before
            assert model.generate(IDS, max_new_tokens=8, ignore_eos=True, session=session).ids == before
        """,
        lm,
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_share_a_model_and_each_gets_its_own_tokens(lm, engine):
    run(
        """
        model = load(PATH, ENGINE, threads=2)
        prompts = [[3 + i, 40, 17] for i in range(6)]
        expected = [model.generate(p, max_new_tokens=12, ignore_eos=True).ids for p in prompts]
        wrong = []
        def work(i):
            for _ in range(5):
                found = model.generate(prompts[i], max_new_tokens=12, ignore_eos=True).ids
                if found != expected[i]:
                    wrong.append((i, found))
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong, wrong
        """,
        lm,
        engine,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_another_thread_goes_on_during_a_forward(bundles, engine):
    run(
        """
        model = load(PATH, ENGINE, threads=1)
        values = np.ones((1, 400_000, 5), np.float32)
        ticks, inside, ended = [], threading.Event(), threading.Event()
        def tick():
            while not ended.is_set():
                if inside.is_set():
                    ticks.append(1)
                time.sleep(0.001)
        other = threading.Thread(target=tick)
        other.start()
        inside.set()
        model(values=values)
        inside.clear()
        ended.set()
        other.join()
        assert len(ticks) > 3, len(ticks)  # it would be 0 or 1 if the GIL were held
        """,
        bundles / "forecast",
        engine,
    )


LOADS = int(os.environ.get("EDGEFORMER_LOADS", "60"))  # `make soak` takes 1000


@pytest.mark.parametrize("engine", ENGINES)
def test_many_loads_take_no_more_memory(q8, engine):
    out = run(
        f"""
        def loads(n):
            for _ in range(n):
                assert tokens(load(PATH, ENGINE, threads=2), 2)
        loads(30)
        first = resident()
        loads({LOADS})
        grown = resident() - first
        print(grown)
        assert grown < 4 << 20, grown
        assert threading.active_count() == 1
        """,
        q8,
        engine,
    )
    assert int(out) < 4 << 20


@pytest.mark.parametrize("engine", ENGINES)
def test_a_load_without_memory_says_so_and_the_next_one_works(lm, engine):
    """Also where no thread can be started, and where a started one finds no memory. Nothing is printed."""
    out = run(
        """
        before = tokens(load(PATH, ENGINE, threads=2))
        failed = 0
        for extra in [k << 14 for k in (0, 1, 9, 18, 27, 64, 150, 400, 700, 1000)]:
            limit(extra)
            try:
                load(PATH, ENGINE, threads=2)
            except (EdgeformerError, MemoryError):
                failed += 1
            limit(None)
            assert tokens(load(PATH, ENGINE, threads=2)) == before
        assert failed, "no load failed"
        """,
        lm,
        engine,
    )
    assert out == ""


def test_a_tokenizer_that_cannot_be_parsed_is_out_of_memory_and_the_process_lives(lm):
    run(
        """
        from pathlib import Path
        from edgeformer.processing.tokenizer import Tokenizer
        path = Path(PATH) / "tokenizer.json"
        expected = Tokenizer.read(path, None, None).encode("some text")
        limit(10 * path.stat().st_size)  # the parsed one takes 15 to 18 times the file
        try:
            Tokenizer.read(path, None, None)
            assert False, "no error"
        except OutOfMemory as error:
            assert "tokenizer.json" in str(error), error
        limit(None)
        assert Tokenizer.read(path, None, None).encode("some text") == expected
        """,
        lm,
        "native",
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_without_memory_raises_and_the_states_are_as_before(bundles, engine):
    run(
        """
        engine = load(PATH, ENGINE, threads=1, context=256).engine if ENGINE == "native" else \\
            load(PATH, ENGINE, threads=1).engine
        ids = np.array([[3 + i % 300 for i in range(250)]])
        def step(state, ids):
            return engine.forward([({"input_ids": ids, "logits_to_keep": 1}, state)])[0]["logits"]
        fresh = engine.new_state()
        step(fresh, ids)
        expected = step(fresh, ids[:, :1])
        limit(96 << 20)
        states, error = [], None
        while error is None:
            state = engine.new_state()
            try:
                step(state, ids)
            except MemoryError as e:
                error = e
            else:
                states.append(state)
            assert len(states) < 20_000
        assert isinstance(error, OutOfMemory), repr(error)
        assert state.length == 0, state.length
        last = states[-1]
        limit(None)
        assert last.length == 250
        assert np.array_equal(step(last, ids[:, :1]), expected)
        step(state, ids)
        assert np.array_equal(step(state, ids[:, :1]), expected)
        """,
        bundles / "float",
        engine,
    )


def test_the_script_fails_where_it_should(lm):
    with pytest.raises(AssertionError, match="no such thing"):
        run('raise SystemExit("no such thing")', lm, "cpu")
    assert Path(lm).exists()
