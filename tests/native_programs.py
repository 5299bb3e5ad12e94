"""Build the C and C++ samples and run them where there is no Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

SAMPLES = Path(__file__).parents[1] / "samples"
# Headers alone come as no package; this one carries them beside its libraries.
HEADERS_PACKAGE = "com.github.asus4.onnxruntime"
HEADERS_VERSION = "0.4.9"
_IN_PACKAGE = (
    "package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers/"
)
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
C_FLAGS = ["-std=c11", "-Wall", "-Wextra", "-Werror"]


def missing_tools(*tools: str) -> list[str]:
    """Return those of the tools that are not installed."""
    return [tool for tool in tools if shutil.which(tool) is None]


def onnxruntime_headers() -> Path:
    """Return the folder with ONNX Runtime's headers; fetched once and kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loraport"
    headers = cache / f"onnxruntime-headers-{HEADERS_VERSION}"
    if headers.is_dir():
        return headers
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        fetched = Path(temporary)
        command = ["npm", "pack", "--silent", f"{HEADERS_PACKAGE}@{HEADERS_VERSION}"]
        subprocess.run(command, cwd=fetched, check=True, capture_output=True)
        (fetched / "headers").mkdir()
        with tarfile.open(next(fetched.glob("*.tgz"))) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if member.name.startswith(_IN_PACKAGE) and content is not None:
                    (fetched / "headers" / Path(member.name).name).write_bytes(content.read())
        # A second test run at the same time may have been faster.
        if not headers.is_dir():
            (fetched / "headers").rename(headers)
    return headers


def onnxruntime_library() -> Path:
    """Return the shared library inside the installed Python package."""
    import onnxruntime

    capi = Path(onnxruntime.__file__).parent / "capi"
    return next(capi.glob("libonnxruntime.so.1.*"))


def genai_library() -> Path:
    """Return ONNX Runtime GenAI's shared library inside the installed Python package."""
    import onnxruntime_genai

    return Path(onnxruntime_genai.__file__).parent / "libonnxruntime-genai.so"


def build_cpp(build: Path, *, sanitize: bool) -> Path:
    """Build the C++ sample with warnings as errors and return the folder of its programs."""
    configure = [
        "cmake",
        f"-S{SAMPLES / 'cpp'}",
        f"-B{build}",
        f"-DONNXRUNTIME_INCLUDE_DIR={onnxruntime_headers()}",
        "-DLORAPORT_WERROR=ON",
    ]
    if sanitize:
        configure += ["-DLORAPORT_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=Debug"]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return build


def build_c(source: Path, program: Path, *flags: str) -> Path:
    """Compile one C file with warnings as errors and return the program."""
    command = ["cc", *C_FLAGS, *flags, "-isystem", str(onnxruntime_headers())]
    command += [str(source), "-ldl", "-lm", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return program


def run_without_python(
    program: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program with an empty PATH: whatever it would start, it cannot find."""
    return subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "LORAPORT_ORT": str(onnxruntime_library()), **environment},
    )
