"""Commands side by side: how many run at a time, on which GPU, in which order, and what stops them."""

import _thread
import threading
import time

import pytest

from pretrain.side_by_side import run_all, visible_gpus
from pretrain.signals import STOPPED


def test_as_many_as_there_are_jobs_each_with_its_gpu():
    """Four jobs on two GPUs: two on each; the fifth takes the first slot that is free."""
    running, most, gpus, lock = set(), [], {}, threading.Lock()
    four = threading.Barrier(4, timeout=20)

    def run(name, gpu):
        with lock:
            running.add(name)
            most.append(len(running))
            gpus[name] = gpu
        if name != "e":
            four.wait()
        with lock:
            running.remove(name)
        return 3 if name == "b" else 0

    statuses = run_all("abcde", run, jobs=4, gpus=["2", "5"], after={})
    assert statuses == {"a": 0, "b": 3, "c": 0, "d": 0, "e": 0} and max(most) == 4
    assert [gpus[name] for name in "abcd"] == ["2", "5", "2", "5"] and gpus["e"] in ("2", "5")


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_what_needs_another_waits_for_it(jobs):
    ended = []

    def run(name, gpu):
        assert gpu is None and (name != "asks" or "trained" in ended)
        time.sleep(0.1 if name == "trained" else 0.0)
        ended.append(name)
        return 0

    statuses = run_all(["asks", "trained", "other"], run, jobs=jobs, gpus=[], after={"asks": "trained"})
    assert statuses == dict.fromkeys(("asks", "trained", "other"), 0)


def test_nothing_begins_after_a_stop():
    assert run_all("abc", lambda name, gpu: STOPPED, jobs=1, gpus=[], after={}) == {"a": STOPPED}


def test_ctrl_c_waits_for_what_runs_and_begins_nothing_new():
    ended, both = [], threading.Barrier(2, timeout=20)

    def run(name, gpu):
        both.wait()
        if name == "a":
            _thread.interrupt_main()
        time.sleep(0.5)  # a command that saves what it has
        ended.append(name)
        return 130 if name == "a" else STOPPED

    assert run_all("abcd", run, jobs=2, gpus=[], after={}) == {"a": STOPPED, "b": STOPPED}
    assert sorted(ended) == ["a", "b"]


@pytest.mark.parametrize(("named", "gpus"), [("", []), ("3", ["3"]), ("0,GPU-8a", ["0", "GPU-8a"])])
def test_gpus_have_the_names_of_the_environment(monkeypatch, named, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == gpus
