"""Procedural pictures with procedural defects: all that the bundled model is trained on.

    image, mask, kind = sample(np.random.default_rng(seed), size=160, split=TRAIN)

A picture is a surface or objects, made of textures, with normal fittings, in half of the cases with defects,
seen through a camera. Splits share no family of texture (save plain ground), outline or defect: SELECT and
REPORT measure transfer to others. To add one, write a function and list it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

TRAIN, SELECT, REPORT = 0, 1, 2  # decisions are made on SELECT, REPORT is read once a model

Array = np.ndarray
Picture = tuple[Array, Array, str]  # image, mask, kind of defect
Camera = Callable[[Array], Array]


# --- 1. tools --------------------------------------------------------------------------------------------
@lru_cache(maxsize=32)
def _gauss(size: int, sigma: float) -> Array:
    """The Gaussian blur of one axis as a matrix: rows sum to one, so borders do not darken."""
    i = np.arange(size)
    k = np.exp(-0.5 * ((i[:, None] - i) / sigma) ** 2)
    k = (k / k.sum(1, keepdims=True)).astype(np.float32)
    return np.where(k < 1e-12, 0, k)  # some processors multiply denormal numbers ten times slower


def _blur(a: Array, sigma: float) -> Array:
    """Gaussian blur of the last two (equal) axes."""
    k = _gauss(a.shape[-1], round(max(sigma, 0.05), 2 if sigma < 1 else 1))
    return k @ a.astype(np.float32) @ k.T


def _turn(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """The coordinates, rotated."""
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return c * x + s * y, c * y - s * x


def _unit(a: Array) -> Array:
    """Zero mean, unit deviation."""
    return (a - a.mean()) / (a.std() + 1e-6)


class Pencil:
    """What all parts of one picture share: its random numbers, size, saturation (0: grey) and split."""

    def __init__(self, rng: np.random.Generator, size: int, sat: float, split: int):
        self.uniform, self.normal, self.integers, self.rng = rng.uniform, rng.normal, rng.integers, rng
        self.size, self.sat, self.split = size, sat, split

    def one(self, odds: dict[Any, float]) -> Any:
        """One of the keys, by its odds."""
        weights = np.array(list(odds.values()))
        return list(odds)[self.rng.choice(len(odds), p=weights / weights.sum())]

    def maybe(self, odds: float) -> bool:
        return self.rng.random() < odds

    def log(self, low: float, high: float) -> float:
        """A number between low and high, each order of magnitude as likely as the next."""
        return float(np.exp(self.uniform(np.log(low), np.log(high))))

    def angle(self) -> float:
        """Mostly along an axis, as photographs of products are taken."""
        return self.one({0.0: 0.35, np.pi / 2: 0.25, self.uniform(0, np.pi): 0.4})

    def colour(self) -> Array:
        """[3, 1, 1], of about this saturation."""
        value = self.uniform(0.15, 0.85) * (1 + self.sat * self.normal(size=(3, 1, 1)))
        return np.clip(value, 0.02, 0.98).astype(np.float32)

    def axes(self, angle: float = 0.0, x: float = 0.0, y: float = 0.0) -> tuple[Array, Array]:
        """The coordinates of every pixel, -1 to 1, from a point and turned."""
        t = (np.arange(self.size, dtype=np.float32) + 0.5) * (2 / self.size) - 1
        return _turn(t - x, t[:, None] - y, angle)

    def frame(self, low: float, high: float) -> tuple[Array, Array]:
        """Coordinates in cells, `low` to `high` of them an image, often a little out of true."""
        n, wobble = self.log(low, high) / 2, self.noise(2.2) * max(self.uniform(-0.2, 0.2), 0.0)
        u, v = self.axes(self.angle(), self.uniform(-1, 1), self.uniform(-1, 1))
        return u * n + wobble, v * n * self.uniform(0.8, 1.25) - wobble

    def noise(self, slope: float, aspect: float = 1, angle: float = 0, band: float = 0) -> Array:
        """The spectrum is f^-slope, or lies around `band` cycles an image; aspect > 1 stretches it."""
        spectrum = np.fft.rfft2(self.rng.standard_normal((self.size, self.size), dtype=np.float32))
        fx, fy = (f(self.size, 1 / self.size).astype(np.float32) for f in (np.fft.rfftfreq, np.fft.fftfreq))
        u, v = _turn(fx, fy[:, None], angle)
        f = np.hypot(u, aspect * v)
        gain = (f / band) ** 2 * np.exp(-((f / band) ** 2)) if band else np.maximum(f, 1) ** -slope
        gain[0, 0] = 0
        return _unit(np.fft.irfft2(spectrum * gain, s=(self.size, self.size)).astype(np.float32))

    def texture(self, calm: float = 0.0) -> Array:
        """A coloured texture [3, size, size]; calm: odds of plain ground."""
        field = (_plain if self.maybe(calm) else self.one(TEXTURES[self.split]))(self)
        if self.maybe(0.3):  # lit from one side, as relief
            dy, dx = np.gradient(field)
            field = _unit(dx * self.normal() + dy * self.normal()) * min(float(field.std()), 1.0)
        if self.maybe(0.3):
            field = field + self.noise(self.uniform(0.3, 2)) * self.uniform(0.05, 0.5)
        base, tint = self.colour(), 1 + 0.7 * self.sat * self.normal(size=(3, 1, 1)).astype(np.float32)
        return np.clip(base + self.log(0.03, 0.3) * (base + 0.05) * tint * np.clip(field, -3, 3), 0, 1)

    def spot(self, zone: Array) -> tuple[float, float]:
        """x and y, -1 to 1, of a random pixel of the zone."""
        ys, xs = np.nonzero(zone if zone.any() else np.ones_like(zone))
        k = self.integers(len(ys))
        return float(2 * xs[k] + 1) / self.size - 1, float(2 * ys[k] + 1) / self.size - 1


# --- 2. textures: a height field of about unit deviation -------------------------------------------------
def _plain(p: Pencil) -> Array:
    return p.noise(p.uniform(0, 1.5)) * p.uniform(0, 0.25)


def _grain(p: Pencil) -> Array:
    """Noise in any form: cast, brushed and ground metal, cloud, leather, cork."""
    aspect, band = p.one({1: 1, p.log(3, 100): 1}), p.one({0: 1, p.uniform(6, 45): 1})
    field, form = p.noise(p.uniform(0, 2), aspect, p.angle(), band), p.integers(4)
    if form == 1:  # blobs or pits
        field = np.tanh((field - p.uniform(-1.5, 2)) * p.uniform(0.5, 4))
    elif form == 2:  # few strong strokes among many weak ones
        field = field * np.abs(field) ** p.uniform(0, 1.5)
    elif form == 3:  # ridges
        field = np.minimum(np.abs(field), p.uniform(0.2, 0.9))
    return _unit(field)


def _lines(p: Pencil) -> Array:
    """Tones along one coordinate, straight, bent or round: rolled and turned metal, wood, stripes."""
    angle = p.angle()
    u, v = p.axes(angle, p.normal() * 0.7, p.normal() * 0.7)
    u = (np.hypot(u, v) if p.maybe(0.3) else u) * p.log(2, 50)
    u = u + p.noise(2, p.uniform(1, 12), angle) * max(p.uniform(-1, 1), 0.0)
    tone = np.tanh((np.sin(2 * np.pi * u) - p.uniform(-0.7, 0.7)) * p.log(0.3, 6))
    if p.maybe(0.5):
        profile = np.cumsum(p.normal(size=512)) * p.uniform(0, 0.4) + p.normal(size=512)
        tone = np.interp(3 * u, np.arange(-256, 256), profile).astype(np.float32)
    return _unit(tone + p.noise(0.6, 8, angle) * p.uniform(0, 0.7))


def _cells(p: Pencil) -> Array:
    """A lattice, strict or loose: tiles, scales, stones, dots, weaves."""
    u, v = p.frame(4, 32)
    a, b = np.floor(u).astype(int), np.floor(v).astype(int)
    if p.maybe(0.3):
        step, across = int(p.integers(1, 4)), np.abs(np.sin(np.pi * v)) * p.uniform(0.4, 1)
        return _unit(np.where((a + step * b) % (step + 1) < 1, np.abs(np.sin(np.pi * u)), across))
    loose = max(p.uniform(-0.4, 0.4), 0.0)
    jitter = p.uniform(0.5 - loose, 0.5 + loose, (2, 64, 64)).astype(np.float32)
    jitter[0, 1::2] += 0.5 * p.integers(2)
    tones = p.uniform(0, p.uniform(0, 1), (64, 64)).astype(np.float32)
    first = second = tone = np.full(u.shape, 9, np.float32)
    for i, j in np.ndindex(3, 3):
        at = (b + j - 1) & 63, (a + i - 1) & 63
        d = np.hypot(u - a - i + 1 - jitter[0][at], v - b - j + 1 - jitter[1][at])
        tone = np.where(d < first, tones[at], tone)
        first, second = np.minimum(first, d), np.minimum(second, np.maximum(first, d))
    dots, joints = np.tanh((first - 0.3) * p.uniform(6, 30)), np.minimum((second - first) * 5, 1)
    return _unit((dots if p.maybe(0.35) else joints) + tone)


def _program(p: Pencil) -> Array:
    """A random expression of other families, so that every call is a family of its own: Baradad et al.,
    "Procedural image programs for representation learning", NeurIPS 2022."""
    operations = [np.multiply, np.maximum, lambda a, b: np.sin(2.5 * a + b), lambda a, b: abs(a) - abs(b)]
    leaves = {_grain: 0.5, _lines: 0.25, _cells: 0.25}
    field = p.one(leaves)(p)
    for _ in range(int(p.integers(1, 4))):
        field = _unit(operations[p.integers(4)](field, p.one(leaves)(p)))
    return field


def _knit(p: Pencil) -> Array:
    u, v = p.frame(8, 30)
    slant = np.abs(u % 1 - 0.5) * p.uniform(0.6, 1.6)
    return _unit(np.abs(np.sin(np.pi * (v + slant))) ** 0.6 * np.abs(np.sin(2 * np.pi * u)) ** 0.4)


def _corduroy(p: Pencil) -> Array:
    u, v = p.frame(6, 26)
    return _unit(np.abs(np.sin(np.pi * u)) * (1 + p.uniform(0.1, 0.6) * np.sin(v * p.uniform(6, 20))))


TEXTURES = {
    TRAIN: {_plain: 0.15, _grain: 0.3, _lines: 0.15, _cells: 0.15, _program: 0.25},
    SELECT: {_plain: 0.2, _corduroy: 0.8},
    REPORT: {_plain: 0.2, _knit: 0.8},
}


# --- 3. scenes -------------------------------------------------------------------------------------------
def _box(x: Array, y: Array, w: float, h: float, r: float) -> Array:
    a, b = np.abs(x) - w + r, np.abs(y) - h + r
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - r


# Signed distances, below 0 inside, to a width w, a roundness r and a count n.
OUTLINES = {
    TRAIN: [
        lambda x, y, w, r, n: _box(x, y, 1, w, r * w),  # plate, pill
        lambda x, y, w, r, n: np.abs(np.hypot(x, y) - 1 + w / 2) - w / 2,  # washer
        lambda x, y, w, r, n: np.max([_turn(x, y, 2 * np.pi * k / n)[0] for k in range(n)], 0) - 0.9,
        lambda x, y, w, r, n: np.hypot(x, y) - 0.92 - 0.08 * np.tanh(4 * np.cos(3 * n * np.arctan2(y, x))),
        lambda x, y, w, r, n: np.hypot(x, y / (0.5 + w / 2)) - 0.85 - r / 6 * np.cos(2 * x - n * y),  # pebble
        lambda x, y, w, r, n: np.minimum(_box(x, y - 0.3, w * 0.6, 0.7, r / 6), _box(x, y, 0.2, 1, 0.05)),
    ],
    SELECT: [lambda x, y, w, r, n: np.minimum(_box(x, y, 1, w / 3, r / 9), _box(x, y, w / 3, 1, r / 9))],
    REPORT: [
        lambda x, y, w, r, n: 0.6 * (np.hypot(x, y) - 0.7 - 0.25 * np.cos(n * np.arctan2(y, x))),  # flower
        lambda x, y, w, r, n: np.minimum(_box(x + 0.7, y, 0.3, 1, r / 5), _box(x, y - 0.7, 1, 0.3, r / 5)),
    ],
}


def _scene(p: Pencil) -> tuple[Array, Array, Array]:
    """A texture all over, or an object on a ground, or a grid of the same; what is behind; the zone."""
    back, skin = p.texture(0.7), p.texture(0.2)
    if p.maybe(0.45):
        return skin, back, np.ones((p.size, p.size), bool)
    n, (x, y) = p.one({1: 0.8, int(p.integers(2, 8)): 0.2}), p.axes()
    r = p.log(0.28, 1.2) if n == 1 else p.uniform(0.32, 0.46)  # of a cell
    far = max(r - 0.3, 0.05) if n == 1 else 0
    a, b = (x + 1) * n / 2 % 1 - 0.5 - far * p.normal(), (y + 1) * n / 2 % 1 - 0.5 - far * p.normal()
    u, v = _turn(a / r, b / r, p.angle())
    outline = OUTLINES[p.split][p.integers(len(OUTLINES[p.split]))]
    wide, soft = p.one({1: 0.3, p.uniform(0.3, 1): 0.7}), p.one({1: 0.3, p.uniform(0, 1): 0.7})
    d = outline(u, v, wide, soft, int(p.integers(3, 9)))
    lit, rim = 0.12 * (p.normal() * u + p.normal() * v), 0.25 * p.normal() * np.exp(-((d / 0.12) ** 2))
    body = skin * (1 + lit + rim)
    if p.maybe(0.25):  # steps that follow its border
        body = body * p.uniform(0.5, 1.3, 12).astype(np.float32)[np.clip(-d * 14, 0, 11).astype(int)]
    ground = back * (1 - max(p.uniform(-0.5, 0.5), 0.0) * np.clip(0.7 - 6 * d, 0, 1))
    img = ground + (body - ground) * np.clip(0.5 - d * (r * p.size / n), 0, 1)
    return np.clip(img, 0, 1), back, d < 0


# --- 4. fittings: what is normal though it happens once; on layers [..., 3, size, size] ------------------
def _bands(p: Pencil, img: Array) -> Array:
    """Straight bands right across, soft or sharp, also along sides or crossing: seams, glare, mounts."""
    turn, count, cross = p.angle(), p.one({1: 1, 2: 1, 4: 1}), p.maybe(0.4)
    wide, power, first = p.log(0.006, 0.5), p.log(2, 60), p.one({1: 1, p.uniform(-1, 1): 1})
    new = p.texture(0.7) if p.maybe(0.5) else img * p.uniform(0.1, 1.8)
    opaque = p.one({1.0: 0.5, p.uniform(0.1, 1): 0.5})
    for k in range(count):
        u, _ = p.axes(turn + np.pi / 2 * (k % 2 * cross))
        d = np.abs((u - first - 2 * (k // (1 + cross)) / count + 1) % 2 - 1) / wide
        img = img + opaque * np.exp(-(np.minimum(d, 4) ** power)) * (new - img)
    return img


def _circles(p: Pencil, img: Array) -> Array:
    """True circles or rings, alone or in symmetry: holes, screws, pins; all larger than spots."""
    a, b, r, rim = p.uniform(-0.8, 0.8), p.uniform(-0.8, 0.8), p.log(0.09, 0.3), p.normal() * 0.4
    ink, solid = p.colour(), p.maybe(0.75)
    for i, j in [(1, 1), (-1, 1), (1, -1), (-1, -1)][: p.one({1: 1, 2: 1, 4: 1})]:
        d = (np.hypot(*p.axes(0, a * i, b * j)) - r) * p.size / 2
        img = img * (1 + rim * np.exp(-((d / (2 + r * 8)) ** 2)))
        img = img + np.clip(0.5 - d, 0, 1) * solid * (ink - img)
    return img


def _boxes(p: Pencil, img: Array) -> Array:
    """Print, glyphs of one size in rows, or boxes of a few kinds strewn as on a circuit board."""
    img, text = img.copy(), p.maybe(0.5)
    fill, largest = (0.5, p.size // 12) if text else (1, p.size // 4)
    kinds = [(p.integers(3, largest, 2), p.colour()) for _ in range(1 if text else 4)]
    top, left, row = *p.integers(0, p.size // 2, 2), int(p.integers(4, 16))
    for k in range(int(p.integers(8, 40))):
        (h, w), ink = kinds[p.integers(len(kinds))]
        y, x = (top + k // row * (h + 3), left + k % row * (w + 2)) if text else p.integers(0, p.size, 2)
        at = img[..., y : y + h, x : x + w]
        glyph = np.kron(p.uniform(0, 1, (5, 3)) < fill, np.ones((1 + h // 5, 1 + w // 3), np.float32))
        at += glyph[: at.shape[-2], : at.shape[-1]] * (ink - at)
    return img


FITTINGS = {_bands: 0.6, _circles: 0.15, _boxes: 0.25}


# --- 5. defects: a picture, what shows where a piece is missing, the zone -> the picture changed ---------
def _region(p: Pencil, zone: Array, low: float, high: float, rough: float = 0.0) -> Array:
    """`low` to `high` of the image, as 0..1. Of rough 0 it is an ellipse: large ones are normal holes."""
    r, aspect = 2 * (p.log(low, high) / np.pi) ** 0.5, p.log(1, 1.7)
    u, v = p.axes(p.uniform(0, np.pi), *p.spot(zone))
    d = np.hypot(u / (r * aspect), v / r * aspect) + rough * min(1.0, r * 3) * p.noise(1.6)
    return np.clip((1 - d) / max(p.log(0.05, 0.8), 2 / (r * p.size)) + 0.5, 0, 1)


def _curve(p: Pencil, zone: Array, length: float, width: float, jag: float, bend: float, step=1) -> Array:
    """A random walk, or a bead at every so many of its steps, as 0..1; length and width in pixels of 160."""
    n, sigma, (x, y) = int(length * p.size / 80) + 4, max(width * p.size / 320, 0.5), p.spot(zone)
    turns = p.normal(size=n) * (0.03 + jag * (p.uniform(0, 1, n) < 0.2)) + p.normal() * bend / n
    way = np.cumsum(np.exp(1j * (p.uniform(0, 6.3) + np.cumsum(turns))))[::step] / p.size
    field = np.zeros((p.size + 2, p.size + 2), np.float32)  # its border takes what leaves the image
    at = [np.clip((c + 1) * p.size / 2 + 1, 0, p.size + 1).astype(int) for c in (y + way.imag, x + way.real)]
    field[tuple(at)] = 1
    return np.clip(_blur(field[1:-1, 1:-1], sigma) * (3 * sigma if step == 1 else 9 * sigma**2), 0, 1)


def _ink(p: Pencil, img: Array, alpha: Array) -> Array:
    """The picture with another colour laid over it, mostly towards where there is room."""
    here = (img * alpha).sum((1, 2), keepdims=True) / (alpha.sum() + 1e-6)
    delta = p.log(0.08, 0.6) * (1 if p.maybe(0.8 if here.mean() < 0.4 else 0.3) else -1)
    colour = np.clip(here + delta * (1 + 1.2 * p.sat * p.normal(size=(3, 1, 1))), 0, 1)
    return img + alpha * (colour - img)


def _line(p: Pencil, img: Array, back: Array, zone: Array) -> Array:
    """Scratches, cracks with forks, frayed fibres."""
    kind, alpha = p.integers(3), np.zeros(zone.shape, np.float32)
    jag, bend, count = [(0, 0.8, 1), (0.7, 0.5, p.integers(1, 5)), (0.1, 5, p.integers(1, 12))][kind]
    length, width = p.log(*[(11, 140), (16, 110), (8, 40)][kind]), p.log(0.8, 3.5)
    for k in range(count):
        shorter = 0.4 if k and kind == 1 else 1
        near = _blur(alpha, 3) > 0.05 if k else zone
        alpha = np.maximum(alpha, _curve(p, near, length * shorter, width, jag, bend))
    return _ink(p, img, alpha)


def _spots(p: Pencil, img: Array, back: Array, zone: Array) -> Array:
    """Small true ellipses: pores, drops, grains of dirt."""
    count = p.one({1: 0.55, 2: 0.2, 4: 0.15, 7: 0.1})
    return _ink(p, img, np.max([_region(p, zone, 0.0004, 0.006) for _ in range(count)], 0))


def _patch(p: Pencil, img: Array, back: Array, zone: Array) -> Array:
    """An area that is stained, shaded, worn, smeared, out of place, of another stuff or gone."""
    kind, new = p.integers(7), back
    rim = zone & (_blur(zone, 2) < 0.7)
    at = rim if kind == 0 and rim.any() else zone  # a chip is at the border
    alpha = _region(p, at, 0.003, 0.35 if kind > 4 else 0.1, p.uniform(0.1, 0.4))
    if kind == 1:
        new = p.texture()
    elif kind == 2:
        new = np.roll(np.rot90(img, p.integers(4), (1, 2)), p.integers(p.size // 8, p.size, 2), (1, 2))
    elif kind == 3:
        new = _blur(img, p.size / 160 * p.log(2, 12))
    elif kind == 4:
        grain = p.noise(p.uniform(0, 0.8), p.log(1, 6), p.uniform(0, 3))
        new = img + p.log(0.08, 0.4) * grain + p.normal() * 0.08
    elif kind == 5:
        tint = 1 + p.sat * p.normal(size=(3, 1, 1))
        new = img * (1 + p.log(0.12, 0.7) * p.one({-1: 1, 1: 1}) * tint)
    elif kind == 6:
        return _ink(p, img, alpha * p.uniform(0.5, 1))
    return img + alpha * (new - img)


def _blister(p: Pencil, img: Array, back: Array, zone: Array) -> Array:
    """A bump or a dent: one flank in the light, the other in its own shadow."""
    r, (u, v) = p.log(0.05, 0.22), p.axes(p.uniform(0, 2 * np.pi), *p.spot(zone))
    return img * (1 + p.uniform(1, 3) * u / r * np.exp(-(u * u + v * v) / r**2))


def _burn(p: Pencil, img: Array, back: Array, zone: Array) -> Array:
    """Scorched: a dark core that fades outwards."""
    alpha = _blur(_region(p, zone, 0.002, 0.05, 0.3), p.size / 40)
    return img * (1 - alpha * (0.6 + 0.4 * alpha))


def _beads(p: Pencil, img: Array, back: Array, zone: Array) -> Array:
    """A chain of small round inclusions."""
    width, step = p.uniform(1.5, 3), int(p.integers(10, 30))
    return _ink(p, img, _curve(p, zone, p.uniform(15, 60), width, 0.1, p.normal(), step))


DEFECTS = {TRAIN: {_line: 3, _spots: 2, _patch: 5}, SELECT: {_blister: 1}, REPORT: {_burn: 1, _beads: 1}}


# --- 6. the camera, and what can be seen through it ------------------------------------------------------
def _camera(p: Pencil, img: Array) -> Camera:
    """One way of taking pictures: light, exposure for this picture, blur, noise, the same at every call."""
    (x, y), tilt = p.axes(), p.one({0: 0.4, 0.13: 0.5, 0.4: 0.1})
    light = 1 + tilt * (p.normal() * x + p.normal() * y - abs(p.normal()) * (x * x + y * y))
    shade = p.noise(3.5, p.log(1, 4), p.angle()) * max(p.uniform(-0.8, 0.5), 0.0)  # what ends is a stain
    light = np.clip(light, 0.1, 1.6) * np.exp(shade) * p.log(0.5, 1.35)
    if p.maybe(0.7):  # most cameras set their own
        bright = float(np.quantile((img * light)[:, ::4, ::4], 0.97))
        light = light * (p.uniform(0.45, 0.98) / max(bright, 0.02))
    sigma, gamma = p.size / 160 * p.log(0.4, 1.2), p.uniform(0.75, 1.35)
    noise = p.rng.standard_normal((3 if p.sat else 1, p.size, p.size), dtype=np.float32) * p.log(0.001, 0.025)
    return lambda img: np.clip(np.clip(_blur(img * light, sigma), 0, 1) ** gamma + noise, 0, 1)


def _visible(clean: Array, dirty: Array) -> Array:
    """Where a change of tone or roughness stands out against the texture around it, made solid."""
    unit, seen = clean.shape[-1] / 160, False
    for sigma in (0.3, 2):
        a, b = _blur(clean, sigma * unit), _blur(dirty, sigma * unit)
        grey = np.stack([a, b]).mean(1)
        rough, rougher = np.sqrt(_blur((grey - _blur(grey, 4 * unit)) ** 2, 4 * unit))
        seen = seen | (np.abs(b - a).max(0) > 0.03 + 1.2 * rough)
        seen = seen | (np.abs(rougher - rough) > 0.02 + 0.5 * np.minimum(rough, rougher))
    region = _blur(np.abs(dirty - clean).max(0) > 0.02, unit) > 0.3
    return region & (_blur(region & seen, 1.8 * unit) > 0.4 * (_blur(region, 1.8 * unit) + 1e-3))


def _spoil(p: Pencil, img: Array, back: Array, zone: Array, shoot: Camera, count: int) -> Picture:
    """A picture with so many visible defects, fewer where nobody could see them; "good" without any."""
    clean = now = shoot(img)
    mask, kinds, unit = np.zeros(zone.shape, bool), set(), p.size / 160
    for _ in range(count):
        make = p.one(DEFECTS[p.split])
        for _ in range(3):
            spoilt = np.where(zone, np.clip(make(p, img, back, zone), 0, 1), img).astype(np.float32)
            seen = _visible(now, shoot(spoilt))
            if 8 * unit**2 < seen.sum() < 0.5 * zone.sum():
                # what nobody can see is taken back, or the mask would not be the whole truth
                img = img + _blur(_blur(seen, 1.5 * unit) > 0.05, unit) * (spoilt - img)
                mask, kinds, now = mask | seen, kinds | {make.__name__[1:]}, shoot(img)
                break
    mask |= np.abs(now - clean).max(0) > 0.03  # soft edges too
    kind = kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "good"
    return np.where(mask, now, clean), mask, kind


def sample(rng: np.random.Generator, size: int, split: int = TRAIN) -> Picture:
    """One image, uint8 [size, size, 3], its exact defect mask, bool [size, size], and the kind of its defect;
    normal: all False, "good"."""
    p = Pencil(rng, size, 0.0, split)
    p.sat = p.one({0.0: 0.4, p.uniform(0.02, 0.15): 0.45, p.uniform(0.15, 0.4): 0.15})
    img, back, zone = _scene(p)
    for _ in range(p.one({0: 0.45, 1: 0.3, 2: 0.15, 3: 0.1})):
        img, back = np.clip(p.one(FITTINGS)(p, np.stack([img, back])), 0, 1).astype(np.float32)
    count = p.one({0: 0.47, 1: 0.34, 2: 0.12, 3: 0.07})
    zone |= zone.mean() < 0.03
    img, mask, kind = _spoil(p, img, back, zone, _camera(p, img), count)
    return np.ascontiguousarray(np.rint(img * 255).astype(np.uint8).transpose(1, 2, 0)), mask, kind


def paint(rng: np.random.Generator, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A normal image, fp32 [3, size, size] in [0, 1], with one to three visible defects, and their mask, bool
    [size, size], empty where none could be seen. What train.py --synthetic trains on."""
    img = image.numpy()
    p = Pencil(rng, img.shape[-1], float(np.ptp(img, axis=0).mean()), TRAIN)
    back, zone, count = _blur(img, p.size / 8), np.ones(img.shape[1:], bool), p.one({1: 13, 2: 4, 3: 3})
    painted, mask, _ = _spoil(p, img, back, zone, lambda picture: picture, count)
    return torch.from_numpy(painted), torch.from_numpy(mask)
