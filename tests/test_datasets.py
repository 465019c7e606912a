"""Tiny replicas of the 13 benchmarks, and what can be wrong with them: pytest tests/test_datasets.py"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate import DATASETS, LAYOUTS, Record, load_data, main, read, read_dataset, shrink
from visualad import to_tensor

H, W = 10, 12
BLOB = np.zeros((H, W), bool)
BLOB[3:7, 2:8] = True


def picture(mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    wide = mode == "I;16"
    return Image.fromarray(noise[..., 0] * np.uint16(257)) if wide else Image.fromarray(noise).convert(mode)


def painted(how: str, on: np.ndarray = BLOB) -> Image.Image:
    """A mask that is true on `on`."""
    if how == "16":
        return Image.fromarray(on.astype(np.uint16) * 256)  # whose low byte is 0
    if how not in ("index", "P"):
        return Image.fromarray(on if how == "1" else on.astype(np.uint8) * 255).convert(how)
    image = Image.fromarray(on * (np.arange(on.shape[1]) % 3 + 1).astype(np.uint8))  # classes 1 to 3
    if how == "P":
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    return image


def put(root: Path, files: dict[str, str]) -> Path:
    """Files below root: a mode makes a picture, "mask MODE" a mask, "empty MODE" an empty one,
    "narrow MODE" one of another size, "-> PATH" a link, "cut" half a file; other text is as it is."""
    for name, how in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        first, _, rest = how.partition(" ")
        if first == "->":
            path.symlink_to(rest)
        elif first in ("mask", "empty", "narrow"):
            painted(rest, (BLOB & (first != "empty"))[:, first == "narrow" :]).save(path)
        elif how in ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
            picture(how).save(path)
        elif how == "cut":
            picture().save(path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.write_text(how)
    return root


def rows(root: Path, *args: str) -> tuple[str, list[tuple]]:
    """Name of the layout; path, class, label, masks of each image."""
    name, records = read_dataset(root, *args)
    paths = [[Path(os.path.relpath(path, root)).as_posix() for path in (r.path, *r.masks)] for r in records]
    return name, [(path, r.cls, r.label, *masks) for r, (path, *masks) in zip(records, paths, strict=True)]


# each file as `put` makes it; of those to be found, the label, and masks as made
BRAIN = {
    "yes/Y1.jpg": "RGB,1", "yes/Y2.JPG": "L,1", "yes/Y10.png": "P,1", "yes/Y1.jpeg": "L,1",
    "no/1 no.jpeg": "L,0", "no/N.2.png": "RGBA,0", "no/n4.png": "LA,0", "no/n5.png": "I;16,0",
}  # fmt: skip
TABLE = """object,split,label,image,mask
pipe fryum,test,anomaly,pipe fryum/Data/Images/Anomaly/000.JPG,pipe fryum/Data/Masks/Anomaly/000.png
pipe fryum,test,normal,pipe fryum/Data/Images/Normal/0000.JPG,
candle,train,normal,candle/Data/Images/Normal/0000.JPG,
candle,test,normal,candle/Data/Images/Normal/0001.JPG,
candle,test,anomaly,candle/Data/Images/Anomaly/001.JPG,candle/Data/Masks/Anomaly/001.png
candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png
"""


def flat(images: str, masks: str) -> dict[str, str]:
    """CVC-ClinicDB, Endo: every image is anomalous and has a mask."""
    return {
        f"{images}/a.png": f"RGB,1,{masks}/a.png=mask 1", f"{images}/aB.PNG": f"P,1,{masks}/aB.bmp=mask L",
        f"{images}/10.bmp": f"L,1,{masks}/10.PNG=mask L", f"{images}/9.tif": f"RGB,1,{masks}/9.TIF=mask 1",
        f"{images}/x.y.png": f"RGBA,1,{masks}/x.y.png=mask RGB",
    }  # fmt: skip


def bmad(folder: str, suffix: str) -> dict[str, str]:
    """OCT17, HIS: labels of images alone."""
    return {
        f"test/good/{folder}N 1{suffix}": "L,0", f"test/good/{folder}n.2.png": "LA,0",
        f"test/Ungood/{folder}D1{suffix.upper()}": "RGB,1", f"test/Ungood/{folder}n.2.png": "L,1",
        f"valid/Ungood/{folder}v{suffix}": "L", f"train/good/t{suffix}": "L",
    }  # fmt: skip


NUT, LOCO = "../elsewhere/nut", "box/ground_truth/logical_anomalies"
REPLICAS = {
    "mvtec": {
        "bottle/train/good/000.png": "RGB", "bottle/test/good/000.png": "RGB,0",
        "bottle/test/good/up": "-> ../../..",
        "bottle/test/good/extra.png": "-> ../../../../elsewhere/extra.png,0", "../elsewhere/extra.png": "L",
        "bottle/test/broken/000.png": "RGB,1,bottle/ground_truth/broken/000_mask.png=mask L",
        # the masks of these sort the other way round
        "bottle/test/broken large/a.png": "RGB,1,bottle/ground_truth/broken large/a_mask.png=mask 1",
        "bottle/test/broken large/aB.png": "RGBA,1,bottle/ground_truth/broken large/aB_mask.png=mask L",
        # a class may be a link
        f"{NUT}/train/good/n.1.png": "RGB", f"{NUT}/test/good/n.1.png": "L", "hazel nut": f"-> {NUT}",
        f"{NUT}/test/cut [1]/n.1.png": "RGB", f"{NUT}/ground_truth/cut [1]/n.1_mask.png": "mask L",
        f"{NUT}/test/cut [1]/n.2.png": "I;16", f"{NUT}/ground_truth/cut [1]/n.2_mask.png": "mask 16",
        f"{NUT}/test/cut [1]/n.10.png": "L", f"{NUT}/ground_truth/cut [1]/n.10_mask.png": "mask LA",
    },
    "loco": {  # an image has many masks, whose names tell nothing
        "box/test/good/000.png": "RGB,0", "box/validation/good/000.png": "RGB",
        "box/test/logical_anomalies/000.png": f"L,1,{LOCO}/000/000.png=mask L,{LOCO}/000/001.png=mask index",
        "box/test/logical_anomalies/001.png": f"RGB,1,{LOCO}/001/000.png=mask L",
        "box/test/structural/000.png": "RGB,1,box/ground_truth/structural/000/000.png=mask L",
    },
    "dtd-synthetic": {
        "Blotchy_099/train/good/1.png": "RGB", "Blotchy_099/test/good/1.png": "RGB,0",
        "Blotchy_099/test/bad/1.png": "RGB,1,Blotchy_099/ground_truth/bad/1_mask.png=mask L",
        "Woven 1/test/bad/1.png": "RGB,1,Woven 1/ground_truth/bad/1.png=mask L",
        "Woven 1/test/good/2.png": "RGB,0",
    },
    "btad": {
        "01/train/ok/0000.bmp": "RGB", "01/test/ok/0000.bmp": "RGB,0",
        "01/test/ko/0000.bmp": "RGB,1,01/ground_truth/ko/0000.png=mask L",
        "01/test/ko/0001.bmp": "RGB,1,01/ground_truth/ko/0001.png=mask 1", "02/test/ok/0000.png": "L,0",
        "02/test/ko/0000.png": "L,1,02/ground_truth/ko/0000.png=mask RGB", "03/test/ok/0000.bmp": "L,0",
        "03/test/ok/0001.bmp": "1,0", "03/test/ko/0002.bmp": "P,1,03/ground_truth/ko/0002.bmp=mask L",
    },
    "visa": {
        "candle/Data/Images/Normal/0000.JPG": "RGB", "candle/Data/Images/Normal/0001.JPG": "L,0",
        "candle/Data/Images/Normal/unlisted.JPG": "RGB",
        "candle/Data/Images/Anomaly/000.JPG": "RGB,1,candle/Data/Masks/Anomaly/000.png=mask index",
        "candle/Data/Images/Anomaly/001.JPG": "RGB,1,candle/Data/Masks/Anomaly/001.png=mask P",
        "pipe fryum/Data/Images/Normal/0000.JPG": "RGB,0",
        "pipe fryum/Data/Images/Anomaly/000.JPG": "CMYK,1,pipe fryum/Data/Masks/Anomaly/000.png=mask L",
        "split_csv/2cls_highshot.csv": "object",
    },
    "ksdd2": {
        "train/1.png": "RGB", "train/1_GT.png": "mask L", "test/9.png": "RGB,0,test/9_GT.png=empty L",
        "test/10.png": "RGB,1,test/10_GT.png=mask L", "test/10.b.png": "L,1,test/10.b_GT.png=mask 1",
        "test/2.png": "RGB,0,test/2_GT.png=empty P",
    },
    "dagm": {
        "Class1/Train/0002.PNG": "L", "Class1/Train/Label/0002_label.PNG": "mask L",
        "Class1/Test/0001.PNG": "L,0", "Class1/Test/0002.PNG": "L,0",
        "Class1/Test/0010.PNG": "L,1,Class1/Test/Label/0010_label.PNG=mask L",
        "Class1/Test/Label/Labels.txt": "text", "Class10/Test/1.PNG": "L,0",
        "Class10/Test/1.5.png": "L,1,Class10/Test/Label/1.5_label.png=mask 1", "Class2/Test/0001.PNG": "L,0",
    },
    "oct17": bmad("", ".jpeg"),
    "his": bmad("img/", ".png"),
    "brain_ad": {
        "train/good/1.png": "L", "valid/Ungood/img/1.png": "L", "valid/Ungood/label/1.png": "mask L",
        "test/good/img/1.png": "L,0", "test/good/img/2.png": "L,0", "test/good/label/1.png": "empty L",
        "test/good/label/2.png": "empty L", "test/Ungood/img/1.png": "L,1,test/Ungood/label/1.bmp=mask L",
        "test/Ungood/img/1.5.png": "L,1,test/Ungood/label/1.5.png=mask L",
        "test/Ungood/img/3.png": "I;16,1,test/Ungood/label/3.PNG=mask 1",
    },
    "brainmri": {f"brain_tumor_dataset/{name}": how for name, how in BRAIN.items()}
        | {name: how.partition(",")[0] for name, how in BRAIN.items()},
    "cvc-clinicdb": flat("PNG/Original", "PNG/Ground Truth"),
    "endo": flat("images", "masks"),
    "kvasir": {
        "images/cju a.jpg": "RGB,1,masks/cju a.jpg=mask L",
        "images/cjub.JPG": "RGB,1,masks/cjub.jpg=mask RGB",
        "images/c.j.u.jpeg": "L,1,masks/c.j.u.jpeg=mask L", "kavsir_bboxes.json": "{}",
    },
}  # fmt: skip
LINKED = [
    *((f"hazel nut/test/cut [1]/n.{i}.png", "hazel nut", 1, f"hazel nut/ground_truth/cut [1]/n.{i}_mask.png")
      for i in (1, 10, 2)), ("hazel nut/test/good/n.1.png", "hazel nut", 0),
]  # fmt: skip
AUTO = {name: names.split()[0] for names, _, _ in LAYOUTS for name in names.split()} | {"loco": "mvtec"}
CLASSES = ("mvtec", "loco", "dtd-synthetic", "btad", "visa", "dagm")


def made(told: dict[str, str]) -> dict[str, str]:
    """The files, for `put`."""
    files = {}
    for path, how in told.items():
        files[path], *more = how.split(",")
        files |= dict(mask.split("=") for mask in more[1:])
    return files


def expected(told: dict[str, str], cls: str = "") -> list[tuple]:
    """What is to be found; of which class, "" for the first folder of each."""
    found = list(LINKED) if told is REPLICAS["mvtec"] else []
    for path, (_, label, *masks) in ((path, how.split(",")) for path, how in told.items() if "," in how):
        masks = [mask.partition("=")[0] for mask in masks]
        found.append((path, cls or path.partition("/")[0], int(label) if label else None, *masks))
    return sorted(found, key=lambda row: (row[1], Path(row[0])))


def replica(tmp_path: Path, name: str) -> tuple[Path, list[tuple]]:
    """Its root, with what Windows, macOS and notebooks leave in every folder, and what is to be found."""
    root = put(tmp_path / f"the {name} root", made(REPLICAS[name]))
    if name == "visa":
        (root / "split_csv/1cls.csv").write_text("\ufeff" + TABLE, encoding="utf-8")  # as Windows writes it
    litter = dict.fromkeys(("Thumbs.db", "._x.png", "readme.txt", ".ipynb_checkpoints/a.png"), "x")
    for folder, _, _ in list(os.walk(root)):
        put(Path(folder), litter)
    return root, expected(REPLICAS[name], "" if name in CLASSES else root.name)


@pytest.mark.parametrize("name", REPLICAS)
def test_a_benchmark_is_read_as_it_lies_on_disk(name, tmp_path):
    assert len(REPLICAS.keys() & DATASETS.keys()) == 13
    root, want = replica(tmp_path, name)
    unread = [(*row[:2], None, *row[3:]) if name == "ksdd2" else row for row in want]  # its masks tell labels
    for dataset in ("auto", *({name} & DATASETS.keys())):
        assert rows(root, dataset) == (AUTO[name] if dataset == "auto" else name, unread)
    assert read_dataset(str(root)) == read_dataset(root)
    masked = {row[1] for row in want if row[3:]}
    for record, row in zip(read_dataset(root)[1], want, strict=True):
        image, mask = read(record)
        assert torch.equal(image, to_tensor(record.path)) and image.shape == (3, H, W)
        if record.cls in masked:  # then every pixel is known, also of a good image
            assert mask.dtype == torch.bool and np.array_equal(mask, BLOB & (row[2] == 1))
        else:
            assert mask is None


def test_a_class_folder_and_the_current_folder_are_roots(tmp_path, monkeypatch):
    for name, cls in (("mvtec", "bottle"), ("btad", "03")):
        monkeypatch.chdir(put(tmp_path, made(REPLICAS[name])) / cls)
        inner = {path[len(cls) + 1 :]: how.replace(f"{cls}/", "") for path, how in REPLICAS[name].items()
                 if path.startswith(f"{cls}/")}  # fmt: skip
        assert rows(tmp_path / cls) == rows(Path(".")) == (name, expected(inner, cls))


@pytest.mark.parametrize(
    ("name", "told"),
    [("brainmri", BRAIN), ("cvc-clinicdb", flat("Original", "Ground Truth")),
     ("cvc-clinicdb", REPLICAS["cvc-clinicdb"] | {"TIF/Original/9.tif": "L", "TIF/Ground Truth/9.tif": "L"}),
     ("cvc-clinicdb", {"Images/a.png": "L,1,Masks/a.png=mask L"}),
     ("oct17", {"Test/GOOD/a.png": "L,0", "test/ungood/b.png": "L,1"}),
     ("dagm", {"class1/test/1.png": "L,1,class1/test/label/1_label.png=mask L"}),
     # a class called Class1 does not make it DAGM, nor does a defect called label hide images
     ("mvtec", {"Class1/test/good/1.png": "L,0",
                "Class1/test/label/2.png": "L,1,Class1/ground_truth/label/2_mask.png=mask L"}),
     # images that lie deeper are not left out; suffixes tell them apart; masks are no anomalous images
     ("mvtec", {"a/test/good/x/1.png": "L,0", "a/test/cut/y/2.png": "L,1,a/ground_truth/cut/y/2.png=mask L"}),
     ("folders", {"good/a.png": "L,0", "good/a.jpg": "L,0", "bad/a.png": "L,1"}),
     # a kind of defect may be called as an image is
     ("mvtec", {"a/test/good/0.png": "L,0", "a/test/1/0.png": "L,1,a/ground_truth/1/0_mask.png=mask L",
                "a/test/1/1.png": "L,1,a/ground_truth/1/1_mask.png=mask L"}),
     ("folders", {"good/a.png": "L,0", "bad/b.png": "L,1,Ground_Truth/bad/b.png=mask L"}),
     ("images", {"b.png": "RGB,", "a.JPG": "L,", "c.webp": "RGB,", "../o.png": "L", "d.png": "-> ../o.png,"}),
     *(("folders", {f"{good}/b.JPG": "L,0", "dent/c.tif": "I;16,1", "a b/d.png": "RGBA,1"})
       for good in ("Good", "normal", "ok", "no"))],
)  # fmt: skip
def test_other_folders_are_read_by_what_lies_there(name, told, tmp_path):
    cls = "" if name in CLASSES else "set"
    assert rows(put(tmp_path / "set", made(told))) == (name, expected(told, cls))


def entry(image: str | Path, anomaly: int = 0, mask: str | Path = "", **more: object) -> dict:
    return dict(img_path=str(image), mask_path=str(mask), cls_name="x", anomaly=anomaly) | more


def meta(root: Path, **splits: dict) -> Path:
    return put(root, {"meta.json": json.dumps(splits)})


def test_meta_json_says_what_is_what(tmp_path):
    root, _ = replica(tmp_path, "visa")  # whose own list it comes before
    put(root, {"a/2.png": "RGB", "a/m.png": "mask L", "a/1.png": "RGB", "../out/3.png": "L", "b.jpg": "L"})
    far = [entry("a/2.png", 1, "a/m.png"), entry(tmp_path / "out/3.png"), entry("a/1.png", 0, "nowhere.png")]
    meta(root, test={"nut": [entry("b.jpg", 1, root)], "z b": far}, train={"nut": [entry("a/1.png")]})
    want = [("b.jpg", "nut", 1), ("../out/3.png", "z b", 0), ("a/1.png", "z b", 0)]
    want.append(("a/2.png", "z b", 1, "a/m.png"))
    assert rows(root) == rows(root, "meta.json") == ("meta.json", want)
    masks = {record.path.name: read(record)[1] for record in read_dataset(root)[1]}
    assert masks["b.jpg"] is None and np.array_equal(masks["2.png"], BLOB) and not masks["1.png"].any()


BROKEN = ("{", "", "[]", '{"test": []}', '{"test": {"n": [{"img_path": ""}]}}', '{"a": {}}', '{"test": {}}',
          *(json.dumps({"test": {"nut": [entry("a.png") | more]}})
            for more in ({"anomaly": 2}, {"anomaly": None}, {"img_path": 3})))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [*(("meta.json", text) for text in BROKEN),
     *(("split_csv/1cls.csv", text) for text in ("", "object,split\n,test", "object,split,label"))],
)  # fmt: skip
def test_a_list_that_is_not_as_it_should_be_is_an_error(name, text, tmp_path, capsys):
    put(tmp_path, {"a.png": "RGB", name: "text"})
    (tmp_path / name).write_text(text)
    assert main(["--data", str(tmp_path), "--dataset", name if "/" not in name else "visa"]) == 2
    told = capsys.readouterr()
    assert not told.out and re.search("meta.json|visa|1cls.csv", told.err) and "Traceback" not in told.err


@pytest.mark.parametrize(
    "files",
    [{}, {"x/a.png": "L"}, {"x/y/a.png": "L", "b.png": "L"}, {"litter/Thumbs.db": "x", ".a.png": "x"},
     {"p1/good/a.png": "L", "p1/bad/b.png": "L", "p2/bad/c.png": "L"}],
)  # fmt: skip
def test_a_root_in_no_known_layout_is_told_what_was_looked_for(files, tmp_path, capsys):
    put(tmp_path, files)
    assert main(["--data", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert str(tmp_path) in told.err and "*/test/good" in told.err and "split_csv/1cls.csv" in told.err
    root = put(tmp_path / "mvtec", {"test/good/a.png": "L"})
    for path, name in ((".", "nosuch"), (".", "kvasir"), ("gone", "auto"), ("test/a.png", "auto")):
        with pytest.raises((ValueError, OSError), match=re.escape(str(root / path))):
            read_dataset(root / path, name)
    with pytest.raises(FileNotFoundError, match="gone is no folder"):
        read_dataset("gone")


@pytest.mark.parametrize("name", [name for name in REPLICAS if "=" in str(REPLICAS[name])])
def test_a_missing_mask_or_image_is_an_error_that_names_it(name, tmp_path):
    root, want = replica(tmp_path, name)
    for image, _, _, *masks in [row for row in want if row[3:]]:
        # without its only mask an image of DAGM is normal
        for lost in (image, *masks[: name != "dagm" and len(masks) == 1]):
            kept = (root / lost).read_bytes()
            (root / lost).unlink()
            with pytest.raises(ValueError, match="1 files are missing or do not pair up") as error:
                read_dataset(root)
            assert any(str(root / path) in str(error.value) for path in (image, *masks))
            (root / lost).write_bytes(kept)


def test_one_error_counts_all_and_names_the_first(tmp_path):
    names = [f"{i:02}.png" for i in range(12)]
    root = put(tmp_path, {f"nut/test/cut/{name}": "L" for name in names} | {"nut/test/good/a.png": "L"})
    put(root, {"nut/ground_truth/cut/x_mask.png": "mask L", "nut/test/good/b.png": "-> nowhere.png"})
    with pytest.raises(ValueError) as error:
        read_dataset(root)
    assert "14 files" in str(error.value) and len(str(error.value).splitlines()) == 10
    assert all(name in str(error.value) for name in ("good/b.png", "x_mask.png", "00.png"))
    meta(root, test={"c": [entry("lost.png"), entry("nut/test/good/a.png", 1, "gone_mask.png")]})
    with pytest.raises(ValueError, match="(?s)2 files.*lost.png is missing.*gone_mask.png is missing"):
        read_dataset(root)
    twins = [f"{kind}/bad/{x}/0.png" for kind in ("test", "ground_truth") for x in "ab"]
    with pytest.raises(ValueError, match="images share a stem"):
        read_dataset(put(tmp_path / "twins", dict.fromkeys(["test/good/1.png", *twins], "L")))


def report(root: Path, folder: Path, *flags: str, status: int = 0) -> dict:
    assert main(["--data", str(root), "--size", "32", "--json", str(folder / "r.json"), *flags]) == status
    return json.loads((folder / "r.json").read_text())


SOUND = {"nut/test/good/sound.png": "RGB", "nut/test/cut/whole.png": "RGB",
         "nut/ground_truth/cut/whole_mask.png": "mask L"}  # fmt: skip
BAD = {  # a file that cannot be used, and what is told besides
    "text.png": ({"nut/test/good/text.png": "no picture"}, "as an image"),
    "void.png": ({"nut/test/good/void.png": ""}, "as an image"),
    "halved.jpg": ({"nut/test/good/halved.jpg": "cut"}, "as an image"),
    "halved.png": ({"nut/test/cut/halved.png": "cut", "nut/ground_truth/cut/halved_mask.png": "mask L"}, ""),
    "words_mask.png": ({"nut/test/cut/words.png": "L", "nut/ground_truth/cut/words_mask.png": "x"}, "image"),
    "short_mask.png": ({"nut/test/cut/short.png": "L", "nut/ground_truth/cut/short_mask.png": "cut"}, ""),
    "narrow_mask.png": ({"nut/test/cut/narrow.png": "L", "nut/ground_truth/cut/narrow_mask.png": "narrow L"},
                        f"[{H}, {W - 1}] pixels, its image [{H}, {W}]"),
}  # fmt: skip


def test_files_that_cannot_be_used_are_named_and_the_others_scored(tmp_path, capsys):
    root = put(tmp_path / "root", SOUND)
    for files, _ in BAD.values():
        put(root, files)
    found = report(root, tmp_path, status=1)
    told = capsys.readouterr().err
    assert len(found["errors"]) == len(BAD) and found["mean"]["images"] == 2
    for name, (files, what) in BAD.items():
        [row] = [row for row in found["errors"] if row["path"] in files]
        assert name in told and name in row["error"] and what in row["error"] and row["path"] in told
    assert [row["path"] for row in found["records"]] == ["nut/test/cut/whole.png", "nut/test/good/sound.png"]
    assert None not in found["classes"]["nut"].values()
    for path in SOUND:
        (root / path).write_text("x")
    assert {*report(root, tmp_path, status=1)["mean"].values()} == {None, 0}  # nothing is left
    root = put(tmp_path / "ksdd2", {"test/1.png": "L", "test/1_GT.png": "cut", "test/2.png": "L"})
    put(root, {"test/2_GT.png": "mask L", "test/3.png": "L", "test/3_GT.png": "empty L"})
    found = report(root, tmp_path, status=1)  # the label of an unreadable mask is not made up
    assert [(row["path"], row["label"]) for row in found["records"]] == [("test/2.png", 1), ("test/3.png", 0)]
    assert "1_GT.png" in found["errors"][0]["error"] and found["mean"]["image_auroc"] is not None


def test_classes_are_chosen_by_name_and_a_limit_spreads_evenly_over_each(tmp_path, capsys):
    root, _ = replica(tmp_path, "btad")
    found = report(root, tmp_path, "--classes", " 03, 01")
    assert list(found["classes"]) == ["01", "03"] and [row["label"] for row in found["records"]].count(1) == 3
    assert re.search(r"layout btad\n.*\b6 images: 3 normal, 3 anomalous", capsys.readouterr().out)
    kept = [(row["class"], row["label"]) for row in report(root, tmp_path, "--limit", "2")["records"]]
    assert kept == [("01", 1), ("01", 0), ("02", 1), ("02", 0), ("03", 1), ("03", 0)]
    assert len(report(root, tmp_path, "--limit", "99")["records"]) == 8
    everything = put(tmp_path / "set", {f"{kind}/{i}.png": "L" for kind in ("good", "x") for i in range(6)})
    for n in range(1, 13):
        args = argparse.Namespace(data=everything, dataset="auto", classes=None, limit=n)
        places = [6 * record.label + int(record.path.stem) for record in load_data(args)[1]]
        gaps = np.diff([*places, places[0] + 12])
        assert len(places) == n and (gaps > 0).all() and gaps.max() - gaps.min() <= 1
    for flag, value in (("--classes", "01,4"), ("--limit", "-1"), ("--limit", "0")):
        assert main(["--data", str(root), flag, value]) == 2
        told = capsys.readouterr()
        assert value[-1] in told.err and "01, 02, 03" in told.err


def test_numbers_that_a_set_cannot_have_are_dashes(tmp_path, capsys):
    bare = put(tmp_path / "bare", {"a.png": "RGB", "b.png": "L"})
    roots = [replica(tmp_path, name)[0] for name in ("mvtec", "kvasir", "brainmri")]
    for root, image, pixel in zip([*roots, bare], (1, 0, 1, 0), (1, 1, 0, 0), strict=True):
        found = report(root, tmp_path)
        for numbers in (*found["classes"].values(), found["mean"]):
            assert numbers.pop("images") > 0
            for name, number in numbers.items():
                assert (number is not None) == (image if "image" in name else pixel)
        mean = re.search("^mean.*", capsys.readouterr().out, re.MULTILINE)[0].split()[2:]
        assert [cell == "-" for cell in mean] == [not image] * 3 + [not pixel] * 4
    assert [row["label"] for row in found["records"]] == [None, None]


def mask_of(path: Path) -> np.ndarray:
    """How a mask file is read, for an image of its size."""
    with Image.open(path) as file:
        Image.new("RGB", file.size).save(path.parent / "image.png")
    return read(Record(path.parent / "image.png", "c", 1, (path,), True))[1].numpy()


@pytest.mark.parametrize("on", [BLOB, ~BLOB, np.zeros_like(BLOB)], ids="blob rest none".split())
@pytest.mark.parametrize(
    ("how", "suffix"),
    [(how, suffix) for how in "1 L index P LA RGB RGBA 16".split() for suffix in (".png", ".PNG", ".tif")]
    + [(how, ".bmp") for how in "1 L index P RGB RGBA".split()] + [("1", ".pbm"), ("16", ".pgm")],
)  # fmt: skip
def test_a_mask_is_true_where_it_is_above_0(how, suffix, on, tmp_path):
    painted(how, on).save(tmp_path / f"m{suffix}")
    assert np.array_equal(mask_of(tmp_path / f"m{suffix}"), on)


def test_one_colour_above_0_is_enough_and_masks_turn_and_unite(tmp_path):
    images = [Image.fromarray(BLOB.astype(np.uint8)), Image.fromarray(BLOB.astype(np.uint16))]
    for channel in range(3):
        pixels = np.zeros((H, W, 4), np.uint8)
        pixels[..., 3] = 255  # alpha is none
        pixels[BLOB, channel] = 9
        images.append(Image.fromarray(pixels))
    images.append(painted("L").convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE))
    images.append(Image.fromarray((~BLOB).astype(np.uint8)))
    images[-1].putpalette([255, 255, 255, 0, 0, 0])  # white first, black second
    images.append(painted("P"))
    images[-1].info["transparency"] = 0  # index 0 is transparent, too
    for image in images:
        image.save(tmp_path / "m.png")
        assert np.array_equal(mask_of(tmp_path / "m.png"), BLOB)
    exif = Image.Exif()
    exif[0x0112] = 6  # a mask turns as its image does, and several are united
    Image.fromarray(np.rot90(BLOB).astype(np.uint8) * 255).save(tmp_path / "m.png", exif=exif)
    picture().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "i.png", exif=exif)
    painted("L", ~BLOB).save(tmp_path / "rest.png")
    record = Record(tmp_path / "i.png", "c", 1, (tmp_path / "m.png",), True)
    assert np.array_equal(read(record)[1], BLOB)
    assert read(record._replace(masks=(*record.masks, tmp_path / "rest.png")))[1].all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("name", ["m.jpg", "m.png"])
def test_a_jpeg_is_true_above_127_whatever_its_name(mode, name, tmp_path):
    values = np.where(BLOB, 255, 0) + np.random.default_rng(0).integers(-40, 41, BLOB.shape)
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB").convert(mode)
    image.save(tmp_path / name, "JPEG", quality=90)
    with Image.open(tmp_path / name) as file:
        assert (np.asarray(file.convert("L"))[~BLOB] > 0).any()  # its zeros are not exact
    assert np.array_equal(mask_of(tmp_path / name), BLOB)
    for value in (127, 128):
        Image.new("L", (W, H), value).save(tmp_path / name, "JPEG", quality=100)
        assert mask_of(tmp_path / name).all() == mask_of(tmp_path / name).any() == (value > 127)


def disk(h: int, w: int, r: float) -> np.ndarray:
    y, x = np.ogrid[:h, :w]
    return (y - 0.47 * h) ** 2 + (x - 0.56 * w) ** 2 < r * r


@pytest.mark.parametrize("size", [(32, 32), (56, 40), (100, 140), (37, 151)])
@pytest.mark.parametrize("r", [3, 11, 31.5])
def test_shrink_is_pils_but_for_a_few_pixels_of_the_border(size, r):
    mask = disk(90, 120, r)
    mask[5:9, 3:71] = True
    mask[80, 10:100] = True  # thinner than a pixel of the small ones
    got = shrink(torch.from_numpy(mask), size).numpy()
    values = Image.fromarray(mask.astype(np.uint8) * 255).resize(size[::-1], Image.BILINEAR)
    values = np.asarray(values).astype(int)
    off = got != (values > 127)
    assert got.shape == size and got.dtype == bool and got.any()
    assert off.sum() <= 0.003 * got.size and (np.abs(values[off] - 127) <= 2).all()


@pytest.mark.parametrize("side", [56, 518])
def test_a_pixel_that_is_half_covered_stays_anomalous_as_with_pillow(side):
    mask = disk(2 * side, 2 * side, 0.6 * side)
    values = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.BILINEAR))
    assert (values == 128).any()  # 127.5, rounded
    assert np.array_equal(shrink(torch.from_numpy(mask), (side, side)).numpy(), values > 127)
    for value in (False, True):
        assert torch.equal(shrink(torch.full((H, W), value), (5, side)), torch.full((5, side), value))
