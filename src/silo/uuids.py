"""UUIDs as text. The standard library's objects cost several times as much to make."""

_MASK = ~(0xF << 76 | 0b11 << 62)
_VARIANT = 0b10 << 62


def uuid_text(bits: int, *, version: int) -> str:
    """The UUID of this version with these 128 bits, but for the six that say what it is."""
    digits = f"{bits & _MASK | version << 76 | _VARIANT:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
