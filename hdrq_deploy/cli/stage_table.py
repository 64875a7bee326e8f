"""One table of the stages of a run: live on a terminal, a plain line for each otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..runfile.stage import Stage

__all__ = ["StageTable"]


class StageTable:
    """Shows which stages run, which are done, and how long the rest will take.

    Args:
        stages: All stages by their keys, in order.
        stale: Keys of those that are made.
        console: Where it is shown; stderr by default.

    Attributes:
        room: Stages that run at a time, for the estimate.
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        stale: set[str],
        console: Console | None = None,
    ) -> None:
        self.room = 1
        self._stages, self._stale = dict(stages), stale
        self._began: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._started = time.monotonic()
        self._console = console or Console(stderr=True)
        self._live: Live | None = None

    def __enter__(self) -> StageTable:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, get_renderable=self.table, refresh_per_second=2
            )
            self._live.start()
        else:
            kept = len(self._stages) - len(self._stale)
            self._say(f"{len(self._stale)} stages to make, {kept} up to date")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def begun(self, key: str) -> None:
        """A stage was given to a worker."""
        self._began[key] = time.monotonic()

    def ended(self, done: int, total: int, key: str) -> None:
        """A stage has ended."""
        self._took[key] = time.monotonic() - self._began.get(key, self._started)
        if self._live is None:
            left = self.seconds_left()
            rest = "" if left is None else f", {_time(left)} left"
            self._say(f"[{done}/{total}] {key}: {_time(self._took[key])}{rest}")

    def seconds_left(self) -> float | None:
        """An estimate from stages of the same pace; None while nothing says how long.

        Stages without iterations count as nothing until one of their pace has ended.
        """
        left = 0.0
        now = time.monotonic()
        for key in self._stale - self._took.keys():
            stage = self._stages[key]
            alike = [t for k, t in self._took.items() if self._stages[k].pace == stage.pace]
            if not alike and stage.iterates:
                return None
            if not alike:
                continue
            spent = now - self._began[key] if key in self._began else 0.0
            left += max(sum(alike) / len(alike) - spent, 0.0)
        return left / self.room

    def table(self) -> Table:
        """A line for each kind of stage: how many are done, what runs, how long it took."""
        shown = Table(box=None, pad_edge=False)
        for name in ("stage", "done", "running", "time"):
            shown.add_column(name, justify="right" if name in {"done", "time"} else "left")
        now = time.monotonic()
        for kind in dict.fromkeys(stage.kind for stage in self._stages.values()):
            own = [key for key, stage in self._stages.items() if stage.kind == kind]
            made = [key for key in own if key in self._stale]
            done = [key for key in made if key in self._took]
            running = [key for key in made if key in self._began and key not in self._took]
            spent = sum(self._took[key] for key in done)
            spent += sum(now - self._began[key] for key in running)
            state = ", ".join(self._named(key) for key in running)
            shown.add_row(
                kind,
                f"{len(own) - len(made) + len(done)}/{len(own)}",
                state or ("up to date" if not made else ""),
                _time(spent) if spent else "",
            )
        left = self.seconds_left()
        rest = "" if left is None or not left else f", {_time(left)} left"
        shown.caption = f"{_time(now - self._started)}{rest}"
        shown.caption_justify = "left"
        return shown

    def _named(self, key: str) -> str:
        """The name of a stage that runs, and what it has done so far."""
        stage = self._stages[key]
        reached = stage.reached()
        return f"{stage.name} ({reached})" if reached else stage.name

    def _say(self, text: str) -> None:
        print(f"hdrq run: {text}", file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    """Seconds for people: 3.2 s, 4:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
