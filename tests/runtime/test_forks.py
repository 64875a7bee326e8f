"""Buffers that are filled again, and processes that are forked off: nothing waits for ever."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy.errors import EngineError, HdrqError
from hdrq_deploy.exporters import export
from hdrq_deploy.mixing import DomainMixer
from hdrq_deploy.runtime import Engine, load_engine
from hdrq_deploy.runtime.engine import Pending

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
PATIENCE_S = 60


@pytest.fixture
def folder(make: Any, tmp_path: Path) -> Path:
    return export(make(domain="night"), tmp_path / "engine")


def said(work: Callable[[], Any]) -> str:
    """What a call raised, or ``done``."""
    try:
        work()
    except HdrqError as error:
        return str(error)
    return "done"


def in_child(work: Callable[[], Any]) -> str:
    """What a call raised in a process that was forked off here; fails where it hangs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, said(work).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], PATIENCE_S)
        assert ready, "the child hangs"
        return os.read(reader, 10_000).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)


def test_a_buffer_may_be_filled_again_at_once(folder: Path, inputs: Any) -> None:
    with load_engine(folder, threads=1) as engine:
        expected = [engine(inputs[i : i + 1]) for i in range(len(inputs))]
        name = engine.inputs[0].name
        buffer = np.empty_like(inputs[:1])
        for named in (False, True):
            pending = []
            for row in inputs:
                buffer[0] = row
                pending.append(engine.run_async({name: buffer} if named else buffer))
            buffer[:] = 0
            for one, scores in zip(pending, expected, strict=True):
                found = one.wait(60)
                found = found[engine.outputs[0].name] if named else found
                np.testing.assert_array_equal(found, scores)


def test_an_engine_says_in_a_forked_process_that_it_is_not_of_it(folder: Path, inputs: Any) -> None:
    with load_engine(folder, threads=2) as engine:
        expected = engine(inputs)
        call = engine.bound(inputs)
        begun: Pending = engine.run_async(inputs)  # there is a worker thread now
        frame = np.zeros((16, 16, 3), np.uint8)
        calls: dict[str, Callable[[], Any]] = {
            "call": lambda: engine(inputs),
            "run_async": lambda: engine.run_async(inputs),
            "wait": begun.wait,
            "bound": call,
            "predict": lambda: engine.predict(frame),
            "warm_up": engine.warm_up,
            "timed": lambda: engine.timed(inputs),
            "all_rows": lambda: engine.all_rows(inputs),
        }
        for name, work in calls.items():
            text = in_child(work)
            assert "forked from process" in text and "load the engine there too" in text, name
            assert "\n" not in text
        assert in_child(engine.close) == "done"
        assert in_child(lambda: engine.__exit__(None, None, None)) == "done"
        # Locks that a thread of the parent holds are held for ever in the child.
        with engine._guard:
            assert "forked" in in_child(lambda: engine.run_async(inputs))
            assert in_child(engine.close) == "done"
        np.testing.assert_array_equal(begun.wait(60), expected)
        np.testing.assert_array_equal(engine(inputs), expected)

        def own() -> None:
            with load_engine(folder, threads=1) as mine:
                np.testing.assert_array_equal(mine(inputs), expected)

        assert in_child(own) == "done"
    assert "closed" in said(lambda: engine(inputs))
    engine.close()


def test_the_end_of_a_forked_process_frees_no_engine(
    folder: Path, inputs: Any, tmp_path: Path
) -> None:
    """Freeing threads that are not there may crash; a process ends by itself all the same."""
    script = tmp_path / "fork.py"
    script.write_text(
        "import os, sys, time\n"
        "import numpy as np\n"
        "from hdrq_deploy.errors import EngineError\n"
        "from hdrq_deploy.runtime import load_engine\n"
        f"engine = load_engine({str(folder)!r}, threads=4)\n"
        "x = np.zeros((64, 3, 16, 16), np.float32)\n"
        "engine(x); engine.run_async(x).wait()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try:\n"
        "        engine.run_async(x)\n"
        "    except EngineError:\n"
        "        engine.close()\n"
        "        del engine\n"
        "        sys.exit(7)\n"
        "end = time.monotonic() + 60\n"
        "while time.monotonic() < end:\n"
        "    done, status = os.waitpid(child, os.WNOHANG)\n"
        "    if done:\n"
        "        engine(x)\n"
        "        engine.close()\n"
        "        sys.exit(0 if os.waitstatus_to_exitcode(status) == 7 else 1)\n"
        "    time.sleep(0.02)\n"
        "os.kill(child, 9)\n"
        "sys.exit(2)\n"
    )
    done = subprocess.run([sys.executable, str(script)], timeout=300, check=False)
    assert done.returncode == 0, "1: another status than 7, 2: the child hangs"


def work_of(engine: Engine, x: Any, answers: Any) -> None:
    answers.put(said(lambda: engine(x)))


def test_workers_of_multiprocessing(folder: Path, inputs: Any) -> None:
    context = multiprocessing.get_context("fork")
    with load_engine(folder, threads=1) as engine:
        answers = context.SimpleQueue()
        worker = context.Process(target=work_of, args=(engine, inputs, answers))
        worker.start()
        worker.join(PATIENCE_S)
        assert worker.exitcode == 0
        assert "forked from process" in answers.get()
        # What a spawned worker would be sent.
        for send in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(EngineError, match="cannot be copied or sent to another process"):
                send(engine)


def test_workers_of_a_data_loader(folder: Path, inputs: Any) -> None:
    from torch.utils.data import DataLoader, Dataset

    class Scores(Dataset[str]):
        def __init__(self, engine: Engine) -> None:
            self.engine = engine

        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> str:
            return said(lambda: self.engine(inputs[i : i + 1]))

    with load_engine(folder, threads=1) as engine:
        loader = DataLoader(
            Scores(engine), num_workers=1, timeout=PATIENCE_S, multiprocessing_context="fork"
        )
        texts = [text for (text,) in loader]
    assert len(texts) == 3 and all("forked from process" in text for text in texts)


def test_a_mixer_in_a_forked_process(make: Any, inputs: Any) -> None:
    parents = [make(domain=name, fold="steps") for name in ("night", "day")]
    mixer = DomainMixer(parents, threads=2)
    mixer.set({"night": 0.7, "day": 0.3}).result(60)
    expected = mixer(inputs)
    frame = np.zeros((16, 16, 3), np.uint8)
    calls: dict[str, Callable[[], Any]] = {
        "call": lambda: mixer(inputs),
        "run": lambda: mixer.run(inputs),
        "set": lambda: mixer.set({"night": 1.0}),
        "adapt": lambda: mixer.adapt(inputs),
        "predict": lambda: mixer.predict([frame]),
        "adapt_async": lambda: mixer.adapt_async([frame]),
    }
    for held in (False, True):
        if held:
            mixer._lock.acquire()
        try:
            for name, work in calls.items():
                text = in_child(work)
                assert "forked from process" in text and "make another mixer there" in text, name
            assert in_child(mixer.close) == "done"
        finally:
            if held:
                mixer._lock.release()
    np.testing.assert_array_equal(mixer(inputs), expected)
    started = time.monotonic()
    mixer.close()
    mixer.close()
    assert time.monotonic() - started < PATIENCE_S
    for name, work in calls.items():
        assert said(work) == "the mixer is closed; make another one", name
