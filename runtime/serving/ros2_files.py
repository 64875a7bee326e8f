"""A launch file and parameters for the node of :mod:`hdrq_deploy.runtime.ros2`."""

from __future__ import annotations

import json
from pathlib import Path

from ...errors import ExportError
from ...formats.engine_folder import EngineManifest
from .shared import Files, identifier

__all__ = ["ros2_files"]


def ros2_files(
    folder: Path,
    manifest: EngineManifest,
    name: str | None = None,
    topic: str = "/camera/image_raw",
) -> Files:
    """A launch file and parameters for ``hdrq_deploy.runtime.ros2``.

    Args:
        folder: Engine folder.
        manifest: Manifest of the engine.
        name: Name of the node; the folder's by default.
        topic: Topic of the images that the node subscribes to.

    Returns:
        Texts by file name, and no files to copy.

    Raises:
        ExportError: The manifest has no preprocessing.
    """
    if manifest.preprocessing is None:
        raise ExportError(
            f"{folder}: the manifest has no preprocessing; a node needs it to prepare frames: "
            "calibrate from an image folder"
        )
    name = identifier(name or folder.name)
    parameters = (
        f"{name}:\n  ros__parameters:\n"
        f"    engine: {json.dumps(str(folder))}\n"
        "    device: auto\n"
        "    threads: 0\n"
        f"    image_topic: {json.dumps(topic)}\n"
        "    result_topic: ~/result\n"
        "    mask_topic: ~/mask\n"
        "    queue: 1\n"
    )
    return {f"{name}.params.yaml": parameters, f"{name}.launch.py": _LAUNCH.format(name=name)}, {}


_LAUNCH = '''"""ros2 launch {name}.launch.py"""

import sys
from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess
from launch.substitutions import LaunchConfiguration

PARAMETERS = str(Path(__file__).with_name("{name}.params.yaml"))


def generate_launch_description():
    """The node, with parameters from beside this file unless told otherwise."""
    node = ExecuteProcess(
        cmd=[
            sys.executable,
            "-m",
            "hdrq_deploy.runtime.ros2",
            "--ros-args",
            "-r",
            "__node:={name}",
            "--params-file",
            LaunchConfiguration("parameters"),
        ],
        output="screen",
    )
    return LaunchDescription([DeclareLaunchArgument("parameters", default_value=PARAMETERS), node])
'''
