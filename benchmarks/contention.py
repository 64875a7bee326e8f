"""What idle OpenMP threads cost: calibrations alone and four at once, spinning and not.

    python benchmarks/contention.py --results benchmarks/results

Whole commands (``hdrq-calibrate`` on the digits benchmark's network, one process each) are run
under several settings in turn, in every round in another order:

=============  ==================================================================================
``unchanged``  ``GOMP_SPINCOUNT=300000``, which is what libgomp does where nothing is set
``ours``       nothing is set, so the command sets what it finds best
``spin-N``     ``GOMP_SPINCOUNT=N``, for every N of ``--spins``
=============  ==================================================================================

``alone_ratio`` is the median time alone over that of ``unchanged`` (target: at most 1.05), and
``together_ratio`` the median time of all at once over the same setting's time alone (target: at
most 3 for four). The machine must do nothing else; the marks say whether it did. ``cpu_s`` is
the processors' time of all commands of one sample: what spinning adds is seen there too.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evidence.records import write_record

from hdrq_deploy.calibration_data import digits
from hdrq_deploy.calibration_data.digits.make_checkpoints import CHECKPOINTS
from hdrq_deploy.runtime.bench.environment import Watch, environment

MODEL = "hdrq_deploy.calibration_data.models:resnet14"
DOMAIN = "night"
# What libgomp reads; a setting of the caller's shell must not reach the commands.
VARIABLES = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
METHODS = {
    "rtn": ["--method", "rtn"],
    "hdrq": ["--method", "hdrq", "--iters", "25", "--lr", "1e-3"],
}


def start(method: str, setting: dict[str, str], data: Path, output: Path) -> Any:
    """One calibration in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    code = "import sys; from hdrq_deploy.cli.calibrate import main; sys.exit(main())"
    flags = [
        *("--model", MODEL, "--weights", str(CHECKPOINTS / f"{DOMAIN}.safetensors")),
        *("--base", str(CHECKPOINTS / f"{digits.SOURCE}.safetensors"), "--data", str(data)),
        *("--domain", DOMAIN, "--wbits", "4", *METHODS[method], "-o", str(output)),
    ]
    return subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        env={**inherited, **setting},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def seconds(method: str, setting: dict[str, str], count: int, data: Path) -> tuple[float, float]:
    """Wall time until ``count`` calibrations that begin together have ended, and CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        running = [start(method, setting, data, Path(scratch) / f"{i}.hdrq") for i in range(count)]
        codes = [process.wait() for process in running]
        taken = time.perf_counter() - began
    if any(codes):
        raise SystemExit(f"a calibration ended with {codes}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return round(taken, 2), round(cpu, 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--together", type=int, default=4, help="calibrations at once")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="further settings")
    args = parser.parse_args(argv)
    settings = {"unchanged": {"GOMP_SPINCOUNT": "300000"}, "ours": {}}
    settings |= {f"spin-{n}": {"GOMP_SPINCOUNT": str(n)} for n in args.spins}
    names = list(settings)
    times: dict[str, Any] = {
        m: {n: {"alone": [], "together": []} for n in names} for m in args.methods
    }
    with tempfile.TemporaryDirectory() as scratch, Watch() as watch:
        digits.write(Path(scratch), (DOMAIN,), ("calibration",), 0)
        data = Path(scratch) / DOMAIN / "calibration"
        for method in args.methods:
            seconds(method, {}, 1, data)  # the disk's cache, for all of them
        for i in range(args.rounds):
            for method in args.methods:
                for name in names[i % len(names) :] + names[: i % len(names)]:
                    for kind, count in (("alone", 1), ("together", args.together)):
                        taken, cpu = seconds(method, settings[name], count, data)
                        times[method][name][kind].append((taken, cpu))
                        print(f"{i} {method} {name} {kind}: {taken} s, CPU {cpu} s", flush=True)
    record = {
        "schema_version": 1,
        "environment": {**environment(), **watch.facts(), "torch": version("torch")},
        "marks": watch.marks(),
        "together": args.together,
        "rows": [row(method, times[method]) for method in args.methods],
    }
    args.results.mkdir(parents=True, exist_ok=True)
    write_record(args.results / "contention.json", record)
    return 0


def row(method: str, times: dict[str, Any]) -> dict[str, Any]:
    """Medians and ratios of one method."""

    def medians(name: str, kind: str) -> list[float]:
        return [statistics.median(values) for values in zip(*times[name][kind], strict=True)]

    before, _ = medians("unchanged", "alone")
    rows = {}
    for name, found in times.items():
        (alone, alone_cpu), (together, together_cpu) = (
            medians(name, "alone"),
            medians(name, "together"),
        )
        rows[name] = {
            "alone_s": alone,
            "together_s": together,
            "alone_cpu_s": alone_cpu,
            "together_cpu_s": together_cpu,
            "alone_ratio": round(alone / before, 3),
            "together_ratio": round(together / alone, 3),
            "samples_s": found,
        }
        shown = {key: value for key, value in rows[name].items() if key != "samples_s"}
        print(method, name, shown, flush=True)
    return {"method": method, "settings": rows}


if __name__ == "__main__":
    raise SystemExit(main())
