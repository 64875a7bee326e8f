"""Sessions of nox: each makes an environment of its own.

``nox -s lint types fast`` before a commit, ``nox`` before a release. Sessions that install every
extra take minutes and gigabytes; ``nox -R`` uses their environments again.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "fast", "slow", "docs", "minimum", "device", "release"]

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
LOWEST = PYTHONS[0]


@nox.session
def lint(session: nox.Session) -> None:
    """Rules and form."""
    session.install("ruff>=0.8")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, over the package as it is installed."""
    session.install("-e", ".[dev]")
    session.run("python", "tests/typecheck.py")


@nox.session(python=PYTHONS)
def fast(session: nox.Session) -> None:
    """All tests but the slow ones; arguments after -- go to pytest."""
    session.install("-e", ".[dev]")
    session.run(
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "-m",
        "not slow and not network",
        *session.posargs,
    )


@nox.session
def slow(session: nox.Session) -> None:
    """The slow tests, and those that install packages."""
    session.install("-e", ".[dev]")
    session.run(
        "pytest", "-n", "2", "--dist", "loadfile", "-m", "slow or network", *session.posargs
    )


@nox.session
def docs(session: nox.Session) -> None:
    """The site, with every link checked."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict")


@nox.session(python=LOWEST)
def minimum(session: nox.Session) -> None:
    """The lower bounds of pyproject.toml, installed together, and the tests on them."""
    session.install("packaging", "tomli")
    session.run("python", "tests/minimum_versions.py", "--python", "python", *session.posargs)


@nox.session(python=PYTHONS)
def device(session: nox.Session) -> None:
    """The base install of every Python at hand: merge, export, run, measure; no torch."""
    session.install(".")
    session.chdir(session.create_tmp())
    session.run("python", "-I", str(session.invoked_from) + "/tests/device_walk.py")


@nox.session
def release(session: nox.Session) -> None:
    """Wheel and source distribution: metadata, contents, clean installs."""
    session.install("build", "twine")
    session.run("python", "tests/release_check.py", *session.posargs)
