"""A ROS 2 node: images in, labels or masks out.

    python -m hdrq_deploy.runtime.ros2 --ros-args --params-file engine.params.yaml

ROS 2 is imported only by :func:`main`; ``hdrq emit ros2`` writes parameters and a launch file.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from ..errors import DataError, EngineError, HdrqError
from ..typing import Array
from .engine import Engine
from .loading import load_engine
from .predictions import Prediction

__all__ = ["Perception", "frame_of", "image_fields", "main"]

# sensor_msgs/image_encodings.hpp: channels, and their order as RGB
_ENCODINGS = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
}


def frame_of(message: Any, channels: int) -> Array:
    """The pixels of a ``sensor_msgs/Image`` as (H, W, 3) RGB, or (H, W) for a grey model.

    Raises:
        DataError: An encoding that is not known, or fewer bytes than the size needs.
    """
    if message.encoding not in _ENCODINGS:
        raise DataError(
            f"found images of encoding {message.encoding!r}; needed one of {', '.join(_ENCODINGS)}"
        )
    count, order = _ENCODINGS[message.encoding]
    data = np.frombuffer(bytes(message.data), np.uint8)
    needed = message.step * message.height
    if message.step < count * message.width or len(data) < needed:
        raise DataError(
            f"found {len(data)} bytes, {message.step} a row, for {message.height}x{message.width} "
            f"{message.encoding}; needed {count * message.width} or more a row"
        )
    # Rows may be padded.
    rows = data[:needed].reshape(message.height, message.step)[:, : count * message.width]
    pixels = rows.reshape(message.height, message.width, count)
    if channels != 1:
        return np.ascontiguousarray(pixels[:, :, order])
    if count == 1:
        return np.ascontiguousarray(pixels[:, :, 0])
    # ITU-R BT.601, as Pillow's mode "L".
    luma = pixels[:, :, order].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.rint(luma).astype(np.uint8)


class Perception:
    """What the node does with an image, without ROS.

    Args:
        engine: An engine with preprocessing in its manifest.

    Raises:
        EngineError: No preprocessing.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.manifest.preprocessing is None:
            raise EngineError(
                f"{engine.path}: no preprocessing in the manifest; see hdrq emit ros2"
            )
        self._engine = engine
        self._channels = engine.manifest.preprocessing.channels
        engine.warm_up()

    def __call__(self, message: Any) -> tuple[str, Array | None]:
        """A JSON text with index, label, score and ms, and the mask of a segmentation engine.

        Raises:
            DataError: An image that cannot be read.
        """
        started = time.perf_counter()
        prediction = self._engine.predict(frame_of(message, self._channels))
        assert isinstance(prediction, Prediction)
        score = None if prediction.scores is None else float(prediction.scores.max())
        stamp = message.header.stamp
        text = {
            "stamp": stamp.sec + stamp.nanosec / 1e9,
            "frame_id": message.header.frame_id,
            "index": prediction.index,
            "label": prediction.label,
            "score": score,
            "ms": round(1000 * (time.perf_counter() - started), 3),
        }
        return json.dumps(text), prediction.mask


def image_fields(mask: Array) -> dict[str, Any]:
    """Fields of a ``sensor_msgs/Image`` that holds the classes of a mask (H, W) as grey."""
    height, width = mask.shape
    return {
        "height": height,
        "width": width,
        "encoding": "mono8",
        "step": width,
        "data": mask.astype(np.uint8).tobytes(),
    }


def main() -> int:
    """Run the node until it is interrupted."""
    try:
        import rclpy
        from rclpy.qos import qos_profile_sensor_data
        from sensor_msgs.msg import Image
        from std_msgs.msg import String
    except ImportError as error:
        print(
            f"hdrq ros2: found no {error.name}; needed a sourced ROS 2 with sensor_msgs: source "
            "/opt/ros/DISTRIBUTION/setup.bash",
            file=sys.stderr,
        )
        return 2
    rclpy.init(args=sys.argv)
    node = rclpy.create_node("hdrq")

    def parameter(name: str, default: Any) -> Any:
        return node.declare_parameter(name, default).value

    try:
        threads = parameter("threads", 0)
        engine = load_engine(parameter("engine", ""), parameter("device", "auto"), threads)
        perceive = Perception(engine)
    except HdrqError as error:
        node.get_logger().fatal(str(error))
        return error.exit_code
    queue = parameter("queue", 1)
    results = node.create_publisher(String, parameter("result_topic", "~/result"), queue)
    masks = node.create_publisher(Image, parameter("mask_topic", "~/mask"), queue)

    def on_image(message: Any) -> None:
        try:
            text, mask = perceive(message)
        except HdrqError as error:  # one bad image does not stop the node
            node.get_logger().error(str(error), throttle_duration_sec=5.0)
            return
        results.publish(String(data=text))
        if mask is not None:
            masks.publish(Image(header=message.header, **image_fields(mask)))

    topic = parameter("image_topic", "/camera/image_raw")
    node.create_subscription(Image, topic, on_image, qos_profile_sensor_data)
    with engine:
        try:
            rclpy.spin(node)
        except KeyboardInterrupt:
            node.get_logger().info("interrupted")
        finally:
            node.destroy_node()
            rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
