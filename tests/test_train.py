"""The paper's recipe, alone, on two ranks, interrupted and resumed: pytest tests/test_train.py"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CLIP, OFFICIAL, ROOT, SMALL, ranks, same, write, write_mvtec
from safetensors.torch import load_file
from torch import nn

import evaluate
import train
from visualad import OFFICIAL_NAMES, Output, VisualAD


@pytest.fixture
def trained_norm() -> VisualAD:
    """Without dropout, and with the final norm that the authors' program trains and saves."""
    model = VisualAD.from_pretrained(OFFICIAL, backbone_weights=CLIP, final_norm="checkpoint")
    for part in [*model.sca.values(), *model.saf.values()]:
        part.dropout = 0.0
    return model.train()


@pytest.fixture
def batch(golden) -> tuple[torch.Tensor, ...]:
    return golden["images"], golden["train/masks"], golden["train/labels"]


def ours(name: str) -> tuple[str, object]:
    """The authors' tensor name as ours, and the part of ours that it is."""
    if name in (tokens := ["anomaly_token", "normal_token"]):
        return "tokens", tokens.index(name)
    for theirs, own in (OFFICIAL_NAMES | {"ln_post.": "norm."}).items():
        name = name.replace(theirs, own)
    return name, slice(None)


def test_losses_gradients_and_three_steps_are_the_authors(golden, batch, trained_norm):
    terms = train.loss_terms(trained_norm(batch[0]), *batch[1:])
    names = dict(image="classification", pixel="segmentation", token="token_margin")
    for name, value in terms.items():
        assert value.item() == pytest.approx(golden[f"train/loss/{names.get(name, name)}"].item(), abs=1e-5)
    terms["total"].backward()
    seen = set()
    for key, expected in golden.items():
        if key.startswith("train/grad/") and not key.endswith("k_norm.bias"):
            name, part = ours(key.removeprefix("train/grad/"))
            gradient = trained_norm.get_parameter(name).grad[part].reshape(expected.shape)
            assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max(), name
            seen.add(name)
    assert seen == {name for name in trained_norm.learned() if not name.endswith("norm_k.bias")}
    trained_norm.zero_grad()
    optimizer = torch.optim.AdamW(train.param_groups(trained_norm), weight_decay=0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-4]
    for i in range(3):
        terms = train.step(trained_norm, optimizer, batch, (2, 2))
        assert terms["total"] == pytest.approx(golden[f"train/after_3_steps/loss_{i}"].item(), abs=1e-5)
    for key, expected in golden.items():
        if key.startswith("train/after_3_steps/") and "loss" not in key:
            name, part = ours(key.removeprefix("train/after_3_steps/"))
            torch.testing.assert_close(trained_norm.get_parameter(name)[part], expected, rtol=0, atol=1e-5)


def test_the_schedule_is_torchs_cosine_over_epochs():
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([p], 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7, eta_min=1e-4)
    for epoch in range(7):
        assert train.token_rate(epoch, 7) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert {train.token_rate(epoch, 4, 1e-6) for epoch in range(4)} == {1e-6}  # a low rate does not rise


def test_a_step_clips_each_token_alone_and_nothing_else(batch, trained_norm):
    tokens, weight = trained_norm.tokens, trained_norm.norm.weight
    tokens.register_hook(lambda g: torch.tensor([[1000.0], [0.001]]) * g)  # far above 1, far below
    train.loss_terms(trained_norm(batch[0]), *batch[1:])["total"].backward()
    norms = tokens.grad.norm(dim=1, keepdim=True)
    expected = (tokens - tokens.grad / norms.clamp(min=1)).detach(), (weight - weight.grad).detach()
    trained_norm.zero_grad()
    train.step(trained_norm, torch.optim.SGD([tokens, weight], 1.0), batch, (2, 2))
    torch.testing.assert_close((tokens, weight), expected, rtol=0, atol=1e-5)
    assert norms[0] > 10 and norms[1] < 0.1


def outputs(n: int) -> Output:
    g = torch.Generator().manual_seed(0)
    maps, tokens = 4 * torch.randn(n, 2, 12, 10, generator=g), torch.randn(n, 2, 8, generator=g)
    score = maps.sum(dim=1).flatten(1).topk(2).values.mean(dim=1)
    return Output(maps.sum(dim=1), score, maps.requires_grad_(), tokens)


def test_shares_add_up_and_unknown_pixels_leave_focal_and_dice_alone():
    output, masks, labels = outputs(5), torch.zeros(5, 12, 10), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    masks[1, 2:5], masks[2:] = 1, math.nan

    def terms(at: slice, counts: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
        return train.loss_terms(Output(*(x[at] for x in output)), masks[at], labels[at], counts)

    whole, known = terms(slice(5)), terms(slice(2))
    every = train.loss_terms(output, torch.zeros(5, 12, 10), labels)
    target, focal = F.one_hot(masks[:2].long(), 2).movedim(-1, 1).float().clamp(1e-5, 1 - 1e-5), 0
    for q in output.layer_maps[:2].sigmoid().unbind(1):  # as the authors write it
        p = (target * torch.stack([1 - q, q], dim=1)).sum(dim=1) + 1e-5
        focal = focal - ((1 - p) ** 2 * p.log()).mean()
    assert known["focal"].item() == pytest.approx(focal.item(), rel=1e-5)
    for name, other in dict(focal=known, dice=known, image=every, token=every).items():
        assert whole[name].item() == pytest.approx(other[name].item(), rel=1e-6)
    shares = [terms(at, (5, 2)) for at in (slice(0, 1), slice(1, 3), slice(3, 5))]
    for name, value in whole.items():
        assert sum(share[name].item() for share in shares) == pytest.approx(value.item(), rel=1e-5)
    shares[2]["total"].backward()
    assert shares[2]["pixel"].item() == 0 and output.layer_maps.grad.isfinite().all()


def test_accumulation_and_a_gradient_that_is_no_number_change_nothing(batch, trained_norm):
    images = torch.cat([batch[0], batch[0].flip(-1)[:1]])
    three = images, torch.cat([batch[1], batch[1][:1] * math.nan]), torch.tensor([1.0, 0.0, 1.0])
    start = {name: p.clone() for name, p in trained_norm.state_dict().items()}
    sgd, seen, found = torch.optim.SGD(trained_norm.parameters(), 1e-2), [], []
    trained_norm.register_forward_hook(lambda _m, x, _y: seen.append(len(x[0])))
    for parts in (1, 2, 8):
        trained_norm.load_state_dict(start)
        terms = train.step(trained_norm, sgd, three, (3, 2), accumulate=parts)
        found.append((terms, {name: p.clone() for name, p in trained_norm.learned().items()}))
    assert seen == [3, 2, 1, 1, 1, 1] and not torch.equal(found[0][1]["tokens"], start["tokens"])
    for terms, learned in found[1:]:
        assert terms == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(learned, found[0][1], rtol=1e-4, atol=1e-6)
    trained_norm.norm.weight.register_hook(lambda g: g * math.inf)
    terms = train.step(trained_norm, sgd, three, (3, 2))
    assert math.isfinite(terms["total"]) and not math.isfinite(terms["norm"])
    torch.testing.assert_close(trained_norm.learned(), found[-1][1], rtol=0, atol=0)


def test_only_the_backbone_runs_in_bf16(batch, trained_norm):
    model, kinds, wide = trained_norm, {}, [torch.float32] * 2
    parts = dict(frozen=model.backbone.blocks[1].fc1, sca=model.sca["2"].v, saf=model.saf["4"].fc1)
    for name, part in parts.items():
        part.register_forward_hook(lambda _m, _x, y, name=name: kinds.setdefault(name, []).append(y.dtype))
    plain = model(batch[0])
    with train.backbone_in(model, torch.bfloat16):
        cast = model(batch[0])
    assert kinds == dict(frozen=[torch.float32, torch.bfloat16], sca=wide, saf=wide)
    torch.testing.assert_close(cast.map, plain.map, rtol=0, atol=0.05)
    assert not torch.equal(cast.map, plain.map) and torch.equal(model(batch[0]).map, plain.map)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """MVTec's layout, 13 images: the last batch of 4 has one, so that the second rank has none. Beside it a
    small model to begin with, whose threshold is for other scores than those after training."""
    root = write_mvtec(tmp_path_factory.mktemp("data") / "nuts", nut=dict(cut=7, good=6))
    torch.manual_seed(0)
    model = VisualAD(SMALL)
    model.threshold = 1.0
    model.save_pretrained(root.parent / "start")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work is sooner done than shared out
    yield root
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def flags(data):
    def make(out: Path, *more: object) -> list[str]:
        command = ["--data", data, "--model", data.parent / "start", "--epochs", 3, "--batch-size", 4]
        return [*map(str, [*command, "--out", out, "--dtype", "float32", *more])]

    return make


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """What a run of 12 steps leaves that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(flags(out)) == 0
    return out


def alike(out: Path, whole: Path) -> bool:
    models = (load_file(folder / "model.safetensors") for folder in (out, whole))
    return same(*models) and (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_trains_what_is_learned_and_saves_a_model_that_loads(data, whole):
    for i, line in enumerate(lines := log(whole)):
        assert (line["step"], line["epoch"], line["lr"]) == (i + 1, i // 4 + 1, 1e-4)
        assert line["token_lr"] == train.token_rate(i // 4, 3)
        assert line["total"] == pytest.approx(line["image"] + line["pixel"] + line["token"], rel=1e-5)
    before, model = VisualAD.from_pretrained(data.parent / "start"), VisualAD.from_pretrained(whole)
    for name, p in model.state_dict().items():
        assert torch.equal(p, before.state_dict()[name]) == name.startswith("backbone."), name
    assert before.threshold and model.threshold is None
    assert all(told in (whole / "README.md").read_text() for told in ("'nuts'", "'images': '13'"))
    tokens, rest = torch.load(whole / "checkpoint.pt", weights_only=True)["adam"]["param_groups"]
    assert (tokens["lr"], rest["lr"]) == (train.token_rate(2, 3), 1e-4) and len(lines) == 12
    assert tokens["weight_decay"] == rest["weight_decay"] == 0.01 and rest["betas"] == (0.9, 0.999)


def test_training_learns_as_evaluate_sees_after_each_epoch(data, flags, tmp_path):
    assert train.main(flags(tmp_path, "--epochs", 15, "--lr", 1e-3, "--eval", data)) == 0
    first, last = (json.loads((tmp_path / f"eval-{epoch}.json").read_text())["mean"] for epoch in (1, 15))
    after = evaluate.evaluate(VisualAD.from_pretrained(tmp_path), evaluate.read_dataset(data)[1])
    assert after["mean"] == pytest.approx(last, abs=1e-6) and first != last
    assert last["image_auroc"] > 0.9 and last["pixel_auroc"] > 0.9


def test_orders_are_functions_of_seed_and_epoch():
    plan = train.batches(9, 4, 1, 2)
    assert plan == train.batches(9, 4, 1, 2) != train.batches(9, 4, 2, 2)
    assert [(epoch, len(batch)) for epoch, batch in plan] == [(0, 4), (0, 4), (0, 1), (1, 4), (1, 4), (1, 1)]
    first, second = (sum((batch for e, batch in plan if e == epoch), []) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(9)) and first != second


@pytest.mark.parametrize(("has", "name"), [(True, "bfloat16"), (False, "float32")])
def test_bf16_is_the_default_where_the_hardware_has_it(flags, whole, tmp_path, monkeypatch, has, name):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    command = [x for x in flags(tmp_path, "--device", "cpu") if x not in ("--dtype", "float32")]
    assert train.main(command) == 0
    assert torch.load(tmp_path / "checkpoint.pt")["settings"]["dtype"] == name
    assert (log(tmp_path) == log(whole)) == (name == "float32")


@pytest.mark.parametrize(
    ("module", "name", "number", "kept"),
    [(train, "step", 1, []), (train, "step", 7, [6]), (train, "evaluate", 1, [3]), (os, "replace", 7, [5])],
)
def test_what_was_interrupted_ends_bit_identical(
    data, flags, whole, tmp_path, monkeypatch, module, name, number, kept
):
    function, calls, ticks = getattr(module, name), count(1), count(step=1000)

    def broken(*inputs, **options):
        if next(calls) == number:
            raise OSError("No space left") if module is os else KeyboardInterrupt
        return function(*inputs, **options)

    command = flags(tmp_path, *(["--eval", data] if name == "evaluate" else []))
    with monkeypatch.context() as patch:
        patch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(ticks)))  # saves after each step
        patch.setattr(module, name, broken)
        with nullcontext() if module is os else pytest.raises(KeyboardInterrupt):
            assert train.main(command) == 2
    assert [torch.load(path)["step"] for path in tmp_path.glob("*.pt")] == kept
    with open(tmp_path / "log.jsonl", "a") as file:  # a step after the checkpoint, cut off in the middle
        file.write('{"step": 99, "epo')
    torch.manual_seed(99)
    assert train.main([*command, "--resume"]) == 0
    assert alike(tmp_path, whole)
    assert len([*tmp_path.glob("eval-*")]) == 3 * ("--eval" in command)


def test_a_run_that_was_killed_ends_bit_identical(flags, whole, tmp_path):
    slow = "import sys, time, train; step = train.step; train.step = lambda *x: time.sleep(0.3) or step(*x)"
    command = [sys.executable, "-c", f"{slow}; train.main(sys.argv[1:])", *flags(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"))
    while not (tmp_path / "checkpoint.pt").exists() or len(log(tmp_path)) < 6:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 4
    for _ in range(2):  # a finished run too
        assert train.main(flags(tmp_path, "--resume")) == 0
        assert alike(tmp_path, whole)


@pytest.mark.parametrize(
    "other",
    "seed=1 lr=5 token_lr=5 epochs=5 limit=3 batch_size=5 accumulate=2 dtype=bfloat16 model=tiny".split(),
)
def test_a_run_goes_on_with_its_own_settings_only(flags, whole, capsys, other):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert train.main(flags(whole, "--resume", f"--{other.replace('_', '-')}")) == 2
    assert f"{other.partition('=')[0]}\n" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


def test_a_loss_that_is_no_number_stops_and_names_the_images(flags, whole, tmp_path, monkeypatch, capsys):
    calls, bce = count(1), F.binary_cross_entropy_with_logits
    broken = lambda *x, **options: bce(*x, **options) * (math.nan if next(calls) == 6 else 1)  # noqa: E731
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", broken)
    assert train.main(flags(tmp_path, "--seed", 1)) == 2
    said, kept = capsys.readouterr().err, torch.load(tmp_path / "checkpoint.pt")
    assert "step 6: loss" in said and said.count(".png") == 4
    assert kept["step"] == 4 and all(p.isfinite().all() for p in kept["model"].values())
    assert train.main(flags(tmp_path)) == 0  # without --resume it begins anew
    assert alike(tmp_path, whole)


TWO = """
import os, sys, torch, train, visualad

def seeded(seed, real=torch.manual_seed):
    with open("seeds" + os.environ["RANK"] + "of" + os.environ["WORLD_SIZE"], "a") as file:
        print(seed, file=file)
    return real(seed)

torch.manual_seed, visualad.F.dropout = seeded, lambda x, *_: x
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_ranks_train_what_one_trains(data, flags, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    logs, moments, models = [], [], []
    for n in (1, 2):
        done = ranks(n, "two.py", *flags(tmp_path / str(n), "--eval", data), folder=tmp_path)
        assert done.returncode == 0 and done.stdout.count("AUPRO") == 3, done.stderr
        logs.append(log(tmp_path / str(n)))
        moments.append(torch.load(tmp_path / str(n) / "checkpoint.pt")["adam"]["state"])
        models.append(load_file(tmp_path / str(n) / "model.safetensors"))
    for rank in (0, 1):  # of dropout
        seeds = [np.random.default_rng([train.DROPOUT, 111, i, rank]).integers(2**63) for i in range(12)]
        assert (tmp_path / f"seeds{rank}of2").read_text().split()[-12:] == [*map(str, seeds)]
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=2e-4)
    for i, a in moments[0].items():  # AdamW's step hides the scale of a gradient, its moments do not
        a, b = a["exp_avg"], moments[1][i]["exp_avg"]
        assert (a - b).abs().max() <= 0.02 * a.abs().max() + 1e-7
    for name, p in models[0].items():
        if not name.endswith("norm_k.bias"):  # its gradient is rounding noise, which AdamW makes steps of
            torch.testing.assert_close(p, models[1][name], rtol=0, atol=2e-4, msg=name)


def test_a_sample_is_a_function_of_its_key(data):
    painted, drawn = [], set()
    for i, record in enumerate(evaluate.read_dataset(data)[1]):
        plain, plain_mask, truth = train.sample(record, 56)
        assert plain.shape == (3, 56, 56) and truth == record.label == plain_mask.any()
        for epoch in range(12):
            image, mask, label = train.sample(record, 56, [0, 5, epoch, i])
            again = train.sample(record, 56, [0, 5, epoch, i])
            assert all(map(torch.equal, (image, mask, label), again)) and label == mask.any()
            assert torch.equal(image, plain) or (label == 1 and not record.label)
            painted += [] if record.label else [label.item()]
            drawn.add((i, image.sum().item()))
        record = record._replace(masked=False, masks=())
        with torch.device("meta"):  # as after torch.set_default_device
            assert train.sample(record, 56)[1].isnan().all()
            assert train.sample(record, 56, [0])[1].isnan().any() == record.label  # what is normal is known
    assert 0.25 < np.mean(painted) < 0.75 and len(drawn) > sum(painted)


@pytest.mark.parametrize(
    ("layout", "images", "real"), [("nuts", 13, 7), ("meta", 26, 14), ("ksdd2", 13, 7), ("photos", 6, 0)]
)
def test_every_dataset_trains(data, flags, tmp_path, monkeypatch, capsys, layout, images, real):
    """In meta a class without masks stands beside one with; in ksdd2 only the mask tells what is anomalous;
    photos have no labels. Counts are of images and of those with a mask; only: no real anomaly is left."""
    classes, steps, step = dict(masked=[], unmasked=[]), [], train.step
    for i, record in enumerate(evaluate.read_dataset(data)[1]):
        image, mask = evaluate.read(record)
        for name in ["ksdd2/test", *([] if record.label else ["photos"])]:
            write(tmp_path / name / f"{i}.png", image.movedim(0, 2).numpy())
        write(tmp_path / "ksdd2" / "test" / f"{i}_GT.png", 255 * mask.byte().numpy())
        for cls, rows in classes.items():
            mask = "".join(map(str, record.masks)) if cls == "masked" else ""
            rows.append(dict(img_path=str(record.path), mask_path=mask, anomaly=record.label))
    (tmp_path / "meta.json").write_text(json.dumps({"test": classes}))

    def spy(model, optimizer, batch, counts, weight, accumulate):
        assert counts == (len(batch[1]), (~batch[1].isnan().flatten(1).any(dim=1)).sum()) and accumulate == 2
        steps.extend(batch[2].tolist())
        return step(model, optimizer, batch, counts, weight, accumulate)

    monkeypatch.setattr(train, "step", spy)
    root = dict(nuts=data, meta=tmp_path).get(layout, tmp_path / layout)
    for more in (["--synthetic", "only"], ["--synthetic"], []):
        steps.clear()
        status = train.main(flags(tmp_path / "run", "--epochs", 1, "--data", root, "--accumulate", 2, *more))
        if layout == "photos" and not more:
            assert status == 2 and "--synthetic" in capsys.readouterr().err
            break
        assert status == 0 and len(steps) == images - real * ("only" in more)
        assert sum(steps) > real * ("only" not in more) if more else sum(steps) == real


@pytest.mark.parametrize(
    "wrong",
    ["lr nan", "seed -1", "batch-size 0", "epochs 0", "data no/where", "eval no/where", "model ./nowhere"],
)
def test_what_cannot_be_is_told_in_a_line_at_the_door(flags, tmp_path, wrong, capsys):
    assert train.main(flags(tmp_path / "run", *f"--{wrong}".split())) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "run").exists()
