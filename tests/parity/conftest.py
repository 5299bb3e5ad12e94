"""Sessions of tiny models on one thread: more would only wait for one another."""

import functools

import pytest

from loraport.runtime import Runtime


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    one = functools.partial(Runtime, threads=1)
    monkeypatch.setattr("loraport.parity.verification.Runtime", one)
