"""``hdrq-calibrate``: adapted checkpoints become bundles."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .start import importing, run

with importing("hdrq-calibrate"):
    from ..calibration.graph_cache import GraphCache
    from ..calibration.methods import (
        ACT_INITS,
        DISTANCE_FORMS,
        FOLDS,
        GRANULARITIES,
        LEARNERS,
        METHODS,
        NOISES,
        PUBLISHED_ITERS,
        SCHEDULES,
        Options,
    )
    from ..calibration.recipe import Recipe
    from ..calibration.request import BLOCKS, PLACEMENTS, CalibrationRequest
    from ..calibration.settings import SETTINGS
    from ..errors import ModelError, SpecError
    from ..experiments.bundles import forget, inputs_of, make_bundle
    from ..experiments.threads import calibration_threads
    from ..formats.atomic_files import (
        Kind,
        check_container,
        check_name,
        check_output,
        check_scratch,
        make_directory,
    )
    from ..formats.file_kinds import BUNDLE, CELL_INPUTS, PARTIAL, partial_of
    from ..jobs.job import Job, run_jobs
    from ..jobs.pool import open_pool
    from ..numerics.spec import GRIDS
    from .common import (
        image_flags,
        parser,
        progress_bar,
        progress_lines,
        rank_or_word,
        seed_number,
        threads_of,
        wanted_of,
        where_flags,
    )
    from .help_format import shown

__all__ = ["arguments", "main"]


_TEXT = """\
Quantize an adapted model so that it stays mergeable.

To calibrate several domains in one call, give --domain, --weights and --data the same number of
values; the bundles are written to DIR/<domain>.hdrq, where DIR is the value of -o. With --together
one checkpoint that serves all domains, such as a merge, becomes one bundle."""
_EXAMPLE = """\
hdrq-calibrate --model timm:resnet18 --weights night.safetensors --base source.safetensors \\
  --data images/night --domain night --wbits 4 --abits 8 -o night.hdrq"""
# Flags that some methods have no use for: of what is learned in iterations, and of codes.
_OF_LEARNING = tuple(
    field.name
    for field in fields(Options)
    if field.name not in {"learner", "granularity", "act_init", "bias_correction"}
)
_OF_CODES = ("wbits", "abits", "per_channel", "grid", "placement")
_DEFAULTS = {field.name: field.default for field in fields(CalibrationRequest)}


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq-calibrate", _TEXT, _EXAMPLE)
    _input_flags(p.add_argument_group("model, images and output"))
    _code_flags(p.add_argument_group("quantization"))
    run_flags = p.add_argument_group("the run")
    run_flags.add_argument(
        "--iters",
        type=int,
        help=f"iterations per block; fewer are faster and less accurate {_of_methods('iters')}",
    )
    run_flags.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where torch computes"
    )
    run_flags.add_argument(
        "--resume",
        action="store_true",
        help="resume after the last finished block of a stopped run",
    )
    images = p.rarely_used("images")
    image_flags(images)
    images.add_argument(
        "--skip-corrupt", action="store_true", help="leave out images that cannot be decoded"
    )
    images.add_argument(
        "--seed", type=seed_number, help=f"seed of all random numbers {_default('seed')}"
    )
    domains = p.rarely_used("several domains")
    domains.add_argument(
        "--together",
        action="store_true",
        help="one bundle for all of --domain, from one checkpoint and the images of all --data",
    )
    where_flags(domains)
    _more_code_flags(p.rarely_used("more about quantization"))
    _learning_flags(p.rarely_used("learning, per block", "Methods have defaults of their own."))
    return p


def _input_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", required=True, help="PKG.MOD:FACTORY, {timm,torchvision,transformers}:NAME"
    )
    group.add_argument("--weights", nargs="+", help="adapted checkpoint (.safetensors, .pt)")
    group.add_argument("--base", help="source checkpoint that all domains started from")
    group.add_argument(
        "--data", required=True, nargs="+", help="image folder (one folder per class) or .npz"
    )
    group.add_argument("--domain", required=True, nargs="+", help="name of the domain")
    group.add_argument(
        "--images",
        type=int,
        help=f"largest number of calibration images of a domain {_default('images')}",
    )
    group.add_argument(
        "-o", "--output", required=True, help="bundle folder (NAME.hdrq), or folder of bundles"
    )


def _code_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--method", choices=METHODS, help=f"{_rows(METHODS)} {_default('method')}")
    group.add_argument("--wbits", type=int, help=f"bits of weights, 2 to 8 {_default('wbits')}")
    group.add_argument("--abits", type=int, help=f"bits of activations, 2 to 8 {_default('abits')}")
    group.add_argument(
        "--per-channel",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="one weight scale per output channel; --no-per-channel: one per tensor "
        f"{_default('per_channel')}",
    )
    group.add_argument(
        "--fold",
        choices=FOLDS,
        help="fold BatchNorm into the weights, or (steps) into per-channel scales, so that a "
        f"merge can average it separately {_default('fold')}",
    )


def _more_code_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--recipe", help="YAML or JSON with any of the settings here; flags win")
    group.add_argument(
        "--settings",
        choices=SETTINGS,
        help=f"preset, which the recipe and flags override ({_rows(SETTINGS)})",
    )
    group.add_argument(
        "--grid",
        choices=GRIDS,
        help="what codes are: signed integers (int8), unsigned ones where nothing is negative "
        f"(paper), or the 8-bit floating-point numbers of FP8 (e4m3) {_default('grid')}",
    )
    group.add_argument(
        "--placement",
        choices=PLACEMENTS,
        help="where quantizers go: so that engines run every layer in INT8 (engine), or as in the "
        "paper (paper: network input and residual branches real, a scale for each concatenated "
        f"tensor; those layers run in float) {_default('placement')}",
    )
    group.add_argument(
        "--statistics",
        type=rank_or_word,
        metavar="RANK|full|off",
        help="eigenvectors kept of the covariance of every layer's inputs, for merges by "
        "regression (default: as many as take no more room than the codes at 8 bits, 8 at least)",
    )
    group.add_argument(
        "--cache-gb",
        type=float,
        default=_DEFAULTS["cache_gb"],
        help="gigabytes of activations in memory; the rest goes to files beside the output",
    )


def _learning_flags(knobs: argparse._ArgumentGroup) -> None:
    knobs.add_argument("--batch", type=int, help=f"images per iteration {_of_methods('batch')}")
    knobs.add_argument(
        "--lr", type=float, help=f"learning rate of weights and their scales {_of_methods('lr')}"
    )
    knobs.add_argument(
        "--act-lr", type=float, help=f"learning rate of activation scales {_of_methods('act_lr')}"
    )
    knobs.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help=f"course of the learning rate of weights, after its warm-up {_of_methods('schedule')}",
    )
    knobs.add_argument(
        "--scale-rates",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"multiply learning rates by {PUBLISHED_ITERS} / iterations where iterations are "
        f"fewer {_of_methods('scale_rates')}",
    )
    knobs.add_argument(
        "--stages",
        type=int,
        choices=(1, 2),
        help="1: weights and activation scales together; 2: one after the other "
        f"{_of_methods('stages')}",
    )
    knobs.add_argument(
        "--act-init",
        choices=ACT_INITS,
        help="first activation scales: a search over all images, or the largest of the scales "
        f"that 8 images want {_of_methods('act_init')}",
    )
    knobs.add_argument(
        "--noise", choices=NOISES, help=f"noise in place of rounding {_of_methods('noise')}"
    )
    knobs.add_argument(
        "--noise-fraction",
        type=float,
        help="fraction of iterations with rounding noise; the rest use real rounding "
        f"{_of_methods('noise_fraction')}",
    )
    knobs.add_argument(
        "--distance",
        type=float,
        help=f"weight of the distance to the source model, lambda {_of_methods('distance')}",
    )
    knobs.add_argument(
        "--distance-form",
        choices=DISTANCE_FORMS,
        help="norm: as published; relative: independent of the size of layers and activations "
        f"{_of_methods('distance_form')}",
    )
    knobs.add_argument(
        "--warmup",
        type=float,
        help=f"fraction of iterations in which the learning rate rises {_of_methods('warmup')}",
    )
    _block_flags(knobs)


def _block_flags(knobs: argparse._ArgumentGroup) -> None:
    knobs.add_argument(
        "--input-prob",
        type=float,
        help=f"probability that a block gets quantized inputs {_of_methods('input_prob')}",
    )
    knobs.add_argument(
        "--drop-prob",
        type=float,
        help=f"QDrop: probability that an activation stays real {_of_methods('drop_prob')}",
    )
    knobs.add_argument(
        "--step-change",
        type=float,
        help=f"largest relative update of a scale; 0: no bound {_of_methods('step_change')}",
    )
    knobs.add_argument(
        "--learner",
        choices=LEARNERS,
        help=f"what is learned of the weights {_of_methods('learner', every=True)}",
    )
    knobs.add_argument(
        "--granularity",
        choices=GRANULARITIES,
        help=f"what is learned at once {_of_methods('granularity', every=True)}",
    )
    knobs.add_argument(
        "--blocks",
        choices=BLOCKS,
        help="a block ends where one tensor is alive (live), or with a residual unit (unit: as "
        f"BRECQ, QDrop and the paper) {_default('blocks')}",
    )
    for name, what in (
        ("round_weight", "weight"),
        ("beta_first", "initial beta"),
        ("beta_last", "final beta"),
    ):
        knobs.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            help=f"AdaRound: {what} of the rounding regularizer {_of_methods(name)}",
        )
    knobs.add_argument(
        "--keep-best",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"undo a block whose error rose {_of_methods('keep_best')}",
    )
    knobs.add_argument(
        "--bias-correction",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="move biases by what quantization does to the mean of a layer's outputs "
        f"{_of_methods('bias_correction', every=True)}",
    )


def _default(name: str) -> str:
    """The default of an argument of a calibration, for its help."""
    return f"(default: {shown(_DEFAULTS[name])})"


def _of_methods(name: str, every: bool = False) -> str:
    """The default of a learning option: that of the default method, and of others that differ.

    Args:
        name: Field of :class:`Options`.
        every: Whether methods count that do not learn in iterations.
    """
    usual = shown(getattr(Options.of(str(_DEFAULTS["method"])), name))
    others: dict[str, list[str]] = {}
    for method, row in METHODS.items():
        value = shown(getattr(row.options, name))
        if value != usual and (row.options.iterates or (every and row.quantizes)):
            others.setdefault(value, []).append(method)
    parts = [usual, *(f"{', '.join(methods)}: {value}" for value, methods in others.items())]
    return f"(default: {'; '.join(parts)})"


def _rows(table: Mapping[str, Any]) -> str:
    """What each entry of a table does."""
    return "; ".join(f"{name}: {row.summary}" for name, row in table.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-calibrate``."""
    stopped = "no bundle was written; --resume goes on behind the last finished block"
    return run("hdrq-calibrate", lambda: _calibrate(arguments().parse_args(argv)), stopped)


def _calibrate(args: argparse.Namespace) -> int:
    each = _of_each(args)
    _check_outputs(args)
    check_scratch()
    recipe = Recipe.read(args.recipe) if args.recipe else Recipe()
    recipe = recipe.override({k: v for k, v in vars(args).items() if k in Recipe.model_fields})
    recipe = recipe.resolved()
    options = recipe.options()
    notes = list(_notes(args, recipe.method or str(_DEFAULTS["method"]), options))
    if args.cache_gb < 0:
        raise SpecError(f"found --cache-gb {args.cache_gb}; needed 0 or more")
    try:
        with importing("hdrq-calibrate"):
            from ..calibration.pipeline import run_calibration
    except ImportError as error:
        raise ModelError(
            f"calibration needs {error.name}, which is not installed: "
            "pip install 'hdrq-deploy[calibrate]'"
        ) from error
    names = ["method", "wbits", "abits", "per_channel", "fold", "grid", "images", "seed"]
    names += ["placement", "blocks", "statistics"]
    common: dict[str, Any] = {
        "model": args.model,
        "base": args.base,
        "options": options,
        "wanted": wanted_of(args),
        "skip_corrupt": args.skip_corrupt,
        "device": args.device,
        "resume": args.resume,
        "cache_gb": args.cache_gb,
        **{n: getattr(recipe, n) for n in names if getattr(recipe, n) is not None},
    }
    if len(each) == 1:
        with progress_bar(f"calibrate {'+'.join(args.domain)}") as progress:
            request = CalibrationRequest(**{**common, **each[0], "output": args.output})
            bundle = run_calibration(request, progress=progress)
        return _end([bundle.path], notes)
    out = Path(args.output).absolute()
    make_directory(out)
    work, targets, graphs = [], [], GraphCache()
    for own in each:
        target = out / f"{own['domain']}.hdrq"
        request = CalibrationRequest(**_absolute({**common, **own, "output": target}))
        if not args.resume:
            forget(target)
        arguments = {"request": request, "graphs": graphs}
        work.append(Job(own["domain"], make_bundle, arguments, limit_threads=calibration_threads))
        targets.append(target)
    threads = threads_of(args.threads, args.workers, args.ray, args.gpus)
    with (
        progress_lines("calibrate") as report,
        open_pool(args.workers, threads, args.ray, out, args.gpus) as pool,
    ):
        run_jobs(work, pool, report)
    return _end(targets, notes)


def _end(bundles: Sequence[Path], notes: Sequence[str]) -> int:
    """Print what was made, and which flags changed nothing."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    for path in bundles:
        print(path)
    return 0


def _notes(args: argparse.Namespace, method: str, options: Options) -> Iterator[str]:
    """Flags that were given and change nothing."""
    for names, used, why in (
        (_OF_CODES, METHODS[method].quantizes, "which quantizes nothing"),
        (_OF_LEARNING, options.iterates, "which learns nothing in iterations"),
    ):
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
        if given and not used:
            yield f"{', '.join(given)} change nothing for --method {method}, {why}"


def _check_outputs(args: argparse.Namespace) -> None:
    """Whether every bundle, and what is unfinished of it, may be written where it goes."""
    inputs = [*args.data, *(args.weights or []), args.base, args.recipe]
    if len(args.domain) == 1 or args.together:
        check_output(args.output, BUNDLE, inputs)
        check_output(partial_of(Path(args.output)), PARTIAL, inputs)
        return
    outputs: list[tuple[str, Kind]] = []
    for domain in args.domain:
        name = f"{domain}.hdrq"
        outputs += [(name, BUNDLE), (partial_of(Path(name)).name, PARTIAL)]
        outputs.append((inputs_of(Path(name)).name, CELL_INPUTS))
    check_container(args.output, outputs, inputs)


def _absolute(arguments: dict[str, Any]) -> dict[str, Any]:
    """Paths that hold in another process' folder too."""
    paths = {key: arguments[key] for key in ("data", "weights", "base") if arguments[key]}
    return {**arguments, **{key: str(Path(path).absolute()) for key, path in paths.items()}}


def _of_each(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Domain, data and checkpoint of every calibration."""
    count = len(args.domain)
    for name in args.domain:
        check_name(name)
    if args.together and args.weights is not None and len(args.weights) > 1:
        raise SpecError(
            f"found {len(args.weights)} after --weights with --together; needed one checkpoint "
            "that serves all domains: merge them first (hdrq-merge)"
        )
    each = (
        {"--data": args.data} if args.together else {"--data": args.data, "--weights": args.weights}
    )
    for flag, values in each.items():
        if values is not None and len(values) != count:
            raise SpecError(
                f"found {len(values)} after {flag} for {count} after --domain; give one for each"
            )
    if len(set(args.domain)) < count:
        raise SpecError(f"found a name twice in --domain {' '.join(args.domain)}")
    if (count == 1 or args.together) and (
        args.ray or args.workers != 1 or args.threads or args.gpus
    ):
        raise SpecError(
            "found --workers, --threads, --ray or --gpus with one domain or --together; they apply "
            "only when several domains are calibrated at once: name them all after --domain, or "
            "set OMP_NUM_THREADS to limit the threads of one"
        )
    if args.together:
        own = args.weights[0] if args.weights else None
        return [{"domain": args.domain, "data": args.data, "weights": own}]
    weights = args.weights or [None] * count
    return [
        {"domain": domain, "data": data, "weights": own}
        for domain, data, own in zip(args.domain, args.data, weights, strict=True)
    ]
