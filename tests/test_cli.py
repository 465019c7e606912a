"""The command line, run as a user runs it: pytest tests/test_cli.py"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from conftest import CLIP, OFFICIAL, ROOT, picture, python, write
from PIL import Image

import visualad
from visualad import VisualAD, main, overlay


@pytest.fixture
def images(tmp_path, monkeypatch):
    """in/{a.png, a.jpg, sub/a.png, big.bmp, broken.png} below the current folder."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a.png", "a.jpg", "sub/a.png", "big.bmp")):
        write(tmp_path / "in" / name, picture(60 + 100 * i, 80, i))
    (tmp_path / "in" / "broken.png").write_bytes(b"broken")
    return tmp_path


def report(*arguments, status=0):
    assert main([*arguments, "--json", "out/r.json"]) == status
    with open("out/r.json") as file:
        return json.load(file)


def column(found, name):
    return [image[name] for image in found["images"]]


def test_a_folder_gives_a_table_heatmaps_and_json_also_where_an_image_is_broken(images, capsys):
    (images / "in" / "lost.png").symlink_to(images / "gone.png")
    found, printed = report("in", "--batch-size", "3", status=1), capsys.readouterr()
    assert found["model"] == "tiny" and found["settings"]["size"] == [224, 224]
    assert [error["path"] for error in found["errors"]] == ["in/broken.png", "in/lost.png"]
    assert "broken.png" in printed.err and "4 images, 2 anomalous (above 0.1424), 2 unreadable" in printed.out
    assert column(found, "path") == ["in/a.jpg", "in/a.png", "in/big.bmp", "in/sub/a.png"]
    maps = [f"heatmaps/{name}.png" for name in ("a.jpg", "a.png", "big.bmp", "sub/a.png")]
    assert column(found, "heatmap") == maps and all(os.path.isfile(path) for path in maps)
    model = VisualAD.from_pretrained("tiny")
    for want, record in zip(model.predict(column(found, "path")), found["images"], strict=True):
        path, score, anomalous, heatmap = record.values()
        assert Image.open(path).size == Image.open(heatmap).size and f"{score:8.4f}" in printed.out
        assert score == pytest.approx(want.score, abs=1e-5) and anomalous == want.anomalous


@pytest.mark.parametrize("arguments, maps", [
    (["in/a.png", "in/sub/a.png"], ["a.png.png", "sub/a.png.png"]),
    (["in/sub/a.png"], ["a.png.png"]),
    (["--size", "80", "in/a.png", "in/a.png", "in/sub", "in/sub/a.png"], ["a.png.png", "sub/a.png.png"]),
])  # fmt: skip
def test_heatmaps_keep_the_path_below_the_common_folder_and_none_is_twice(images, arguments, maps):
    assert column(report(*arguments), "heatmap") == [f"heatmaps/{name}" for name in maps]


def test_images_below_out_are_not_read(images):
    (images / "in" / "broken.png").unlink()
    limits = []
    for _ in range(2):  # the second time heatmaps lie there
        found = report(".", "--calibrate", ".")
        limits.append(found["settings"]["threshold"])
        assert len(found["images"]) == 4
        (images / "heatmaps" / "broken.png").write_bytes(b"")
    assert limits[0] == limits[1]
    assert len(report("in", "--out", ".")["images"]) == 4  # nor hidden, where --out lies around them
    for _ in range(2):
        assert len(report("out/../in", "--out", "in/maps")["images"]) == 4
    with pytest.raises(FileNotFoundError, match="no image below .*in and outside .*in;"):
        visualad.images_below(images / "in", images / "in")


def test_what_was_found_before_an_interrupt_is_in_the_json(images, monkeypatch):
    whole = VisualAD.predict_iter

    def interrupted(self, *args, **kwargs):
        yield next(whole(self, *args, **kwargs))
        raise KeyboardInterrupt

    monkeypatch.setattr(VisualAD, "predict_iter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["in", "--json", "r.json"])
    assert column(json.loads((images / "r.json").read_text()), "path") == ["in/a.jpg"]
    assert (images / "heatmaps" / "a.jpg.png").is_file()


def test_thresholds_come_from_the_command_line_or_from_normal_images(images, capsys):
    (images / "in" / "broken.png").unlink()

    def verdicts(*arguments):
        return column(report("in", *arguments), "anomalous")

    assert verdicts("--threshold", "-9") == [True] * 4 and verdicts("--threshold", "9") == [False] * 4
    found = report("in", "--threshold", "-5e-05")  # no flag
    assert column(found, "anomalous") == [score > -5e-05 for score in column(found, "score")]
    assert found["settings"]["threshold"] == -5e-05
    assert None not in verdicts("--size", "224", "--sigma", "1.7")
    for other in (["--size", "80"], ["--sigma", "2"]):  # the model's threshold is for its own
        assert verdicts(*other) == [None] * 4 and verdicts(*other, "--threshold", "9") == [False] * 4
    assert "4 images, no threshold, 0 unreadable" in capsys.readouterr().out
    found = report("in", "--calibrate", "in", "--size", "80x96", "--sigma", "2")
    assert column(found, "anomalous") == [False] * 4
    assert found["settings"]["threshold"] == pytest.approx(max(column(found, "score")) + 1e-5, abs=1e-6)


def test_size_sigma_dtype_model_and_norm_reach_the_model(images):
    def score(*arguments):
        return column(report("in/a.png", *arguments), "score")[0]

    model = VisualAD.from_pretrained("tiny")
    want = model.predict("in/a.png", size=(80, 120), sigma=1.0).score
    assert score("--size", "80x120", "--sigma", "1", "--batch-size", "1") == pytest.approx(want, abs=1e-6)
    want, rough = model.predict("in/a.png").score, score("--dtype", "bfloat16")
    assert rough != want and rough == pytest.approx(want, abs=0.1)
    model = VisualAD.from_pretrained(OFFICIAL, backbone_weights=CLIP, final_norm="checkpoint")
    files = ["--model", str(OFFICIAL), "--backbone-weights", str(CLIP), "--final-norm", "checkpoint"]
    assert score(*files) == pytest.approx(model.predict("in/a.png").score, abs=1e-5)


def test_plain_images_stay_plain(images):
    path = ROOT / "examples" / "anomalous" / "brick-crack.png"
    report(str(path))
    model = VisualAD.from_pretrained("tiny")
    found = model.predict(path)
    drawn, image = np.array(Image.open(f"heatmaps/{path.name}.png")), np.array(Image.open(path))
    assert np.array_equal(drawn[found.map <= 0], image[found.map <= 0]) and (found.map > 0).any()
    want = overlay(path, found.map, high=2)  # one scale: half of what two layers can reach
    assert np.array_equal(drawn, np.array(want))


@pytest.mark.parametrize("arguments, status, message", [
    (["nowhere.png"], 1, "nowhere.png"), (["in/a.png", "--calibrate", "nowhere"], 2, "image below nowhere"),
    (["in/a.png", "--model", "in/broken.png"], 2, "in/broken.png cannot be read as weights"),
    (["in/a.png", "--model", "nothing"], 2, "nothing"), (["in/a.png", "--size", "81"], 2, "near: 80, 88"),
    (["in/a.png", "--size", "80x96x8"], 2, "96x8"), (["in/a.png", "--sigma", "-1"], 2, "sigma"),
    (["in/a.png", "--batch-size", "0"], 2, "batch-size"), (["in/a.png", "--out", "in/a.png"], 2, "in/a.png"),
    (["in/a.png", "--json", "in/a.png/r.json"], 2, "in/a.png"),
], ids=str)  # fmt: skip
def test_errors_are_one_line_and_a_status(images, capsys, arguments, status, message):
    assert main(arguments) == status
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and len(told.strip().splitlines()) == 1


def test_a_device_that_is_not_there_is_named_and_the_script_runs_without_docstrings(images, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["in/a.png", "--device", "gpu"])
    assert "--device: gpu is not there, the best is" in capsys.readouterr().err
    assert "in/a.png" in python("-OO", ROOT / "visualad.py", "in/a.png", folder=images)


FLAGS = dict(
    visualad="model size sigma device dtype out json threshold calibrate",
    evaluate="data dataset classes limit native pro json resume heatmaps model size device",
    train="data backbone model out epochs synthetic resume eval device",
)


@pytest.mark.parametrize("program", FLAGS)
def test_help_begins_with_two_examples_and_names_every_flag(program):
    printed = python("-OO", ROOT / f"{program}.py", "--help")  # also without docstrings
    assert all(f"{program}.py " in line for line in printed.splitlines()[1:3])
    assert all(f"--{flag}" in printed for flag in FLAGS[program].split())
    assert ("0.765" in printed) == (program == "evaluate")  # what the variants of AUPRO mean
