"""SmolLM2-135M-Instruct with PEFT adapters."""

import pytest

from loraport.base.finding import SMOLLM2, resolve_base


@pytest.fixture(scope="session")
def real_base():
    """The real weights, as a directory."""
    return resolve_base(SMOLLM2)


@pytest.fixture(scope="session")
def real_fp32(real_directory):
    """The fp32 bundle with both adapters."""
    return real_directory / "fp32"


@pytest.fixture(scope="session")
def real_int4(real_directory):
    """The int4 bundle with both adapters."""
    return real_directory / "int4"


@pytest.fixture(scope="module", autouse=True)
def session_threads():
    """Leave sessions their threads, which int4's golden outputs depend on."""
