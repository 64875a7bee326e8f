"""What a command needs before any heavy module is there: Ctrl-C, streams, one-line errors.

Imports nothing but the standard library, so that it is in place a moment after Python started.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from ..errors import HdrqError, one_line
from ..formats.atomic_files import environment_error
from ..formats.notes import notes_of
from ..jobs.waiting import shorten_idle_spinning
from .help_format import HelpFormatter, help_text

__all__ = ["Parser", "importing", "run", "shortened", "with_flags"]

_INTERRUPTED, _TERMINATED = 130, 143
_LONGEST = 300
_MOST = (1 << 31) - 1
# Top-level packages of this project; of any other, an import that fails is for the user to mend.
_PACKAGES = ("calibration_data", "exporters", "hdrq_deploy", "runtime")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the flags; the usage is what --help is for.

    ``-h`` shows the flags that most calls need, ``--help`` all of them. Whole numbers are of a
    size that every library takes; other numbers are finite.

    Attributes:
        about: The group of flags that say something of the command, at the end of the help.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "formatter_class": HelpFormatter, "add_help": False})
        self.register("type", int, _whole_number)
        self.register("type", float, _real_number)
        self._positionals.title, self._optionals.title = "arguments", "options"
        self._rarely_used: list[argparse._ArgumentGroup] = []
        self.about = self.add_argument_group("help")
        short, whole = "show the flags that most calls need", "show all flags"
        self.about.add_argument("-h", action=_ShowHelp, nargs=0, whole=False, help=short)
        self.about.add_argument("--help", action=_ShowHelp, nargs=0, whole=True, help=whole)

    def rarely_used(self, title: str, description: str | None = None) -> argparse._ArgumentGroup:
        """A group of flags that ``-h`` leaves out."""
        group = self.add_argument_group(title, description)
        self._rarely_used.append(group)
        return group

    def format_help(self) -> str:
        """The whole help, as ``--help`` shows it."""
        return help_text(self, self.about)

    def short_help(self) -> str:
        """The help without the groups of :meth:`rarely_used`, as ``-h`` shows it."""
        return help_text(self, self.about, self._rarely_used)

    def error(self, message: str) -> NoReturn:
        """Print the line and leave with exit code 2."""
        line = " ".join(message.split())
        line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
        self.exit(2, f"{self.prog}: {line}; '{self.prog} --help' shows the flags\n")


class _ShowHelp(argparse.Action):
    """Prints the help, short or whole, and ends the command."""

    def __init__(self, *args: Any, whole: bool, **options: Any) -> None:
        # One dest, as the action of argparse has it; nothing is stored.
        options.update(dest="help", default=argparse.SUPPRESS)
        super().__init__(*args, **options)
        self._whole = whole

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print and leave with exit code 0."""
        if isinstance(parser, Parser) and not self._whole:
            print(parser.short_help(), end="")
        else:
            print(parser.format_help(), end="")
        parser.exit()


class _Stopped(KeyboardInterrupt):
    """SIGTERM, which unwinds like Ctrl-C so that temporary files go."""


def _whole_number(text: str) -> int:
    """A whole number from the command line, of a size that every library takes."""
    try:
        number = int(text)
    except ValueError:
        number = _MOST + 1
    if abs(number) > _MOST:
        raise argparse.ArgumentTypeError(
            f"found {shortened(text)!r}; needed a whole number, {_MOST} at most"
        )
    return number


def _real_number(text: str) -> float:
    """A number from the command line; infinity and NaN are none."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"found {shortened(text)!r}; needed a number")
    return number


def shortened(text: str) -> str:
    """A word of the command line, for an error."""
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextmanager
def importing(command: str) -> Iterator[None]:
    """Ctrl-C in the block ends the process with one line.

    Nothing is begun while modules are imported, so nothing must be unwound; and native modules
    turn the exception of a signal handler into an ImportError of their own.
    """

    _begin_in_utf8()

    def leave(*_: object) -> None:
        text = f"{command}: interrupted; nothing was written\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
        os._exit(_INTERRUPTED)

    with _handled({signal.SIGINT: leave} if _is_free(signal.SIGINT) else {}):
        yield


def _begin_in_utf8() -> None:
    """Start a console script anew in Python's UTF-8 mode where the locale has other names.

    ONNX and ONNX Runtime take paths as UTF-8, whatever the locale (``LC_ALL=C`` is ASCII to
    Python that was told ``PYTHONUTF8=0``). What is printed keeps the terminal's encoding.
    """
    script = bool(sys.executable) and Path(sys.argv[0] if sys.argv else "").name.startswith("hdrq")
    if not script or sys.getfilesystemencoding().lower() in {"utf-8", "utf8"}:
        return
    spoken = getattr(sys.stdout, "encoding", None) or "ascii"
    os.environ.setdefault("PYTHONIOENCODING", f"{spoken}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _is_free(number: int) -> bool:
    """Whether a signal has Python's or our handler: whoever ignores it has a reason."""
    handler = signal.getsignal(number)
    return handler in {signal.default_int_handler, signal.SIG_DFL} or isinstance(handler, _Raise)


@contextmanager
def _handled(handlers: dict[int, Callable[[int, FrameType | None], Any]]) -> Iterator[None]:
    """Signal handlers for a while; only the main thread may have any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Raise:
    """A signal handler that raises, and remembers that it did."""

    def __init__(self, kind: type[KeyboardInterrupt]) -> None:
        self._kind = kind
        self.called = False

    def __call__(self, *_: object) -> None:
        self.called = True
        raise self._kind


class _Stream:
    """A text stream that a reader may leave, and that has a character for everything.

    Where the reader of a pipe has gone (``| head``), what is written further is dropped: the work
    goes on, and its exit code counts. What the terminal's encoding lacks is written as ``\\xe9``.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; returns the number of characters given."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        shown = text.encode(encoding, "backslashreplace").decode(encoding)
        with self._unread():
            self._stream.write(shown)
        return len(text)

    def flush(self) -> None:
        """Flush."""
        with self._unread():
            self._stream.flush()

    def writelines(self, lines: Any) -> None:
        """Write each of several."""
        for line in lines:
            self.write(line)

    @contextmanager
    def _unread(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is left in the buffer would fail again when Python ends.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            if not isinstance(error, BrokenPipeError):
                raise HdrqError(
                    f"cannot write to the terminal or pipe ({error.strerror}); what was asked "
                    "for as files may be there already: send the output elsewhere"
                ) from error


@contextmanager
def _streams() -> Iterator[None]:
    before: tuple[Any, Any] = sys.stdout, sys.stderr  # None where the caller closed them
    sys.stdout, sys.stderr = (s if s is None else _Stream(s) for s in before)
    try:
        yield
    finally:
        with contextlib.suppress(HdrqError):
            _flush()
        sys.stdout, sys.stderr = before


def _flush() -> None:
    streams: tuple[Any, Any] = sys.stdout, sys.stderr
    for stream in streams:
        if stream is not None:
            stream.flush()


_running = False


def run(command: str, body: Callable[[], int], stopped: str = "nothing was written") -> int:
    """Run a command; a user's mistake becomes one line and its exit code.

    Args:
        command: Name of the command, which begins the line.
        body: Does the work and returns the exit code.
        stopped: What is left where Ctrl-C or SIGTERM ended it.
    """
    global _running
    if _running:  # a step of another command, which reports
        return body()
    shorten_idle_spinning()
    interrupt, terminate = _Raise(KeyboardInterrupt), _Raise(_Stopped)
    handlers = {signal.SIGTERM: terminate}
    if _is_free(signal.SIGINT):
        handlers[signal.SIGINT] = interrupt
    _running = True
    try:
        with _handled(handlers), _streams(), notes_of(command):  # type: ignore[arg-type]
            try:
                code = body()
                _flush()
                return code
            except BaseException as error:
                # Native code may have made another exception of the handler's.
                ended = isinstance(error, KeyboardInterrupt) or (
                    (interrupt.called or terminate.called) and isinstance(error, Exception)
                )
                if ended:
                    _say(f"{command}: interrupted; {stopped}")
                    return _TERMINATED if terminate.called else _INTERRUPTED
                line = _line(error)
                if line is None:
                    raise
                _say(f"{command}: {one_line(line)}")
                return error.exit_code if isinstance(error, HdrqError) else HdrqError.exit_code
    finally:
        _running = False


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def with_flags(text: str) -> str:
    """A message of the library, its parameters in backquotes, as the command line calls them.

    >>> with_flags("found no images; needed `data`, or another `output`; see `skip_corrupt`")
    'found no images; needed --data, or another -o; see --skip-corrupt'
    """

    def flag(match: re.Match[str]) -> str:
        name = match.group(1)
        return "-o" if name == "output" else f"--{name.replace('_', '-')}"

    return re.sub(r"`([a-z][a-z0-9_]*)`", flag, text)


def _line(error: BaseException) -> str | None:
    """What the user can mend, in one line; None for a mistake of ours."""
    if isinstance(error, HdrqError):
        return with_flags(str(error))
    # Another library may have wrapped what the disk or the terminal's encoding said.
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            line = environment_error(seen)
            if line is not None:
                return line
        seen = seen.__cause__
    if isinstance(error, ImportError) and not _is_ours(error.name):
        return (
            f"found a package that does not load ({error}); needed whole installations of what the "
            "command uses: pip install it again, or the extra of hdrq-deploy that names it"
        )
    if isinstance(error, MemoryError):
        return f"ran out of memory ({error or 'no more is said'}); needed fewer images at a time"
    text = str(error)
    if isinstance(error, Exception) and (_other_names() or "surrogates not allowed" in text):
        return (
            f"found a name that is not UTF-8, or a locale that is not "
            f"({sys.getfilesystemencoding()}); needed UTF-8: set PYTHONUTF8=1, or rename it"
        )
    if isinstance(error, Exception) and "No space left on device" in text:
        return "found no space left on device; free some, or set TMPDIR to another folder"
    return None


def _is_ours(module: str | None) -> bool:
    """Whether a module that could not be imported is one of this project's."""
    return module is not None and module.partition(".")[0] in _PACKAGES


def _other_names() -> bool:
    """Names that native libraries cannot take: bytes that the locale has no characters for."""
    names = "".join([*sys.argv, str(Path.cwd())])
    if sys.getfilesystemencoding().lower() not in {"utf-8", "utf8"}:
        return not names.isascii()
    return any("\ud800" <= character <= "\udfff" for character in names)
