"""One pass over a dataset, alone, on many ranks, interrupted: pytest tests/test_evaluate.py"""

from __future__ import annotations

import io
import json
import os
import re
from html import unescape
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import ROOT, by_sklearn, ranks, write, write_mvtec
from PIL import Image

import evaluate
from visualad import VisualAD, resize

SETTINGS = ["--size", "64", "--batch-size", "4"]
torch.set_num_threads(1)  # for images as small as these more only wait for each other


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """MVTec's layout: two classes, 11 and 9 images, so that neither 2, 3 nor the batch divides them."""
    nut, tile = dict(good=5, cut=3, hole=3), dict(good=4, crack=5)
    return write_mvtec(tmp_path_factory.mktemp("data"), nut=nut, tile=tile)


def run(data, *more) -> int:
    return evaluate.main(["--data", str(data), *SETTINGS, *map(str, more)])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict:
    """The report of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("whole") / "whole.json"
    assert run(data, "--json", path) == 0
    return json.loads(path.read_text())


def same(found: dict, want: dict) -> None:
    """The same images and labels, scores to 1e-5, metrics to 1e-6."""
    assert found["settings"] == want["settings"] and found["errors"] == want["errors"]
    for a, b in zip(found["records"], want["records"], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-5) and a | {"score": 0} == b | {"score": 0}
    for a, b in zip(*([*x["classes"].items(), ("mean", x["mean"])] for x in (found, want)), strict=True):
        assert a[0] == b[0] and a[1] == pytest.approx(b[1], abs=1e-6)


@pytest.mark.parametrize("native", [False, True])
def test_the_report_holds_what_scikit_learn_finds_in_the_same_maps(data, tmp_path, native):
    assert run(data, "--json", tmp_path / "r.json", *["--native"] * native) == 0
    report, model = json.loads((tmp_path / "r.json").read_text()), VisualAD.from_pretrained("tiny")
    paths = [record["path"] for record in report["records"]]
    assert paths == sorted(paths) and len(paths) == 20 and not report["errors"]
    scored = {record["path"]: record for record in report["records"]}
    _, records = evaluate.read_dataset(data)
    for cls in ("nut", "tile"):
        labels, scores, maps, masks = [], [], [], []
        for record in (record for record in records if record.cls == cls):
            row, (image, mask) = scored[record.path.relative_to(data).as_posix()], evaluate.read(record)
            want = model.predict(record.path, size=64)
            assert row["class"] == cls and row["label"] == ("good" not in record.path.parts)
            assert row["score"] == pytest.approx(want.score, abs=1e-5)  # other batches, other last digits
            small, _ = model.infer(resize(image, (64, 64))[None])
            maps.append(want.map.ravel() if native else small.numpy().ravel())
            masks.append((mask if native else evaluate.shrink(mask, (64, 64))).numpy().ravel())
            labels.append(row["label"])
            scores.append(row["score"])
        found, kinds = report["classes"][cls], dict(image=(labels, scores))
        kinds["pixel"] = np.concatenate(masks), np.concatenate(maps)
        for kind, (truth, values) in kinds.items():
            for name, want in by_sklearn(np.array(truth) == 1, np.array(values)).items():
                tolerance = 1e-12 if kind == "image" else 1e-5 if name == "auroc" else 1e-4
                assert found[f"{kind}_{name}"] == pytest.approx(want, abs=tolerance)
        assert found["images"] == len(labels)
    for name in evaluate.METRICS:
        assert report["mean"][name] == sum(row[name] for row in report["classes"].values()) / 2


def test_the_report_says_how_it_was_made_and_the_table_rounds_it(data, tmp_path, capsys, whole):
    assert run(data, "--json", tmp_path / "r.json", "--pro", "published") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    settings = dict(model="tiny", data=str(data), dataset="mvtec", size=[64, 64], sigma=1.7, batch_size=4)
    settings |= dict(native=False, pro="published", dtype="float32")
    assert report["settings"].items() >= settings.items()
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line and line[0] != " "}
    for cls, row in [*report["classes"].items(), ("mean", report["mean"])]:
        assert rows[cls][1:] == [f"{100 * row[name]:.1f}" for name in evaluate.METRICS]
        exact = whole["mean"] if cls == "mean" else whole["classes"][cls]
        assert [row[x] == exact[x] for x in evaluate.METRICS] == [True] * 6 + [False]
    assert rows["nut"][0] == "11" and rows["mean"][0] == "20"
    assert "PRO*" in printed and "layout mvtec" in printed


def test_the_default_device_changes_nothing(data, whole, tmp_path):
    with torch.device("meta"):  # where a tensor that nobody asked for would have no values
        assert run(data, "--json", tmp_path / "r.json") == 0
        assert not evaluate.read(evaluate.read_dataset(data)[1][-1])[1].any()  # of a good image
    assert json.loads((tmp_path / "r.json").read_text()) == whole


def test_the_page_shows_every_image_from_disk_alone_the_highest_score_first(tmp_path):
    folder = tmp_path / "data" / 'odd "names" #1 %20 é'
    for place in (folder, tmp_path / "data" / "good"):
        for name in ("a.png", "it's <b>&.png"):
            write(place / name, np.full((30, 40, 3), (200, 10, 10), np.uint8))
    write(folder / "c.png", np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8))
    for more, (w, h) in (([], (64, 64)), (["--native"], (40, 30))):
        assert run(tmp_path / "data", "--heatmaps", tmp_path / "out", *more) == 0
        text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
        sources = [unquote(unescape(source)) for source in re.findall(r"src='([^']*)'", text)]
        scores = [float(score) for score in re.findall(r"<p>(-?[\d.]+) ", text)]
        assert len(sources) == 5 and not re.search(r"https?:|<script|<b>", text)
        assert scores == sorted(scores, reverse=True) and len(scores) == 5
        for source in sources:
            with Image.open(tmp_path / "out" / source) as strip:
                assert strip.size == (3 * w + 16, h) and strip.getpixel((w + 8 + 20, 20)) == (128, 128, 128)
                assert "c.png" in source or strip.getpixel((20, 20)) == (200, 10, 10)
    entry = dict(img_path="../good/a.png", mask_path="", cls_name="c", anomaly=0)
    (folder / "meta.json").write_text(json.dumps({"test": {"c": [entry]}}))
    assert run(folder, "--heatmaps", tmp_path / "far" / "deep") == 0
    strips = [*(tmp_path / "far").rglob("*.png")]  # they stay in their folder
    assert strips == [tmp_path / "far" / "deep" / "good" / "a.png.png"]


def test_the_strip_holds_the_mask_and_the_heatmap_on_its_scale():
    image, heat = torch.full((3, 6, 5), 0.2), torch.zeros(6, 5)
    heat[2, 3] = 2.0
    strip = np.array(Image.open(io.BytesIO(evaluate.strip(image, heat, heat > 0, high=2.0))))
    assert strip.shape == (6, 3 * 5 + 16, 3)
    assert (strip[:, :5] == 51).all() and (strip[:, 5:13] == 255).all()
    assert strip[2, 13 + 3].tolist() == [255, 255, 255] and strip[:, 13:18].sum() == 3 * 255
    assert strip[2, 26 + 3].tolist() == [255, 0, 0] and (strip[0, 26:] == 51).all()


@pytest.mark.parametrize(("n", "more"), [(2, []), (3, ["--pro", "published", "--native", "--batch-size", 1])])
def test_any_number_of_ranks_gives_the_same_numbers(data, tmp_path, n, more):
    bad = tmp_path / "data" / "cap" / "test" / "good"
    write(bad / "0.png", np.zeros((20, 20, 3), np.uint8))  # fewer images than ranks
    (bad / "1.png").write_bytes(b"no image")
    for cls in ("nut", "tile"):
        (tmp_path / "data" / cls).symlink_to(data / cls)
    arguments = ["--data", tmp_path / "data", *SETTINGS, *more, "--heatmaps", tmp_path / "out", "--json"]
    assert evaluate.main([*map(str, arguments), str(tmp_path / "one.json")]) == 1
    done = ranks(n, ROOT / "evaluate.py", *arguments, tmp_path / "r.json")
    assert done.returncode != 0 and "cap/test/good/1.png" in done.stderr and "error:" not in done.stderr
    same(*(json.loads((tmp_path / name).read_text()) for name in ("r.json", "one.json")))
    assert len(re.findall("^mean", done.stdout, re.MULTILINE)) == 1 == len(re.findall("layout", done.stdout))
    assert len(list((tmp_path / "out").rglob("*.png"))) == 21


FAILS = """
import os, sys, evaluate
if os.environ["RANK"] == "1":
    evaluate.read = lambda record: 1 / 0
sys.exit(evaluate.main(sys.argv[1:]))
"""


def test_a_rank_that_fails_does_not_leave_the_others_waiting(data, tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    done = ranks(2, tmp_path / "fails.py", "--data", data, *SETTINGS, "--json", tmp_path / "r.json")
    assert done.returncode != 0 and "division by zero" in done.stderr and not (tmp_path / "r.json").exists()


def test_an_interrupted_run_goes_on_with_the_next_class(data, whole, tmp_path, monkeypatch):
    calls, infer = [], VisualAD.infer

    def stops(self, images, sigma):
        calls.append(len(images))
        if sum(calls) > 11:  # in the second class
            raise KeyboardInterrupt
        return infer(self, images, sigma)

    monkeypatch.setattr(VisualAD, "infer", stops)
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        run(data, "--json", path)
    kept = json.loads(path.read_text())
    assert list(kept["classes"]) == ["nut"] and kept["classes"]["nut"] == whole["classes"]["nut"]
    calls[:] = [-100]
    assert run(data, "--json", path, "--resume") == 0
    assert sum(calls) == 9 - 100 and json.loads(path.read_text()) == whole


@pytest.mark.parametrize("other", [["--sigma", "3"], ["--limit", "2"], ["--native"], []])
def test_a_report_of_other_settings_or_none_is_refused_and_kept(data, whole, tmp_path, other, capsys):
    path = tmp_path / "r.json"
    assert run(data, "--json", path, "--resume") == 0  # there is none: it begins
    assert json.loads(path.read_text()) == whole
    path.write_text(json.dumps(whole) if other else "damaged")
    before = path.read_bytes()
    assert run(data, "--json", path, "--resume", *other) == 2 and path.read_bytes() == before
    told = capsys.readouterr().err
    name = f"made with another {other[0].strip('-')}" if other else "Expecting value"
    assert name in told and "Traceback" not in told
    path.write_text('{"other": 1}')
    assert run(data, "--json", path, "--resume") == run(data, "--heatmaps", data / "maps") == 2
    assert "made with another" in (told := capsys.readouterr().err) and "must lie outside --data" in told


def test_a_report_is_written_whole_or_not_at_all(data, tmp_path, monkeypatch, capsys):
    path, model = tmp_path / "r.json", VisualAD.from_pretrained("tiny")
    path.write_text("the old one")
    model.tokens.data[0] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    assert run(data, "--model", tmp_path / "damaged", "--json", path) == 2
    assert "nan" in capsys.readouterr().err

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run(data, "--json", path, "--limit", 2) == 2
    assert path.read_text() == "the old one"
