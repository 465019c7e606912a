"""The bundled model, the pictures it was trained on and the script that trains: pytest tests/test_tiny.py"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, python
from PIL import Image
from safetensors.torch import load_file

from visualad import VisualAD
from weights import pictures, tiny

SPLITS = (pictures.TRAIN, pictures.SELECT, pictures.REPORT)


def drawn(split, i, size=96):
    return pictures.sample(np.random.default_rng([1, split, i]), size, split)


# --- pictures --------------------------------------------------------------------------------------------
def test_a_picture_depends_on_seed_split_and_index_alone():
    x, mask = tiny.Pictures(pictures.TRAIN, range(3, 9), small=9)[4]
    np.random.seed(0)  # and on no global state
    again, same = tiny.Pictures(pictures.TRAIN, range(7, 8), small=8)[0]
    assert torch.equal(x, again) and torch.equal(mask, same)
    rng = np.random.default_rng([tiny.SEED, pictures.TRAIN, 7])
    assert np.array_equal(pictures.sample(rng, 160)[0] / np.float32(255), x.movedim(0, 2))
    for split, i in ((pictures.TRAIN, 8), (pictures.SELECT, 7)):
        assert not torch.equal(x, tiny.Pictures(split, range(i, i + 1), small=i + 1)[0][0])
    assert tiny.Pictures(pictures.TRAIN, range(9), small=7)[7][0].shape == (3, 224, 224) != x.shape


@pytest.mark.parametrize("split", SPLITS)
def test_half_of_the_pictures_have_a_defect_of_their_splits_kinds(split):
    samples = [drawn(split, i) for i in range(80)]
    assert all(image.shape == (96, 96, 3) and image.dtype == np.uint8 for image, _, _ in samples)
    masks = [mask for _, mask, _ in samples if mask.any()]
    assert 0.35 < len(masks) / len(samples) < 0.6 and max(mask.mean() for mask in masks) < 0.5
    own = {"good"} | {make.__name__[1:] for make in pictures.DEFECTS[split]}
    assert own <= {kind for _, _, kind in samples} <= own | {"mixed"}


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_outside_the_mask_changes_and_what_is_inside_does(split):
    inside = idle = 0
    for i in range(60):
        p = pictures.Pencil(np.random.default_rng([2, i]), 96, 0.2 * (i % 2), split)
        img, back, zone = pictures._scene(p)
        shoot = pictures._camera(p, img)
        clean, before = shoot(img), img.copy()
        dirty, mask, kind = pictures._spoil(p, img, back, zone, shoot, i % 4)
        assert np.array_equal(dirty[:, ~mask], clean[:, ~mask]) and np.array_equal(img, before)
        assert mask.any() == (kind != "good") and (i % 4 or not mask.any())
        inside, idle = inside + mask.sum(), idle + (np.abs(dirty - clean).max(0) < 0.01)[mask].sum()
    assert idle < 0.2 * inside


@pytest.mark.parametrize("side, seen", [(2, False), (20, True), (120, False)])
def test_what_nobody_could_see_or_mark_is_no_defect(side, seen, monkeypatch):
    """Two pixels, and more than half of the image."""

    def make(p, img, back, zone):
        return img + 0.5 * (np.indices(zone.shape).max(0) < side)

    p, img = pictures.Pencil(np.random.default_rng(0), 160, 0.0, 0), np.full((3, 160, 160), 0.4, np.float32)
    monkeypatch.setitem(pictures.DEFECTS, 0, {make: 1})
    spoilt, mask, _ = pictures._spoil(p, img, img, np.ones((160, 160), bool), lambda picture: picture, 1)
    assert mask.any() == seen and np.array_equal(spoilt, img) != seen
    assert not seen or (mask[:side, :side].all() and mask.sum() < 1.2 * side**2)


@pytest.mark.parametrize("split", SPLITS[1:])
def test_held_out_pictures_are_drawn_with_held_out_families_alone(split, monkeypatch):
    """Whatever path a picture takes, no function of another split runs."""
    tables, ran, outlines = (pictures.TEXTURES, pictures.DEFECTS), set(), pictures.OUTLINES[split]
    monkeypatch.setattr(pictures, "OUTLINES", {split: outlines})  # any other: KeyError
    others = {f.__name__ for table in tables for other in SPLITS if other != split for f in table[other]}
    sys.setprofile(lambda frame, event, _: ran.add(frame.f_code.co_name) if event == "call" else None)
    try:
        for i in range(60):
            drawn(split, i, 64)
    finally:
        sys.setprofile(None)
    assert ran & others == {"_plain"} and {f.__name__ for table in tables for f in table[split]} <= ran


@pytest.mark.parametrize("name", ["brick", "gravel"])
def test_paint_marks_all_that_it_changes_on_a_photograph(name):
    (path,) = (ROOT / "examples/normal").glob(f"{name}*")
    photo = np.asarray(Image.open(path).convert("RGB").resize((160, 160)), np.float32) / 255
    photo, painted = torch.from_numpy(photo).permute(2, 0, 1).contiguous(), 0
    original = photo.clone()
    for i in range(20):
        image, mask = pictures.paint(np.random.default_rng(i), photo)
        again, _ = pictures.paint(np.random.default_rng(i), photo)
        assert torch.equal(image, again) and torch.equal(photo, original)
        assert (image.dtype, mask.dtype) == (torch.float32, torch.bool)
        assert 0 <= image.min() and image.max() <= 1
        assert torch.equal(image[:, ~mask], photo[:, ~mask])
        changed = (image - photo).abs().amax(dim=0) > 0.01
        assert not mask.any() or changed[mask].float().mean() > 0.5
        painted += bool(mask.any())
    assert painted >= 15


# --- the script ------------------------------------------------------------------------------------------
@pytest.fixture
def small(monkeypatch):
    """A training that takes seconds, its state kept every third step."""
    decide = partial(tiny.decide, count=30)
    for name, value in dict(SIZES=(48, 64), WARM_UP=4, KEEP=3, AVERAGE=0.5, decide=decide).items():
        monkeypatch.setattr(tiny, name, value)
    return ["--images", "32", "--batch", "4", "--workers", "0"]


def test_the_command_trains_and_resumes_to_the_same_weights(small, monkeypatch, tmp_path, capsys):
    tiny.main([*small, "--out", str(tmp_path / "whole")])
    resumed, keep, read = [*small, "--out", str(tmp_path / "halves"), "--resume"], tiny.write_atomic, []

    def interrupted(path, data):
        keep(path, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.main(resumed)
    monkeypatch.setattr(tiny, "write_atomic", keep)
    monkeypatch.setattr(tiny, "sample", lambda *args: read.append(args[1:]) or pictures.sample(*args))
    tiny.main(resumed)
    assert read[:20] == 8 * [(48, pictures.TRAIN)] + 12 * [(64, pictures.TRAIN)]
    whole, halves = (load_file(tmp_path / name / "tiny.safetensors") for name in ("whole", "halves"))
    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=0, atol=1e-6, msg=name)
    model = VisualAD.from_pretrained(tmp_path / "whole/tiny.safetensors")
    assert model.sigma == 1.7 and model.threshold is not None
    torch.manual_seed(tiny.SEED)
    start = VisualAD("tiny")
    assert not torch.equal(model.tokens, start.tokens) and not torch.equal(model.norm.bias, start.norm.bias)
    assert torch.equal(model.norm.weight, model.backbone.norm.weight)
    with pytest.raises(SystemExit, match="2"):
        tiny.main([*resumed, "--lr", "0.5"])
    assert "of another training" in capsys.readouterr().err


def test_a_written_split_is_a_dataset_that_evaluate_scores(tmp_path, capsys):
    write = ["--write", str(tmp_path / "set"), "--split", "report", "--images", "60"]
    tiny.main(write)
    for i in range(0, 60, 7):
        rng, folder = np.random.default_rng([tiny.SEED, pictures.REPORT, i]), tmp_path / "set/drawn"
        image, mask, kind = pictures.sample(rng, 224, pictures.REPORT)
        assert np.array_equal(Image.open(folder / f"test/{kind}/{i:05d}.png"), image)
        truth = folder / f"ground_truth/{kind}/{i:05d}_mask.png"
        assert truth.exists() == mask.any() and (not mask.any() or np.array_equal(Image.open(truth), mask))
    python("evaluate.py", "--data", tmp_path / "set", "--json", tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())["classes"]["drawn"]
    assert found["image_auroc"] > 0.7 and found["pixel_auroc"] > 0.8  # the bundled model is far from chance
    with pytest.raises(SystemExit, match="2"):
        tiny.main(write)
    assert "is not empty" in capsys.readouterr().err


def test_the_bundled_file_is_what_the_card_says():
    card, data = (ROOT / "weights/README.md").read_text(), (ROOT / "weights/tiny.safetensors").read_bytes()
    model = VisualAD.from_pretrained("tiny")
    parameters = sum(p.numel() for p in model.parameters())
    for fact in (hashlib.sha256(data).hexdigest(), f"{len(data):,} bytes", f"{parameters:,} parameters"):
        assert fact in card
    assert f"threshold {model.threshold:.4f}" in card and f"sigma of {model.sigma} px" in card
    tiny.decide(model, count=60)  # a twentieth of the normal ones may be above
    drawn = [image for image, mask in tiny.Pictures(pictures.SELECT, range(60)) if not mask.any()]
    assert sum(found.anomalous for found in model.predict(drawn)) == int(0.05 * len(drawn)) == 1
