"""Keep glibc's allocator from holding on to memory that the store has released.

The store's threads allocate and release buffers of a few hundred kilobytes to a few megabytes. By
default glibc raises its threshold for such blocks each time one is released, then serves them from one
heap per thread, which fragment and hardly ever shrink: a shard with two million pending jobs was
measured at 800 MB, of which 470 MB with these settings.
"""

import ctypes

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # Parameters of mallopt(3).
_LARGE_BLOCK_BYTES = 128 << 10  # Goes back to the system when it is released.
_HEAPS = 2


def bound_allocator() -> bool:
    """Apply the settings to this process; whether its C library knows them. Call before threads start."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)) and bool(mallopt(_ARENA_MAX, _HEAPS))


def release_free_memory() -> bool:
    """Give back to the system what this process has released; whether its C library knows how.

    gRPC takes large messages apart into small blocks. After a flood of them gigabytes were seen to stay with
    a process that used none of it. Takes about 0.1 s for each gigabyte.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return False
    return bool(trim(0))
