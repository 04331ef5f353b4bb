"""Pictures of coloured shapes and of bar charts, drawn by integer arithmetic alone: the same pixels everywhere."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 48  # pixels of a picture, across and down
CELL = 16  # of each of its nine places
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 214),
    "yellow": (236, 206, 40),
    "purple": (140, 50, 170),
    "orange": (240, 130, 20),
}
PLACES = (
    *("top left", "top", "top right"),
    *("left", "middle", "right"),
    *("bottom left", "bottom", "bottom right"),
)
RADII = (5, 6)
OFFSETS = (-1, 0, 1)  # of a thing from the middle of its place, in pixels
HEIGHTS = (6, 14, 22, 30, 38)  # of bars; each differs a little from these
GROUNDS = tuple(range(232, 256, 3))  # greys behind what is shown
_HEADER = "<2sIII" + "IiiHHIIiiII"  # of a bitmap file, and of what it holds
_DENSITY = 3780  # pixels a metre


@dataclass(frozen=True)
class Thing:
    """A shape of one colour.

    Attributes:
        place: where it is, an index of ``PLACES``.
        radius: half its size, in pixels.
        across: how far it is from the middle of its place, to the right, in pixels; ``down`` likewise.
    """

    shape: str
    colour: str
    place: int
    radius: int = 5
    across: int = 0
    down: int = 0


@dataclass(frozen=True)
class Bar:
    """A bar of a chart; ``height`` in pixels."""

    colour: str
    height: int


@dataclass(frozen=True)
class Drawing:
    """What a picture shows: things, or a chart of up to three bars, from left to right, on a grey ground."""

    ground: int
    things: tuple[Thing, ...] = ()
    bars: tuple[Bar, ...] = ()

    def pixels(self) -> NDArray[np.uint8]:
        """The picture, [rows, columns, red green blue]."""
        pixels = np.full((SIDE, SIDE, 3), self.ground, np.uint8)
        for thing in self.things:
            top, left = CELL * (thing.place // 3), CELL * (thing.place % 3)
            pixels[top : top + CELL, left : left + CELL][_mask(thing)] = COLOURS[thing.colour]
        for column, bar in enumerate(self.bars):
            left = CELL * column
            pixels[SIDE - bar.height :, left + 3 : left + CELL - 3] = COLOURS[bar.colour]
        return pixels

    def file(self) -> bytes:
        """The picture as a bitmap file (BMP), 24 bits a pixel. Its bytes say which picture it is, for fingerprints and
        memories, so no library writes them, whose next version might write others."""
        pixels = self.pixels()[::-1, :, ::-1].tobytes()  # from the last row to the first, blue green red
        start = struct.calcsize(_HEADER)
        info = (40, SIDE, SIDE, 1, 24, 0, len(pixels), _DENSITY, _DENSITY, 0, 0)
        return struct.pack(_HEADER, b"BM", start + len(pixels), 0, start, *info) + pixels

    def number(self) -> int:
        """A number from 0 to 9 that depends on every pixel, by which pictures are divided among splits."""
        return hashlib.sha256(self.pixels().tobytes()).digest()[0] % 10

    def words(self) -> set[str]:
        """The shapes, the colours and the places of all that it shows."""
        return {
            *(word for thing in self.things for word in (thing.shape, thing.colour, PLACES[thing.place])),
            *(bar.colour for bar in self.bars),
        }


def _mask(thing: Thing) -> NDArray[np.bool_]:
    """The pixels of a place that a thing covers, [CELL, CELL]."""
    at = 2 * np.arange(CELL) + 1 - CELL  # of each pixel's middle, in half pixels
    u, v, r = at[None] - 2 * thing.across, at[:, None] - 2 * thing.down, 2 * thing.radius
    round_ = u * u + v * v
    square = np.maximum(abs(u), abs(v)) < r
    match thing.shape:
        case "circle":
            return np.asarray(round_ < r * r)
        case "ring":
            return np.asarray((round_ < r * r) & (4 * round_ > r * r))
        case "square":
            return np.asarray(square)
        case "cross":
            return np.asarray(square & (3 * np.minimum(abs(u), abs(v)) < r))
        case "diamond":
            return np.asarray(abs(u) + abs(v) < r)
        case "triangle":
            return np.asarray((2 * abs(u) < v + r) & (v < r))
    raise ValueError(thing.shape)
