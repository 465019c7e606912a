"""One pass over a dataset, alone, on many ranks, interrupted: pytest tests/test_evaluate.py"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sklearn import metrics

import evaluate
from visualad import VisualAD

SETTINGS = ["--size", "64", "--batch-size", "4", "--workers", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """MVTec's layout: two classes, 11 and 9 images, so that neither 2, 3 nor the batch divides them."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for cls, counts in (("nut", dict(good=5, cut=3, hole=3)), ("tile", dict(good=4, crack=5))):
        for kind, count in counts.items():
            for i in range(count):
                h, w = (int(side) for side in rng.integers(40, 90, 2))
                pixels = rng.integers(90, 130, (h, w, 3), dtype=np.uint8)
                mask = np.zeros((h, w), np.uint8)
                if kind != "good":
                    mask[h // 4 : h // 4 + 10 + i, w // 3 : w // 3 + 12] = 255
                    mask[-6:, -6:] = 255
                    pixels[mask > 0] = 240
                    (root / cls / "ground_truth" / kind).mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(root / cls / "ground_truth" / kind / f"{i:03}_mask.png")
                (root / cls / "test" / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / cls / "test" / kind / f"{i:03}.png")
    return root


def run(data, *more) -> int:
    return evaluate.main(["--data", str(data), *SETTINGS, *map(str, more)])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> bytes:
    """The report of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "whole.json"
    assert run(data, "--json", path) == 0
    return path.read_bytes()


# --- the numbers


@pytest.mark.parametrize("native", [False, True])
def test_the_report_holds_what_scikit_learn_finds_in_the_same_maps(data, tmp_path, native):
    more = ["--native"] if native else []
    assert run(data, "--json", tmp_path / "r.json", "--save-maps", tmp_path / "maps", *more) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    _, records, faults = evaluate.read_dataset(data)
    assert not faults and len(report["records"]) == len(records) == 20
    paths = [record["path"] for record in report["records"]]
    assert paths == sorted(paths)
    scored = {record["path"]: record for record in report["records"]}
    for cls in ("nut", "tile"):
        labels, scores, maps, masks = [], [], [], []
        for record in records:
            if record.cls == cls:
                name = record.path.relative_to(data).as_posix()
                assert scored[name]["class"] == cls and scored[name]["label"] == (record.kind != "good")
                labels.append(scored[name]["label"])
                scores.append(scored[name]["score"])
                heat = np.load(tmp_path / "maps" / f"{name}.npy")
                _, mask = evaluate.read(record)
                mask = mask if native else evaluate.shrink(mask, (64, 64))
                assert heat.dtype == np.float32 and heat.shape == mask.shape
                maps.append(heat.ravel())
                masks.append(mask.numpy().ravel())
        masks, maps = np.concatenate(masks), np.concatenate(maps)
        found = report["classes"][cls]
        assert found["image_auroc"] == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
        assert found["image_ap"] == pytest.approx(metrics.average_precision_score(labels, scores), abs=1e-12)
        assert found["pixel_auroc"] == pytest.approx(metrics.roc_auc_score(masks, maps), abs=1e-5)
        assert found["pixel_ap"] == pytest.approx(metrics.average_precision_score(masks, maps), abs=1e-4)
        precision, recall, _ = metrics.precision_recall_curve(masks, maps)
        best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
        assert found["pixel_f1_max"] == pytest.approx(best, abs=1e-4)
    for name, value in report["mean"].items():
        assert value == sum(row[name] for row in report["classes"].values()) / 2


def test_scores_and_native_maps_are_those_of_predict(data, tmp_path):
    assert run(data, "--json", tmp_path / "r.json", "--save-maps", tmp_path / "maps", "--native") == 0
    model = VisualAD.from_pretrained("tiny")
    for record in json.loads((tmp_path / "r.json").read_text())["records"]:
        expected = model.predict(data / record["path"], size=64)
        assert record["score"] == pytest.approx(expected.score, abs=1e-5)  # other batches, other last digits
        heat = np.load(tmp_path / "maps" / f"{record['path']}.npy")
        np.testing.assert_allclose(heat, expected.map, atol=1e-5)


def test_the_report_says_how_it_was_made_and_the_table_rounds_it(data, tmp_path, capsys):
    assert run(data, "--json", tmp_path / "r.json", "--pro", "published") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["model"] == "tiny" and report["data"] == str(data)
    settings = dict(dataset="mvtec", split="test", size=[64, 64], sigma=1.7, batch_size=4, dtype="float32")
    settings |= dict(native=False, pro="published", map_range=[-4.0, 4.0], bins=2**20, bin_width=2.0**-17)
    assert report["settings"].items() >= settings.items()
    assert report["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line and line[0] != " "}
    for cls, row in [*report["classes"].items(), ("mean", report["mean"])]:
        assert rows[cls][1:] == [f"{100 * row[name]:.1f}" for name in evaluate.METRICS]
    assert rows["nut"][0] == "11" and rows["mean"][0] == "20"
    assert "PRO*" in printed and "layout mvtec" in printed


def test_what_a_set_cannot_have_is_a_dash_and_null(data, tmp_path, capsys):
    arguments = ["--data", str(data / "nut" / "test" / "cut"), *SETTINGS, "--json", str(tmp_path / "r.json")]
    assert evaluate.main(arguments) == 0
    text = (tmp_path / "r.json").read_text()
    assert "NaN" not in text
    report = json.loads(text)
    assert set(report["mean"].values()) == {None} and report["records"][0]["label"] is None
    printed = capsys.readouterr().out
    assert printed.splitlines()[-2].split() == ["mean", "3", *"-------"]
    for record in report["records"]:
        assert f"{record['score']:8.4f}  {record['path']}" in printed


def test_workers_change_nothing(data, whole, tmp_path):
    assert run(data, "--json", tmp_path / "r.json", "--workers", 2) == 0
    assert (tmp_path / "r.json").read_bytes() == whole


def test_workers_leave_the_signals_to_the_program(data, tmp_path, monkeypatch):
    made, loader = [], evaluate.DataLoader
    monkeypatch.setattr(evaluate, "DataLoader", lambda *a, **k: made.append(loader(*a, **k)) or made[-1])
    assert run(data, "--json", tmp_path / "r.json", "--workers", 1, "--limit", 1) == 0
    kept = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        made[0].worker_init_fn(0)
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), kept, strict=True):
            signal.signal(number, handler)


def test_damaged_weights_are_an_error_and_not_a_number(data, tmp_path, capsys):
    model = VisualAD.from_pretrained("tiny")
    model.tokens.data[0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    assert run(data, "--model", tmp_path / "bad", "--json", tmp_path / "r.json") == 2
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "r.json").exists()


# --- pictures


def test_the_page_shows_every_image_from_disk_alone(tmp_path):
    folder = tmp_path / "data" / 'odd "names" #1 %20 é'
    for place in (folder, tmp_path / "data" / "good"):
        place.mkdir(parents=True)
        for name in ("a.png", "it's <b>&.png"):
            Image.new("RGB", (40, 30), (200, 10, 10)).save(place / name)
    assert run(tmp_path / "data", "--heatmaps", tmp_path / "out") == 0
    text = (tmp_path / "out" / "index.html").read_text()
    assert not re.search(r"https?:|<script|<b>", text)
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 4
    for source in sources:
        with Image.open(tmp_path / "out" / unquote(unescape(source))) as strip:
            assert strip.size == (3 * 64 + 16, 64)
            assert strip.getpixel((20, 20)) == (200, 10, 10)  # the image
            assert strip.getpixel((64 + 8 + 20, 20)) == (128, 128, 128)  # no mask


def test_the_strip_holds_the_mask_and_the_heatmap_on_its_scale():
    image, heat = torch.full((3, 6, 5), 0.2), torch.zeros(6, 5)
    heat[2, 3] = 2.0
    data = evaluate.strip(image, heat, heat > 0, high=2.0)
    strip = np.array(Image.open(io.BytesIO(data)))
    assert strip.shape == (6, 3 * 5 + 16, 3)
    assert (strip[:, :5] == 51).all()
    assert strip[2, 13 + 3].tolist() == [255, 255, 255] and strip[:, 13:18].sum() == 3 * 255
    assert strip[2, 26 + 3].tolist() == [255, 0, 0] and (strip[0, 26:] == 51).all()


@pytest.mark.parametrize("flag", ["--heatmaps", "--save-maps"])
def test_output_never_goes_into_the_dataset(data, flag, capsys):
    assert run(data, flag, data / "nut" / "out") == 2
    assert "choose another folder" in capsys.readouterr().err and not (data / "nut" / "out").exists()


def test_output_replaces_only_what_an_earlier_run_wrote(data, tmp_path, capsys):
    arguments = ["--limit", 1, "--heatmaps", tmp_path / "out", "--save-maps", tmp_path / "maps"]
    for _ in range(2):
        assert run(data, *arguments) == 0
    photo = next(data.rglob("*.png"))
    before = photo.read_bytes()
    written = sorted(path for path in tmp_path.rglob("*") if path.is_file() and data not in path.parents)
    assert {path.suffix for path in written} == {".png", ".html", ".npy"}
    for path in written:
        kept = path.read_bytes()
        path.unlink()
        path.symlink_to(photo)
        capsys.readouterr()
        assert run(data, *arguments) == 2
        assert f"{path} is" in capsys.readouterr().err and photo.read_bytes() == before
        path.unlink()
        path.write_bytes(kept)
    theirs = next(path for path in written if path.suffix == ".npy"), tmp_path / "out" / "index.html"
    for path in theirs:
        kept = path.read_bytes()
        for content in (b"<!doctype html>a page of theirs", b""):
            path.write_bytes(content)
            assert run(data, *arguments) == 2 and f"{path} is there" in capsys.readouterr().err
            assert path.read_bytes() == content
        path.write_bytes(kept)
    np.save(theirs[0], np.zeros((4, 4)))
    assert run(data, *arguments) == 2 and f"{theirs[0]} is there" in capsys.readouterr().err


def test_an_error_in_the_middle_ends_the_program_and_its_workers(data, tmp_path):
    (tmp_path / "out" / "nut").mkdir(parents=True)
    (tmp_path / "out" / "nut" / "test").write_text("no folder")
    command = [
        ROOT / "evaluate.py",
        "--data",
        data,
        *SETTINGS,
        "--workers",
        2,
        "--heatmaps",
        tmp_path / "out",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 2 and "evaluate: error: cannot write" in done.stderr, done.stderr


# --- many ranks


def ranks(n: int, *command: object) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launch, *map(str, command)], capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.mark.parametrize(
    ("n", "more"), [(2, ["--batch-size", 1, "--size", 256]), (3, ["--pro", "published", "--native"])]
)
def test_any_number_of_ranks_gives_the_same_digits(data, tmp_path, n, more):
    arguments = ["--data", data, *SETTINGS, *more, "--heatmaps", tmp_path / "out", "--json"]
    assert evaluate.main([*map(str, arguments), str(tmp_path / "one.json")]) == 0
    done = ranks(n, ROOT / "evaluate.py", *arguments, tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.json").read_bytes() == (tmp_path / "one.json").read_bytes()
    assert len(re.findall("^mean", done.stdout, re.MULTILINE)) == 1
    assert len(list((tmp_path / "out").rglob("*.png"))) == 20


FAILS = """
import sys
import evaluate

def broken(self, i, get=evaluate.Samples.__getitem__):
    if "hole/001" in str(self.records[i].path):
        raise ValueError("the disk is gone")
    return get(self, i)

evaluate.Samples.__getitem__ = broken
sys.exit(evaluate.main(sys.argv[1:]))
"""


def test_the_failure_of_one_rank_ends_all_with_its_error(data, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    done = ranks(2, tmp_path / "fails.py", "--data", data, *SETTINGS, "--json", tmp_path / "r.json")
    assert done.returncode != 0 and not (tmp_path / "r.json").exists()
    assert done.stderr.count("evaluate: error: the disk is gone") == done.stderr.count("evaluate: error") == 1


def test_bad_files_are_named_whichever_rank_reads_them(data, tmp_path):
    for i in range(3):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
        (tmp_path / f"bad{i}.png").write_bytes(b"no image")
    done = ranks(2, ROOT / "evaluate.py", "--data", tmp_path, *SETTINGS)
    assert done.returncode != 0
    assert all(f"bad{i}.png" in done.stderr for i in range(3)) and "3 files" in done.stderr
    assert done.stderr.count("evaluate: error") == 1


# --- interrupted

SLOW = """
import os, sys, time
import evaluate
from visualad import VisualAD

calls, parent = [], os.getppid()

def slow(self, *inputs, infer=VisualAD.infer):
    calls.append(0)
    time.sleep(0.3)
    while len(calls) > 2:
        if os.getppid() != parent:  # killed
            os._exit(1)
        time.sleep(0.1)
    return infer(self, *inputs)

VisualAD.infer = slow
sys.exit(evaluate.main(sys.argv[1:]))
"""


def stopped(folder, n: int, *arguments: object):
    """The state that n ranks left which were killed in the middle of the first class."""
    (folder / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    command = [
        *(command if n > 1 else command[:1]),
        folder / "slow.py",
        *arguments,
        "--json",
        folder / "r.json",
    ]
    environment, state = {**os.environ, "PYTHONPATH": str(ROOT)}, folder / "r.json.state"
    process = subprocess.Popen([*map(str, command)], env=environment, start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not state.exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    found = torch.load(state)
    assert 0 < found["done"] < 6 and found["open"] and not (folder / "r.json").exists()
    return state


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    return stopped(tmp_path_factory.mktemp("killed"), 1, "--data", data, *SETTINGS)


def test_a_killed_run_goes_on_to_the_identical_report(data, whole, killed, tmp_path, monkeypatch):
    calls, infer = [], VisualAD.infer
    monkeypatch.setattr(VisualAD, "infer", lambda self, *inputs: calls.append(0) or infer(self, *inputs))
    (tmp_path / "s").write_bytes(killed.read_bytes())
    assert run(data, "--json", tmp_path / "r.json", "--state", tmp_path / "s", "--resume") == 0
    assert (tmp_path / "r.json").read_bytes() == whole and not (tmp_path / "s").exists()
    assert len(calls) == 6 - torch.load(killed)["done"]  # 3 batches of each class


def test_a_state_on_rank_0_that_cannot_be_read_ends_all_with_one_message(data, tmp_path):
    (tmp_path / "s").write_bytes(b"damaged")
    done = ranks(2, ROOT / "evaluate.py", "--data", data, *SETTINGS, "--state", tmp_path / "s", "--resume")
    assert done.returncode != 0 and done.stderr.count("evaluate: error") == 1
    assert f"cannot read {tmp_path / 's'}" in done.stderr


def test_other_images_or_weights_are_another_run(data, killed, tmp_path, capsys):
    (tmp_path / "s").write_bytes(killed.read_bytes())
    model = VisualAD.from_pretrained("tiny")
    model.backbone.blocks[0].fc1.bias.data += 1e-3
    model.save_pretrained(tmp_path / "tiny2")
    arguments = ["--state", str(tmp_path / "s"), "--resume"]
    run(data, *arguments, "--model", tmp_path / "tiny2")
    assert "weights_sha256" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / "nut" / "test" / "good" / "000.png").rename(copy / "nut" / "test" / "good" / "new.png")
    run(copy, *arguments)
    assert "images '" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3)])
def test_a_killed_run_goes_on_with_another_number_of_ranks(data, whole, tmp_path, before, after):
    arguments = ["--data", data, *SETTINGS, "--batch-size", 2]
    assert evaluate.main([*map(str, arguments), "--json", str(tmp_path / "whole.json")]) == 0
    whole, state = (tmp_path / "whole.json").read_bytes(), stopped(tmp_path, before, *arguments)
    assert torch.load(state)["done"] % before == 0
    done = ranks(after, ROOT / "evaluate.py", *arguments, "--json", tmp_path / "r.json", "--resume")
    assert done.returncode == 0, done.stderr
    assert "images are done" in done.stdout
    assert (tmp_path / "r.json").read_bytes() == whole


@pytest.mark.parametrize(
    "other", [["--sigma", "3"], ["--limit", "2"], ["--batch-size", "2"], ["--heatmaps", "x"]]
)
def test_a_state_of_other_settings_is_refused_and_kept(data, killed, tmp_path, other, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").write_bytes(killed.read_bytes())
    assert run(data, "--state", tmp_path / "s", "--resume", *other) == 2
    said = capsys.readouterr().err
    assert (
        "belongs to another run" in said and other[0].strip("-").replace("-", "_") in said or "images" in said
    )
    assert "bin_width" not in said  # which did not change
    assert (tmp_path / "s").read_bytes() == killed.read_bytes()


def test_without_a_state_resume_begins_and_a_damaged_one_is_an_error(data, whole, tmp_path, capsys):
    assert run(data, "--json", tmp_path / "r.json", "--resume") == 0
    assert (tmp_path / "r.json").read_bytes() == whole
    (tmp_path / "s").write_bytes(b"damaged")
    assert run(data, "--state", tmp_path / "s", "--resume") == 2
    assert run(data, "--resume") == 2
    errors = capsys.readouterr().err
    assert f"cannot read {tmp_path / 's'}" in errors and "--resume needs" in errors


def test_an_interrupted_run_is_not_begun_anew_unasked(data, killed, tmp_path, capsys):
    state = tmp_path / "r.json.state"
    state.write_bytes(killed.read_bytes())
    assert run(data, "--json", tmp_path / "r.json", "--limit", 1) == 2
    assert "--resume, or remove it" in capsys.readouterr().err
    assert state.read_bytes() == killed.read_bytes() and not (tmp_path / "r.json").exists()


def test_ctrl_c_says_whether_anything_was_saved(data, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, tmp_path / "slow.py", "--data", data, *SETTINGS]
    for more, hint in (([], "nothing was saved"), (["--json", tmp_path / "r.json"], "--resume goes on from")):
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([*map(str, [*command, *more])], env=environment, **options)
        assert "layout mvtec" in process.stdout.readline()
        deadline = time.monotonic() + 60
        while more and not (tmp_path / "r.json.state").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode == 130 and hint in said and "Traceback" not in said, said


def test_the_report_and_its_state_are_two_files(data, tmp_path, capsys):
    assert run(data, "--json", tmp_path / "r", "--state", tmp_path / "r") == 2
    assert "two files" in capsys.readouterr().err


def test_what_a_run_reads_is_not_written_over(data, tmp_path, capsys):
    VisualAD.from_pretrained("tiny").save_pretrained(tmp_path / "model")
    copy = shutil.copytree(data, tmp_path / "data")
    image, model = copy / "nut" / "test" / "good" / "000.png", tmp_path / "model" / "model.safetensors"
    before = image.read_bytes(), model.read_bytes()
    (copy / "meta.json").write_text("{}")
    assert run(copy, "--json", image) == 2
    assert run(copy, "--json", copy / "meta.json") == 2
    (tmp_path / "link.json").symlink_to(image)
    assert run(copy, "--json", tmp_path / "link.json") == 2
    assert run(copy, "--model", tmp_path / "model", "--state", model) == 2
    assert run(copy, "--model", model, "--state", model) == 2
    assert capsys.readouterr().err.count("is read in this run") == 5
    assert (copy / "meta.json").read_text() == "{}"
    assert before == (image.read_bytes(), model.read_bytes())


def test_no_two_images_share_a_heatmap(tmp_path):
    names = {evaluate.inside(name) for name in ("1:11.png", "11:1.png", "a:b/c.png", "a/b/c.png", "ab/c.png")}
    assert len(names) == 5
    assert [evaluate.inside(name) for name in ("C:/a/b.png", "/a/b.png", "//a.png")] == [
        "C/a/b.png", "a/b.png", "a.png",
    ]  # fmt: skip


def test_the_report_names_the_dataset_that_was_named(data, tmp_path):
    assert run(data, "--json", tmp_path / "r.json", "--limit", 2, "--dataset", "mpdd") == 0
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["dataset"] == "mpdd"


def test_names_that_a_terminal_cannot_write_stop_nothing(tmp_path):
    for kind in ("good", "bad"):
        (tmp_path / "é" / kind).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "é" / kind / "ü.png")
    command = [ROOT / "evaluate.py", "--data", tmp_path / "é", *SETTINGS, "--json", tmp_path / "r.json"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["records"][0]["path"] == "bad/ü.png"


@pytest.mark.parametrize("flag", ["--json", "--state"])
def test_where_nothing_can_be_written_is_told_before_the_work(data, tmp_path, flag, capsys):
    assert run(data, flag, tmp_path) == 2
    assert run(data, "--heatmaps", ROOT / "README.md") == 2
    found = capsys.readouterr()
    assert f"{tmp_path} is no regular file" in found.err and "README.md" in found.err and not found.out


def test_the_page_begins_with_the_highest_score_and_names_labels():
    rows = [
        {"path": f"{cls}/{i}.png", "class": cls, "kind": "", "label": i % 2, "score": i / 10}
        for cls in ("b", "a") for i in (1, 3, 2)
    ]  # fmt: skip
    text = evaluate.page("t", "table", rows, 2.0)
    assert re.findall(r'src="(.*?)"', text) == [f"{cls}/{i}.png.png" for cls in "ab" for i in (3, 2, 1)]
    assert "score 0.3000, label 1: a/3.png" in text and "full red at 2" in text


def test_a_report_is_written_whole_or_not_at_all(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "r.json").write_text("the old one")
    monkeypatch.setattr(os, "replace", full)
    assert run(data, "--json", tmp_path / "r.json", "--limit", 2) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "the old one"
