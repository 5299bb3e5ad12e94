"""The README's commands are the ones that CI runs, and name commands that exist."""

import re
from pathlib import Path

from loraport.cli import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CI = (ROOT / ".ci" / "run").read_text()


def test_ci_installs_and_tests_as_the_readme_says():
    command = re.search(r"pip install (.*) && (pytest.*)", README)
    assert command is not None
    assert re.search(rf"^pip install --quiet {re.escape(command[1])}$", CI, re.MULTILINE)
    assert CI.rstrip().splitlines()[-1] == command[2]


def test_readme_names_only_commands_that_exist():
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    named = set(re.findall(r"^(?:.*&& )?loraport (\w+)", blocks, re.MULTILINE))
    assert {"demo", "train", "export", "add", "verify", "run", "inspect"} <= named
    assert named <= COMMANDS.keys()
