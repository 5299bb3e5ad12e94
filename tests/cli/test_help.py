"""The command line's frame: help without heavy imports, lazy commands that exist."""

import json
import subprocess
import sys

import click
import pytest

from loraport.cli import COMMANDS, cli

HEAVY = ("torch", "onnxruntime", "transformers", "onnx", "onnx_ir", "numpy", "matplotlib", "peft")
PROBE = """
import json, sys
from loraport.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = {heavy!r}
print(json.dumps([code, [name for name in heavy if name in sys.modules]]), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["run", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(heavy=HEAVY), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stderr.splitlines()[-1]) == [0, []]
    assert done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_has_help(name):
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, click.Command)
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert all(o.lower() == o and "_" not in o for o in parameter.opts), parameter.opts


def test_python_m_loraport():
    done = subprocess.run(
        [sys.executable, "-m", "loraport", "no-such-command"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "No such command 'no-such-command'" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["check", "pack", "unpack", "diff"])
def test_the_help_of_bundle_names_its_arguments_as_its_usage_does(name):
    group = cli.get_command(click.Context(cli), "bundle")
    assert isinstance(group, click.Group)
    command = group.commands[name]
    context = click.Context(command)
    named = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
    assert named
    assert all(argument in command.help for argument in named)
