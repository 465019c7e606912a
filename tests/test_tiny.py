"""The bundled model, its pictures, its training script: pytest tests/test_tiny.py"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT

from visualad import VisualAD

sys.path.insert(0, str(ROOT / "weights"))
import tiny  # noqa: E402


def test_a_picture_depends_on_seed_split_and_index_alone():
    pictures = tiny.Pictures(tiny.TRAIN, 40, 96)
    x, mask = pictures[7]
    np.random.seed(0)  # and on no global state
    again, same = tiny.Pictures(tiny.TRAIN, 8, 96)[7]
    assert torch.equal(x, again) and torch.equal(mask, same)
    assert not torch.equal(x, tiny.Pictures(tiny.SELECT, 40, 96)[7][0]) and not torch.equal(x, pictures[8][0])


def test_pictures_are_eight_bit_and_about_half_have_a_visible_defect():
    samples = [tiny.sample(np.random.default_rng([1, i]), 96) for i in range(120)]
    assert all(image.shape == (96, 96, 3) and image.dtype == np.uint8 for image, _ in samples)
    anomalous = [mask for _, mask in samples if mask.any()]
    assert 0.35 < len(anomalous) / len(samples) < 0.6
    assert max(mask.mean() for mask in anomalous) < 0.5


@pytest.mark.parametrize("defect", [make for make, _ in tiny.DEFECTS], ids=lambda f: f.__name__)
def test_the_mask_is_where_the_picture_changed(defect, monkeypatch):
    monkeypatch.setattr(tiny, "DEFECTS", [(defect, 1)])
    monkeypatch.setattr(tiny, "DEFECT_ODDS", [1.0])
    seen = 0
    for i in range(8):
        rng = np.random.default_rng(i)
        scene, shoot = tiny._single(rng, 96, 0.3), tiny._camera(rng, 96, 0.3)
        clean = shoot(scene.img)
        spoiled, mask = tiny._spoil(rng, scene, shoot, clean)
        change = np.abs(shoot(spoiled.img) - clean).max(axis=0) > 0.08
        seen += mask.any()
        assert not change.any() or mask.any()
        near = tiny._blur(mask.astype(np.float32), 4) > 1e-3  # a soft edge may lie just outside
        assert (change & ~near).sum() <= 0.02 * change.sum()
    assert seen >= 4


def test_at_scale_one_the_loss_is_the_authors(golden, monkeypatch):
    model = VisualAD.from_pretrained(
        GOLDEN / "visualad_official.pth",
        backbone_weights=GOLDEN / "clip_openai.safetensors",
        final_norm="checkpoint",
    )
    monkeypatch.setattr(tiny, "SCALE", 1.0)
    value = tiny.loss(model(golden["images"]), golden["train/masks"] > 0.5)
    assert value.item() == pytest.approx(golden["train/loss/total"].item(), rel=1e-3)


def test_a_short_training_writes_a_model_that_loads(tmp_path, capsys):
    untrained = VisualAD("tiny")
    model = tiny.train(images=64, batch=16, lr=1e-3, workers=0, out=tmp_path, held_out=16)
    tiny.decide(model, count=64)
    tiny.save(model, tmp_path)
    loaded = VisualAD.from_pretrained(tmp_path / "tiny.safetensors")
    assert loaded.threshold["value"] == model.threshold["value"]
    assert torch.equal(loaded.norm.weight, loaded.backbone.norm.weight)
    assert not torch.equal(loaded.backbone.blocks[0].qkv.weight, untrained.backbone.blocks[0].qkv.weight)
    assert "select: 16 images" in capsys.readouterr().out


def test_the_bundled_model_is_far_from_chance_on_pictures_of_no_decision():
    model = VisualAD.from_pretrained("tiny")
    line = tiny.report("report", model.infer, tiny.procedural(tiny.REPORT, 256))
    image, pixel = (float(line.partition(f"{kind} AUROC ")[2].split()[0]) for kind in ("image", "pixel"))
    assert image > 70 and pixel > 80, line
    assert model.threshold["size"] == [160, 160] and "procedural normal" in model.threshold["made"]
