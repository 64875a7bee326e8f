"""A stage of a run: what it makes, of what, and whether that is up to date."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import HdrqError
from ..experiments.bundles import inputs_of, record_ingredients, recorded_change
from ..formats.atomic_files import Kind, remove_file
from ..formats.file_kinds import CELL_INPUTS

__all__ = ["RecordedStage", "Stage", "change_of", "importable", "run_stage"]


@dataclass(frozen=True)
class Stage(ABC):
    """One step of a run. Workers get it as it is, so that it holds plain values only.

    Attributes:
        name: Unique in a run, such as ``hdrq-w4a8-night``; with ``kind`` it says what is made.
        output: The file or folder that is made.
        after: Keys of the stages whose outputs are read.
        place: File and line that ask for it, for errors.
        threads: Threads of the work.
        kind: What it does: ``calibrate``, ``merge`` and so on.
        learns: Whether torch does the work.
    """

    name: str
    output: Path
    after: tuple[str, ...]
    place: str
    threads: int
    kind: ClassVar[str]
    learns: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """Its name among all stages of a run."""
        return f"{self.kind} {self.name}"

    @property
    def pace(self) -> str:
        """Stages of one pace take about as long as each other."""
        return self.kind

    @property
    def iterates(self) -> bool:
        """Whether most of the time of a run goes into stages like this one."""
        return self.learns

    @abstractmethod
    def change(self) -> str:
        """Why the output is stale, in words; "" where it is up to date.

        Asked where the outputs of all stages in ``after`` are up to date.
        """

    @abstractmethod
    def make(self) -> None:
        """Make the output, completely or not at all."""

    def reached(self) -> str:
        """What an unfinished stage has done so far, in words; "" where nothing says so."""
        return ""

    @abstractmethod
    def outputs(self) -> list[tuple[Path, Kind]]:
        """All that the stage may write, with the kind that marks it as ours."""


class RecordedStage(Stage):
    """A stage that writes beside its output what that was made from."""

    @abstractmethod
    def ingredients(self) -> dict[str, Any]:
        """All that the output depends on."""

    @abstractmethod
    def is_whole(self, path: Path) -> bool:
        """Whether what lies at a path is a whole output of this kind."""

    @abstractmethod
    def write(self) -> None:
        """Write the output."""

    def change(self) -> str:
        """See :meth:`Stage.change`."""
        return recorded_change(self.output, self.ingredients(), self.is_whole)

    def make(self) -> None:
        """See :meth:`Stage.make`."""
        ingredients = self.ingredients()
        remove_file(inputs_of(self.output), CELL_INPUTS)
        self.write()
        record_ingredients(self.output, ingredients)

    def recorded(self, kind: Kind) -> list[tuple[Path, Kind]]:
        """The output and the record beside it."""
        return [(self.output, kind), (inputs_of(self.output), CELL_INPUTS)]


def run_stage(stage: Stage, folder: str) -> None:
    """Make what a stage makes where it is stale; the work of a job.

    Args:
        stage: The stage.
        folder: Folder of the run file, whose modules a model may be made by.

    Raises:
        HdrqError: As the stage, with file and line in front.
    """
    with importable(folder), _placed(stage):
        if stage.change():
            stage.make()


def change_of(stage: Stage) -> str:
    """Why a stage's output is stale, in words; "" where it is up to date.

    Raises:
        HdrqError: As the stage, with file and line in front.
    """
    with _placed(stage):
        return stage.change()


@contextlib.contextmanager
def _placed(stage: Stage) -> Iterator[None]:
    """Errors inside the block begin with the file and line that ask for a stage."""
    try:
        yield
    except HdrqError as error:
        # The file has keys, and no flags, that a name in backquotes could become.
        text = str(error).replace("`", "")
        raise type(error)(f"{stage.place}: {stage.key}: {text}") from error


@contextlib.contextmanager
def importable(folder: str) -> Iterator[None]:
    """Modules of a folder can be imported; afterwards ``sys.path`` is as it was."""
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
