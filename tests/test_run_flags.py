"""``elasticd run``'s command line without torch's parser: the same as with it, or left to it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticd.commands import run_parser
from elasticd.commands.run_flags import parse_plain
from elasticd.errors import ConfigError

MODULE = ["-m", "elasticd.examples.byte_gpt"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("PET_")]:
        monkeypatch.delenv(name)
    (tmp_path / "x.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


#: What may follow each flag; None: nothing does.
VALUES: dict[str, tuple[str | None, ...]] = {
    "--nnodes": ("2", "1:4", "3:3"),
    "--nproc-per-node": ("1", "8"),
    "--nproc_per_node": ("4",),
    "--rdzv-backend": ("c10d", "elasticd"),
    "--rdzv_endpoint": ("127.0.0.1:2379,127.0.0.2:2379", ""),
    "--rdzv-id": ("a", "none"),
    "--rdzv-conf": ("timeout=900",),
    "--standalone": (None,),
    "--max-restarts": ("0", "3"),
    "--monitor_interval": ("0.5", "1"),
    "--start-method": ("warm", "spawn"),
    "--role": ("trainer",),
    "--run-path": (None,),
    "--log-dir": ("logs",),
    "-r": ("1", "0:3,1:1"),
    "--redirects": ("3",),
    "-t": ("2",),
    "--tee": ("1:2",),
    "--local-ranks-filter": ("0,2", ""),
    "--node-rank": ("1",),
    "--master-addr": ("10.0.0.1",),
    "--master_port": ("29500",),
    "--local-addr": ("10.0.0.2",),
    "--shutdown-timeout": ("3",),
    "--virtual-local-rank": (None,),
    "--config": ("some.toml",),
    "--node-id": ("n1",),
    "--zone": ("z",),
    "--spares": ("0", "2"),
    "--ranks-per-replica": ("2", "3"),
    "--boundary-timeout": ("1.5",),
    "--memory-bytes": ("0", "1000"),
    "--log-level": ("DEBUG",),
    "--rack": ("r",),
}
ONE = st.sampled_from([(flag, value) for flag, values in VALUES.items() for value in values])
SCRIPTS = st.sampled_from([["x.py"], ["x.py", "--lr", "1", "--", "-h"], [*MODULE, "--steps", "2"], ["--no-python", "ls"]])


def answers(parse, arguments: list[str]) -> object:
    try:
        return parse(arguments)
    except ConfigError as error:
        return str(error)


def test_every_flag_alone_is_what_torchruns_parser_makes_of_it() -> None:
    for flag, values in VALUES.items():
        for value in values:
            line = [flag, *([] if value is None else [value]), "x.py", "a"]
            ours = answers(lambda arguments: parse_plain(arguments, {}), line)
            assert ours is not None, line
            assert ours == answers(run_parser.parse, line), line


@given(st.lists(ONE, max_size=6), SCRIPTS, st.booleans())
def test_a_line_of_them_is_what_torchruns_parser_makes_of_it(
    flags: list[tuple[str, str | None]], script: list[str], joined: bool
) -> None:
    line = [f"{flag}={value}" if joined and value and flag[1] == "-" else flag for flag, value in flags]
    if not joined:
        line = [part for flag, value in flags for part in (flag, value) if part is not None]
    elif any(flag[1] != "-" or value == "" for flag, value in flags):
        return
    ours = answers(lambda arguments: parse_plain(arguments, {}), [*line, *script])
    assert ours is not None
    assert ours == answers(run_parser.parse, [*line, *script])


@pytest.mark.parametrize(
    "line",
    [
        ["--help"],
        ["--nproc", "2", "x.py"],
        ["--nproc-per-node", "auto", "x.py"],
        ["--nnodes", "many", "x.py"],
        ["--tee", "4", "x.py"],
        ["--local-ranks-filter", "a", "x.py"],
        ["--event-log-handler", "null", "x.py"],
        ["--no-such-flag", "x.py"],
        ["--max-restarts", "few", "x.py"],
        ["no-such-script.py"],
        ["-m", "no_such_module"],
        ["-m", "elasticd.examples.no_such_module"],
        ["-m", "os.path.no_such_module"],
        ["-m", "..byte_gpt"],
        ["--no-python", *MODULE],
        [],
    ],
    ids=" ".join,
)
def test_what_needs_torchruns_parser_is_left_to_it(line: list[str]) -> None:
    assert parse_plain(line, {}) is None


def test_torchruns_variables_are_left_to_its_parser() -> None:
    assert parse_plain(["x.py"], {"PET_NNODES": "2"}) is None


def test_a_package_of_the_user_is_found_and_not_run(folder: Path) -> None:
    package = folder / "theirs" / "inner"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py", package / "train.py"):
        file.write_text("raise SystemExit('was run')\n")
    path = list(sys.path)
    assert parse_plain(["-m", "theirs.inner.train"], {}) is not None
    assert sys.path == path
    assert not [name for name in sys.modules if name.startswith("theirs")]
