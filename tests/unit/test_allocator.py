"""The allocator's settings apply where there is glibc, and are left alone elsewhere."""

import ctypes
import platform

import pytest

from silo.node.allocator import bound_allocator, release_free_memory
from silo.node.memory import read_resident_bytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_glibc_takes_the_settings() -> None:
    assert bound_allocator()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_what_is_free_goes_back_to_the_system() -> None:
    blocks = [bytes(8192) for _ in range(20_000)]
    kept = blocks[::1000]  # Among the others, so that the heap cannot just be cut off at its end.
    full = read_resident_bytes()
    del blocks
    release_free_memory()
    left = read_resident_bytes()
    assert full is not None
    assert left is not None
    assert left < full - (100 << 20)
    assert len(kept) == 20


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not bound_allocator()
    assert not release_free_memory()
