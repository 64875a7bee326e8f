"""Does what the builder and the runtime call exist in TensorRT 10 and 11?

The libraries of TensorRT need a GPU, but their Python bindings are small wheels that can be
imported against libraries of empty functions. Our code is read (``ast``): every name it takes
from the module, every member it uses of a TensorRT object and every keyword it passes must be
there, or be guarded by ``hasattr`` in the same function.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hdrq_deploy.exporters import trt_worker
from hdrq_deploy.runtime import tensorrt as runtime

pytestmark = pytest.mark.network

WHEELS = {
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "10.13": "tensorrt-cu12-bindings==10.13.3.9",
    "11.4": "tensorrt-cu13-bindings==11.4.0.106",
}
# What the worker and the runtime call their objects.
MODULES = ("trt", "self._trt")
TYPES = {
    "self._engine": "ICudaEngine",
    "owner._engine": "ICudaEngine",
    "self._runtime": "Runtime",
    "self._context": "IExecutionContext",
    "context": "IExecutionContext",
    "refitter": "Refitter",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "error": "ParserError",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "logger": "ILogger",
}
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
DUMP = """
import inspect, json, sys
import tensorrt_bindings as trt
found = {"": {name: "" for name in dir(trt)}}
for name, kind in vars(trt.tensorrt).items():
    if inspect.isclass(kind):
        found[name] = {m: (getattr(kind, m).__doc__ or "") for m in dir(kind)}
json.dump({"version": trt.__version__, "members": found}, sys.stdout)
"""


@dataclass(frozen=True)
class Use:
    """``owner.member`` somewhere in the worker; "" is the module itself."""

    owner: str
    member: str
    keywords: tuple[str, ...]
    line: int


def uses(source: str) -> Iterator[Use]:
    """Everything that the worker takes from TensorRT without asking first."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.ClassDef)):
            continue
        guarded = {
            (ast.unparse(call.args[0]), call.args[1].value)
            for call in ast.walk(function)
            if isinstance(call, ast.Call)
            and ast.unparse(call.func) == "hasattr"
            and isinstance(call.args[1], ast.Constant)
        }
        keywords = {
            id(call.func): tuple(k.arg for k in call.keywords if k.arg)
            for call in ast.walk(function)
            if isinstance(call, ast.Call)
        }
        for node in ast.walk(function):
            if not isinstance(node, ast.Attribute) or not isinstance(
                node.value, (ast.Name, ast.Attribute)
            ):
                continue
            base = ast.unparse(node.value)
            if (base, node.attr) in guarded:
                continue
            given = keywords.get(id(node), ())
            if base in MODULES:
                yield Use("", node.attr, given, node.lineno)
            elif base.startswith("trt."):
                yield Use(base.removeprefix("trt."), node.attr, given, node.lineno)
            elif base in TYPES:
                yield Use(TYPES[base], node.attr, given, node.lineno)


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Libraries of empty functions under every name that the bindings load."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the stub libraries")
    folder = tmp_path_factory.mktemp("stubs")
    code = folder / "stubs.c"
    code.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        for major in (10, 11):
            name = f"lib{library}.so.{major}"
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o"]
            subprocess.run([*command, str(folder / name), str(code)], check=True)
    return folder


@pytest.fixture(scope="session", params=sorted(WHEELS))
def bindings(
    stubs: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Any]:
    """Members and docstrings of one version's classes."""
    folder = tmp_path_factory.mktemp("bindings")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest"]
    done = subprocess.run(
        [*command, str(folder), WHEELS[request.param]], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        pytest.skip(f"cannot download {WHEELS[request.param]}: {done.stderr.strip()[-200:]}")
    zipfile.ZipFile(wheels[0]).extractall(folder)
    environment = {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(stubs), "PATH": ""}
    shown = subprocess.run(
        [sys.executable, "-c", DUMP], capture_output=True, text=True, env=environment, check=False
    )
    assert shown.returncode == 0, shown.stderr
    result: dict[str, Any] = json.loads(shown.stdout)
    assert result["version"].startswith(request.param)
    return result


OWNERS = {
    trt_worker: {"NetworkDefinitionCreationFlag", "Builder", "OnnxParser", "IBuilderConfig"},
    runtime: {"Runtime", "ICudaEngine", "IExecutionContext", "Refitter"},
}


@pytest.mark.parametrize("module", OWNERS, ids=["builder", "runtime"])
def test_we_use_what_tensorrt_has(bindings: dict[str, Any], module: Any) -> None:
    members = bindings["members"]
    found = list(uses(Path(module.__file__).read_text()))
    assert {use.owner for use in found} >= {"", *OWNERS[module]}
    missing = [
        f"line {use.line}: {use.owner}.{use.member}"
        for use in found
        if use.member not in members.get(use.owner, {})
    ]
    assert missing == []
    for use in found:
        for keyword in use.keywords:
            assert f"{keyword}:" in members[use.owner][use.member], f"{use} takes no {keyword}"


def test_a_missing_name_and_a_guarded_one_are_told_apart() -> None:
    source = (
        "def f(trt, config):\n"
        "    if hasattr(trt, 'Guarded'):\n"
        "        trt.Guarded()\n"
        "    config.gone(key=1)\n"
        "    trt.BuilderFlag.FP8\n"
    )
    found = {(use.owner, use.member): use.keywords for use in uses(source)}
    assert found[("IBuilderConfig", "gone")] == ("key",)
    assert ("BuilderFlag", "FP8") in found and ("", "Guarded") not in found


def test_flags_that_are_asked_for_by_name_exist(bindings: dict[str, Any]) -> None:
    """``_flag`` and ``getattr`` take names as text; the worker refuses what is not there."""
    absent = {"SAME_COMPUTE_CAPABILITY"} if bindings["version"].startswith("10.3.") else set()
    for owner, names in {
        "BuilderFlag": ("REFIT", "STRIP_PLAN", "GPU_FALLBACK"),
        "ProfilingVerbosity": tuple(trt_worker._VERBOSITY.values()),
        "HardwareCompatibilityLevel": tuple(trt_worker._COMPATIBILITY.values()),
    }.items():
        for name in names:
            assert (name in bindings["members"][owner]) == (name not in absent), name
