"""``hdrq-merge``: bundles of several domains become one."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from .start import importing, run

with importing("hdrq-merge"):
    from ..calibration_data.readers import Wanted, read
    from ..errors import MergeError
    from ..formats.atomic_files import check_output, check_parent, check_scratch
    from ..formats.bundle import Bundle
    from ..formats.checkpoints import is_checkpoint
    from ..formats.file_kinds import BUNDLE, MERGED
    from ..merging import (
        ACTIVATION_SCALES,
        CRITERIA,
        METHODS,
        ROUNDINGS,
        Merger,
        check_different,
        check_domains,
        check_guides,
        check_sweeps,
        choose_weights,
        merge,
        merge_checkpoints,
        weights_from_statistics,
    )
    from ..merging.merge_weights import check_merge_weights
    from ..merging.methods import MethodOptions
    from ..merging.re_estimate import check_batch_norm
    from ..merging.statistics_weights import PredictedWeights, check_predicts
    from ..merging.ways import way_of
    from ..merging.weight_search import ChosenWeights
    from ..merging.written import Guidance, write_merge
    from ..typing import StepProgress
    from .common import named, parser, paths_of, progress_bar, seed_number
    from .help_format import shown

__all__ = ["arguments", "main"]

_TEXT = """\
Merge calibrated bundles, or float checkpoints. A merge needs neither torch nor data; images without
labels can choose the merge weights (--data), give new statistics (--re-estimate), and fit every
layer of the merge to what the bundles, or better ones of the same model, put out (--fit, --fit-to).

Two or more checkpoints instead of bundles (.safetensors; .pt where torch is installed) are merged
in float, and written in the dtype that they have (in float32 where they differ)."""
_EXAMPLE = """\
hdrq-merge night.hdrq day.hdrq --weights 0.5 0.5 -o merged.hdrq
hdrq-merge night.safetensors day.safetensors --method mean -o merged.safetensors
hdrq-merge night.safetensors day.safetensors --method regression \\
  --statistics night-seen.safetensors day-seen.safetensors -o merged.safetensors"""
# Flags of one kind of merge: what is given, and ignored, would be taken for what was done.
_OF_BUNDLES = (
    "data",
    "re_estimate",
    "fit",
    "fit_to",
    "fit_sweeps",
    "criterion",
    "rounding",
    "candidates",
    "wbits",
    "activation_scales",
)
# What a merge does where a flag is not given.
_MERGE = {
    name: parameter.default for name, parameter in inspect.signature(merge).parameters.items()
}
_METHOD_OPTIONS = tuple(option.name for option in fields(MethodOptions))
_OF_CHECKPOINTS = ("base", "statistics")


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    p = parser("hdrq-merge", _TEXT, _EXAMPLE)
    _merge_flags(p.add_argument_group("bundles or checkpoints"))
    _image_flags(p.add_argument_group("unlabelled images that help a merge of bundles"))
    _bundle_flags(p.rarely_used("more about merges of bundles"))
    numbers = p.rarely_used("numbers that some methods read")
    for option in fields(MethodOptions):
        numbers.add_argument(
            f"--{option.name}",
            type=float,
            help=f"{option.metadata['help']} (default: {shown(option.default)})",
        )
    floats = p.rarely_used("checkpoints", "Float merging of .safetensors or torch files.")
    needing = [name for name, method in METHODS.items() if method.needs_base]
    floats.add_argument("--base", help=f"source checkpoint of {' and '.join(needing)}")
    floats.add_argument(
        "--statistics",
        nargs="+",
        default=[],
        help="files of hdrq statistics for --method regression, one per checkpoint",
    )
    return p


def _merge_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("bundles", nargs="+", help="two or more bundles of one model and source")
    group.add_argument(
        "--weights",
        nargs="+",
        help="one per bundle, sum 1; auto: chosen on images without labels (--data), statistics: "
        "from the bundles' statistics alone (default: equal weights)",
    )
    group.add_argument(
        "--method",
        choices=METHODS,
        help=f"how parameters are merged; {_summaries(METHODS)} (default: regression where all "
        "bundles hold statistics, else mean)",
    )
    group.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        help=f"how merged codes are rounded; {_summaries(ROUNDINGS)} (default: compensated with "
        "regression, advanced with the mean of two, else nearest)",
    )
    group.add_argument("-o", "--output", required=True, help="bundle folder, or .safetensors file")


def _image_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data", nargs="+", default=[], metavar="NAME=PATH", help="images for --weights auto"
    )
    group.add_argument("--images", type=int, default=256, help="images per domain for --data")
    group.add_argument(
        "--re-estimate",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="images for BatchNorm moments and activation scales of the merge "
        "(bundles of --fold steps)",
    )
    group.add_argument(
        "--re-estimate-images", type=int, default=64, help="images per domain for --re-estimate"
    )
    group.add_argument(
        "--fit",
        nargs="+",
        default=[],
        metavar="NAME=PATH",
        help="images of every bundle's domain; each layer of the merge is fitted to what that "
        "domain's bundle puts out on them, so that these must be good by themselves",
    )
    group.add_argument("--fit-images", type=int, default=256, help="images per domain for --fit")
    group.add_argument(
        "--fit-to",
        nargs="+",
        default=[],
        metavar="BUNDLE",
        help="bundles of the same model, one of every domain in --fit, that the merge is fitted to "
        "instead of its parents: of more bits, or of --method float; or a merge of all of them",
    )
    group.add_argument(
        "--fit-sweeps",
        type=int,
        help="how often --fit goes over all layers (default: 1)",
    )


def _bundle_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--criterion",
        choices=CRITERIA,
        help=f"what --weights auto looks for; {_summaries(CRITERIA)} (default: agreement where "
        "the names in --data are the bundles' domains, else information)",
    )
    group.add_argument(
        "--wbits",
        type=int,
        help="weight bits of the merge, 2 to 8; first and last layers keep 8 "
        "(default: the parents' bits)",
    )
    group.add_argument(
        "--activation-scales",
        choices=ACTIVATION_SCALES,
        help=f"scales of merged activations; {_summaries(ACTIVATION_SCALES)} "
        f"(default: {_MERGE['activation_scales']})",
    )
    group.add_argument(
        "--candidates",
        type=int,
        help=f"draws of advanced rounding (default: {_MERGE['candidates']})",
    )
    group.add_argument("--seed", type=seed_number, default=0, help="seed of all random numbers")


def _summaries(table: Mapping[str, Any]) -> str:
    """What each entry of a table does, for a flag's help."""
    return ", ".join(f"{name}: {entry.summary}" for name, entry in table.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``hdrq-merge``."""
    return run("hdrq-merge", lambda: _merge(arguments().parse_args(argv)))


def _merge(args: argparse.Namespace) -> int:
    floats = _are_checkpoints(args.bundles)
    data = [*paths_of(args.data), *paths_of(args.re_estimate), *paths_of(args.fit)]
    others = [*data, args.base, *args.statistics, *args.fit_to]
    check_output(args.output, MERGED if floats else BUNDLE, [*args.bundles, *others])
    check_scratch()
    if floats:
        return _merge_checkpoints(args)
    _check_flags(args)
    auto, predicted = args.weights == ["auto"], args.weights == ["statistics"]
    weights = None if auto or predicted else _numbers(args.weights)
    if auto and not args.data:
        raise MergeError("found --weights auto without images; pass --data NAME=PATH ...")
    merger = _merger(args)
    if predicted:
        check_predicts(merger)
    check_different([Path(path) for path in args.bundles])
    merge_weights = merger.check_weights(weights)
    if args.fit:
        check_domains(merger.parents, merge_weights, named(args.fit))
    sweeps = 1 if args.fit_sweeps is None else args.fit_sweeps
    check_sweeps(sweeps)
    guides = [Bundle.open(path) for path in args.fit_to]
    check_guides(guides, merger.parents[0], named(args.fit))
    if args.re_estimate:
        check_batch_norm(merger.parents[0])
    renewed = _images(args.re_estimate, merger.parents[0], args.re_estimate_images, args.seed)
    guiding = None
    if args.fit:
        images = _images(args.fit, merger.parents[0], args.fit_images, args.seed)
        guiding = Guidance(images, guides, sweeps)
    options: dict[str, Any] = {}
    if auto or predicted:
        chosen = _chosen_weights(args, merger, renewed) if auto else _predicted_weights(merger)
        merge_weights, options[chosen.entry] = list(chosen.weights), chosen.record()
        print("weights " + " ".join(f"{w:g}" for w in merge_weights))
        print(f"chosen from {chosen.summary}")
    target = Path(args.output).absolute()
    check_parent(target)
    bundle = write_merge(merger, target, merge_weights, options, renewed, guiding, watch=_progress)
    singular = bundle.manifest.options["merge"].get("fallbacks", {})
    if singular:
        name, why = next(iter(singular.items()))
        print(
            f"note: {len(singular)} of the layers merged as the mean, as the manifest says: "
            f"{name} ({why})",
            file=sys.stderr,
        )
    print(bundle.path)
    return 0


@contextmanager
def _progress(title: str) -> Iterator[StepProgress]:
    with progress_bar(title) as progress:
        yield lambda done, total: progress(done, total, "")


def _merger(args: argparse.Namespace) -> Merger:
    """The parents, and how they are merged."""
    parents = [Bundle.open(path) for path in args.bundles]
    check_merge_weights(None, len(parents), "bundle")
    method, rounding = way_of(parents, args.method, args.rounding, args.wbits is not None)
    if args.candidates is not None and rounding != "advanced":
        raise MergeError(
            f"found --candidates with --rounding {rounding}; they are draws of advanced rounding"
        )
    return Merger(
        parents,
        rounding,
        _MERGE["candidates"] if args.candidates is None else args.candidates,
        args.seed,
        method,
        _method_options(args, method),
        wbits=args.wbits,
        activation_scales=args.activation_scales or _MERGE["activation_scales"],
    )


def _chosen_weights(
    args: argparse.Namespace, merger: Merger, renewed: dict[str, Any]
) -> ChosenWeights:
    """The merge weights that images choose."""
    images = _images(args.data, merger.parents[0], args.images, args.seed)
    options = merger.method_options
    search = Merger(merger.parents, method=merger.method, method_options=options, keep=True)
    with progress_bar("choose weights") as progress:
        return choose_weights(
            search,
            images,
            args.criterion,
            renewed,
            lambda done, total: progress(done, total, "images"),
            seed=args.seed,
        )


def _predicted_weights(merger: Merger) -> PredictedWeights:
    """The merge weights that statistics choose."""
    with progress_bar("choose weights") as progress:
        return weights_from_statistics(merger, lambda done, total: progress(done, total, "layers"))


def _numbers(words: Sequence[str] | None) -> list[float] | None:
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError as error:
        raise MergeError(
            f"found --weights {' '.join(words or ())}; needed one number per bundle, auto or "
            "statistics"
        ) from error


def _images(values: Sequence[str], like: Bundle, limit: int, seed: int) -> dict[str, Any]:
    """Inputs of each domain as the bundles were calibrated for; labels are not looked at."""
    if limit < 2:
        raise MergeError(f"found {limit} images per domain; needed 2 or more")
    wanted = Wanted.like(like.manifest.preprocessing)
    return {name: read(path, wanted, limit, seed).x for name, path in named(values).items()}


def _are_checkpoints(paths: Sequence[str]) -> bool:
    """Whether the parents are checkpoints and not bundles.

    Raises:
        MergeError: Some are, and some are not.
    """
    checkpoints = [path for path in paths if is_checkpoint(Path(path))]
    if checkpoints and len(checkpoints) < len(paths):
        other = next(path for path in paths if path not in checkpoints)
        raise MergeError(
            f"found the checkpoint {checkpoints[0]} beside {other}; needed bundles alone or "
            "checkpoints alone: calibrate the checkpoint first (--method float keeps it float)"
        )
    return bool(checkpoints)


def _given(args: argparse.Namespace, names: Sequence[str]) -> str:
    """The first of these flags that was given, or ""."""
    given = [name for name in names if getattr(args, name) not in (None, [])]
    return f"--{given[0].replace('_', '-')}" if given else ""


def _method_options(args: argparse.Namespace, method: str) -> MethodOptions:
    """The numbers that the method reads.

    Raises:
        MergeError: Others are given.
    """
    unused = [name for name in _METHOD_OPTIONS if name not in METHODS[method].options]
    if flag := _given(args, unused):
        raise MergeError(f"found {flag} with --method {method}, which does not use it")
    values = {name: getattr(args, name) for name in _METHOD_OPTIONS}
    return MethodOptions(**{name: value for name, value in values.items() if value is not None})


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse what a merge of bundles would ignore."""
    flag = _given(args, _OF_CHECKPOINTS)
    if args.method is not None and not METHODS[args.method].merges_bundles:
        flag = f"--method {args.method}"
    if flag:
        instead = " (bundles hold their own)" if flag == "--statistics" else ""
        raise MergeError(
            f"found {flag} with bundles; it is of float checkpoints: merge the checkpoints and "
            f"calibrate what comes out, or leave it out{instead}"
        )
    if args.criterion and args.weights != ["auto"]:
        raise MergeError("found --criterion without --weights auto, which it is for")
    if args.data and args.weights != ["auto"]:
        raise MergeError("found --data without --weights auto, which reads it; pass both")
    if (flag := _given(args, ("fit_to", "fit_sweeps"))) and not args.fit:
        raise MergeError(f"found {flag} without --fit; pass images of every domain, too")


def _merge_checkpoints(args: argparse.Namespace) -> int:
    chosen = args.weights in (["auto"], ["statistics"])
    flag = f"--weights {args.weights[0]}" if chosen else _given(args, _OF_BUNDLES)
    if flag:
        raise MergeError(
            f"found {flag} with float checkpoints; it works on bundles: calibrate them first "
            "(--method float keeps them float)"
        )
    method = args.method or ("regression" if args.statistics else "mean")
    numbers = _method_options(args, method)
    with progress_bar("merge") as progress:
        path = merge_checkpoints(
            args.bundles,
            args.output,
            _numbers(args.weights),
            method,
            args.base,
            progress=lambda done, total: progress(done, total, ""),
            scaling=numbers.scaling,
            density=numbers.density,
            statistics=args.statistics,
            alpha=numbers.alpha,
            ridge=numbers.ridge,
        )
    print(path)
    return 0
