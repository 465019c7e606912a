"""Tiny replicas of the 13 benchmarks, and what can be wrong with them: pytest tests/test_datasets.py"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from evaluate import DATASETS, LAYOUTS, Fault, examine, main, read, read_dataset, read_mask, select, shrink
from visualad import to_tensor

H, W = 10, 12
BLOB = np.zeros((H, W), bool)
BLOB[3:7, 2:8] = True
INDEX = BLOB * (np.arange(W) % 3 + 1).astype(np.uint8)  # classes 1 to 3
QUICK = ["--model", "tiny", "--workers", "0", "--size", "32", "--batch-size", "4"]


def picture(mode: str = "RGB", w: int = W, h: int = H) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return (
        Image.fromarray(noise[..., 0] * np.uint16(257))
        if mode == "I;16"
        else Image.fromarray(noise).convert(mode)
    )


def painted(how: str, on: np.ndarray = BLOB) -> Image.Image:
    """A mask that is true on `on`."""
    if how == "1":
        return Image.fromarray(on)
    if how == "16":
        return Image.fromarray(on.astype(np.uint16) * 256)  # whose low byte is 0
    if how == "index":
        return Image.fromarray(on * (np.arange(on.shape[1]) % 3 + 1).astype(np.uint8))
    if how == "P":
        image = Image.fromarray(on * (np.arange(on.shape[1]) % 3 + 1).astype(np.uint8)).convert("L")
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
        return image
    return Image.fromarray(on.astype(np.uint8) * 255).convert(how)


def put(root: Path, files: dict[str, str]) -> Path:
    """Files below root: a mode makes a picture, "mask MODE" a mask, "empty MODE" an empty one, "-> PATH" a
    link, "cut" half a file; any other text is written as it is."""
    for name, how in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        first, _, rest = how.partition(" ")
        if first == "->":
            path.symlink_to(rest)
        elif first in ("mask", "empty"):
            painted(rest, BLOB & (first == "mask")).save(path)
        elif how in ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"):
            picture(how).save(path)
        elif how == "cut":
            picture().save(path)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.write_text(how)
    return root


def litter(root: Path) -> None:
    """What Windows, macOS and notebooks leave behind, in every folder."""
    for folder, _, _ in list(os.walk(root)):
        for name in ("Thumbs.db", ".DS_Store", "._x.png", "readme.txt", ".ipynb_checkpoints/a.png"):
            put(Path(folder), {name: "x"})


def rows(root: Path, *args: str) -> tuple[str, list[tuple], list[Fault]]:
    """Name of the layout, (path, class, kind, label, mask) of each image, what is wrong."""
    layout, records, faults = read_dataset(root, *args)
    assert all(isinstance(record.path, Path) for record in records)

    def short(path: Path | None) -> str | None:
        return path and Path(os.path.relpath(path, root)).as_posix()

    return layout.names[0], [(short(r[0]), *r[1:4], short(r[4])) for r in records], faults


# --- the 13 benchmarks


class Replica(NamedTuple):
    files: dict[str, str]
    test: list[tuple]  # path, class, kind, label, mask: all of them, in order
    train: list[tuple] | None = None  # None: it has no such split


def flat(folder: str, masks: str) -> Replica:
    """CVC-ClinicDB, Endo: every image is anomalous and has a mask."""
    files = {
        f"{folder}/a.png": "RGB", f"{folder}/aB.PNG": "P", f"{folder}/10.bmp": "L", f"{folder}/9.tif": "RGB",
        f"{folder}/x.y.png": "RGBA", f"{masks}/a.png": "mask 1", f"{masks}/aB.bmp": "mask L",
        f"{masks}/10.PNG": "mask L", f"{masks}/9.TIF": "mask 1", f"{masks}/x.y.png": "mask RGB",
    }  # fmt: skip
    pairs = [("10.bmp", "10.PNG"), ("9.tif", "9.TIF"), ("a.png", "a.png"), ("aB.PNG", "aB.bmp")]
    pairs.append(("x.y.png", "x.y.png"))
    return Replica(files, [(f"{folder}/{a}", "{root}", "", 1, f"{masks}/{b}") for a, b in pairs])


def bmad(folder: str, suffix: str) -> Replica:
    """OCT17, HIS: labels of images alone."""
    files = {
        f"test/good/{folder}N 1{suffix}": "L", f"test/good/{folder}n.2.png": "LA",
        f"test/Ungood/{folder}D1{suffix.upper()}": "RGB", f"test/Ungood/{folder}n.2.png": "L",
        f"valid/good/{folder}v{suffix}": "L", f"valid/Ungood/{folder}v{suffix}": "L",
        f"train/good/t{suffix}": "L",
    }  # fmt: skip
    test = [
        (f"test/Ungood/{folder}D1{suffix.upper()}", "{root}", "Ungood", 1, None),
        (f"test/Ungood/{folder}n.2.png", "{root}", "Ungood", 1, None),
        (f"test/good/{folder}N 1{suffix}", "{root}", "good", 0, None),
        (f"test/good/{folder}n.2.png", "{root}", "good", 0, None),
    ]
    return Replica(files, test, [(f"train/good/t{suffix}", "{root}", "good", 0, None)])


BRAIN = {
    "yes/Y1.jpg": "RGB", "yes/Y2.JPG": "L", "yes/Y10.png": "P", "yes/Y1.jpeg": "L",
    "no/1 no.jpeg": "L", "no/N.2.png": "RGBA", "no/No3.JPG": "RGB", "no/n4.png": "LA", "no/n5.png": "I;16",
}  # fmt: skip
REPLICAS = {
    "mvtec": Replica(
        {
            "bottle/train/good/000.png": "RGB", "bottle/train/good/001.PNG": "RGB",
            "bottle/test/good/000.png": "RGB",
            "bottle/test/good/extra.png": "-> ../../../../elsewhere/extra.png",
            "../elsewhere/extra.png": "L", "bottle/test/broken/000.png": "RGB",
            "bottle/test/broken large/a.png": "RGB",  # their masks sort the other way round
            "bottle/test/broken large/aB.png": "RGBA", "bottle/ground_truth/broken/000_mask.png": "mask L",
            "bottle/ground_truth/broken large/a_mask.png": "mask 1",
            "bottle/ground_truth/broken large/aB_mask.png": "mask L", "bottle/test/circle": "-> ..",
            "bottle/test/good/up": "-> ../../..", "hazel nut": "-> ../elsewhere/nut",
            "../elsewhere/nut/train/good/n.1.png": "RGB", "../elsewhere/nut/test/good/n.1.png": "L",
            "../elsewhere/nut/test/cut/n.1.png": "RGB", "../elsewhere/nut/test/cut/n.2.png": "I;16",
            "../elsewhere/nut/test/cut/n.10.png": "L",
            "../elsewhere/nut/ground_truth/cut/n.1_mask.png": "mask L",
            "../elsewhere/nut/ground_truth/cut/n.2_mask.png": "mask 16",
            "../elsewhere/nut/ground_truth/cut/n.10_mask.png": "mask LA",
        },
        [
            ("bottle/test/broken/000.png", "bottle", "broken", 1, "bottle/ground_truth/broken/000_mask.png"),
            ("bottle/test/broken large/a.png", "bottle", "broken large", 1,
             "bottle/ground_truth/broken large/a_mask.png"),
            ("bottle/test/broken large/aB.png", "bottle", "broken large", 1,
             "bottle/ground_truth/broken large/aB_mask.png"),
            ("bottle/test/good/000.png", "bottle", "good", 0, None),
            ("bottle/test/good/extra.png", "bottle", "good", 0, None),
            ("hazel nut/test/cut/n.1.png", "hazel nut", "cut", 1, "hazel nut/ground_truth/cut/n.1_mask.png"),
            ("hazel nut/test/cut/n.10.png", "hazel nut", "cut", 1,
             "hazel nut/ground_truth/cut/n.10_mask.png"),
            ("hazel nut/test/cut/n.2.png", "hazel nut", "cut", 1, "hazel nut/ground_truth/cut/n.2_mask.png"),
            ("hazel nut/test/good/n.1.png", "hazel nut", "good", 0, None),
        ],
        [
            ("bottle/train/good/000.png", "bottle", "good", 0, None),
            ("bottle/train/good/001.PNG", "bottle", "good", 0, None),
            ("hazel nut/train/good/n.1.png", "hazel nut", "good", 0, None),
        ],
    ),
    "dtd-synthetic": Replica(
        {
            "Blotchy_099/train/good/1.png": "RGB", "Blotchy_099/test/good/1.png": "RGB",
            "Blotchy_099/test/bad/1.png": "RGB", "Blotchy_099/ground_truth/bad/1_mask.png": "mask L",
            "Woven 1/train/good/1.png": "RGB", "Woven 1/test/good/2.png": "RGB",
            "Woven 1/test/bad/1.png": "RGB", "Woven 1/test/bad/2.png": "RGB",
            "Woven 1/ground_truth/bad/1.png": "mask L", "Woven 1/ground_truth/bad/2.png": "mask RGBA",
        },
        [
            ("Blotchy_099/test/bad/1.png", "Blotchy_099", "bad", 1,
             "Blotchy_099/ground_truth/bad/1_mask.png"),
            ("Blotchy_099/test/good/1.png", "Blotchy_099", "good", 0, None),
            ("Woven 1/test/bad/1.png", "Woven 1", "bad", 1, "Woven 1/ground_truth/bad/1.png"),
            ("Woven 1/test/bad/2.png", "Woven 1", "bad", 1, "Woven 1/ground_truth/bad/2.png"),
            ("Woven 1/test/good/2.png", "Woven 1", "good", 0, None),
        ],
        [
            ("Blotchy_099/train/good/1.png", "Blotchy_099", "good", 0, None),
            ("Woven 1/train/good/1.png", "Woven 1", "good", 0, None),
        ],
    ),
    "btad": Replica(
        {
            "01/train/ok/0000.bmp": "RGB", "01/test/ok/0000.bmp": "RGB", "01/test/ko/0000.bmp": "RGB",
            "01/test/ko/0001.bmp": "RGB", "01/ground_truth/ko/0000.png": "mask L",
            "01/ground_truth/ko/0001.png": "mask 1", "02/train/ok/0000.png": "L",
            "02/test/ok/0000.png": "L", "02/test/ko/0000.png": "L",
            "02/ground_truth/ko/0000.png": "mask RGB", "03/train/ok/0000.bmp": "L",
            "03/test/ok/0000.bmp": "L", "03/test/ok/0001.bmp": "1", "03/test/ko/0002.bmp": "P",
            "03/ground_truth/ko/0002.bmp": "mask L",
        },
        [
            ("01/test/ko/0000.bmp", "01", "ko", 1, "01/ground_truth/ko/0000.png"),
            ("01/test/ko/0001.bmp", "01", "ko", 1, "01/ground_truth/ko/0001.png"),
            ("01/test/ok/0000.bmp", "01", "ok", 0, None),
            ("02/test/ko/0000.png", "02", "ko", 1, "02/ground_truth/ko/0000.png"),
            ("02/test/ok/0000.png", "02", "ok", 0, None),
            ("03/test/ko/0002.bmp", "03", "ko", 1, "03/ground_truth/ko/0002.bmp"),
            ("03/test/ok/0000.bmp", "03", "ok", 0, None),
            ("03/test/ok/0001.bmp", "03", "ok", 0, None),
        ],
        [
            ("01/train/ok/0000.bmp", "01", "ok", 0, None),
            ("02/train/ok/0000.png", "02", "ok", 0, None),
            ("03/train/ok/0000.bmp", "03", "ok", 0, None),
        ],
    ),
    "visa": Replica(
        {
            "candle/Data/Images/Normal/0000.JPG": "RGB", "candle/Data/Images/Normal/0001.JPG": "L",
            "candle/Data/Images/Normal/unlisted.JPG": "RGB", "candle/Data/Images/Anomaly/000.JPG": "RGB",
            "candle/Data/Images/Anomaly/001.JPG": "RGB", "candle/Data/Masks/Anomaly/000.png": "mask index",
            "candle/Data/Masks/Anomaly/001.png": "mask P",
            "candle/image_anno.csv": "image,label,mask\n",
            "pipe fryum/Data/Images/Normal/0000.JPG": "RGB",
            "pipe fryum/Data/Images/Anomaly/000.JPG": "CMYK",
            "pipe fryum/Data/Masks/Anomaly/000.png": "mask L",
            "split_csv/2cls_highshot.csv": "object,split,label,image,mask\n",
            "split_csv/1cls.csv": "object,split,label,image,mask\n"
            "pipe fryum,test,anomaly,pipe fryum/Data/Images/Anomaly/000.JPG,"
            "pipe fryum/Data/Masks/Anomaly/000.png\n"
            "pipe fryum,test,normal,pipe fryum/Data/Images/Normal/0000.JPG,\n"
            "candle,train,normal,candle/Data/Images/Normal/0000.JPG,\n"
            "candle,test,normal,candle/Data/Images/Normal/0001.JPG,\n"
            "candle,test,anomaly,candle/Data/Images/Anomaly/001.JPG,candle/Data/Masks/Anomaly/001.png\n"
            "candle,test,anomaly,candle/Data/Images/Anomaly/000.JPG,candle/Data/Masks/Anomaly/000.png\n",
        },
        [
            ("candle/Data/Images/Anomaly/000.JPG", "candle", "anomaly", 1,
             "candle/Data/Masks/Anomaly/000.png"),
            ("candle/Data/Images/Anomaly/001.JPG", "candle", "anomaly", 1,
             "candle/Data/Masks/Anomaly/001.png"),
            ("candle/Data/Images/Normal/0001.JPG", "candle", "normal", 0, None),
            ("pipe fryum/Data/Images/Anomaly/000.JPG", "pipe fryum", "anomaly", 1,
             "pipe fryum/Data/Masks/Anomaly/000.png"),
            ("pipe fryum/Data/Images/Normal/0000.JPG", "pipe fryum", "normal", 0, None),
        ],
        [("candle/Data/Images/Normal/0000.JPG", "candle", "normal", 0, None)],
    ),
    "ksdd2": Replica(
        {
            "train/1.png": "RGB", "train/1_GT.png": "mask L", "test/9.png": "RGB",
            "test/9_GT.png": "empty L", "test/10.png": "RGB", "test/10_GT.png": "mask L",
            "test/10.b.png": "L", "test/10.b_GT.png": "mask 1", "test/2.png": "RGB",
            "test/2_GT.png": "empty P",
        },
        [
            ("test/10.b.png", "{root}", "", 1, "test/10.b_GT.png"),
            ("test/10.png", "{root}", "", 1, "test/10_GT.png"),
            ("test/2.png", "{root}", "", 0, "test/2_GT.png"),
            ("test/9.png", "{root}", "", 0, "test/9_GT.png"),
        ],
        [("train/1.png", "{root}", "", 1, "train/1_GT.png")],
    ),
    "dagm": Replica(
        {
            "Class1/Train/0002.PNG": "L", "Class1/Train/0003.PNG": "L",
            "Class1/Train/Label/0002_label.PNG": "mask L",
            "Class1/Train/Label/Labels.txt": "1\n",
            "Class1/Test/0001.PNG": "L", "Class1/Test/0002.PNG": "L", "Class1/Test/0010.PNG": "L",
            "Class1/Test/Label/0010_label.PNG": "mask L",
            "Class1/Test/Label/Labels.txt": "1\n",
            "Class10/Train/0001.PNG": "L", "Class10/Test/1.PNG": "L", "Class10/Test/1.5.png": "L",
            "Class10/Test/Label/1.5_label.png": "mask 1", "Class2/Train/0001.PNG": "L",
            "Class2/Test/0001.PNG": "L",
        },
        [
            ("Class1/Test/0001.PNG", "Class1", "", 0, None),
            ("Class1/Test/0002.PNG", "Class1", "", 0, None),
            ("Class1/Test/0010.PNG", "Class1", "", 1, "Class1/Test/Label/0010_label.PNG"),
            ("Class10/Test/1.5.png", "Class10", "", 1, "Class10/Test/Label/1.5_label.png"),
            ("Class10/Test/1.PNG", "Class10", "", 0, None),
            ("Class2/Test/0001.PNG", "Class2", "", 0, None),
        ],
        [
            ("Class1/Train/0002.PNG", "Class1", "", 1, "Class1/Train/Label/0002_label.PNG"),
            ("Class1/Train/0003.PNG", "Class1", "", 0, None),
            ("Class10/Train/0001.PNG", "Class10", "", 0, None),
            ("Class2/Train/0001.PNG", "Class2", "", 0, None),
        ],
    ),
    "oct17": bmad("", ".jpeg"),
    "his": bmad("img/", ".png"),
    "brain_ad": Replica(
        {
            "train/good/1.png": "L", "valid/good/img/1.png": "L", "valid/Ungood/img/1.png": "L",
            "valid/Ungood/label/1.png": "mask L", "test/good/img/1.png": "L", "test/good/img/2.png": "L",
            "test/good/label/1.png": "empty L", "test/good/label/2.png": "empty L",
            "test/Ungood/img/1.png": "L", "test/Ungood/img/1.5.png": "L", "test/Ungood/img/3.png": "I;16",
            "test/Ungood/label/1.bmp": "mask L", "test/Ungood/label/1.5.png": "mask L",
            "test/Ungood/label/3.PNG": "mask 1",
        },
        [
            ("test/Ungood/img/1.5.png", "{root}", "Ungood", 1, "test/Ungood/label/1.5.png"),
            ("test/Ungood/img/1.png", "{root}", "Ungood", 1, "test/Ungood/label/1.bmp"),
            ("test/Ungood/img/3.png", "{root}", "Ungood", 1, "test/Ungood/label/3.PNG"),
            ("test/good/img/1.png", "{root}", "good", 0, None),
            ("test/good/img/2.png", "{root}", "good", 0, None),
        ],
        [("train/good/1.png", "{root}", "good", 0, None)],
    ),
    "brainmri": Replica(
        BRAIN | {f"brain_tumor_dataset/{name}": how for name, how in BRAIN.items()},
        [
            ("no/1 no.jpeg", "{root}", "no", 0, None),
            ("no/N.2.png", "{root}", "no", 0, None),
            ("no/No3.JPG", "{root}", "no", 0, None),
            ("no/n4.png", "{root}", "no", 0, None),
            ("no/n5.png", "{root}", "no", 0, None),
            ("yes/Y1.jpeg", "{root}", "yes", 1, None),
            ("yes/Y1.jpg", "{root}", "yes", 1, None),
            ("yes/Y10.png", "{root}", "yes", 1, None),
            ("yes/Y2.JPG", "{root}", "yes", 1, None),
        ],
    ),
    "cvc-clinicdb": flat("PNG/Original", "PNG/Ground Truth"),
    "endo": flat("images", "masks"),
    "kvasir": Replica(
        {
            "images/cju a.jpg": "RGB", "images/cjub.JPG": "RGB", "images/c.j.u.jpeg": "L",
            "masks/cju a.jpg": "mask L", "masks/cjub.jpg": "mask RGB", "masks/c.j.u.jpeg": "mask L",
            "kavsir_bboxes.json": "{}",
        },
        [
            ("images/c.j.u.jpeg", "{root}", "", 1, "masks/c.j.u.jpeg"),
            ("images/cju a.jpg", "{root}", "", 1, "masks/cju a.jpg"),
            ("images/cjub.JPG", "{root}", "", 1, "masks/cjub.jpg"),
        ],
    ),
}  # fmt: skip
ALIKE = {
    name: layout.names[0] for layout in LAYOUTS for name in layout.names
}  # what they are called by "auto"


def replica(tmp_path: Path, name: str) -> tuple[Path, Replica]:
    root = put(tmp_path / f"the {name} root", REPLICAS[name].files)
    litter(root)
    told = [
        [(a, cls.format(root=root.name), *rest) for a, cls, *rest in part or ()]
        for part in REPLICAS[name][1:]
    ]
    return root, Replica(REPLICAS[name].files, *told)


def unread(name: str, part: list[tuple]) -> list[tuple]:
    """The rows before any mask is read: KSDD2's labels are in its masks."""
    return [(*row[:3], None, row[4]) for row in part] if name == "ksdd2" else part


def test_there_are_13_benchmarks():
    assert len(REPLICAS) == 13 and set(REPLICAS) < set(DATASETS)


@pytest.mark.parametrize("name", REPLICAS)
def test_a_benchmark_is_read_as_it_lies_on_disk(name, tmp_path):
    root, want = replica(tmp_path, name)
    for dataset in ("auto", name):
        assert rows(root, dataset) == (ALIKE[name], unread(name, want.test), [])
    assert rows(str(root)) == rows(root)


@pytest.mark.parametrize("name", REPLICAS)
def test_its_train_split_is_read_or_an_error(name, tmp_path):
    root, want = replica(tmp_path, name)
    for dataset in ("auto", name):
        if REPLICAS[name].train:
            assert rows(root, dataset, "train") == (ALIKE[name], unread(name, want.train), [])
        else:
            with pytest.raises(ValueError, match="train"):
                read_dataset(root, dataset, "train")


@pytest.mark.parametrize("name", REPLICAS)
def test_every_image_and_mask_of_it_can_be_read(name, tmp_path):
    root, want = replica(tmp_path, name)
    _, records, _ = read_dataset(root)
    masked = {row[1] for row in want.test if row[4]}
    for record, row in zip(records, want.test, strict=True):
        found, fault = examine(record)
        assert fault is None and found == record._replace(label=row[3])
        image, mask = read(record)
        assert torch.equal(image, to_tensor(record.path)) and image.shape == (3, H, W)
        if record.cls in masked:  # then every pixel is known, also of a good image
            assert mask.dtype == torch.bool and np.array_equal(mask, BLOB & (row[3] == 1))
        else:
            assert mask is None


def test_brainmri_is_found_in_its_folder_too(tmp_path):
    root = put(tmp_path / "mri", {f"brain_tumor_dataset/{name}": how for name, how in BRAIN.items()})
    want = [(f"brain_tumor_dataset/{row[0]}", "mri", *row[2:]) for row in REPLICAS["brainmri"].test]
    assert rows(root) == rows(root, "brainmri") == ("brainmri", want, [])


def test_cvc_is_found_in_all_its_shapes_and_counted_once(tmp_path):
    small = flat("Original", "Ground Truth")
    root = put(tmp_path / "cvc", small.files)
    assert rows(root)[1:] == ([(row[0], "cvc", *row[2:]) for row in small.test], [])
    both = flat("PNG/Original", "PNG/Ground Truth")
    files = both.files | {"TIF/Original/9.tif": "RGB", "TIF/Ground Truth/9.tif": "mask L"}
    root = put(tmp_path / "both" / "cvc", files)
    assert rows(root, "cvc-clinicdb")[1:] == ([(row[0], "cvc", *row[2:]) for row in both.test], [])


def test_a_class_folder_alone_is_a_root(tmp_path):
    for name, cls in (("mvtec", "bottle"), ("btad", "03")):
        root = put(tmp_path, REPLICAS[name].files) / cls
        part = [row for row in REPLICAS[name].test if row[1] == cls]
        want = [(a[len(cls) + 1 :], cls, b, c, d and d[len(cls) + 1 :]) for a, _, b, c, d in part]
        assert rows(root) == rows(root, name) == (ALIKE[name], want, [])


def test_the_current_folder_is_a_root(tmp_path, monkeypatch):
    root, want = replica(tmp_path, "endo")
    monkeypatch.chdir(root)
    assert rows(Path("."))[1:] == (want.test, [])


@pytest.mark.parametrize(
    "files, want",
    [
        ({"Images/a.png": "RGB", "Masks/a.png": "mask L"}, [("Images/a.png", "", 1, "Masks/a.png")]),
        (
            {"Test/GOOD/a.png": "RGB", "test/ungood/b.png": "RGB"},
            [("Test/GOOD/a.png", "GOOD", 0, None), ("test/ungood/b.png", "ungood", 1, None)],
        ),
        (
            {"Good/a.png": "RGB", "Dent/b.png": "RGB"},
            [("Dent/b.png", "Dent", 1, None), ("Good/a.png", "Good", 0, None)],
        ),
    ],
    ids="masks bmad folders".split(),
)
def test_folders_are_told_in_any_case(files, want, tmp_path):
    root = put(tmp_path / "set", files)
    assert rows(root)[1:] == ([(row[0], "set", *row[1:]) for row in want], [])


def test_labels_of_dagm_in_another_case_are_not_lost(tmp_path):
    root = put(tmp_path, {"class1/test/1.png": "L", "class1/test/label/1_label.png": "mask L"})
    want = [("class1/test/1.png", "class1", "", 1, "class1/test/label/1_label.png")]
    assert rows(root) == ("dagm", want, [])


@pytest.mark.parametrize("name", ["mvtec", "btad", "ksdd2", "dagm", "oct17", "brain_ad"])
def test_a_split_that_is_not_there_is_an_error(name, tmp_path):
    files = {a: b for a, b in REPLICAS[name].files.items() if "/train/" not in f"/{a.lower()}"}
    root = put(tmp_path / "set", files)
    assert len(rows(root)[1]) == len(REPLICAS[name].test)
    for dataset in ("auto", name):
        with pytest.raises(ValueError, match="train"):
            read_dataset(root, dataset, "train")


def test_a_class_called_class1_does_not_make_it_dagm(tmp_path):
    files = {"Class1/test/good/1.png": "RGB", "Class1/test/bad/2.png": "RGB"}
    root = put(tmp_path, files | {"Class1/ground_truth/bad/2_mask.png": "mask L"})
    want = [
        ("Class1/test/bad/2.png", "Class1", "bad", 1, "Class1/ground_truth/bad/2_mask.png"),
        ("Class1/test/good/1.png", "Class1", "good", 0, None),
    ]
    assert rows(root) == ("mvtec", want, [])


def test_images_that_differ_in_their_suffix_alone_are_two(tmp_path):
    root = put(tmp_path, {"good/a.png": "L", "good/a.jpg": "L", "bad/a.png": "L"})
    assert [row[0] for row in rows(root)[1]] == ["bad/a.png", "good/a.jpg", "good/a.png"]


# --- meta.json


def entry(image: str | Path, anomaly: int = 0, mask: str | Path = "", kind: str = "good") -> dict:
    return dict(img_path=str(image), mask_path=str(mask), cls_name="x", specie_name=kind, anomaly=anomaly)


def meta(root: Path, test: dict | None = None, **splits: dict) -> Path:
    root.mkdir(exist_ok=True)
    (root / "meta.json").write_text(json.dumps(splits | ({} if test is None else {"test": test})))
    return root


def test_meta_json_says_what_is_what(tmp_path):
    root = put(
        tmp_path / "root",
        {
            "a/2.png": "RGB",
            "a/1.png": "RGB",
            "a/m.png": "mask L",
            "../out/3.png": "L",
            "b/1.jpg": "L",
            "b/2.jpg": "L",
        },
    )
    out = tmp_path / "out"
    meta(
        root,
        {
            "nut": [entry("b/2.jpg", 1, root, "cut"), entry("b/1.jpg", 0)],
            "z b": [entry("a/2.png", 1, "a/m.png", "hole"), entry("../out/3.png"), entry("a/1.png", 0, "a")],
        },
        train={"nut": [entry(out / "3.png")]},
    )
    want = [  # by class, then by path
        ("b/1.jpg", "nut", "good", 0, None),
        ("b/2.jpg", "nut", "cut", 1, None),
        ("../out/3.png", "z b", "good", 0, None),
        ("a/1.png", "z b", "good", 0, None),
        ("a/2.png", "z b", "hole", 1, "a/m.png"),
    ]
    for dataset in ("auto", "meta.json"):
        assert rows(root, dataset) == ("meta.json", want, [])
        assert rows(root, dataset, "train")[1] == [("../out/3.png", "nut", "good", 0, None)]
    records = {record.path.name: record for record in read_dataset(root)[1] if record.cls == "z b"}
    assert not read(records["3.png"])[1].any() and np.array_equal(read(records["2.png"])[1], BLOB)
    assert all(read(record)[1] is None for record in read_dataset(root)[1] if record.cls == "nut")


def test_meta_json_comes_before_the_folders_around_it(tmp_path):
    for name in ("mvtec", "visa"):
        root, _ = replica(tmp_path, name)
        image = next(path for path in REPLICAS[name].files if path.endswith(("000.png", "000.JPG")))
        meta(root, {"one": [entry(image)]})
        assert rows(root)[:2] == ("meta.json", [(image, "one", "good", 0, None)])
        assert rows(root, name)[0] == ALIKE[name]


def test_meta_json_may_hold_absolute_paths(tmp_path):
    put(tmp_path, {"far/a.png": "RGB", "far/m.png": "mask L"})
    far = tmp_path / "far"
    root = meta(tmp_path / "root", {"nut": [entry(far / "a.png", 1, far / "m.png", "hole")]})
    _, [record], faults = read_dataset(root)
    assert record[:5] == (far / "a.png", "nut", "hole", 1, far / "m.png") and not faults
    assert examine(record) == (record, None)


def test_what_meta_json_lists_and_is_not_there_is_named(tmp_path, capsys):
    root = put(tmp_path, {"a.png": "RGB", "b.png": "RGB", "m.png": "mask L", "c.png": "RGB"})
    nut = [
        entry("a.png", 1, "m.png"),
        entry("b.png", 1, "lost_mask.png"),
        entry("lost.png"),
        entry("c.png", 1),
    ]
    meta(root, {"nut": nut})
    assert main(["--data", str(root), *QUICK]) == 2
    told = capsys.readouterr()
    assert not told.out and all(name in told.err for name in ("lost_mask.png", "lost.png", "c.png"))
    assert "a.png" not in told.err


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "meta.json"),
        ("", "meta.json"),
        ("[]", "meta.json"),
        ('{"test": []}', "meta.json"),
        ('{"test": {"nut": {"img_path": "a.png"}}}', "meta.json"),
        ('{"test": {"nut": [{"img_path": "a.png"}]}}', "meta.json.*(mask_path|specie_name|anomaly)"),
        (json.dumps({"test": {"nut": [{"mask_path": "", "specie_name": "", "anomaly": 0}]}}), "img_path"),
        (json.dumps({"test": {"nut": [entry("a.png") | {"anomaly": None}]}}), "meta.json"),
        (json.dumps({"test": {"nut": [entry("a.png") | {"img_path": 3}]}}), "meta.json"),
        (json.dumps({"train": {"nut": [entry("a.png")]}}), "test"),
        (json.dumps({"test": {}, "train": {"nut": [entry("a.png")]}}), "test"),
        (json.dumps({"test": {"nut": []}}), "test"),
    ],
    ids=str,
)
def test_a_meta_json_that_is_not_as_it_should_be_is_an_error(text, message, tmp_path, capsys):
    put(tmp_path, {"a.png": "RGB", "meta.json": text})
    with pytest.raises(ValueError, match=message):
        read_dataset(tmp_path)
    assert main(["--data", str(tmp_path), *QUICK]) == 2
    told = capsys.readouterr()
    assert not told.out and re.search(message, told.err) and "Traceback" not in told.err


@pytest.mark.parametrize(
    "text", ["", "object,split\ncandle,test\n", "object,split,label,image,mask\n"], ids=repr
)
def test_a_list_of_visa_that_is_not_as_it_should_be_is_an_error(text, tmp_path):
    put(tmp_path, {"split_csv/1cls.csv": text})
    with pytest.raises(ValueError, match="1cls.csv"):
        read_dataset(tmp_path)


# --- any other folder


@pytest.mark.parametrize("good", ["good", "ok", "normal", "no"])
def test_a_folder_of_normal_images_beside_others_is_image_level(good, tmp_path):
    root = put(
        tmp_path / "my set",
        {f"{good}/b.JPG": "L", f"{good}/a.png": "P", "dent/c.tif": "I;16", "a b/d.png": "RGBA"},
    )
    litter(root)
    want = [
        ("a b/d.png", "my set", "a b", 1, None),
        ("dent/c.tif", "my set", "dent", 1, None),
        (f"{good}/a.png", "my set", good, 0, None),
        (f"{good}/b.JPG", "my set", good, 0, None),
    ]
    assert rows(root) == rows(root, "folders") == ("folders", want, [])
    for record in read_dataset(root)[1]:
        assert examine(record) == (record, None) and read(record)[1] is None


def test_a_folder_of_images_has_no_labels(tmp_path):
    root = put(
        tmp_path / "bare",
        {"b.png": "RGB", "a.JPG": "L", "c.webp": "RGB", "../out.png": "L", "d.png": "-> ../out.png"},
    )
    litter(root)
    want = [(name, "bare", "", None, None) for name in ("a.JPG", "b.png", "c.webp", "d.png")]
    assert rows(root) == rows(root, "images") == ("images", want, [])
    for record in read_dataset(root)[1]:
        assert examine(record) == (record, None) and read(record)[1] is None


@pytest.mark.parametrize(
    "files", [{"good/a.png": "L"}, {"x/a.png": "L"}, {"x/y/a.png": "L", "b.png": "L"}], ids=str
)
def test_a_root_in_no_known_layout_is_told_what_was_looked_for(files, tmp_path, capsys):
    put(tmp_path, files)
    with pytest.raises(ValueError) as error:
        read_dataset(tmp_path)
    assert str(tmp_path) in str(error.value) and all(
        x.about.replace("{split}", "test") in str(error.value) for x in LAYOUTS
    )
    assert main(["--data", str(tmp_path), *QUICK]) == 2
    assert str(error.value) in capsys.readouterr().err


def test_a_root_in_another_layout_than_the_one_named_is_an_error(tmp_path):
    root, _ = replica(tmp_path, "btad")
    for name in set(REPLICAS) - {"btad", "mvtec", "dtd-synthetic"}:
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(str(root))):
            read_dataset(root, name)


def test_no_folder_an_empty_one_and_unknown_names_are_errors(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="gone"):
        read_dataset(tmp_path / "gone")
    put(tmp_path, {"file.png": "L", "litter/Thumbs.db": "x", "empty/.a.png": "x"})
    (tmp_path / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="file.png"):
        read_dataset(tmp_path / "file.png")
    for name in ("void", "litter", "empty"):
        with pytest.raises(FileNotFoundError, match=name):
            read_dataset(tmp_path / name)
        assert main(["--data", str(tmp_path / name), *QUICK]) == 2
        assert name in capsys.readouterr().err
    with pytest.raises(ValueError, match="nosuch"):
        read_dataset(tmp_path, "nosuch")
    with pytest.raises(ValueError, match="valid"):
        read_dataset(tmp_path, "auto", "valid")


# --- what does not pair up, and what cannot be read

SOUND = {
    "nut/test/good/sound.png": "RGB",
    "nut/test/cut/whole.png": "RGB",
    "nut/ground_truth/cut/whole_mask.png": "mask L",
}
BAD = {  # name of what must be told: the files that make it so
    "unmasked.png": {"nut/test/cut/unmasked.png": "RGB"},
    "orphan_mask.png": {"nut/ground_truth/cut/orphan_mask.png": "mask L"},
    "twice.png": {
        "nut/test/cut/twice.png": "RGB",
        "nut/ground_truth/cut/twice_mask.png": "mask L",
        "nut/ground_truth/cut/twice_mask.bmp": "mask L",
    },
    "narrow_mask.png": {"nut/test/cut/narrow.png": "RGB"},  # the mask is made by `spoil`
    "text.png": {"nut/test/good/text.png": "no picture"},
    "void.png": {"nut/test/good/void.png": ""},
    "halved.jpg": {"nut/test/good/halved.jpg": "cut"},
    "halved.png": {"nut/test/cut/halved.png": "cut", "nut/ground_truth/cut/halved_mask.png": "mask L"},
    "words_mask.png": {"nut/test/cut/words.png": "RGB", "nut/ground_truth/cut/words_mask.png": "no mask"},
    "short_mask.png": {"nut/test/cut/short.png": "RGB", "nut/ground_truth/cut/short_mask.png": "cut"},
    "dangling.png": {"nut/test/good/dangling.png": "-> nowhere.png"},
    "circle.png": {"nut/test/good/circle.png": "-> circle.png"},
}


def spoil(root: Path, *names: str) -> Path:
    put(root, SOUND)
    for name in names:
        put(root, BAD[name])
    if "narrow_mask.png" in names:
        painted("L", np.ones((H, W - 1), bool)).save(root / "nut/ground_truth/cut/narrow_mask.png")
    return root


def test_all_that_is_wrong_is_told_at_once_before_any_score(tmp_path, capsys):
    root = spoil(tmp_path, *BAD)
    assert main(["--data", str(root), *QUICK]) == 2
    told = capsys.readouterr()
    assert not told.out and "Traceback" not in told.err and "--skip-bad" in told.err
    assert all(name in told.err for name in BAD) and f"{len(BAD)} files" in told.err
    assert "sound.png" not in told.err and "whole" not in told.err
    assert f"{W - 1} x {H}" in told.err and f"{W} x {H}" in told.err


@pytest.mark.parametrize("name", BAD)
def test_each_alone_is_an_error_that_names_it_and_can_be_left_out(name, tmp_path, capsys):
    root = spoil(tmp_path / "root", name)
    assert main(["--data", str(root), *QUICK]) == 2
    told = capsys.readouterr()
    assert name in told.err and not told.out
    report = tmp_path / "r.json"
    assert main(["--data", str(root), *QUICK, "--skip-bad", "--json", str(report)]) == 0
    told, found = capsys.readouterr(), json.loads(report.read_text())
    assert re.search(r"\b2 images\b", told.out) and re.search(r"\b1 files? left out", told.out)
    assert [row["path"] for row in found["records"]] == ["nut/test/cut/whole.png", "nut/test/good/sound.png"]
    assert len(found["left_out"]) == 1 and name in found["left_out"][0]


def test_nothing_wrong_leaves_out_nothing_and_nothing_left_is_an_error(tmp_path, capsys):
    root = spoil(tmp_path / "a")
    assert main(["--data", str(root), *QUICK, "--skip-bad"]) == 0
    assert "0 files left out" in capsys.readouterr().out
    root = put(tmp_path / "b", {"good/a.png": "x", "bad/b.png": "x"})
    assert main(["--data", str(root), *QUICK, "--skip-bad"]) == 2
    told = capsys.readouterr()
    assert "no image" in told.err and not told.out


@pytest.mark.parametrize(
    "name, lost",
    [
        ("mvtec", "bottle/ground_truth/broken/000_mask.png"),
        ("dtd-synthetic", "Woven 1/ground_truth/bad/1.png"),
        ("btad", "03/ground_truth/ko/0002.bmp"),
        ("visa", "candle/Data/Masks/Anomaly/000.png"),
        ("ksdd2", "test/9_GT.png"),
        ("brain_ad", "test/Ungood/label/1.bmp"),
        ("cvc-clinicdb", "PNG/Ground Truth/10.PNG"),
        ("endo", "masks/9.TIF"),
        ("kvasir", "masks/cju a.jpg"),
    ],
)
def test_a_missing_mask_is_an_error_that_names_the_file(name, lost, tmp_path, capsys):
    root, want = replica(tmp_path, name)
    (root / lost).unlink()
    assert main(["--data", str(root), *QUICK]) == 2
    told = capsys.readouterr()
    image = next(row[0] for row in want.test if row[4] == lost)
    assert "1 files" in told.err and (image in told.err or lost in told.err) and not told.out


@pytest.mark.parametrize(
    "name, lost",
    [
        ("mvtec", "bottle/test/broken/000.png"),  # whose mask was the only one of its folder
        ("mvtec", "bottle/test/broken large/a.png"),
        ("btad", "01/test/ko/0001.bmp"),
        ("btad", "03/test/ko/0002.bmp"),
        ("ksdd2", "test/10.png"),
        ("dagm", "Class1/Test/0010.PNG"),
        ("brain_ad", "test/Ungood/img/1.png"),
        ("endo", "images/a.png"),
        ("cvc-clinicdb", "PNG/Original/a.png"),
        ("kvasir", "images/cjub.JPG"),
    ],
)
def test_a_mask_without_an_image_is_an_error_that_names_it(name, lost, tmp_path, capsys):
    root, want = replica(tmp_path, name)
    (root / lost).unlink()
    mask = next(row[4] for row in want.test if row[0] == lost)
    found = read_dataset(root)[2]
    assert len(found) == 1 and mask in str(found)
    assert main(["--data", str(root), *QUICK]) == 2
    assert mask in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, second",
    [
        ("mvtec", "bottle/ground_truth/broken/000_mask.bmp"),
        ("mvtec", "bottle/ground_truth/broken/000.png"),  # both spellings
        ("btad", "01/ground_truth/ko/0000.bmp"),
        ("ksdd2", "test/10_GT.bmp"),
        ("dagm", "Class1/Test/Label/0010_label.bmp"),
        ("brain_ad", "test/Ungood/label/1.PNG"),
        ("endo", "masks/9.png"),
    ],
)
def test_two_masks_for_one_image_are_an_error_that_names_them(name, second, tmp_path, capsys):
    root, _ = replica(tmp_path, name)
    put(root, {second: "mask L"})
    assert main(["--data", str(root), *QUICK]) == 2
    told = capsys.readouterr()
    assert second in told.err and not told.out


def test_a_mask_of_another_size_and_one_that_is_none_are_faults_of_their_record(tmp_path):
    root = spoil(tmp_path, "narrow_mask.png", "words_mask.png")
    records = {record.path.name: record for record in read_dataset(root)[1]}
    for name, words in (("narrow", (f"{W - 1} x {H}", f"{W} x {H}", "narrow.png")), ("words", ())):
        found, fault = examine(records[f"{name}.png"])
        assert found == records[f"{name}.png"] and all(x in fault for x in (*words, f"{name}_mask.png"))
        with pytest.raises(ValueError, match=f"{name}_mask.png"):
            read(records[f"{name}.png"])


def test_the_label_of_an_unreadable_mask_is_not_made_up(tmp_path):
    root = put(
        tmp_path,
        {"test/1.png": "RGB", "test/1_GT.png": "cut", "test/2.png": "RGB", "test/2_GT.png": "mask L"},
    )
    found = [examine(record) for record in read_dataset(root)[1]]
    assert [record.label for record, _ in found] == [None, 1]
    assert "1_GT.png" in found[0][1] and found[1][1] is None


# --- what is scored, and what cannot be


def report(root: Path, folder: Path, *flags: str) -> dict:
    assert main(["--data", str(root), *QUICK, "--json", str(folder / "r.json"), *flags]) == 0
    return json.loads((folder / "r.json").read_text())


def test_classes_are_chosen_by_name(tmp_path, capsys):
    root, _ = replica(tmp_path, "btad")
    found = report(root, tmp_path, "--classes", "03,01")
    assert list(found["classes"]) == ["01", "03"] and {row["class"] for row in found["records"]} == {
        "01",
        "03",
    }
    assert [row["label"] for row in found["records"]].count(1) == 3 and len(found["records"]) == 6
    assert re.search(r"\b6 images\b", capsys.readouterr().out)
    assert main(["--data", str(root), *QUICK, "--classes", "01,4,09"]) == 2
    told = capsys.readouterr()
    assert not told.out and "no class 09, 4" in told.err and "01, 02, 03" in told.err


def test_a_class_that_is_not_asked_for_is_not_checked_and_one_that_is_is_checked_whole(tmp_path, capsys):
    root = spoil(tmp_path, "text.png", "orphan_mask.png", "unmasked.png")
    put(root, {name.replace("nut", "cap"): how for name, how in SOUND.items()})
    assert main(["--data", str(root), *QUICK, "--classes", "cap"]) == 0
    assert "0 files left out" in capsys.readouterr().out
    assert main(["--data", str(root), *QUICK, "--classes", "nut"]) == 2
    told = capsys.readouterr().err
    assert all(name in told for name in ("text.png", "unmasked.png", "orphan_mask.png"))


def test_a_limit_counts_each_class_and_keeps_both_kinds(tmp_path):
    files = {f"{cls}/test/{kind}/{i}.png": "RGB" for cls in "ab" for kind in ("ok", "ko") for i in range(4)}
    root = put(
        tmp_path / "root",
        files | {f"{cls}/ground_truth/ko/{i}.png": "mask L" for cls in "ab" for i in range(4)},
    )
    found = report(root, tmp_path, "--limit", "2")["records"]
    assert [(row["class"], row["label"]) for row in found] == [("a", 1), ("a", 0), ("b", 1), ("b", 0)]
    assert len(report(root, tmp_path, "--limit", "99")["records"]) == 16


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_a_limit_below_1_is_an_error(limit, tmp_path, capsys):
    assert main(["--data", str(put(tmp_path, SOUND)), *QUICK, "--limit", limit]) == 2
    told = capsys.readouterr()
    assert "--limit" in told.err and not told.out


def test_select_keeps_order_and_spreads_evenly(tmp_path):
    root = put(tmp_path, {f"{kind}/{i}.png": "L" for kind in ("good", "x") for i in range(6)})
    records = read_dataset(root)[1]
    assert select(records, None, None) == select(records, tmp_path.name, 12) == records
    for n in range(1, 13):
        places = [records.index(record) for record in select(records, None, n)]
        gaps = np.diff(places)
        assert len(places) == n and (gaps > 0).all() and (n < 2 or gaps.max() - gaps.min() <= 1)
        assert n < 2 or sum(record.label for record in select(records, None, n)) in (n // 2, (n + 1) // 2)


def test_numbers_that_a_set_cannot_have_are_dashes(tmp_path, capsys):
    both, one = replica(tmp_path, "mvtec")[0], replica(tmp_path, "kvasir")[0]
    images, bare = replica(tmp_path, "brainmri")[0], put(tmp_path / "bare", {"a.png": "RGB", "b.png": "L"})
    for root, image, pixel in ((both, 1, 1), (one, 0, 1), (images, 1, 0), (bare, 0, 0)):
        found = report(root, tmp_path)
        for numbers in (*found["classes"].values(), found["mean"]):
            assert all(
                (value is not None) == (image if "image" in k else pixel) for k, value in numbers.items()
            )
        mean = re.search("^mean.*", capsys.readouterr().out, re.MULTILINE)[0].split()[2:]
        assert [cell == "-" for cell in mean] == [not image] * 3 + [not pixel] * 4
    assert [row["label"] for row in found["records"]] == [None, None]


def test_the_train_split_and_a_named_dataset_reach_the_command_line(tmp_path, capsys):
    root, _ = replica(tmp_path, "dagm")
    found = report(root, tmp_path, "--split", "train", "--dataset", "dagm")
    assert len(found["records"]) == 4 and all("/Train/" in row["path"] for row in found["records"])
    assert "train" in capsys.readouterr().out
    assert main(["--data", str(root), *QUICK, "--dataset", "kvasir"]) == 2
    assert str(root) in capsys.readouterr().err


# --- masks


@pytest.mark.parametrize(
    "on", [BLOB, ~BLOB, np.zeros_like(BLOB), np.ones_like(BLOB)], ids="blob rest none all".split()
)
@pytest.mark.parametrize(
    "how, suffix",
    [(how, suffix) for how in "1 L index P LA RGB RGBA 16".split() for suffix in (".png", ".PNG", ".tif")]
    + [(how, ".bmp") for how in "1 L index P RGB RGBA".split()]
    + [("I", ".tif"), ("F", ".tiff"), ("1", ".pbm"), ("16", ".pgm")],
)
def test_a_mask_is_true_where_it_is_above_0(how, suffix, on, tmp_path):
    path = tmp_path / f"m{suffix}"
    painted(how, on).save(path)
    for name in (path, str(path)):
        mask = read_mask(name)
        assert mask.dtype == torch.bool and np.array_equal(mask, on)


def test_the_lowest_value_above_0_is_anomalous(tmp_path):
    for image in (Image.fromarray(BLOB.astype(np.uint8)), Image.fromarray(BLOB.astype(np.uint16))):
        image.save(tmp_path / "m.png")
        assert np.array_equal(read_mask(tmp_path / "m.png"), BLOB)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("name", ["m.jpg", "m.JPEG", "m.png"])
def test_a_jpeg_is_true_above_127_whatever_its_name(mode, name, tmp_path):
    values = np.where(BLOB, 255, 0) + np.random.default_rng(0).integers(-40, 41, BLOB.shape)
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8)).convert("RGB").convert(mode)
    image.save(tmp_path / name, "JPEG", quality=90)
    with Image.open(tmp_path / name) as file:
        assert (np.asarray(file.convert("L"))[~BLOB] > 0).any()  # its zeros are not exact
    assert np.array_equal(read_mask(tmp_path / name), BLOB)
    Image.new("L", (W, H), 127).save(tmp_path / name, "JPEG", quality=100)
    assert not read_mask(tmp_path / name).any()
    Image.new("L", (W, H), 128).save(tmp_path / name, "JPEG", quality=100)
    assert read_mask(tmp_path / name).all()


def test_in_a_palette_every_entry_but_black_is_anomalous(tmp_path):
    path, binary = tmp_path / "m.png", Image.fromarray(BLOB.astype(np.uint8) * 255)
    binary.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE).save(path)
    assert np.array_equal(read_mask(path), BLOB)
    image = Image.fromarray((~BLOB).astype(np.uint8))  # white first, black second
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(path)
    assert np.array_equal(read_mask(path), BLOB)
    for black in (85, 128, 255):  # three times of which is more than eight bits hold
        image = Image.fromarray(np.where(BLOB, 0, black).astype(np.uint8))
        image.putpalette([200] * 3 * black + [0, 0, 0])
        image.save(path)
        assert np.array_equal(read_mask(path), BLOB)
    image = Image.fromarray(np.full((H, W), 3, np.uint8))  # a palette without black
    image.putpalette([200] * 3 * 4)
    image.save(path)
    assert read_mask(path).all()
    image = painted("P")  # index 0 is transparent, too
    image.save(path, transparency=0)
    assert np.array_equal(read_mask(path), BLOB)


def test_of_colours_one_is_enough_and_alpha_is_none(tmp_path):
    for channel in range(3):
        pixels = np.zeros((H, W, 4), np.uint8)
        pixels[..., 3] = 255
        pixels[BLOB, channel] = 9
        Image.fromarray(pixels).save(tmp_path / "m.png")
        assert np.array_equal(read_mask(tmp_path / "m.png"), BLOB)


def test_a_mask_turns_as_its_image_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(BLOB).astype(np.uint8) * 255).save(tmp_path / "m.png", exif=exif)
    assert np.array_equal(read_mask(tmp_path / "m.png"), BLOB)


def test_what_is_no_mask_is_named(tmp_path):
    put(tmp_path, {"text.png": "x", "empty.png": "", "half.png": "cut", "half.jpg": "cut"})
    for name in ("text.png", "empty.png", "half.png", "half.jpg"):
        with pytest.raises(ValueError, match=name):
            read_mask(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read_mask(tmp_path / "gone.png")


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
    values = np.asarray(
        Image.fromarray(mask.astype(np.uint8) * 255).resize(size[::-1], Image.BILINEAR)
    ).astype(int)
    off = got != (values > 127)
    assert got.shape == size and got.dtype == bool and got.any()
    assert off.sum() <= 0.003 * got.size and (np.abs(values[off] - 127) <= 2).all()


@pytest.mark.parametrize("side", [56, 518])
def test_a_pixel_that_is_half_covered_stays_anomalous_as_with_pillow(side):
    mask = disk(2 * side, 2 * side, 0.6 * side)
    values = Image.fromarray(mask.astype(np.uint8) * 255).resize((side, side), Image.BILINEAR)
    values = np.asarray(values)
    assert (values == 128).any()  # 127.5, rounded
    assert np.array_equal(shrink(torch.from_numpy(mask), (side, side)).numpy(), values > 127)


def test_shrink_keeps_nothing_everything_and_its_own_size():
    for size in ((5, 6), (H, W), (30, 31)):
        assert not shrink(torch.zeros(H, W, dtype=torch.bool), size).any()
        assert shrink(torch.ones(H, W, dtype=torch.bool), size).all()
        assert shrink(torch.zeros(H, W, dtype=torch.bool), size).shape == size
    assert torch.equal(shrink(torch.from_numpy(BLOB), (H, W)), torch.from_numpy(BLOB))


# --- what a new user runs into


def test_without_a_normal_folder_nothing_is_called_anomalous(tmp_path):
    put(tmp_path, {"p1/good/a.png": "L", "p1/bad/b.png": "L", "p2/bad/c.png": "L"})
    with pytest.raises(ValueError, match="p1/, p2/"):
        read_dataset(tmp_path, "folders")


def test_spaces_around_class_names_do_no_harm(tmp_path):
    records = read_dataset(replica(tmp_path, "btad")[0])[1]
    assert {record.cls for record in select(records, " 03, 01", None)} == {"01", "03"}
    odd = [record._replace(cls="a, b") for record in records]
    assert {record.cls for record in select(odd + records, "a, b", None)} == {"a, b"}


def test_what_lies_too_deep_is_named_and_not_left_out_in_silence(tmp_path):
    for name, deep in (("mvtec", "{}/deeper/x.png"), ("kvasir", "images/deeper/x.png")):
        root, _ = replica(tmp_path, name)
        place = Path(read_dataset(root)[1][0].path).parent.relative_to(root).as_posix()
        put(root, {deep.format(place): "L"})
        faults = read_dataset(root)[2]
        assert [fault.path.name for fault in faults] == ["x.png"] and "too deep" in faults[0].what
    put(tmp_path / "bare", {"a.png": "L", "sub/b.png": "L"})
    assert [fault.path.name for fault in read_dataset(tmp_path / "bare", "images")[2]] == ["b.png"]


def test_masks_beside_good_and_bad_are_no_anomalous_images(tmp_path):
    put(tmp_path, {"good/a.png": "L", "bad/b.png": "L", "Ground_Truth/bad/b.png": "mask L"})
    _, records, faults = read_dataset(tmp_path)
    assert [(record.kind, record.label) for record in records] == [("bad", 1), ("good", 0)]
    assert [fault.path.parent.name for fault in faults] == ["bad"] and "no use for" in faults[0].what


def test_a_class_whose_images_are_all_missing_is_told(tmp_path, capsys):
    put(tmp_path, {"a/test/good/0.png": "L", "a/test/bad/1.png": "L", "a/ground_truth/bad/1.png": "mask L"})
    put(tmp_path, {"b/ground_truth/bad/1.png": "mask L"})
    assert main(["--data", str(tmp_path), *QUICK]) == 2
    lost = tmp_path / "b" / "ground_truth" / "bad" / "1.png"
    assert f"{lost} is a mask without an image" in capsys.readouterr().err
    assert main(["--data", str(tmp_path), *QUICK, "--classes", "a"]) == 0
    assert "0 files left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("listed", "anomaly"), [(["a.png"] * 2, 0), (["a.png", "./a.png"], 0), (["a.png"], 2)]
)
def test_meta_json_lists_each_image_once_with_a_label(tmp_path, listed, anomaly):
    put(tmp_path, {"a.png": "L"})
    meta(tmp_path, {"c": [entry(image, anomaly) for image in listed]})
    with pytest.raises(ValueError, match="a.png is listed twice"):
        read_dataset(tmp_path)


def test_a_byte_order_mark_changes_nothing(tmp_path):
    root, want = replica(tmp_path, "visa")
    listing = root / "split_csv" / "1cls.csv"
    listing.write_text("\ufeff" + listing.read_text(encoding="utf-8-sig"), encoding="utf-8")
    assert rows(root)[1:] == (want.test, [])


def test_the_mask_of_a_normal_image_is_not_asked_for(tmp_path):
    put(tmp_path, {"a.png": "L", "b.png": "L", "b_mask.png": "mask L"})
    entries = [
        dict(img_path=f"{name}.png", mask_path=mask, cls_name="c", specie_name="x", anomaly=anomaly)
        for name, mask, anomaly in (("a", "nowhere.png", 0), ("b", "b_mask.png", 1))
    ]
    (tmp_path / "meta.json").write_text(json.dumps({"test": {"c": entries}}))
    _, records, faults = read_dataset(tmp_path)
    assert not faults and records[0].mask is None and records[0].known
    assert not read(records[0])[1].any() and read(records[1])[1].any()


def test_masks_of_the_test_split_are_no_fault_of_the_train_split(tmp_path):
    root, want = replica(tmp_path, "mvtec")
    assert rows(root, "mvtec", "train")[1:] == (want.train, [])
    assert list((root / want.test[0][1] / "ground_truth").rglob("*.png"))


def test_what_limit_leaves_out_is_not_checked(tmp_path, capsys):
    put(tmp_path, {f"a/test/good/{i}.png": "L" for i in range(9)})
    (tmp_path / "a/test/good/0.png").write_text("no image")
    assert main(["--data", str(tmp_path), *QUICK, "--limit", "1"]) == 0
    assert main(["--data", str(tmp_path), *QUICK]) == 2
    assert "0.png" in capsys.readouterr().err
