from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

import visualad
from visualad import Backbone, VisualAD

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
CLIP, OFFICIAL = GOLDEN / "clip_openai.safetensors", GOLDEN / "visualad_official.pth"
SMALL = Backbone(64, 4, 1, 14, 4, image_size=56, layers=(2, 4))  # a DINOv2 that nobody hosts


def same(a: VisualAD | dict, b: VisualAD | dict) -> bool:
    """Whether two models, or two state dicts, hold the same tensors bit for bit."""
    a, b = (x.state_dict() if isinstance(x, VisualAD) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def python(*arguments: object, folder: Path = ROOT, **env: str) -> str:
    """What Python prints, which must end well, in a folder, without this repository on the path."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | env
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ranks(n: int, *command: object, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """A program that torchrun started n times."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    options = dict(cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    return subprocess.run([*launch, *map(str, command)], **options)


def by_sklearn(truth: np.ndarray, values: np.ndarray) -> dict[str, float | None]:
    if truth.all() or not truth.any():
        return dict(auroc=None, f1_max=None, ap=None)
    precision, recall, _ = precision_recall_curve(truth, values)
    f1 = np.nan_to_num(2 * precision * recall / np.maximum(precision + recall, 1e-300))
    ap = average_precision_score(truth, values)
    return dict(auroc=roc_auc_score(truth, values), f1_max=f1.max(), ap=ap)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_mvtec(root: Path, **classes: dict[str, int]) -> Path:
    """MVTec's layout with so many images of each kind; those that are not good have two bright defects."""
    rng = np.random.default_rng(0)
    for cls, counts in classes.items():
        for kind, i in ((kind, i) for kind, count in counts.items() for i in range(count)):
            h, w = (int(side) for side in rng.integers(40, 90, 2))
            pixels, mask = rng.integers(90, 130, (h, w, 3), dtype=np.uint8), np.zeros((h, w), np.uint8)
            if kind != "good":
                mask[h // 4 : h // 4 + 10 + i, w // 3 : w // 3 + 12] = 255
                mask[-6:, -6:] = 255
                pixels[mask > 0] = 240
                write(root / cls / "ground_truth" / kind / f"{i:03}_mask.png", mask)
            write(root / cls / "test" / kind / f"{i:03}.png", pixels)
    return root


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
    tags.update({256: w, 257: h, 258: (16,) * n, 259: 1, 262: photometric, 277: n, 278: h})
    tags.update({273: 0, 279: pixels.nbytes})  # the pixels start right behind: Pillow adds where that is
    return b"II*\0\x08\0\0\0" + tags.tobytes(8) + pixels.astype("<u2").tobytes()


def as_png(pixels: np.ndarray, **options) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "png", **options)
    return file.getvalue()


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test sees the same random numbers in every run."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # which weights/tiny.py turns on


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
