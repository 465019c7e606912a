"""Scores a dataset as it lies on disk: image and pixel AUROC, F1-max and AP, and AUPRO.

   python evaluate.py --data ROOT --model tiny --json result.json
   torchrun --nproc-per-node=8 evaluate.py --data ROOT --model tiny      # the same numbers, sooner

1 datasets   2 images and masks   3 metrics   4 one pass over the images   5 command line
"""

import argparse
import csv
import html
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm  # comes with huggingface_hub

import visualad
from visualad import IMAGE_SUFFIXES, VisualAD, ahead, overlay, resize, to_tensor, upsample, write_atomic


# --- 1. datasets -----------------------------------------------------------------------------------------
class Record(NamedTuple):
    """One image of a dataset."""

    path: Path
    cls: str
    label: int | None  # 1 anomalous, 0 normal; None: unknown, or told by the mask once that is read
    masks: tuple[Path, ...] = ()  # united; a normal image needs none
    masked: bool = False  # the class has masks, so that every pixel's truth is known


def below(root: Path, patterns: str) -> list[Path]:
    """What patterns of `glob`, with | between them, find in any case, sorted, but hidden files."""
    either = re.sub("[a-z]", lambda x: f"[{x[0]}{x[0].upper()}]", patterns)
    found = {path for pattern in either.split("|") for path in root.glob(pattern)}
    return sorted(path for path in found if "/." not in f"/{path.relative_to(root).as_posix()}")


def paired(tops: list[Path], label: int | None | Callable, images: str, masks: str) -> Iterator[Record]:
    """A mask has its image's stem, maybe with _mask, _label or _GT; LOCO's lie in a folder of that name."""
    for top in tops:
        truth = [x for x in below(top, masks) if x.suffix.lower() in IMAGE_SUFFIXES]
        found = [x for x in sorted({*below(top, images)} - {*truth}) if x.suffix.lower() in IMAGE_SUFFIXES]
        own: dict[str, list[Path]] = {path.stem: [] for path in found}
        if truth and label != 0 and len(own) < len(found):
            raise ValueError(f"images share a stem below {top}, so that masks cannot be told apart")
        many = any(mask.parent.name in own and "ground_truth" not in mask.parents[1].name for mask in truth)
        for mask in truth:
            stem = re.sub("_(mask|label|gt)$", "", mask.stem, flags=re.IGNORECASE)
            own.setdefault(mask.parent.name if many else stem, []).append(mask)
        lost = [(Path(f"the image of {own[x][0]}"), x) for x in own.keys() - {path.stem for path in found}]
        for path, stem in [*((path, path.stem) for path in found), *lost]:
            told = label(own[stem]) if callable(label) else label
            yield Record(path, top.name, told, tuple(own[stem]), bool(truth))


def listed(root: Path) -> Iterator[Record]:
    """meta.json, in which a mask that is "" or a folder is none, or VisA's split_csv/1cls.csv."""
    if (root / "meta.json").is_file():
        test = json.loads((root / "meta.json").read_text(encoding="utf-8-sig"))["test"]
        rows = [(x["img_path"], cls, x["anomaly"], x["mask_path"]) for cls in test for x in test[cls]]
    else:
        lines = (root / "split_csv/1cls.csv").read_text(encoding="utf-8-sig").splitlines()
        test = [row for row in csv.DictReader(lines) if row["split"] == "test"]
        rows = [(x["image"], x["object"], x["label"] != "normal", x["mask"]) for x in test]
    masked = {cls for _, cls, label, mask in rows if label and not (root / mask).is_dir()}
    for path, cls, label, mask in rows:
        masks = (root / mask,) if label and not (root / mask).is_dir() else ()
        yield Record(root / path, cls, [0, 1].index(label), masks, cls in masked)


def by_kind(root: Path) -> Iterator[Record]:
    """[CLASS/]test/KIND/*, masks ground_truth/KIND/* or test/KIND/label/*; [brain_tumor_dataset/]KIND/*."""
    kinds = below(root, "test/*|*/test/*") or below(root, "brain_tumor_dataset/*") or below(root, "*")
    for kind in [kind for kind in kinds if kind.name.lower() != "ground_truth"]:
        top = kind.parents[1] if kind.parent.name.lower() == "test" else root
        label, masked = int(kind.name.lower() not in NORMAL), bool(below(top, "ground_truth|test/*/label"))
        place, name = escape(kind.relative_to(top).as_posix()), escape(kind.name)
        for record in paired([top], label, f"{place}/**/*", f"ground_truth/{name}/**/*|{place}/label/*"):
            yield record._replace(masks=record.masks if label else (), masked=masked)


NORMAL = "good", "ok", "normal", "no"
CVC = "images/**/*|original/**/*|png/original/**/*", "masks/**/*|ground truth/**/*|png/ground truth/**/*"
LAYOUTS = (  # names for --dataset, what is there, reader; "auto" takes the first that fits
    ("meta.json", "meta.json", listed),
    ("visa", "split_csv/1cls.csv", listed),
    ("oct17 brain_ad his", "test/ungood", by_kind),
    ("mvtec mpdd dtd-synthetic", "test/good|*/test/good", by_kind),
    ("btad", "test/ok|*/test/ok", by_kind),
    ("dagm", "class*/test", lambda root: paired(below(root, "class*"), len, "test/*", "test/label/*")),
    ("ksdd2", "test/*_gt.*", lambda root: paired([root], None, "test/*", "test/*_gt.*")),
    ("cvc-clinicdb endo kvasir", CVC[1], lambda root: paired([root], 1, *CVC)),
    ("brainmri", "yes|brain_tumor_dataset/yes", by_kind),
    ("folders", "good|ok|normal|no", by_kind),
    ("images", "*.*", lambda root: paired([] if below(root, "*/*") else [root], None, "*", "-")),
)
DATASETS = {name: (sign, reader) for names, sign, reader in LAYOUTS for name in names.split()}


def read_dataset(root: str | os.PathLike, dataset: str = "auto") -> tuple[str, list[Record]]:
    """The layout's name, and the test images sorted by class and path. dataset: a name in DATASETS or "auto".
    Raises ValueError where none fits, or where files are missing or do not pair up, and names them."""
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder")
    signs = {name: sign for name, (sign, _) in DATASETS.items() if dataset in ("auto", name)}
    name = next((name for name in signs if below(root, signs[name])), "")
    try:
        records = sorted(DATASETS[name][1](root), key=lambda x: (x.cls, x.path)) if name else []
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{root} does not list its images as {name} should: {error!r}") from error
    faults = [f"{path} is missing" for x in records for path in (x.path, *x.masks) if not path.is_file()]
    faults += [f"{x.path} has no mask" for x in records if x.masked and x.label != 0 and not x.masks]
    if not records:
        raise ValueError(f"no test images in {root}; looked for {', '.join(dict.fromkeys(signs.values()))}")
    if faults:
        raise ValueError("\n  ".join([f"{len(faults)} files are missing or do not pair up:", *faults[:9]]))
    return name, records


# --- 2. images and masks ---------------------------------------------------------------------------------
def read(record: Record) -> tuple[Tensor, Tensor | None]:
    """Image [3, H, W] as `to_tensor` gives it; mask bool [H, W], None where pixels are unknown. Raises
    ValueError for what is no image and for a mask of another size, FileNotFoundError."""
    image = to_tensor(record.path)
    mask = torch.zeros(image.shape[1:], dtype=torch.bool, device="cpu")
    for path in record.masks:
        values = to_tensor(path).amax(dim=0)  # of colours one is enough
        if values.shape != mask.shape:
            raise ValueError(f"{path} has {[*values.shape]} pixels, its image {[*mask.shape]}")
        mask |= values > (127 if path.read_bytes()[:2] == b"\xff\xd8" else 0)  # a JPEG's zeros are not exact
    return image, mask if record.masked else None


def shrink(mask: Tensor, size: Sequence[int]) -> Tensor:
    """bool [H, W] -> bool at `size`, as the published protocol has it: bilinear, antialiased, >= a half."""
    share = F.interpolate(mask[None, None].float(), tuple(size), mode="bilinear", antialias=True)[0, 0]
    return share > 0.5 - 1e-6  # Pillow rounds 127.5 of 255 up; sums of floats come out a little under a half


# --- 3. metrics ------------------------------------------------------------------------------------------
def ranking(anomalous: np.ndarray, normal: np.ndarray) -> dict[str, float | None]:
    """AUROC, F1-max and AP, as of scikit-learn, from counts [n] per distinct score, the highest first; None
    where one kind is missing. A sum of parts may exceed the whole by a rounding: hence `min`."""
    hits, false = anomalous.cumsum(dtype=float), normal.cumsum(dtype=float)
    if not len(hits) or hits[-1] == 0 or false[-1] == 0:
        return dict(auroc=None, f1_max=None, ap=None)
    auroc = (normal * (hits - anomalous / 2)).sum() / (hits[-1] * false[-1])
    f1_max = (2 * hits / (hits + false + hits[-1])).max()
    ap = (anomalous * hits / (hits + false)).sum() / hits[-1]
    return {name: min(1.0, float(x)) for name, x in dict(auroc=auroc, f1_max=f1_max, ap=ap).items()}


def image_metrics(labels: Sequence[int], scores: Sequence[float]) -> dict[str, float | None]:
    """labels [n], 1 anomalous or 0 normal, and scores [n] -> auroc, f1_max and ap in [0, 1], exact; None
    where there is one kind only. Raises ValueError for other labels or lengths, or scores not finite."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    sound = np.isin(labels, (0, 1)).all() and np.isfinite(scores).all()
    if not sound or labels.ndim != 1 or labels.shape != scores.shape:
        raise ValueError(f"wanted labels [n] of 0 and 1 and finite scores [n], got {labels} and {scores}")
    values, place = np.unique(-scores, return_inverse=True)
    return ranking(*(np.bincount(place[labels == kind], minlength=len(values)) for kind in (1, 0)))


def region_weights(masks: Tensor) -> Tensor:
    """bool [B, H, W] -> for each true pixel, in order, int64 round(2^44 / area of its 8-connected region)."""
    row = masks.shape[2] + 1
    pixels = F.pad(masks, (0, 1, 0, 1)).flatten()  # a false column and row keep runs and images apart
    first, last = ((pixels & ~pixels.roll(step)).nonzero()[:, 0] for step in (1, -1))  # of each run in a row
    # A run touches those of the next row that end not before and start not after its ends, moved out by one.
    begin = torch.searchsorted(last, first + row - 1)
    count = torch.searchsorted(first, last + row + 1, right=True) - begin
    region, before = torch.arange(len(first), device=masks.device), None
    upper = region.repeat_interleave(count)
    lower = begin[upper] + torch.arange(len(upper), device=masks.device) - (count.cumsum(0) - count)[upper]
    while before is None or not torch.equal(region, before):
        before, least = region, torch.minimum(region[upper], region[lower])
        for end in (upper, lower):  # each link pulls the roots of both its ends down to the lesser
            region = region.scatter_reduce(0, before[end], least, "amin")
        region = region[region]
    length = last - first + 1
    area = torch.zeros_like(region).scatter_add_(0, region, length)[region]
    return (2.0**44 / area.double()).round().long().repeat_interleave(length)


class PixelHistogram:
    """Every pixel metric in one pass and constant memory: counts per bin of the map value, of normal pixels,
    of anomalous ones, and of these weighted by 1 / area of their region; they add up in any order. low, high:
    the range of values, [-2L, 2L] for VisualAD. Pixels of one bin count as tied: exact for values in the
    middles of bins, within 1e-4 for maps whose standard deviation is at least 2,500 bins."""

    def __init__(self, low: float, high: float, bins: int = 2**20, device: str | torch.device = "cpu"):
        self.low, self.high, self.bins, self.scale = float(low), float(high), bins, bins / (high - low)
        self.counts = torch.zeros(3, bins, dtype=torch.int64, device=device)  # normal, anomalous, weighted
        self.extremes = torch.full((2,), -torch.inf, dtype=torch.float64, device=device)  # -min, max

    def update(self, maps: Tensor | np.ndarray, masks: Tensor | np.ndarray) -> None:
        """maps: float [B, H, W] in [low, high]; masks: the same shape, not 0 where pixels are anomalous.
        Tensors or arrays. Raises ValueError for other shapes and for a value outside the range."""
        maps, masks = (torch.as_tensor(x, device=self.counts.device).detach() for x in (maps, masks))
        low, high = (x.double() for x in maps.aminmax())
        if maps.ndim != 3 or maps.shape != masks.shape or not self.low <= low <= high <= self.high:
            got = f"{[*maps.shape]} from {low} to {high}, masks {[*masks.shape]}"
            raise ValueError(f"wanted maps [B, H, W] in {self.low, self.high} and their masks, got {got}")
        for values, mask in zip(maps.split(1), masks.bool().split(1), strict=True):  # one stays in the cache
            place = (values.double() - self.low).mul_(self.scale).long().clamp_(max=self.bins - 1)
            both = (place + self.bins * mask).flatten()  # self.counts[0] or, where the mask is true, [1]
            self.counts.view(-1).scatter_add_(0, both, both.new_ones(1).expand(len(both)))
            self.counts[2].scatter_add_(0, place[mask], region_weights(mask))
        self.extremes = torch.maximum(self.extremes, torch.stack([-low, high]))

    def all_reduce(self) -> None:
        """Adds up the histograms of all ranks, on each of them."""
        if dist.is_initialized():
            dist.all_reduce(self.counts)
            dist.all_reduce(self.extremes, dist.ReduceOp.MAX)

    def metrics(self, pro: str = "exact") -> dict[str, float | None]:
        """auroc, f1_max, ap, aupro in [0, 1]; None where only one kind of pixel was seen. pro: "exact", the
        mean overlap of regions over the rate of false positives of all normal pixels up to 0.3; "published",
        as this family of papers has it: 200 thresholds from the least to the largest value, rate rescaled."""
        counts = self.counts.cpu().numpy()
        used = counts[:2].any(axis=0).nonzero()[0][::-1]  # bins, the highest first
        normal, anomalous, weights = counts[:, used]
        found = ranking(anomalous, normal) | dict(aupro=None)
        if found["auroc"] is None:
            return found
        rate, overlap = (np.append(0, x.cumsum(dtype=float)) / x.sum(dtype=float) for x in (normal, weights))
        if pro == "exact":
            points, end, width = rate <= 0.3, np.interp(0.3, rate, overlap), 0.3
            rate, overlap = np.append(rate[points], 0.3), np.append(overlap[points], end)
        elif pro == "published":
            low, high = self.extremes.cpu().numpy() * (-1, 1)
            limits = np.linspace(low, high, 200, endpoint=False)
            limits = (limits - self.low) * self.scale - 0.5  # 0: the middle of the first bin
            limits[0] = used[-1]  # what exceeds the minimum: all bins but the last
            points = len(used) - np.searchsorted(used[::-1], limits, side="right")
            points = points[rate[points] < 0.3]
            rate, overlap, width = rate[points], overlap[points], np.ptp(rate[points]) if len(points) else 0
        else:
            raise ValueError(f"pro must be exact or published, got {pro!r}")
        if width:
            found["aupro"] = min(1.0, float(abs(np.diff(rate) @ (overlap[1:] + overlap[:-1])) / 2 / width))
        return found


# --- 4. one pass over the images -------------------------------------------------------------------------
METRICS = tuple("image_auroc image_f1_max image_ap pixel_auroc pixel_f1_max pixel_ap pixel_aupro".split())


def ranks() -> tuple[int, int]:
    """This process's rank and the number of all, (0, 1) where torchrun started none."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: Any) -> list[Any]:
    """The value of every rank, in order."""
    values = [value] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def evaluate(
    model: VisualAD, records: Sequence[Record], *, size: int | Sequence[int] | None = None,
    sigma: float | None = None, batch_size: int = 8, native: bool = False, pro: str = "exact",
    root: str | os.PathLike = ".", skip: Mapping[str, Any] | tuple = (), keep: Path | None = None,
    heatmaps: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores records, with torchrun each rank a share -> {"classes": {class: {metric: value or None,
    "images": n}}, "mean": the same, "records": [{path, class, label, score}], "errors": [{path, error}]}.

    size, sigma, batch_size: as for `VisualAD.predict`. native: compare pixels at an image's own size. pro: of
    `PixelHistogram`. root: what paths are told from. skip: a report to go on from, which grows. keep: a JSON
    file for it, by class. heatmaps: a folder for strips. Raises ValueError.
    """
    size, (rank, world), device = model.input_size(size), ranks(), model.tokens.device
    high = len(model.layers)  # half of what a map can reach: full red
    report: dict[str, Any] = dict(classes={}, mean={}, records=[], errors=[]) | dict(skip)

    def sample(record: Record) -> tuple[Tensor, dict[str, Any], Tensor, Tensor | None] | None:
        name = Path(os.path.relpath(record.path, root)).as_posix().replace("../", "")
        try:
            image, mask = read(record)
        except (ValueError, OSError) as error:
            tqdm.write(f"{name}: {error}", file=sys.stderr)
            errors.append(dict(path=name, error=str(error)))
            return None
        label = record.label if record.label is not None or mask is None else int(mask.any())
        row = {"path": name, "class": record.cls, "label": label}
        return resize(image, size), row, image, mask if mask is None or native else shrink(mask, size)

    for cls in sorted({record.cls for record in records} - report["classes"].keys()):
        mine, rows, errors = [record for record in records if record.cls == cls][rank::world], [], []
        pixels = PixelHistogram(-2 * high, 2 * high, device="cpu" if device.type == "mps" else device)
        bar = tqdm(ahead(sample, mine, 2 * batch_size), cls, len(mine), disable=rank > 0 or None)
        ready = filter(None, bar)
        while batch := list(islice(ready, batch_size)):
            maps, scores = model.infer(torch.stack([small for small, *_ in batch]).to(device), sigma)
            for (_, row, image, mask), heat, score in zip(batch, maps, scores.tolist(), strict=True):
                heat = upsample(heat[None, None], image.shape[1:])[0, 0] if native else heat
                rows.append(row | dict(score=score))
                if mask is not None:
                    pixels.update(heat[None], mask[None])
                if heatmaps:
                    write_atomic(heatmaps / f"{row['path']}.png", strip(image, heat.cpu(), mask, high))
        pixels.all_reduce()
        rows, errors = (sorted(sum(gather(x), []), key=lambda row: row["path"]) for x in (rows, errors))
        report["records"] += rows
        report["errors"] += errors
        known = np.array([(row["label"], row["score"]) for row in rows if row["label"] is not None])
        numbers = [*image_metrics(*known.reshape(-1, 2).T).values(), *pixels.metrics(pro).values()]
        report["classes"][cls] = dict(zip(METRICS, numbers, strict=True), images=len(rows))
        for name in METRICS:
            values = [row[name] for row in report["classes"].values() if row[name] is not None]
            report["mean"][name] = sum(values) / len(values) if values else None
        report["mean"]["images"] = len(report["records"])
        if keep and rank == 0:
            write_atomic(keep, json.dumps(report, indent=2, allow_nan=False).encode())
    return report


# --- 5. command line -------------------------------------------------------------------------------------
def table(report: Mapping[str, Any], pro: str = "exact") -> str:
    """In percent; "-" where a class cannot have the number."""
    head = [*"class images AUROC F1-max AP AUROC F1-max AP".split(), "AUPRO" if pro == "exact" else "PRO*"]
    rows = [["", "", "image", "", "", "pixel"], head]
    for name, row in [*report["classes"].items(), ("mean", report["mean"])]:
        numbers = ["-" if row[metric] is None else f"{100 * row[metric]:.1f}" for metric in METRICS]
        rows.append([name, row["images"], *numbers])
    width = max(len(name) for name, *_ in rows)
    lines = [f"{name:{width}}" + "".join(f"{cell:>8}" for cell in cells) for name, *cells in rows]
    return "\n".join(lines + ["* the published variant, not comparable with AUPRO"] * (pro == "published"))


def strip(image: Tensor, heat: Tensor, mask: Tensor | None, high: float) -> bytes:
    """A PNG of image, mask (grey where unknown) and heatmap, side by side."""
    image, (h, w), file = resize(image, heat.shape), heat.shape, io.BytesIO()
    truth = heat.new_full((h, w), 0.5) if mask is None else mask.float()
    gap = heat.new_ones(3, h, 8)
    whole = torch.cat([image, gap, truth.expand(3, h, w), gap, image], dim=2)
    overlay(whole, F.pad(heat, (2 * w + 16, 0)), high=high).save(file, "PNG", compress_level=1)
    return file.getvalue()


def data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is read; `load_data` reads them."""
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="ROOT", help="a dataset in a layout that is known")
    add("--dataset", default="auto", choices=("auto", *DATASETS), help="the layout (auto: by what is there)")
    add("--classes", metavar="A,B", help="only these")
    add("--limit", type=int, metavar="N", help="only N images of each class, evenly spread")


def load_data(args: argparse.Namespace) -> tuple[str, list[Record]]:
    """The layout's name and the chosen records; says what it found. Raises as `read_dataset` does."""
    dataset, found = read_dataset(args.data, args.dataset)
    classes, records = sorted({record.cls for record in found}), []
    for cls in sorted(map(str.strip, args.classes.split(","))) if args.classes else classes:
        rows = [record for record in found if record.cls == cls]
        n = len(rows) if args.limit is None else min(args.limit, len(rows))
        if n < 1:
            raise ValueError(f"--classes and --limit leave no image of {cls}; known: {', '.join(classes)}")
        records += [rows[(2 * i + 1) * len(rows) // (2 * n)] for i in range(n)]
    if ranks()[0] == 0:
        normal, bad, unknown = ([record.label for record in records].count(x) for x in (0, 1, None))
        print(f"{args.data}: layout {dataset}")
        print(f"{len(records)} images: {normal} normal, {bad} anomalous, {unknown} unlabelled", flush=True)
    return dataset, records


def guarded(name: str, program: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a program with the ranks that torchrun started, if it did, and its errors as one line each."""
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if torch.cuda.is_available():  # then "cuda" means this one
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group()
        return program(args)
    except (ValueError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where a file could not be read; 2 for an error."""
    usage = "\n  python evaluate.py --data ROOT --model tiny --json result.json"
    usage += "\n  torchrun --nproc-per-node=8 evaluate.py --data ROOT --model tiny"
    parser = argparse.ArgumentParser(usage=usage, description="Scores a dataset as it lies on disk.")
    data_flags(parser)
    visualad.model_flags(parser)
    add = parser.add_argument
    add("--pro", default="exact", choices=("exact", "published"), help="AUPRO; on one set 0.765 and 0.770")
    add("--native", action="store_true", help="compare pixels at each image's own size, not the network's")
    add("--json", type=Path, metavar="FILE", help="write settings, metrics and scores, after each class")
    add("--resume", action="store_true", help="skip the classes that --json holds")
    add("--heatmaps", type=Path, metavar="FOLDER", help="write image, mask, heatmap of each; index.html")
    return guarded("evaluate", run, parser.parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    if args.heatmaps and Path(os.path.abspath(args.data)) in Path(os.path.abspath(args.heatmaps)).parents:
        raise ValueError("--heatmaps must lie outside --data, where the next run would read them as images")
    model, options = visualad.load_model(args)
    dataset, records = load_data(args)
    settings = {k: x for k, x in vars(args).items() if k not in ("device", "json", "resume", "heatmaps")}
    settings = json.loads(json.dumps(settings | options | dict(dataset=dataset), default=str))
    old = json.loads(args.json.read_text()) if args.resume and args.json and args.json.is_file() else {}
    if other := [name for name in settings if old and old.get("settings", {}).get(name) != settings[name]]:
        raise ValueError(f"{args.json} was made with another {', '.join(other)}")
    report = evaluate(model, records, **options, native=args.native, pro=args.pro, root=args.data,
                      keep=args.json, heatmaps=args.heatmaps, skip=dict(settings=settings) | old)  # fmt: skip
    if ranks()[0] == 0:
        print(table(report, args.pro))
        if args.heatmaps:
            rows = sorted((row["class"], -row["score"], row["path"]) for row in report["records"])
            page = [f"<p>{-x:.4f} {html.escape(y)}<br><img src='{quote(y)}.png'>" for _, x, y in rows]
            write_atomic(args.heatmaps / "index.html", "\n".join(['<meta charset="utf-8">', *page]).encode())
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
