"""The samples, built or installed once."""

import os
import shutil
import subprocess

import pytest
from native_programs import SAMPLES, SANITIZE, build_c, build_cpp, missing_tools
from npm_packages import installed_sample, node_without_python

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def cpp_programs(made_once):
    """The C++ programs as users build them."""
    _require("cmake", "c++", "npm")
    return made_once("cpp", lambda build: build_cpp(build, sanitize=False))


@pytest.fixture(scope="session")
def sanitized_cpp_programs(made_once):
    """The C++ programs with AddressSanitizer, its leak check and UBSan."""
    _require("cmake", "c++", "npm")
    return made_once("sanitized-cpp", lambda build: build_cpp(build, sanitize=True))


@pytest.fixture(scope="session")
def c_program(made_once):
    """The C program as its README builds it."""
    _require("cc", "npm")
    return _c_program(made_once, "c", "-O2")


@pytest.fixture(scope="session")
def sanitized_c_program(made_once):
    """The C program with AddressSanitizer, its leak check and UBSan."""
    _require("cc", "npm")
    return _c_program(made_once, "sanitized-c", "-g", "-O1", *SANITIZE)


@pytest.fixture(scope="session", params=["c++", "c"])
def check_program(request):
    """Either check program, sanitized: a fault must not only be refused but refused cleanly."""
    if request.param == "c":
        return request.getfixturevalue("sanitized_c_program")
    return request.getfixturevalue("sanitized_cpp_programs") / "loraport-check"


@pytest.fixture(scope="session")
def node_sample(tmp_path_factory):
    """The Node sample after ``npm install``."""
    _require("npm")
    return installed_sample("node", tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="session")
def run_node(node_sample, tmp_path_factory):
    """Run node in the sample, where there is no Python."""
    environment = node_without_python(tmp_path_factory.mktemp("path"))

    def run(*arguments, **more):
        return subprocess.run(
            ["node", *map(str, arguments)],
            cwd=node_sample,
            env={**environment, **more},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def chromium():
    """A browser."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium, or set CHROMIUM to one")
    return found


@pytest.fixture(scope="session")
def web_sample(tmp_path_factory):
    """The page after ``npm install`` and ``npm run vendor``, as its README says."""
    _require("npm")
    directory = tmp_path_factory.mktemp("web")
    shutil.copytree(SAMPLES / "node" / "src", directory / "node" / "src")
    sample = installed_sample("web", directory)
    subprocess.run(["node", "vendor.mjs"], cwd=sample, check=True, capture_output=True)
    return sample


def _c_program(made_once, name, *flags):
    source, program = SAMPLES / "c" / "loraport_check.c", "loraport_check"
    return made_once(name, lambda out: build_c(source, out / program, *flags)) / program


def _require(*tools):
    missing = missing_tools(*tools)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
