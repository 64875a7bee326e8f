"""A camera or video with answers drawn in: one engine, or domains that are mixed while it runs.

    python examples/camera.py engine/ --source 0
    python examples/camera.py night.hdrq day.hdrq --source drive.mp4 --adapt-every 90 --out seen.mp4

Given one engine folder, it runs that. Given bundles, it mixes them (``DomainMixer``) and, every
``--adapt-every`` frames, chooses the mix for the frames it has just seen. Needs OpenCV:
``pip install opencv-python``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from hdrq_deploy.errors import DataError, HdrqError
from hdrq_deploy.mixing import DomainMixer
from hdrq_deploy.runtime import Prediction, load_engine

Array = npt.NDArray[Any]
Answer = Callable[[Array], tuple[Prediction, str]]
PATIENCE = 30  # frames that a camera may fail to deliver in a row
RECENT = 64  # frames that a mix is chosen from


def frames(source: str) -> Iterator[Array]:
    """RGB frames of a file or device.

    Raises:
        DataError: It cannot be opened, or a device stopped.
    """
    device = source.isdecimal()
    capture = cv2.VideoCapture(int(source) if device else source)
    if not capture.isOpened():
        raise DataError(
            f"found nothing to read at {source}; needed a video file or a device number"
        )
    count = failed = 0
    try:
        while True:
            ok, frame = capture.read()
            if ok:
                count, failed = count + 1, 0
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                continue
            if not device:
                if count == 0:
                    raise DataError(f"{source}: found no frame that can be decoded")
                return
            failed += 1
            if failed == PATIENCE:
                raise DataError(
                    f"camera {source} stopped after {count} frames; check its cable and power"
                )
            time.sleep(0.02)
    finally:
        capture.release()


class Show:
    """Draws answers and figures, on a window, into a file, or both."""

    def __init__(self, out: str | None, window: bool, rate: float) -> None:
        self._out, self._window, self._rate = out, window, rate
        self._writer: Any = None
        self._latencies: deque[float] = deque(maxlen=300)
        self._times: deque[float] = deque(maxlen=60)

    def __call__(self, frame: Array, found: Prediction, mix: str, latency_ms: float) -> bool:
        """Draw one frame; False when the user wants to stop."""
        self._latencies.append(latency_ms)
        self._times.append(time.perf_counter())
        drawn = frame.copy()
        if found.mask is not None:
            colours = cv2.applyColorMap((found.mask * 37 % 256).astype(np.uint8), cv2.COLORMAP_JET)
            drawn = cv2.addWeighted(drawn, 0.6, colours, 0.4, 0)
        for i, line in enumerate(self.lines(found, mix)):
            for colour, width in (((0, 0, 0), 3), ((255, 255, 255), 1)):
                place = (6, 18 + 18 * i)
                cv2.putText(drawn, line, place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, width)
        picture = cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)
        if self._out:
            self._write(picture)
        if not self._window:
            return True
        cv2.imshow("hdrq", picture)
        return cv2.waitKey(1) not in (27, ord("q"))

    def lines(self, found: Prediction, mix: str) -> list[str]:
        """What is written on a frame."""
        label = "mask" if found.mask is not None else str(found.label or found.index)
        if found.scores is not None:
            label += f" {100 * float(found.scores.max()):.0f}%"
        return [label, *([mix] if mix else []), self.figures()]

    def figures(self) -> str:
        """Frames per second, and latency from frame to answer."""
        span = self._times[-1] - self._times[0] if len(self._times) > 1 else 0.0
        rate = f"{(len(self._times) - 1) / span:.0f} FPS" if span else "- FPS"
        p50, p99 = np.percentile(self._latencies, [50, 99])
        return f"{rate}  p50 {p50:.1f} ms  p99 {p99:.1f} ms"

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.release()

    def _write(self, picture: Array) -> None:
        if self._writer is None:
            height, width = picture.shape[:2]
            code = cv2.VideoWriter.fourcc(*("mp4v" if str(self._out).endswith(".mp4") else "MJPG"))
            self._writer = cv2.VideoWriter(self._out, code, self._rate, (width, height))
            if not self._writer.isOpened():
                raise DataError(f"{self._out}: this OpenCV cannot write it; take .avi or .mp4")
        self._writer.write(picture)


def one_engine(stack: ExitStack, path: str, device: str, threads: int) -> Answer:
    """Answers of an engine."""
    engine = stack.enter_context(load_engine(path, device, threads))
    engine.warm_up()

    def answer(frame: Array) -> tuple[Prediction, str]:
        found = engine.predict(frame)
        assert isinstance(found, Prediction)
        return found, ""

    return answer


def mixed(stack: ExitStack, paths: Sequence[str], engine: str, threads: int, every: int) -> Answer:
    """Answers of a mix that follows what is seen; choosing runs beside the frames."""
    mixer = stack.enter_context(DomainMixer(paths, engine, threads=threads))
    recent: deque[Array] = deque(maxlen=RECENT)
    seen = 0
    choosing: Any = None

    def answer(frame: Array) -> tuple[Prediction, str]:
        nonlocal seen, choosing
        (found,), mix = mixer.predict([frame])
        recent.append(frame)
        seen += 1
        if every and seen % every == 0 and (choosing is None or choosing.done()):
            if choosing is not None:
                choosing.result()  # an error of the last choice ends the loop
            choosing = mixer.adapt_async(list(recent))
        return found, " ".join(f"{name} {share:.2f}" for name, share in mix.items())

    return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run until the video ends, the camera stops, or a key is pressed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="one engine folder, or bundles to mix")
    parser.add_argument("--source", default="0", help="video file or device number")
    parser.add_argument("--engine", default="ort", help="of mixed bundles: ort, trt or trt-rtx")
    parser.add_argument("--device", default="auto", help="of an engine folder")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--adapt-every", type=int, default=0, help="frames; 0 keeps the mix")
    parser.add_argument("--out", help="video to write (.mp4 or .avi)")
    parser.add_argument("--rate", type=float, default=30.0, help="frames per second of --out")
    parser.add_argument("--window", action="store_true", help="show it; q or Esc stops")
    args = parser.parse_args(argv)
    latencies = []
    show = Show(args.out, args.window, args.rate)
    mix = ""
    try:
        with ExitStack() as stack:
            stack.callback(show.close)
            if len(args.models) == 1 and not Path(args.models[0], "weights.safetensors").exists():
                answer = one_engine(stack, args.models[0], args.device, args.threads)
            else:
                answer = mixed(stack, args.models, args.engine, args.threads, args.adapt_every)
            for frame in frames(args.source):
                started = time.perf_counter()
                found, mix = answer(frame)
                latencies.append(1000 * (time.perf_counter() - started))
                if not show(frame, found, mix, latencies[-1]):
                    break
    except HdrqError as error:
        print(f"camera: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("camera: interrupted", file=sys.stderr)
    if latencies:
        middle = statistics.median(latencies)
        print(f"{len(latencies)} frames, median {middle:.2f} ms from frame to answer {mix}".strip())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
