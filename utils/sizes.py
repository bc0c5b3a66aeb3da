"""The size of images: one number for squares, text such as "224x160", height before width, for other rectangles."""

import re

Size = int | str  # a number wherever height and width are the same, so that equal sizes are equal values

FEWEST_PIXELS = 8
MOST_PIXELS = 2048  # a side of an image: beyond it the features of one image fill gigabytes


def parse_size(value: int | str) -> Size:
    """A size as a user writes it: 224, "224" or "224x160".

    Raises:
        ValueError: for anything else, and for sides out of range.
    """
    found = re.fullmatch(r"(-?\d{1,9})(?:x(\d{1,9}))?", str(value))
    if type(value) not in (int, str) or found is None:
        raise ValueError(f"resize is {value!r}: it takes a number of pixels, or height and width as in 224x160")
    height, width = int(found[1]), int(found[2] or found[1])
    if not all(FEWEST_PIXELS <= side <= MOST_PIXELS for side in (height, width)):
        raise ValueError(f"resize is {value}, out of range: it takes {FEWEST_PIXELS} to {MOST_PIXELS}")
    return height if height == width else f"{height}x{width}"


def height_width(size: Size) -> tuple[int, int]:
    """Height and width of a size."""
    if isinstance(size, int):
        return size, size
    height, width = size.split("x")
    return int(height), int(width)


def shown_size(size: Size) -> str:
    """The size for titles and messages: 32x32."""
    return "{}x{}".format(*height_width(size))
