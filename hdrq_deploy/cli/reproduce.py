"""``hdrq reproduce``: the paper's two protocols, and two on other real images."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .start import importing, run

with importing("hdrq reproduce"):
    from ..calibration.settings import SETTINGS
    from ..errors import HdrqError, ModelError
    from ..experiments.bundles import inputs_of
    from ..experiments.cells import jobs
    from ..experiments.comparison_sheets import SCENES, draw, picture_name
    from ..experiments.finished import check_finished
    from ..experiments.grid import BITS, Grid, bundle_path, parse_bits, row_path
    from ..experiments.rate_search import images_for
    from ..experiments.real_images import ADAPTATIONS, PROTOCOLS, Choice, Preparation, prepare
    from ..experiments.table import cells, header, markdown, network, notes, rows
    from ..experiments.tasks import (
        HRDA,
        Task,
        check_images,
        is_written,
        made,
        made_checkpoints,
        office_home,
        segmentation,
        write_made,
    )
    from ..experiments.tuning import (
        TUNING,
        chosen_rates,
        first_trials,
        keep_search,
        known_search,
        searched_on,
        searched_runs,
        tune,
    )
    from ..experiments.ways import WAYS
    from ..formats.atomic_files import (
        Kind,
        alone_in,
        check_container,
        check_scratch,
        make_directory,
        read_json,
        write_bytes,
    )
    from ..formats.file_kinds import (
        BUNDLE,
        CELL_INPUTS,
        CELL_ROW,
        PARTIAL,
        PICTURE,
        REPRODUCE_JSON,
        REPRODUCE_TABLE,
        TUNING_JSON,
        partial_of,
    )
    from ..formats.staleness import fingerprint
    from ..jobs.job import run_jobs
    from ..jobs.pool import open_pool
    from ..runtime.bench.environment import environment
    from .bench import print_table
    from .common import parser, progress_lines, seed_number, threads_of, where_flags

__all__ = ["arguments", "main"]

_OF_THE_PAPER = ("office-home", "segmentation")
# Protocols that label pixels.
_SCENES = ("segmentation", "camvid")
_TEXT = """\
Run a protocol and print its table.

Every cell is a bundle in OUT/cells and its figures in OUT/rows; the same command resumes where it
was stopped. --made runs on digits (office-home) or drawn streets (segmentation), with nothing to
download. pacs and camvid take the data sets as they are distributed, and train a source model and
one of each domain into OUT/checkpoints first."""
_EXAMPLE = """\
hdrq reproduce office-home --made --out made
hdrq reproduce pacs --data pacs --weights lite0.safetensors --bits w4a8 --out pacs-run"""


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq reproduce", _TEXT, _EXAMPLE)
    _input_flags(p.add_argument_group("protocol, data and output"))
    _cell_flags(p.add_argument_group("cells"))
    where = p.add_argument_group("where it runs")
    where.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where torch computes"
    )
    where_flags(where)
    _network_flags(p.rarely_used("network and adaptation"))
    _merge_flags(p.rarely_used("merges"))
    knobs = p.rarely_used("learning", "The protocols have defaults of their own.")
    rates = knobs.add_mutually_exclusive_group()
    rates.add_argument(
        "--tune",
        nargs="*",
        metavar="wXaY",
        help="search the learning rate of every method on calibration images first, at these bits "
        "(all of --bits), into OUT/tuning.json; other bits take the rate of the nearest",
    )
    rates.add_argument(
        "--rates",
        type=Path,
        metavar="TUNING.json",
        help="take the rates that --tune found in another run, instead of a search; the file is "
        "copied to OUT/tuning.json",
    )
    knobs.add_argument("--iters", type=int, help="iterations a block")
    knobs.add_argument("--batch", type=int, help="images per iteration")
    knobs.add_argument("--images", type=int, help="calibration images of each domain")
    return p


def _input_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "protocol", choices=(*_OF_THE_PAPER, *PROTOCOLS), help="data sets, networks and domains"
    )
    group.add_argument("--made", action="store_true", help="on the data that the project makes")
    group.add_argument("--data", type=Path, help="folder of the data set(s)")
    group.add_argument(
        "--checkpoints",
        type=Path,
        help="folder of checkpoints, or OUT of an earlier run",
    )
    group.add_argument(
        "--out", type=Path, required=True, help="folder of cells, rows, table.md, results.json"
    )
    group.add_argument(
        "--table", action="store_true", help="print the table of finished cells; run nothing"
    )
    group.add_argument(
        "--draw",
        metavar="wXaY",
        help="pictures of two scenes a domain: image, labels, float merged, merged at these bits",
    )


def _cell_flags(grid: argparse._ArgumentGroup) -> None:
    grid.add_argument(
        "--methods",
        nargs="+",
        default=["brecq", "qdrop", "hdrq"],
        help="calibration methods of hdrq-calibrate",
    )
    grid.add_argument(
        "--bits", nargs="+", default=list(BITS), metavar="wXaY", help="bits of weights, activations"
    )
    grid.add_argument(
        "--settings",
        nargs="+",
        choices=SETTINGS,
        help="presets of hdrq-calibrate (default: paper; pacs and camvid: ours)",
    )
    grid.add_argument(
        "--seeds", type=seed_number, nargs="+", default=[0, 1], help="calibration seeds"
    )
    grid.add_argument("--pairs", action="store_true", help="merge every pair of domains too")


def _merge_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=[],
        help="merge in these ways alone, of those of the settings (default: all of them)",
    )
    group.add_argument("--rounding-seeds", type=int, default=4, help="draws of every merge")


def _network_flags(group: argparse._ArgumentGroup) -> None:
    own = ", ".join(f"{name}: {protocol.source}" for name, protocol in PROTOCOLS.items())
    group.add_argument("--source", help=f"source domain (default: office-home: Real World, {own})")
    group.add_argument(
        "--targets", nargs="+", default=[], help="target domains (default: all there are)"
    )
    group.add_argument("--weights", type=Path, help="ImageNet weights of lite0 (pacs, camvid)")
    group.add_argument(
        "--adaptation",
        choices=ADAPTATIONS,
        help=f"pacs and camvid: with labels or, as hdrq adapt, without (default: {ADAPTATIONS[0]})",
    )
    group.add_argument(
        "--prepare", action="store_true", help="pacs and camvid: stop after the checkpoints"
    )
    networks = [name for protocol in PROTOCOLS.values() for name in protocol.networks]
    own_forms = {
        f"{name} of {protocol}": network.form
        for protocol, row in PROTOCOLS.items()
        for name, network in row.networks.items()
    }
    forms = "; ".join(f"{name}: {form}" for name, form in {**HRDA, **own_forms}.items())
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--model",
        choices=tuple(dict.fromkeys((*HRDA, *networks))),
        help=f"network ({forms}; default: the protocol's first)",
    )
    which.add_argument(
        "--backbone",
        choices=("resnet101", "mit_b5"),
        help="the same by encoder: hrda_resnet101, hrda_mit_b5",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq reproduce``."""
    kept = "finished cells are kept; the same command goes on"
    return run("hdrq reproduce", lambda: _reproduce(arguments().parse_args(argv)), kept)


def _reproduce(args: argparse.Namespace) -> int:
    started = time.monotonic()
    threads = threads_of(args.threads, args.workers, args.ray, args.gpus)
    bits = parse_bits(args.bits)
    if args.source is not None and not args.source.strip():
        raise HdrqError("found --source without a name; needed a domain, or leave it out")
    if args.draw and args.protocol not in _SCENES:
        raise HdrqError(f"found --draw with {args.protocol}; it is of {' and '.join(_SCENES)}")
    if args.draw and parse_bits([args.draw])[0] not in bits:
        raise HdrqError(f"found --draw {args.draw}; needed one of --bits {' '.join(args.bits)}")
    tuned = () if args.tune is None else parse_bits(args.tune or args.bits)
    if importlib.util.find_spec("torch") is None:
        raise ModelError("calibration needs torch: pip install 'hdrq-deploy[calibrate]'")
    out = args.out.absolute()
    prepared = _prepared(args, out)
    task = prepared.task if prepared else _task(args, out)
    task = task.calibrated_with(iters=args.iters, batch=args.batch)
    settings = args.settings or (["ours"] if prepared else ["paper"])
    grid = Grid(
        _limited(task, args.images),
        tuple(dict.fromkeys(args.methods)),
        bits,
        tuple(dict.fromkeys(args.seeds)),
        tuple(dict.fromkeys(settings)),
        args.rounding_seeds,
        args.pairs,
        tuple(dict.fromkeys(args.ways)),
    )
    if tuned:
        searched_runs(grid, tuned)  # raises where there is nothing to search, or too few images
    if known := _known_search(args, grid):
        grid = replace(grid, rates=chosen_rates(known), searched_on=searched_on(known))
    _check_outputs(args, grid, prepared, tuned)
    check_scratch()
    if args.table:
        if not (out / "rows").is_dir():
            raise HdrqError(f"{out}: found no run; needed the OUT of one, with its rows")
        check_finished(grid, out)
        records = rows(grid, out)
        _check_rows(out, records)
        if known and args.rates:
            keep_search(known, out)
        return _write_results(args, grid, out, records, {})
    _check_device(args.device)
    make_directory(out)
    with alone_in(out):
        grid = _run(args, grid, out, prepared, tuned, known, threads)
        if args.prepare:
            models = args.checkpoints or out / "checkpoints"
            print(f"{models}: the models; {out / 'data'}: their images, in splits")
            return 0
        ran = {"threads": threads, "seconds_of_this_run": round(time.monotonic() - started)}
        return _write_results(args, grid, out, rows(grid, out), ran)


def _run(
    args: argparse.Namespace,
    grid: Grid,
    out: Path,
    prepared: Preparation | None,
    tuned: Sequence[tuple[int, int]],
    known: Mapping[str, Any] | None,
    threads: int,
) -> Grid:
    """Make what is missing or stale: images, checkpoints, and unless they are all, the cells.

    Returns:
        The grid, with the rates that were searched.
    """
    needed = images_for(grid.batch) if tuned else grid.batch
    if prepared:
        with progress_lines("train") as report:
            prepared.make(args.device, threads, report, needed)
        if args.prepare:
            return grid
    else:
        if args.made:
            with progress_lines("train") as report:
                write_made(args.protocol, out, report)
        check_images(grid.task, needed)
    for folder in (out / "cells", out / "rows"):
        make_directory(folder)
    if known and args.rates:
        keep_search(known, out)
    with (
        progress_lines(args.protocol) as report,
        open_pool(args.workers, threads, args.ray, out, args.gpus) as pool,
    ):
        if tuned:
            record = tune(grid, tuned, out, args.device, threads, pool, report)
            grid = replace(grid, rates=chosen_rates(record), searched_on=searched_on(record))
        run_jobs(list(jobs(grid, out, args.device, threads)), pool, report)
    return grid


def _write_results(
    args: argparse.Namespace,
    grid: Grid,
    out: Path,
    records: Sequence[dict[str, Any]],
    ran: Mapping[str, Any],
) -> int:
    """Table and figures of all finished cells, written and printed; the exit code."""
    record = {
        "schema_version": 1,
        "kind": REPRODUCE_JSON.kind,
        "protocol": args.protocol,
        "task": grid.task.name,
        "model": grid.task.model,
        "form": grid.task.form,
        **_origin(grid.task),
        **ran,
        **_searched(grid),
        "environment": {**environment(), "torch": version("torch")},
        "rows": records,
    }
    text = json.dumps(record, indent=1) + "\n"
    _say_what_is_left_out(out, records)
    write_bytes(out / "results.json", text.encode(), REPRODUCE_JSON)
    write_bytes(out / "table.md", markdown(grid, records).encode(), REPRODUCE_TABLE)
    print(network(grid))
    print_table(header(grid), [cells(grid, row) for row in records])
    for line in notes(grid, records):
        print(line)
    if args.draw:
        files = draw(grid, out, args.draw.lower())
        print(f"{len(files)} pictures in {files[0].parent}")
    print(f"{out / 'table.md'}, {out / 'results.json'}; every cell is a bundle in {out / 'cells'}")
    return 0


def _check_rows(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a table without rows, or without some or with fewer seeds than the results have.

    Raises:
        HdrqError: Neither table nor results are written then.
    """
    if not records:
        raise HdrqError(
            f"{out}: found no finished cell of these methods, bits, seeds and domains; pass the "
            "flags of the run that made them"
        )
    target = out / "results.json"
    if not target.exists():
        return
    try:
        there, lost = _lost(read_json(target)["rows"], records)
    except (KeyError, TypeError) as error:
        raise HdrqError(
            f"{target}: found no rows of this version ({error}); move the file"
        ) from error
    if lost:
        setting, method, bits, way, *members = lost[0]
        raise HdrqError(
            f"{target}: found {there} rows, {len(lost)} of which would be lost or be of fewer "
            f"seeds, such as {method} {bits} of {', '.join(members)} ({setting}, {way}); name all "
            "methods, bits, seeds and domains, or move the file"
        )


def _lost(
    before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]
) -> tuple[int, list[tuple[str, ...]]]:
    """How many rows there were, and setting, method, bits, way and members of those that go.

    A row goes where it is not among today's, or is of fewer seeds there.

    Raises:
        KeyError, TypeError: They are no rows of this version.
    """

    def cells_of(some: Iterable[Mapping[str, Any]]) -> dict[tuple[str, ...], int]:
        names = ("setting", "method", "bits", "way")
        return {
            (*(row[name] for name in names), *row["members"]): row["merged"]["harmonic mean"][
                "count"
            ]
            for row in some
        }

    there, here = cells_of(before), cells_of(now)
    return len(there), sorted(key for key, count in there.items() if here.get(key, 0) < count)


def _say_what_is_left_out(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Tell of rows of an earlier command that this one's results do not have."""
    try:
        _, lost = _lost(read_json(out / "results.json")["rows"], records)
    except (KeyError, TypeError):  # none, or of an earlier version
        return
    if lost:
        print(
            f"rows of an earlier command that are not in this table: {len(lost)}; their figures "
            f"stay in {out / 'rows'}, and --table with the flags of that command prints them"
        )


def _check_device(name: str) -> None:
    from ..calibration.devices import torch_device

    torch_device(name)


def _origin(task: Task) -> dict[str, Any]:
    """Where the checkpoints come from, for the record."""
    files = {"source": Path(task.source), **{d.name: Path(d.weights) for d in task.domains}}
    # Files that are gone or beyond 4 GB have no hash.
    hashes = {name: fingerprint(file) for name, file in files.items()}
    return {
        "source": task.source_domain,
        "adaptation": task.adaptation,
        "checkpoints_sha256": {n: h if isinstance(h, str) else None for n, h in hashes.items()},
    }


def _known_search(args: argparse.Namespace, grid: Grid) -> dict[str, Any] | None:
    """The search that was made and that cells take their rates from, if there is one."""
    path = args.rates
    if args.table and args.tune is not None:
        path = args.out / TUNING
    return known_search(path, grid) if path else None


def _searched(grid: Grid) -> dict[str, Any]:
    """Where the learning rates come from, for the record."""
    if not grid.rates:
        return {}
    return {"tuning": TUNING, "rates": grid.rates, "searched_on": grid.searched_on}


def _check_outputs(
    args: argparse.Namespace,
    grid: Grid,
    prepared: Preparation | None,
    tuned: Sequence[tuple[int, int]],
) -> None:
    """Whether all places in the folder of the run are free or ours."""
    outputs: list[tuple[Path, Kind]] = [
        (Path("results.json"), REPRODUCE_JSON),
        (Path("table.md"), REPRODUCE_TABLE),
        *([(Path(TUNING), TUNING_JSON)] if args.rates or args.tune is not None else []),
    ]
    for cell in [] if args.table else grid.cells():
        bundle = bundle_path(Path(), cell)
        outputs += [(bundle, BUNDLE), (partial_of(bundle), PARTIAL)]
        outputs += [(inputs_of(bundle), CELL_INPUTS), (row_path(Path(), cell), CELL_ROW)]
    if args.draw:
        names = [picture_name(d, n) for d in grid.domains for n in range(SCENES)]
        outputs += [(Path(name), PICTURE) for name in names]
    places = [(str(path), kind) for path, kind in outputs]
    places += first_trials(grid, tuned) if tuned and not args.table else []
    places += made_checkpoints(args.protocol) if args.made else []
    places += prepared.outputs(args.out.absolute()) if prepared else []
    check_container(args.out, places, [args.data, args.checkpoints, args.weights], "out")
    _check_earlier(args.out, grid)
    if args.made:
        is_written(args.protocol, args.out)


def _check_earlier(out: Path, grid: Grid) -> None:
    """Refuse the folder of another run, whose cells would have the names of this one's.

    Raises:
        HdrqError: Its results, or records of its cells, name another protocol, network, source or
            adaptation.
    """
    task, found = grid.task, read_json(out / "results.json")
    now = {
        "task": task.name,
        "model": task.model,
        "source": task.source_domain,
        "adaptation": task.adaptation,
    }
    told = [found] if isinstance(found, dict) else []
    for cell in (own.single(domain) for own in grid.runs() for domain in grid.domains):
        record = read_json(inputs_of(bundle_path(out, cell)))
        if isinstance(record, dict) and "model" in record:
            told.append({"model": record["model"]})
    for before in told:
        there = {key: before.get(key, value) for key, value in now.items()}
        if there != now:
            raise HdrqError(
                f"{out}: found a run of {_told(there)}; needed one of {_told(now)}: choose another "
                "`out`, or pass what that run was given"
            )


def _told(run: Mapping[str, Any]) -> str:
    """Protocol, network, source and adaptation, as far as there are any."""
    return ", ".join(str(value) for value in run.values() if value)


def _limited(task: Task, images: int | None) -> Task:
    return task if images is None else replace(task, images=images)


def _prepared(args: argparse.Namespace, out: Path) -> Preparation | None:
    """What pacs and camvid make of a data set; None for the other protocols."""
    if args.protocol not in PROTOCOLS:
        for flag in ("weights", "adaptation", "prepare"):
            if getattr(args, flag):
                raise HdrqError(
                    f"found --{flag} with {args.protocol}; it is of {' and '.join(PROTOCOLS)}"
                )
        return None
    if args.made or args.backbone:
        flag = "--made" if args.made else "--backbone"
        raise HdrqError(f"found {flag} with {args.protocol}; leave it out")
    if not args.data and not args.table:
        raise HdrqError(f"{args.protocol} needs --data, the data set as it is distributed")
    given = (args.weights, args.checkpoints)
    weights, checkpoints = (path.absolute() if path else None for path in given)
    choice = Choice(
        args.data.absolute() if args.data else Path(),
        out,
        args.source or "",
        args.targets,
        args.model or "",
        weights,
        args.adaptation or "",
        checkpoints,
    )
    return prepare(args.protocol, choice, runs=not args.table)


def _task(args: argparse.Namespace, out: Path) -> Task:
    if args.model and args.model not in HRDA:
        raise HdrqError(
            f"found --model {args.model} with {args.protocol}; needed one of {', '.join(HRDA)}"
        )
    flag = "--model" if args.model else "--backbone"
    if (args.model or args.backbone) and (args.made or args.protocol == "office-home"):
        place = "--made" if args.made else args.protocol
        raise HdrqError(f"found {flag} with {place}, which has a network of its own; leave it out")
    if args.made:
        if args.data or args.checkpoints:
            raise HdrqError("found --made with --data or --checkpoints; it brings its own")
        return made(args.protocol, out, args.targets)
    if not (args.data and args.checkpoints):
        raise HdrqError(
            f"{args.protocol} needs --data and --checkpoints; or pass --made for the small data "
            "that the project makes"
        )
    data, checkpoints = args.data.absolute(), args.checkpoints.absolute()
    if args.protocol == "office-home":
        return office_home(data, checkpoints, args.source or "Real World", args.targets)
    model = f"hrda_{args.backbone}" if args.backbone else args.model or next(iter(HRDA))
    return segmentation(data, checkpoints, model, args.targets)
