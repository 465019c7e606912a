"""The bundled model, its pictures, its training script: pytest tests/test_tiny.py"""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, SMALL
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from visualad import VisualAD
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


def test_outlines_are_those_of_the_split(monkeypatch):
    outlines = pictures.OUTLINES
    for split in SPLITS:
        monkeypatch.setattr(pictures, "OUTLINES", {split: outlines[split]})  # any other: KeyError
        for i in range(30):
            pictures.sample(np.random.default_rng([4, i]), 64, split)


@pytest.mark.parametrize(
    "name, i", [("anomalous/drawn-1", 2), ("anomalous/drawn-2", 3), ("anomalous/drawn-3", 5),
                ("normal/drawn-1", 0), ("normal/drawn-2", 1)],
)  # fmt: skip
def test_the_drawn_examples_are_what_their_readme_says(name, i):
    image, mask, _ = pictures.sample(np.random.default_rng([tiny.SEED, 3, i]), 256, pictures.REPORT)
    assert mask.any() == name.startswith("anomalous")
    shown = np.asarray(Image.open(ROOT / "examples" / f"{name}.png"))
    assert np.abs(shown.astype(int) - image).max() <= 2  # numpy's versions round in their own ways


def fitted(rng, size, split, scene=pictures._single):
    look = pictures.Look(0.3, split)
    return pictures._fitted(rng, scene(rng, size, look)), pictures._camera(rng, size, look)


ALL_DEFECTS = [(split, make) for split in SPLITS for make, _ in pictures.DEFECTS[split]]
ALL_DEFECTS += [(pictures.TRAIN, pictures._odd_one)]


@pytest.mark.parametrize("size", [96, 160])
@pytest.mark.parametrize("split, defect", ALL_DEFECTS, ids=lambda f: getattr(f, "__name__", ""))
def test_the_mask_is_where_the_picture_changed(split, defect, size):
    seen, idle, covered, scene_of = 0, 0, 0, pictures._single
    if defect is pictures._odd_one:
        scene_of = pictures._array
    for i in range(12):
        rng = np.random.default_rng(i)
        scene, shoot = fitted(rng, size, split, scene_of)
        clean = shoot(scene.img)
        spoiled, mask = pictures._spoil(rng, scene, shoot, defect)
        change = np.abs(shoot(spoiled.img) - clean).max(axis=0)
        seen += mask.any()
        assert mask.any() or np.array_equal(spoiled.img, scene.img)
        near = pictures._blur(mask.astype(np.float32), 4) > 1e-3  # a soft edge may lie just outside
        assert ((change > 0.08) & ~near).sum() <= 0.02 * (change > 0.08).sum()
        assert (change[~near] > 0.02).mean() < 0.02  # the camera sees the rest as it was
        covered, idle = covered + mask.sum(), idle + (mask & (change < 0.01)).sum()
    assert seen >= 4
    assert idle < 0.35 * covered  # what did not change is no defect


@pytest.mark.parametrize("share, marked", [(0, False), (0.4, True), (0.6, False)])
def test_what_nobody_could_see_or_mark_is_no_defect(share, marked):
    """One pixel, and more than half of the inspected thing."""

    def make(rng, scene, gain):
        img, region = scene.img.copy(), np.zeros(scene.zone.shape, bool)
        region.ravel()[np.flatnonzero(scene.zone)[: int(share * scene.zone.sum()) or 1]] = True
        img[:, region] = 1 - img[:, region] ** 2
        return img, region

    scene, shoot = fitted(np.random.default_rng(2), 160, pictures.TRAIN)
    spoiled, mask = pictures._spoil(np.random.default_rng(0), scene, shoot, make)
    assert mask.any() == marked and (spoiled is scene) != marked


def test_a_blur_has_no_denormal_weights():
    for sigma in (0.05, 0.45, 1.3, 9):
        k = pictures._gauss(224, sigma)
        assert k[k > 0].min() >= 1e-12 and np.allclose(k.sum(1), 1, atol=1e-6)


def test_every_defect_of_a_picture_is_in_its_mask(monkeypatch):
    drawn, spoil = [], pictures._spoil

    def watched(*args):
        scene, mask = spoil(*args)
        drawn.append(mask)
        return scene, mask

    monkeypatch.setattr(pictures, "_spoil", watched)
    several = 0
    for i in range(60):
        drawn.clear()
        _, mask, _ = pictures.sample(np.random.default_rng([6, i]), 64)
        assert np.array_equal(mask, np.any(drawn, axis=0) if drawn else np.zeros((64, 64), bool))
        several += sum(m.any() for m in drawn) > 1
    assert several >= 5


def test_a_fitting_is_drawn_alike_on_what_shows_when_a_piece_is_missing():
    rng = np.random.default_rng(0)
    for _ in range(20):
        plain = pictures._array(rng, 64, pictures.Look(0, pictures.TRAIN))
        img = np.clip(plain.img, 0, 1)
        same = pictures.replace(plain, img=img, back=img, odd=(img,))
        scene = pictures._fitted(rng, same)
        assert np.array_equal(scene.img, scene.back) and np.array_equal(scene.img, scene.odd[0])
        assert 0 <= scene.img.min() and scene.img.max() <= 1  # or clipping a defect would change it elsewhere


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
    monkeypatch.setattr(tiny, "DENSE", 0.0)
    value = tiny.loss(model(golden["images"]), golden["train/masks"] > 0.5)
    assert value.item() == pytest.approx(golden["train/loss/total"].item(), rel=1e-3)


def test_the_loss_adds_the_cross_entropy_of_every_pixel(monkeypatch):
    torch.manual_seed(0)
    out, mask = VisualAD("tiny")(torch.rand(3, 3, 48, 48)), torch.rand(3, 48, 48) < 0.2
    whole = tiny.loss(out, mask).item()
    monkeypatch.setattr(tiny, "DENSE", 0.0)
    q = 1 / (1 + np.exp(-8.0 * out.layer_maps.double().detach().numpy()))
    truth = mask[:, None].numpy()
    dense = np.where(truth, -4 * np.log(q), -np.log(1 - q)).mean()
    assert whole - tiny.loss(out, mask).item() == pytest.approx(4 * dense, rel=1e-4)


def test_attention_starts_with_a_look_at_its_likes_and_takes_them_away():
    torch.manual_seed(0)
    model = VisualAD("tiny")
    tiny.mimic(model)
    for block in model.backbone.blocks:
        q, k, v = block.qkv.weight.detach().chunk(3)
        off = ~torch.eye(len(q), dtype=torch.bool)
        for a, b in zip(q.chunk(2), k.chunk(2), strict=True):
            likeness = a.T @ b
            assert likeness.diag().mean() > 0.25 and likeness[off].mean().abs() < 0.02
        taken = block.proj.weight.detach() @ v
        assert taken.diag().mean() == pytest.approx(-0.4, abs=0.05) and taken[off].mean().abs() < 0.02


def test_the_rate_rises_stays_and_falls_in_the_last_stage():
    paces = [tiny.pace(step, 2000, 300) for step in range(1, 2001)]
    assert paces[0] == 1 / 500 and paces[249] == 0.5
    assert set(paces[499:1701]) == {1.0} and paces[1850] == 0.5 and paces[-1] == 1 / 300


def small(monkeypatch):
    """A training that takes seconds: three quarters at 48 px, its state kept every third step."""
    monkeypatch.setattr(tiny, "STAGES", ((48, 0.75), (64, 0.25)))
    monkeypatch.setattr(tiny, "WARM_UP", 4)
    monkeypatch.setattr(tiny, "KEEP", 3)
    monkeypatch.setattr(tiny, "AVERAGE", 0.0)  # the last weights themselves


def test_a_resumed_training_is_the_unbroken_one(monkeypatch, tmp_path):
    small(monkeypatch)
    state, options = tmp_path / "tiny.state", dict(batch=4, lr=1e-3, workers=0, held_out=25)
    unbroken = tiny.train(images=32, **options).state_dict()
    tiny.train(images=16, **options, state=state)
    assert torch.load(state, weights_only=True)["step"] == 3  # before the first training's last stage
    drawn, real = [], tiny.sample
    monkeypatch.setattr(
        tiny, "sample", lambda rng, size, split: drawn.append(split) or real(rng, size, split)
    )
    resumed = tiny.train(images=32, **options, state=state).state_dict()
    assert drawn.count(pictures.TRAIN) == 32 - 3 * 4
    assert torch.load(state, weights_only=True)["step"] == 6
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (dict(images=16), "has seen 24 images, but of 16 only the first 12"),
        (dict(lr=2e-3), "another run: lr 0.001, now 0.002"),
        (dict(batch=8), "another run: batch 4, now 8"),
        (dict(init=ROOT / "weights/tiny.safetensors"), "another run: init None, now"),
        (dict(skip=4), "another run: skip 0, now 4"),
        (dict(dtype=torch.float32), "another run: dtype 'torch.bfloat16', now 'torch.float32'"),
    ],
)
def test_a_state_of_another_training_is_refused(monkeypatch, tmp_path, wrong, told):
    small(monkeypatch)
    state, options = tmp_path / "tiny.state", dict(images=32, batch=4, lr=1e-3, workers=0, held_out=25)
    tiny.train(**options, state=state)
    before = state.read_bytes()
    with pytest.raises(ValueError, match=told):
        tiny.train(**{**options, **wrong}, state=state)
    assert state.read_bytes() == before


def test_other_pictures_are_another_training(monkeypatch, tmp_path):
    small(monkeypatch)
    state, options = tmp_path / "tiny.state", dict(images=32, batch=4, lr=1e-3, workers=0, held_out=25)
    tiny.train(**options, state=state)
    changed = tmp_path / "pictures.py"
    changed.write_text(tiny.PICTURES.read_text().replace("(_scratch, 0.15)", "(_scratch, 0.16)"))
    monkeypatch.setattr(tiny, "PICTURES", changed)
    with pytest.raises(ValueError, match="another run: pictures"):
        tiny.train(**options, state=state)


def test_training_starts_from_a_finished_model_on_other_pictures(monkeypatch, tmp_path):
    small(monkeypatch)
    tiny.save(VisualAD.from_pretrained("tiny"), tmp_path)
    options = dict(batch=4, workers=0, held_out=25, init=tmp_path / "tiny.safetensors", skip=40)
    seen, real = [], tiny.Pictures.__getitem__
    monkeypatch.setattr(
        tiny.Pictures, "__getitem__", lambda self, i: (seen.append((self.split, i)), real(self, i))[1]
    )
    still = tiny.train(images=8, lr=0.0, **options).state_dict()
    bundled = VisualAD.from_pretrained("tiny").state_dict()
    assert all(torch.equal(still[name], value) for name, value in bundled.items())
    assert [i for split, i in seen if split == pictures.TRAIN] == list(range(40, 48))
    moved = tiny.train(images=8, lr=1e-3, **options).state_dict()
    assert not torch.equal(moved["tokens"], bundled["tokens"])


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--init", "."], "--init . is no file"),
        (["--init", "weights/tiny.safetensors", "--out", "weights"], "would be overwritten"),
        (["--init", "weights/tiny.safetensors", "--skip", "-1"], "--skip must be at least 0, got -1"),
        (["--out", "README.md"], "README.md is no folder"),
        (["--pictures", "weights"], "weights is no regular file"),
    ],
    ids=str,
)
def test_a_start_that_cannot_be_is_told_before_the_work(flags, told, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["tiny.py", "--out", str(tmp_path), *flags])
    assert tiny.main() == 2 and told in capsys.readouterr().err


def test_another_network_is_no_start(tmp_path):
    VisualAD(SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of another network than tiny"):
        tiny.train(images=16, batch=16, lr=1e-3, workers=0, init=tmp_path / "model.safetensors")


@pytest.mark.parametrize("images", [20, 60, 63])
def test_all_the_images_that_were_asked_for_are_seen_and_no_more(images, monkeypatch):
    small(monkeypatch)
    monkeypatch.setattr(tiny, "STAGES", ((48, 0.7), (64, 0.3)))  # of 5 steps 4 and 2, of 15 10 and 4
    seen, real = [], tiny.Pictures.__getitem__
    monkeypatch.setattr(
        tiny.Pictures, "__getitem__", lambda self, i: (seen.append((self.split, i)), real(self, i))[1]
    )
    tiny.train(images=images, batch=4, lr=1e-3, workers=0, held_out=25)
    trained = [i for split, i in seen if split == pictures.TRAIN]
    assert trained == list(range(images - images % 4))


def test_too_few_images_make_no_model():
    with pytest.raises(ValueError, match="8 images are less than a batch of 16"):
        tiny.train(images=8, batch=16, lr=1e-3, workers=0)


def test_what_comes_of_a_training_is_the_average_of_its_weights(monkeypatch):
    small(monkeypatch)
    monkeypatch.setattr(tiny, "AVERAGE", 0.5)
    seen, step = [], torch.optim.AdamW.step

    def kept(self, *args):
        result = step(self, *args)
        seen.append(torch.cat([p.detach().flatten() for group in self.param_groups for p in group["params"]]))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", kept)
    model = tiny.train(images=32, batch=4, lr=1e-3, workers=0, held_out=25)
    want = seen[0]
    for weights in seen[1:]:
        want = want + (weights - want) * 0.5
    got = [p for p in model.parameters() if p.ndim > 1] + [p for p in model.parameters() if p.ndim <= 1]
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in got]), want, rtol=0, atol=1e-6)
    assert (want - seen[-1]).abs().max() > 1e-5


def test_two_processes_take_the_steps_of_one(monkeypatch, tmp_path):
    small(monkeypatch)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)  # it hides a gradient's scale
    options = dict(images=32, batch=4, lr=1e-3, workers=0, held_out=25)
    alone = tiny.train(**options, state=tmp_path / "alone.state").state_dict()
    script = tmp_path / "both.py"
    script.write_text(
        f"""import sys, torch
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from weights import tiny
tiny.STAGES, tiny.WARM_UP, tiny.AVERAGE, tiny.KEEP = ((48, 0.75), (64, 0.25)), 4, 0.0, 3
torch.nn.utils.clip_grad_norm_ = lambda *_: None
seen, real = [], tiny.Pictures.__getitem__
tiny.Pictures.__getitem__ = lambda self, i: (seen.append((self.size, self.split, i)), real(self, i))[1]
torch.distributed.init_process_group("gloo")
model = tiny.train(**{options!r}, state=Path({str(tmp_path)!r}) / "both.state")
torch.save((seen, model.state_dict()), {str(tmp_path)!r} + f"/{{torch.distributed.get_rank()}}.pt")
torch.distributed.destroy_process_group()
"""
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    subprocess.run(launch, check=True, timeout=300)
    seen, shares = zip(
        *(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)), strict=True
    )
    for rank, own in enumerate(seen):
        for size, indices in ((48, range(24)), (64, range(24, 32))):
            trained = [i for side, split, i in own if (side, split) == (size, pictures.TRAIN)]
            assert trained == list(indices)[rank::2]
    assert all(torch.equal(shares[0][name], shares[1][name]) for name in alone)
    moments = [torch.load(tmp_path / f"{name}.state", weights_only=True) for name in ("alone", "both")]
    moments = [torch.cat([x["exp_avg"].flatten() for x in m["optimizer"]["state"].values()]) for m in moments]
    assert moments[1].norm().item() == pytest.approx(moments[0].norm().item(), rel=0.1)
    together, alone = (torch.cat([x.flatten() for x in d.values()]) for d in (shares[0], alone))
    # bf16 rounds by the batch: 0.0003; where both take the same images it is 0.002
    assert (together - alone).abs().mean() < 1e-3


def test_a_short_training_writes_a_model_that_loads(tmp_path, capsys):
    torch.manual_seed(tiny.SEED)
    untrained = VisualAD("tiny")
    tiny.mimic(untrained)
    model = tiny.train(images=64, batch=16, lr=1e-3, workers=0, held_out=50)
    tiny.decide(model, count=64)
    tiny.save(model, tmp_path)
    loaded = VisualAD.from_pretrained(tmp_path / "tiny.safetensors")
    assert loaded.threshold["value"] == model.threshold["value"]
    assert loaded.sigma == loaded.threshold["sigma"] == VisualAD.from_pretrained("tiny").sigma == 1.7
    assert torch.equal(loaded.norm.weight, loaded.backbone.norm.weight)
    moved = loaded.backbone.blocks[0].qkv.weight - untrained.backbone.blocks[0].qkv.weight
    assert 0 < moved.abs().max() < 1e-4  # the warm-up has hardly begun
    assert "select: image AUROC" in capsys.readouterr().out


class Brightness:
    """A model whose figures another library can check; it also is a method of `measure`."""

    image_size, sigma, threshold, tokens = 48, 3.0, None, torch.zeros(2, 1)

    def infer(self, x):
        return x.mean(dim=1), x.mean(dim=(1, 2, 3))


def test_the_threshold_flags_a_twentieth_of_the_selected_normals():
    model = Brightness()
    model.infer = lambda x: (x[:, 0] * x.std(dim=(1, 2, 3))[:, None, None], x.mean(dim=(1, 2, 3)))
    tiny.decide(model, count=120)
    drawn = tiny.Pictures(pictures.SELECT, 120, 48)
    pairs = [(drawn[i][0], drawn[i][1].any()) for i in range(120)]
    normal = np.array([x.mean().item() for x, anomalous in pairs if not anomalous])
    assert (normal > model.threshold["value"] + 1e-6).sum() == int(0.05 * len(normal))
    peaks = [(x[0].max() * x.std()).item() for x, anomalous in pairs if anomalous]
    assert model.display_high == pytest.approx(np.quantile(peaks, 0.9), abs=1e-5)
    assert model.threshold["sigma"] == 3.0
    assert model.threshold["size"] == [48, 48] and str(len(normal)) in model.threshold["made"]


def test_measured_figures_are_scikit_learns_for_all_and_by_kind():
    batches = list(tiny.procedural(pictures.SELECT, 50, 64))
    labels = np.array([label for b in batches for label in b.labels])
    kinds = np.array([kind for b in batches for kind in b.kinds])
    maps, masks = torch.cat([b.images.mean(dim=1) for b in batches]), torch.cat([b.masks for b in batches])
    scores = torch.cat([Brightness().infer(b.images)[1] for b in batches]).numpy()
    limit = float(np.sort(scores[labels == 1])[5])  # a score itself: it is not above the threshold
    found = tiny.measure({"ours": Brightness().infer, "chance": tiny.chance}, batches, limit)
    assert list(found["ours"]) == [
        "all",
        *sorted({k for k, label in zip(kinds, labels, strict=True) if label}),
    ]
    for kind, row in found["ours"].items():
        chosen = np.full(50, True) if kind == "all" else (labels == 0) | (kinds == kind)
        label, score = labels[chosen], scores[chosen]
        truth, value = masks[chosen].flatten().numpy(), maps[chosen].flatten().numpy()
        assert (row.images, row.anomalous) == (chosen.sum(), label.sum())
        for shown, true, rank in (("image", label, score), ("pixel", truth, value)):
            precision, recall, _ = precision_recall_curve(true, rank)
            f1 = (2 * precision * recall / (precision + recall + 1e-12)).max()
            assert getattr(row, f"{shown}_auroc") == pytest.approx(100 * roc_auc_score(true, rank), abs=0.06)
            ap = average_precision_score(true, rank)
            assert getattr(row, f"{shown}_ap") == pytest.approx(100 * ap, abs=0.06)
            assert getattr(row, f"{shown}_f1_max") == pytest.approx(100 * f1, abs=0.06)
        assert row.flagged == tuple((score[label == k] > limit).mean() for k in (0, 1))
    guess, share = found["chance"]["all"], 100 * masks.float().mean().item()
    assert list(found["chance"]) == ["all"]
    assert guess.image_auroc == guess.pixel_auroc == 50 and guess.pixel_aupro == 15
    assert guess.pixel_ap == pytest.approx(share, abs=0.06)


def cells(table):
    return {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in table.splitlines()
    }


def test_the_table_holds_the_model_its_kinds_and_what_it_has_to_beat():
    torch.manual_seed(1)
    model = VisualAD("tiny").eval()
    model.threshold = dict(value=-4.0)
    batches = list(tiny.procedural(pictures.SELECT, 30, 64))
    found = cells(tiny.report(model, "drawn", batches))
    rows = list(found)
    kinds = {f"tiny: {kind}" for b in batches for kind in b.kinds if kind != "good"}
    assert (rows[0], rows[2]) == ("drawn", "tiny") and kinds <= set(rows)
    assert found["tiny"][-1] == "100.0 / 100.0"
    assert found["untrained"][1:8] != found["tiny"][1:8]  # another seed's weights, not the model's own
    contrasts = {f"contrast, {s} px": tiny.contrast(s) for s in (1, 2, 4, 8)}
    measured = {name: rows["all"] for name, rows in tiny.measure(contrasts, batches).items()}
    (shown,) = (row for row in rows if row.startswith("contrast"))
    assert measured[shown].image_auroc == max(row.image_auroc for row in measured.values())
    assert found[shown][1] == f"{measured[shown].image_auroc:.1f}"


@pytest.fixture
def photos(tmp_path):
    """Two good and two odd ones, so many of these with a mask; without any, no layout that wants them."""

    def make(masks):
        for kind in ("good", "odd"):
            for i in range(2):
                path = tmp_path / ("thing/test" if masks else "") / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(noise).save(path)
        for i in range(masks):
            truth = tmp_path / f"thing/ground_truth/odd/{i}_mask.png"
            truth.parent.mkdir(parents=True, exist_ok=True)
            mask = np.zeros((40, 60), np.uint8)
            mask[5:10, 7:20] = 255
            Image.fromarray(mask).save(truth)
        return tmp_path

    return make


def test_a_dataset_is_measured_at_its_own_size_against_its_masks(photos):
    (records,) = tiny.labelled(photos(masks=2)).values()
    batches = list(tiny.photographs(records, 32))
    assert [b.labels for b in batches] == [[0], [0], [1], [1]] and batches[3].kinds == ["odd"]
    assert batches[2].images.shape == (1, 3, 32, 32) and batches[2].masks.shape == (1, 40, 60)
    assert [int(b.masks.sum()) for b in batches] == [0, 0, 65, 65]


def test_a_dataset_without_masks_leaves_the_pixels_out(photos):
    (records,) = tiny.labelled(photos(masks=0)).values()
    torch.manual_seed(0)
    table = tiny.report(VisualAD("tiny").eval(), "mine", tiny.photographs(records, 32))
    assert cells(table)["chance"][:9] == ["4 / 2", "50.0", "66.7", "50.0", "-", "-", "-", "-"]


def test_a_dataset_that_cannot_be_measured_is_an_error(photos, tmp_path):
    with pytest.raises(ValueError, match="1.png"):
        tiny.labelled(photos(masks=1))
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat/a.png")
    with pytest.raises(ValueError, match="has no label"):
        tiny.labelled(tmp_path / "flat")


def test_the_contrast_baseline_is_a_difference_of_gaussians():
    x = torch.rand(1, 3, 64, 64)
    maps, _ = tiny.contrast(2)(x)
    grey = x[0].mean(dim=0).numpy()
    ours = np.abs(gaussian_filter(grey, 2, truncate=9) - gaussian_filter(grey, 6, truncate=9))
    inner = np.s_[20:-20, 20:-20]  # the two treat borders in their own ways
    assert np.abs(maps[0].numpy()[inner] - ours[inner]).max() < 2e-4


def test_the_gallery_holds_six_strips():
    model = VisualAD.from_pretrained("tiny")
    picture = Image.open(io.BytesIO(tiny.gallery(model, count=60)))
    side = model.image_size
    assert picture.size == (2 * (3 * side + 16) + 24, 3 * side + 16)
    model.threshold["value"] = 4.0
    with pytest.raises(ValueError, match="of 25 pictures 0 were found"):
        tiny.gallery(model, count=25)


def test_the_bundled_model_is_far_from_chance_on_other_families():
    model = VisualAD.from_pretrained("tiny")
    row = tiny.measure({"tiny": model.infer}, tiny.procedural(pictures.SELECT, 250, 224))["tiny"]["all"]
    assert row.image_auroc > 80 and row.pixel_auroc > 85, row
    assert model.threshold["size"] == [model.image_size] * 2 == [224, 224]
    assert "procedural normal" in model.threshold["made"]
