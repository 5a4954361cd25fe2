"""Mixed use of a model for some seconds (`make soak`: an hour), and faults that the soak must see."""

from __future__ import annotations

import pytest
from support import fuzz_all, soak
from support.own_process import run

from bench.report import ROOT, runs

pytest.importorskip("edgeformer._native", reason="the native extension is not built")

GOOD = {"warm": 900, "resident_mb": [100.0, 101.9], "in_use_mb": [20.0, 20.3], "same_bits": True, "threads_left": 0}
SHORT = {"warm": 1200, "operations": 150}  # half a minute for both engines


@pytest.mark.parametrize("engine", ["native", "cpu"])
def test_mixed_use_leaves_the_bits_the_memory_and_the_threads_as_they_were(lm, engine):
    """In a process of its own, whose memory and threads are of this alone."""
    run(
        f"""
        sys.path.insert(0, os.path.join(os.environ["PYTHONPATH"], "tests"))
        from support import fuzz_all, soak
        report = soak.soak(ENGINE, 0, **{SHORT})
        assert soak.problems(report) == [], report
        assert min(report["kinds"].values()) > 20, report
        """,
        lm,
        engine,
    )


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"resident_mb": [100.0, 102.1]}, "resident_mb grew by 2.1%"),
        ({"in_use_mb": [20.0, 20.5]}, "in_use_mb grew by 2.5%"),
        ({"same_bits": False}, "other bits"),
        ({"threads_left": 1}, "threads are left"),
        ({"problems": ["generate: StateError: x"]}, "StateError"),
    ],
)
def test_a_fault_in_a_report_is_a_problem(fault, said):
    assert soak.problems(GOOD | {"problems": []}) == []
    assert said in soak.problems({**GOOD, "problems": [], **fault})[0]


def test_the_soak_sees_a_leak_a_thread_and_other_bits(q8):
    # in a process of its own: what leaks is little beside the memory of a process that ran many tests
    found = run(
        """
        sys.path.insert(0, os.path.join(os.environ["PYTHONPATH"], "tests"))
        from pathlib import Path
        from tempfile import TemporaryDirectory
        from support import soak

        class Leaky(soak.Soak):
            kept, left = [], threading.Event()

            def states(self, rng):
                super().states(rng)
                self.kept.append(b"x" * 300_000)

            def probe(self):
                return [*super().probe(), len(self.kept)]

        threading.Thread(target=Leaky.left.wait, daemon=True).start()
        with TemporaryDirectory() as folder:
            print(" ".join(soak.problems(Leaky(PATH, ENGINE, Path(folder)).run(0, warm=30, operations=30))))
        Leaky.left.set()
        """,
        q8,
        "native",
    )
    assert "resident_mb grew" in found or "in_use_mb grew" in found, found
    assert "threads are left" in found and "other bits" in found, found


def test_the_soak_sees_a_job_that_fails(q8, tmp_path):
    made = soak.Soak(q8, "native", tmp_path)
    made.jobs = {lambda rng: made.model.generate([-1]): 1}
    assert "InputError" in soak.problems(made.run(0, warm=30, operations=30))[0]


@pytest.mark.parametrize(("study", "page", "name"), [(soak, "contract.md", "soak"), (fuzz_all, "security.md", "fuzz")])
def test_the_pages_are_what_their_commands_print(study, page, name):
    text = (ROOT / "docs" / page).read_text().partition(f"<!-- {name}:begin -->")[2]
    assert text.partition(f"<!-- {name}:end -->")[0].strip() == study.page(runs(name)[0]).strip()
