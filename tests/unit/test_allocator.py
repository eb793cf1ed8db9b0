"""The allocator's settings apply where there is glibc, and are left alone elsewhere."""

import ctypes
import platform

import pytest

from silo.node.allocator import bound_allocator


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_glibc_takes_the_settings() -> None:
    assert bound_allocator()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not bound_allocator()
