"""A calibration that is stopped, at any moment, goes on to the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hdrq_deploy import Bundle, HdrqError
from hdrq_deploy.calibration import calibrate
from hdrq_deploy.calibration.recipe import Options
from hdrq_deploy.calibration.resume import Partial
from hdrq_deploy.formats.statistics import STATISTICS

# Starts the command once, then one child for every line it reads: importing torch takes
# seconds, and a kill should meet the work.
_SERVER = """
import os, sys
import torch, onnxscript
import hdrq_deploy.calibration
from hdrq_deploy.cli.calibrate import main
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        os._exit(main(line.split()))
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


def digest(bundle: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(bundle.iterdir())}


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_bytes_of_an_undisturbed_run(
    work: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(work), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=work,
        env=environment,
    )
    assert server.stdin and server.stdout

    def start(output: Path, *more: str) -> int:
        assert server.stdin and server.stdout
        server.stdin.write(
            f"--model tiny_models:Tiny --weights {work}/Tiny-night.safetensors "
            f"--base {work}/Tiny-base.safetensors --data {work}/data.npz --domain night "
            f"--wbits 4 --iters 200 --batch 16 -o {output} {' '.join(more)}\n"
        )
        server.stdin.flush()
        return int(server.stdout.readline())

    def end() -> int:
        assert server.stdout
        return os.waitstatus_to_exitcode(int(server.stdout.readline()))

    try:
        began = time.monotonic()
        start(tmp_path / "whole.hdrq")
        assert end() == 0
        seconds = time.monotonic() - began
        draw, output, kinds = random.Random(0), tmp_path / "killed.hdrq", []
        for i in range(3):
            child = start(output, "--resume")
            # Later kills come later, so that all of the way is met.
            time.sleep(draw.uniform(0, seconds * (0.4, 0.6, 0.9)[i]))
            kind = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(child, kind)
            code = end()
            kinds.append(code)
            if output.exists():  # whole, or not there
                Bundle.open(output)
                if code == 0:
                    shutil.rmtree(output)
        assert any(code != 0 for code in kinds)
        start(output, "--resume")
        assert end() == 0
    finally:
        server.stdin.close()
        server.wait()
    assert digest(output) == digest(tmp_path / "whole.hdrq")
    assert not (tmp_path / "killed.hdrq.partial").exists()


# Writes, resumes and ends an unfinished calibration in children that kill themselves before the
# Nth change of a file, for every N; after each one another child goes on to the end.
_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from hdrq_deploy.calibration.resume import Partial
from hdrq_deploy.errors import HdrqError
from hdrq_deploy.formats.staleness import CALIBRATION, code_of
code_of(*CALIBRATION)  # once for all children
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
RUN, BLOCKS = {"seed": 0}, 3

def run(output, kill_at=None):
    changes = 0
    def hook(event, args):
        nonlocal changes
        makes = event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT
        if not makes and event not in CHANGES:
            return
        changes += 1
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    partial = Partial.open(output, RUN, resume=True, blocks=BLOCKS)
    found = [i for i in range(BLOCKS) if partial.load(i)]
    for i in set(range(BLOCKS)) - set(found):
        partial.save(i, {"codes": torch.full((4,), i)}, {"loss": i})
    partial.close()
    return found

for kill_at in range(1, 1000):
    output = Path(sys.argv[1], f"{kill_at}.hdrq")
    child = os.fork()
    if child == 0:
        run(output, kill_at)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    child = os.fork()
    if child == 0:
        try:
            said = run(output)
        except HdrqError as error:
            said = error
        print(kill_at, ended, said, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    if ended == 0:
        break
"""


def test_a_kill_before_any_change_of_a_file_leaves_what_resume_goes_on_from(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    ends = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert [int(moment) for moment, *_ in ends] == list(range(1, len(ends) + 1))
    assert [int(end) for _, end, _ in ends] == [-signal.SIGKILL] * (len(ends) - 1) + [0]
    kept = [said for *_, said in ends]
    # Whole blocks are found again; the last runs were killed when all was removed, in order.
    assert list(dict.fromkeys(kept)) == ["[]", "[0]", "[0, 1]", "[0, 1, 2]", "[1, 2]", "[2]"]
    assert list(tmp_path.iterdir()) == []


def tiny(
    work: Path, output: Path, seed: int = 0, resume: bool = True, method: str = "hdrq"
) -> Bundle:
    return calibrate(
        "tiny_models:Tiny",
        work / "data.npz",
        "night",
        output,
        work / "Tiny-night.safetensors",
        work / "Tiny-base.safetensors",
        wbits=4,
        seed=seed,
        resume=resume,
        method=method,
        options=Options.of(method, iters=3, batch=8),
    )


class _Stop(Exception):
    pass


def stop_after(work: Path, output: Path, blocks: int, method: str = "hdrq") -> None:
    save = Partial.save

    def counted(self: Partial, index: int, *rest: object) -> None:
        save(self, index, *rest)  # type: ignore[arg-type]
        if index + 1 == blocks:
            raise _Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Stop):
        patch.setattr(Partial, "save", counted)
        tiny(work, output, method=method)


def test_finished_blocks_are_not_learned_again(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(work, tmp_path / "a.hdrq", 2)
    partial = tmp_path / "a.hdrq.partial"
    assert len(list(partial.glob("block-*"))) == 2
    from hdrq_deploy.calibration import reconstruction as reconstruct

    learned = []
    learn = reconstruct._learn
    monkeypatch.setattr(
        reconstruct, "_learn", lambda run, *rest: learned.append(run) or learn(run, *rest)
    )
    resumed = tiny(work, tmp_path / "a.hdrq")
    whole = tiny(work, tmp_path / "whole.hdrq")
    assert STATISTICS in digest(whole.path) and digest(resumed.path) == digest(whole.path)
    del learned[-len(whole.manifest.metrics["blocks"]) :]
    blocks = resumed.manifest.metrics["blocks"]
    assert len(learned) == len(blocks) - 2
    assert not partial.exists()


def test_two_stages_resume_to_the_same_bytes(work: Path, tmp_path: Path) -> None:
    stop_after(work, tmp_path / "a.hdrq", 1, "brecq")
    resumed = tiny(work, tmp_path / "a.hdrq", method="brecq")
    fresh = tiny(work, tmp_path / "b.hdrq", resume=False, method="brecq")
    assert digest(resumed.path) == digest(fresh.path)


def test_other_options_do_not_go_on_with_these_blocks(work: Path, tmp_path: Path) -> None:
    stop_after(work, tmp_path / "a.hdrq", 1)
    with pytest.raises(HdrqError, match="option seed: 0, now 1.; resume needs the same"):
        tiny(work, tmp_path / "a.hdrq", seed=1)
    (block,) = (tmp_path / "a.hdrq.partial").glob("block-*")
    block.write_bytes(block.read_bytes()[:-4])
    with pytest.raises(HdrqError, match="cannot be read .*remove it"):
        tiny(work, tmp_path / "a.hdrq")
    tiny(work, tmp_path / "a.hdrq", resume=False)
    assert not (tmp_path / "a.hdrq.partial").exists()


@pytest.mark.parametrize("kind", ["flip", "cut", "other", "run", "list", "deep"])
def test_altered_blocks_are_not_gone_on_with(work: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "a.hdrq"
    stop_after(work, output, 1)
    folder = tmp_path / "a.hdrq.partial"
    (block,) = folder.glob("block-*")
    data = block.read_bytes()
    damages = {
        "flip": (block, data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]),  # a learned value
        "cut": (block, data[: len(data) // 2]),
        "other": (block, data.replace(b'\\"loss_', b'\\"lost_', 1)),
        "run": (folder / "run.json", b"{"),
        "list": (folder / "run.json", b"[]"),
        "deep": (folder / "run.json", b"[" * 100_000),
    }
    file, damaged = damages[kind]
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    # A folder without a record of ours is somebody else's, and nothing of it is touched.
    foreign = file.name == "run.json"
    with pytest.raises(HdrqError, match="other content" if foreign else "cannot be read") as error:
        tiny(work, output)
    assert "\n" not in str(error.value) and not output.exists()
    if foreign:
        with pytest.raises(HdrqError, match="other content"):
            tiny(work, output, resume=False)
        assert file.read_bytes() == damaged
        shutil.rmtree(folder)
    tiny(work, output, resume=False)
