"""Pictures drawn by code, as examples where no photograph may be copied."""
from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFilter

__all__ = ['DRAWINGS']

_SIZE = 256
_DRAWN = 2 * _SIZE  # drawn larger and reduced, for smooth edges


def _gradient(top: str, bottom: str, size: tuple[int, int] = (_DRAWN, _DRAWN)) -> Image.Image:
    """A picture that goes from one colour to another, top to bottom."""
    ramp = Image.linear_gradient('L').resize(size)
    return Image.composite(Image.new('RGB', size, bottom), Image.new('RGB', size, top), ramp)


def _finish(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(2)).resize((_SIZE, _SIZE), Image.Resampling.LANCZOS)


def draw_apple() -> Image.Image:
    """A red apple with a leaf on a pale ground."""
    image = _gradient('#fdfdfb', '#e4e1da')
    draw = ImageDraw.Draw(image)
    draw.ellipse((110, 415, 402, 465), fill='#c4beb4')
    # Discs that shrink towards the light make the round form.
    for i in range(60):
        t = i / 59
        radius = 168 * (1 - t) ** 0.8
        x, y = 256 - 60 * t, 285 - 60 * t
        red, green = round(120 + 110 * t), round(10 + 60 * t * t)
        draw.ellipse((x - radius * 1.04, y - radius, x + radius * 1.04, y + radius), fill=(red, green, 30))
    draw.ellipse((216, 108, 300, 146), fill='#5e1013')
    draw.line((256, 132, 262, 90, 282, 52), fill='#5a3b1d', width=13, joint='curve')
    draw.polygon([(268, 92), (318, 46), (392, 50), (346, 98)], fill='#4c8a2b')
    return _finish(image)


def draw_sunflower() -> Image.Image:
    """A sunflower before the sky."""
    image = _gradient('#4f8fd6', '#b9daf2')
    draw = ImageDraw.Draw(image)
    draw.line((256, 256, 262, 512), fill='#3f7a2a', width=24)
    draw.ellipse((262, 400, 400, 452), fill='#4c8c31')
    for ring, (reach, colour) in enumerate(((218, '#e89c0c'), (196, '#ffcf1f'))):
        for i in range(20):
            angle = 2 * math.pi * (i + ring / 2) / 20
            points = [(reach, 0.), (0.62 * reach, 0.17), (90, 0.1), (90, -0.1), (0.62 * reach, -0.17)]
            draw.polygon([
                (256 + r * math.cos(angle + a), 236 + r * math.sin(angle + a)) for r, a in points], fill=colour)
    draw.ellipse((158, 138, 354, 334), fill='#4a2a10')
    for i in range(260):  # seeds in Vogel's spiral
        radius, angle = 5.6 * math.sqrt(i), i * math.pi * (3 - math.sqrt(5))
        x, y = 256 + radius * math.cos(angle), 236 + radius * math.sin(angle)
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill='#8a5a22' if i > 90 else '#5f6a1e')
    return _finish(image)


def draw_sea() -> Image.Image:
    """The sea under a clear sky."""
    image = _gradient('#5b9bdc', '#e6f0f4')
    image.paste(_gradient('#2f6fa3', '#0c3558', (_DRAWN, 262)), (0, 250))
    draw = ImageDraw.Draw(image)
    for row in range(16):
        y, length = 262 + row * row, 20 + 5 * row
        for x in range(-(row * 53 % 90), _DRAWN, 3 * length):
            draw.arc((x, y - length / 8, x + length, y + length / 8), 200, 340, fill='#a8cfe6', width=1 + row // 4)
    return _finish(image)


def draw_clock() -> Image.Image:
    """A wall clock at ten past ten."""
    image = _gradient('#d9cdb8', '#c7b99f')
    draw = ImageDraw.Draw(image)
    draw.ellipse((66, 66, 462, 462), fill='#a3947a')
    draw.ellipse((52, 52, 448, 448), fill='#20242a')
    draw.ellipse((78, 78, 422, 422), fill='#fbfaf6')
    for minute in range(0, 60, 5):
        angle, inner = math.radians(6 * minute), 128 if minute % 15 == 0 else 142
        x, y = math.sin(angle), -math.cos(angle)
        draw.line((250 + inner * x, 250 + inner * y, 250 + 160 * x, 250 + 160 * y), fill='#20242a', width=11)
    for minutes, length, width in ((51, 88, 17), (10, 126, 11)):
        angle = math.radians(6 * minutes)
        draw.line((250, 250, 250 + length * math.sin(angle), 250 - length * math.cos(angle)), '#20242a', width)
    draw.ellipse((234, 234, 266, 266), fill='#b3261e')
    return _finish(image)


# CIFAR-100's name of what a drawing shows -> the function that draws it, 256x256 RGB.
DRAWINGS: dict[str, Callable[[], Image.Image]] = {
    'apple': draw_apple,
    'sunflower': draw_sunflower,
    'sea': draw_sea,
    'clock': draw_clock,
}
