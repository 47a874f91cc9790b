"""Drawing of street-like scenes: a pinhole camera over a straight street, painted far to near.

Lengths on the ground are metres. A point on the ground at the bottom edge of the image is at depth
1; further points are at depth ``z`` > 1 and appear ``1 / z`` as large. Colours of the classes
overlap on purpose: shape, position and texture tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from rdd_pipeline.data.base import IGNORE_INDEX

SKY, BUILDING, POLE, ROAD, PAVEMENT, VEGETATION, CAR, PEDESTRIAN = range(8)

CLASS_NAMES = (
    "sky", "building", "pole", "road", "pavement", "vegetation", "car", "pedestrian",
)  # fmt: skip
PALETTE = (
    (70, 130, 180), (70, 70, 70), (220, 190, 40), (128, 64, 128), (244, 35, 232), (107, 142, 35),
    (0, 0, 142), (220, 20, 60),
)  # fmt: skip

# Strength of coarse and fine texture by label, in grey levels; 4 where ignored.
_COARSE = np.full(256, 4, dtype=np.float32)
_COARSE[:8] = 5, 9, 3, 7, 9, 22, 4, 6
_FINE = np.full(256, 4, dtype=np.float32)
_FINE[:8] = 1, 6, 4, 7, 5, 20, 4, 6

_FAR = 16.0
_METRES_PER_DEPTH = 5.5
_OUTLINED = (VEGETATION, CAR)

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Street:
    """The camera and the cross-section of the street."""

    height: int
    width: int
    horizon: float
    vanishing_x: float
    pixels_per_metre: float
    """At depth 1."""
    road: float
    """Half the width of the road, in metres."""
    side: float
    """Distance from the middle to the house fronts, in metres."""

    def point(self, x: float, y: float, z: float) -> Point:
        """Pixel position of a point ``x`` metres right, ``y`` metres up, at depth ``z``."""
        scale = self.pixels_per_metre / z
        ground = self.horizon + (self.height - self.horizon) / z
        return self.vanishing_x + x * scale, ground - y * scale


class _Canvas:
    """A picture and its label, drawn together."""

    def __init__(self, height: int, width: int) -> None:
        self.image = Image.new("RGB", (width, height))
        self.label = Image.new("L", (width, height), SKY)
        self._paint = ImageDraw.Draw(self.image)
        self._mark = ImageDraw.Draw(self.label)

    def polygon(self, points: Sequence[Point], colour: Colour, label: int) -> None:
        """Draw a filled polygon into both."""
        self._paint.polygon(points, fill=colour)
        self._mark.polygon(points, fill=label)

    def ellipse(self, box: tuple[float, float, float, float], colour: Colour, label: int) -> None:
        """Draw a filled ellipse into both."""
        self._paint.ellipse(box, fill=colour)
        self._mark.ellipse(box, fill=label)

    def box(self, box: tuple[float, float, float, float], colour: Colour, label: int) -> None:
        """Draw a filled rectangle, at least a pixel wide and high, into both."""
        left, top, right, bottom = (round(value) for value in box)
        pixels = (left, top, max(left, right - 1), max(top, bottom - 1))
        self._paint.rectangle(pixels, fill=colour)
        self._mark.rectangle(pixels, fill=label)

    def decorate(self, points: Sequence[Point], colour: Colour) -> None:
        """Draw a filled polygon into the picture alone."""
        self._paint.polygon(points, fill=colour)


def draw_scene(
    rng: np.random.Generator, height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Draw one scene.

    Args:
        rng: Decides everything about the scene.
        height: Height in pixels.
        width: Width in pixels.

    Returns:
        RGB (H, W, 3) uint8, and label (H, W) uint8 with 255 on the bonnet of the own car and on
        outlines of cars and vegetation.
    """
    horizon = height * rng.uniform(0.36, 0.5)
    road = rng.uniform(3.2, 5.0)
    street = _Street(
        height=height,
        width=width,
        horizon=horizon,
        vanishing_x=width * rng.uniform(0.35, 0.65),
        pixels_per_metre=(height - horizon) / rng.uniform(2.0, 2.8),
        road=road,
        side=road + rng.uniform(2.0, 4.5),
    )
    canvas = _Canvas(height, width)
    _draw_sky(canvas, street, rng)
    _draw_skyline(canvas, street, rng)
    _draw_ground(canvas, street, rng)
    for side in (-1, 1):
        _draw_fronts(canvas, street, side, rng)
    for _, draw in sorted(_place_objects(street, rng), key=lambda item: -item[0]):
        draw(canvas)
    label = np.array(canvas.label)
    label[_outlines(label)] = IGNORE_INDEX
    bonnet = _draw_bonnet(canvas, street, rng)
    label[bonnet] = IGNORE_INDEX
    return _photograph(canvas.image, label, street, rng), label


def _draw_sky(canvas: _Canvas, street: _Street, rng: np.random.Generator) -> None:
    clear, overcast = np.array([95.0, 145.0, 205.0]), np.array([185.0, 188.0, 192.0])
    top = clear + (overcast - clear) * rng.uniform(0.0, 1.0)
    bottom = top + (np.array([225.0, 222.0, 215.0]) - top) * rng.uniform(0.2, 0.8)
    fade = np.linspace(0.0, 1.0, street.height)[:, None, None]
    sky = np.broadcast_to(top + (bottom - top) * fade, (street.height, street.width, 3))
    canvas.image.paste(Image.fromarray(sky.astype(np.uint8)))
    for _ in range(int(rng.integers(0, 5))):
        x, y = rng.uniform(0, street.width), rng.uniform(0, street.horizon)
        w, h = rng.uniform(0.05, 0.25) * street.width, rng.uniform(0.01, 0.05) * street.height
        white = int(rng.integers(205, 240))
        canvas.ellipse((x - w, y - h, x + w, y + h), (white, white, white), SKY)


def _draw_skyline(canvas: _Canvas, street: _Street, rng: np.random.Generator) -> None:
    """What closes the street at its far end; the ground is painted over its lower half."""
    x, _ = street.point(-street.side * 1.6, 0.0, _FAR)
    right, _ = street.point(street.side * 1.6, 0.0, _FAR)
    base = street.horizon + 1
    while x < right:
        step = rng.uniform(0.02, 0.06) * street.width
        top = street.horizon - rng.uniform(0.01, 0.16) * street.height
        if rng.uniform() < 0.5:
            canvas.box((x, top, x + step, base), _facade_colour(rng), BUILDING)
        else:
            crown = (x - 2, top, x + step + 2, 2 * base - top)
            canvas.ellipse(crown, _colour(rng, (84, 104, 72), 12), VEGETATION)
        x += step


def _draw_ground(canvas: _Canvas, street: _Street, rng: np.random.Generator) -> None:
    horizon = street.horizon

    def strip(left: float, right: float, near: float = 0.9, far: float = 400.0) -> list[Point]:
        edges = ((left, near), (right, near), (right, far), (left, far))
        return [street.point(x, 0.0, z) for x, z in edges]

    green = rng.uniform() < 0.5
    beyond = _colour(rng, (88, 105, 62) if green else (122, 118, 112), 14)
    canvas.polygon(
        [(0, horizon), (street.width, horizon), (street.width, street.height), (0, street.height)],
        beyond,
        VEGETATION if green else PAVEMENT,
    )
    paving = _colour(rng, (130, 124, 118), 22)
    canvas.polygon(strip(-street.side, street.side), paving, PAVEMENT)
    joint = _shade(paving, 0.87)
    z = rng.uniform(1.0, 1.15)
    while z < 9.0:  # joints between the paving stones, too fine to see further away
        canvas.decorate(strip(-street.side, street.side, z, z * 1.015), joint)
        z += 0.28
    asphalt = _colour(rng, (98, 97, 100), 22)
    kerb = _shade(asphalt, rng.uniform(1.1, 1.5))
    canvas.polygon(strip(-street.road - 0.18, street.road + 0.18), kerb, PAVEMENT)
    canvas.polygon(strip(-street.road, street.road), asphalt, ROAD)
    if rng.uniform() < 0.6:  # a stripe of patched asphalt
        x = rng.uniform(-street.road, street.road - 1.0)
        patch = _shade(asphalt, rng.uniform(0.8, 1.15))
        canvas.decorate(strip(x, x + rng.uniform(0.5, 1.5)), patch)
    paint = _colour(rng, (205, 203, 196), 18)
    if rng.uniform() < 0.75:
        z = rng.uniform(1.0, 1.6)
        while z < _FAR:
            canvas.decorate(strip(-0.08, 0.08, z, z + 0.6), paint)
            z += 1.4
    if rng.uniform() < 0.35:  # zebra crossing
        z = rng.uniform(1.6, 3.5)
        x = -street.road + 0.3
        while x < street.road - 0.4:
            canvas.decorate(strip(x, x + 0.45, z, z + 0.55), paint)
            x += 0.9
    if rng.uniform() < 0.6:  # shade of the houses of one side
        side = rng.choice((-1.0, 1.0)) * street.side
        reach = side * rng.uniform(-0.4, 0.6)
        mask = Image.new("L", canvas.image.size, 0)
        ImageDraw.Draw(mask).polygon(strip(min(side, reach), max(side, reach)), fill=255)
        dark = canvas.image.point(_table(rng.uniform(0.45, 0.75)))
        canvas.image.paste(dark, mask=mask)


def _draw_fronts(canvas: _Canvas, street: _Street, side: int, rng: np.random.Generator) -> None:
    """House fronts of one side, far to near, with gaps."""
    ends = [0.75]
    while ends[-1] < _FAR:
        ends.append(ends[-1] + rng.uniform(0.9, 3.2))
    x = side * street.side
    for near, far in reversed(list(pairwise(ends))):
        if rng.uniform() < 0.18:
            _draw_hedge(canvas, street, x, near, far, rng)
            continue
        height = rng.uniform(5.0, 17.0)
        colour = _facade_colour(rng)

        def wall(z0: float, z1: float, y0: float, y1: float, x: float = x) -> list[Point]:
            corners = ((z0, y0), (z1, y0), (z1, y1), (z0, y1))
            return [street.point(x, y, z) for z, y in corners]

        # The gable towards the camera shows where the next house is lower or missing.
        deep = x + side * 12.0
        gable = [
            street.point(a, b, near) for a, b in ((x, 0), (deep, 0), (deep, height), (x, height))
        ]
        canvas.polygon(gable, _shade(colour, 0.8), BUILDING)
        canvas.polygon(wall(near, far, 0.0, height), colour, BUILDING)
        canvas.decorate(wall(near, far, 0.0, 0.7), _shade(colour, 0.82))
        glass = _shade(_colour(rng, (92, 104, 118), 20), rng.uniform(0.5, 1.5))
        storey, pitch = rng.uniform(2.7, 3.6), rng.uniform(0.35, 0.6)
        columns = min(int((far - near) / pitch), 6)
        if near > 8.0:  # too far for windows
            continue
        margin = ((far - near) - columns * pitch) / 2
        for row in range(int(height / storey)):
            y = row * storey + 0.35 * storey
            for column in range(columns):
                z = near + margin + column * pitch
                canvas.decorate(wall(z + 0.2 * pitch, z + 0.75 * pitch, y, y + 0.5 * storey), glass)


def _draw_hedge(
    canvas: _Canvas, street: _Street, x: float, near: float, far: float, rng: np.random.Generator
) -> None:
    green = _leaf_colour(rng)
    height = rng.uniform(1.0, 3.0)
    corners = ((near, 0.0), (far, 0.0), (far, height), (near, height))
    canvas.polygon([street.point(x, y, z) for z, y in corners], green, VEGETATION)
    for z in np.linspace(far, near, 4).tolist():
        centre_x, centre_y = street.point(x, height, z)
        radius = rng.uniform(0.8, 1.6) * street.pixels_per_metre / z
        box = (centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius)
        canvas.ellipse(box, _shade(green, rng.uniform(0.8, 1.2)), VEGETATION)


def _place_objects(
    street: _Street, rng: np.random.Generator
) -> list[tuple[float, Callable[[_Canvas], None]]]:
    """Everything that stands in the street: depth and how to draw it."""
    placed: list[tuple[float, Callable[[_Canvas], None]]] = []

    def place(z: float, draw: Callable[[_Canvas], None]) -> None:
        placed.append((z, draw))

    for side in (-1, 1):
        lane, kerb = side * street.road * 0.48, side * (street.road - 1.0)
        z = rng.uniform(1.6, 4.0)
        parking = rng.uniform() < 0.6
        while z < 12.0:
            if parking and rng.uniform() < 0.7:
                place(z, _car(street, kerb, z, rng))
            z += rng.uniform(1.05, 2.2)
        if rng.uniform() < 0.55:
            z = rng.uniform(1.7, 9.0)
            place(z, _car(street, lane, z, rng))
        trees, z = rng.uniform() < 0.55, rng.uniform(1.6, 4.0)
        while trees and z < _FAR:
            x = side * (street.road + 0.35 * (street.side - street.road))
            place(z, _tree(street, x, z, rng))
            z += rng.uniform(1.8, 5.0)
        z = rng.uniform(1.1, 2.4)
        while z < 6.0:
            place(z, _pole(street, side, side * (street.road + 0.45), z, rng))
            z += rng.uniform(1.2, 3.0)
        for _ in range(int(rng.integers(1, 6))):
            z = rng.uniform(1.2, 4.5)
            x = side * rng.uniform(street.road + 0.5, street.side - 0.4)
            place(z, _pedestrian(street, x, z, rng))
    if rng.uniform() < 0.3:
        z = rng.uniform(1.5, 4.0)
        x = rng.uniform(-street.road, street.road)
        place(z, _pedestrian(street, x, z, rng))
    return placed


def _car(
    street: _Street, x: float, z: float, rng: np.random.Generator
) -> Callable[[_Canvas], None]:
    paint = (
        _colour(rng, (110, 110, 112), 75, tint=4)
        if rng.uniform() < 0.6
        else _colour(rng, (110, 90, 90), 60)
    )
    half, height = rng.uniform(0.82, 0.98), rng.uniform(1.4, 1.9)
    far = z + rng.uniform(3.6, 4.6) / _METRES_PER_DEPTH
    waist, roof = 0.55 * height, 0.72 * half
    towards = rng.uniform() < 0.5
    lamp = (225, 222, 205) if towards else (150, 32, 30)

    def draw(canvas: _Canvas) -> None:
        def face(depth: float, corners: Sequence[Point]) -> list[Point]:
            return [street.point(x + a, b, depth) for a, b in corners]

        dark, glass = _shade(paint, 0.7), _shade((70, 80, 92), 0.8)
        # The flank that faces the middle of the picture, then the end that faces the camera.
        inner = -half if x > 0 else half
        inner_roof = -roof if x > 0 else roof
        for bottom, top, at, colour in (
            (0.3, waist, inner, dark),
            (waist, height, inner_roof, glass),
        ):
            corners = ((z, bottom), (far, bottom), (far, top), (z, top))
            canvas.polygon([street.point(x + at, b, d) for d, b in corners], colour, CAR)
        for depth in (z + 0.15, far - 0.15):  # wheels of the flank
            left, top = street.point(x + inner, 0.62, depth)
            _, bottom = street.point(x + inner, 0.0, depth)
            size = 0.35 * (bottom - top)
            canvas.ellipse((left - size, top, left + size, bottom), (28, 28, 30), CAR)
        lid = ((-roof, height), (roof, height))
        top_face = [street.point(x + a, b, d) for d in (z, far) for a, b in lid]
        canvas.polygon(
            [top_face[0], top_face[1], top_face[3], top_face[2]], _shade(paint, 1.15), CAR
        )
        for wheel in (-half, half - 0.28):
            tyre = ((wheel, 0.0), (wheel + 0.28, 0.0), (wheel + 0.28, 0.4), (wheel, 0.4))
            canvas.polygon(face(z, tyre), (26, 26, 28), CAR)
        body = ((-half, 0.28), (half, 0.28), (half, waist), (-half, waist))
        canvas.polygon(face(z, body), paint, CAR)
        cabin = ((-half * 0.95, waist), (half * 0.95, waist), (roof, height), (-roof, height))
        canvas.polygon(face(z, cabin), paint, CAR)
        pane = (
            (-half * 0.8, waist + 0.05), (half * 0.8, waist + 0.05),
            (roof * 0.88, height - 0.12), (-roof * 0.88, height - 0.12),
        )  # fmt: skip
        canvas.decorate(face(z, pane), glass)
        for a in (-half + 0.04, half - 0.3):
            light = (
                (a, waist - 0.28), (a + 0.26, waist - 0.28),
                (a + 0.26, waist - 0.1), (a, waist - 0.1),
            )  # fmt: skip
            canvas.decorate(face(z, light), lamp)

    return draw


def _tree(
    street: _Street, x: float, z: float, rng: np.random.Generator
) -> Callable[[_Canvas], None]:
    green, bark = _leaf_colour(rng), _colour(rng, (74, 62, 50), 12)
    trunk, crown = rng.uniform(1.8, 3.0), rng.uniform(1.1, 2.3)
    blobs = [
        (rng.uniform(-0.6, 0.6), rng.uniform(-0.1, 1.1), rng.uniform(0.45, 0.8),
         rng.uniform(0.75, 1.25))
        for _ in range(7)
    ]  # fmt: skip

    def draw(canvas: _Canvas) -> None:
        scale = street.pixels_per_metre / z
        left, bottom = street.point(x - 0.12, 0.0, z)
        right, top = street.point(x + 0.12, trunk + 0.5, z)
        canvas.box((left, top, right, bottom), bark, VEGETATION)
        for dx, dy, size, shade in blobs:
            centre_x, centre_y = street.point(x + dx * crown, trunk + dy * crown, z)
            radius = size * crown * scale
            box = (
                centre_x - radius, centre_y - 0.85 * radius,
                centre_x + radius, centre_y + 0.85 * radius,
            )  # fmt: skip
            canvas.ellipse(box, _shade(green, shade), VEGETATION)

    return draw


def _pole(
    street: _Street, side: int, x: float, z: float, rng: np.random.Generator
) -> Callable[[_Canvas], None]:
    colour = _shade(_colour(rng, (96, 98, 98), 18), rng.uniform(0.25, 0.6))
    lamp = rng.uniform() < 0.5
    height = rng.uniform(5.0, 8.0) if lamp else rng.uniform(2.2, 4.0)
    plate = None if lamp or rng.uniform() < 0.3 else _colour(rng, (120, 90, 110), 80)

    def draw(canvas: _Canvas) -> None:
        scale = street.pixels_per_metre / z
        middle, top = street.point(x, height, z)
        _, bottom = street.point(x, 0.0, z)
        # One to five pixels at the default height of 128, and never less than one.
        width = max(1, round(min(0.3 * scale, 5.0 * street.height / 128)))
        left = round(middle - width / 2)
        canvas.box((left, top, left + width, bottom), colour, POLE)
        if lamp:
            reach, thin = -side * 1.4 * scale, max(1.0, 0.14 * scale)
            arm = sorted((middle, middle + reach))
            canvas.box((arm[0], top, arm[1], top + thin), colour, POLE)
        elif plate is not None:
            half = 0.3 * scale
            canvas.box((middle - half, top, middle + half, top + 2 * half), plate, POLE)

    return draw


_COATS: tuple[Colour, ...] = ((196, 60, 52), (214, 168, 48), (60, 92, 190), (216, 116, 44))


def _pedestrian(
    street: _Street, x: float, z: float, rng: np.random.Generator
) -> Callable[[_Canvas], None]:
    coat = _colour(rng, _COATS[rng.integers(len(_COATS))], 30)
    trousers = _colour(rng, (60, 60, 70), 35)
    skin = _shade((196, 152, 124), rng.uniform(0.5, 1.1))
    tall, stride, wide = rng.uniform(1.5, 1.95), rng.uniform(0.05, 0.28), rng.uniform(0.24, 0.34)

    def draw(canvas: _Canvas) -> None:
        def part(corners: Sequence[Point], colour: Colour) -> None:
            points = [street.point(x + a, b * tall, z) for a, b in corners]
            canvas.polygon(points, colour, PEDESTRIAN)

        for foot in (-stride, stride):
            part(((foot - 0.07, 0), (foot + 0.07, 0), (0.09, 0.5), (-0.09, 0.5)), trousers)
        part(((-wide * 0.8, 0.45), (wide * 0.8, 0.45), (wide, 0.82), (-wide, 0.82)), coat)
        left, top = street.point(x - 0.11, tall, z)
        right, bottom = street.point(x + 0.11, tall * 0.84, z)
        canvas.ellipse((left, top, right, bottom), skin, PEDESTRIAN)

    return draw


def _outlines(label: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels at the outline of cars and vegetation, where hand-drawn labels are unsure.

    Thin objects keep their pixels: an outline would leave nothing of them.
    """
    soft = np.isin(label, _OUTLINED)
    outline = np.zeros(label.shape, dtype=np.bool_)
    differs = (label[1:] != label[:-1]) & (soft[1:] | soft[:-1])
    outline[1:] |= differs
    differs = (label[:, 1:] != label[:, :-1]) & (soft[:, 1:] | soft[:, :-1])
    outline[:, 1:] |= differs
    outline[(label == POLE) | (label == PEDESTRIAN)] = False
    return outline


def _draw_bonnet(canvas: _Canvas, street: _Street, rng: np.random.Generator) -> NDArray[np.bool_]:
    height, width = street.height, street.width
    rise, middle = rng.uniform(0.03, 0.09) * height, street.vanishing_x
    box = (middle - 0.75 * width, height - rise, middle + 0.75 * width, height + 5 * rise)
    paint = _colour(rng, (70, 70, 74), 45, tint=10)
    mask = Image.new("1", (width, height), 0)
    ImageDraw.Draw(mask).ellipse(box, fill=1)
    canvas.image.paste(paint, mask=mask)
    glint = (box[0], box[1] + 0.3 * rise, box[2], box[3])
    ImageDraw.Draw(canvas.image).arc(glint, 200, 340, fill=_shade(paint, 1.6))
    bonnet: NDArray[np.bool_] = np.asarray(mask)
    return bonnet


def _photograph(
    image: Image.Image, label: NDArray[np.uint8], street: _Street, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Texture, light, lens and sensor."""
    height, width = label.shape
    soft = Image.blend(image, image.filter(ImageFilter.BoxBlur(1)), rng.uniform(0.25, 0.65))
    pixels = np.asarray(soft).astype(np.float32)
    cells = (max(2, height // 5), max(2, width // 5))
    blotches = Image.fromarray(rng.standard_normal(cells, dtype=np.float32))
    texture = np.asarray(blotches.resize((width, height), Image.Resampling.BILINEAR)).copy()
    texture *= _COARSE.take(label)
    texture += rng.standard_normal((height, width), dtype=np.float32) * _FINE.take(label)
    pixels += texture[..., None]

    exposure = rng.uniform(0.4, 0.65) if rng.uniform() < 0.15 else rng.uniform(0.75, 1.25)
    warmth = rng.uniform(-0.1, 0.1)
    gain = np.array([1 + warmth, 1.0, 1 - warmth]) * exposure
    # Haze: what is near the horizon goes towards grey.
    near_horizon = 1.0 - np.abs(np.arange(height) - street.horizon) / height
    haze = (rng.uniform(0.0, 0.35) * near_horizon * near_horizon * near_horizon)[:, None, None]
    across = 1.0 + rng.uniform(-0.2, 0.2) * np.linspace(-1.0, 1.0, width)[:, None]
    pixels *= (across * gain).astype(np.float32)
    pixels *= (1 - haze).astype(np.float32)
    pixels += (haze * 190.0 * gain).astype(np.float32)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32)
    noise *= np.float32(rng.uniform(1.0, 6.0))
    pixels += noise
    return pixels.clip(0, 255, out=pixels).astype(np.uint8)


def _facade_colour(rng: np.random.Generator) -> Colour:
    bases = ((150, 128, 108), (128, 84, 70), (132, 134, 136), (176, 168, 150), (104, 116, 132))
    return _colour(rng, bases[int(rng.integers(len(bases)))], 18)


def _leaf_colour(rng: np.random.Generator) -> Colour:
    if rng.uniform() < 0.2:
        return _colour(rng, (118, 94, 56), 16)  # autumn
    return _colour(rng, (72, 92, 54), 16)


def _colour(rng: np.random.Generator, base: Colour, spread: int, tint: int | None = None) -> Colour:
    """A colour near ``base``: brightness varies by ``spread``, channels apart by ``tint``."""
    brightness, *apart = rng.uniform(-1.0, 1.0, 4).tolist()
    channel = spread / 2 if tint is None else tint
    red, green, blue = (
        _byte(value + spread * brightness + channel * step)
        for value, step in zip(base, apart, strict=True)
    )
    return red, green, blue


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = colour
    return _byte(red * factor), _byte(green * factor), _byte(blue * factor)


def _byte(value: float) -> int:
    return 0 if value < 0 else 255 if value > 255 else round(value)


def _table(factor: float) -> list[int]:
    return [_byte(value * factor) for value in range(256)] * 3
