"""The commands themselves."""

from __future__ import annotations

import tomllib

from cli.config import PROJECT
from cli.main import COMMANDS, main
from server.app import VERSION


def test_version_is_said_once(capsys):
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"foresight {VERSION}\n"


def test_help_names_every_command(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_unknown_command_is_one_sentence(capsys):
    assert main(["sevre"]) == 1
    assert capsys.readouterr().err == "foresight: unknown command 'sevre'; try foresight --help.\n"
