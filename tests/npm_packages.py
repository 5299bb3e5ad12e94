"""The JavaScript samples with their npm packages, outside the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from native_programs import SAMPLES


def installed_sample(name: str, directory: Path) -> Path:
    """Copy a sample beside its packages, as a user's copy would be after ``npm install``."""
    sample = directory / name
    ignore = shutil.ignore_patterns("node_modules", "vendor", "bundle")
    shutil.copytree(SAMPLES / name, sample, ignore=ignore)
    (sample / "node_modules").symlink_to(_packages(SAMPLES / name / "package.json"))
    return sample


def node_without_python(directory: Path) -> dict[str, str]:
    """Return an environment whose PATH holds node and nothing else."""
    node = shutil.which("node")
    assert node is not None
    (directory / "bin").mkdir(exist_ok=True)
    link = directory / "bin" / "node"
    if not link.exists():
        link.symlink_to(node)
    return {"PATH": str(link.parent), "HOME": str(directory)}


def _packages(manifest: Path) -> Path:
    """Return a package.json's ``node_modules``; installed once and kept in the user's cache."""
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loraport"
    installed = cache / f"npm-{digest}"
    if not installed.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            fetched = Path(temporary) / "fetched"
            fetched.mkdir()
            shutil.copy(manifest, fetched)
            command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund"]
            environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}
            done = subprocess.run(
                command, cwd=fetched, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-2000:]
            # A second test run at the same time may have been faster.
            if not installed.is_dir():
                fetched.rename(installed)
    return installed / "node_modules"
