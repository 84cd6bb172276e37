"""The commands' front door: versions, help, and a word that is no command."""

import pytest

import lin_jax
from lin_jax.cli.main import COMMANDS, main
from lin_jax.errors import UserError


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"lin_jax {lin_jax.__version__}, jax ")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_an_unknown_command() -> None:
    with pytest.raises(UserError, match="command 'fly' is unknown; choose one of train, decode"):
        main(["fly"])
