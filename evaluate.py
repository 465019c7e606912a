"""Scores a dataset as it lies on disk: image and pixel AUROC, F1-max and AP, and AUPRO.

   python evaluate.py --data ROOT --model tiny --json result.json
   torchrun --nproc-per-node=8 evaluate.py --data ROOT --model tiny      # the same digits, sooner

1 datasets as data   2 images and masks   3 metrics   4 one pass over the images   5 command line

B images   H W pixels, of the network's input or (native) of the image itself
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import io
import json
import math
import os
import platform
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # comes with huggingface_hub

from visualad import (
    VisualAD,
    ahead,
    check_heatmaps,
    check_report,
    heatmap_png,
    image_files,
    load_model,
    model_flags,
    nonempty,
    overlay,
    real,
    resize,
    to_tensor,
    upsample,
    write_atomic,
)  # fmt: skip

# Without this Intel's library gives other last digits for another number of threads, and torchrun sets that.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


# --- 1. datasets as data ---------------------------------------------------------------------------------
class Layout(NamedTuple):
    """How images, labels and masks lie under a root. Patterns are regular expressions for a whole path from
    there, in any case; {split} stands for test or train. Those of images and masks see no suffix and name
    what pairs them: cls, kind (the folder that tells normal from anomalous) and stem."""

    names: tuple[str, ...]  # that --dataset takes
    about: str
    signs: tuple[str, ...]  # each must match a file; (): no file lies deeper than the root
    pairs: tuple[tuple[str, str | None], ...]  # of images and their masks; the first that finds images counts
    normal: str  # the kinds that are normal, or NO MASK, EMPTY MASK, NONE, UNKNOWN
    optional: bool = False  # whether a class may do without masks
    index: str = ""  # a file that lists the images


STEM, CLS, GOOD = r"(?P<stem>[^/]+)", r"((?P<cls>[^/]+)/)?", "good|ok|normal|no"
MASK = rf"{CLS}ground_truth/(?P<kind>[^/]+)/(?P<stem>[^/]+?)(_mask)?"
SPECIES = rf"{CLS}{{split}}/(?P<kind>[^/]+)/{STEM}", MASK
TRUTH = "ground.?truth|masks?|labels?"  # folders that image-level sets have no use for
CLASSN, UNGOOD = r"(?P<cls>Class\d+)", "{split}/(?P<kind>good|ungood)/"
SEGMENTED = ("images", "masks"), ("PNG/Original", "PNG/Ground Truth"), ("Original", "Ground Truth")
LAYOUTS = (
    Layout(("meta.json",), "meta.json", (), (), "", True, "meta.json"),
    Layout(("visa",), "split_csv/1cls.csv", (), (), "", False, "split_csv/1cls.csv"),
    Layout(
        ("ksdd2",), "{split}/N.* beside N_GT.*", (r"(test|train)/[^/]+_GT\.\w+",),
        ((rf"{{split}}/{STEM}(?<!_GT)", rf"{{split}}/{STEM}_GT"),), "EMPTY MASK",
    ),
    Layout(
        ("dagm",), "ClassN/{split}/*, ClassN/{split}/Label/STEM_label.*",
        (r"Class\d+/(test|train)/(Label/)?[^/]+",),
        ((rf"{CLASSN}/{{split}}/{STEM}", rf"{CLASSN}/{{split}}/Label/{STEM}_label"),), "NO MASK",
    ),
    Layout(
        ("oct17", "brain_ad", "his"), "{split}/{good,Ungood}/[img/]*, {split}/Ungood/label/STEM.*",
        (r"(test|train|valid)/ungood/.+",), ((rf"{UNGOOD}(img/)?{STEM}", rf"{UNGOOD}label/{STEM}"),),
        "good", True,
    ),
    Layout(
        ("mvtec", "mpdd", "dtd-synthetic"),
        "[CLASS/]{split}/{good,DEFECT}/*, [CLASS/]ground_truth/DEFECT/{STEM_mask,STEM}.*",
        (r"([^/]+/)?(test|train)/good/.+",), (SPECIES,), "good",
    ),
    Layout(
        ("btad",), "[CLASS/]{split}/{ok,ko}/*, [CLASS/]ground_truth/ko/STEM.*",
        (r"([^/]+/)?(test|train)/ok/.+",), (SPECIES,), "ok",
    ),
    Layout(
        ("cvc-clinicdb", "endo", "kvasir"), "images/* and masks/*; [PNG/]Original/* and [PNG/]Ground Truth/*",
        ("(images|(PNG/)?Original)/.+", "(masks|(PNG/)?Ground Truth)/.+"),
        tuple((f"{images}/{STEM}", f"{masks}/{STEM}") for images, masks in SEGMENTED), "NONE",
    ),
    Layout(
        ("brainmri",), "[brain_tumor_dataset/]{yes,no}/*",
        ("(brain_tumor_dataset/)?yes/.+", "(brain_tumor_dataset/)?no/.+"),
        tuple((f"{folder}(?P<kind>yes|no)/{STEM}", None) for folder in ("", "brain_tumor_dataset/")),
        "no", True,
    ),
    Layout(
        ("folders",), "{good,ok,normal,no}/* beside any other folder",
        (f"({GOOD})/.+", f"(?!({GOOD}|{TRUTH})/)[^/]+/.+"),
        ((f"(?P<kind>(?!({TRUTH})/)[^/]+)/(.+/)?{STEM}", f"({TRUTH})/(.+/)?{STEM}"),), GOOD, True,
    ),
    Layout(("images",), "images alone, scored without labels", (), ((STEM, None),), "UNKNOWN", True),
)  # fmt: skip
DATASETS = {name: layout for layout in LAYOUTS for name in layout.names}


class Record(NamedTuple):
    """One image of a dataset."""

    path: Path
    cls: str
    kind: str  # what is wrong with it, or how the dataset calls what is normal
    label: int | None  # 1 anomalous, 0 normal; None: unknown, or told by the mask once that is read
    mask: Path | None
    known: bool = False  # whether every pixel's truth is known: true where any image of the class has a mask


class Fault(NamedTuple):
    """What is wrong with a file: missing, unreadable, mismatched."""

    path: Path
    cls: str
    what: str


def read_dataset(
    root: str | os.PathLike, dataset: str = "auto", split: str = "test"
) -> tuple[Layout, list[Record], list[Fault]]:
    """The layout, the images sorted by class and path, and what does not pair up.

    dataset: a name in DATASETS, or "auto": the first layout whose signs are there. Masks pair by stem.
    Raises ValueError for a root in no known layout, FileNotFoundError where there is no image at all.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder")
    if dataset not in ("auto", *DATASETS) or split not in ("test", "train"):
        raise ValueError(f"dataset is auto, {', '.join(DATASETS)}; split test, train; got {dataset}, {split}")
    indexed = (row for row in LAYOUTS if row.index and (root / row.index).is_file())
    layout = DATASETS.get(dataset) or next(indexed, None)
    if layout and layout.index:
        rows, faults = listed(layout, root, split), []
    else:
        files = [path.relative_to(root) for path in image_files(root)]
        layout = layout or next((row for row in LAYOUTS if not row.index and fits(row, files)), None)
        # Whatever lies there would be anomalous without a folder that says what is normal.
        lacks = layout is None or (layout.names == ("folders",) and not fits(layout, files))
        rows, faults = ([], []) if lacks else matched(layout, root, files, split)
    if not rows:
        looked = "".join(f"\n  {row.names[0]}: {row.about}" for row in ([layout] if layout else LAYOUTS))
        there = sorted(path.name + "/" * path.is_dir() for path in root.iterdir())
        there = ", ".join(there[:9] + ["..."] * (len(there) > 9))
        looked = looked.replace("{split}", split)
        raise ValueError(f"no {split} images in a known layout in {root} ({there}); looked for{looked}")
    masked = {row.cls for row in rows if row.mask}
    for path, cls, _, label, mask, _ in rows:
        if label != 0 and mask is None and (cls in masked or not layout.optional):
            faults.append(Fault(path, cls, f"{path} is anomalous and has no mask"))
    rows = [row._replace(known=row.cls in masked) for row in rows]
    return layout, sorted(rows, key=lambda row: (row.cls, row.path)), faults


def fits(layout: Layout, files: Sequence[Path]) -> bool:
    names = [path.as_posix() for path in files]
    found = (any(re.fullmatch(sign, name, re.I) for name in names) for sign in layout.signs)
    return all(found) if layout.signs else not any("/" in name for name in names)


def listed(layout: Layout, root: Path, split: str) -> list[Record]:
    """The images that meta.json or VisA's split_csv/1cls.csv lists."""
    path, rows = root / layout.index, []
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            for cls, entries in json.loads(text)[split].items():
                for entry in entries:
                    image, mask = entry["img_path"], entry["mask_path"]
                    rows.append((image, cls, entry["specie_name"], int(entry["anomaly"]), mask))
        else:
            for row in csv.DictReader(io.StringIO(text)):
                if row["split"] == split:
                    label = int(row["label"] != "normal")
                    rows.append((row["image"], row["object"], row["label"], label, row["mask"]))
        records, seen = [], set()
        for image, cls, kind, label, mask in rows:
            if label not in (0, 1) or os.path.normpath(image) in seen:
                raise ValueError(f"{image} is listed twice, or its anomaly, {label}, is not 0 or 1")
            seen.add(os.path.normpath(image))
            mask = root / mask if mask and label else None
            mask = None if mask and mask.is_dir() else mask  # some generators write the root for "none"
            records.append(Record(root / image, cls, kind, label, mask))
        return records
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path} does not list {split} images as it should: {error!r}") from error


def matched(
    layout: Layout, root: Path, files: Sequence[Path], split: str
) -> tuple[list[Record], list[Fault]]:
    """The images that a layout's patterns find, each with the mask of its class, kind and stem."""

    def find(pattern: str | None) -> list[tuple[Path, tuple[str, str, str]]]:
        rule = re.compile((pattern or "(?!)").replace("{split}", split), re.I)
        found = ((path, rule.fullmatch(path.with_suffix("").as_posix())) for path in files)
        found = ((path, {"cls": None, "kind": "", **m.groupdict()}) for path, m in found if m)
        whole = root.resolve().name
        return [(path, (at["cls"] or whole, at["kind"], at["stem"])) for path, at in found]

    splits = layout.pairs if split == "test" else [pair for pair in layout.pairs if "{split}" in pair[0]]
    images, of_masks = next(((found, pair[1]) for pair in splits if (found := find(pair[0]))), ([], None))
    masks: dict[tuple, list[Path]] = {}
    for path, key in find(of_masks):
        masks.setdefault(key, []).append(path)
    rows, faults = [], []
    for path, (cls, kind, stem) in images:
        own = masks.get((cls, kind, stem), [])
        rules = {"NO MASK": int(bool(own)), "EMPTY MASK": None, "NONE": 1, "UNKNOWN": None}
        label = rules.get(layout.normal, int(kind.lower() not in layout.normal.split("|")))
        if len(own) > 1:
            named = ", ".join(str(root / mask) for mask in own)
            faults.append(Fault(root / path, cls, f"{root / path} has {len(own)} masks: {named}"))
        rows.append(Record(root / path, cls, kind, label, root / own[0] if own and label != 0 else None))
    places = {path.parent: cls for path, (cls, *_) in images}
    taken = {path for path, _ in images} | {path for paths in masks.values() for path in paths}
    for path in files:  # what lies deeper among the images would otherwise be left out in silence
        place = next(filter(places.get, path.parents), None)
        if place and path not in taken and real(root / place) in real(root / path).parents:
            faults.append(
                Fault(root / path, places[place], f"{root / path} lies too deep, below {root / place}")
            )
    if of_masks and (split == "test" or "{split}" in of_masks):  # else these are masks of the other split
        for key in masks.keys() - {key for _, key in images}:
            for path in masks[key]:
                told = "is a mask without an image"
                if layout.names == ("folders",):
                    told = "is a mask, which layout folders has no use for: it knows images by their labels"
                faults.append(Fault(root / path, key[0], f"{root / path} {told}"))
    return rows, faults


# --- 2. images and masks ---------------------------------------------------------------------------------
def read_mask(path: str | os.PathLike) -> Tensor:
    """A mask file -> bool [H, W], true where anomalous: above 0, but above 127 in a JPEG, whose zeros are not
    exact. Of colours one is enough; alpha does not count. Raises ValueError, FileNotFoundError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            lossy, image = file.format in ("JPEG", "MPO"), ImageOps.exif_transpose(file)
        if image.mode not in ("1", "L", "I", "F", "RGB") and not image.mode.startswith("I;16"):
            image = image.convert("RGB")  # which drops an alpha channel
        values = np.asarray(image)
        values = values if values.ndim == 2 else values.max(axis=2)
        return torch.from_numpy(values > (127 if lossy else 0))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no mask {path}") from error
    except Exception as error:
        raise ValueError(f"cannot read {path} as a mask: {error}") from error


def shrink(mask: Tensor, size: Sequence[int]) -> Tensor:
    """bool [H, W] -> bool at `size`, as the published protocol has it: bilinear, antialiased, >= a half."""
    if not mask.any():
        return torch.zeros(*size, dtype=torch.bool)
    share = F.interpolate(mask[None, None].float(), tuple(size), mode="bilinear", antialias=True)[0, 0]
    return share > 0.5 - 1e-6  # Pillow rounds 127.5 of 255 up; sums of floats come out a little under a half


def read(record: Record) -> tuple[Tensor, Tensor | None]:
    """Image [3, H, W] as `to_tensor` gives it, mask bool [H, W], None where pixels are unknown. Raises
    ValueError for what is no image, or a mask of another size; FileNotFoundError."""
    image = to_tensor(record.path)
    if not record.known:
        return image, None
    mask = read_mask(record.mask) if record.mask else torch.zeros(image.shape[1:], dtype=torch.bool)
    if mask.shape != image.shape[1:]:
        (h, w), (H, W) = mask.shape, image.shape[1:]
        raise ValueError(f"{record.mask} is {w} x {h} px, but its image {record.path} {W} x {H}")
    return image, mask


def examine(record: Record) -> tuple[Record, str | None]:
    """The record with its label, and what is wrong with its files, if anything."""
    try:
        _, mask = read(record)
    except (ValueError, OSError) as error:
        return record, str(error)
    if record.label is None and mask is not None:
        record = record._replace(label=int(mask.any()))
    return record, None


class Samples(Dataset):
    """Records as (index, image fp32 [3, H, W] at `size`, mask bool at `size` or, native, at the image's own
    size, or None, that own size)."""

    def __init__(self, records: Sequence[Record], size: Sequence[int], native: bool = False):
        self.records, self.size, self.native = records, tuple(size), native

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor | None, torch.Size]:
        image, mask = read(self.records[i])
        own = image.shape[1:]
        if mask is not None and not self.native:
            mask = shrink(mask, self.size)
        return i, resize(image, self.size), mask, own


def collate(samples: Iterable) -> tuple[tuple, Tensor, tuple, tuple]:
    index, images, masks, own = zip(*samples, strict=True)
    return index, torch.stack(images), masks, own


# --- 3. metrics ------------------------------------------------------------------------------------------
def ranking(anomalous: np.ndarray, normal: np.ndarray) -> dict[str, float | None]:
    """AUROC, F1-max and AP from counts [n] per distinct score, highest first; None where one kind is missing.
    The numbers of scikit-learn's roc_auc_score, precision_recall_curve and average_precision_score."""
    hits, false = anomalous.cumsum(dtype=float), normal.cumsum(dtype=float)
    if not len(hits) or hits[-1] == 0 or false[-1] == 0:
        return dict(auroc=None, f1_max=None, ap=None)
    # numpy, not torch: the order of its sums does not depend on the number of threads
    auroc = (normal * (hits - anomalous / 2)).sum() / (hits[-1] * false[-1])
    f1_max, ap = (
        (2 * hits / (hits + false + hits[-1])).max(),
        (anomalous * hits / (hits + false)).sum() / hits[-1],
    )
    # A sum of parts may exceed the whole by a rounding.
    return {name: min(1.0, float(x)) for name, x in dict(auroc=auroc, f1_max=f1_max, ap=ap).items()}


def image_metrics(labels: Sequence[int], scores: Sequence[float]) -> dict[str, float | None]:
    """labels [n], 1 anomalous or 0 normal, and scores [n] -> auroc, f1_max and ap in [0, 1], exact; None
    where there is one kind only. Raises ValueError for other labels or lengths, or scores not finite."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    if labels.ndim != 1 or labels.shape != scores.shape or not np.isin(labels, (0, 1)).all():
        got = f"{list(labels.shape)} and {list(scores.shape)}, labels {np.unique(labels)[:9].tolist()}"
        raise ValueError(f"labels and scores must be [n], each label 0 or 1; got {got}")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    values, place = np.unique(-scores, return_inverse=True)
    return ranking(*(np.bincount(place[labels == kind], minlength=len(values)) for kind in (1, 0)))


def region_weights(masks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, H, W] -> for each true pixel, in order, int64 round(2^44 / area of its 8-connected region);
    and the number of regions. What is labelled are runs of pixels in a row: hundreds, not 268,000 pixels."""
    row = masks.shape[2] + 1
    pixels = F.pad(masks, (0, 1, 0, 1)).flatten()  # a false column and row keep runs and images apart
    first = (pixels & ~pixels.roll(1)).nonzero()[:, 0]
    last = (pixels & ~pixels.roll(-1)).nonzero()[:, 0]
    # A run touches those of the next row that end not before and start not after its ends, moved out by one.
    begin = torch.searchsorted(last, first + row - 1)
    count = torch.searchsorted(first, last + row + 1, right=True) - begin
    run = torch.arange(len(first), device=masks.device)
    upper = run.repeat_interleave(count)
    skipped = (count.cumsum(0) - count)[upper]
    lower = begin[upper] + torch.arange(len(upper), device=masks.device) - skipped
    region, before = run, None
    while before is None or not torch.equal(region, before):
        before, least = region, torch.minimum(region[upper], region[lower])
        for end in (upper, lower):  # each link pulls the roots of both its ends down to the lesser
            region = region.scatter_reduce(0, before[end], least, "amin")
        region = region[region]
    length = last - first + 1
    area = torch.zeros_like(run).scatter_add_(0, region, length)[region]
    weight = (2.0**44 / area.double()).round().long()
    return weight.repeat_interleave(length), (region == run).sum()


class PixelHistogram:
    """Every pixel metric in one pass and constant memory: counts per bin of the map value, of normal pixels,
    of anomalous ones, and of these again, each weighted by 1 / area of its region. Histograms add up across
    images, processes and machines, in any order, to the same digits.

    low, high: the range of the values, [-2L, 2L] for VisualAD. Pixels of one bin count as tied: metrics are
    exact for values rounded to the middles of the bins, and within 1e-4 on raw maps as long as their standard
    deviation is at least 2,500 bin widths. device: cpu or cuda. Raises ValueError for an empty range.
    """

    def __init__(self, low: float, high: float, bins: int = 2**20, device: str | torch.device = "cpu"):
        if not (math.isfinite(low) and math.isfinite(high) and low < high and bins >= 1):
            raise ValueError(f"wanted finite low < high and at least one bin, got {low}, {high}, {bins}")
        self.low, self.high, self.bins = float(low), float(high), int(bins)
        # Rows: normal pixels, anomalous ones, weights of these.
        self.counts = torch.zeros(3, self.bins, dtype=torch.int64, device=device)
        self.regions = torch.zeros((), dtype=torch.int64, device=device)
        self.extremes = torch.full((2,), -math.inf, dtype=torch.float64, device=device)  # -min, max

    def update(self, maps: Tensor | np.ndarray, masks: Tensor | np.ndarray) -> None:
        """maps: float [B, H, W] in [low, high]. masks: the same shape, bool, or 0 and 1: anomalous pixels.
        Tensors or arrays. Raises ValueError for anything else, also for a value outside the range."""
        maps, masks = torch.as_tensor(maps), torch.as_tensor(masks)
        if maps.shape != masks.shape or maps.ndim != 3 or not maps.is_floating_point():
            got = f"{maps.dtype} {list(maps.shape)} and {list(masks.shape)}"
            raise ValueError(f"maps must be float [B, H, W], masks of the same shape; got {got}")
        maps, masks = maps.detach().to(self.counts.device), masks.to(self.counts.device)
        if masks.dtype != torch.bool:
            if not ((masks == 0) | (masks == 1)).all():
                raise ValueError("masks must be bool, or 0 and 1")
            masks = masks.bool()
        if not maps.numel():
            return
        low, high = maps.aminmax()
        if not (self.low <= low and high <= self.high):  # also where one is not a number
            raise ValueError(f"map values must lie in [{self.low}, {self.high}], got {low:g} to {high:g}")
        step = 1 if maps.is_cpu else len(maps)  # a map at a time stays in the processor's cache
        for values, mask in zip(maps.split(step), masks.split(step), strict=True):
            place = (values.double() - self.low).mul_(self.bins / (self.high - self.low)).long()
            place.clamp_(max=self.bins - 1)
            both = (place + self.bins * mask).flatten()  # self.counts[0] or, where the mask is true, [1]
            self.counts.view(-1).scatter_add_(0, both, both.new_ones(1).expand(len(both)))
            weights, regions = region_weights(mask)
            self.counts[2].scatter_add_(0, place[mask], weights)
            self.regions += regions
        self.extremes = torch.maximum(self.extremes, torch.stack([-low, high]).double())

    def merge(self, other: PixelHistogram) -> None:
        """Adds what another histogram of the same bins has seen. Raises ValueError for other bins."""
        if (self.low, self.high, self.bins) != (other.low, other.high, other.bins):
            ours, theirs = ((h.low, h.high, h.bins) for h in (self, other))
            raise ValueError(f"histograms of other bins do not add up: {ours} and {theirs}")
        self.counts += other.counts.to(self.counts.device)
        self.regions += other.regions.to(self.counts.device)
        self.extremes = torch.maximum(self.extremes, other.extremes.to(self.counts.device))

    def state(self) -> dict[str, Any]:
        """What `from_state` rebuilds it from, as small as its used bins."""
        used = self.counts.any(dim=0).nonzero()[:, 0]
        fields = dict(low=self.low, high=self.high, bins=self.bins, used=used, counts=self.counts[:, used])
        return fields | dict(regions=self.regions.clone(), extremes=self.extremes.clone())

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: str | torch.device = "cpu") -> PixelHistogram:
        self = cls(state["low"], state["high"], state["bins"], device)
        self.counts[:, state["used"].to(device)] = state["counts"].to(device)
        self.regions, self.extremes = (state[x].clone().to(device) for x in ("regions", "extremes"))
        return self

    def metrics(self, pro: str = "exact") -> dict[str, float | None]:
        """auroc, f1_max, ap and aupro in [0, 1]; None where only one kind of pixel was seen.

        pro: "exact" is the mean overlap of regions, integrated over the false positive rate of all normal
        pixels up to 0.3; "published" the variant of this family of papers, 200 thresholds between the least
        and the largest value and the rate min-max renormalised: for comparison with their tables only.
        """
        if pro not in ("exact", "published"):
            raise ValueError(f"pro must be 'exact' or 'published', got {pro!r}")
        counts = self.counts.cpu().numpy()
        used = counts[:2].any(axis=0).nonzero()[0][::-1]  # bins, the highest first
        normal, anomalous, weights = counts[:, used]
        found: dict[str, float | None] = {**ranking(anomalous, normal), "aupro": None}
        if found["auroc"] is None:
            return found
        rate, overlap = (np.append(0, x.cumsum(dtype=float)) / x.sum(dtype=float) for x in (normal, weights))
        if pro == "exact":
            width, rise = np.diff(rate), np.diff(overlap)
            inside = np.clip(0.3 - rate[:-1], 0, width)  # the bin that crosses 0.3 counts in part
            part = np.divide(inside, width, out=np.zeros_like(width), where=width > 0)
            area = (inside * (overlap[:-1] + rise * part / 2)).sum() / 0.3
        else:
            low, high = (self.extremes.cpu().numpy() * (-1, 1)).tolist()
            limits = low + np.arange(200) * ((high - low) / 200)
            limits = (limits - self.low) * (self.bins / (self.high - self.low)) - 0.5  # 0: first bin's middle
            above = len(used) - np.searchsorted(used[::-1], limits, side="right")
            above[0] = len(used) - 1  # what exceeds the minimum: all bins but the last
            above = above[rate[above] < 0.3]
            rate, overlap = rate[above], overlap[above]
            if len(rate) < 2 or rate[0] == rate[-1]:
                return found
            area = (-np.diff(rate) * (overlap[1:] + overlap[:-1]) / 2).sum() / (rate[0] - rate[-1])
        return {**found, "aupro": min(1.0, float(area))}


# --- 4. one pass over the images -------------------------------------------------------------------------
METRICS = tuple("image_auroc image_f1_max image_ap pixel_auroc pixel_f1_max pixel_ap pixel_aupro".split())


def ranks() -> tuple[int, int]:
    """This process's rank and the number of all, (0, 1) where torchrun started none."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any]:
    """The value of every rank, in order; of this process alone where there is one."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class Told(RuntimeError):
    """Another rank failed, and reports why."""


def together(work: Callable[[], Any]) -> list[Any]:
    """What work() gives on each rank. If it fails on one, that rank raises its error, the others Told."""
    try:
        value, failure = work(), None
    except Exception as error:
        value, failure = None, error
    told = gather((value, failure is not None))
    if failure:
        try:
            raise failure
        finally:
            failure = None  # or the traceback, which holds this frame, would keep the loader's workers alive
    if any(failed for _, failed in told):
        raise Told
    return [value for value, _ in told]


def collect(histogram: PixelHistogram) -> PixelHistogram:
    """The histograms of all ranks, added up on rank 0; an empty one on the others."""
    if dist.is_initialized():
        dist.reduce(histogram.counts, 0)
        dist.reduce(histogram.regions, 0)
        dist.reduce(histogram.extremes, 0, dist.ReduceOp.MAX)
        if dist.get_rank():
            return PixelHistogram(histogram.low, histogram.high, histogram.bins, histogram.counts.device)
    return histogram


def load_state(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The interrupted run in a state file, or `fresh` if there is none. Raises ValueError for another key."""
    if not path.is_file():
        return fresh
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        old, new = run["key"], fresh["key"]
    except Exception as error:
        cause = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"cannot read {path} as the state of a run ({cause}): begin without --resume"
        ) from error
    if differ := [name for name in {**old, **new} if old.get(name) != new.get(name)]:
        told = ", ".join(f"{name} {old.get(name)!r}, now {new.get(name)!r}" for name in differ)
        raise ValueError(f"{path} belongs to another run: {told}; the same flags, or remove it to begin anew")
    return run


def deaf(_worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # these reach workers too; it is the program that ends
        signal.signal(number, signal.SIG_IGN)


def evaluate(
    model: VisualAD, records: Sequence[Record], *, size: int | Sequence[int] | None = None,
    sigma: float | None = None, batch_size: int = 8, workers: int = 0, native: bool = False,
    pro: str = "exact", bins: int = 2**20,
    each: Callable[[Record, Tensor, Tensor, Tensor | None], None] | None = None,
    state: Path | None = None, key: Mapping[str, Any] | None = None, resume: bool = False,
) -> dict[str, Any] | None:  # fmt: skip
    """Scores records -> {"classes": {class: {metric: value or None}}, "mean": {metric: value or None},
    "scores": [one a record]}; under torchrun on rank 0, None on the others.

    size, sigma: as for `VisualAD.predict`. workers: processes that decode. native: compare pixels at each
    image's own size. pro, bins: of `PixelHistogram`. each: called with record, image [3, H, W] at the input
    size, map [H, W], and mask [H, W] or None. state: where the run is kept as it goes, and whence `resume`
    takes it up if it is there. Raises ValueError as `infer` does and for a state with another key; Told.
    """
    size, device = model.input_size(size), model.tokens.device
    rank, world = ranks()
    members: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        members[record.cls].append(i)
    batches, spans = [], {}  # a batch has one class, so that each can be closed and its histogram dropped
    for cls, indices in members.items():
        begin = len(batches)
        batches += [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        spans[cls] = begin, len(batches)
    run: dict[str, Any] = dict(key=dict(key or {}), done=0, scores=[None] * len(records), classes={}, open={})
    run = together(lambda: load_state(state, run) if resume and state and rank == 0 else run)[0]
    done, scores, classes = run["done"], run["scores"], run["classes"]
    reach, place = 2.0 * len(model.layers), "cpu" if device.type == "mps" else device  # mps has no fp64
    histograms = defaultdict(lambda: PixelHistogram(-reach, reach, bins, place))
    if rank == 0:
        histograms |= {cls: PixelHistogram.from_state(part, place) for cls, part in run["open"].items()}

    def score(index: tuple, images: Tensor, masks: tuple, own: tuple) -> list[tuple[int, float]]:
        lone = len(images) == 1 and device.type == "cpu"  # its last digits would depend on the threads
        inputs = images.expand(2, -1, -1, -1) if lone else images.to(device, non_blocking=True)
        maps, found = (x[: len(index)] for x in model.infer(inputs, sigma))
        if not found.isfinite().all():
            raise ValueError("scores are not finite: damaged weights, or a dtype too narrow for them")
        parts = [maps]
        if native:
            parts = [upsample(m[None, None], to)[0] for m, to in zip(maps, own, strict=True)]
        if masks[0] is not None:
            truths = [mask[None] for mask in masks] if native else [torch.stack(masks)]
            for part, truth in zip(parts, truths, strict=True):
                histograms[records[index[0]].cls].update(part, truth)
        if each:
            heats = [heat.cpu() for part in parts for heat in part]
            for i, image, heat, mask in zip(index, images, heats, masks, strict=True):
                each(records[i], image, heat, mask)
        return list(zip(index, found.tolist(), strict=True))

    mine = batches[done + rank :: world]
    options = dict(num_workers=min(workers, len(mine)), pin_memory=device.type == "cuda", collate_fn=collate)
    options |= dict(worker_init_fn=deaf)
    loader = iter(DataLoader(Samples(records, size, native), batch_sampler=mine, **options))
    passed = sum(map(len, batches[:done]))
    bar = tqdm(total=len(records), initial=passed, unit=" images", disable=rank > 0 or None)
    if passed and rank == 0:
        tqdm.write(f"{state}: {passed} of {len(records)} images are done")
    saved, cost = time.monotonic(), 0.01

    def work() -> tuple[list[tuple[int, float]], bool]:
        news = score(*next(loader)) if done + rank < len(batches) else []
        return news, state is not None and time.monotonic() - saved > 20 * cost  # a twentieth of the time

    while done < len(batches):
        told = together(work)
        due = told[0][1]  # rank 0 decides for all
        before, done = done, min(done + world, len(batches))
        for i, value in (pair for pairs, _ in told for pair in pairs):
            scores[i] = value
            bar.update()
        for cls, (begin, end) in spans.items():
            if begin < done and before < end and (due or end <= done):
                own, known = members[cls], records[members[cls][0]].known
                if known:
                    histograms[cls] = collect(histograms[cls])
                if end <= done:
                    pixels = histograms.pop(cls).metrics(pro) if known else {}
                    labels, values = [records[i].label for i in own], [scores[i] for i in own]
                    images = {} if rank or None in labels else image_metrics(labels, values)
                    classes[cls] = dict.fromkeys(METRICS) | {f"image_{name}": x for name, x in images.items()}
                    classes[cls] |= {f"pixel_{name}": x for name, x in pixels.items()}
        if due and rank == 0:
            begun, buffer = time.monotonic(), io.BytesIO()
            parts = {cls: histogram.state() for cls, histogram in histograms.items()}
            torch.save(dict(key=run["key"], done=done, scores=scores, classes=classes, open=parts), buffer)
            write_atomic(state, buffer.getvalue())
            saved = time.monotonic()
            cost = saved - begun
    bar.close()
    if rank:
        return None
    have = {name: [row[name] for row in classes.values() if row[name] is not None] for name in METRICS}
    mean = {name: sum(values) / len(values) if values else None for name, values in have.items()}
    return dict(classes=classes, mean=mean, scores=scores)


# --- 5. command line -------------------------------------------------------------------------------------
def table(result: Mapping[str, Any], counts: Mapping[str, int], pro: str) -> str:
    """In percent; "-" where a class cannot have the number."""
    head = ["class", "images", "AUROC", "F1-max", "AP", "AUROC", "F1-max", "AP", "AUPRO"]
    head[-1] = "PRO*" if pro == "published" else head[-1]
    rows = [["", "", "image", "", "", "pixel", "", "", ""], head]
    total = ("mean", sum(counts.values()), result["mean"])
    for name, count, row in [*((cls, counts[cls], row) for cls, row in result["classes"].items()), total]:
        cells = ["-" if row[metric] is None else f"{100 * row[metric]:.1f}" for metric in METRICS]
        rows.append([name, str(count), *cells])
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:{width}}" + "".join(f"{cell:>8}" for cell in row[1:]).rstrip() for row in rows]
    return "\n".join(lines + ["* the published variant, not comparable with AUPRO"] * (pro == "published"))


def name_of(path: Path, root: Path) -> str:
    """An image's path from the dataset's root; its whole path if it lies elsewhere."""
    path, root = (Path(os.path.normpath(p.absolute())) for p in (path, root))
    return (path.relative_to(root) if root in path.parents else path).as_posix()


def inside(name: str) -> str:
    """That name as a path that stays below a folder, also one that began with / or a drive."""
    return re.sub("^([A-Za-z]):(?=/)", r"\1", name).lstrip("/")


def strip(image: Tensor, heat: Tensor, mask: Tensor | None, high: float) -> bytes:
    """A PNG of image, mask (grey where unknown) and heatmap, side by side."""
    from PIL import Image

    h, w = heat.shape
    truth = Image.new("L", (w, h), 128) if mask is None else Image.fromarray(mask.byte().mul(255).numpy())
    whole = Image.new("RGB", (3 * w + 16, h), "white")
    for i, panel in enumerate([overlay(image, 0 * heat, high=high), truth, overlay(image, heat, high=high)]):
        whole.paste(panel, (i * (w + 8), 0))
    return heatmap_png(whole)


PAGE = """<!doctype html><meta charset="utf-8"><meta name="generator" content="visualad">
<title>{title}</title>
<style>body {{ font: 15px sans-serif; margin: 2em }} img {{ max-width: 100%; height: auto }}</style>
<h1>{title}</h1><pre>{text}</pre>
<p>Image, mask (grey: unknown), heatmap: plain at 0, yellow, full red at {high:g}, the same scale for all;
the highest score of each class first.</p>
{figures}
"""


def page(title: str, text: str, rows: Sequence[Mapping[str, Any]], high: float) -> str:
    """index.html, to lie among the strips."""
    figures = []
    rows = sorted(rows, key=lambda row: (row["class"], -row["score"]))
    for cls, group in groupby(rows, itemgetter("class")):
        figures.append(f"<h2>{html.escape(cls)}</h2>")
        for row in group:
            about = f"score {row['score']:.4f}, label {row['label']}: {html.escape(row['path'])}"
            source = quote(os.fsencode(f"{inside(row['path'])}.png"))
            figures.append(
                f'<figure><img loading="lazy" src="{source}"><figcaption>{about}</figcaption></figure>'
            )
    title, text = html.escape(title), html.escape(text)
    return PAGE.format(title=title, text=text, high=high, figures="\n".join(figures))


def select(records: Sequence[Record], classes: str | None, limit: int | None) -> list[Record]:
    """Some classes, and N images of each, evenly spread over its sorted list; few may miss a kind."""
    names = {record.cls for record in records}
    split = {name.strip() for name in (classes or "").split(",")}
    chosen = names if classes is None else {classes} & names or split
    if unknown := chosen - names:
        raise ValueError(f"no class {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1, got {limit}")
    kept = []
    for cls in sorted(chosen):
        rows = [record for record in records if record.cls == cls]
        n = min(limit or len(rows), len(rows))
        kept += [rows[(2 * i + 1) * len(rows) // (2 * n)] for i in range(n)]
    return kept


def checked(
    records: Sequence[Record], faults: Sequence[Fault], skip: bool
) -> tuple[list[Record], list[Fault]]:
    """The records with their labels, every file read once, the ranks sharing the work; and all faults. Raises
    one ValueError that names them; with `skip`, leaves their records out instead."""
    rank, world = ranks()
    mine, hide = records[rank::world], rank > 0 or None
    bar = tqdm(ahead(examine, mine, 64), "checking", len(mine), leave=False, disable=hide)
    shares = together(lambda: list(bar))
    examined = [shares[i % world][i // world] for i in range(len(records))]
    known = {fault.path for fault in faults}
    more = [Fault(r.path, r.cls, what) for r, what in examined if what and r.path not in known]
    faults = [*faults, *more]
    if faults and not skip:
        if rank:
            raise Told
        named = "".join(f"\n  {fault.what}" for fault in faults)
        raise ValueError(f"{len(faults)} files cannot be used (--skip-bad goes on without them):{named}")
    bad = {fault.path for fault in faults}
    return [record for record, _ in examined if record.path not in bad], faults


def data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is read; `load_data` reads them."""
    add, cores = parser.add_argument, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--data", type=nonempty, required=True, metavar="ROOT", help="a dataset in a layout that is known")
    add("--dataset", default="auto", choices=("auto", *DATASETS), help="the layout (auto: by what is there)")
    add("--split", default="test", choices=("test", "train"), help="(%(default)s)")
    add("--classes", metavar="A,B", help="only these")
    add("--limit", type=int, metavar="N", help="only N images of each class, evenly spread")
    add("--skip-bad", action="store_true", help="go on without missing, unreadable or mismatched files")
    add("--workers", type=int, default=min(8, max(1, cores)), metavar="N", help="that decode (%(default)s)")


def load_data(args: argparse.Namespace) -> tuple[Layout, list[Record], list[Fault]]:
    """The chosen records with their labels, every file read once; what was left out. Says what it found."""
    if args.workers < 0:
        raise ValueError(f"--workers must be at least 0, got {args.workers}")
    layout, everything, faults = read_dataset(args.data, args.dataset, args.split)
    layout = layout if args.dataset == "auto" else layout._replace(names=(args.dataset,))
    records = select(everything, args.classes, args.limit)
    left, classes = {r.path for r in everything} - {r.path for r in records}, {r.cls for r in records}
    asked = classes if args.classes else {fault.cls for fault in faults}  # also one without any image
    faults = [fault for fault in faults if fault.path not in left and fault.cls in asked]
    records, faults = checked(records, faults, args.skip_bad)
    if not records:
        raise ValueError("no image is left")
    labels, kinds = [r.label for r in records], {"normal": 0, "anomalous": 1, "unlabelled": None}
    told = ", ".join(f"{labels.count(label)} {kind}" for kind, label in kinds.items() if label in labels)
    if ranks()[0] == 0:
        print(
            f"{args.data}: layout {layout.names[0]}, {layout.about.replace('{split}', args.split)}",
            flush=True,
        )
        print(
            f"{len(classes)} classes, {len(records)} images: {told}; {len(faults)} files left out", flush=True
        )
        for fault in faults:
            print(f"  left out: {fault.what}", flush=True)
    return layout, records, faults


def check_outside(data: Path, folder: Path) -> None:
    if real(data) in (real(folder), *real(folder).parents):
        raise ValueError(f"{folder} lies in the dataset and would become part of it: choose another folder")


def is_map(path: Path) -> bool:
    """Whether a file is what --save-maps writes, as far as its head tells."""
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError):
        return False
    return array.dtype == np.float32 and array.ndim == 2


def check_replaced(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises ValueError where --heatmaps or --save-maps would replace what no earlier run wrote."""
    if args.heatmaps:
        check_heatmaps(args.heatmaps / f"{name}.png" for name in names)
        index, begins = args.heatmaps / "index.html", PAGE.partition("{")[0].encode()
        if os.path.lexists(index) and not (index.is_file() and index.read_bytes().startswith(begins)):
            raise ValueError(f"{index} is there and is of no earlier run: choose another folder")
    for path in (args.save_maps / f"{name}.npy" for name in names) if args.save_maps else ():
        if os.path.lexists(path) and (path.is_symlink() or not is_map(path)):
            raise ValueError(f"{path} is there and is no map of an earlier run: choose another folder")


def fingerprint(model: VisualAD) -> str:
    """sha256 of all weights."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of(records: Sequence[Record]) -> str:
    """sha256 of which images there are and what is known of them."""
    return hashlib.sha256(repr([tuple(map(str, record)) for record in records]).encode()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for an error; 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    data_flags(parser)
    model_flags(parser)
    add("--native", action="store_true", help="compare pixels at each image's own size, not the network's")
    pro = "exact: mean overlap of regions up to a false positive rate of 0.3; published: the variant of this "
    pro += "family of papers, 200 thresholds, rate renormalised. They differ: 0.765 and 0.770 on one set"
    add("--pro", default="exact", choices=("exact", "published"), help=pro)
    add("--json", type=nonempty, metavar="FILE", help="write settings, metrics and every image's score here")
    add("--save-maps", type=nonempty, metavar="FOLDER", help="write each map as float32 .npy")
    add("--heatmaps", type=nonempty, metavar="FOLDER", help="write image, mask, heatmap of each; index.html")
    add("--state", type=nonempty, metavar="FILE", help="what --resume needs; default: --json's name + .state")
    add("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    return guarded("evaluate", run, parser.parse_args(arguments))


def guarded(name: str, program: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a program with the ranks that torchrun started, if it did, and its errors as one line each."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that it cannot write stops nothing
    try:
        if args.device.startswith("cuda"):
            if not torch.cuda.is_available():
                raise ValueError(f"no CUDA device is available for --device {args.device}")
            args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if args.device == "cuda" else args.device
            torch.cuda.set_device(args.device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
        return program(args)
    except Told:
        return 2
    except (ValueError, OSError, RuntimeError) as error:
        what = str(error).strip()
        what = what.splitlines()[-1] if what.startswith("Caught ") else what  # in a worker, with a traceback
        print(f"{name}: error: {what}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(args: argparse.Namespace) -> int:
    state = args.state or (args.json and args.json.with_name(f"{args.json.name}.state"))
    if args.resume and not state:
        raise ValueError("--resume needs --json or --state")
    for folder in filter(None, (args.save_maps, args.heatmaps)):
        check_outside(args.data, folder)
        folder.mkdir(parents=True, exist_ok=True)
    if args.json and real(args.json) == real(state):
        raise ValueError(f"--json and --state must be two files, got {state}")
    for path in filter(None, (args.json, state)):  # now, not after an hour
        check_report(path, args, [args.data / row.index for row in LAYOUTS if row.index])
    if state and state.exists() and not args.resume:
        raise ValueError(f"{state} keeps an interrupted run: go on with --resume, or remove it to begin anew")

    model, size = load_model(args)
    layout, records, faults = load_data(args)
    names = {record.path: name_of(record.path, args.data) for record in records}
    labels, counts = [record.label for record in records], Counter(record.cls for record in records)
    check_replaced(args, [inside(name) for name in names.values()])

    reach, high = 2.0 * len(model.layers), model.display_high or len(model.layers)
    histogram = PixelHistogram(-reach, reach)
    chosen = "split classes limit skip_bad sigma batch_size dtype final_norm native pro".split()
    settings = dict(dataset=layout.names[0], size=list(size), device=model.tokens.device.type)
    settings |= {name: getattr(args, name) for name in chosen} | dict(weights_sha256=fingerprint(model))
    settings |= dict(backbone_weights=args.backbone_weights and str(args.backbone_weights))
    settings |= dict(map_range=[-reach, reach], bins=histogram.bins, bin_width=2 * reach / histogram.bins)
    versions = dict(python=platform.python_version(), torch=str(torch.__version__))
    versions |= {name: version(name) for name in ("numpy", "pillow")}
    report = dict(model=args.model, data=str(args.data), settings=settings, versions=versions)
    key = dict(model=args.model, data=str(args.data), **settings, **versions)
    key |= {name: str(getattr(args, name)) for name in ("save_maps", "heatmaps")}
    key |= dict(images=digest_of(records))

    def keep(record: Record, image: Tensor, heat: Tensor, mask: Tensor | None) -> None:
        name = inside(names[record.path])
        if args.save_maps:
            array = io.BytesIO()
            np.save(array, heat.numpy())
            write_atomic(args.save_maps / f"{name}.npy", array.getvalue())
        if args.heatmaps:
            image = to_tensor(record.path) if args.native else image
            write_atomic(args.heatmaps / f"{name}.png", strip(image, heat, mask, high))

    try:
        result = evaluate(
            model, records, size=size, sigma=args.sigma, batch_size=args.batch_size, workers=args.workers,
            native=args.native, pro=args.pro, each=keep if args.save_maps or args.heatmaps else None,
            state=state, key=key, resume=args.resume,
        )  # fmt: skip
    except KeyboardInterrupt:
        saved = state and state.is_file()
        hint = f"the same command with --resume goes on from {state}" if saved else "nothing was saved"
        print(f"evaluate: interrupted; {hint}", file=sys.stderr)
        return 130
    if result is None:
        return 0
    scored = zip(records, result["scores"], strict=True)
    rows = [
        {"path": names[r.path], "class": r.cls, "kind": r.kind, "label": r.label, "score": score}
        for r, score in scored
    ]
    rows.sort(key=itemgetter("path"))
    text = table(result, counts, args.pro)
    if args.json:
        report |= dict(left_out=[fault.what for fault in faults])
        report |= dict(classes=result["classes"], mean=result["mean"], records=rows)
        write_atomic(args.json, json.dumps(report, indent=2, allow_nan=False).encode() + b"\n")
    if args.heatmaps:
        index = page(f"{args.model} on {args.data}", text, rows, high)
        write_atomic(args.heatmaps / "index.html", index.encode(errors="backslashreplace"))
    for row in rows if set(labels) == {None} else ():
        print(f"{row['score']:8.4f}  {row['path']}")
    print(text)
    for path in filter(None, (args.json, args.heatmaps and args.heatmaps / "index.html", args.save_maps)):
        print(f"written: {path}")
    if state:
        state.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
