"""``hdrq-export``: a bundle becomes an engine folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .start import importing, run

with importing("hdrq-export"):
    from rich.console import Console
    from rich.table import Table

    from ..checks import export_fastest, export_measured, verify
    from ..checks.fastest_engine import AUTO
    from ..errors import ExportError
    from ..exporters import ENGINES, BuildOptions, GraphOptions, export, parse_shapes
    from ..exporters.export import ports
    from ..exporters.trtexec import trtexec
    from ..formats.atomic_files import check_outputs, check_scratch
    from ..formats.bundle_manifest import CODED
    from ..formats.engine_folder import GRAPH, PLAN, PrecisionReport
    from ..formats.file_kinds import ENGINE, TIMING_CACHE
    from .common import parser, progress_bar
    from .verify import show as show_verification

__all__ = ["arguments", "main", "show"]


_EXAMPLE = """\
hdrq-export merged.hdrq --engine ort -o engine
hdrq-export merged.hdrq --engine trt-rtx --verify -o engine-rtx"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    text = "Lower a bundle for an engine and show what the engine executes."
    p = parser("hdrq-export", text, _EXAMPLE)
    main_flags = p.add_argument_group("bundle and engine")
    main_flags.add_argument("bundle", help="calibrated or merged bundle")
    main_flags.add_argument(
        "--engine",
        default="ort",
        choices=(*ENGINES, AUTO),
        help="auto builds all that run on this machine, measures them and keeps the fastest",
    )
    main_flags.add_argument("-o", "--output", required=True, help="engine folder")
    main_flags.add_argument(
        "--verify", action="store_true", help="then run hdrq-verify on the bundle's golden inputs"
    )
    main_flags.add_argument(
        "--layers", action="store_true", help="print every layer, not only those in float"
    )
    main_flags.add_argument("--force", action="store_true", help="build again what is up to date")
    main_flags.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads of every engine that --engine auto and --measure time; 0: one per core",
    )
    main_flags.add_argument(
        "--measure",
        action="store_true",
        help="time the engine beside its float twin on this machine, and leave in float the layers "
        "that INT8 makes slower; says what was decided and why",
    )
    _input_flags(p.add_argument_group("the engine's input and output"))
    _graph_flags(p.rarely_used("precision"))
    _build_flags(p.rarely_used("TensorRT", "The names are those of trtexec."))
    return p


def _input_flags(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        "--fold-preprocess",
        action="store_true",
        help="the engine takes uint8 frames (N, H, W, C) and normalises them itself",
    )
    g.add_argument(
        "--postprocess",
        default="none",
        choices=("none", "softmax", "argmax"),
        help="what the engine does with the scores",
    )
    g.add_argument("--batch", type=int, help="fixed batch size (default: any)")
    g.add_argument("--dynamic-size", action="store_true", help="leave height and width free")
    g.add_argument("--input-name", help="name of the engine's input (default: the bundle's)")
    g.add_argument("--output-name", help="name of the engine's output (default: the bundle's)")


def _graph_flags(g: argparse._ArgumentGroup) -> None:
    g.add_argument(
        "--allow-float",
        action="append",
        default=[],
        metavar="PATTERN",
        help="module paths that may run in float although INT8 was requested",
    )
    g.add_argument(
        "--compute",
        default="fp16",
        choices=("fp16", "fp32"),
        help="float type around the INT8 layers of a TensorRT engine",
    )
    g.add_argument(
        "--weights-only",
        nargs="*",
        default=None,
        metavar="PATTERN",
        help="4-bit linear layers (all, or those of these module paths) keep real activations",
    )
    g.add_argument(
        "--keep-float",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="layers (module paths) that compute in float; 'hdrq sensitivity' suggests some",
    )
    g.add_argument(
        "--pack-int4",
        action="store_true",
        help="TensorRT: 4-bit linear layers with a scale per channel keep INT4 weights (a smaller "
        "plan where they hold most weights, one widening an inference)",
    )
    g.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ort: codes of non-negative tensors end at 127, bit for bit as calibrated; without "
        "it they go on to 255, which is a little faster",
    )


def _build_flags(b: argparse._ArgumentGroup) -> None:
    b.add_argument(
        "--batches",
        type=int,
        nargs=3,
        default=(1, 1, 8),
        metavar=("MIN", "OPT", "MAX"),
        help="batch sizes of the optimization profile",
    )
    for side in ("min", "opt", "max"):
        b.add_argument(
            f"--{side}-shapes",
            nargs="+",
            default=[],
            metavar="NAME:1x3x224x224",
            help=f"{side} shape of the profile; wins over --batches",
        )
    b.add_argument(
        "--workspace", type=int, metavar="MIB", help="memory limit of a tactic (default: none)"
    )
    b.add_argument(
        "--opt-level", type=int, help="builder optimization level, 0 to 5 (default: TensorRT's)"
    )
    b.add_argument("--timing-cache", metavar="FILE", help="file that is read and written back")
    b.add_argument("--refit", action="store_true", help="weights can be replaced later")
    b.add_argument("--strip-weights", action="store_true", help="make a plan without its weights")
    b.add_argument(
        "--hardware-compatibility",
        default="none",
        choices=("none", "ampere+", "same-cc"),
        help="other GPUs that the plan runs on",
    )
    b.add_argument("--dla-core", type=int, help="run on this DLA core where it can")
    b.add_argument(
        "--profiling",
        default="detailed",
        choices=("detailed", "layer-names", "none"),
        help="what the plan says of its layers; only detailed shows precisions",
    )
    b.add_argument(
        "--print-trtexec", action="store_true", help="print the trtexec command of the same build"
    )
    b.add_argument(
        "--no-build", action="store_true", help="stop at the lowered model.onnx, for trtexec"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-export``."""
    return run("hdrq-export", lambda: _export(arguments().parse_args(argv)))


def _export(args: argparse.Namespace) -> int:
    cache = args.timing_cache
    caches = [] if cache is None else [(cache, TIMING_CACHE, "timing_cache")]
    check_outputs([(args.output, ENGINE, "output"), *caches], [args.bundle])
    check_scratch()
    graph = GraphOptions(
        compute=args.compute,
        weights_only=() if args.weights_only is None else tuple(args.weights_only or ["*"]),
        keep_float=tuple(args.keep_float),
        pack_int4=args.pack_int4,
        exact=args.exact,
        batch=args.batch,
        dynamic_size=args.dynamic_size,
        input_name=args.input_name,
        output_name=args.output_name,
        fold_preprocess=args.fold_preprocess,
        postprocess=args.postprocess,
    )
    build = BuildOptions(
        shapes=parse_shapes(args.min_shapes, args.opt_shapes, args.max_shapes),
        batches=tuple(args.batches),
        workspace=args.workspace,
        opt_level=args.opt_level,
        timing_cache=args.timing_cache,
        refit=args.refit,
        strip_weights=args.strip_weights,
        hardware_compatibility=args.hardware_compatibility,
        dla_core=args.dla_core,
        profiling=args.profiling,
    )
    path = _export_one(args, graph, build)
    report = PrecisionReport.read(path)
    show(report, args.layers)
    print(f"{path}: {report.summary}")
    if args.print_trtexec and report.engine.startswith("trt"):
        print(trtexec(report.engine, path / GRAPH, path / PLAN, build, ports(path)))
    if args.verify:
        verification = verify(args.bundle, path, torch=False)
        show_verification(verification)
        verification.check()
    return 0


def _export_one(args: argparse.Namespace, graph: GraphOptions, build: BuildOptions) -> Path:
    """The engine that was asked for, or the fastest of all."""
    if args.engine == AUTO and args.no_build:
        raise ExportError("found --engine auto and --no-build; name one engine for its graph")
    if args.measure and args.no_build:
        raise ExportError("found --measure and --no-build; an engine is timed once it is built")
    if args.threads < 0:
        raise ExportError(f"found --threads {args.threads}; needed 0 (one per core) or more")
    with progress_bar("export") as progress:
        if args.engine == AUTO:
            return export_fastest(
                args.bundle,
                args.output,
                args.allow_float,
                graph,
                build,
                args.threads,
                args.force,
                progress=progress,
                measure=args.measure,
            )
        if args.measure:
            return export_measured(
                args.bundle,
                args.output,
                args.engine,
                args.allow_float,
                graph,
                build,
                args.threads,
                args.force,
                progress=progress,
            )
        return export(
            args.bundle,
            args.output,
            args.engine,
            allow_float=args.allow_float,
            options=graph,
            build=build,
            force=args.force,
            only_graph=args.no_build,
            progress=progress,
        )


def show(report: PrecisionReport, every: bool) -> None:
    """Print the layers: all of them, or those that run in float."""
    rows = report.layers
    if not every:
        rows = tuple(row for row in rows if row.executed not in {None, *CODED, "int4"})
    if not rows:
        return
    table = Table(title=f"{report.engine}: {report.source}", title_justify="left")
    for column in ("module", "op", "weight", "requested", "executed", "evidence"):
        table.add_column(column, overflow="fold")
    for row in rows:
        bits = f"{row.weight_bits} bits, {row.weight_bytes} B" if row.weight_bits else ""
        evidence = row.evidence + (f" ({row.reason})" if row.reason else "")
        table.add_row(row.module, row.op, bits, row.requested, row.executed or "-", evidence)
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)
