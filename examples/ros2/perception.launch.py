"""ros2 launch perception.launch.py"""

import sys
from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess
from launch.substitutions import LaunchConfiguration

PARAMETERS = str(Path(__file__).with_name("perception.params.yaml"))


def generate_launch_description():
    """The node, with parameters from beside this file unless told otherwise."""
    node = ExecuteProcess(
        cmd=[
            sys.executable,
            "-m",
            "hdrq_deploy.runtime.ros2",
            "--ros-args",
            "-r",
            "__node:=perception",
            "--params-file",
            LaunchConfiguration("parameters"),
        ],
        output="screen",
    )
    return LaunchDescription([DeclareLaunchArgument("parameters", default_value=PARAMETERS), node])
