from __future__ import annotations

import io
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from safetensors.torch import load_file

import visualad
from visualad import Backbone, VisualAD

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would ignore it

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
CLIP, OFFICIAL = GOLDEN / "clip_openai.safetensors", GOLDEN / "visualad_official.pth"
SMALL = Backbone(64, 4, 1, 14, 4, image_size=56, layers=(2, 4))  # a DINOv2 that nobody hosts


def same(a: VisualAD | dict, b: VisualAD | dict) -> bool:
    """Whether two models, or two state dicts, hold the same tensors bit for bit."""
    a, b = (x.state_dict() if isinstance(x, VisualAD) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def picture(h: int = 90, w: int = 120, seed: int = 0) -> np.ndarray:
    """A smooth colour picture with a bright blob, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(60, 140, (6, 8, 3), dtype=np.uint8)).resize((w, h), Image.BICUBIC)
    pixels = np.array(small)
    pixels[h // 3 : h // 3 + 12, w // 2 : w // 2 + 12] = 250
    return pixels


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, RGB [H, W, 3] or grey [H, W], which Pillow cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    kind = 2 if pixels.ndim == 3 else 0
    head = struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, kind, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def tiff16(pixels: np.ndarray, photometric: int) -> bytes:
    """An uncompressed TIFF of 16 bits a channel; photometric: 0, white is zero; 1, black is zero; 2, RGB."""
    (h, w), n, tags = pixels.shape[:2], pixels[0, 0].size, TiffImagePlugin.ImageFileDirectory_v2()
    tags.update(
        {256: w, 257: h, 258: (16,) * n, 259: 1, 262: photometric, 277: n, 278: h, 279: pixels.nbytes}
    )
    tags[273] = 0  # the pixels start right behind: Pillow adds where that is
    return b"II*\0\x08\0\0\0" + tags.tobytes(8) + pixels.astype("<u2").tobytes()


def as_png(pixels: np.ndarray, **options) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "png", **options)
    return file.getvalue()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test sees the same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """What the authors' program printed; the README beside the file says how it was made."""
    return load_file(GOLDEN / "golden_clip.safetensors")


@pytest.fixture
def official() -> VisualAD:
    return VisualAD.from_pretrained(OFFICIAL, backbone_weights=CLIP)


@pytest.fixture
def listed(monkeypatch) -> Backbone:
    """The golden CLIP as a backbone that its own repository hosts, under the name "listed"."""
    where = dict(repo="org/clip", file="open_clip_model.safetensors")
    cfg = Backbone.from_weights(CLIP, layers=(2, 4), image_size=84, **where)
    monkeypatch.setitem(visualad.BACKBONES, "listed", cfg)
    return cfg


@pytest.fixture
def model() -> VisualAD:
    """A small random model, in eval mode."""
    return VisualAD(SMALL).eval()
