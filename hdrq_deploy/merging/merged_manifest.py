"""What the manifest of a merge says of its parents and of how they were merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..formats.bundle import Bundle
from ..formats.bundle_manifest import Manifest, ParentRecord
from ..formats.records import Tolerances

__all__ = ["merged_manifest"]


def merged_manifest(
    parents: Sequence[Bundle],
    merge_weights: Sequence[float],
    record: Mapping[str, Any],
    layers: Mapping[str, Any],
    seed: int,
) -> Manifest:
    """The manifest of a merge; its ``files`` are filled in where it is written.

    Args:
        parents: Their manifests are merged.
        merge_weights: One per parent.
        record: How they were merged.
        layers: What rounding did to each tensor of codes.
        seed: Seed of the draws.
    """
    domains: dict[str, float] = {}
    for parent, weight in zip(parents, merge_weights, strict=True):
        for domain, share in parent.manifest.domains.items():
            domains[domain] = domains.get(domain, 0.0) + weight * share
    first = parents[0].manifest
    methods = sorted({parent.manifest.method for parent in parents})
    return first.model_copy(
        update={
            "method": "+".join(methods),
            "domains": domains,
            "adapted_sha256": _union(p.manifest.adapted_sha256 for p in parents),
            "data_sha256": _union(p.manifest.data_sha256 for p in parents),
            "seed": seed,
            "options": {
                "merge": {"weights": list(merge_weights), **record},
                "parents": [p.manifest.options for p in parents],
            },
            "metrics": {"layers": dict(layers)},
            "tolerances": _tolerances(parents),
            "statistics": None,
            "parents": tuple(
                ParentRecord(
                    manifest_sha256=parent.manifest_sha256,
                    domains=parent.manifest.domains,
                    weight=weight,
                )
                for parent, weight in zip(parents, merge_weights, strict=True)
            ),
        }
    )


def _tolerances(parents: Sequence[Bundle]) -> Tolerances:
    """The loosest of the parents; how far ties spread in the merge nobody has measured."""
    loosest = max((p.manifest.tolerances for p in parents), key=lambda t: t.output_rms)
    return loosest.model_copy(update={"spread": None})


def _union(records: Any) -> dict[str, str]:
    return {key: value for record in records for key, value in record.items()}
