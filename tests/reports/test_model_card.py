"""Cards say what manifests and measurements hold, and replace nothing that somebody wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hdrq_deploy import Bundle
from hdrq_deploy.cli import bench, card, export
from hdrq_deploy.formats.bench_result import BenchResult, harmonic_mean
from hdrq_deploy.reports.model_card import model_card

yaml = pytest.importorskip("yaml")
CORPUS = Path(__file__).resolve().parents[1] / "corpus" / "schema-1"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("engine", "merged.hdrq"):
        shutil.copytree(CORPUS / name, tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measurement of the engine on two domains, as hdrq-bench writes it."""
    folder = tmp_path_factory.mktemp("measured")
    rng = np.random.default_rng(0)
    for name, images in (("night", 8), ("day", 12)):
        x = rng.normal(size=(images, 3, 16, 16)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, y=rng.integers(0, 4, images))
    data = [f"{name}={folder / name}.npz" for name in ("night", "day")]
    argv = [str(CORPUS / "engine"), "--data", *data, "--iterations", "3", "--threads", "1"]
    assert bench.main([*argv, "--json", str(folder / "bench.json")]) == 0
    return folder / "bench.json"


def parts(text: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """Front matter, the tables' rows of two cells, and the text."""
    _, front, body = text.split("---\n", 2)
    rows = (line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| "))
    return yaml.safe_load(front), {row[0]: row[1] for row in rows if len(row) == 2}, body


def test_the_card_of_an_engine_has_what_was_measured(
    place: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = place / "engine"
    argv = [str(engine), "--results", str(measured), "--license", "apache-2.0"]
    assert card.main(argv) == 0
    assert capsys.readouterr().out.split() == [str(engine / "README.md")]
    front, rows, body = parts((engine / "README.md").read_text())
    result = BenchResult.model_validate_json(measured.read_text())
    assert result.accuracy is not None
    shares = result.accuracy.domains
    assert front["license"] == "apache-2.0" and front["library_name"] == "hdrq-deploy"
    assert front["pipeline_tag"] == "image-classification" and "int4" in front["tags"]
    (index,) = front["model-index"]
    found = {r["dataset"]["name"]: r["metrics"][0]["value"] for r in index["results"]}
    assert found == pytest.approx(shares, abs=1e-6) and set(found) == {"night", "day"}
    cells = " | ".join(
        f"{100 * shares[d]:.1f} ({n} images)" for d, n in (("night", 8), ("day", 12))
    )
    mean = 100 * harmonic_mean(list(shares.values()))
    assert f"| ort | {cells} | {mean:.1f} | {result.latency_ms.p50:.2f} |" in body
    manifest = json.loads((engine / "manifest.json").read_text())
    assert rows["bundle"] == manifest["bundle_sha256"]
    assert rows["executed precision"] == manifest["precision"]
    assert rows["domains (merge weight)"] == "night (0.5), day (0.5)"
    assert "is not known" not in body


def test_the_card_of_a_bundle_has_its_provenance(place: Path, measured: Path) -> None:
    bundle = place / "merged.hdrq"
    identity = Bundle.open(bundle).manifest_sha256
    assert card.main([str(bundle), "--results", str(measured), "--name", "Two streets"]) == 0
    front, rows, body = parts((bundle / "README.md").read_text())
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert rows["manifest"] == identity and "# Two streets\n" in body
    assert rows["adapted checkpoint of day"] == manifest["adapted_sha256"]["day"]
    assert rows["merged at 0.5 from night"] == manifest["parents"][0]["manifest_sha256"]
    assert front["model-index"][0]["name"] == "Two streets"
    # The card is no part of the bundle.
    assert Bundle.open(bundle).manifest_sha256 == identity


def test_without_a_measurement_the_card_says_so(place: Path) -> None:
    front, _, body = parts(model_card(place / "engine"))
    assert "model-index" not in front and "metrics" not in front
    assert "No measurement was given" in body
    assert "The accuracy on night and day is not known." in body


def test_a_card_that_somebody_edited_stays(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = place / "engine"
    readme = engine / "README.md"
    assert card.main([str(engine)]) == 0
    assert card.main([str(engine), "--name", "again"]) == 0  # ours is replaced
    edited = readme.read_text().replace("# again", "# Mine")
    for text in (edited, "# Mine\n", ""):
        readme.write_text(text)
        capsys.readouterr()
        assert card.main([str(engine)]) == 2
        said = capsys.readouterr().err
        assert "found another file" in said and "--force" in said and said.count("\n") == 1
        assert readme.read_text() == text
    assert card.main([str(engine), "--force"]) == 0
    assert "# engine\n" in readme.read_text()
    assert {file.name for file in engine.iterdir()} - {"README.md"} == {
        file.name for file in (CORPUS / "engine").iterdir()
    }


def test_an_export_replaces_a_folder_with_our_card_and_no_other(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = place / "engine"
    argv = [str(place / "merged.hdrq"), "-o", str(engine), "--force"]
    assert card.main([str(engine)]) == 0
    assert card.main([str(place / "merged.hdrq")]) == 0
    assert export.main(argv) == 0 and not (engine / "README.md").exists()
    assert card.main([str(engine)]) == 0
    with (engine / "README.md").open("a") as file:
        file.write("My notes.\n")
    capsys.readouterr()
    assert export.main(argv) == 2
    assert "README.md, which manifest.json does not name" in capsys.readouterr().err
    assert (engine / "README.md").read_text().endswith("My notes.\n")


def test_what_is_wrong_leaves_no_card(
    place: Path, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = place / "engine"
    other = json.loads(measured.read_text()) | {"method": "hdrq"}
    (place / "other.json").write_text(json.dumps([other]))
    (place / "text.json").write_text("[1]")
    (engine / "damaged").mkdir()
    shutil.copytree(CORPUS / "engine", place / "damaged")
    (place / "damaged" / "model.onnx").write_bytes(b"x")
    cases = [
        ([str(engine), "--results", str(place / "other.json")], "none has the model, method"),
        ([str(engine), "--results", str(place / "text.json")], "found no measurements of"),
        ([str(engine), "--results", str(place / "absent.json")], "found no file"),
        ([str(place / "damaged")], "altered"),
        ([str(place / "absent")], "absent"),
        ([str(engine), "-o", str(place)], "found a folder"),
    ]
    for argv, message in cases:
        capsys.readouterr()
        assert card.main(argv) == 2, argv
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert not list(place.rglob("README.md")) and not (place / "absent").exists()


def test_names_of_strangers_break_neither_yaml_nor_tables(place: Path) -> None:
    name = 'a: "b" | <script>\n# c `d` é'
    front, _, body = parts(model_card(place / "engine", name=name, license='x"\ny: z'))
    assert front["license"] == 'x"\ny: z' and "y" not in front
    assert '# a: "b" \\| &lt;script> # c \\`d\\` é\n' in body


def test_a_card_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert card.main([str(place / "engine"), "-o", "-"]) == 0
    assert capsys.readouterr().out.startswith("---\nlibrary_name:")
    assert not (place / "engine" / "README.md").exists()
