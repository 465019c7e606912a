"""The paper's recipe, alone, on two ranks, killed and resumed: pytest tests/test_train.py"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT, SMALL
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import evaluate
import train
from visualad import Output, VisualAD


def still(model: VisualAD) -> VisualAD:
    """Without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def trained_norm() -> VisualAD:
    """The authors' program trains with the final norm that it saves."""
    files = GOLDEN / "visualad_official.pth", GOLDEN / "clip_openai.safetensors"
    model = VisualAD.from_pretrained(files[0], backbone_weights=files[1], final_norm="checkpoint")
    return still(model).train()


def ours(name: str) -> tuple[str, object]:
    """The authors' tensor name as ours, and the part of ours that it is."""
    for i, token in enumerate(("anomaly_token", "normal_token")):
        if name == token:
            return "tokens", i
    name = name.replace("ln_post.", "norm.").replace("layer_transforms.layer_", "saf.")
    name = name.replace("cross_attn.layer_attentions.layer_", "sca.")
    for theirs, own in (
        (".mlp.0.", ".fc1."), (".mlp.3.", ".fc2."), ("anchor_queries", "anchors"), ("pos_encoding", "pos"),
        ("res_scale", "alpha"), ("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("q_norm", "norm_q"),
        ("k_norm", "norm_k"), ("gate.0", "gate"), ("out_proj", "out"),
    ):  # fmt: skip
        name = name.replace(theirs, own)
    return name, slice(None)


# --- the recipe against the authors' program


def test_each_loss_and_gradient_is_the_authors(golden, trained_norm):
    terms = train.loss_terms(trained_norm(golden["images"]), golden["train/masks"], golden["train/labels"])
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
    learned = {name for name in trained_norm.learned() if not name.endswith("norm_k.bias")}
    assert seen == learned


def test_three_steps_are_the_authors(golden, trained_norm):
    frozen = {name: p.clone() for name, p in trained_norm.backbone.named_parameters()}
    optimizer = torch.optim.AdamW(train.param_groups(trained_norm), weight_decay=0.01)
    batch = golden["images"], golden["train/masks"], golden["train/labels"]
    for i in range(3):
        terms = train.step(trained_norm, optimizer, batch, (2, 2))
        assert terms["total"] == pytest.approx(golden[f"train/after_3_steps/loss_{i}"].item(), abs=1e-5)
    for key, expected in golden.items():
        if key.startswith("train/after_3_steps/") and "loss" not in key:
            name, part = ours(key.removeprefix("train/after_3_steps/"))
            torch.testing.assert_close(trained_norm.get_parameter(name)[part], expected, rtol=0, atol=1e-5)
    for name, p in trained_norm.backbone.named_parameters():
        assert torch.equal(p, frozen[name]) and p.grad is None


def test_everything_learned_is_in_one_group_and_only_the_tokens_learn_fast(model):
    tokens, rest = train.param_groups(model, lr=2e-4, token_lr=3e-3)
    assert tokens["params"] == [model.tokens] and (tokens["lr"], rest["lr"]) == (3e-3, 2e-4)
    assert len(rest["params"]) + 1 == len(model.learned())
    assert {id(p) for p in rest["params"]} == {
        id(p) for name, p in model.named_parameters() if name in model.learned() and name != "tokens"
    }


def test_the_schedule_is_torchs_cosine_over_epochs():
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([p], 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7, eta_min=1e-4)
    for epoch in range(7):
        assert train.token_rate(epoch, 7) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
    assert train.token_rate(0, 1, 5e-3) == 5e-3
    assert {train.token_rate(epoch, 4, 1e-6) for epoch in range(4)} == {1e-6}  # a low rate does not rise


def test_each_token_is_clipped_alone_as_torch_clips(model):
    gradient = torch.stack([torch.full((64,), 3.0), torch.full((64,), 0.01)])
    model.tokens.grad = gradient.clone()
    model.norm.weight.grad = torch.full((64,), 9.0)
    train.clip_tokens(model)
    for i in range(2):
        p = nn.Parameter(torch.zeros(64))
        p.grad = gradient[i].clone()
        nn.utils.clip_grad_norm_([p], 1.0)
        torch.testing.assert_close(model.tokens.grad[i], p.grad)
    assert torch.equal(model.tokens.grad[1], gradient[1]) and model.norm.weight.grad.eq(9).all()


# --- the losses on any data


def outputs(n: int, seed: int = 0) -> Output:
    g = torch.Generator().manual_seed(seed)
    maps = (4 * torch.randn(n, 2, 12, 10, generator=g)).requires_grad_()
    tokens = torch.randn(n, 2, 8, generator=g).requires_grad_()
    fused = maps.sum(dim=1)
    return Output(fused, fused.flatten(1).topk(2).values.mean(dim=1), maps, tokens)


def one_hot_focal(maps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """As the authors write it."""
    q = maps.sigmoid()
    total = 0
    for layer in q.unbind(1):
        probability = torch.stack([1 - layer, layer], dim=1)
        target = F.one_hot(masks.long(), 2).movedim(-1, 1).float().clamp(1e-5, 1 - 1e-5)
        p = (target * probability).sum(dim=1) + 1e-5
        total = total - ((1 - p) ** 2 * p.log()).mean()
    return total


def test_focal_without_one_hot_is_focal(model):
    output = outputs(5)
    masks = (torch.rand(5, 12, 10, generator=torch.Generator().manual_seed(1)) > 0.7).float()
    found = train.loss_terms(output, masks, masks.flatten(1).amax(dim=1))["focal"]
    assert found.item() == pytest.approx(one_hot_focal(output.layer_maps, masks).item(), rel=1e-5)


def test_unknown_pixels_leave_focal_and_dice_and_nothing_else():
    output, masks = outputs(4), torch.zeros(4, 12, 10)
    masks[1, 2:5] = 1
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0])
    masks[2:] = math.nan
    found = train.loss_terms(output, masks, labels)
    first = train.loss_terms(Output(*(x[:2] for x in output)), masks[:2], labels[:2])
    whole = train.loss_terms(output, torch.zeros(4, 12, 10), labels)
    for name in ("focal", "dice"):
        assert found[name].item() == pytest.approx(first[name].item(), rel=1e-6)
    for name in ("image", "token"):
        assert found[name].item() == pytest.approx(whole[name].item(), rel=1e-6)
    nothing = train.loss_terms(output, torch.full((4, 12, 10), math.nan), labels)
    assert nothing["pixel"].item() == 0 and nothing["total"].isfinite()
    nothing["total"].backward()
    assert output.layer_maps.grad.isfinite().all()


def test_shares_of_a_batch_add_up_to_its_loss():
    output, masks, labels = outputs(5), torch.zeros(5, 12, 10), torch.tensor([1.0, 0, 1, 0, 1])
    masks[0, 1:4], masks[1] = 1, math.nan
    whole = train.loss_terms(output, masks, labels)
    parts = [
        train.loss_terms(Output(*(x[at] for x in output)), masks[at], labels[at], (5, 4))
        for at in (slice(0, 1), slice(1, 2), slice(2, 5))
    ]
    for name, value in whole.items():
        assert sum(part[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-5)


def test_step_clips_the_tokens(golden, trained_norm):
    batch = golden["images"], golden["train/masks"], golden["train/labels"]
    sgd, before = torch.optim.SGD([trained_norm.tokens], 1.0), trained_norm.tokens.detach().clone()
    trained_norm.tokens.register_hook(lambda g: 10 * g)  # far above 1
    train.loss_terms(trained_norm(batch[0]), *batch[1:])["total"].backward()
    norms = trained_norm.tokens.grad.norm(dim=1)
    trained_norm.zero_grad()
    train.step(trained_norm, sgd, batch, (2, 2))
    moved = (trained_norm.tokens - before).norm(dim=1)
    torch.testing.assert_close(moved, norms.clamp(max=1.0), rtol=1e-3, atol=1e-4)
    assert norms.max() > 1


def test_a_gradient_that_is_no_number_moves_nothing(golden, trained_norm):
    batch = golden["images"], golden["train/masks"], golden["train/labels"]
    before = {name: p.clone() for name, p in trained_norm.state_dict().items()}
    trained_norm.norm.weight.register_hook(lambda g: g * math.inf)
    adam = torch.optim.AdamW(train.param_groups(trained_norm))
    assert not math.isfinite(train.step(trained_norm, adam, batch, (2, 2))["total"])
    assert all(torch.equal(p, before[name]) for name, p in trained_norm.state_dict().items())


def test_accumulation_changes_nothing(golden, trained_norm):
    images = torch.cat([golden["images"], golden["images"].flip(-1)[:1]])
    masks = torch.cat([golden["train/masks"], torch.full((1, 84, 84), math.nan)])
    batch, found = (images, masks, torch.tensor([1.0, 0.0, 1.0])), []
    start = {name: p.clone() for name, p in trained_norm.state_dict().items()}
    for parts in (1, 2, 8):
        trained_norm.load_state_dict(start)
        trained_norm.zero_grad()
        sgd = torch.optim.SGD(trained_norm.parameters(), 1e-2)
        terms = train.step(trained_norm, sgd, batch, (3, 2), accumulate=parts)
        found.append((terms, {name: p.clone() for name, p in trained_norm.learned().items()}))
    for terms, learned in found[1:]:
        assert terms == pytest.approx(found[0][0], rel=1e-5)
        for name, p in learned.items():
            torch.testing.assert_close(p, found[0][1][name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(found[0][1]["tokens"], start["tokens"])


def test_only_the_backbone_runs_in_bf16_and_nothing_of_it_changes(model):
    model, images = still(model).train(), torch.rand(2, 3, 56, 56)
    before = {name: p.clone() for name, p in model.backbone.state_dict().items()}
    kinds: dict[str, set] = {"blocks": set(), "learned": set()}
    for layer in model.layers:
        for part in (model.sca[str(layer)].v, model.saf[str(layer)].fc1):
            part.register_forward_hook(lambda _m, x, y: kinds["learned"].add((x[0].dtype, y.dtype)))
    model.backbone.blocks[1].fc1.register_forward_hook(lambda _m, _x, y: kinds["blocks"].add(y.dtype))
    plain = model(images)
    with train.BackboneIn(model, torch.bfloat16):
        cast = model(images)
    assert kinds["blocks"] == {torch.float32, torch.bfloat16}
    assert kinds["learned"] == {(torch.float32, torch.float32)}
    torch.testing.assert_close(cast.map, plain.map, rtol=0, atol=0.05)
    assert not torch.equal(cast.map, plain.map) and torch.equal(model(images).map, plain.map)
    assert all(torch.equal(p, before[name]) for name, p in model.backbone.state_dict().items())


# --- a run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """MVTec's layout, 13 images: the last batch of 4 has one, so that the second rank has none."""
    root, rng = tmp_path_factory.mktemp("data") / "nuts", np.random.default_rng(0)
    for kind, count in dict(good=6, cut=7).items():
        for i in range(count):
            pixels, mask = rng.integers(90, 130, (50, 60, 3), dtype=np.uint8), np.zeros((50, 60), np.uint8)
            if kind == "cut":
                mask[10 + i : 20 + i, 20:40] = 255
                pixels[mask > 0] = 250
                (root / "nut" / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / "nut" / "ground_truth" / kind / f"{i:03}_mask.png")
            (root / "nut" / "test" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "nut" / "test" / kind / f"{i:03}.png")
    return root


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A small model to begin with."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start")
    VisualAD(SMALL).save_pretrained(folder)
    return folder


STEPS = 12  # 3 epochs of 13 images in batches of 4


@pytest.fixture(scope="module")
def flags(data, start) -> Callable[..., list[str]]:
    def make(out: Path, *more: object) -> list[str]:
        command = ["--data", data, "--model", start, "--epochs", 3, "--batch-size", 4, "--workers", 0]
        return [*map(str, [*command, "--save-every", 0, "--out", out, *more])]

    return make


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """What a run that nothing disturbed leaves."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(flags(out)) == 0
    return out


def same(out: Path, whole: Path) -> None:
    assert (out / "log.jsonl").read_bytes() == (whole / "log.jsonl").read_bytes()
    a, b = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items())
    assert (out / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert not list(out.glob(".*.part"))


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_run_trains_what_is_learned_and_saves_a_model_that_loads(data, start, whole):
    lines = log(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == [1] * 4 + [2] * 4 + [3] * 4
    assert [line["token_lr"] for line in lines[::4]] == [train.token_rate(e, 3) for e in range(3)]
    assert {line["lr"] for line in lines} == {1e-4}
    for line in lines:
        parts = line["image"] + line["focal"] + line["dice"] + line["token"]
        assert line["total"] == pytest.approx(parts, rel=1e-5)
        assert line["pixel"] == pytest.approx(line["focal"] + line["dice"], rel=1e-5)
    before, model = VisualAD.from_pretrained(start), VisualAD.from_pretrained(whole)
    for name, p in model.state_dict().items():
        changed = not torch.equal(p, before.state_dict()[name])
        assert changed != name.startswith("backbone."), name
    card = (whole / "README.md").read_text()
    assert "13 images of nuts; 3 epochs, batch 4, lr 0.0001, tokens 0.001, seed 111" in card
    assert model.threshold["made"] in (whole / "README.md").read_text()
    scores = [(model.predict(r.path, size=56).score, r.label) for r in evaluate.read_dataset(data)[1]]
    best = max(f1(scores, s - 1e-9) for s, _ in scores)
    assert f1(scores, model.threshold["value"]) == pytest.approx(best)
    assert evaluate.main(["--data", str(data), "--model", str(whole), "--workers", "0"]) == 0


def f1(scores: list[tuple[float, int]], limit: float) -> float:
    hits = sum(label for score, label in scores if score > limit)
    return 2 * hits / (sum(score > limit for score, _ in scores) + sum(label for _, label in scores))


def test_training_learns(data, start, tmp_path):
    options = ["--data", data, "--model", start, "--workers", 0, "--epochs", 15, "--lr", 1e-3]
    assert train.main([*map(str, [*options, "--batch-size", 4, "--out", tmp_path / "run"])]) == 0
    totals = [line["total"] for line in log(tmp_path / "run")]
    assert sum(totals[-4:]) < 0.8 * sum(totals[:4])
    model, (_, records, _) = VisualAD.from_pretrained(tmp_path / "run"), evaluate.read_dataset(data)
    after = evaluate.evaluate(model, records)["mean"]
    assert after["image_auroc"] > 0.9 and after["pixel_auroc"] > 0.9


def test_orders_and_dropout_are_functions_of_the_seed_and_differ(flags, tmp_path, monkeypatch):
    assert train.batches(9, 4, 1, 0) == train.batches(9, 4, 1, 0) != train.batches(9, 4, 1, 1)
    assert train.batches(9, 4, 1, 0) != train.batches(9, 4, 2, 0)
    assert sorted(sum(train.batches(9, 4, 1, 0), [])) == list(range(9))
    monkeypatch.setattr(train, "batches", lambda *_: [[0, 7], [0, 7]])  # so that only dropout differs
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda _: None)
    lines = []
    for seed in (1, 7):
        more = ["--seed", seed, "--batch-size", 13, "--epochs", 1]
        assert train.main(flags(tmp_path / str(seed), *more)) == 0
        lines += [line["total"] for line in log(tmp_path / str(seed))]
    assert len(set(lines)) == 4 and max(lines) < 1.2 * min(lines)


class Fake(nn.Module):
    """A detector whose score is the mean of the image's red channel."""

    sigma = 3.0

    def __init__(self):
        super().__init__()
        self.tokens, self.threshold, self.display_high = nn.Parameter(torch.zeros(2, 1)), {"value": 9}, 7.0

    def infer(self, images):
        return images[:, 0] * 2, images[:, 0].mean(dim=(1, 2))


def test_the_threshold_is_the_best_of_all_also_among_ties(tmp_path):
    levels = {"good": [10, 20, 20, 60, 90, 90], "bad": [20, 60, 60, 90, 120, 130, 200]}
    for kind, values in levels.items():
        (tmp_path / kind).mkdir()
        for i, value in enumerate(values):
            Image.new("RGB", (16, 16), (value, 0, 0)).save(tmp_path / kind / f"{i}.png")
    model, samples = Fake(), train.Samples(evaluate.read_dataset(tmp_path)[1], 16)
    made = train.decide(model, samples, 4, 0)
    scores = [(value / 255, int(kind == "bad")) for kind, values in levels.items() for value in values]
    best = max(f1(scores, limit) for limit in np.linspace(-0.1, 1, 2000))
    assert f1(scores, model.threshold["value"]) == best and f"{best:.3f}" in made
    assert model.display_high == pytest.approx(np.quantile([2 * v / 255 for v in levels["bad"]], 0.9))
    assert model.threshold["size"] == [16, 16] and model.threshold["sigma"] == 3.0
    only = train.Samples([r for r in samples.records if r.label], 16)
    assert (
        "none" in train.decide(model, only, 4, 0) and model.threshold is None and model.display_high is None
    )


def test_bf16_is_the_default_where_the_hardware_has_it(flags, tmp_path, monkeypatch):
    for has, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(train, "has_bf16", lambda _, has=has: has)
        assert train.main(flags(tmp_path / name, "--epochs", 1)) == 0
        assert torch.load(tmp_path / name / "checkpoint.pt")["key"]["dtype"] == name
    assert log(tmp_path / "bfloat16") != log(tmp_path / "float32")
    assert train.has_bf16("mps") is False


def test_workers_and_the_clock_change_nothing(flags, whole, tmp_path):
    assert train.main(flags(tmp_path / "run", "--workers", 2, "--save-every", 10)) == 0
    same(tmp_path / "run", whole)


def test_after_each_epoch_another_set_is_scored_by_evaluate(data, flags, whole, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(flags(out, "--eval", data)) == 0
    same(out, whole)
    assert capsys.readouterr().out.count("AUPRO") == 3
    rows = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    report = [
        "--data",
        data,
        "--model",
        out,
        "--json",
        tmp_path / "r.json",
        "--workers",
        0,
        "--batch-size",
        4,
    ]
    assert evaluate.main([*map(str, report)]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["mean"] == pytest.approx(rows[-1]["mean"], abs=1e-6)


# --- interrupted

PATCHED = """
import os, signal, sys, time
import evaluate, train

step, replace, saves = train.step, os.replace, []

def slow(*inputs):
    time.sleep(0.5)
    return step(*inputs)

def fatal(source, target):
    saves.append(target)
    if len(saves) == int(os.environ.get("DIE_IN_SAVE", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(source, target)

train.step, os.replace = slow, fatal
sys.exit(train.main(sys.argv[1:]))
"""


def launch(tmp_path: Path, arguments: list[str], **environment: str) -> subprocess.Popen:
    (tmp_path / "patched.py").write_text(PATCHED)
    command = [sys.executable, tmp_path / "patched.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    options = dict(env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen([*map(str, command)], **options)


def wait_for_step(out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or len((out / "log.jsonl").read_text().splitlines()) < step:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_run_that_was_killed_ends_bit_identical(flags, whole, tmp_path, at):
    out = tmp_path / "run"
    process = launch(tmp_path, flags(out))
    wait_for_step(out, at)
    process.kill()
    process.wait()
    done = torch.load(out / "checkpoint.pt")["step"]
    assert at - 1 <= done < STEPS and not (out / "model.safetensors").exists()
    with open(out / "log.jsonl", "a") as file:  # a step after the checkpoint, cut off in the middle
        file.write('{"step": 99, "epo')
    assert train.main(flags(out, "--resume", "--workers", 1)) == 0
    same(out, whole)


def test_a_run_that_was_killed_before_its_first_step_can_be_resumed(flags, whole, tmp_path):
    out = tmp_path / "run"
    process = launch(tmp_path, flags(out, "--save-every", 60), DIE_IN_SAVE="3")  # that after the first epoch
    assert process.wait() == -signal.SIGKILL
    assert torch.load(out / "checkpoint.pt")["step"] == 0 and len(log(out)) == 4
    assert train.main(flags(out, "--resume")) == 0
    same(out, whole)


def test_sigterm_to_all_processes_saves(flags, whole, tmp_path):
    out = tmp_path / "run"
    process = launch(tmp_path, flags(out, "--save-every", 60, "--workers", 2))
    wait_for_step(out, 1)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 130 and "--resume goes on" in said, said
    assert 1 <= torch.load(out / "checkpoint.pt")["step"] == len(log(out))
    assert train.main(flags(out, "--resume")) == 0
    same(out, whole)


def test_an_epoch_whose_evaluation_was_lost_is_evaluated_on_resuming(
    data, flags, whole, tmp_path, monkeypatch
):
    out, scored = tmp_path / "run", train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert train.main(flags(out, "--eval", data, "--save-every", 60)) == 130
    assert torch.load(out / "checkpoint.pt")["step"] == 4
    monkeypatch.setattr(train, "evaluate", scored)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert train.main(flags(out, "--eval", data, "--resume")) == 0
    assert [json.loads(line)["epoch"] for line in (out / "eval.jsonl").read_text().splitlines()] == [1, 2, 3]
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    same(out, whole)


def test_ctrl_c_during_an_evaluation_stops_after_it(data, flags, whole, tmp_path, monkeypatch, capfd):
    out, scored = tmp_path / "run", train.evaluate

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return scored(*args, **options)

    monkeypatch.setattr(train, "evaluate", interrupted)
    assert train.main(flags(out, "--eval", data)) == 130
    assert "will stop after this step or evaluation" in capfd.readouterr().err
    assert len(log(out)) == torch.load(out / "checkpoint.pt")["step"] == STEPS // 3
    assert len((out / "eval.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(train, "evaluate", scored)
    assert train.main(flags(out, "--resume")) == 0
    same(out, whole)


def test_a_kill_in_the_middle_of_a_save_loses_nothing(flags, whole, tmp_path):
    out = tmp_path / "run"
    process = launch(tmp_path, flags(out), DIE_IN_SAVE="5")  # checkpoint 0, the empty log, checkpoints 1, 2
    assert process.wait() == -signal.SIGKILL
    assert torch.load(out / "checkpoint.pt")["step"] == 2 and list(out.glob(".*.part"))
    assert train.main(flags(out, "--resume")) == 0
    same(out, whole)


def test_ctrl_c_saves_and_says_how_to_go_on(flags, whole, tmp_path):
    out = tmp_path / "run"
    process = launch(tmp_path, flags(out, "--save-every", 60, "--workers", 1))
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130 and "--resume goes on" in said and "Traceback" not in said
    assert 1 <= torch.load(out / "checkpoint.pt")["step"] == len(log(out)) < STEPS
    assert train.main(flags(out, "--resume")) == 0
    same(out, whole)


def test_a_finished_run_resumes_to_itself(flags, whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("checkpoint.pt", "log.jsonl"):
        (out / name).write_bytes((whole / name).read_bytes())
    assert train.main(flags(out, "--resume")) == 0
    same(out, whole)


def test_a_run_is_never_overwritten_unasked_and_other_flags_are_refused(flags, whole, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert train.main(flags(whole)) == 2
    others = dict(
        seed=1, lr=2e-4, token_lr=2e-3, epochs=4, synthetic="mix", limit=3, batch_size=5, accumulate=2
    )
    others = [[f"--{name.replace('_', '-')}", value] for name, value in others.items()]
    others += [["--compile"], ["--checkpoint-activations"], ["--model", "tiny"], ["--dtype", "float32"]]
    for other in others:
        assert train.main(flags(whole, "--resume", *other)) == 2
    said = capsys.readouterr().err
    assert "--resume or --overwrite" in said and said.count("belongs to another run") == len(others)
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


def test_overwrite_begins_anew(flags, whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    for name in train.FILES:
        (out / name).write_text("stale")
    assert train.main(flags(out, "--overwrite")) == 0
    same(out, whole)
    assert "stale" not in (out / "README.md").read_text() and not (out / "eval.jsonl").exists()


def test_overwrite_removes_nothing_before_the_new_run_can_begin(flags, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "model.safetensors").write_text("precious")
    for wrong in (["--data", tmp_path / "nothing"], ["--size", "57"], ["--eval", tmp_path / "nothing"]):
        assert train.main(flags(out, "--overwrite", *wrong)) == 2
    assert (out / "model.safetensors").read_text() == "precious"


def test_a_loss_that_is_no_number_stops_and_names_the_images(flags, tmp_path, monkeypatch, capsys):
    def broken(*inputs, terms=train.loss_terms, calls=[]):  # noqa: B006
        calls.append(0)
        found = terms(*inputs)
        return {name: value * (math.nan if len(calls) == 6 else 1) for name, value in found.items()}

    monkeypatch.setattr(train, "loss_terms", broken)
    out = tmp_path / "run"
    assert train.main(flags(out)) == 2
    said = capsys.readouterr().err
    assert "step 6: the loss" in said and said.count(".png") == 4
    kept = torch.load(out / "checkpoint.pt")
    assert kept["step"] == 5 and all(p.isfinite().all() for p in kept["learned"].values())


def test_a_full_disk_is_an_error_and_the_old_checkpoint_is_whole(flags, tmp_path, monkeypatch, capsys):
    def full(source, target, replace=os.replace, calls=[]):  # noqa: B006
        calls.append(0)
        if len(calls) == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert train.main(flags(tmp_path / "run")) == 2
    assert "No space left" in capsys.readouterr().err
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 3


# --- two ranks

TWO = """
import os, sys
import torch
from torch import nn
import train

def seeded(seed, real=torch.manual_seed):
    with open("seeds" + os.environ["RANK"] + "of" + os.environ["WORLD_SIZE"], "a") as file:
        file.write(f"{seed}\\n")
    return real(seed)

torch.manual_seed, nn.Dropout.forward = seeded, lambda self, x: x
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_ranks_train_what_one_trains(flags, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    for n, out in ((1, "one"), (2, "two")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        command += [tmp_path / "two.py", *flags(tmp_path / out, "--dtype", "float32")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"seeds{rank}of2").read_text().splitlines()[-STEPS:] for rank in (0, 1))
    assert len({*first, *second}) == 2 * STEPS  # of dropout
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == STEPS
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=2e-4)
    moments = [torch.load(tmp_path / name / "checkpoint.pt")["optimizer"]["state"] for name in ("one", "two")]
    for i, a in moments[0].items():  # AdamW's step hides the scale of a gradient, its moments do not
        a, b = a["exp_avg"], moments[1][i]["exp_avg"]
        assert (a - b).abs().max() <= 0.02 * a.abs().max() + 1e-7
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, p in one.items():
        if not name.endswith("norm_k.bias"):  # its gradient is rounding noise, which AdamW makes steps of
            torch.testing.assert_close(p, two[name], rtol=0, atol=2e-4, msg=name)


# --- any data


def test_a_sample_is_a_function_of_seed_epoch_and_index(data):
    _, records, _ = evaluate.read_dataset(data)
    samples = train.Samples(records, 56, seed=5, synthetic=True)
    again = train.Samples(records, 56, seed=5, synthetic=True)
    np.random.seed(0)
    for i in range(len(records)):
        for a, b in zip(samples[2, i], again[2, i], strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    normal = [i for i, record in enumerate(records) if not record.label]
    painted = [sum(samples[epoch, i][2] for epoch in range(12)) for i in normal]
    assert 0.25 < sum(painted) / (12 * len(normal)) < 0.75
    others = train.Samples(records, 56, seed=6, synthetic=True)
    assert any(not torch.equal(samples[0, i][0], others[0, i][0]) for i in normal)
    plain = train.Samples(records, 56)
    for i in normal:
        image, mask, label = samples[0, i]
        changed = (image - plain[0, i][0]).abs().amax(dim=0) > 0.1
        assert label == mask.any() and (not changed.any() or mask.any())
    for i in set(range(len(records))) - set(normal):
        assert torch.equal(samples[0, i][0], plain[0, i][0]) and samples[0, i][2] == 1


def test_what_is_unknown_is_nan_as_the_layout_says(data, tmp_path):
    _, records, _ = evaluate.read_dataset(data)
    samples = train.Samples(records, 56)
    for i, record in enumerate(records):
        image, mask, label = samples[0, i]
        assert image.shape == (3, 56, 56) and samples.has_mask(i)
        assert label == record.label and bool(mask.any()) == bool(record.label)
    for kind in ("good", "bad"):
        (tmp_path / kind).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / kind / "a.png")
    _, records, _ = evaluate.read_dataset(tmp_path)
    for i in range(2):
        assert train.Samples(records, 56)[0, i][1].isnan().all() and not train.Samples(records, 56).has_mask(
            i
        )
    assert train.Samples(records, 56, synthetic=True)[0, 1][1].isnan().sum() == 0  # good: it is all normal


def test_a_few_good_photos_are_enough(start, tmp_path, capsys):
    for i in range(6):
        pixels = np.random.default_rng(i).integers(90, 130, (40, 40, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.jpg")
    options = ["--data", tmp_path / "photos", "--model", start, "--workers", 0, "--epochs", 2]
    options = [*map(str, [*options, "--out", tmp_path / "run"])]
    assert train.main(options) == 2
    assert "--synthetic" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert train.main([*options, "--synthetic", "only"]) == 0
    model = VisualAD.from_pretrained(tmp_path / "run")
    assert model.threshold and "procedural defects" in (tmp_path / "run" / "README.md").read_text()


def test_counts_are_of_images_and_of_those_with_a_mask(data, start, tmp_path, monkeypatch):
    """In meta.json a class without any mask may stand beside one with masks."""
    _, records, _ = evaluate.read_dataset(data)
    entries = {"masked": [], "unmasked": []}
    for record in records:
        for cls, rows in entries.items():
            mask = str(record.mask) if record.mask and cls == "masked" else ""
            names = dict(img_path=str(record.path), mask_path=mask, cls_name=cls, specie_name=record.kind)
            rows.append(names | dict(anomaly=record.label))
    (tmp_path / "data").mkdir()
    for row in entries["unmasked"]:  # the same image under another name: each may be listed once
        row["img_path"] = os.path.relpath(row["img_path"], tmp_path / "data")
    (tmp_path / "data" / "meta.json").write_text(json.dumps({"test": entries}))
    seen, step = [], train.step

    def spy(model, optimizer, batch, counts, weight, accumulate):
        known = ~batch[1].isnan().flatten(1).any(dim=1)
        seen.append((counts, (len(known), int(known.sum())), accumulate))
        return step(model, optimizer, batch, counts, weight, accumulate)

    monkeypatch.setattr(train, "step", spy)
    options = ["--data", tmp_path / "data", "--model", start, "--workers", 0, "--accumulate", 2]
    assert train.main([*map(str, [*options, "--batch-size", 4, "--out", tmp_path / "run"])]) == 0
    assert all(counts == found and parts == 2 for counts, found, parts in seen)
    assert {found for _, found, _ in seen} - {(4, 4), (4, 0)} and sum(found[1] for _, found, _ in seen) == 13


def test_synthetic_only_leaves_the_real_anomalies_out(data, start, flags, tmp_path, monkeypatch):
    seen = []
    samples = train.Samples
    monkeypatch.setattr(
        train, "Samples", lambda records, *rest: seen.append(records) or samples(records, *rest)
    )
    assert train.main(flags(tmp_path / "a", "--synthetic", "only", "--epochs", 1)) == 0
    assert train.main(flags(tmp_path / "b", "--synthetic", "--epochs", 1)) == 0
    assert [[r.label for r in records].count(1) for records in seen] == [0, 7]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (["--lr", "nan"], "--lr"), (["--token-lr", "-1"], "--token-lr"), (["--seed", "-1"], "--seed"),
        (["--batch-size", "0"], "--batch-size"), (["--size", "56"], "--backbone"),
        (["--epochs", "0"], "--epochs"), (["--device", "cuda"], "CUDA"),
        (["--save-every", "nan"], "--save-every"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_at_the_door(flags, tmp_path, wrong, hint, capsys):
    if wrong[1] == "cuda" and torch.cuda.is_available():
        wrong[1] = "cuda:99"
    assert train.main(flags(tmp_path / "run", *wrong)) == 2
    assert hint in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_model_is_not_replaced_by_what_starts_from_it(flags, start, tmp_path, capsys):
    own = shutil.copytree(start, tmp_path / "own")
    for model in (own, own / "model.safetensors"):
        assert train.main(flags(own, "--model", model, "--overwrite")) == 2
        assert "lies in --out" in capsys.readouterr().err and (own / "model.safetensors").is_file()


def test_a_lost_log_and_half_a_first_save_do_not_keep_a_run_from_going_on(flags, whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".checkpoint.pt.123.part").write_bytes(b"half")
    assert train.main(flags(out, "--resume")) == 0
    same(out, whole)
    (out / "log.jsonl").unlink()
    assert train.main(flags(out, "--resume")) == 0
    assert VisualAD.from_pretrained(out).threshold == VisualAD.from_pretrained(whole).threshold


def test_a_folder_of_something_else_is_left_alone(data, flags, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("x")
    assert train.main(flags(tmp_path)) == 2 and train.main(flags(data / "runs")) == 2
    assert train.main(flags(tmp_path / "mine.txt")) == 2
    said = capsys.readouterr().err
    assert "holds something else" in said and "lies in the dataset" in said and "is no folder" in said


@pytest.mark.parametrize("kind", ["good", "cut"])
def test_a_set_of_one_kind_trains_with_a_warning(data, start, tmp_path, kind, capsys):
    root = tmp_path / "data" / "nut"
    (root / "test").mkdir(parents=True)
    (root / "test" / kind).symlink_to(data / "nut" / "test" / kind)
    (root / "ground_truth").symlink_to(data / "nut" / "ground_truth")
    options = ["--data", root.parent, "--dataset", "mvtec", "--model", start, "--workers", 0]
    status = train.main([*map(str, [*options, "--out", tmp_path / "run"])])
    said = capsys.readouterr().err
    if kind == "good":  # the masks of the defects are left over
        assert status == 2 and "without an image" in said
        (root / "ground_truth").unlink()
        status = train.main([*map(str, [*options, "--out", tmp_path / "run"])])
        said = capsys.readouterr().err
    assert status == 0 and "warning: every image is" in said
    assert VisualAD.from_pretrained(tmp_path / "run").threshold is None


def test_the_papers_protocol_sets_epochs_by_dataset(data, start, tmp_path, capsys):
    options = [*map(str, ["--data", data, "--model", start, "--workers", 0, "--protocol", "paper"])]
    assert train.main([*options, "--out", str(tmp_path / "a")]) == 0
    assert len(log(tmp_path / "a")) == 2 * 2  # MVTec-AD: two epochs, batches of 8
    assert "--protocol paper, taken for mvtec: epochs 2" in capsys.readouterr().out
    assert train.main([*options, "--out", str(tmp_path / "b"), "--epochs", "1"]) == 0
    assert len(log(tmp_path / "b")) == 2
    assert train.main([*options, "--dataset", "mpdd", "--out", str(tmp_path / "d")]) == 2
    assert "not mpdd: give --epochs" in capsys.readouterr().err
    photos = str(data / "nut" / "test" / "good")
    more = ["--data", photos, "--synthetic", "--out", str(tmp_path / "c")]
    assert train.main([*options, *more]) == 2
    assert "give --epochs" in capsys.readouterr().err


def test_compile_and_checkpointing_are_what_the_flags_say(flags, whole, tmp_path, monkeypatch):
    compiled, checkpointed = [], []
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or f)
    again = train.checkpoint
    monkeypatch.setattr(train, "checkpoint", lambda f, *x, **kw: checkpointed.append(f) or again(f, *x, **kw))
    assert train.main(flags(tmp_path / "run", "--compile", "--checkpoint-activations")) == 0
    assert compiled and len(checkpointed) >= 4 * SMALL.depth
    same(tmp_path / "run", whole)


def test_a_compiled_run_is_compiled_once(flags, tmp_path, monkeypatch):
    compile_, counters = torch.compile, torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend="eager"))
    assert train.main(flags(tmp_path / "run", "--compile", "--epochs", 2)) == 0
    # one for batches of 4, one for the last of 1, one for evaluation; and dynamic shapes may add one each
    assert 1 <= counters["stats"]["unique_graphs"] <= 6
