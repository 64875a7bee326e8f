"""``hdrq demo``: the whole path on the digits benchmark, one table at the end."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from .start import importing, run

with importing("hdrq demo"):
    from ..calibration_data.readers import read
    from ..checks import verify
    from ..errors import CheckFailed, ModelError
    from ..formats.atomic_files import (
        Kind,
        check_container,
        check_scratch,
        make_directory,
        new_directory,
        write_bytes,
        write_record,
    )
    from ..formats.engine_folder import PrecisionReport
    from ..formats.file_kinds import (
        BUNDLE,
        DEMO_COMMANDS,
        DEMO_HTML,
        DEMO_JSON,
        DIGITS,
        ENGINE,
        PARTIAL,
    )
    from ..formats.findings import Findings
    from ..reports.bench_page import Details, page, table
    from ..runtime.bench import Accuracy, BenchResult, Latency, harmonic_mean, interleaved
    from ..runtime.bench.measurement import benchmark_all
    from ..runtime.bench.timing import BenchPlan
    from . import calibrate as calibrate_command
    from . import export as export_command
    from . import merge as merge_command
    from .bench import print_table
    from .common import parser, progress_bar, seed_number

__all__ = ["arguments", "main"]

MODEL = "hdrq_deploy.calibration_data.models:resnet14"
SCHEMES = ((8, 8), (4, 8), (3, 3))
QUICK = ((8, 8), (3, 3))
# Few iterations want the larger of the paper's two learning rates.
FULL_ITERS, QUICK_ITERS, LEARNING_RATE = 150, 25, 1e-3

_EVIDENCE = "These digits show how it works; figures on real images are in docs/evidence/"

Row = tuple[str, BenchResult]


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    text = "Calibrate, merge, export and measure three domains of digits."
    p = parser("hdrq demo", text, "hdrq demo --quick --out hdrq-demo")
    p.add_argument("--out", type=Path, default=Path("hdrq-demo"), help="folder of all results")
    p.add_argument("--quick", action="store_true", help="two bit-widths, fewer iterations")
    p.add_argument("--seed", type=seed_number, default=0, help="seed of all random numbers")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq demo``."""
    kept = "finished bundles and engines are kept"
    return run("hdrq demo", lambda: _demo(arguments().parse_args(argv)), kept)


def _demo(args: argparse.Namespace) -> int:
    return _Demo(args.out, args.quick, args.seed).run()


class _Demo:
    """One run of the demonstration; every step is a command that a user could type."""

    def __init__(self, out: Path, quick: bool, seed: int) -> None:
        for module in ("torch", "onnxscript", "sklearn"):
            if importlib.util.find_spec(module) is None:
                raise ModelError(f"the demo needs {module}: pip install 'hdrq-deploy[demo]'")
        with importing("hdrq demo"):
            from ..calibration_data import digits
            from ..calibration_data.digits.make_checkpoints import TRAINING

        self.out, self.seed = out, seed
        self.schemes = QUICK if quick else SCHEMES
        self.iters = QUICK_ITERS if quick else FULL_ITERS
        self.iterations = 100 if quick else 300
        self.domains, self.digits, self.training = digits.TARGETS, digits, TRAINING
        self.checkpoints = TRAINING.folder(out / "checkpoints")
        self.commands: list[str] = []
        self.found: dict[str, Findings] = {}
        self.started = time.monotonic()
        check_container(out, list(self._outputs()), label="out")
        check_scratch()

    def _outputs(self) -> Iterator[tuple[str, Kind]]:
        """Name and kind of all that is written."""
        yield from (("data", DIGITS), ("results.json", DEMO_JSON), ("report.html", DEMO_HTML))
        yield "commands.sh", DEMO_COMMANDS
        if self.checkpoints != self.training.shipped:
            yield from ((f"checkpoints/{name}", kind) for name, kind in self.training.outputs())
        quantized = [f"{m}-w{w}a{a}" for w, a in self.schemes for m in ("rtn", "hdrq")]
        for name in ("float", *quantized):
            for member in (*self.domains, "merged"):
                yield f"bundles/{name}-{member}.hdrq", BUNDLE
                yield f"bundles/{name}-{member}.hdrq.partial", PARTIAL
                yield f"engines/{name}-{member}", ENGINE
                yield f"engines/{name}-{member}-rtx", ENGINE

    def run(self) -> int:
        """Walk the path and print the table."""
        out = self.out
        self._say(f"writing images of {', '.join(self.domains)} to {out / 'data'}")
        make_directory(out)
        with new_directory(out / "data", DIGITS, sync=False) as data:
            self.digits.write(data, self.domains, ("calibration", "test"), self.seed)
            write_record(data, DIGITS, {"seed": self.seed})
        self._train()
        engines = self._export_all(self._calibrate_all())
        precision = self._build_rtx()
        rows = self._measure(engines)
        parity = self._parity()
        header, cells = table(rows)
        print()
        print_table(header, cells)
        self._close(rows, header, cells, precision, parity)
        return 0

    def _train(self) -> None:
        """Train the models where this installation does not carry them."""
        if self.checkpoints == self.training.shipped:
            return
        self._say(
            f"training the source model and one of each domain into {self.checkpoints}: they are "
            "not part of the installed package (about two minutes)"
        )
        with progress_bar("train") as progress:
            self.training.train_missing(self.checkpoints, progress)

    def _calibrate_all(self) -> list[str]:
        """Bundles of every domain and their merges; returns the names of the merges."""
        merged = ["float"]
        for domain in self.domains:
            self._calibrate(domain, "float", ["--method", "float"])
        self._merge("float")
        for wbits, abits in self.schemes:
            for method in ("rtn", "hdrq"):
                name = f"{method}-w{wbits}a{abits}"
                self._say(f"calibrating {', '.join(self.domains)}: {method} W{wbits}A{abits}")
                knobs = ["--iters", str(self.iters), "--lr", str(LEARNING_RATE)]
                flags = ["--method", method, "--wbits", str(wbits), "--abits", str(abits)]
                for domain in self.domains:
                    self._calibrate(domain, name, flags + (knobs if method == "hdrq" else []))
                self._merge(name)
                merged.append(name)
        return merged

    def _calibrate(self, domain: str, name: str, flags: list[str]) -> None:
        files = {d: str(self.checkpoints / f"{d}.safetensors") for d in (domain, "fonts")}
        self._call(
            "hdrq-calibrate",
            calibrate_command.main,
            [
                *("--model", MODEL, "--weights", files[domain], "--base", files["fonts"]),
                *("--data", str(self.out / "data" / domain / "calibration")),
                *("--domain", domain, *flags, "--seed", str(self.seed)),
                *("-o", str(self._bundle(name, domain))),
            ],
        )

    def _merge(self, name: str) -> None:
        parents = [str(self._bundle(name, domain)) for domain in self.domains]
        self._call(
            "hdrq-merge",
            merge_command.main,
            [*parents, "--seed", str(self.seed), "-o", str(self._bundle(name, "merged"))],
        )

    def _export_all(self, names: list[str]) -> dict[str, Path]:
        self._say("exporting to ONNX Runtime")
        engines = {}
        for name in names:
            members = (*self.domains, "merged") if name == "float" else ("merged",)
            for member in members:
                target = self.out / "engines" / f"{name}-{member}"
                source = str(self._bundle(name, member))
                flags = [source, "--engine", "ort", "-o", str(target)]
                self._call("hdrq-export", export_command.main, flags)
                engines[f"{name}-{member}"] = target
        return engines

    def _build_rtx(self) -> str:
        """The TensorRT-RTX engine of the lowest HDRQ merge, built here without a GPU."""
        if importlib.util.find_spec("tensorrt_rtx") is None:
            return "TensorRT-RTX: not installed, not built (pip install 'hdrq-deploy[trt-rtx]')"
        wbits, abits = self.schemes[-1]
        name = f"hdrq-w{wbits}a{abits}"
        self._say("building a TensorRT-RTX engine")
        target = self.out / "engines" / f"{name}-merged-rtx"
        flags = [str(self._bundle(name, "merged")), "--engine", "trt-rtx", "-o", str(target)]
        self._call("hdrq-export", export_command.main, flags)
        summary = PrecisionReport.read(target).summary
        return f"TensorRT-RTX {version('tensorrt-rtx')}, {name} merged: {summary}"

    def _measure(self, engines: dict[str, Path]) -> list[Row]:
        self._say("measuring")
        data = {d: str(self.out / "data" / d / "test") for d in self.domains}
        shown = [f"{domain}={path}" for domain, path in data.items()]
        results = {}
        once, found = BenchPlan(iterations=1), self.found
        for name, path in engines.items():
            flags = [str(path), "--data", *shown, "--iterations", str(self.iterations)]
            self.commands.append(shlex.join(["hdrq-bench", *flags, "--threads", "1"]))
            (results[name],) = benchmark_all([path], data, once, threads=1, found=found)
        times = self._interleaved(list(engines.values()))
        for name, latency in zip(engines, times, strict=True):
            rate = 1000 * latency.batch / latency.mean
            update = {"latency_ms": latency, "throughput_images_per_s": rate}
            results[name] = results[name].model_copy(update=update)
        separate = self._separate([results.pop(f"float-{d}") for d in self.domains])
        rows: list[Row] = [("float, a model per domain", separate)]
        for name, result in results.items():
            method, _, scheme = name.removesuffix("-merged").partition("-")
            label = "float merged" if method == "float" else f"{method.upper()} merged"
            rows.append((f"{label} {scheme.upper()}".strip(), result))
        return rows

    def _interleaved(self, paths: list[Path]) -> list[Latency]:
        """Latency of one test image on every engine, measured in turn."""
        image = read(self.out / "data" / self.domains[0] / "test", limit=1).x
        return interleaved(paths, image, iterations=self.iterations)

    def _separate(self, results: list[BenchResult]) -> BenchResult:
        """One row for three engines: each answers for its own domain."""
        shares = {
            domain: result.accuracy.domains[domain]
            for domain, result in zip(self.domains, results, strict=True)
            if result.accuracy
        }
        first = results[0]
        return first.model_copy(
            update={
                "domains": {},
                "path": ", ".join(result.path for result in results),
                "size_bytes": sum(result.size_bytes for result in results),
                "accuracy": Accuracy(
                    domains=shares,
                    harmonic_mean=harmonic_mean(list(shares.values())),
                    images=first.accuracy.images if first.accuracy else {},
                ),
            }
        )

    def _parity(self) -> str:
        """PyTorch's fake-quantized model against ONNX Runtime on the test split."""
        import numpy as np

        self._say("comparing PyTorch with ONNX Runtime on the test images")
        wbits, abits = self.schemes[-1]
        name = f"hdrq-w{wbits}a{abits}"
        x = np.concatenate([read(self.out / "data" / d / "test").x for d in self.domains])
        engine = self.out / "engines" / f"{name}-merged"
        verification = verify(self._bundle(name, "merged"), engine, x, torch=True)
        parts = (
            f"{stage.name} {stage.decision_flips} decisions differ, codes by {stage.max_steps} "
            "at most"
            for stage in verification.stages
        )
        return f"{name} merged, {len(x)} test images: {'; '.join(parts)}"

    def _close(
        self,
        rows: list[Row],
        header: list[str],
        cells: list[list[str]],
        precision: str,
        parity: str,
    ) -> None:
        out = self.out
        note = f"{precision}. {parity}."
        title, command = "hdrq demo: digits, three domains, one engine", "hdrq demo"
        details = {
            name: Details.of(Path(r.path), self.found[r.path])
            for name, r in rows
            if r.path in self.found  # several engines in one row have no such path
        }
        report = page(title, rows, details, note, command)
        record = {
            "kind": DEMO_JSON.kind,
            "rows": {name: json.loads(result.model_dump_json()) for name, result in rows},
            "trt_rtx": precision,
            "parity": parity,
            "iters": self.iters,
            "seconds": round(time.monotonic() - self.started, 1),
        }
        text = json.dumps(record, indent=1) + "\n"
        write_bytes(out / "results.json", text.encode(), DEMO_JSON)
        write_bytes(out / "report.html", report.encode(), DEMO_HTML)
        script = "#!/bin/sh\n# The commands of this demonstration.\nset -e\n"
        script += "\n".join(self.commands) + "\n"
        write_bytes(out / "commands.sh", script.encode(), DEMO_COMMANDS)
        print(f"\n{precision}\n{parity}")
        print(f"\n{record['seconds']:.0f} s. Report: {out / 'report.html'}")
        print(f"Bundles, engines, results.json and the commands that made them: {out}")
        print(_EVIDENCE)

    def _bundle(self, name: str, member: str) -> Path:
        return self.out / "bundles" / f"{name}-{member}.hdrq"

    def _say(self, text: str) -> None:
        seconds = time.monotonic() - self.started
        print(f"[{seconds:5.0f} s] {text}", file=sys.stderr, flush=True)

    def _call(self, command: str, body: Callable[[Sequence[str]], int], argv: list[str]) -> None:
        line = shlex.join([command, *argv])
        self.commands.append(line)
        (self.out / "bundles").mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            code = body(argv)
        if code:
            raise CheckFailed(f"this step failed with code {code}: {line}")
