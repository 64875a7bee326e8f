"""Digits by the protocol of classification, with intervals over test images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evidence.protocol import (
    beside_floats,
    beside_qdrop,
    learned_options,
    paper_read,
    protocol_missing,
    protocol_rates,
    protocol_rows,
    protocol_table,
    quantized_ways,
    reproduce_command,
    tests_told,
)
from evidence.records import needed

__all__ = ["digits"]


def digits(record: Mapping[str, Any]) -> str:
    """The section on digits in the paper's setting and in ours."""
    options = learned_options(record["rows"])
    largest = max(record["rows"], key=lambda row: len(row["members"]))
    paper, ours = (protocol_rows(record, setting) for setting in ("paper", "ours"))
    tuning = needed("digits_tuning")
    searches = {
        setting: {**tuning, "searches": [s for s in tuning["searches"] if s["setting"] == setting]}
        for setting in ("paper", "ours")
    }
    return "\n".join(
        [
            "## Digits, with intervals over test images",
            "",
            f"`{_command(record, 'paper')}` and, in our setting, `{_command(record, 'ours')}`: "
            f"ResNet-14, {options['iters']} iterations of {options['batch']} images a block. "
            "Figures are harmonic means of top-1 accuracies in % on the test images "
            f"({tests_told(largest)}), of ONNX Runtime engines, with half of the 95% interval over "
            "test images, rounding seeds and calibration seeds (of one seed without the spread of "
            "calibrations).",
            "",
            "### The paper's setting",
            "",
            "One scale per tensor, BatchNorm folded into the weights, λ = 0.05 of the published "
            f"form. {paper_read(paper, 10)}",
            "",
            "HDRQ's merges less QDrop's, in points:",
            "",
            beside_qdrop({"digits": "digits"}, setting="paper"),
            "",
            protocol_table(paper),
            "",
            protocol_missing(paper, paper=True),
            "",
            protocol_rates(searches["paper"], "these checkpoints"),
            "",
            "### Our setting",
            "",
            *beside_floats(ours, quantized_ways(record)),
            "",
            protocol_missing(ours),
            "",
            protocol_rates(searches["ours"], "these checkpoints"),
        ]
    )


def _command(record: Mapping[str, Any], setting: str) -> str:
    rows = [row for row in record["rows"] if row["setting"] == setting and row["bits"]]
    protocol = f"office-home --made --pairs --iters {learned_options(rows)['iters']}"
    rates = f" --settings {setting} --rates benchmarks/results/digits_tuning.json"
    told = reproduce_command(protocol, rows, weights="", rates=rates)
    return f"{told} --ways {' '.join(quantized_ways({'rows': rows}))}"
