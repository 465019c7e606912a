"""Draws procedural textures and objects with procedural defects; trains the bundled model on nothing else.

    python weights/tiny.py                        # train, choose the threshold, write the model, report
    python weights/tiny.py --report --data ROOT   # measure the model, also on a dataset of real images

No real image and no downloaded weight is used, and a picture is a function of (SEED, split, index) alone.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parent.parent))  # this script lies beside the module, not in it
from evaluate import PixelHistogram, image_metrics, read, read_dataset  # noqa: E402
from train import loss_terms  # noqa: E402
from visualad import (  # noqa: E402
    BACKBONES,
    Output,
    VisualAD,
    find_device,
    image_score,
    resize,
    smooth,
    upsample,
    write_atomic,
)  # fmt: skip

SEED = 111
TRAIN, SELECT, REPORT = 0, 1, 2  # disjoint splits: decisions are made on SELECT, REPORT is read once a model
SCALE = 8.0  # of map values in the loss: plain cosine differences saturate the sigmoid late
ATTENTION = ([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH])

Array = np.ndarray
Rng = np.random.Generator
Defect = tuple[Array, Array]  # the picture with the defect, and the pixels it may have touched


@dataclass
class Scene:
    """A drawn picture before the camera sees it: float32 [3, size, size] layers in about 0..1."""

    img: Array
    back: Array  # what shows where a part is missing
    zone: Array  # bool: where the inspected thing is
    sat: float  # 0: a grey picture
    regular: bool = False  # a strict pattern, in which a misplaced piece can be seen
    cells: Array | None = None  # int: which of the repeated objects a pixel belongs to, -1: none
    odd: tuple[Array, ...] = ()  # the same picture with every repeated object changed in one way


# ---- small tools


def _log_uniform(rng: Rng, low: float, high: float) -> float:
    """A number between low and high, each order of magnitude as likely as the next."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


@lru_cache(maxsize=128)
def _gauss(size: int, sigma: float) -> Array:
    """The Gaussian blur of one axis as a matrix: rows sum to one, so borders do not darken."""
    i = np.arange(size)
    k = np.exp(-0.5 * ((i[:, None] - i) / sigma) ** 2)
    return (k / k.sum(1, keepdims=True)).astype(np.float32)


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
    value = rng.uniform(0.12, 0.85) if value is None else value
    return np.clip(value * (1 + sat * rng.normal(size=(3, 1, 1))), 0.02, 0.98).astype(np.float32)


# ---- textures: a height field of about unit deviation. Add one: write a function, list it in TEXTURES.


def _plain(rng: Rng, size: int) -> Array:
    return _noise(rng, size, rng.uniform(0, 1.5)) * np.float32(rng.uniform(0, 0.25))


def _fractal(rng: Rng, size: int) -> Array:
    return _noise(rng, size, rng.uniform(0.4, 2))


def _grain(rng: Rng, size: int) -> Array:
    blobs = _noise(rng, size, 0, band=_log_uniform(rng, 6, 45))
    return _unit(np.tanh((blobs - np.float32(rng.uniform(-1.5, 2))) * np.float32(rng.uniform(0.5, 4))))


def _brushed(rng: Rng, size: int) -> Array:
    angle = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)])
    return _noise(rng, size, rng.uniform(0.3, 1.2), _log_uniform(rng, 5, 60), angle)


def _wood(rng: Rng, size: int) -> Array:
    angle = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)])
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


TEXTURES = [_plain, _fractal, _grain, _brushed, _wood, _leather, _voronoi, _stripes, _weave, _bricks, _dots]
TEXTURE_ODDS = np.array([0.26, 0.1, 0.08, 0.1, 0.07, 0.08, 0.05, 0.06, 0.09, 0.05, 0.06])
REGULAR = (_stripes, _weave, _bricks, _dots)


def _texture(rng: Rng, size: int, sat: float, calm: float = 0.0) -> tuple[Array, bool]:
    """A coloured texture [3, size, size], and whether it is a strict pattern; calm: odds of a plain one."""
    kind = _plain if rng.random() < calm else TEXTURES[rng.choice(len(TEXTURES), p=TEXTURE_ODDS)]
    field = kind(rng, size)
    if rng.random() < 0.25:
        field = field + _noise(rng, size, rng.uniform(0.3, 2)) * np.float32(rng.uniform(0.05, 0.5))
    base = _colour(rng, sat)
    step = _log_uniform(rng, 0.03, 0.3) * (base + 0.05) * (1 + 0.7 * sat * rng.normal(size=(3, 1, 1)))
    return np.clip(base + step.astype(np.float32) * np.clip(field, -3, 3), 0, 1), kind in REGULAR


# ---- objects: signed distances (below 0 inside), unit radius


def _box(x: Array, y: Array, w: float, h: float, r: float) -> Array:
    """Signed distance of a rounded box."""
    a, b = np.abs(x) - (w - r), np.abs(y) - (h - r)
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - r


def _outline(rng: Rng) -> Callable[[Array, Array], Array]:
    """A random silhouette as a signed distance function."""
    kind, a, n = rng.integers(9), rng.uniform(0.3, 1), int(rng.integers(3, 9))
    r, p = rng.uniform(0.02, 0.4), rng.uniform(0, 6.3, 5)
    if kind <= 1:
        return lambda x, y: np.hypot(x, y) - 1
    if kind == 2:
        return lambda x, y: _box(x, y, 1, a, r * a)
    if kind == 3:
        return lambda x, y: _box(x, y, 1, a * 0.6, a * 0.6)
    if kind == 4:
        return lambda x, y: np.max([_turn(x, y, 2 * np.pi * k / n)[0] for k in range(n)], 0) - 0.85
    if kind == 5:
        teeth = int(rng.integers(6, 24))
        return lambda x, y: np.hypot(x, y) - 0.92 - 0.08 * np.tanh(4 * np.cos(teeth * np.arctan2(y, x)))
    if kind == 6:
        return lambda x, y: np.minimum(
            _box(x, y - 0.3, 0.5 * a + 0.1, 0.7, r * 0.5), _box(x, y, 0.2, 1, 0.05)
        )
    if kind == 7:
        return lambda x, y: (
            np.hypot(x, y / (0.5 + a / 2))
            - 0.85
            - sum(r * 0.3 / k * np.cos(k * np.arctan2(y, x) + p[k]) for k in range(2, 5))
        )
    return lambda x, y: np.minimum(
        _box(x, y + 0.85, 0.35, 0.15, 0.04), _box(x, y, 0.13 + 0.04 * np.abs((y * n * 3) % 1 - 0.5), 1, 0.02)
    )


def _object(rng: Rng, size: int, sat: float) -> Callable[[Array, Array, Array, float], tuple[Array, Array]]:
    """One object: draw(x, y, back, px) paints it at those coordinates, px pixels a unit; and its distance."""
    outline, (skin, _) = _outline(rng), _texture(rng, size, sat, 0.5)
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
    ink, printed, stretch = _colour(rng, sat * 1.5), rng.random() < 0.3, rng.uniform(0.5, 4)
    mark = rng.random((int(rng.integers(1, 9)), int(rng.integers(3, 14)))) < rng.uniform(0.3, 0.7)
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


# ---- scenes


def _bands(rng: Rng, img: Array) -> Array:
    """The picture with straight bands right across it, soft or sharp: seams and reflections are normal."""
    x, y = _axes(img.shape[-1])
    turn, count = rng.choice([0, np.pi / 2, rng.uniform(0, np.pi)]), int(rng.choice([1, 2, 4]))
    for _ in range(count):
        u, _ = _turn(x, y, turn + rng.normal() * 0.02)
        d = (u - rng.uniform(-1, 1)) / _log_uniform(rng, 0.012, 0.4)
        profile = np.exp(-(d**2)) if rng.random() < 0.6 else np.clip(0.5 - d * rng.uniform(0.3, 8), 0, 1)
        img = img * (1 + np.float32(rng.normal() * 0.25) * profile)
    return np.clip(img, 0, 1).astype(np.float32)


def _surface(rng: Rng, size: int, sat: float) -> Scene:
    """A texture that fills the image."""
    img, regular = _texture(rng, size, sat)
    if rng.random() < 0.3:
        img = _bands(rng, img)
    return Scene(img, _texture(rng, size, sat, 0.8)[0], np.ones((size, size), bool), sat, regular)


def _single(rng: Rng, size: int, sat: float) -> Scene:
    """One to three objects on a background."""
    back = img = _texture(rng, size, sat, 0.65)[0]
    zone, (x, y) = np.zeros((size, size), bool), _axes(size)
    count = int(rng.choice([1, 2, 3], p=[0.8, 0.12, 0.08]))
    draw, turn = _object(rng, size, sat), rng.choice([0, np.pi / 2, rng.uniform(0, 6.3)])
    for k in range(count):
        r = rng.uniform(0.55, 1) if count == 1 else 0.42
        t = 2 * np.pi * k / count + turn
        far = rng.uniform(0, 0.15) if count == 1 else 0.52
        u, v = _turn(x - far * np.cos(t), y - far * np.sin(t), turn + (count > 1) * rng.uniform(0, 6.3))
        img, d = draw(u / r, v / r, img, r * size / 2)
        zone |= d < 0
    return Scene(img, back, zone, sat)


def _array(rng: Rng, size: int, sat: float) -> Scene:
    """The same object again and again in a grid; `odd` holds the ways in which one may differ."""
    back = _texture(rng, size, sat, 0.8)[0]
    n, (x, y) = int(rng.integers(2, 8)), _axes(size)
    draw, turn = _object(rng, size, sat), rng.choice([0, np.pi / 2, rng.uniform(0, 6.3)])
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
        _object(rng, size, sat)(u, v, back, px)[0],
    )
    return Scene(img, back, d < 0, sat, False, cells, odd)


def _part(rng: Rng, size: int, sat: float) -> Scene:
    """A part that fills most of the image and leaves a strip of background at one or two sides."""
    (img, regular), back = _texture(rng, size, sat), _texture(rng, size, sat, 0.7)[0]
    if rng.random() < 0.4:
        img = _bands(rng, img)
    turn, (x, y) = rng.choice([0, 1, 2, 3]) * np.pi / 2 + rng.normal() * 0.15, _axes(size)
    u, v = _turn(x, y, turn)
    wave = 0.04 * np.sin(v * rng.uniform(2, 9) + rng.uniform(0, 6)) * (rng.random() < 0.4)
    d = u - rng.uniform(0.2, 0.85) + wave
    if rng.random() < 0.4:
        d = np.maximum(d, (-u if rng.random() < 0.5 else v) - rng.uniform(0.3, 0.9))
    rim = 1 + rng.normal() * 0.25 * np.exp(-((d / rng.uniform(0.02, 0.2)) ** 2))
    cover = np.clip(0.5 - d * size / 2, 0, 1).astype(np.float32)
    return Scene((back + (img * rim - back) * cover).astype(np.float32), back, d < 0, sat, regular)


def _board(rng: Rng, size: int, sat: float) -> Scene:
    """Boxes, discs and lines of a few kinds strewn on a plain ground, as on a circuit board."""
    img = _texture(rng, size, sat, 0.8)[0]
    back, (x, y) = img.copy(), _axes(size)
    kinds = [(rng.integers(2, size // 4, 2), _colour(rng, sat), rng.random() < 0.3) for _ in range(4)]
    for _ in range(int(rng.integers(4, 26))):
        (w, h), ink, round_ = kinds[rng.integers(4)]
        if rng.random() < 0.3:
            w, h = (size, rng.integers(1, 4)) if rng.random() < 0.5 else (rng.integers(1, 4), size)
        a, b = rng.integers(-4, size - 4, 2).clip(0)
        at = np.s_[:, b : b + h, a : a + w]
        if round_ and w < size > h:
            disc = np.hypot(x[at[1:]] - x[0, a] - w / size, y[at[1:]] - y[b, 0] - w / size) < w / size
            img[at] = np.where(disc, ink, img[at])
        else:
            img[at] = ink + 0.3 * (img[at] - img[at].mean((1, 2), keepdims=True))
    return Scene(img, back, np.ones((size, size), bool), sat)


SCENES, SCENE_ODDS = [_surface, _single, _array, _part, _board], [0.42, 0.32, 0.1, 0.11, 0.05]


# ---- defects: (scene, strength) to a changed picture. Add one: write a function, list it in DEFECTS.


def _spot_in(rng: Rng, zone: Array) -> tuple[int, int]:
    """A random pixel (y, x) of the zone."""
    inside = np.flatnonzero(zone)
    k = int(inside[rng.integers(len(inside))]) if len(inside) else zone.size // 2
    return k // zone.shape[1], k % zone.shape[1]


def _region(
    rng: Rng, scene: Scene, low: float, high: float, rough: float, soft: float, zone: Array | None = None
) -> Array:
    """An irregular region, `low` to `high` of the image, as 0..1 with an edge `soft` radii wide."""
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
    tone = 1 + 1.2 * scene.sat * rng.normal(size=(3, 1, 1))
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
        near = tuple(int(c + rng.normal() * 6) for c in at)
        alpha = np.maximum(alpha, _curve(rng, size, near, length, width, 0, rng.normal() * 0.8))
    alpha *= scene.zone
    img, region = _mixed(scene, alpha, _ink(rng, scene, alpha, 0.08, 0.5, gain))
    if rng.random() < 0.3:
        # a groove has a lit flank beside its dark one
        flank = np.roll(alpha, 1, (0, 1)) * (1 - alpha) * scene.zone
        img, region = img + flank * (scene.img.mean() - img.mean() + 0.15), region | (flank > 0.3)
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
    alpha = _region(rng, scene, 0.003, 0.12, rng.uniform(0.1, 0.35), rng.uniform(0.05, 0.6))
    if rng.random() < 0.25:
        # a dried drop leaves mostly its border
        alpha = alpha * (1.1 - _blur(alpha, scene.zone.shape[0] / 50))
    return _mixed(scene, alpha * rng.uniform(0.5, 1), _ink(rng, scene, alpha, 0.07, 0.4, gain))


def _shade(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.02, 0.15, 0.2, rng.uniform(0.3, 0.8))
    factor = 1 + min(gain * rng.uniform(0.12, 0.4), 0.7) * rng.choice([-1, 1])
    return np.clip(_mixed(scene, alpha, scene.img * np.float32(factor))[0], 0, 1), alpha > 0.3


def _tint(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.003, 0.1, 0.25, rng.uniform(0.05, 0.4))
    shift = rng.normal(size=(3, 1, 1)) * 0.12 * gain
    return _mixed(scene, alpha, np.clip(scene.img + (shift if scene.sat else shift[:1] * 1.3), 0, 1))


def _paste(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.003, 0.12, rng.choice([0, 0.25]), 0.1)
    size = alpha.shape[0]
    img = np.rot90(scene.img, rng.integers(4), (1, 2))[:, :: rng.choice([-1, 1])]
    img = np.roll(img, rng.integers(size // 8, size - size // 8, 2), (1, 2))
    return _mixed(scene, alpha, np.clip(img + rng.normal() * 0.05 * (gain - 0.5), 0, 1))


def _foreign(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.001, 0.12, rng.uniform(0, 0.3), rng.uniform(0.05, 0.2))
    return _mixed(scene, alpha, _texture(rng, alpha.shape[0], max(scene.sat, 0.3) if scene.sat else 0)[0])


def _erase(rng: Rng, scene: Scene, gain: float) -> Defect:
    alpha = _region(rng, scene, 0.002, 0.08, rng.choice([0, 0.2]), 0.08)
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
    if scene.cells is None:
        return _spots(rng, scene, gain)
    cell = scene.cells == scene.cells[_spot_in(rng, scene.zone & (scene.cells >= 0))]
    img = scene.odd[rng.integers(len(scene.odd))]
    return np.where(cell, img, scene.img), cell & (np.abs(img - scene.img).max(0) > 0.03)


DEFECTS = [
    (_scratch, 0.15), (_crack, 0.08), (_fray, 0.05), (_spots, 0.16), (_stain, 0.11), (_shade, 0.04),
    (_tint, 0.06), (_paste, 0.08), (_foreign, 0.09), (_erase, 0.06), (_chip, 0.06),
    (_smear, 0.03), (_warp, 0.03),
]  # fmt: skip
DEFECT_ODDS = np.array([odds for _, odds in DEFECTS]) / sum(odds for _, odds in DEFECTS)


# ---- the camera, and what can be seen through it


def _camera(rng: Rng, size: int, sat: float) -> Callable[[Array], Array]:
    """One way of taking a picture: light, blur, exposure, noise and blockiness, the same at every call."""
    x, y = _axes(size)
    light = np.ones((size, size), np.float32)
    if rng.random() < 0.6:
        a, b, c = rng.normal(size=3) * 0.13
        light = np.clip(1 + a * x + b * y - abs(c) * (x * x + y * y), 0.25, 1.6).astype(np.float32)
    light = light * np.float32(_log_uniform(rng, 0.5, 1.35))
    sigma = size / 160 * rng.choice([0.45, 0.6, 0.8, 1.3], p=[0.3, 0.35, 0.25, 0.1])
    gamma = np.float32(rng.uniform(0.75, 1.35))
    noise = rng.standard_normal((3 if sat else 1, size, size), dtype=np.float32)
    noise = noise * np.float32(_log_uniform(rng, 0.001, 0.025))
    step, i = rng.uniform(0.02, 0.1), np.arange(8)
    dct = np.cos(np.pi / 8 * (i + 0.5) * i[:, None]) * np.where(i[:, None], 0.5, 0.5 / np.sqrt(2))
    blocky = rng.random() < 0.12 and size % 8 == 0
    basis = np.kron(np.eye(size // 8), dct).astype(np.float32) if blocky else None

    def shoot(img: Array) -> Array:
        img = np.clip(_blur(img * light, sigma), 0, 1) ** gamma + noise
        if basis is not None:
            img = basis.T @ (np.round(basis @ img @ basis.T / step) * step).astype(np.float32) @ basis
        return np.clip(img, 0, 1)

    return shoot


def _visible(clean: Array, dirty: Array, region: Array, regular: bool) -> Array:
    """The part of the region in which the change stands out against the texture around it, made solid."""
    size = region.shape[0]
    diff = dirty - clean
    region = region | (_blur(np.abs(diff).max(0), 1) > 0.02)
    ys, xs = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    if not len(ys):
        return region
    pad = size // 10
    near = np.s_[:, max(ys[0] - pad, 0) : ys[-1] + pad, max(xs[0] - pad, 0) : xs[-1] + pad]
    k = 0.7 if regular else 1.5
    seen = np.zeros((size, size), bool)

    def beyond(change: Array, plain: Array, window: tuple, floor: float) -> Array:
        # medians, because an object's border in the window is not texture
        around = plain[window].reshape(len(plain), -1)[:, ::3]
        spread = 1.48 * np.median(np.abs(around - np.median(around, 1, keepdims=True)), 1)
        return (np.abs(change) > floor + k * spread[:, None, None]).any(0)

    seen |= beyond(diff, clean, near, 0.035)
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


def _spoil(rng: Rng, scene: Scene, shoot: Callable[[Array], Array], clean: Array) -> tuple[Scene, Array]:
    """The scene with one visible defect and its mask, empty after three attempts that nobody could see."""
    size = scene.zone.shape[0]
    make = DEFECTS[rng.choice(len(DEFECTS), p=DEFECT_ODDS)][0]
    if scene.cells is not None and rng.random() < 0.5:
        make = _odd_one
    for gain in (1.0, 1.6, 2.5):
        img, region = make(rng, scene, gain)
        img = np.clip(img, 0, 1).astype(np.float32)
        mask = _visible(clean, shoot(img), region, scene.regular)
        if 8 * (size / 160) ** 2 < mask.sum() < 0.25 * size * size:
            # what nobody can see is taken back, or the mask would not be the whole truth
            keep = _blur((_blur(mask.astype(np.float32), 1.5) > 0.05).astype(np.float32), 1)
            return replace(scene, img=scene.img + keep * (img - scene.img)), mask
    return scene, np.zeros((size, size), bool)


def sample(rng: Rng, size: int) -> tuple[Array, Array]:
    """One image, uint8 [size, size, 3], and its exact defect mask, bool [size, size]; all False: normal."""
    sat = float(rng.choice([0, rng.uniform(0.02, 0.15), rng.uniform(0.15, 0.5)], p=[0.4, 0.4, 0.2]))
    scene = SCENES[rng.choice(len(SCENES), p=SCENE_ODDS)](rng, size, sat)
    if scene.zone.mean() < 0.03:
        scene = replace(scene, zone=np.ones((size, size), bool))
    shoot, mask = _camera(rng, size, sat), np.zeros((size, size), bool)
    if rng.random() < 0.53:
        clean = shoot(scene.img)
        for _ in range(int(rng.choice([1, 2, 3], p=[0.65, 0.22, 0.13]))):
            scene, more = _spoil(rng, scene, shoot, clean)
            mask |= more
    img = np.rint(shoot(scene.img) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(img, (3, size, size)).transpose(1, 2, 0)), mask


def paint(rng: Rng, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A normal image, fp32 [3, size, size] in [0, 1], with one to three visible defects, and their mask, bool
    [size, size], empty where none could be seen. What train.py --synthetic trains on."""
    img = image.numpy()
    size = img.shape[-1]
    scene = Scene(img, _blur(img, size / 8), np.ones((size, size), bool), float(np.ptp(img, axis=0).mean()))
    mask = np.zeros((size, size), bool)
    for _ in range(int(rng.choice([1, 2, 3], p=[0.65, 0.22, 0.13]))):
        scene, more = _spoil(rng, scene, lambda picture: np.clip(picture, 0, 1), img)
        mask |= more
    painted = np.rint(np.clip(scene.img, 0, 1) * 255).astype(np.float32) / 255 if mask.any() else img
    mask |= np.abs(painted - img).max(axis=0) > 0.05  # soft edges too: the mask is the whole truth
    return torch.from_numpy(painted), torch.from_numpy(mask)


# ---- training


class Pictures(torch.utils.data.Dataset):
    """`count` procedural images of one split: [3, size, size] in [0, 1], and their masks."""

    def __init__(self, split: int, count: int, size: int):
        self.split, self.count, self.size = split, count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = sample(np.random.default_rng([SEED, self.split, index]), self.size)
        return torch.from_numpy(image).permute(2, 0, 1).float() / 255, torch.from_numpy(mask)


def loss(out: Output, mask: torch.Tensor) -> torch.Tensor:
    """The paper's loss, its map values multiplied by SCALE."""
    out = out._replace(score=SCALE * out.score, layer_maps=SCALE * out.layer_maps)
    return loss_terms(out, mask.float(), mask.flatten(1).any(dim=1).float())["total"]


def train(images: int, batch: int, lr: float, workers: int, out: Path, held_out: int = 512) -> VisualAD:
    """Backbone, tokens, SCA and SAF from scratch; returns the average of the last steps' weights."""
    torch.manual_seed(SEED)
    device = find_device()
    model = VisualAD("tiny").requires_grad_(True).to(device)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # no picture is ever seen twice
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=matrices), dict(params=vectors, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.05)
    steps = images // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.04)
    pictures = Pictures(TRAIN, steps * batch, model.image_size)
    loader = torch.utils.data.DataLoader(pictures, batch, num_workers=workers)
    start, running = time.time(), 0.0
    for step, (x, mask) in enumerate(loader, 1):
        x, mask = x.to(device), mask.to(device)
        # On a CPU the fused attention's backward pass is the slowest part at this size.
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(ATTENTION[device == "cpu"]):
            result = model(x)
        value = loss(Output(*(t.float() for t in result)), mask)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        running += (value.item() - running) / min(step, 100)
        if step % 100 == 0:
            rate = step * batch / (time.time() - start)
            print(f"{step * batch:7d} images  loss {running:.4f}  {rate:.0f} images/s", flush=True)
        if step % 1000 == 0 or step == steps:
            print(report("select", average.module.infer, procedural(SELECT, held_out)), flush=True)
            save(average.module, out)
    return average.module


def save(model: VisualAD, out: Path) -> None:
    """One file, whole; the final norm was trained as the backbone's own, which is otherwise unused."""
    model.backbone.norm.load_state_dict(model.norm.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        write_atomic(out / "tiny.safetensors", (Path(folder) / "model.safetensors").read_bytes())


def decide(model: VisualAD, count: int = 2000) -> None:
    """Threshold and colour scale, from held-out procedural images: at most 5 % of the normal ones are above
    the threshold, and one in ten of the anomalous ones reaches the full colour."""
    normal, peaks = [], []
    for x, mask in procedural(SELECT, count):
        maps, scores = model.infer(x.to(model.tokens.device))
        anomalous = mask.any(dim=(1, 2)).to(maps.device)
        normal += scores[~anomalous].tolist()
        peaks += maps[anomalous].amax(dim=(1, 2)).tolist()
    value = sorted(normal)[math.ceil(0.95 * len(normal)) - 1]
    made = f"0.95 of {len(normal)} procedural normal images"
    model.threshold = dict(value=value, size=[model.image_size] * 2, sigma=4.0, made=made)
    model.display_high = max(float(np.quantile(peaks, 0.9)), 0.01)


# ---- measuring


Batches = Iterator[
    tuple[torch.Tensor, torch.Tensor]
]  # images at the network's size, masks at the image's own


def procedural(split: int, count: int) -> Batches:
    yield from torch.utils.data.DataLoader(Pictures(split, count, BACKBONES["tiny"].image_size), 32)


def real(root: Path) -> Batches:
    """Every test image of a dataset that evaluate.py reads."""
    size = [BACKBONES["tiny"].image_size] * 2
    for record in read_dataset(root)[1]:
        image, mask = read(record)
        yield resize(image, size)[None], mask[None]


def contrast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The baseline that learned nothing: the largest difference of Gaussians of the grey picture."""
    grey = x.mean(dim=1)
    maps = torch.stack([(smooth(grey, s) - smooth(grey, 3 * s)).abs() for s in (1, 2, 4)]).amax(dim=0)
    return maps, image_score(maps)


def report(name: str, method: Callable, batches: Batches, limit: float | None = None) -> str:
    """Image AUROC, pixel AUROC and pixel AP at the images' own size, in percent."""
    scores, labels, pixels, anomalous, seen = [], [], PixelHistogram(-4, 4), 0, 0
    for x, mask in batches:
        m, s = method(x.to(find_device()))
        scores += s.tolist()
        labels += mask.any(dim=(1, 2)).tolist()
        pixels.update(upsample(m[:, None], mask.shape[-2:])[:, 0].cpu(), mask)
        anomalous, seen = anomalous + int(mask.sum()), seen + mask.numel()
    label, score = np.array(labels), np.array(scores)
    flagged = ""
    if limit is not None:
        rates = [(score[label == kind] > limit).mean() for kind in (False, True)]
        flagged = f" | above the threshold: {rates[0]:.1%} of normal, {rates[1]:.1%} of anomalous"
    image, pixel = image_metrics(label, score), pixels.metrics()
    return (
        f"{name}: {len(label)} images, {label.sum()} anomalous, {anomalous / seen:.1%} of pixels | "
        f"image AUROC {100 * image['auroc']:.1f} | pixel AUROC {100 * pixel['auroc']:.1f} | "
        f"pixel AP {100 * pixel['ap']:.1f}{flagged}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="measure the bundled model instead of training")
    parser.add_argument("--data", type=Path, help="also measure on a dataset that evaluate.py reads")
    parser.add_argument("--images", type=int, default=160_000, help="how many to draw and train on")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of tiny.safetensors")
    args = parser.parse_args()
    if not args.report:
        model = train(args.images, args.batch, args.lr, args.workers, args.out)
        decide(model)
        save(model, args.out)
    model = VisualAD.from_pretrained(args.out / "tiny.safetensors", device=find_device())
    for name, method in (("tiny", model.infer), ("local contrast", contrast)):
        limit = model.threshold["value"] if name == "tiny" and model.threshold else None
        print(report(f"{name}, procedural", method, procedural(REPORT, 2000), limit))
        if args.data:
            print(report(f"{name}, {args.data.name}", method, real(args.data), limit))


if __name__ == "__main__":
    main()
