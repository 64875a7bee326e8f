"""Walk from a bundle to a served engine with what is installed, without torch and without pytest.

``python tests/device_walk.py`` runs the installed commands on the bundles of ``tests/corpus`` and
compares the engine with the bundle's own golden output. The minimum-version run and the release
check call it in fresh environments, from a folder without the sources.
"""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus" / "schema-1"
SCRIPTS = ("hdrq", "hdrq-calibrate", "hdrq-merge", "hdrq-export", "hdrq-bench", "hdrq-verify")
DATA = (("hdrq_deploy", "py.typed"), ("hdrq_deploy.runfile", "hdrq.schema.json"))


def call(folder: Path, *words: object) -> str:
    """Output of an installed command.

    Raises:
        SystemExit: The command failed; its output is shown.
    """
    program, *arguments = [str(word) for word in words]
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: code {done.returncode}\n{done.stderr[-3000:]}")
    return done.stdout


def check_files() -> None:
    """Scripts and data files that an installation must have."""
    for package, name in DATA:
        file = importlib.resources.files(package).joinpath(name)
        if not file.is_file():
            raise SystemExit(f"the installed {package} lacks {name}")
    for name in SCRIPTS:
        if not Path(sys.executable).with_name(name).is_file():
            raise SystemExit(f"the installation lacks the command {name}")


def walk(folder: Path) -> None:
    """Merge, export, verify, run, measure, describe and serve."""
    import numpy as np

    from hdrq_deploy import Bundle
    from hdrq_deploy.runtime import load_engine

    night, merged = CORPUS / "night.hdrq", CORPUS / "merged.hdrq"
    golden = Bundle.open(night).golden()
    np.savez(folder / "images.npz", x=golden["input"], y=np.zeros(len(golden["input"]), int))
    call(folder, "hdrq-export", night, "--engine", "ort", "-o", "engine")
    call(folder, "hdrq-verify", night, "engine", "--no-torch")
    with load_engine(folder / "engine", threads=1) as engine:
        np.testing.assert_allclose(engine(golden["input"]), golden["output"], atol=0.05)
    call(folder, "hdrq-merge", night, merged, "--weights", "0.5", "0.5", "-o", "again.hdrq")
    bench = ("hdrq-bench", "engine", "--data", "night=images.npz", "--iterations", "3")
    call(folder, *bench, "--threads", "1", "--json", "bench.json")
    assert set(json.loads((folder / "bench.json").read_text())["accuracy"]["domains"]) == {"night"}
    call(folder, "hdrq", "emit", "triton", "engine", "-o", "models")
    call(folder, "hdrq", "card", "engine", "--results", "bench.json")
    call(folder, "hdrq", "inspect", night)
    call(folder, "hdrq", "doctor")
    assert json.loads(call(folder, "hdrq", "run", "--schema"))["properties"]
    assert "_shtab_hdrq" in call(folder, "hdrq", "--print-completion", "bash")


def main() -> int:
    """Walk; print what was walked on."""
    check_files()
    with tempfile.TemporaryDirectory() as folder:
        walk(Path(folder))
    import hdrq_deploy

    version = importlib.metadata.version("hdrq-deploy")
    print(f"hdrq-deploy {version} of {Path(hdrq_deploy.__file__).parent}: walked from a bundle "
          "to a served engine")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
