"""The C and C++ samples, built once."""

import pytest
from native_programs import SAMPLES, SANITIZE, build_c, build_cpp, missing_tools


@pytest.fixture(scope="session")
def cpp_programs(tmp_path_factory):
    """The C++ programs as users build them."""
    _require("cmake", "c++", "npm")
    return build_cpp(tmp_path_factory.mktemp("cpp") / "build", sanitize=False)


@pytest.fixture(scope="session")
def sanitized_cpp_programs(tmp_path_factory):
    """The C++ programs with AddressSanitizer, its leak check and UBSan."""
    _require("cmake", "c++", "npm")
    return build_cpp(tmp_path_factory.mktemp("cpp") / "sanitized", sanitize=True)


@pytest.fixture(scope="session")
def c_program(tmp_path_factory):
    """The C program as its README builds it."""
    _require("cc", "npm")
    program = tmp_path_factory.mktemp("c") / "loraport_check"
    return build_c(SAMPLES / "c" / "loraport_check.c", program, "-O2")


@pytest.fixture(scope="session")
def sanitized_c_program(tmp_path_factory):
    """The C program with AddressSanitizer, its leak check and UBSan."""
    _require("cc", "npm")
    program = tmp_path_factory.mktemp("c") / "sanitized"
    return build_c(SAMPLES / "c" / "loraport_check.c", program, "-g", "-O1", *SANITIZE)


@pytest.fixture(scope="session", params=["c++", "c"])
def check_program(request):
    """Either check program, sanitized: a fault must not only be refused but refused cleanly."""
    if request.param == "c":
        return request.getfixturevalue("sanitized_c_program")
    return request.getfixturevalue("sanitized_cpp_programs") / "loraport-check"


def _require(*tools):
    missing = missing_tools(*tools)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
