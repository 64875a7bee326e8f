"""A base install on an emulated ARM processor: does it decide as x86 does? No hardware needed.

    python benchmarks/arm_emulated.py --work /tmp/arm --results benchmarks/results

Two bundles of the digits benchmark are calibrated here. The base install (no torch) then merges,
exports, verifies and benchmarks them twice: on this machine, and under Debian's ``qemu-user`` with
an arm64 Python and the wheels that a 64-bit ARM board installs. Codes of every quantizer and all
decisions on test images are compared, and what ONNX Runtime executes is read from the precision
reports. This is evidence of correctness only: times under emulation say nothing, and none is kept.

Needs Debian on x86-64 with apt and pip; nothing is installed outside ``--work``, and no root
rights are needed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from evidence.records import write_record

from hdrq_deploy.cli import bench, export, merge, verify
from hdrq_deploy.comparison.golden import ort_engine
from hdrq_deploy.formats.atomic_files import sha256_file, write_bytes
from hdrq_deploy.formats.engine_folder import GRAPH, PrecisionReport
from hdrq_deploy.graph.reference_session import open_session, session_options

DOMAINS = ("handwriting", "night")
IMAGES = 50  # of each domain
SETTINGS = {"W8A8": (8, 8), "W4A4": (4, 4)}
# What qemu is asked to be, and what that processor's /proc/cpuinfo says: ONNX Runtime reads it,
# and qemu shows it that of the machine underneath.
_A72 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_A76 = f"{_A72} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
PROCESSORS = {"cortex-a72": ("0xd08", _A72), "cortex-a76": ("0xd0b", _A76)}
# Wheels of these platforms run on the arm64 Python of Debian 12 (glibc 2.36).
_GLIBC = (34, 31, 28, 27, 26, 24, 17)
_PACKAGES = ("numpy", "onnx", "onnx-ir", "onnxruntime", "pydantic", "safetensors", "pillow")

Array = np.ndarray[Any, Any]


def device(work: Path, out: Path) -> None:
    """What the base install does with the bundles in ``work``; everything goes to ``out``."""
    x = np.load(work / "images.npz")["x"]
    record = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "torch": "torch" in sys.modules,
        "wrong_sums_of_minus_128": extremes(),
        "settings": {setting: run(setting, x, work, out) for setting in SETTINGS},
    }
    write_bytes(out / "record.json", json.dumps(record).encode())


def extremes() -> dict[str, int]:
    """Sums of products of -128 and -128 that ONNX Runtime gets wrong, by the type of the weights.

    Processors without dot product add two of them in 16 bits where the weights are int8, which is
    why an export there holds such weights as uint8 (``exporters/lowering_ort.py``).
    """
    rows, depth, columns = 8, 64, 32
    x = np.zeros((rows, depth), np.uint8)  # -128, for the zero point is 128
    wrong = {"of": rows * columns}
    for kind, point in ((np.int8, 0), (np.uint8, 128)):
        weights = np.full((depth, columns), point - 128, kind)
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("MatMulInteger", ["x", "w", "zx", "zw"], ["y"])],
            "extremes",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, x.shape)],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.INT32, [rows, columns])],
            [
                onnx.numpy_helper.from_array(np.asarray(value), name)
                for name, value in (("w", weights), ("zx", np.uint8(128)), ("zw", kind(point)))
            ],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
        model.ir_version = 10
        session = open_session(model.SerializeToString(), session_options(1))
        wrong[np.dtype(kind).name] = int(
            (session.run(None, {"x": x})[0] != 128 * 128 * depth).sum()
        )
    return wrong


def run(setting: str, x: Array, work: Path, out: Path) -> dict[str, Any]:
    """Merge, export, verify and bench one setting, as the commands do; what they said and did."""
    parents = [str(work / f"{domain}-{setting}.hdrq") for domain in DOMAINS]
    merged, engine = str(out / f"{setting}.hdrq"), str(out / f"{setting}-engine")
    found = str(out / f"{setting}-verify.json")
    short = ["--threads", "1", "--iterations", "3", "--warmup", "1"]
    commands: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
        "hdrq-merge": (merge.main, [*parents, "-o", merged]),
        "hdrq-export": (export.main, [merged, "-o", engine, "--threads", "1"]),
        "hdrq-verify": (verify.main, [merged, engine, "--no-torch", "--json", found]),
        "hdrq-verify, golden inputs": (verify.main, [engine]),
        "hdrq-bench": (bench.main, [engine, *short]),
    }
    codes = {}
    for name, (command, arguments) in commands.items():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            codes[name] = command(arguments)
        if codes[name]:
            return {"exit_codes": codes, "said": said.getvalue().strip().splitlines()[-1:]}
    ran = ort_engine(Path(engine) / GRAPH).run(x)
    arrays: dict[str, Any] = {"output": ran.output, **ran.codes}
    np.savez(out / f"{setting}.npz", **arrays)
    report = PrecisionReport.read(Path(engine))
    held = [tensor.data_type for tensor in onnx.load(str(Path(engine) / GRAPH)).graph.initializer]
    return {
        "exit_codes": codes,
        "summary": report.summary,
        "executed": dict(Counter(str(row.executed) for row in report.layers)),
        "kernels": dict(Counter(row.evidence.partition(" ")[0] for row in report.layers)),
        "precision_source": report.source,
        "initializers": dict(Counter(onnx.TensorProto.DataType.Name(kind) for kind in held)),
        "stages": [
            {k: stage[k] for k in ("name", "images", "decision_flips", "output_rms", "ties")}
            for stage in json.loads(Path(found).read_text())["stages"]
        ],
        "merged_sha256": sha256_file(Path(merged) / "weights.safetensors"),
    }


def calibrated(work: Path) -> None:
    """Bundles of both domains, and test images as the network reads them."""
    from hdrq_deploy.calibration import calibrate
    from hdrq_deploy.calibration_data.digits import make_checkpoints
    from hdrq_deploy.calibration_data.readers import ImageSet

    def read(domain: str, split: str) -> Array:
        x: Array = make_checkpoints.tensors(domain, split)[0].numpy()
        return x

    for setting, (wbits, abits) in SETTINGS.items():
        for domain in DOMAINS:
            calibrate(
                "hdrq_deploy.calibration_data.models:resnet14",
                ImageSet(read(domain, "calibration")[:64], None, None, None),
                domain,
                work / f"{domain}-{setting}.hdrq",
                weights=make_checkpoints.CHECKPOINTS / f"{domain}.safetensors",
                base=make_checkpoints.CHECKPOINTS / "fonts.safetensors",
                method="rtn",
                wbits=wbits,
                abits=abits,
            )
    x = np.concatenate([read(domain, "test")[:IMAGES] for domain in DOMAINS])
    np.savez(work / "images.npz", x=x)


def emulator(work: Path) -> list[str]:
    """An arm64 Python with the base install below ``work``; returns its command, but for a CPU."""
    host, root, state, site = (work / name for name in ("host", "root", "apt", "site"))
    for folder in (host, root, state / "lists" / "partial", state / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    foreign = [
        *("-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64"),
        *("-o", f"Dir::State={state}", "-o", f"Dir::State::status={state / 'status'}"),
        *("-o", f"Dir::Cache={state}", "-o", "Debug::NoLocking=1"),
    ]
    _run(["apt-get", "download", "qemu-user-static"], cwd=host)
    _run(["apt-get", *foreign, "update"])
    packages = ("python3.11", "libstdc++6")
    fetch = ("-y", "--download-only", "--no-install-recommends", "install")
    _run(["apt-get", *foreign, *fetch, *packages])
    for package in host.glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(host)])
    for package in (state / "archives").glob("*.deb"):
        _run(["dpkg", "-x", str(package), str(root)])
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in _GLIBC] + ["manylinux2014_aarch64"]
    pip = [sys.executable, "-m", "pip"]
    source = work / "source"  # a build leaves files where it runs
    shutil.rmtree(source, ignore_errors=True)
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "checkpoints", "__pycache__")
    shutil.copytree(Path(__file__).resolve().parents[1], source, ignore=ignored)
    shutil.rmtree(work / "wheel", ignore_errors=True)
    _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(work / "wheel"), str(source)])
    (wheel,) = (work / "wheel").glob("hdrq_deploy-*.whl")
    of_arm = ["--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"]
    of_arm += [word for name in platforms for word in ("--platform", name)]
    _run([*pip, "install", *of_arm, "--upgrade", "--target", str(site), str(wheel)])
    python = str(root / "usr" / "bin" / "python3.11")
    return [str(host / "usr" / "bin" / "qemu-aarch64-static"), "-L", str(root), python]


def emulated(command: Sequence[str], processor: str, work: Path, out: Path) -> None:
    """Run :func:`device` on an emulated processor."""
    part, features = PROCESSORS[processor]
    cores = (
        f"processor\t: {core}\nBogoMIPS\t: 50.00\nFeatures\t: {features}\n"
        f"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x1\n"
        f"CPU part\t: {part}\nCPU revision\t: 1\n\n"
        for core in range(os.cpu_count() or 1)
    )
    (work / "root" / "proc").mkdir(exist_ok=True)
    (work / "root" / "proc" / "cpuinfo").write_text("".join(cores))
    *qemu, python = command
    own = [str(Path(__file__).resolve()), "--device", "--work", str(work), "--out", str(out)]
    paths = {"PYTHONPATH": str(work / "site"), "OPENBLAS_NUM_THREADS": "1"}
    _run([*qemu, "-cpu", processor, python, *own], env={**os.environ, **paths})


def compared(here: Path, there: Path) -> dict[str, Any]:
    """How far two runs of :func:`device` are apart, setting by setting."""
    first, second = (json.loads((p / "record.json").read_text()) for p in (here, there))
    rows = {}
    for setting in SETTINGS:
        before, after = first["settings"][setting], second["settings"][setting]
        rows[setting] = {k: v for k, v in after.items() if not k.endswith("sha256")}
        if any(after["exit_codes"].values()):
            continue
        a, b = (np.load(p / f"{setting}.npz") for p in (here, there))
        apart = {
            name: np.abs(a[name].astype(np.int32) - b[name]) for name in a.files if name != "output"
        }
        one, two = a["output"], b["output"]
        rows[setting] |= {
            "same_merge": before["merged_sha256"] == after["merged_sha256"],
            "same_kernels": before["kernels"] == after["kernels"],
            "decisions": len(one),
            "decisions_that_differ": int((one.argmax(1) != two.argmax(1)).sum()),
            "output_rms": float(np.sqrt(np.square(one - two).mean() / np.square(one).mean())),
            "codes": {
                name: {"count": d.size, "differ": int((d > 0).sum()), "most": int(d.max())}
                for name, d in apart.items()
            },
        }
    return {k: v for k, v in second.items() if k != "settings"} | {"settings": rows}


def agrees(rows: Mapping[str, Any]) -> bool:
    """Whether all commands passed, the merge has the same bytes, and all decisions are the same."""
    return all(
        not any(row["exit_codes"].values())
        and row["decisions_that_differ"] == 0
        and row["same_merge"]
        for row in rows.values()
    )


def _run(command: Sequence[str], **how: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise SystemExit(f"{' '.join(command[:4])} ... ended with {done.returncode}:\n{said}")


def main(argv: Sequence[str] | None = None) -> int:
    """Build the emulated device, run both, compare, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    work = args.work.resolve()
    if args.device:
        args.out.mkdir(parents=True, exist_ok=True)
        device(work, args.out)
        return 0
    work.mkdir(parents=True, exist_ok=True)
    command = emulator(work)
    calibrated(work)
    own = [str(Path(__file__).resolve()), "--device", "--work", str(work)]
    _run([sys.executable, *own, "--out", str(work / "x86")])
    found: dict[str, Any] = {}
    for processor in PROCESSORS:
        emulated(command, processor, work, work / processor)
        found[processor] = compared(work / "x86", work / processor)
        word = "agrees" if agrees(found[processor]["settings"]) else "differs"
        print(processor, word, flush=True)
        write(work, command[0], found, args.results)
    return 0 if all(agrees(row["settings"]) for row in found.values()) else 1


def write(work: Path, emulator: str, found: Mapping[str, Any], results: Path) -> None:
    """``arm_emulated.json`` of the processors so far."""
    version_of = subprocess.run([emulator, "--version"], capture_output=True, text=True, check=True)
    record = {
        "schema_version": 1,
        "emulator": version_of.stdout.splitlines()[0],
        "reference": json.loads((work / "x86" / "record.json").read_text()),
        "processors": found,
    }
    results.mkdir(parents=True, exist_ok=True)
    write_record(results / "arm_emulated.json", record)


if __name__ == "__main__":
    raise SystemExit(main())
