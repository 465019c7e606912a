"""The command line, run as a user runs it: pytest tests/test_cli.py"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOLDEN, ROOT
from PIL import Image
from test_predict import picture

import visualad
from visualad import VisualAD, main, overlay


@pytest.fixture
def images(tmp_path, monkeypatch):
    """in/{a.png, a.jpg, sub/a.png, broken.png, big.bmp} below the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "a.jpg", "sub/a.png", "big.bmp")):
        Image.fromarray(picture(60 + 100 * i, 80, i)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "broken.png").write_bytes(b"broken")
    return tmp_path


def test_a_folder_gives_a_table_heatmaps_and_json(images, capsys):
    assert main(["in", "--json", "out/report.json"]) == 1  # one image is unreadable
    printed = capsys.readouterr()
    report = json.loads((images / "out" / "report.json").read_text())
    assert report["model"] == "tiny" and [e["path"] for e in report["errors"]] == ["in/broken.png"]
    assert "broken.png" in printed.err and "1 unreadable" in printed.out
    assert [i["path"] for i in report["images"]] == ["in/a.jpg", "in/a.png", "in/big.bmp", "in/sub/a.png"]
    maps = [i["heatmap"] for i in report["images"]]
    assert maps == ["heatmaps/a.png", "heatmaps/a-1.png", "heatmaps/big.png", "heatmaps/sub/a.png"]
    model = VisualAD.from_pretrained("tiny")
    for record in report["images"]:
        with Image.open(record["path"]) as image, Image.open(record["heatmap"]) as heatmap:
            assert image.size == heatmap.size
        want = model.predict(record["path"])
        assert (
            record["score"] == pytest.approx(want.score, abs=1e-5) and record["anomalous"] == want.anomalous
        )
        assert f"{record['score']:8.4f}" in printed.out
    assert report["settings"]["size"] == [224, 224] and report["settings"]["sigma"] == 1.7
    assert report["complete"] is True


def test_an_interrupt_is_one_line(images, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(VisualAD, "predict_iter", interrupted)
    assert main(["in"]) == 130
    assert capsys.readouterr().err.strip() == "visualad: interrupted"


@pytest.mark.parametrize(
    "error, status", [(KeyboardInterrupt(), 130), (BrokenPipeError(32, "Broken pipe"), 2)]
)
def test_what_was_found_before_an_interrupt_is_in_the_json(images, monkeypatch, error, status):
    whole = VisualAD.predict_iter

    def interrupted(self, *args, **kwargs):
        found = whole(self, *args, **kwargs)
        yield next(found)
        raise error

    monkeypatch.setattr(VisualAD, "predict_iter", interrupted)
    assert main(["in", "--json", "r.json"]) == status
    report = json.loads((images / "r.json").read_text())
    assert [i["path"] for i in report["images"]] == ["in/a.jpg"] and report["complete"] is False
    assert (images / "heatmaps" / "a.png").is_file()


def test_what_was_found_before_the_system_ends_the_run_is_in_the_json(images, monkeypatch):
    whole = VisualAD.predict_iter

    def ended(self, *args, **kwargs):
        found = whole(self, *args, **kwargs)
        yield next(found)
        os.kill(os.getpid(), signal.SIGTERM)
        yield from found

    monkeypatch.setattr(VisualAD, "predict_iter", ended)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or a failure would end the tests
    try:
        assert main(["in", "--json", "r.json"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [i["path"] for i in json.loads((images / "r.json").read_text())["images"]] == ["in/a.jpg"]


def test_a_json_that_cannot_be_written_is_told_before_the_work(images, capsys):
    for path, told in (("in/a.jpg/report.json", "in/a.jpg is no folder"), ("/dev/stdout", "no regular file")):
        assert main(["in/a.png", "--json", path]) == 2
        printed = capsys.readouterr()
        assert told in printed.err and "verdict" not in printed.out


def test_the_exit_status_is_0_when_all_is_read(images):
    assert main(["in/a.png", "in/sub/a.png"]) == 0
    assert sorted(p.name for p in (images / "heatmaps").iterdir()) == ["a-1.png", "a.png"]


def test_an_image_given_twice_is_one_image_and_options_may_come_first(images):
    assert main(["--size", "80", "in/a.png", "in/a.png", "in/sub", "in/sub/a.png", "--json", "r.json"]) == 0
    assert len(json.loads((images / "r.json").read_text())["images"]) == 2
    assert sorted(p.name for p in (images / "heatmaps").iterdir()) == ["a-1.png", "a.png"]


def test_links_that_lead_nowhere_are_named_and_the_others_go_on(images, capsys):
    (images / "in" / "lost.png").symlink_to(images / "gone.png")
    (images / "in" / "loop.png").symlink_to(images / "in" / "loop.png")
    assert main(["in", "--json", "r.json"]) == 1
    report = json.loads((images / "r.json").read_text())
    assert [e["path"] for e in report["errors"]] == ["in/broken.png", "in/loop.png", "in/lost.png"]
    assert len(report["images"]) == 4


def test_names_that_the_terminal_cannot_write_stop_nothing(images):
    (images / "in" / "a.png").rename(images / "in" / "\u00e4 \u4e2d.png")
    command = [sys.executable, str(ROOT / "visualad.py"), "in/\u00e4 \u4e2d.png"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0 and r"\xe4" in done.stdout, done.stderr


def test_a_later_run_does_not_take_heatmaps_for_images(images, capsys):
    (images / "in" / "broken.png").unlink()
    limits = set()
    for out in ("heatmaps", "heatmaps", "others"):
        assert main([".", "--calibrate", ".", "--json", "r.json", "--out", out]) == 0
        report = json.loads((images / "r.json").read_text())
        assert len(report["images"]) == 4 and "calibrated on 4 images of ." in capsys.readouterr().out
        limits.add(report["settings"]["threshold"]["value"])
    assert len(limits) == 1
    assert len(VisualAD.from_pretrained("tiny").predict(".")) == 4


def test_images_are_never_overwritten(images, capsys):
    before = (images / "in" / "a.png").read_bytes()
    for out in ("in", "."):
        assert main(["in", "--out", out]) == 2
        assert "choose another folder" in capsys.readouterr().err
    assert main(["in/a.png", "--out", "in"]) == 2
    assert (images / "in" / "a.png").read_bytes() == before


def test_a_heatmap_replaces_heatmaps_alone(images, capsys):
    out, photo = images / "heatmaps", images / "photo.png"
    for _ in range(2):  # those of an earlier run may be replaced
        assert main(["in/a.png", "in/sub/a.png"]) == 0
    ours = (out / "a.png").read_bytes()
    Image.fromarray(picture(60, 80, 9)).save(photo)
    before = photo.read_bytes()
    target = out / "a-1.png"
    for link, content in ((None, before), (None, b"notes"), (photo, None), (images / "gone", None)):
        target.unlink()
        target.symlink_to(link) if link else target.write_bytes(content)
        capsys.readouterr()
        assert main(["in/a.png", "in/sub/a.png"]) == 2
        printed = capsys.readouterr()
        assert "a-1.png is there and is no heatmap of an earlier run" in printed.err and not printed.out
        assert os.readlink(target) == str(link) if link else target.read_bytes() == content
        assert photo.read_bytes() == before and (out / "a.png").read_bytes() == ours
    assert main(["in/a.png", "--out", "elsewhere"]) == 0


def test_thresholds_from_the_command_line_and_from_normal_images(images, capsys):
    def verdicts(*arguments):
        main(["in", "--json", "r.json", *arguments])
        return [i["anomalous"] for i in json.loads((images / "r.json").read_text())["images"]]

    assert verdicts("--threshold", "-9") == [True] * 4 and verdicts("--threshold", "9") == [False] * 4
    zero = [i["score"] > 0 for i in json.loads((images / "r.json").read_text())["images"]]
    assert verdicts("--threshold", "0") == zero
    assert verdicts("--size", "80") == [None] * 4
    assert verdicts("--size", "80", "--threshold", "9") == [False] * 4
    (images / "in" / "broken.png").unlink()
    assert verdicts("--calibrate", "in") == [False] * 4
    assert verdicts("--calibrate", "in", "--size", "80", "--sigma", "2") == [False] * 4
    made = json.loads((images / "r.json").read_text())["settings"]["threshold"]
    assert made["size"] == [80, 80] and made["sigma"] == 2.0 and "4 normal" in made["made"]
    assert main(["in/a.png", "--calibrate", "nowhere"]) == 2 and "nowhere" in capsys.readouterr().err


def test_size_sigma_and_dtype_reach_the_model(images):
    model = VisualAD.from_pretrained("tiny")
    main(["in/a.png", "--size", "80x120", "--sigma", "1", "--batch-size", "1", "--json", "r.json"])
    want = model.predict("in/a.png", size=(80, 120), sigma=1.0).score
    report = json.loads((images / "r.json").read_text())
    assert report["images"][0]["score"] == pytest.approx(want, abs=1e-6) and report["settings"]["size"] == [
        80,
        120,
    ]
    main(["in/a.png", "--dtype", "bfloat16", "--json", "r.json"])
    rough = json.loads((images / "r.json").read_text())["images"][0]["score"]
    assert rough != model.predict("in/a.png").score and rough == pytest.approx(
        model.predict("in/a.png").score, abs=0.1
    )


def test_the_authors_checkpoint_runs_with_a_local_backbone(images):
    files = [
        str(GOLDEN / "visualad_official.pth"),
        "--backbone-weights",
        str(GOLDEN / "clip_openai.safetensors"),
    ]
    assert main(["in/a.png", "--model", *files, "--final-norm", "checkpoint", "--json", "r.json"]) == 0
    model = VisualAD.from_pretrained(files[0], backbone_weights=files[2], final_norm="checkpoint")
    record = json.loads((images / "r.json").read_text())["images"][0]
    assert (
        record["score"] == pytest.approx(model.predict("in/a.png").score, abs=1e-5)
        and record["anomalous"] is None
    )


def test_plain_images_stay_plain(images):
    path = ROOT / "examples" / "anomalous" / "brick-crack.png"
    main([str(path), "--threshold", "0"])
    model = VisualAD.from_pretrained("tiny")
    found = model.predict(path)
    drawn, image = np.array(Image.open(f"heatmaps/{path.name}")), np.array(Image.open(path))
    assert np.array_equal(drawn[found.map <= 0], image[found.map <= 0])
    want = overlay(path, found.map, high=model.display_high)  # one scale, the model's
    assert np.array_equal(drawn, np.array(want)) and (found.map > 0).any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.png"], "nowhere.png"),
        (["in/a.png", "--out", "in/a.png"], "in/a.png is no folder"),
        (["in/a.png", "--model", "nothing"], "nothing"),
        (["in/a.png", "--model", str(ROOT / "README.md")], "plain tensors: Weights only load failed.\n"),
        (["in/a.png", "--size", "81"], "near: 80, 88"),
        (["in/a.png", "--size", "80,80"], "N or HxW"),
        (["in/a.png", "--threshold", "nan"], "finite"),
        (["in/a.png", "--json", "in/a.png"], "read in this run"),
        (["in/a.png", "--sigma", "-1"], "sigma"),
        (["in/a.png", "--device", "gpu"], "gpu"),
        (["in/a.png", "--batch-size", "0"], "batch-size"),
    ],
)
def test_errors_are_one_line_and_a_status(images, capsys, arguments, message):
    status = main(arguments)
    printed = capsys.readouterr().err
    assert (
        status == (1 if message == "nowhere.png" else 2) and message in printed and "Traceback" not in printed
    )


@pytest.mark.parametrize("flags", [[""], ["in/a.png", "--calibrate", ""], ["in/a.png", "--json", ""]])
def test_an_unset_variable_of_the_shell_is_not_the_current_folder(images, capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    assert stopped.value.code == 2 and "the name is empty" in capsys.readouterr().err


def test_a_run_that_fails_before_the_first_image_keeps_the_report_of_an_earlier_one(
    images, tmp_path, monkeypatch
):
    arguments = ["in/a.png", "--json", str(tmp_path / "r.json")]
    assert main(arguments) == 0
    before = (tmp_path / "r.json").read_bytes()

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(visualad.VisualAD, "infer", fails)
    assert main(arguments) == 2 and (tmp_path / "r.json").read_bytes() == before


def test_a_threshold_is_given_or_calibrated(images, capsys):
    with pytest.raises(SystemExit):
        main(["in/a.png", "--threshold", "0.1", "--calibrate", "in"])
    assert "not allowed with argument --threshold" in capsys.readouterr().err


def test_the_script_runs_from_another_folder(images):
    command = [sys.executable, str(ROOT / "visualad.py"), "in/a.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "in/a.png" in done.stdout, done.stderr
    assert (images / "heatmaps" / "a.png").is_file()


def test_heatmaps_are_neither_calibrated_on_nor_written_over_good_images(images, capsys):
    (images / "in" / "broken.png").unlink()
    (images / "in").rename(images / "out-of-the-way")
    (images / "out-of-the-way" / "sub").rename(images / "good")
    for _ in range(2):  # the second time heatmaps lie there too
        assert main([".", "--calibrate", ".", "--json", "r.json"]) == 0
        made = json.loads((images / "r.json").read_text())["settings"]["threshold"]["made"]
        assert made == "0.99 of 4 normal images"
    before = (images / "good" / "a.png").read_bytes()
    capsys.readouterr()
    assert main(["out-of-the-way", "--out", "good", "--calibrate", "good"]) == 2
    printed = capsys.readouterr()
    assert "--out good holds images" in printed.err and "verdict" not in printed.out
    assert (images / "good" / "a.png").read_bytes() == before


def test_a_name_as_long_as_a_name_may_be_stops_nothing(images):
    long = "\u7f3a" * 80 + "-and-more.png"  # 253 bytes
    (images / "in" / "a.png").rename(images / "in" / long)
    assert main([f"in/{long}"]) == 0 and os.listdir("heatmaps") == [long]


def test_json_never_replaces_what_the_run_reads(images, capsys):
    model = VisualAD.from_pretrained("tiny")
    model.save_pretrained("mine")
    read = images / "mine" / "model.safetensors", images / "in" / "sub" / "a.png"
    before = [path.read_bytes() for path in read]
    assert main(["in/a.png", "--model", "mine", "--json", str(read[0])]) == 2
    assert main(["in/a.png", "--calibrate", "in/sub", "--json", str(read[1])]) == 2
    assert capsys.readouterr().err.count("is read in this run") == 2
    assert before == [path.read_bytes() for path in read]


def test_the_summary_tells_no_threshold_at_all_from_none_for_this_size(images, capsys):
    main(["in/a.png", "--final-norm", "backbone"])
    assert "1 images, no threshold, 0 unreadable" in capsys.readouterr().out
    main(["in/a.png", "--size", "80"])
    assert "no threshold for this size and sigma," in capsys.readouterr().out
