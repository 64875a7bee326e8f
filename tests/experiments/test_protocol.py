"""The paper's protocols: cells, their table, where they run, and what stops them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hdrq_deploy import merge
from hdrq_deploy.calibration.methods import Options
from hdrq_deploy.calibration.settings import SETTINGS
from hdrq_deploy.cli import reproduce
from hdrq_deploy.errors import DataError, HdrqError, ModelError, SpecError
from hdrq_deploy.experiments.cells import jobs
from hdrq_deploy.experiments.comparison_sheets import draw
from hdrq_deploy.experiments.decisions import unpacked
from hdrq_deploy.experiments.grid import Grid, Run, bundle_path, parse_bits, row_path
from hdrq_deploy.experiments.table import cells, header, markdown, network, rows
from hdrq_deploy.experiments.tasks import (
    Domain,
    Task,
    check_images,
    checkpoint_of,
    office_home,
    segmentation,
)
from hdrq_deploy.experiments.ways import WAYS
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.formats.file_kinds import REPRODUCE_TABLE
from hdrq_deploy.jobs.job import Job, run_jobs
from hdrq_deploy.jobs.pool import open_pool
from tests.jobs.test_processes import fail

ROOT = Path(__file__).resolve().parents[2]
# Rates that 20 iterations multiply by 1000, and one that they leave alone.
LEARNING = {"iters": 20, "batch": 8, "lr": 2e-6, "act_lr": 1e-6}
RATES = {"lr": 1e-3}


@pytest.fixture
def task(work: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Three domains of the tiny network; workers find its module too."""
    monkeypatch.setenv("PYTHONPATH", str(work))
    data = str(work / "data.npz")
    domains = [
        Domain(name, str(work / f"Tiny-{name}.safetensors"), data, data)
        for name in ("night", "day", "snow")
    ]
    return Task(
        "tiny",
        "tiny_models:Tiny",
        str(work / "Tiny-base.safetensors"),
        tuple(domains),
        mix_images=16,
        renew_images=16,
        fit_images=32,
        learning={"hdrq": LEARNING, "qdrop": LEARNING},
        rates={"hdrq": RATES, "qdrop": RATES},
        published={"hdrq-w4a4": {"merged": 63.0}},
    )


# Of two widths of weights that a merge leaves as they are. Float models are their own guides.
FLOAT_WAYS = ("nearest", "regression", "renewed", "fitted", "auto")
EVERY_WAY = ("nearest", "regression", "renewed", "fitted", "guided", "guided-mean", "auto")


@pytest.fixture(autouse=True)
def _workers_import_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def grid(task: Task) -> Grid:
    return Grid(task, ("hdrq",), ((4, 4),), (0, 1), ("paper", "ours"), rounding_seeds=2)


def prepared(out: Path) -> Path:
    for name in ("cells", "rows"):
        (out / name).mkdir(parents=True, exist_ok=True)
    return out


def run(grid: Grid, out: Path, workers: int = 1, ray: str | None = None) -> list[str]:
    """Run a grid; the names of its jobs in the order they ended."""
    ended: list[str] = []
    prepared(out)
    with open_pool(workers, 1, ray, out) as pool:
        run_jobs(list(jobs(grid, out, "cpu", 1)), pool, lambda *said: ended.append(said[2]))
    return ended


def digests(out: Path) -> dict[str, str]:
    """Of every file of every bundle, and of every row."""
    files = [f for f in sorted(out.rglob("*")) if f.is_file()]
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the whole grid in this process, for those who read it."""
    return tmp_path_factory.mktemp("here")


def one_pair(grid: Grid) -> Grid:
    """The part of the grid that has two domains, one seed and the paper's setting."""
    pair = replace(grid.task, domains=grid.task.domains[:2])
    return replace(grid, task=pair, seeds=(0,), settings=("paper",))


def local(grid: Grid, here: Path) -> dict[str, str]:
    """What a run of the whole grid in this process wrote; the first who asks runs it."""
    if not any(here.iterdir()):
        run(grid, here)
    return digests(here)


def test_a_grid_makes_its_cells_and_the_papers_table(
    grid: Grid, tmp_path: Path, here: Path
) -> None:
    made = local(grid, here)
    bundles = {name.split("/")[1] for name in made if ".hdrq/" in name}
    # Float, of no setting: three, the pairs, and all in two ways; of ours: three, and all merged
    # in five ways. Twice two seeds: three, and of each pair nearest and two draws, of all nearest;
    # or of all seven ways.
    assert len(bundles) == 3 + 3 + 2 + 3 + 5 + 2 * (3 + 3 * 3 + 1) + 2 * (3 + 7)
    merged = Bundle.open(bundle_path(here, "ours-hdrq-w4a4-s1-night+day+snow-auto-r0"))
    made_by = merged.manifest.options["merge"]
    assert made_by["auto"]["criterion"] == "agreement"
    assert (made_by["method"], made_by["rounding"]) == ("regression", "compensated")
    renewed = Bundle.open(bundle_path(here, "ours-hdrq-w4a4-s1-night+day+snow-renewed-r0"))
    assert renewed.manifest.options["re_estimate"] == merged.manifest.options["re_estimate"]
    assert renewed.manifest.options["merge"]["weights"] == [1 / 3] * 3
    plain = Bundle.open(bundle_path(here, "paper-hdrq-w4a4-s1-night"))
    assert plain.statistics() is None
    assert merged.manifest.options["re_estimate"]["images"] == dict.fromkeys(
        ("night", "day", "snow"), 16
    )
    records = rows(grid, here)
    assert [(r["setting"], r["method"], len(r["members"]), r["way"]) for r in records] == [
        *[("float", "float", 2, "nearest") for _ in range(3)],
        ("float", "float", 3, "nearest"),
        ("float", "float", 3, "regression"),
        *[("ours", "float", 3, way) for way in FLOAT_WAYS],
        *[("paper", "hdrq", 2, way) for _ in range(3) for way in ("nearest", "advanced")],
        ("paper", "hdrq", 3, "nearest"),
        *[("ours", "hdrq", 3, way) for way in EVERY_WAY],
    ]
    fitted = Bundle.open(bundle_path(here, "ours-hdrq-w4a4-s1-night+day+snow-fitted-r0"))
    assert fitted.manifest.options["fit"]["images"] == dict.fromkeys(("night", "day", "snow"), 32)
    assert "re_estimate" not in fitted.manifest.options
    guided = Bundle.open(bundle_path(here, "ours-hdrq-w4a4-s1-night+day+snow-guided-r0"))
    floats = [Bundle.open(bundle_path(here, f"ours-float-{d.name}")) for d in grid.task.domains]
    assert guided.manifest.options["fit"]["guides"] == [b.manifest_sha256 for b in floats]
    followed = bundle_path(here, "ours-hdrq-w4a4-s1-night+day+snow-guided-mean-r0")
    mean = merge(floats, tmp_path / "mean.hdrq", rounding="nearest", method="mean")
    assert Bundle.open(followed).manifest.options["fit"]["guides"] == [mean.manifest_sha256]
    folded = Bundle.open(bundle_path(here, "float-night")).manifest
    assert (folded.method, floats[0].manifest.method) == ("float-folded", "float")
    check_settings(here)
    advanced, triple = records[11], records[16]
    assert advanced["members"] == ("night", "day")
    assert advanced["images"] == {"night": 48, "day": 48}
    assert (triple["options"]["distance_form"], triple["options"]["distance"]) == ("norm", 0.05)
    # By hand: the mean over two calibration and two rounding seeds, in %.
    names = [f"paper-hdrq-w4a4-s{s}-night+day-advanced-r{r}" for s in (0, 1) for r in (0, 1)]
    found = [json.loads(row_path(here, name).read_text())["domains"] for name in names]
    harmonic = [100 * 2 / sum(1 / v for v in domains.values()) for domains in found]
    assert advanced["merged"]["harmonic mean"]["mean"] == pytest.approx(np.mean(harmonic), abs=1e-3)
    assert advanced["merged"]["harmonic mean"]["std"] == pytest.approx(
        np.std(harmonic, ddof=1), abs=1e-3
    )
    assert advanced["merged"]["night"]["count"] == 4 and advanced["single"]["night"]["count"] == 2
    line = dict(zip(header(grid), cells(grid, triple), strict=True))
    assert line["published"] == "63.00" and line["bits"] == "W4A4"
    assert [cells(grid, r)[-1] for r in records].count("63.00") == 1
    text = markdown(grid, records)
    assert f" |\n\n{grid.task.model}\n±: half of the 95% interval" in text
    assert text.count("\n") == 5 + 24
    assert text.count("| mean of folded weights |") == 4
    assert text.count("| regression of folded weights |") == 1
    # What a cell decided of every image is in its row.
    row = json.loads(row_path(here, names[0]).read_text())
    kept = unpacked(row["decisions"])
    assert kept and {name: float(right.mean()) for name, right in kept.items()} == row["domains"]
    summary = advanced["merged"]["harmonic mean"]
    assert summary["low"] < summary["mean"] < summary["high"] and summary["calibrations"] == 2
    (here / "table.md").write_text(text)
    assert REPRODUCE_TABLE.is_ours(here / "table.md")
    named = replace(grid, task=replace(grid.task, form="fused by hand"))
    assert network(named) == f"{grid.task.model} (fused by hand)"


def check_settings(out: Path) -> None:
    """Both settings of a bundle are what the table says."""
    paper, ours = (
        Bundle.open(bundle_path(out, f"{setting}-hdrq-w4a4-s0-night")).manifest
        for setting in ("paper", "ours")
    )
    assert (paper.scheme.grid, ours.scheme.grid) == ("paper", "int8")
    keys = ("scale_rates", "keep_best", "step_change", "act_init", "distance_form")
    found = [paper.options[key] for key in keys]
    assert found == [True, False, 0, "per-image-max", "norm"]
    own = Options.of("hdrq", **SETTINGS["ours"].options("hdrq"))
    assert [ours.options[key] for key in keys] == [getattr(own, key) for key in keys]
    assert ours.options["keep_best"] and ours.options["step_change"] > 0


def test_rates_of_a_protocol_stand_where_the_published_are_not_scaled(task: Task) -> None:
    task = replace(task, rates={"hdrq": {"lr": 0.5}}, learning={"hdrq": {"iters": 100}})
    paper, ours = (task.options("hdrq", setting) for setting in ("paper", "ours"))
    assert (paper.lr, paper.rate_factor) == (1e-4, 200)
    assert (ours.lr, ours.rate_factor) == (0.5, 1)
    assert task.options("float", "float") == Options.of("float")
    assert not task.options("qdrop", "paper").keep_best
    with pytest.raises(SpecError, match="found setting 'theirs'; choose among paper, ours"):
        Grid(task, settings=("theirs",))


def test_a_run_goes_on_where_it_was(grid: Grid, tmp_path: Path, here: Path) -> None:
    before = local(grid, here)
    small = one_pair(grid)
    run(small, tmp_path / "again")
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "again").rglob("*") if f.is_file()}
    damaged = bundle_path(tmp_path / "again", "paper-hdrq-w4a4-s0-day") / "weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    merged = bundle_path(tmp_path / "again", "paper-hdrq-w4a4-s0-night+day-nearest-r0")
    (merged / "model.onnx").unlink()
    run(small, tmp_path / "again")
    changed = {f for f, when in kept.items() if f.stat().st_mtime_ns != when}
    assert {f.parent.name for f in changed if ".hdrq" in f.parent.name} <= {
        damaged.parent.name,
        merged.name,
    }
    assert damaged in changed
    after = digests(tmp_path / "again")
    assert after == {name: before[name] for name in after}
    # Other checkpoints, though older, and other images make other cells.
    domains = list(small.task.domains)
    old = tmp_path / "other.safetensors"
    old.write_bytes(Path(domains[1].weights).read_bytes())
    os.utime(old, (1, 1))
    domains[0] = replace(domains[0], weights=str(old))
    run(replace(small, task=replace(small.task, domains=tuple(domains))), tmp_path / "again")
    swapped = digests(tmp_path / "again")
    for cell in ("paper-hdrq-w4a4-s0-night", "paper-hdrq-w4a4-s0-night+day-nearest-r0"):
        name = f"cells/{cell}.hdrq/weights.safetensors"
        assert swapped[name] != after[name]
    assert swapped["rows/paper-hdrq-w4a4-s0-day.json"] == after["rows/paper-hdrq-w4a4-s0-day.json"]
    kept_row = json.loads(row_path(tmp_path / "again", "paper-hdrq-w4a4-s0-day").read_text())
    for images in (16, 32):
        run(replace(small, task=replace(small.task, images=images)), tmp_path / "again")
        manifest = Bundle.open(bundle_path(tmp_path / "again", "paper-hdrq-w4a4-s0-day")).manifest
        assert manifest.options["images"] == images
    # A row of other test data is measured again; what is no row is not ours to replace.
    row = row_path(tmp_path / "again", "paper-hdrq-w4a4-s0-day")
    row.write_text("{")
    with pytest.raises(HdrqError, match="another file at .*s0-day.json"):
        run(replace(small, task=replace(small.task, images=32)), tmp_path / "again")
    assert row.read_text() == "{"
    row.write_text(json.dumps({**kept_row, "tests": {}}))
    run(replace(small, task=replace(small.task, images=32)), tmp_path / "again")
    assert json.loads(row.read_text())["images"] == {"day": 48}
    run(small, tmp_path / "again")
    assert digests(tmp_path / "again") == after
    # Other options make other cells, and their merges.
    other = replace(small.task, learning={"hdrq": {**LEARNING, "iters": 10}})
    run(replace(small, task=other), tmp_path / "again")
    changed = {name for name, value in digests(tmp_path / "again").items() if value != after[name]}
    assert {name for name in changed if name.startswith("rows/paper")} == {
        name for name in after if name.startswith("rows/paper")
    }
    assert not any(name.startswith("cells/float") for name in changed)


def test_processes_write_the_same_bytes(grid: Grid, tmp_path: Path, here: Path) -> None:
    before = local(grid, here)
    run(one_pair(grid), tmp_path / "processes", workers=2)
    after = digests(tmp_path / "processes")
    assert len(after) > 40
    assert after == {name: before[name] for name in after}


def victims() -> Iterator[int]:
    """Process ids of Ray's workers that run a job now."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                name = (folder / "cmdline").read_bytes()
            except OSError:  # it ended
                continue
            if name.startswith(b"ray::_work_shared"):
                yield int(folder.name)


@pytest.mark.slow
def test_ray_writes_the_same_bytes_though_a_worker_is_killed(
    grid: Grid, tmp_path: Path, here: Path
) -> None:
    pytest.importorskip("ray")
    before = local(grid, here)
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not over.is_set() and not killed:
            # Behind its first finished block, so that there is something to go on from.
            try:
                learned = next((tmp_path / "ray").rglob("block-*.safetensors"), None)
            except FileNotFoundError:  # a temporary folder went while it was listed
                continue
            if learned is None:
                time.sleep(0.02)
                continue
            for process in victims():
                os.kill(process, signal.SIGKILL)
                killed.append(process)
                break

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run(one_pair(grid), tmp_path / "ray", ray="local")
    finally:
        over.set()
        killer.join()
    assert killed
    after = digests(tmp_path / "ray")
    assert len(after) > 40
    assert after == {name: before[name] for name in after}


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "does not answer"),
        ("ray://127.0.0.1:1", "does not answer"),
        ("somewhere", "needed HOST:PORT"),
    ],
)
def test_a_ray_address_that_does_not_answer(
    address: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    began = time.monotonic()
    argv = ["segmentation", "--made", "--out", str(tmp_path), "--ray", address, "--bits", "w8a8"]
    assert reproduce.main(argv) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and address in said and "\n" not in said
    assert time.monotonic() - began < 60


def test_tasks_that_fit_no_node(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    message = "found no node with 999 CPU and 0 GPU.*fewer `threads`"
    with pytest.raises(HdrqError, match=message), open_pool(1, 999, "local", tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def images_in(folder: Path, names: list[str], size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for i, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{i:04}.jpg")


def office_tree(root: Path) -> Path:
    """Office-Home as it is distributed, one picture a class."""
    names = [f"Class_{i:02}" for i in range(60)]
    names += ["Telephone", "Toys", "Trash_Can", "TV", "Webcam"]
    for seed, domain in enumerate(("Art", "Clipart", "Product", "Real World")):
        images_in(root / domain, names, (40, 48), seed)
    return root


def test_office_home_and_shots_folders_are_found(tmp_path: Path) -> None:
    data = office_tree(tmp_path / "data")
    for letters, role in (("R", "source"), ("RA", "target"), ("RC", "target"), ("RP", "target")):
        folder = tmp_path / "ckps" / role / "uda" / "office-home" / letters
        folder.mkdir(parents=True)
        for part in "FBC":
            torch.save({}, folder / f"{role}_{part}.pt")
    task = office_home(data, tmp_path / "ckps")
    assert [d.name for d in task.domains] == ["art", "clipart", "product"]
    assert task.source.endswith("/R") and task.domains[1].weights.endswith("/RC")
    assert task.wanted.resize == (256, 256) and task.wanted.size == (224, 224)
    assert task.published["hdrq-w3a3"]["merged"] == 64.70
    assert not office_home(data, tmp_path / "ckps", targets=["Art", "Product"]).published
    (data / "Clipart").rename(data / "Other")
    with pytest.raises(DataError, match="Clipart: not there.*found Art, Other"):
        office_home(data, tmp_path / "ckps")


def test_the_segmentation_protocol_finds_its_data(tmp_path: Path) -> None:
    for name in ("cityscapes", "idd"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for name in ("source.pth", "cityscapes.pth", "idd.pth"):
        (tmp_path / name).touch()
    task = segmentation(tmp_path / "data", tmp_path)
    assert task.model == "hdrq_deploy.models:hrda_resnet101_conv1x1"
    assert [d.image_size for d in task.domains] == [(1024, 2048), (1152, 2048)]
    assert task.published["qdrop-w4a4"]["merged"] == 58.92
    # Figures of the paper stand beside its own network only.
    for other in ("hrda_resnet101", "hrda_mit_b5"):
        found = segmentation(tmp_path / "data", tmp_path, other)
        assert not found.published and found.model.endswith(f":{other}") and found.form
    with pytest.raises(ModelError, match="found HRDA's form 'resnet101'; choose one of hrda_"):
        segmentation(tmp_path / "data", tmp_path, "resnet101")
    (tmp_path / "idd.pth").unlink()
    with pytest.raises(DataError, match=r"idd: found no checkpoint; needed idd with .safetensors"):
        segmentation(tmp_path / "data", tmp_path)
    with pytest.raises(DataError, match="found none of cityscapes, idd, bdd100k"):
        segmentation(tmp_path, tmp_path)


def test_images_are_looked_at_before_any_work(task: Task, tmp_path: Path) -> None:
    check_images(task, 8)
    with pytest.raises(DataError, match="found 48 images of night for calibration; needed 64 or m"):
        check_images(task, 64)
    scenes, bare = tmp_path / "scenes", tmp_path / "bare"
    for folder in (scenes / "images", scenes / "labels", bare):
        folder.mkdir(parents=True)
    for n in range(3):
        Image.new("RGB", (8, 8)).save(scenes / "images" / f"{n}.png")
        Image.new("RGB", (8, 8)).save(bare / f"{n}.png")
    for test, message in (
        (scenes, "needed the labels of every image"),
        (bare, "found images of night without labels for the test; needed one folder per class"),
    ):
        domain = replace(task.domains[0], images=str(bare), test=str(test))
        with pytest.raises(DataError, match=message):
            check_images(replace(task, domains=(domain,)), 2)


def test_grids_that_make_no_sense(task: Task) -> None:
    with pytest.raises(SpecError, match="found method 'magic'"):
        Grid(task, ("magic",))
    with pytest.raises(SpecError, match="1 domain; a merge needs two"):
        Grid(replace(task, domains=task.domains[:1]))
    with pytest.raises(SpecError, match="found bits 'int4'; needed such as w4a4"):
        parse_bits(["int4"])
    with pytest.raises(SpecError, match="wbits"):
        parse_bits(["w9a8"])
    assert parse_bits(["w4a4", "W4A4", "w3a3"]) == ((4, 4), (3, 3))
    # Merges that round to fewer bits are of parents with 8.
    wide = Grid(task, methods=("rtn",), bits=((8, 4), (4, 8)), settings=("ours",))
    narrowed = [m for run in wide.runs() for m in wide.merges(run) if WAYS[m.way].wbits]
    assert {m.run.name for m in narrowed} == {f"ours-rtn-w8a4-s{seed}" for seed in wide.seeds}
    assert {m.way for m in narrowed} == {
        f"{way}-w{bits}"
        for way in ("regression", "renewed", "fitted", "guided-mean")
        for bits in (4, 3)
    }
    assert Run("paper", "hdrq", 4, 8, 1).single("night") == "paper-hdrq-w4a8-s1-night"


def test_a_grid_of_some_ways(task: Task, tmp_path: Path) -> None:
    every = Grid(task, ("rtn",), ((4, 8),), (0,), ("paper", "ours"), rounding_seeds=2)
    some = replace(every, only_ways=("renewed", "nearest"))
    assert list(some.runs()) == list(every.runs())
    for run in every.runs():
        # Folded float models, which all rows are compared with, are always merged.
        kept = {"renewed", "nearest", *(["regression"] if run.setting == "float" else [])}
        expected = [m for m in every.merges(run) if m.way in kept]
        assert list(some.merges(run)) == expected
        # Bundles keep what another run's ways need.
        assert some.needs_statistics(run) == every.needs_statistics(run)
    with pytest.raises(SpecError, match="no way to merge bundles of rtn at w4a8 .paper. among ren"):
        replace(every, only_ways=("renewed",))
    one = replace(every, settings=("ours",), only_ways=("renewed",))
    assert {m.way for run in one.runs() if run.setting != "float" for m in one.merges(run)} == {
        "renewed"
    }
    # Float models are not fitted to themselves: a run without merges has no picture.
    guided = replace(every, settings=("ours",), only_ways=("guided",))
    with pytest.raises(DataError, match="found no merged cells of w4a8"):
        draw(guided, tmp_path, "w4a8")
    with pytest.raises(SpecError, match="found way 'fitted'; choose among those of paper: nearest"):
        Grid(task, settings=("paper",), only_ways=("fitted",))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "needs --data and --checkpoints; or pass --made"),
        (["--made", "--data", "x"], "it brings its own"),
        (["--made", "--workers", "0"], "needed 1 or more"),
        (["--made", "--targets", "photo", "snow"], "found the target snow; there are handwriting"),
        (["--data", "nowhere", "--checkpoints", "nowhere"], "not there"),
        (["--model", "hrda_resnet101"], "found --model with office-home, which has a network of"),
        (["--backbone", "mit_b5", "--made"], "found --backbone with --made, which has a network"),
        (
            ["--made", "--ways", "fitted"],
            "found way 'fitted'; choose among those of paper: nearest",
        ),
    ],
)
def test_commands_that_make_no_sense(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.main(["office-home", "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_office_home_runs_as_a_user_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pytest.importorskip("torchvision.models")
    from hdrq_deploy.models import shot_resnet50

    # A narrow block a stage in the place of 3, 4, 6 and 3: the whole network has tests of its own.
    resnet = models.resnet

    def short(weights: None) -> torch.nn.Module:
        return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], width_per_group=8)

    monkeypatch.setattr(models, "resnet50", short)
    data, checkpoints = office_tree(tmp_path / "data"), tmp_path / "checkpoints"
    checkpoints.mkdir()
    for seed, name in enumerate(("source", "art", "product")):
        torch.manual_seed(seed // 2)
        torch.save({"state_dict": shot_resnet50().state_dict()}, checkpoints / f"{name}.pth")
    argv = ["office-home", "--data", str(data), "--checkpoints", str(checkpoints)]
    argv += ["--targets", "Art", "Product", "--methods", "rtn", "--bits", "w8a8", "--seeds", "0"]
    argv += ["--rounding-seeds", "1", "--images", "8", "--threads", "2"]
    out = tmp_path / "out"
    assert reproduce.main([*argv, "--out", str(out)]) == 0
    assert "paper" in capsys.readouterr().out
    report = json.loads((out / "results.json").read_text())
    assert [r["way"] for r in report["rows"]] == ["nearest", "nearest", "advanced"]
    row = json.loads(row_path(out, "paper-rtn-w8a8-s0-art+product-nearest-r0").read_text())
    assert row["images"] == {"art": 65, "product": 65} and row["metric"] == "top1"
    manifest = Bundle.open(bundle_path(out, "paper-rtn-w8a8-s0-art")).manifest
    assert manifest.preprocessing and manifest.preprocessing.resize == (256, 256)
    # As SHOT numbers them: TV is the 64th.
    assert manifest.classes and len(manifest.classes) == 65
    assert manifest.classes[61:] == ("Toys", "Trash_Can", "TV", "Webcam")
    # The table again, from the cells alone.
    (out / "table.md").unlink()
    assert reproduce.main([*argv, "--out", str(out), "--table"]) == 0
    assert "| paper | rtn | W8A8 |" in (out / "table.md").read_text()


def test_one_of_two_folders_of_shot_is_not_taken_in_silence(tmp_path: Path) -> None:
    for year in ("2019", "2020"):
        (tmp_path / year / "RA").mkdir(parents=True)
        (tmp_path / year / "RA" / "target_F_par_0.3.pt").touch()
    with pytest.raises(DataError, match="needed one of the two"):
        checkpoint_of(tmp_path, "Art", "RA", "target")
    (tmp_path / "2020/RA/target_F_par_0.3.pt").unlink()
    assert checkpoint_of(tmp_path, "Art", "RA", "target") == tmp_path / "2019/RA"


@pytest.mark.slow
def test_errors_of_a_job_on_ray_reach_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    failing = pytest.raises(DataError, match="found no file")
    with failing, open_pool(1, 1, "local", tmp_path) as pool:
        run_jobs([Job("a", fail, {"message": "found no file"})], pool)


def wait_for(mark: Path) -> None:
    """Say who runs this, in a temporary folder that goes when the job is unwound."""
    with tempfile.TemporaryDirectory(dir=mark.parent, prefix="scratch"):
        mark.write_text(str(os.getpid()))
        time.sleep(60)


_PARENT = """
import sys
from pathlib import Path
from tests.experiments.test_protocol import Job, open_pool, run_jobs, wait_for
if __name__ == "__main__":
    out = Path(sys.argv[1])
    with open_pool(2, 1, None, out) as pool:
        run_jobs([Job(str(i), wait_for, {"mark": out / f"{i}"}) for i in range(2)], pool)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(how: int, tmp_path: Path) -> None:
    script, out = tmp_path / "parent.py", tmp_path / "out"
    script.write_text(_PARENT)
    out.mkdir()
    command = [sys.executable, str(script), str(out)]
    parent = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not all((out / f"{i}").exists() and (out / f"{i}").read_text() for i in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = [int((out / f"{i}").read_text()) for i in range(2)]
    parent.send_signal(how)
    parent.wait(60)
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline + 30
        time.sleep(0.1)
    if how == signal.SIGKILL:  # unwound; SIGTERM without a handler ends the parent at once too
        assert not list(out.glob("scratch*"))


def alive(process: int) -> bool:
    try:
        state = (Path("/proc") / str(process) / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray", "--workers", "2"], "--workers applies to local processes only"),
        (["--gpus", "1"], "--gpus (0 or more) needs --ray"),
        (["--draw", "w9a9"], "wbits"),
        (["--draw", "w3a3", "--bits", "w4a4"], "found --draw w3a3; needed one of --bits w4a4"),
        (["--seeds", "-1", "--bits", "w4a4"], "found seed -1"),
        (["--images", "0", "--bits", "w4a4"], "found 0 calibration images"),
        (["--targets", "dusk", "dusk", "--bits", "w4a4"], "found a domain twice"),
    ],
)
def test_flags_are_looked_at_before_any_work(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from hdrq_deploy.calibration_data import streets

    for split in ("calibration", "test"):
        monkeypatch.setitem(streets.SIZES, split, 1)
    assert reproduce.main(["segmentation", "--made", "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("cells/*"))


@pytest.mark.slow
def test_the_segmentation_protocol_runs_on_drawn_streets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hdrq_deploy.calibration_data import streets

    for split, count in (("calibration", 4), ("test", 2)):
        monkeypatch.setitem(streets.SIZES, split, count)
    # Merges in every way of the other setting are made of CamVid, whose images are smaller here.
    argv = ["segmentation", "--made", "--methods", "rtn", "--bits", "w4a4", "--settings", "paper"]
    argv += ["--seeds", "0", "--rounding-seeds", "1", "--threads", "2", "--draw", "w4a4"]
    argv += ["--targets", "dusk", "brick"]
    assert reproduce.main([*argv, "--out", str(tmp_path)]) == 0
    assert "4 pictures" in capsys.readouterr().out
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [p.name for p in pictures][:2] == ["brick-0.png", "brick-1.png"]
    with Image.open(pictures[0]) as picture:
        # Image, labels, float and rtn; titles above.
        assert picture.size == (4 * 260 - 4, 128 + 14)
    row = json.loads(row_path(tmp_path, "paper-rtn-w4a4-s0-dusk+brick-advanced-r0").read_text())
    assert row["metric"] == "miou" and set(row["domains"]) == {"dusk", "brick"}
    other = [*argv, "--out", str(tmp_path), "--table", "--draw", "w3a3", "--bits", "w4a4", "w3a3"]
    assert reproduce.main(other) == 2
    assert "found no merged cells of w3a3" in capsys.readouterr().err
