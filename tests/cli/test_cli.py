"""The commands as a user types them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdrq_deploy.calibration.methods import Options
from hdrq_deploy.cli import bench, calibrate, export, inspect, merge, verify
from hdrq_deploy.cli import main as umbrella
from hdrq_deploy.formats.bundle import Bundle
from hdrq_deploy.merging import merge as merge_bundles
from hdrq_deploy.runtime.bench import BenchResult, harmonic_mean

ROOT = Path(__file__).resolve().parents[2]


def flags(work: Path, out: Path, domain: str = "night", data: str = "images") -> list[str]:
    return shlex.split(
        f"--model tiny_models:Tiny --weights {work}/Tiny-{domain}.safetensors "
        f"--base {work}/Tiny-base.safetensors --data {work}/{data} --domain {domain} "
        f"--method hdrq --wbits 4 --abits 8 --iters 5 --batch 8 -o {out}/{domain}.hdrq"
    )


def test_the_path_from_checkpoints_to_a_report(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for domain in ("night", "day"):
        assert calibrate.main(flags(work, tmp_path, domain)) == 0
    bundles = [str(tmp_path / f"{d}.hdrq") for d in ("night", "day")]
    merged, engine = str(tmp_path / "merged.hdrq"), str(tmp_path / "engine")
    options = [
        "--weights",
        "0.5",
        "0.5",
        "--rounding",
        "advanced",
        "--candidates",
        "20",
        "--seed",
        "0",
        "-o",
    ]
    assert merge.main([*bundles, *options, merged]) == 0
    assert export.main([merged, "--engine", "ort", "-o", engine]) == 0
    names = {f.name for f in Path(engine).iterdir()}
    assert {"manifest.json", "model.onnx", "precision.json"} <= names
    data = [f"night={work}/images", f"day={work}/images"]
    out = [tmp_path / "out.json", tmp_path / "out.html"]
    report = ["--json", str(out[0]), "--html", str(out[1]), "--iterations", "20"]
    assert bench.main([engine, "--data", *data, *report]) == 0
    result = BenchResult.model_validate_json(out[0].read_text())
    assert result.accuracy is not None
    assert set(result.accuracy.domains) == {"night", "day"}
    shares = list(result.accuracy.domains.values())
    assert result.accuracy.harmonic_mean == pytest.approx(harmonic_mean(shares))
    raw = np.array(result.latency_ms.samples)
    assert len(raw) == 20
    assert result.latency_ms.p90 == pytest.approx(np.percentile(raw, 90))
    page = out[1].read_text()
    # One file: the plots inside, nothing fetched from elsewhere.
    assert page.count('<svg class="chart wide"') == 3 and page.count("<figcaption>") == 4
    assert {"preprocess", "compute", "end_to_end"} <= result.phases.keys()
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert verify.main([merged, engine, "--torch", "--data", data[0], "--max-flips", "0.2"]) == 0
    capsys.readouterr()
    assert inspect.main([merged, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["domains"] == {"night": 0.5, "day": 0.5}
    assert umbrella.main(["inspect", merged]) == 0
    shown = capsys.readouterr().out
    assert "conv1" in shown and "W4A8" in shown


def test_inspect_says_how_a_merge_was_made(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown(*parents: Bundle, **options: Any) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.hdrq"
        merge_bundles([parent.path for parent in parents], path, [0.25, 0.75], options=options)
        assert inspect.main([str(path)]) == 0
        return capsys.readouterr().out

    alike = [make(domain=domain) for domain in ("night", "day")]
    once = shown(*alike, auto={"criterion": "entropy", "tried": [[0.5, 0.5]] * 9})
    assert "auto.criterion=entropy, auto.tried=9 entries" in once
    assert once.count("\noptions ") == 1 and "rounding=" in once
    assert "weights=" not in once and "0.25 x night, 0.75 x day" in once
    assert max(map(len, once.splitlines())) <= 100
    two = shown(alike[0], make(domain="day", method="hdrq"))
    odd = shown(*alike, said={"odd\x1b[2J": "a\x1b[2Jb"})
    assert "\x1b" not in odd and "a\\u001b[2Jb" in odd
    assert "\noptions 1  images=" in two and "\noptions 2  images=" in two and "iters=100" in two


def test_accuracy_is_what_numpy_counts(make: Any, work: Path, inputs: Any, tmp_path: Path) -> None:
    from hdrq_deploy.exporters import export as export_bundle
    from hdrq_deploy.runtime import benchmark, load_engine

    path = export_bundle(make(), tmp_path / "engine")
    with np.load(work / "data.npz") as file:
        labels = file["y"]
    with load_engine(path) as engine:
        expected = float((engine(inputs).argmax(1) == labels).mean())
    result = benchmark(path, {"d": work / "data.npz"}, warmup=1, iterations=3)
    assert result.accuracy is not None
    assert result.accuracy.domains["d"] == pytest.approx(expected)


def test_bad_images_get_one_line_and_exit_code_2(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = {}
    for name in ("empty", "corrupt", "grey", "sizes"):
        folders[name] = tmp_path / name
        if name == "empty":
            folders[name].mkdir()
        else:
            shutil.copytree(work / "images", folders[name])
    (folders["corrupt"] / "a" / "bad.png").write_bytes(b"\x89PNG\r\n broken")
    grey = Image.fromarray(np.zeros((16, 16), np.uint8))
    Image.fromarray(np.zeros((9, 16, 3), np.uint8)).save(folders["sizes"] / "c" / "x.png")
    for file in folders["grey"].rglob("*.png"):
        grey.save(file)
    np.savez(tmp_path / "nan.npz", x=np.full((4, 3, 16, 16), np.nan, np.float32))
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    expected = {
        "absent": "found nothing",
        "empty": "found no images",
        "corrupt": "bad.png: cannot be decoded",
        "grey": "does not take an input of shape",
        "sizes": "found 9x16 after images of 16x16",
        "nan.npz": "found NaN or infinity in image 0",
        "other.npz": r"found arrays \['images'\]",
        "text.npz": "cannot be read as .npz",
    }
    for name, message in expected.items():
        argv = flags(work, tmp_path / "out")
        argv[argv.index("--data") + 1] = str(tmp_path / name)
        assert calibrate.main(argv) == 2, name
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    argv = [*flags(work, tmp_path / "out"), "--skip-corrupt"]
    argv[argv.index("--data") + 1] = str(folders["corrupt"])
    assert calibrate.main(argv) == 0


def test_flags_that_a_method_has_no_use_for_are_named(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = flags(work, tmp_path)

    def said(method: str, *more: str) -> str:
        own = [method if word == "hdrq" else word for word in argv]
        assert calibrate.main([*own, *more]) == 0
        return capsys.readouterr().err

    assert "note:" not in said("hdrq", "--lr", "1e-3")
    nothing = "change nothing for --method rtn, which learns nothing in iterations\n"
    assert f"note: --iters, --batch, --distance-form {nothing}" in said(
        "rtn", "--distance-form", "norm"
    )
    floats = said("float")
    assert "note: --wbits, --abits change nothing for --method float, which quantizes" in floats
    rest = {"learner", "granularity", "act_init", "bias_correction"}
    assert {*calibrate._OF_LEARNING} == {field.name for field in fields(Options)} - rest
    # A learner makes it learn.
    assert "note:" not in said("rtn", "--learner", "latent")


def test_bad_engines_and_data_get_exit_code_2(
    make: Any, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "engine"
    assert export.main([str(make().path), "-o", str(engine)]) == 0
    np.savez(tmp_path / "small.npz", x=np.zeros((4, 3, 8, 8), np.float32), y=np.zeros(4, int))
    np.savez(tmp_path / "nolabels.npz", x=np.zeros((4, 3, 16, 16), np.float32))
    np.savez(tmp_path / "classes.npz", x=np.zeros((4, 3, 16, 16), np.float32), y=np.full(4, 9))
    damaged = tmp_path / "damaged"
    shutil.copytree(engine, damaged)
    (damaged / "model.onnx").write_bytes(b"x")
    cases = [
        ([str(tmp_path / "absent")], "found no manifest.json"),
        ([str(make().path)], "hdrq-export"),
        ([str(damaged)], "altered"),
        ([str(engine), "--data", f"a={tmp_path}/small.npz"], r"shape \(1, 3, 8, 8\)"),
        ([str(engine), "--data", f"a={tmp_path}/nolabels.npz"], "without labels"),
        ([str(engine), "--data", f"a={tmp_path}/classes.npz"], "the model has 4 classes"),
        ([str(engine), "--iterations", "0"], "found --iterations 0"),
        ([str(engine), "--data", "=x"], "NAME=DIR_OR_NPZ"),
    ]
    for argv, message in cases:
        capsys.readouterr()
        assert bench.main(argv) == 2, argv
        assert re.search(message, capsys.readouterr().err), message


def commands(marker: str) -> str:
    readme = (ROOT / "README.md").read_text()
    (command,) = re.findall(rf"<!-- {marker} -->\n```sh\n(.*)\n```", readme)
    return str(command)


@pytest.mark.slow
def test_the_readme_demo_command_works(tmp_path: Path) -> None:
    install, _, demo = commands("demo").partition(" && ")
    assert install.startswith("pip install -e")
    extra = re.findall(r"\[(.*)\]", install)
    assert extra == ["demo"]
    program = shutil.which("hdrq", path=str(Path(sys.executable).parent))
    assert program, "the console script is not installed beside this Python"
    run = subprocess.run(
        [program, *demo.split()[1:], "--quick"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    out = tmp_path / "hdrq-demo"
    record = json.loads((out / "results.json").read_text())
    rows = {row["model"]: row["result"] for row in record["rows"]}
    means = {name: row["accuracy"]["harmonic_mean"] for name, row in rows.items()}
    assert means["float, a model per domain"] > 0.9
    assert means["float merged"] > 0.8
    # 25 iterations a block already recover most of what rounding loses at 3 bits.
    assert means["HDRQ merged W3A3"] > means["RTN merged W3A3"]
    assert list(rows) == [
        "float, a model per domain",
        "float merged",
        "RTN merged W8A8",
        "HDRQ merged W8A8",
        "RTN merged W3A3",
        "HDRQ merged W3A3",
    ]
    (said,) = (line for line in record["verified"] if line.startswith("hdrq-w3a3-merged-ort: "))
    assert "1500 images: PyTorch to bundle 0 decisions differ" in said
    report = (out / "report.html").read_text()
    (opening, _) = report.split("<table", 1)
    assert re.findall("<figcaption>(.*?) <", opening) == ["handwriting", "photo", "night"]
    ending = "figures on real images are in docs/evidence/ of the source"
    assert run.stdout.splitlines()[-1].endswith(ending)
    # It is a run like any other, of the file that it leaves.
    flags = ["run", str(out / "hdrq.yaml"), "--dry-run"]
    again = subprocess.run([program, *flags], capture_output=True, text=True, check=False)
    assert again.stdout.startswith("0 of ")


def test_several_domains_in_one_call(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(work))  # workers find tiny_models
    names = ["night", "day"]
    argv = ["--model", "tiny_models:Tiny", "--base", f"{work}/Tiny-base.safetensors"]
    argv += ["--domain", *names, "--data", *[f"{work}/images"] * 2, "--iters", "5", "--batch", "8"]
    argv += ["--weights", *(f"{work}/Tiny-{name}.safetensors" for name in names)]
    argv += ["--threads", "1", "-o", str(tmp_path)]
    assert calibrate.main([*argv, "--workers", "2"]) == 0
    made = [tmp_path / f"{name}.hdrq" for name in names]
    assert capsys.readouterr().out.split() == [str(path) for path in made]
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for p in made for f in p.iterdir()}
    assert {Bundle.open(path).domain for path in made} == set(names)
    # The same in this process: bytes are equal, and with --resume nothing is made again.
    assert calibrate.main([*argv, "--resume"]) == 0
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in before} == before
    assert calibrate.main(argv) == 0
    assert {f: f.read_bytes() for f in before} == {f: b for f, (b, _) in before.items()}
    capsys.readouterr()
    one = [*argv, "--domain", "night", "--data", f"{work}/images", "--weights", "x", "--threads"]
    assert calibrate.main([*one, "2"]) == 2
    assert "--threads, --ray or --gpus with one domain or" in capsys.readouterr().err
    assert calibrate.main([*argv, "--domain", "night"]) == 2
    assert "found 2 after --data for 1 after --domain" in capsys.readouterr().err


def test_domains_together_in_one_bundle(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(work / "data.npz") as data:
        np.savez(tmp_path / "few.npz", x=data["x"][:16], y=data["y"][:16])
    target, float_merge = tmp_path / "both.hdrq", tmp_path / "mean.safetensors"
    checkpoints = [f"{work}/Tiny-{name}.safetensors" for name in ("night", "day")]
    assert merge.main([*checkpoints, "--method", "mean", "-o", str(float_merge)]) == 0
    argv = ["--model", "tiny_models:Tiny", "--domain", "night", "day", "--together"]
    argv += ["--method", "gptq", "--wbits", "4", "-o", str(target)]
    data = ["--data", f"{work}/data.npz", f"{tmp_path}/few.npz"]
    assert calibrate.main([*argv, *data, "--weights", str(float_merge)]) == 0
    assert capsys.readouterr().out.split() == [str(float_merge), str(target)]
    bundle = Bundle.open(target)
    assert bundle.manifest.domains == {"night": 0.75, "day": 0.25} and bundle.domain is None
    assert set(bundle.manifest.data_sha256) == {"night", "day"}
    assert bundle.manifest.options["images"] == 64
    for wrong, message in (
        ([*data, "--weights", *checkpoints], "found 2 after --weights with --together; needed one"),
        (["--data", f"{work}/data.npz"], "found 1 after --data for 2 after --domain"),
        ([*data, "--workers", "2"], "--gpus with one domain or --together"),
        (["--data", f"{work}/data.npz", f"{work}/images"], "found another preprocessing after"),
    ):
        assert calibrate.main([*argv, *wrong]) == 2
        assert message in capsys.readouterr().err
