"""Colours of classes, for pictures."""

from __future__ import annotations

Palette = tuple[tuple[int, int, int], ...]


def bit_palette(count: int, first: int = 1) -> Palette:
    """Distinct colours for as many classes as wanted: the colour map of Pascal VOC.

    The bits of the index, three at a time from the lowest, become the bits of red, green and blue
    from the highest, so that neighbours differ most (VOC development kit, ``VOCcolormap``).

    Args:
        count: How many colours, at most ``256 - first``.
        first: Index of the first; 0 is black, which VOC has for its background.

    >>> bit_palette(3)
    ((128, 0, 0), (0, 128, 0), (128, 128, 0))
    """

    def channel(index: int, offset: int) -> int:
        return sum(((index >> (3 * bit + offset)) & 1) << (7 - bit) for bit in range(3))

    return tuple(
        (channel(index, 0), channel(index, 1), channel(index, 2))
        for index in range(first, first + count)
    )


def hex_palette(text: str) -> Palette:
    """Colours written as ``rrggbb``, one after the other, white space between them or not."""
    values = bytes.fromhex(text)
    return tuple(zip(values[0::3], values[1::3], values[2::3], strict=True))
