"""The bundled model, its pictures, its training script: pytest tests/test_tiny.py"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from visualad import BACKBONES, VisualAD
from weights import pictures, tiny

SPLITS = (pictures.TRAIN, pictures.SELECT, pictures.REPORT)


def test_a_picture_depends_on_seed_split_and_index_alone():
    some = tiny.Pictures(pictures.TRAIN, 40, 96)
    x, mask, _ = some[7]
    np.random.seed(0)  # and on no global state
    again, same, _ = tiny.Pictures(pictures.TRAIN, 8, 96)[7]
    assert torch.equal(x, again) and torch.equal(mask, same)
    others = tiny.Pictures(pictures.SELECT, 40, 96)[7], some[8]
    assert not any(torch.equal(x, other[0]) for other in others)


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_are_eight_bit_and_about_half_have_a_visible_defect(split):
    samples = [pictures.sample(np.random.default_rng([1, i]), 96, split) for i in range(120)]
    assert all(image.shape == (96, 96, 3) and image.dtype == np.uint8 for image, _, _ in samples)
    anomalous = [mask for _, mask, _ in samples if mask.any()]
    assert 0.35 < len(anomalous) / len(samples) < 0.6
    assert max(mask.mean() for mask in anomalous) < 0.5
    own = {"mixed"} if split == pictures.TRAIN else {make.__name__[1:] for make, _ in pictures.DEFECTS[split]}
    assert {kind for _, mask, kind in samples if mask.any()} == own
    assert {kind for _, mask, kind in samples if not mask.any()} == {"good"}


@pytest.mark.parametrize("table", ["TEXTURES", "DEFECTS", "OUTLINES"])
def test_the_splits_share_no_family_but_plain_grounds(table):
    families = [
        {getattr(entry[0], "__name__", entry) if isinstance(entry, tuple) else entry for entry in entries}
        for entries in (getattr(pictures, table)[split] for split in SPLITS)
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert families[i] & families[j] <= {"_plain"}
        assert len(families[j] - {"_plain"}) >= 2


@pytest.mark.parametrize("split", SPLITS[1:])
def test_held_out_pictures_are_drawn_with_held_out_families_alone(split):
    """Whatever path a picture takes, no function of another split runs."""
    tables, ran = (pictures.TEXTURES, pictures.DEFECTS), set()
    others = {f.__name__ for table in tables for other in SPLITS if other != split for f, _ in table[other]}
    sys.setprofile(lambda frame, event, _: ran.add(frame.f_code.co_name) if event == "call" else None)
    try:
        for i in range(60):
            pictures.sample(np.random.default_rng([2, i]), 64, split)
    finally:
        sys.setprofile(None)
    assert ran & others <= {"_plain"} and {f.__name__ for table in tables for f, _ in table[split]} <= ran


ALL_DEFECTS = [make for split in SPLITS for make, _ in pictures.DEFECTS[split]]


@pytest.mark.parametrize("defect", ALL_DEFECTS, ids=lambda f: f.__name__)
def test_the_mask_is_where_the_picture_changed(defect):
    seen, look = 0, pictures.Look(0.3, pictures.TRAIN)
    for i in range(8):
        rng = np.random.default_rng(i)
        scene, shoot = pictures._single(rng, 96, look), pictures._camera(rng, 96, look)
        clean = shoot(scene.img)
        spoiled, mask = pictures._spoil(rng, scene, shoot, clean, defect)
        change = np.abs(shoot(spoiled.img) - clean).max(axis=0) > 0.08
        seen += mask.any()
        assert not change.any() or mask.any()
        near = pictures._blur(mask.astype(np.float32), 4) > 1e-3  # a soft edge may lie just outside
        assert (change & ~near).sum() <= 0.02 * change.sum()
    assert seen >= 4


@pytest.mark.parametrize("fitting", [make for make, _ in pictures.FITTINGS], ids=lambda f: f.__name__)
def test_a_fitting_changes_the_picture_and_stays_in_range(fitting):
    look, changed = pictures.Look(0.2, pictures.TRAIN), 0
    for i in range(12):
        rng = np.random.default_rng(i)
        before = pictures._texture(rng, 96, look)[0]
        after = fitting(rng, before.copy(), look)
        assert after.shape == before.shape and np.isfinite(after).all()
        assert after.min() >= -1e-5 and after.max() <= 1 + 1e-5
        changed += np.abs(after - before).max() > 0.02
    assert changed >= 9


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
    model = tiny.train(images=64, batch=16, lr=1e-3, workers=0, out=tmp_path, held_out=50)
    tiny.decide(model, count=64)
    tiny.save(model, tmp_path)
    loaded = VisualAD.from_pretrained(tmp_path / "tiny.safetensors")
    assert loaded.threshold["value"] == model.threshold["value"]
    assert torch.equal(loaded.norm.weight, loaded.backbone.norm.weight)
    assert not torch.equal(loaded.backbone.blocks[0].qkv.weight, untrained.backbone.blocks[0].qkv.weight)
    assert "select: image AUROC" in capsys.readouterr().out


def brightness(x):
    """A method whose figures another library can check."""
    return x.mean(dim=1), x.mean(dim=(1, 2, 3))


def test_measured_figures_are_scikit_learns_for_all_and_by_kind():
    batches = list(tiny.procedural(pictures.SELECT, 50))
    found = tiny.measure({"brightness": brightness, "chance": tiny.chance}, batches, limit=0.4)
    labels = np.array([label for b in batches for label in b.labels])
    kinds = np.array([kind for b in batches for kind in b.kinds])
    maps, masks = torch.cat([b.images.mean(dim=1) for b in batches]), torch.cat([b.masks for b in batches])
    for kind, row in found["brightness"].items():
        chosen = np.full(50, True) if kind == "all" else (labels == 0) | (kinds == kind)
        score = maps[chosen].mean(dim=(1, 2)).numpy()
        truth, value = masks[chosen].flatten().numpy(), maps[chosen].flatten().numpy()
        assert (row.images, row.anomalous) == (chosen.sum(), labels[chosen].sum())
        assert row.image_auroc == pytest.approx(100 * roc_auc_score(labels[chosen], score), abs=0.051)
        assert row.image_ap == pytest.approx(100 * average_precision_score(labels[chosen], score), abs=0.051)
        assert row.pixel_auroc == pytest.approx(100 * roc_auc_score(truth, value), abs=0.06)
        assert row.pixel_ap == pytest.approx(100 * average_precision_score(truth, value), abs=0.06)
        for label, rate in enumerate(row.flagged):
            assert rate == pytest.approx((score[labels[chosen] == label] > 0.4).mean())
    guess, share = found["chance"]["all"], 100 * masks.float().mean().item()
    assert guess.image_auroc == guess.pixel_auroc == 50 and guess.pixel_aupro == 15
    assert guess.pixel_ap == pytest.approx(share, abs=0.06)


def test_the_table_of_a_dataset_without_masks_leaves_the_pixels_out(tmp_path):
    for kind in ("good", "odd"):
        (tmp_path / kind).mkdir()
        for i in range(2):
            noise = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / kind / f"{i}.png")
    torch.manual_seed(0)
    lines = tiny.report(VisualAD("tiny").eval(), "mine", tiny.real(tmp_path)).splitlines()
    assert lines[0].startswith("| mine | images / anomalous | image AUROC")
    first = [line.split(" | ")[0] for line in lines[2:]]
    assert first[:3] == ["| **tiny**", "| tiny: odd", "| untrained"] and first[4] == "| chance"
    assert "px" in first[3] and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| 4 / 2 | 50.0 | 66.7 | 50.0 | - | - | - | - |" in lines[-1]


def test_the_contrast_baseline_finds_a_spot():
    x = torch.full((1, 3, 64, 64), 0.5)
    x[..., 20:24, 40:44] = 0.9
    maps, _ = tiny.contrast(2)(x)
    assert divmod(int(maps[0].argmax()), 64)[0] in range(20, 24) and maps.min() >= 0


def test_the_bundled_model_is_far_from_chance_on_pictures_of_no_decision():
    model = VisualAD.from_pretrained("tiny")
    row = tiny.measure({"tiny": model.infer}, tiny.procedural(pictures.REPORT, 250))["tiny"]["all"]
    assert row.image_auroc > 80 and row.pixel_auroc > 85, row
    size = BACKBONES["tiny"].image_size
    assert model.threshold["size"] == [size, size] and "procedural normal" in model.threshold["made"]
