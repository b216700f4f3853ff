"""The operator's one colour, made readable: darker on light pages, lighter on dark ones, with what can be read upon it."""

from typing import Final

Rgb = tuple[int, int, int]
_LIGHT: Final[Rgb] = (255, 255, 255)
_DARK: Final[Rgb] = (24, 24, 27)
_READABLE: Final = 4.8
"""A contrast of 4.5 is WCAG 2.2's least for text (1.4.3, AA); a little more, for what is tinted behind it."""


def theme_text(colour: str) -> str:
    """The stylesheet for a colour as `#rrggbb`."""
    given: Rgb = (int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16))
    light, dark = _towards(given, (0, 0, 0), _LIGHT), _towards(given, (255, 255, 255), _DARK)
    accent = f"light-dark({_text(light)},{_text(dark)})"
    upon = f"light-dark({_text(_upon(light))},{_text(_upon(dark))})"
    return f":root{{--primary:{accent};--primary-foreground:{upon};--ring:{accent}}}\n"


def contrast(one: Rgb, other: Rgb) -> float:
    """From 1 to 21. Source: WCAG 2.2, "contrast ratio"."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _towards(colour: Rgb, end: Rgb, page: Rgb) -> Rgb:
    """The colour itself, or as much of it mixed with `end` as can be read on this page."""
    found = colour
    for percent in range(0, 101, 4):
        red, green, blue = ((a * (100 - percent) + b * percent) // 100 for a, b in zip(colour, end, strict=True))
        found = red, green, blue
        if contrast(found, page) >= _READABLE:
            break
    return found


def _upon(colour: Rgb) -> Rgb:
    return max(_LIGHT, _DARK, key=lambda ink: contrast(colour, ink))


def _luminance(colour: Rgb) -> float:
    red, green, blue = (_linear(part / 255) for part in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else float(((part + 0.055) / 1.055) ** 2.4)


def _text(colour: Rgb) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)
