"""Procedural pictures with procedural defects, all that the bundled model is trained and measured on.

    image, mask, kind = sample(np.random.default_rng(seed), size=160, split=TRAIN)

A picture is a scene (a surface, an object, an array, a part, a board) made of textures, with normal fittings
on it, in half of the cases with defects, seen through a camera. The splits share scenes, fittings and camera
but no family of texture (save plain grounds), of outline or of defect, so that SELECT and REPORT measure
transfer to other ones. To add a family, write a function and list it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

TRAIN, SELECT, REPORT = 0, 1, 2  # decisions are made on SELECT, REPORT is read once a model

Array = np.ndarray
Rng = np.random.Generator
Silhouette = Callable[[Array, Array], Array]  # x, y -> signed distance
Defect = tuple[Array, Array]  # the picture with the defect, and the pixels it may have touched


class Look(NamedTuple):
    """What all parts of one picture share."""

    sat: float  # of its colours; 0: a grey picture
    split: int  # whose families it is drawn from


@dataclass
class Scene:
    """A drawn picture before the camera sees it: float32 [3, size, size] layers in about 0..1."""

    img: Array
    back: Array  # what shows where a part is missing
    zone: Array  # bool: where the inspected thing is
    look: Look
    regular: bool = False  # a strict pattern, in which a misplaced piece can be seen
    cells: Array | None = None  # int: which of the repeated objects a pixel belongs to, -1: none
    odd: tuple[Array, ...] = ()  # the same picture with every repeated object changed in one way


# ---- small tools


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    """A number between low and high, each order of magnitude as likely as the next."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


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
    return k @ a @ k.T


@lru_cache(maxsize=8)
def _axes(size: int) -> tuple[Array, Array]:
    """x and y of every pixel, -1 to 1."""
    t = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    return np.broadcast_to(t, (size, size)), np.broadcast_to(t[:, None], (size, size))


def _turn(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    """The coordinates, rotated."""
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def _unit(a: Array) -> Array:
    """Zero mean, unit deviation."""
    return (a - a.mean()) / (a.std() + np.float32(1e-6))


def _noise(rng: Rng, size: int, slope: float, aspect: float = 1, angle: float = 0, band: float = 0) -> Array:
    """Noise with the spectrum f^-slope, or around `band` cycles an image; aspect > 1 stretches it."""
    spectrum = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
    fx = (np.fft.rfftfreq(size) * size).astype(np.float32)
    fy = (np.fft.fftfreq(size) * size).astype(np.float32)
    u, v = _turn(fx[None, :], fy[:, None], angle)
    f = np.sqrt(u * u + (aspect * v) ** 2)
    gain = (f / band) ** 2 * np.exp(-((f / band) ** 2)) if band else np.maximum(f, 1) ** np.float32(-slope)
    gain[0, 0] = 0
    return _unit(np.fft.irfft2(spectrum * gain, s=(size, size)).astype(np.float32))


def _frame(rng: Rng, size: int, low: float, high: float) -> tuple[Array, Array]:
    """Pattern coordinates in cells, `low` to `high` cells an image, often a little out of true."""
    n = _log_uniform(rng, low, high)
    x, y = _axes(size)
    angle = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)], p=[0.35, 0.15, 0.5])
    u, v = _turn(x, y, angle)
    u, v = u * np.float32(n / 2) + rng.random(), v * np.float32(n / 2 * rng.uniform(0.8, 1.25)) + rng.random()
    if rng.random() < 0.4:
        wobble = _noise(rng, size, 2.2) * np.float32(rng.uniform(0.02, 0.2))
        u, v = u + wobble, v - wobble
    return u.astype(np.float32), v.astype(np.float32)


def _hash(rng: Rng, u: Array, v: Array) -> Array:
    """A random number for every whole cell."""
    return rng.random((64, 64), dtype=np.float32)[np.floor(v).astype(int) & 63, np.floor(u).astype(int) & 63]


def _colour(rng: Rng, sat: float, value: float | None = None) -> Array:
    """A random colour [3, 1, 1] of about this saturation."""
    value = rng.uniform(0.15, 0.85) if value is None else value
    return np.clip(value * (1 + sat * rng.normal(size=(3, 1, 1))), 0.02, 0.98).astype(np.float32)


# ---- textures: a height field of about unit deviation. Add one: write a function, list it in TEXTURES.


def _angle(rng: Rng) -> float:
    """Mostly along an axis, as photographs of products are taken."""
    return float(rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)], p=[0.35, 0.25, 0.4]))


def _plain(rng: Rng, size: int) -> Array:
    return _noise(rng, size, rng.uniform(0, 1.5)) * np.float32(rng.uniform(0, 0.25))


def _fractal(rng: Rng, size: int) -> Array:
    return _noise(rng, size, rng.uniform(0.4, 2))


def _grain(rng: Rng, size: int) -> Array:
    blobs = _noise(rng, size, 0, band=_log_uniform(rng, 6, 45))
    return _unit(np.tanh((blobs - np.float32(rng.uniform(-1.5, 2))) * np.float32(rng.uniform(0.5, 4))))


def _brushed(rng: Rng, size: int) -> Array:
    return _noise(rng, size, rng.uniform(0.3, 1.2), _log_uniform(rng, 5, 60), _angle(rng))


def _ground(rng: Rng, size: int) -> Array:
    """Many scratches of every strength along one way, as grinding leaves them."""
    strokes = _noise(rng, size, rng.uniform(0, 0.6), _log_uniform(rng, 20, 120), _angle(rng))
    return _unit(np.sign(strokes) * np.abs(strokes) ** np.float32(rng.uniform(1, 2.5)))


def _rolled(rng: Rng, size: int) -> Array:
    """Bands and lines right across, each of one tone."""
    profile = np.repeat(_noise(rng, size, rng.uniform(0.2, 1.5))[:1], size, 0)
    grain = _noise(rng, size, 0.6, 6) * np.float32(rng.uniform(0, 0.7))
    return np.rot90(_unit(profile + grain), rng.integers(2)).copy()


def _turned(rng: Rng, size: int) -> Array:
    """Rings around a point, as a lathe leaves them."""
    x, y = _axes(size)
    r = np.hypot(x - np.float32(rng.normal() * 0.7), y - np.float32(rng.normal() * 0.7))
    profile = np.cumsum(rng.normal(size=512)) * rng.uniform(0, 0.4) + rng.normal(size=512)
    rings = np.interp(r * _log_uniform(rng, 8, 100), np.arange(512), profile).astype(np.float32)
    return _unit(rings + _noise(rng, size, 0.5) * np.float32(rng.uniform(0, 0.7)))


def _pitted(rng: Rng, size: int) -> Array:
    """Pits of one kind all over: cast metal, cork, sponge, dust."""
    field = _noise(rng, size, 0, band=_log_uniform(rng, 10, 40))
    pits = np.clip((field - np.float32(rng.uniform(1.2, 2.2))) * 3, 0, 1) * np.float32(rng.uniform(2, 6))
    return _noise(rng, size, rng.uniform(0.2, 1.5)) * np.float32(rng.uniform(0.1, 1)) - pits


def _wood(rng: Rng, size: int) -> Array:
    angle = _angle(rng)
    bend = _noise(rng, size, 2, rng.uniform(4, 12), angle)
    u, _ = _turn(*_axes(size), angle)
    rings = np.sin(u * np.float32(rng.uniform(8, 50)) + bend * np.float32(rng.uniform(0.5, 4)))
    return _unit(rings * np.float32(rng.uniform(0.2, 1)) + _noise(rng, size, 0.7, 25, angle))


def _leather(rng: Rng, size: int) -> Array:
    ridges = np.abs(_noise(rng, size, 0, rng.uniform(1, 1.6), rng.uniform(0, 3), _log_uniform(rng, 8, 35)))
    return _unit(np.minimum(ridges, np.float32(rng.uniform(0.2, 0.9))))


def _voronoi(rng: Rng, size: int) -> Array:
    u, v = _frame(rng, size, 5, 22)
    iu, iv = np.floor(u), np.floor(v)
    jitter = rng.uniform(0.1, 0.9, (2, 64, 64)).astype(np.float32)
    level = rng.random((64, 64), dtype=np.float32)
    first = second = np.full((size, size), 9, np.float32)
    value = np.zeros((size, size), np.float32)
    for k in range(9):
        a, b = iu + (k % 3 - 1), iv + (k // 3 - 1)
        at = b.astype(int) & 63, a.astype(int) & 63
        d = np.hypot(u - a - jitter[0][at], v - b - jitter[1][at])
        nearer = d < first
        second = np.where(nearer, first, np.minimum(second, d))
        first = np.where(nearer, d, first)
        value = np.where(nearer, level[at], value)
    wall = np.minimum((second - first) * np.float32(rng.uniform(2, 8)), 1)
    return _unit(wall * np.float32(rng.uniform(0, 1)) + value * np.float32(rng.uniform(0, 1)))


def _stripes(rng: Rng, size: int) -> Array:
    u, _ = _frame(rng, size, 4, 40)
    wave = np.sin(u * np.float32(2 * np.pi)) - np.float32(rng.uniform(-0.7, 0.7))
    return _unit(np.tanh(wave * np.float32(_log_uniform(rng, 0.3, 6))))


def _weave(rng: Rng, size: int) -> Array:
    u, v = _frame(rng, size, 12, 55)
    step = rng.integers(1, 4)
    over = (np.floor(u) + step * np.floor(v)) % (step + 1) < 1
    return _unit(np.where(over, np.abs(np.sin(np.pi * u)), np.abs(np.sin(np.pi * v)) * rng.uniform(0.4, 1)))


def _bricks(rng: Rng, size: int) -> Array:
    u, v = _frame(rng, size, 3, 16)
    u = u * np.float32(rng.choice([0.5, 1])) + np.float32(rng.choice([0, 0.5])) * (np.floor(v) % 2)
    gap = np.minimum(np.minimum(u % 1, 1 - u % 1), np.minimum(v % 1, 1 - v % 1))
    joint = np.minimum(gap / np.float32(rng.uniform(0.03, 0.12)), 1)
    return _unit(joint * np.float32(rng.choice([-1, 1])) + _hash(rng, u, v) * np.float32(rng.uniform(0, 0.6)))


def _dots(rng: Rng, size: int) -> Array:
    u, v = _frame(rng, size, 4, 26)
    u = u + np.float32(rng.choice([0, 0.5])) * (np.floor(v) % 2)
    d = np.hypot(u % 1 - 0.5, v % 1 - 0.5) - np.float32(rng.uniform(0.12, 0.4))
    return _unit(np.tanh(d * np.float32(rng.uniform(6, 30)))) * np.float32(rng.choice([-1, 1]))


def _program(rng: Rng, size: int) -> Array:
    """A random expression of noise, waves and cells, a family of its own at every call: many small programs
    teach more than many pictures of few. From Baradad et al., "Procedural image programs for representation
    learning", NeurIPS 2022."""

    def leaf() -> Array:
        kind = rng.integers(4)
        if kind == 0:
            return _noise(rng, size, rng.uniform(0, 2), _log_uniform(rng, 1, 20), _angle(rng))
        if kind == 1:
            return _noise(rng, size, 0, _log_uniform(rng, 1, 5), _angle(rng), _log_uniform(rng, 4, 40))
        u, v = _frame(rng, size, 3, 40)
        if kind == 2:
            cross = rng.choice([0, rng.uniform(0, 1)])
            return np.sin(2 * np.pi * u) + np.float32(cross) * np.sin(2 * np.pi * v)
        return _hash(rng, u, v) * 3 - np.float32(1.5)

    field = leaf()
    for _ in range(int(rng.choice([1, 2, 3], p=[0.3, 0.45, 0.25]))):
        other, op = leaf(), rng.integers(7)
        if op == 0:
            field = field * other
        elif op == 1:
            field = np.maximum(field, other)
        elif op == 2:
            field = np.where(other > rng.normal() * 0.5, field, np.float32(rng.normal()) * field)
        elif op == 3:
            field = np.sin(field * np.float32(rng.uniform(1, 4)) + other)
        elif op == 4:
            field = np.abs(field) - np.abs(other)
        elif op == 5:
            field = field + np.float32(rng.uniform(0.2, 1)) * other
        else:  # one bends the other
            i, j = np.mgrid[:size, :size]
            far = np.rint(_blur(other, size / 80) * size * rng.uniform(0.005, 0.06)).astype(int)
            field = field[(i + far) % size, (j - far) % size]
        field = _unit(field)
    return np.clip(field, -4, 4).astype(np.float32)


def _marble(rng: Rng, size: int) -> Array:
    veins = np.abs(_noise(rng, size, rng.uniform(1, 1.6), rng.uniform(1, 3), rng.uniform(0, 3)))
    return _unit(np.exp(-veins * np.float32(rng.uniform(2, 8))) + _noise(rng, size, 1.5) * np.float32(0.3))


def _hexagons(rng: Rng, size: int) -> Array:
    u, v = _frame(rng, size, 4, 24)
    v = v * np.float32(1 / np.sqrt(3))
    near = np.full(u.shape, 9, np.float32)
    for shift in (0, 0.5):
        a, b = (u + shift) % 1 - 0.5, ((v + shift) % 1 - 0.5) * np.float32(np.sqrt(3))
        near = np.minimum(near, np.maximum(np.abs(a), np.abs(a) / 2 + np.abs(b) * np.float32(np.sqrt(3) / 2)))
    return _unit(
        np.tanh((near - 0.5 + np.float32(rng.uniform(0.03, 0.12))) * np.float32(rng.uniform(15, 60)))
    )


def _ripples(rng: Rng, size: int) -> Array:
    (x, y), field = _axes(size), np.zeros((size, size), np.float32)
    for _ in range(int(rng.integers(2, 5))):
        u, _v = _turn(x, y, rng.uniform(0, np.pi))
        field += np.sin(u * np.float32(_log_uniform(rng, 8, 60)) + 2 * _noise(rng, size, 2.2))
    return _unit(field)


def _knit(rng: Rng, size: int) -> Array:
    u, v = _frame(rng, size, 8, 30)
    slant = np.abs(u % 1 - 0.5) * np.float32(rng.uniform(0.6, 1.6))
    return _unit(np.abs(np.sin(np.pi * (v + slant))) ** 0.6 * np.abs(np.sin(2 * np.pi * u)) ** 0.4)


def _terrazzo(rng: Rng, size: int) -> Array:
    field = _noise(rng, size, 0.4) * np.float32(rng.uniform(0.05, 0.3))
    for cells in (_log_uniform(rng, 4, 10), _log_uniform(rng, 10, 30)):
        u, v = _turn(*_axes(size), rng.uniform(0, 3))
        u, v = u * np.float32(cells / 2) + rng.random() + 32, v * np.float32(cells / 2) + rng.random() + 32
        a, b = u % 1 - _hash(rng, u, v), v % 1 - _hash(rng, u, v)
        chip = np.abs(a) + np.abs(b) + 0.4 * np.abs(a - b) < 0.55 * _hash(rng, u, v)
        field = np.where(chip, 3 * _hash(rng, u, v) - 1, field)
    return _unit(field)


def _corduroy(rng: Rng, size: int) -> Array:
    u, v = _frame(rng, size, 6, 26)
    ribs = np.abs(np.sin(np.pi * u)) * (
        1 + np.float32(rng.uniform(0.1, 0.6)) * np.sin(v * rng.uniform(6, 20))
    )
    return _unit(ribs + _noise(rng, size, 0.4) * np.float32(rng.uniform(0, 0.2)))


TEXTURES = {
    TRAIN: [
        (_plain, 0.2), (_fractal, 0.08), (_grain, 0.07), (_brushed, 0.08), (_ground, 0.08), (_rolled, 0.06),
        (_turned, 0.05), (_pitted, 0.06), (_wood, 0.06), (_leather, 0.06), (_voronoi, 0.04), (_stripes, 0.05),
        (_weave, 0.08), (_bricks, 0.05), (_dots, 0.05), (_program, 0.35),
    ],
    SELECT: [(_plain, 0.1), (_marble, 0.3), (_hexagons, 0.3), (_ripples, 0.3)],
    REPORT: [(_plain, 0.1), (_knit, 0.3), (_terrazzo, 0.3), (_corduroy, 0.3)],
}  # fmt: skip
REGULAR = (_stripes, _weave, _bricks, _dots, _hexagons, _knit, _corduroy)


def _draw(rng: Rng, odds: list[tuple[Callable, float]]) -> Callable:
    """One of the functions, by its odds."""
    weights = np.array([weight for _, weight in odds])
    return odds[rng.choice(len(odds), p=weights / weights.sum())][0]


def _texture(rng: Rng, size: int, look: Look, calm: float = 0.0) -> tuple[Array, bool]:
    """A coloured texture [3, size, size], and whether it is a strict pattern; calm: odds of a plain one."""
    kind = _plain if rng.random() < calm else _draw(rng, TEXTURES[look.split])
    field = kind(rng, size)
    if look.split == TRAIN and rng.random() < 0.3:  # stronger here than there
        field = field * np.exp(_noise(rng, size, 3) * np.float32(rng.uniform(0.1, 0.5)))
    if rng.random() < 0.3:
        # lit from one side, as relief
        light = rng.normal(size=2)
        dy, dx = np.gradient(field)
        field = _unit(dx * np.float32(light[0]) + dy * np.float32(light[1])) * np.minimum(field.std(), 1)
    if rng.random() < 0.25:
        field = field + _noise(rng, size, rng.uniform(0.3, 2)) * np.float32(rng.uniform(0.05, 0.5))
    base = _colour(rng, look.sat)
    step = _log_uniform(rng, 0.03, 0.3) * (base + 0.05) * (1 + 0.7 * look.sat * rng.normal(size=(3, 1, 1)))
    return np.clip(base + step.astype(np.float32) * np.clip(field, -3, 3), 0, 1), kind in REGULAR


# ---- objects: signed distances (below 0 inside), unit radius. To add one, list it in OUTLINES.


def _box(x: Array, y: Array, w: float, h: float, r: float) -> Array:
    """Signed distance of a rounded box."""
    a, b = np.abs(x) - (w - r), np.abs(y) - (h - r)
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - r


class Form(NamedTuple):
    """The measures that a silhouette picks from."""

    slim: float
    round: float
    count: int
    phases: Array


def _disc(rng: Rng, f: Form) -> Silhouette:
    return lambda x, y: np.hypot(x, y) - 1


def _plate(rng: Rng, f: Form) -> Silhouette:
    return lambda x, y: _box(x, y, 1, f.slim, f.round * f.slim)


def _pill(rng: Rng, f: Form) -> Silhouette:
    return lambda x, y: _box(x, y, 1, f.slim * 0.6, f.slim * 0.6)


def _polygon(rng: Rng, f: Form) -> Silhouette:
    turns = [2 * np.pi * k / f.count for k in range(f.count)]
    return lambda x, y: np.max([_turn(x, y, turn)[0] for turn in turns], 0) - 0.85


def _gear(rng: Rng, f: Form) -> Silhouette:
    teeth = int(rng.integers(6, 24))
    return lambda x, y: np.hypot(x, y) - 0.92 - 0.08 * np.tanh(4 * np.cos(teeth * np.arctan2(y, x)))


def _bottle(rng: Rng, f: Form) -> Silhouette:
    return lambda x, y: np.minimum(
        _box(x, y - 0.3, 0.5 * f.slim + 0.1, 0.7, f.round * 0.5), _box(x, y, 0.2, 1, 0.05)
    )


def _pebble(rng: Rng, f: Form) -> Silhouette:
    def distance(x: Array, y: Array) -> Array:
        way = np.arctan2(y, x)
        bumps = sum(f.round * 0.3 / k * np.cos(k * way + f.phases[k]) for k in range(2, 5))
        return np.hypot(x, y / (0.5 + f.slim / 2)) - 0.85 - bumps

    return distance


def _screw(rng: Rng, f: Form) -> Silhouette:
    def distance(x: Array, y: Array) -> Array:
        shaft = _box(x, y, 0.13 + 0.04 * np.abs((y * f.count * 3) % 1 - 0.5), 1, 0.02)
        return np.minimum(_box(x, y + 0.85, 0.35, 0.15, 0.04), shaft)

    return distance


def _cross(rng: Rng, f: Form) -> Silhouette:
    return lambda x, y: np.minimum(
        _box(x, y, 1, f.slim * 0.4, f.round * 0.3), _box(x, y, f.slim * 0.4, 1, f.round * 0.3)
    )


def _drop(rng: Rng, f: Form) -> Silhouette:
    return lambda x, y: np.hypot(x, y * (0.7 + f.slim)) - 0.55 + 0.4 * y


def _flower(rng: Rng, f: Form) -> Silhouette:
    return lambda x, y: 0.6 * (np.hypot(x, y) - 0.7 - 0.25 * np.cos(f.count * np.arctan2(y, x)))


def _bracket(rng: Rng, f: Form) -> Silhouette:
    return lambda x, y: np.minimum(
        _box(x + 0.75, y, 0.2, 1, f.round * 0.3), _box(x, y - 0.75, 0.95, 0.2 + f.slim * 0.1, f.round * 0.3)
    )


OUTLINES = {
    TRAIN: [_disc, _disc, _plate, _pill, _polygon, _gear, _bottle, _pebble, _screw],
    SELECT: [_cross, _drop],
    REPORT: [_flower, _bracket],
}


def _outline(rng: Rng, split: int) -> Silhouette:
    """A random silhouette of the split."""
    kind = OUTLINES[split][rng.choice(len(OUTLINES[split]))]
    slim, count = rng.uniform(0.3, 1), int(rng.integers(3, 9))
    return kind(rng, Form(slim, rng.uniform(0.02, 0.4), count, rng.uniform(0, 6.3, 5)))


def _object(rng: Rng, size: int, look: Look) -> Callable[[Array, Array, Array, float], tuple[Array, Array]]:
    """One object: draw(x, y, back, px) paints it at those coordinates, px pixels a unit; and its distance."""
    outline, (skin, _) = _outline(rng, look.split), _texture(rng, size, look, 0.5)
    light, shadow, rim = (
        rng.normal(size=2) * 0.12,
        rng.uniform(0, 0.5) * (rng.random() < 0.5),
        rng.normal() * 0.25,
    )
    bands = np.where(rng.random(12) < 0.5, 1, rng.uniform(0.5, 1.3, 12)).astype(np.float32)
    banded, holes = (
        rng.random() < 0.25,
        int(rng.choice([0, 1, 2, 3, 4, 6], p=[0.66, 0.14, 0.05, 0.05, 0.05, 0.05])),
    )
    hole_r, hole_at = (
        rng.uniform(0.08, 0.5 if holes == 1 else 0.15),
        0 if holes == 1 else rng.uniform(0.35, 0.6),
    )
    ink, printed, stretch = _colour(rng, look.sat * 1.5), rng.random() < 0.3, rng.uniform(0.5, 4)
    mark = rng.random((int(rng.integers(1, 9)), int(rng.integers(3, 14)))) < rng.uniform(0.3, 0.7)
    mark |= mark[:, ::-1]  # symmetry tells a print from a stain
    mark_w = rng.uniform(0.15, 0.5)

    def draw(x: Array, y: Array, back: Array, px: float) -> tuple[Array, Array]:
        d = outline(x, y)
        for k in range(holes):
            t = 2 * np.pi * k / holes
            d = np.maximum(d, hole_r - np.hypot(x - hole_at * np.cos(t), y - hole_at * np.sin(t)))
        body = skin * (1 + light[0] * x + light[1] * y + rim * np.exp(-((d / 0.12) ** 2)))
        if banded:
            body = body * bands[np.clip(-d * 14, 0, 11).astype(int)]
        if printed:
            w, h = mark.shape[1] / (2 * mark_w), mark.shape[0] / (2 * mark_w / stretch)
            i, j = np.floor((x + mark_w) * w).astype(int), np.floor((y + mark_w / stretch) * h).astype(int)
            on = (i >= 0) & (j >= 0) & (i < mark.shape[1]) & (j < mark.shape[0])
            on &= mark[j % mark.shape[0], i % mark.shape[1]]
            body = np.where(on, ink, body)
        if shadow:
            far = outline(x + 0.3 * light[0], y + 0.3 * light[1])
            back = back * (1 - shadow * np.clip(0.7 - far * 6, 0, 1))
        cover = np.clip(0.5 - d * px, 0, 1)
        return (back + (body - back) * cover).astype(np.float32), d

    return draw


# ---- fittings: what is normal though it happens once. Add one: write a function, list it in FITTINGS.


def _bands(rng: Rng, img: Array, look: Look) -> Array:
    """The picture with straight bands right across it, soft or sharp: seams and reflections are normal."""
    x, y = _axes(img.shape[-1])
    turn, count = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)]), int(rng.choice([1, 2, 4]))
    for _ in range(count):
        u, _ = _turn(x, y, turn + rng.normal() * 0.02)
        d = (u - rng.uniform(-1, 1)) / _log_uniform(rng, 0.012, 0.4)
        profile = np.exp(-(d**2)) if rng.random() < 0.6 else np.clip(0.5 - d * rng.uniform(0.3, 8), 0, 1)
        img = img * (1 + np.float32(rng.normal() * 0.25) * profile)
    return np.clip(img, 0, 1).astype(np.float32)


def _frame_strips(rng: Rng, img: Array, look: Look) -> Array:
    """Strips of another tone along one to four sides: the border of a part, a holder, a mount."""
    size = img.shape[-1]
    x, y = _axes(size)
    wide, soft = _log_uniform(rng, 0.02, 0.5), _log_uniform(rng, 1, size / 8)
    sides = rng.permutation([x, -x, y, -y])[: int(rng.choice([1, 2, 3, 4], p=[0.35, 0.3, 0.1, 0.25]))]
    lean, wave = rng.normal() * 0.03, _noise(rng, size, 2.2) * rng.uniform(0, 0.03) * (rng.random() < 0.5)
    same = rng.random() < 0.6
    d = (
        np.max([u - 1 + wide * (1 if same else rng.uniform(0.5, 2)) for u in sides], 0)
        + lean * (x + y)
        + wave
    )
    if len(sides) == 4 and rng.random() < 0.4:
        d = _box(x, y, 1 - wide / 2, 1 - wide / 2, rng.uniform(0.1, 0.9))  # rounded corners
    dimmed = np.float32(rng.uniform(0.1, 1.8)) * img
    strip = dimmed if rng.random() < 0.5 else _texture(rng, size, look, 0.7)[0]
    img = img + np.clip(0.5 + d * size / 2 / soft, 0, 1) * (strip - img)
    if rng.random() < 0.4:
        img = img * (1 + np.float32(rng.normal() * 0.4) * np.exp(-((d / _log_uniform(rng, 0.01, 0.15)) ** 2)))
    return np.clip(img, 0, 1)


def _corners(rng: Rng, img: Array, look: Look) -> Array:
    """Light that does not reach some corners or sides, or only reaches the middle."""
    x, y = _axes(img.shape[-1])
    turn, power = rng.uniform(0, 6.3), rng.uniform(1.5, 6)
    u, v = _turn(x - rng.normal() * 0.3, y - rng.normal() * 0.3, turn)
    r = (np.abs(u) ** power + np.abs(v * rng.uniform(0.3, 1)) ** power) ** (1 / power)
    dark = np.clip((r - rng.uniform(0.3, 1.1)) / _log_uniform(rng, 0.05, 1), 0, 1)
    return img * (1 - np.float32(rng.uniform(0.2, 0.95)) * dark)


def _uneven_light(rng: Rng, img: Array, look: Look) -> Array:
    """Shadows and glare with no sharp edge, as large as the image: what is smaller, or ends, is a stain."""
    field = _noise(rng, img.shape[-1], rng.uniform(3, 4), _log_uniform(rng, 1, 4), _angle(rng))
    return np.clip(img * np.exp(field * np.float32(rng.uniform(0.05, 0.4))), 0, 1)


def _grooves(rng: Rng, img: Array, look: Look) -> Array:
    """Straight lines from border to border, alone, in pairs or in a grid: seams, joints, cables, creases."""
    size = img.shape[-1]
    turn, ink = _angle(rng), _colour(rng, look.sat)
    lines, wide = int(rng.choice([1, 2, 3, 5])), size / 160 * _log_uniform(rng, 0.7, 5)
    grid, first, lit = rng.random() < 0.3, rng.uniform(-0.9, 0.9), rng.normal() * 0.2
    for way in (turn, turn + np.pi / 2)[: 1 + grid]:
        u, _ = _turn(*_axes(size), way)
        for k in range(lines):
            d = (u - first - k * 2 / lines + 2 * (first + k * 2 / lines > 1)) * size / 2
            img = img + np.clip((wide - np.abs(d)) / 2 + 0.5, 0, 1) * (ink - img)
            img = img * (1 + lit * np.clip((wide - np.abs(d - 1.5 * wide)) / 2 + 0.5, 0, 1))
    return np.clip(img, 0, 1).astype(np.float32)


def _holes(rng: Rng, img: Array, look: Look) -> Array:
    """One true circle or ring, or a few placed with symmetry: holes, screws, pins; larger than spots."""
    size, (x, y) = img.shape[-1], _axes(img.shape[-1])
    r, ink, rim = _log_uniform(rng, 0.09, 0.3), _colour(rng, look.sat), rng.normal() * 0.4
    a, b = rng.uniform(-0.8, 0.8, 2)
    mirror, ring = int(rng.integers(3)), rng.random() < 0.25
    at = [(a, b)] + [(-a, b)] * (mirror > 0) + [(a, -b), (-a, -b)] * (mirror > 1)
    for cx, cy in at:
        d = (np.hypot(x - cx, y - cy) - r) * size / 2
        img = img * (1 + rim * np.exp(-((d / (2 + r * 8)) ** 2)))
        if not ring:
            img = img + np.clip(0.5 - d, 0, 1) * (ink - img)
    return np.clip(img, 0, 1).astype(np.float32)


def _text(rng: Rng, img: Array, look: Look) -> Array:
    """Lines of print, a label or a bar code: glyphs of one size in a row."""
    size, ink = img.shape[-1], _colour(rng, look.sat)
    high, wide = int(rng.integers(3, size // 8)), int(rng.integers(2, size // 12))
    rows, length = int(rng.choice([1, 2, 4])), int(rng.integers(4, 20))
    gap, fill, pitch = max(wide // 3, 1), rng.uniform(0.35, 0.65), high + max(high // 3, 2)
    top = int(rng.integers(0, max(size - rows * pitch, 1)))  # whole where it fits: one glyph is a stain
    left = int(rng.integers(0, max(size - length * (wide + gap), 1)))
    out = img.copy()
    if rng.random() < 0.3:
        tall, long = rows * pitch, length * (wide + gap)
        out[:, max(top - 3, 0) : top + tall, max(left - 3, 0) : left + long] = _colour(rng, look.sat)
    for row in range(rows):
        for k in range(length):
            y, x = top + row * pitch, left + k * (wide + gap)
            if y + high > size or x + wide > size or x < 0 or rng.random() < 0.12:
                continue
            glyph = np.kron(rng.random((5, 3)) < fill, np.ones((1 + high // 5, 1 + wide // 3)))[:high, :wide]
            out[:, y : y + high, x : x + wide] += glyph * (ink - out[:, y : y + high, x : x + wide])
    return out.astype(np.float32)


def _specks(rng: Rng, img: Array, look: Look) -> Array:
    """Dozens of small marks of one kind all over: dust, sparkle, flakes, pores."""
    size = img.shape[-1]
    field, count = np.zeros((size, size), np.float32), int(_log_uniform(rng, 25, 300))
    field[tuple(rng.integers(0, size, (2, count)))] = rng.uniform(0.3, 1, count)
    sigma = size / 160 * _log_uniform(rng, 0.5, 2)
    field = np.clip(_blur(field, sigma) * (2 * np.pi * sigma**2), 0, 1)
    return img + field * np.float32(rng.uniform(0.2, 0.8)) * (_colour(rng, look.sat) - img)


FITTINGS = [
    (_bands, 0.2), (_frame_strips, 0.22), (_corners, 0.16), (_uneven_light, 0.16), (_grooves, 0.1),
    (_holes, 0.07), (_text, 0.05), (_specks, 0.06),
]  # fmt: skip


def _fitted(rng: Rng, scene: Scene) -> Scene:
    """The scene with up to three fittings, the same ones on what shows where a piece is missing or odd."""
    layers = [scene.img, scene.back, *scene.odd]
    for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.35, 0.35, 0.2, 0.1]))):
        fit, seed = _draw(rng, FITTINGS), rng.integers(2**63)
        layers = [fit(np.random.default_rng(seed), layer, scene.look) for layer in layers]
    img, back, *odd = (np.clip(layer, 0, 1).astype(np.float32) for layer in layers)
    return replace(scene, img=img, back=back, odd=tuple(odd))


# ---- scenes


def _surface(rng: Rng, size: int, look: Look) -> Scene:
    """A texture that fills the image."""
    img, regular = _texture(rng, size, look)
    return Scene(img, _texture(rng, size, look, 0.8)[0], np.ones((size, size), bool), look, regular)


def _single(rng: Rng, size: int, look: Look) -> Scene:
    """One to three objects on a background."""
    back = img = _texture(rng, size, look, 0.65)[0]
    zone, (x, y) = np.zeros((size, size), bool), _axes(size)
    count = int(rng.choice([1, 2, 3], p=[0.8, 0.12, 0.08]))
    draw, turn = _object(rng, size, look), rng.choice([0, np.pi / 2, rng.uniform(0, 6.3)])
    for k in range(count):
        r = rng.uniform(0.55, 1) if count == 1 else 0.42
        t = 2 * np.pi * k / count + turn
        far = rng.uniform(0, 0.15) if count == 1 else 0.52
        u, v = _turn(x - far * np.cos(t), y - far * np.sin(t), turn + (count > 1) * rng.uniform(0, 6.3))
        img, d = draw(u / r, v / r, img, r * size / 2)
        zone |= d < 0
    return Scene(img, back, zone, look)


def _array(rng: Rng, size: int, look: Look) -> Scene:
    """The same object again and again in a grid; `odd` holds the ways in which one may differ."""
    back = _texture(rng, size, look, 0.8)[0]
    n, (x, y) = int(rng.integers(2, 8)), _axes(size)
    draw, turn = _object(rng, size, look), rng.choice([0, np.pi / 2, rng.uniform(0, 6.3)])
    u, v = _turn(x, y, rng.choice([0, rng.uniform(-0.1, 0.1)]))
    u, v = u * n / 2 + n / 2, v * n / 2 + n / 2
    cells = np.floor(v).astype(int) * 100 + np.floor(u).astype(int)
    cells[(u < 0) | (v < 0) | (u >= n) | (v >= n)] = -1
    r = rng.uniform(0.32, 0.46)
    u, v = _turn(((u % 1) - 0.5) / r, ((v % 1) - 0.5) / r, turn)
    px = r * size / n
    img, d = draw(u, v, back, px)
    s = rng.choice([0.7, 0.8, 1.35])
    odd = (
        back,
        draw(*_turn(u, v, rng.uniform(0.3, 2.8)), back, px)[0],
        draw(u * s, v, back, px)[0],
        _object(rng, size, look)(u, v, back, px)[0],
    )
    return Scene(img, back, d < 0, look, False, cells, odd)


def _part(rng: Rng, size: int, look: Look) -> Scene:
    """A part that fills most of the image and leaves a strip of background at one or two sides."""
    (img, regular), back = _texture(rng, size, look), _texture(rng, size, look, 0.7)[0]
    turn, (x, y) = rng.choice([0, 1, 2, 3]) * np.pi / 2 + rng.normal() * 0.15, _axes(size)
    u, v = _turn(x, y, turn)
    wave = 0.04 * np.sin(v * rng.uniform(2, 9) + rng.uniform(0, 6)) * (rng.random() < 0.4)
    d = u - rng.uniform(0.2, 0.85) + wave
    if rng.random() < 0.4:
        d = np.maximum(d, (-u if rng.random() < 0.5 else v) - rng.uniform(0.3, 0.9))
    rim = 1 + rng.normal() * 0.25 * np.exp(-((d / rng.uniform(0.02, 0.2)) ** 2))
    cover = np.clip(0.5 - d * size / 2, 0, 1).astype(np.float32)
    return Scene((back + (img * rim - back) * cover).astype(np.float32), back, d < 0, look, regular)


def _board(rng: Rng, size: int, look: Look) -> Scene:
    """Boxes, discs and lines of a few kinds strewn on a plain ground, as on a circuit board."""
    img = _texture(rng, size, look, 0.8)[0]
    back, (x, y) = img.copy(), _axes(size)
    kinds = [(rng.integers(2, size // 4, 2), _colour(rng, look.sat), rng.random() < 0.3) for _ in range(4)]
    for _ in range(int(rng.integers(10, 30))):
        (w, h), ink, round_ = kinds[rng.integers(4)]
        h = w if round_ else h
        if rng.random() < 0.3:
            w, h = (size, rng.integers(1, 4)) if rng.random() < 0.5 else (rng.integers(1, 4), size)
        a, b = rng.integers(-4, size - 4, 2).clip(0)
        at = np.s_[:, b : b + h, a : a + w]
        if round_ and w < size > h:
            disc = np.hypot(x[at[1:]] - x[0, a] - w / size, y[at[1:]] - y[b, 0] - w / size) < w / size
            img[at] = np.where(disc, ink, img[at])
        else:
            img[at] = ink + 0.3 * (img[at] - img[at].mean((1, 2), keepdims=True))
    return Scene(img, back, np.ones((size, size), bool), look)


SCENES = [(_surface, 0.42), (_single, 0.3), (_array, 0.08), (_part, 0.14), (_board, 0.06)]


# ---- defects: (scene, strength, where it has one) to a changed picture. Write one and list it in DEFECTS.


def _spot_in(rng: Rng, zone: Array) -> tuple[int, int]:
    """A random pixel (y, x) of the zone."""
    inside = np.flatnonzero(zone)
    k = int(inside[rng.integers(len(inside))]) if len(inside) else zone.size // 2
    return k // zone.shape[1], k % zone.shape[1]


def _region(
    rng: Rng, scene: Scene, low: float, high: float, rough: float, soft: float, zone: Array | None = None
) -> Array:
    """A region, `low` to `high` of the image, as 0..1 with an edge `soft` radii wide. rough: at 0 it is a
    true ellipse, as a normal hole is, so that only what is smaller than holes may have it."""
    size = scene.zone.shape[0]
    cy, cx = _spot_in(rng, scene.zone if zone is None else zone)
    x, y = _axes(size)
    area, aspect = _log_uniform(rng, low, high), _log_uniform(rng, 1, 3)
    r = 2 * np.sqrt(area / np.pi)
    u, v = _turn(x - x[0, cx], y - y[cy, 0], rng.uniform(0, np.pi))
    d = np.hypot(u / (r * np.sqrt(aspect)), v / r * np.sqrt(aspect))
    if rough:
        d = d + rough * _noise(rng, size, 1.6) * min(1.0, r * 3)
    return np.clip((1 - d) / max(soft, 1 / (r * size / 2)) + 0.5, 0, 1).astype(np.float32) * scene.zone


def _ink(rng: Rng, scene: Scene, alpha: Array, low: float, high: float, gain: float) -> Array:
    """A colour darker or brighter than the picture under alpha, mostly towards where there is room."""
    here = (scene.img * alpha).sum((1, 2), keepdims=True) / (alpha.sum() + 1e-6)
    up = rng.random() < (0.8 if here.mean() < 0.4 else 0.3)
    delta = min(gain * _log_uniform(rng, low, high), 0.8) * (1 if up else -1)
    tone = 1 + 1.2 * scene.look.sat * rng.normal(size=(3, 1, 1))
    return np.clip(here + delta * tone, 0, 1).astype(np.float32)


def _mixed(scene: Scene, alpha: Array, colour: Array) -> Defect:
    """The picture with a colour or another picture laid over it."""
    return scene.img + alpha * (colour - scene.img), alpha > 0.3


def _curve(
    rng: Rng, size: int, start: tuple[int, int], length: float, width: float, jag: float, bend: float
) -> Array:
    """A random-walk curve that tapers at its ends, as 0..1."""
    n = max(int(length * 2), 4)
    jags = rng.normal(size=n) * jag * (rng.random(n) < 0.2)
    angle = rng.uniform(0, 6.3) + np.cumsum(rng.normal() * bend / n + rng.normal(size=n) * 0.03 + jags)
    y, x = start[0] + np.cumsum(np.sin(angle)) / 2, start[1] + np.cumsum(np.cos(angle)) / 2
    half = width / 2 * np.minimum(1, 0.4 + 4 * np.minimum(np.arange(n), np.arange(n)[::-1]) / n)
    k = int(width / 2 + 1.5)
    dy, dx = (o.ravel() for o in np.mgrid[-k : k + 1, -k : k + 1])
    py, px = np.floor(y)[:, None].astype(int) + dy, np.floor(x)[:, None].astype(int) + dx
    on = np.clip(half[:, None] + 0.5 - np.hypot(py - y[:, None], px - x[:, None]), 0, 1)
    ok = (py >= 0) & (px >= 0) & (py < size) & (px < size)
    out = np.zeros((size, size), np.float32)
    np.maximum.at(out, (py[ok], px[ok]), on[ok].astype(np.float32))
    return out


def _scratch(rng: Rng, scene: Scene, gain: float) -> Defect:
    size, alpha = scene.zone.shape[0], np.zeros(scene.zone.shape, np.float32)
    length, width = size * _log_uniform(rng, 0.07, 0.9), size / 160 * _log_uniform(rng, 0.8, 3.5)
    at = _spot_in(rng, scene.zone)
    for _ in range(int(rng.choice([1, 2, 4], p=[0.75, 0.15, 0.1]))):
        near = tuple(int(c + rng.normal() * size / 27) for c in at)
        alpha = np.maximum(alpha, _curve(rng, size, near, length, width, 0, rng.normal() * 0.8))
    alpha *= scene.zone
    img, region = _mixed(scene, alpha, _ink(rng, scene, alpha, 0.08, 0.5, gain))
    if rng.random() < 0.3:
        # a groove has a lit flank beside its dark one
        flank = np.pad(alpha, ((1, 0), (1, 0)))[:-1, :-1] * (1 - alpha) * scene.zone
        img, region = img + np.float32(0.15) * flank, region | (flank > 0.3)
    return img, region


def _crack(rng: Rng, scene: Scene, gain: float) -> Defect:
    size = scene.zone.shape[0]
    length, width = size * _log_uniform(rng, 0.1, 0.7), size / 160 * _log_uniform(rng, 1, 4)
    alpha = _curve(rng, size, _spot_in(rng, scene.zone), length, width, 0.7, 0.5)
    for _ in range(rng.integers(0, 4)):
        fork = _spot_in(rng, alpha > 0.5) if (alpha > 0.5).any() else _spot_in(rng, scene.zone)
        alpha = np.maximum(alpha, _curve(rng, size, fork, length / 3, width * 0.7, 0.7, 0.5))
    return _mixed(scene, alpha * scene.zone, _ink(rng, scene, alpha, 0.15, 0.6, gain))


def _fray(rng: Rng, scene: Scene, gain: float) -> Defect:
    size, at = scene.zone.shape[0], _spot_in(rng, scene.zone)
    alpha, long = np.zeros((size, size), np.float32), size * rng.uniform(0.05, 0.25)
    for _ in range(int(rng.choice([1, 6, 12]))):
        near = tuple(int(c + rng.normal() * long / 5) for c in at)
        alpha = np.maximum(alpha, _curve(rng, size, near, long, size / 160 * rng.uniform(1, 2), 0.1, 5))
    return _mixed(scene, alpha * scene.zone, _ink(rng, scene, alpha, 0.15, 0.6, gain))


def _spots(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha, img = np.zeros(scene.zone.shape, np.float32), scene.img
    for _ in range(int(rng.choice([1, 2, 4, 7], p=[0.55, 0.2, 0.15, 0.1]))):
        alpha = np.maximum(alpha, _region(rng, scene, 0.0004, 0.006, 0, rng.uniform(0.2, 1)))
    ink = _ink(rng, scene, alpha, 0.1, 0.7, gain)
    if rng.random() < 0.25:
        rim = np.clip(_blur(alpha, 1.5) * 2.5, 0, 1) * scene.zone
        img = img + rim * (np.clip(2 * img.mean() - ink, 0, 1) - img) * 0.5
        return img + alpha * (ink - img), (alpha > 0.3) | (rim > 0.4)
    return _mixed(scene, alpha, ink)


def _stain(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.003, 0.25, rng.uniform(0.15, 0.4), rng.uniform(0.05, 0.6))
    if rng.random() < 0.25:
        # a dried drop leaves mostly its border
        alpha = alpha * (1.1 - _blur(alpha, scene.zone.shape[0] / 50))
    return _mixed(scene, alpha * rng.uniform(0.5, 1), _ink(rng, scene, alpha, 0.07, 0.4, gain))


def _shade(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.02, 0.4, rng.uniform(0.1, 0.35), rng.uniform(0.15, 0.8))
    factor = 1 + min(gain * rng.uniform(0.12, 0.4), 0.7) * rng.choice([-1, 1])
    return np.clip(_mixed(scene, alpha, scene.img * np.float32(factor))[0], 0, 1), alpha > 0.3


def _tint(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.003, 0.3, 0.25, rng.uniform(0.05, 0.4))
    shift = rng.normal(size=(3, 1, 1)) * 0.12 * gain
    return _mixed(scene, alpha, np.clip(scene.img + (shift if scene.look.sat else shift[:1] * 1.3), 0, 1))


def _paste(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.003, 0.12, rng.choice([0.12, 0.3]), 0.1)
    size = alpha.shape[0]
    img = np.rot90(scene.img, rng.integers(4), (1, 2))[:, :: rng.choice([-1, 1])]
    img = np.roll(img, rng.integers(size // 8, size - size // 8, 2), (1, 2))
    return _mixed(scene, alpha, np.clip(img + rng.normal() * 0.05 * (gain - 0.5), 0, 1))


def _foreign(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.001, 0.12, rng.uniform(0.12, 0.35), rng.uniform(0.05, 0.2))
    look = scene.look._replace(sat=max(scene.look.sat, 0.3) if scene.look.sat else 0)
    return _mixed(scene, alpha, _texture(rng, alpha.shape[0], look)[0])


def _erase(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.002, 0.08, rng.choice([0.12, 0.3]), 0.08)
    flat = _blur(scene.img, alpha.shape[0] / 12) * rng.uniform(0.85, 1.1)
    return _mixed(scene, alpha, scene.back if rng.random() < 0.5 else flat)


def _chip(rng: Rng, scene: Scene, gain: float) -> Defect:
    border = scene.zone & (_blur(scene.zone.astype(np.float32), 2) < 0.7)
    if not border.any():
        return _erase(rng, scene, gain)
    return _mixed(scene, _region(rng, scene, 0.003, 0.05, rng.uniform(0.05, 0.3), 0.05, border), scene.back)


def _smear(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.005, 0.12, 0.2, 0.3)
    sigma = alpha.shape[0] / 160 * rng.uniform(2, 6) * gain
    k = _gauss(alpha.shape[0], round(sigma, 1))
    direction = rng.integers(3)
    img = scene.img if direction == 0 else scene.img @ k.T
    return _mixed(scene, alpha, img if direction == 1 else k @ img)


def _warp(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.01, 0.12, 0.1, 0.8)
    size = alpha.shape[0]
    py, px = np.nonzero(alpha > 0.02)
    a = alpha[py, px]
    if rng.random() < 0.5:
        turn, cy, cx = a * rng.choice([-1, 1]) * rng.uniform(0.6, 1.6) * gain, py.mean(), px.mean()
        dx, dy = px - cx, py - cy
        qx, qy = cx + np.cos(turn) * dx - np.sin(turn) * dy, cy + np.sin(turn) * dx + np.cos(turn) * dy
    else:
        qx, qy = px + a * rng.normal() * size / 18 * gain, py + a * rng.normal() * size / 18 * gain
    img = scene.img.copy()
    img[:, py, px] = scene.img[
        :, np.rint(qy).astype(int).clip(0, size - 1), np.rint(qx).astype(int).clip(0, size - 1)
    ]
    return img, alpha > 0.05


def _odd_one(rng: Rng, scene: Scene, gain: float) -> Defect:
    cell = scene.cells == scene.cells[_spot_in(rng, scene.zone & (scene.cells >= 0))]
    img = scene.odd[rng.integers(len(scene.odd))]
    return np.where(cell, img, scene.img), cell & (np.abs(img - scene.img).max(0) > 0.03)


def _rough(rng: Rng, scene: Scene, gain: float) -> Defect:
    """A worn area: coarse grain in place of the surface's own."""
    alpha = _region(rng, scene, 0.002, 0.15, 0.35, rng.uniform(0.05, 0.4))
    size = alpha.shape[0]
    grain = _noise(rng, size, rng.uniform(0, 0.8), _log_uniform(rng, 1, 6), rng.uniform(0, 3))
    step = _log_uniform(rng, 0.08, 0.3) * gain
    return _mixed(scene, alpha, np.clip(scene.img + step * grain + rng.normal() * 0.08, 0, 1))


def _strokes(rng: Rng, scene: Scene, gain: float) -> Defect:
    """A scuff: short strokes side by side."""
    alpha = _region(rng, scene, 0.003, 0.05, 0.2, 0.2)
    lines = _noise(rng, alpha.shape[0], 0, 15, rng.uniform(0, 3), rng.uniform(8, 30))
    alpha = alpha * np.clip(lines * 2 - 0.5, 0, 1)
    return _mixed(scene, alpha, _ink(rng, scene, alpha, 0.15, 0.6, gain))


def _splash(rng: Rng, scene: Scene, gain: float) -> Defect:
    """A drop with droplets thrown out around it."""
    size, (x, y) = scene.zone.shape[0], _axes(scene.zone.shape[0])
    cy, cx = _spot_in(rng, scene.zone)
    alpha, r = np.zeros((size, size), np.float32), _log_uniform(rng, 0.04, 0.15)
    for k in range(int(rng.integers(4, 12))):
        far, way, small = (
            (rng.uniform(1.2, 3) * r, rng.uniform(0, 6.3), rng.uniform(0.1, 0.4)) if k else (0, 0, 1)
        )
        d = np.hypot(x - x[0, cx] - far * np.cos(way), y - y[cy, 0] - far * np.sin(way)) - r * small
        alpha = np.maximum(alpha, np.clip(0.5 - d * size / 2, 0, 1))
    alpha *= scene.zone
    return _mixed(scene, alpha, _ink(rng, scene, alpha, 0.12, 0.5, gain))


def _blister(rng: Rng, scene: Scene, gain: float) -> Defect:
    """A bump or a dent: one flank in the light, the other in its own shadow."""
    x, y = _axes(scene.zone.shape[0])
    cy, cx = _spot_in(rng, scene.zone)
    r, (a, b) = _log_uniform(rng, 0.05, 0.22), rng.normal(size=2)
    u, v = (x - x[0, cx]) / r, (y - y[cy, 0]) / r
    flank = (a * u + b * v) / np.hypot(a, b) * np.exp(-(u * u + v * v)) * scene.zone
    return scene.img * (1 + np.float32(1.2 * gain) * flank), np.abs(flank) > 0.1


def _burn(rng: Rng, scene: Scene, gain: float) -> Defect:
    """Scorched: a dark core that fades outwards through brown."""
    alpha = _region(rng, scene, 0.002, 0.05, 0.3, 0.8)
    brown = np.array([0.5, 0.35, 0.25], np.float32)[:, None, None] if scene.look.sat else np.float32(0.35)
    burnt = np.clip(scene.img * brown * (1.3 - alpha), 0, 1)
    return _mixed(scene, np.minimum(alpha * np.float32(rng.uniform(0.5, 1) * gain), 1), burnt)


def _flake(rng: Rng, scene: Scene, gain: float) -> Defect:
    """A shard gone from the coat: straight edges, one of them lit."""
    size, (x, y) = scene.zone.shape[0], _axes(scene.zone.shape[0])
    cy, cx = _spot_in(rng, scene.zone)
    r, n, first = _log_uniform(rng, 0.03, 0.16), int(rng.integers(3, 6)), rng.uniform(0, 6.3)
    sides = [
        _turn(x - x[0, cx], y - y[cy, 0], first + 2 * np.pi * (k + rng.uniform(-0.3, 0.3)) / n)
        for k in range(n)
    ]
    d = np.max([u - r * rng.uniform(0.5, 1.2) for u, _ in sides], 0) * size / 2
    alpha = np.clip(0.5 - d, 0, 1) * scene.zone
    edge = np.exp(-((d / 1.2) ** 2)) * (sides[0][0] > 0) * scene.zone
    under = _ink(rng, scene, alpha, 0.08, 0.35, gain) + 0.3 * (scene.img - scene.img.mean())
    return _mixed(scene, alpha, under)[0] * (1 + 0.5 * edge), (alpha > 0.3) | (edge > 0.3)


def _ghost(rng: Rng, scene: Scene, gain: float) -> Defect:
    """Printed twice: a region shows a second, shifted copy of itself."""
    alpha = _region(rng, scene, 0.004, 0.08, 0.1, 0.1)
    shift = rng.integers(3, 3 + alpha.shape[0] // 16, 2) * rng.choice([-1, 1], 2)
    weight = min(0.35 * gain, 0.8)
    return _mixed(scene, alpha, (1 - weight) * scene.img + weight * np.roll(scene.img, shift, (1, 2)))


def _beads(rng: Rng, scene: Scene, gain: float) -> Defect:
    """A chain of small round inclusions."""
    size = scene.zone.shape[0]
    track = _curve(rng, size, _spot_in(rng, scene.zone), size * rng.uniform(0.1, 0.4), 1, 0.1, rng.normal())
    ys, xs = np.nonzero(track > 0.5)
    alpha, step = np.zeros((size, size), np.float32), int(rng.integers(6, 14) * size / 160)
    for cy, cx in zip(ys[::step], xs[::step], strict=True):
        x, y = _axes(size)
        d = np.hypot(x - x[0, cx], y - y[cy, 0]) * size / 2 - size / 160 * rng.uniform(1.2, 3)
        alpha = np.maximum(alpha, np.clip(0.5 - d, 0, 1))
    alpha *= scene.zone
    return _mixed(scene, alpha, _ink(rng, scene, alpha, 0.2, 0.6, gain))


DEFECTS = {
    TRAIN: [
        (_scratch, 0.15), (_crack, 0.09), (_fray, 0.05), (_spots, 0.18), (_stain, 0.1), (_shade, 0.08),
        (_tint, 0.05), (_paste, 0.07), (_foreign, 0.09), (_erase, 0.05), (_chip, 0.07), (_smear, 0.03),
        (_warp, 0.03), (_rough, 0.07),
    ],
    SELECT: [(_strokes, 1), (_splash, 1), (_blister, 1)],
    REPORT: [(_burn, 1), (_flake, 1), (_ghost, 1), (_beads, 1)],
}  # fmt: skip


# ---- the camera, and what can be seen through it


def _camera(rng: Rng, size: int, look: Look) -> Callable[[Array], Array]:
    """One way of taking a picture: light, blur, exposure, noise and blockiness, the same at every call."""
    x, y = _axes(size)
    light = np.ones((size, size), np.float32)
    if rng.random() < 0.6:
        a, b, c = rng.normal(size=3) * 0.13
        light = np.clip(1 + a * x + b * y - abs(c) * (x * x + y * y), 0.25, 1.6).astype(np.float32)
    light = light * np.float32(_log_uniform(rng, 0.5, 1.35))
    sigma = size / 160 * rng.choice([0.45, 0.6, 0.8, 1.3], p=[0.3, 0.35, 0.25, 0.1])
    gamma = np.float32(rng.uniform(0.75, 1.35))
    noise = rng.standard_normal((3 if look.sat else 1, size, size), dtype=np.float32)
    noise = noise * np.float32(_log_uniform(rng, 0.001, 0.025))
    step, i = rng.uniform(0.02, 0.1), np.arange(8)
    dct = np.cos(np.pi / 8 * (i + 0.5) * i[:, None]) * np.where(i[:, None], 0.5, 0.5 / np.sqrt(2))
    basis = (
        np.kron(np.eye(size // 8), dct).astype(np.float32) if rng.random() < 0.12 and size % 8 == 0 else None
    )
    exposure, bright = rng.random() < 0.7, rng.uniform(0.45, 0.98)  # most cameras set their own
    exposed: list[Array] = []

    def shoot(img: Array) -> Array:
        img = _blur(img * light, sigma)
        if exposure:
            exposed.append(np.float32(bright / max(np.quantile(img[:, ::4, ::4], 0.97), 0.02)))
            img = img * exposed[0]  # of the first picture: a defect does not change it
        img = np.clip(img, 0, 1) ** gamma + noise
        if basis is not None:
            img = basis.T @ (np.round(basis @ img @ basis.T / step) * step).astype(np.float32) @ basis
        return np.clip(img, 0, 1)

    return shoot


def _visible(clean: Array, dirty: Array, region: Array, regular: bool) -> Array:
    """The part of the region in which the change stands out against the texture around it, made solid."""
    size = region.shape[0]
    diff = dirty - clean
    region = region | (_blur(np.abs(diff).max(0), size / 160) > 0.02)
    ys, xs = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(ys):
        return region
    pad = size // 10
    near = np.s_[:, max(ys[0] - pad, 0) : ys[-1] + pad, max(xs[0] - pad, 0) : xs[-1] + pad]
    k = 0.8 if regular else 1.8
    seen = np.zeros((size, size), bool)

    def beyond(change: Array, plain: Array, window: tuple, floor: float) -> Array:
        # medians, because an object's border in the window is not texture
        around = plain[window].reshape(len(plain), -1)[:, ::3]
        spread = 1.48 * np.median(np.abs(around - np.median(around, 1, keepdims=True)), 1)
        return (np.abs(change) > floor + k * spread[:, None, None]).any(0)

    seen |= beyond(diff, clean, near, 0.045)
    # a texture exchanged for another shows in its averages over small areas and in its roughness
    half = clean[:, ::2, ::2], dirty[:, ::2, ::2]
    window = np.s_[:, near[1].start // 2 : near[1].stop // 2 + 1, near[2].start // 2 : near[2].stop // 2 + 1]
    for sigma in (size / 160, size / 60):
        a, b = (_blur(h, sigma) for h in half)
        wide = beyond(b - a, a, window, 0.025)
        rough = [np.sqrt(_blur((h - m).mean(0) ** 2, 2 * sigma)) for h, m in zip(half, (a, b), strict=True)]
        wide |= np.abs(rough[1] - rough[0]) > 0.02 + 0.4 * np.minimum(*rough)
        seen |= wide.repeat(2, 0).repeat(2, 1)[:size, :size]
    # solid: a pixel counts when a good part of the region around it is seen
    inside = region.astype(np.float32)
    share = _blur(inside * seen, size / 90) / (_blur(inside, size / 90) + 1e-3)
    return region & (share > 0.4)


def _spoil(rng: Rng, scene: Scene, shoot: Callable[[Array], Array], make: Callable) -> tuple[Scene, Array]:
    """The scene with one visible defect and its mask, empty after three attempts that nobody could see."""
    size, clean = scene.zone.shape[0], shoot(scene.img)
    for gain in (1.0, 1.6, 2.5):
        img, region = make(rng, scene, gain)
        img = np.clip(img, 0, 1).astype(np.float32)
        mask = _visible(clean, shoot(img), region, scene.regular)
        if 8 * (size / 160) ** 2 < mask.sum() < 0.5 * scene.zone.sum():
            # what nobody can see is taken back, or the mask would not be the whole truth
            soft = size / 160
            keep = _blur((_blur(mask.astype(np.float32), 1.5 * soft) > 0.05).astype(np.float32), soft)
            return replace(scene, img=scene.img + keep * (img - scene.img)), mask
    return scene, np.zeros((size, size), bool)


def sample(rng: Rng, size: int, split: int = TRAIN) -> tuple[Array, Array, str]:
    """One image, uint8 [size, size, 3], its exact defect mask, bool [size, size], and the kind of its defect;
    normal: all False, "good". In TRAIN the defects of one image are of several kinds: "mixed"."""
    sat = float(rng.choice([0, rng.uniform(0.02, 0.15), rng.uniform(0.15, 0.4)], p=[0.4, 0.45, 0.15]))
    scene = _fitted(rng, _draw(rng, SCENES)(rng, size, Look(sat, split)))
    if scene.zone.mean() < 0.03:
        scene = replace(scene, zone=np.ones((size, size), bool))
    shoot, mask, kind = _camera(rng, size, scene.look), np.zeros((size, size), bool), "good"
    if rng.random() < 0.53:
        make = _draw(rng, DEFECTS[split])
        for _ in range(int(rng.choice([1, 2, 3], p=[0.65, 0.22, 0.13]))):
            if split == TRAIN:
                odd = scene.cells is not None and rng.random() < 0.5
                make = _odd_one if odd else _draw(rng, DEFECTS[split])
            scene, more = _spoil(rng, scene, shoot, make)
            mask |= more
        if mask.any():
            kind = "mixed" if split == TRAIN else make.__name__[1:]
    img = np.rint(shoot(scene.img) * 255).astype(np.uint8)
    return np.ascontiguousarray(img.transpose(1, 2, 0)), mask, kind


def paint(rng: Rng, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A normal image, fp32 [3, size, size] in [0, 1], with one to three visible defects, and their mask, bool
    [size, size], empty where none could be seen. What train.py --synthetic trains on."""
    img = image.numpy()
    size = img.shape[-1]
    look = Look(float(np.ptp(img, axis=0).mean()), TRAIN)
    scene = Scene(img, _blur(img, size / 8), np.ones((size, size), bool), look)
    mask = np.zeros((size, size), bool)
    for _ in range(int(rng.choice([1, 2, 3], p=[0.65, 0.22, 0.13]))):
        make = _draw(rng, DEFECTS[TRAIN])
        scene, more = _spoil(rng, scene, lambda picture: np.clip(picture, 0, 1), make)
        mask |= more
    painted = np.rint(np.clip(scene.img, 0, 1) * 255).astype(np.float32) / 255 if mask.any() else img
    mask |= np.abs(painted - img).max(axis=0) > 0.05  # soft edges too: the mask is the whole truth
    return torch.from_numpy(painted), torch.from_numpy(mask)
