"""Trains the bundled model on procedural pictures alone, and measures it.

    python weights/tiny.py                        # train, choose the threshold, write the model, report
    torchrun --nproc_per_node 2 weights/tiny.py --workers 0 --resume     # faster on two cores
    python weights/tiny.py --init FILE --skip N --out FOLDER             # go on from a finished model
    python weights/tiny.py --report --data ROOT   # measure the model, also on datasets of real images

No real image and no downloaded weight is used, and a picture is a function of (SEED, split, index) alone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parent.parent))  # this script lies beside the module, not in it
from evaluate import (  # noqa: E402
    PixelHistogram,
    Record,
    checked,
    guarded,
    image_metrics,
    load_state,
    ranks,
    read,
    read_dataset,
    strip,
)
from train import loss_terms  # noqa: E402
from visualad import (  # noqa: E402
    BACKBONES,
    Output,
    VisualAD,
    check_target,
    find_device,
    image_score,
    nonempty,
    resize,
    smooth,
    upsample,
    write_atomic,
)
from weights.pictures import REPORT, SELECT, TRAIN, sample  # noqa: E402

SEED = 111
PICTURES = Path(__file__).with_name("pictures.py")
STAGES = ((160, 0.7), (224, 0.3))  # px and share of the images: the small ones are over twice as fast
WARM_UP = 500  # steps to the full rate, which stays until the last stage and falls to nothing in it
SCALE = 8.0  # of map values in the loss: plain cosine differences saturate the sigmoid late
KEEP = 1000  # steps from one saved state to the next
DENSE, DEFECT = 4.0, 4.0  # weights of the added cross-entropy and, in it, of a defective pixel
SIGMA = 1.7  # px of the smoothing: what the paper's 4 of 518 px are of 224
AVERAGE = 0.999  # how much of the average of the weights a step keeps
ATTENTION = ([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH])


# ---- training


class Pictures(torch.utils.data.Dataset):
    """`count` procedural images of one split: [3, size, size] in [0, 1], masks, kinds."""

    def __init__(self, split: int, count: int, size: int):
        self.split, self.count, self.size = split, count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        rng = np.random.default_rng([SEED, self.split, index])
        image, mask, kind = sample(rng, self.size, self.split)
        return torch.from_numpy(image).permute(2, 0, 1).float() / 255, torch.from_numpy(mask), kind


def loss(out: Output, mask: Tensor) -> Tensor:
    """The paper's loss, its map values multiplied by SCALE, and the cross-entropy of every pixel: a backbone
    that starts from nothing learns faster with a plain gradient beside those of focal and dice."""
    logits = SCALE * out.layer_maps
    truth = mask[:, None].float().expand_as(logits)
    paper = loss_terms(
        out._replace(score=SCALE * out.score, layer_maps=logits),
        mask.float(),
        mask.flatten(1).any(dim=1).float(),
    )
    weight = torch.tensor(DEFECT, device=logits.device)
    return paper["total"] + DENSE * F.binary_cross_entropy_with_logits(logits, truth, pos_weight=weight)


@torch.no_grad()
def mimic(model: VisualAD) -> None:
    """Attention starts half way to what trained ViTs come to: q^T k near 0.7 of the identity (as far as a
    head's rank goes), so that a patch looks at its likes, and proj v near -0.4 of it, which takes their mean
    away and leaves what is odd. The form and both figures are from Trockman and Kolter, "Mimetic
    initialization of self-attention layers", ICML 2023; why it suits anomalies is ours."""
    for block in model.backbone.blocks:
        D, heads = model.backbone.cfg.width, model.backbone.cfg.heads
        q, k, v = block.qkv.weight.chunk(3)
        u, s, vh = torch.linalg.svd(0.4 * torch.randn(D, D) / D**0.5 - 0.4 * torch.eye(D))
        v.copy_(s.sqrt()[:, None] * vh)
        block.proj.weight.copy_(u * s.sqrt())
        for rows_q, rows_k in zip(q.chunk(heads), k.chunk(heads), strict=True):
            u, s, vh = torch.linalg.svd(0.7 * torch.randn(D, D) / D**0.5 + 0.7 * torch.eye(D))
            rows_q.copy_((u * s.sqrt()).T[: D // heads])
            rows_k.copy_((s.sqrt()[:, None] * vh)[: D // heads])


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def pace(step: int, total: int, last: int) -> float:
    """Share of the full rate in a step counted from 1; the last stage has `last` of the `total` steps."""
    return min(step / WARM_UP, 1.0, (total - step + 1) / max(last, 1))


def train(
    images: int,
    batch: int,
    lr: float,
    workers: int,
    held_out: int = 500,
    state: Path | None = None,
    init: Path | None = None,
    skip: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> VisualAD:
    """Backbone, tokens, SCA and SAF from scratch, or from the finished model `init`, on the pictures from
    index `skip` on; returns the average of the last steps' weights. In a process group each process takes its
    share of every batch. state: file that keeps the training at full rate, for any number of `images`, and
    that it goes on from; the last stage, where the rate falls, is not kept. dtype: of products, in autocast.
    Raises ValueError for images that make no batch, a batch that the processes cannot share equally, another
    network, and a state of other settings or other pictures, or beyond the last stage's start."""
    rank, world = ranks()
    if images < batch:
        raise ValueError(f"{images} images are less than a batch of {batch}")
    if batch % world:
        raise ValueError(f"a batch of {batch} images cannot be shared equally by {world} processes")
    torch.manual_seed(SEED)
    device = find_device()
    model = VisualAD.from_pretrained(init) if init else VisualAD("tiny")
    if not init:
        mimic(model)
    elif model.backbone.cfg != BACKBONES["tiny"]:
        raise ValueError(f"{init} is of another network than tiny")
    model.sigma = SIGMA
    model.to(device).requires_grad_(True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # no picture is ever seen twice
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [dict(params=matrices), dict(params=vectors, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.05)
    total = images // batch
    counts = [round(share * total) for _, share in STAGES]  # steps of each stage
    counts[-1] = last = total - sum(counts[:-1])
    key = dict(batch=batch, lr=lr, warm_up=WARM_UP, loss=[SCALE, DENSE, DEFECT], dtype=str(dtype), skip=skip)
    key |= dict(sizes=[size for size, _ in STAGES], init=init and digest(init), pictures=digest(PICTURES))
    fresh = dict(key=key, step=0)
    saved = load_state(state, fresh) if state else fresh
    if (done := saved["step"]) > total - last:
        limit = f"only the first {(total - last) * batch} come at the full rate"
        raise ValueError(f"{state} has seen {done * batch} images, but of {images} {limit}")
    parts = dict(model=model, average=average, optimizer=optimizer)
    for name, part in parts.items() if done else ():
        part.load_state_dict(saved[name])
    loaders, first = [], skip
    for (size, _), count in zip(STAGES, counts, strict=True):
        end = first + count * batch
        mine = range(max(first, skip + done * batch) + rank, end, world)
        pictures, first = torch.utils.data.Subset(Pictures(TRAIN, end, size), mine), end
        loaders.append(torch.utils.data.DataLoader(pictures, batch // world, num_workers=workers))
    # On a CPU the fused attention's backward pass is slow at this size, and so are products in fp32.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    start, running = time.time(), 0.0
    for step, (x, mask, _) in enumerate(chain(*loaders), done + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * pace(step, total, last)
        x, mask = x.to(device), mask.to(device)
        with (
            torch.autocast(device, dtype, enabled=dtype != torch.float32),
            sdpa_kernel(ATTENTION[device == "cpu"]),
        ):
            result = model(x)
        value = loss(Output(*(t.float() for t in result)), mask)
        optimizer.zero_grad()
        value.backward()
        if world > 1:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            flat = nn.utils.parameters_to_vector(gradients)
            dist.all_reduce(flat)
            nn.utils.vector_to_parameters(flat / world, gradients)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        running += (value.item() - running) / min(step - done, 100)
        if rank > 0:
            continue
        if step % 100 == 0:
            rate = (step - done) * batch / (time.time() - start)
            print(f"{step * batch:7d} images  loss {running:.4f}  {rate:.0f} images/s", flush=True)
        if state and step % KEEP == 0 and step <= total - last:
            kept = {name: part.state_dict() for name, part in parts.items()}
            buffer = io.BytesIO()
            torch.save(dict(kept, key=fresh["key"], step=step), buffer)
            write_atomic(state, buffer.getvalue())
        if step % 2000 == 0 or step == total:
            found = measure({"tiny": average.module.infer}, procedural(SELECT, held_out, model.image_size))
            row = found["tiny"]["all"]
            figures = f"image AUROC {row.image_auroc}  pixel AUROC {row.pixel_auroc}  AP {row.pixel_ap}"
            print(f"select: {figures}", flush=True)
    return average.module


def save(model: VisualAD, out: Path) -> None:
    """One file, whole; the final norm was trained as the backbone's own, which is otherwise unused."""
    model.backbone.norm.load_state_dict(model.norm.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        write_atomic(out / "tiny.safetensors", (Path(folder) / "model.safetensors").read_bytes())


def decide(model: VisualAD, count: int = 2000) -> None:
    """Threshold and colour scale, from held-out procedural images: at most 5 % of the normal ones are above
    the threshold, and one in ten of the anomalous ones reaches the full colour."""
    normal, peaks = [], []
    for batch in procedural(SELECT, count, model.image_size):
        maps, scores = model.infer(batch.images.to(model.tokens.device))
        anomalous = torch.tensor(batch.labels, device=maps.device).bool()
        normal += scores[~anomalous].tolist()
        peaks += maps[anomalous].amax(dim=(1, 2)).tolist()
    value = sorted(normal)[math.ceil(0.95 * len(normal)) - 1]
    made = f"0.95 of {len(normal)} procedural normal images"
    model.threshold = dict(value=value, size=[model.image_size] * 2, sigma=model.sigma, made=made)
    model.display_high = max(float(np.quantile(peaks, 0.9)), 0.01)


# ---- measuring


HEADS = (
    "images / anomalous", "image AUROC", "F1-max", "AP", "pixel AUROC", "F1-max", "AP", "AUPRO",
    "above the threshold: normal / anomalous",
)  # fmt: skip


class Batch(NamedTuple):
    images: Tensor  # [B, 3, h, w], at the network's size
    masks: Tensor | None  # bool [B, H, W], at the images' own
    labels: list[int]  # 1: anomalous
    kinds: list[str]  # of defect; what a normal image is called does not matter


class Row(NamedTuple):
    """What a line of the table says; in percent, None where it is not defined."""

    images: int
    anomalous: int
    image_auroc: float | None
    image_f1_max: float | None
    image_ap: float | None
    pixel_auroc: float | None
    pixel_f1_max: float | None
    pixel_ap: float | None
    pixel_aupro: float | None
    flagged: tuple[float, ...] = ()  # share of the normal and of the anomalous images above the threshold


def procedural(split: int, count: int, size: int) -> Iterator[Batch]:
    for images, masks, kinds in torch.utils.data.DataLoader(Pictures(split, count, size), 25):
        yield Batch(images, masks, masks.flatten(1).any(dim=1).long().tolist(), list(kinds))


def photographs(records: Sequence[Record], size: int) -> Iterator[Batch]:
    """Images of one class of a dataset that evaluate.py reads."""
    for record in records:
        image, mask = read(record)
        images = resize(image, (size, size))[None]
        yield Batch(images, None if mask is None else mask[None], [record.label], [record.kind])


def labelled(root: Path) -> dict[str, list[Record]]:
    """The test images of a dataset by class. Raises ValueError as evaluate.py does, or without labels."""
    classes: dict[str, list[Record]] = {}
    for record in checked(*read_dataset(root)[1:], skip=False)[0]:
        if record.label is None:
            raise ValueError(f"{record.path} has no label: nothing to measure against")
        classes.setdefault(record.cls, []).append(record)
    return classes


def contrast(scale: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The baseline that learned nothing: a difference of Gaussians of the grey picture, in either sense."""

    def method(x: Tensor) -> tuple[Tensor, Tensor]:
        maps = (smooth(x.mean(dim=1), scale) - smooth(x.mean(dim=1), 3 * scale)).abs()
        return maps, image_score(maps)

    return method


def measure(
    methods: dict[str, Callable], batches: Iterable[Batch], limit: float | None = None
) -> dict[str, dict[str, Row]]:
    """For each method a row for "all" images; for the first also one for each kind of defect, beside all the
    normal images. Map values must lie in [-4, 4], the range of two tapped layers."""
    labels, kinds, pixels = [], [], {}
    scores = {name: [] for name in methods}
    first = next(iter(methods))
    for batch in batches:
        batch_kinds = [kind if label else "" for kind, label in zip(batch.kinds, batch.labels, strict=True)]
        labels, kinds = labels + batch.labels, kinds + batch_kinds
        for name, method in methods.items():
            maps, score = method(batch.images.to(find_device()))
            scores[name] += score.tolist()
            if batch.masks is None:
                continue
            maps = upsample(maps[:, None], batch.masks.shape[-2:])[:, 0].cpu()
            parts = batch_kinds if name == first else [""] * len(maps)
            for kind in set(parts):
                chosen = torch.tensor([part == kind for part in parts])
                histogram = pixels.setdefault((name, kind), PixelHistogram(-4, 4, bins=2**18))
                histogram.update(maps[chosen], batch.masks[chosen])
    label, kind_of, found = np.array(labels), np.array(kinds), {}
    for name in methods:
        found[name], score = {}, np.array(scores[name])
        for kind in ["all", *sorted({k for k in kinds if k and name == first})]:
            chosen = np.ones(len(label), bool) if kind == "all" else (label == 0) | (kind_of == kind)
            merged = PixelHistogram(-4, 4, bins=2**18)
            for (other, part), histogram in pixels.items():
                if other == name and (kind == "all" or part in ("", kind)):
                    merged.merge(histogram)
            values = [*image_metrics(label[chosen], score[chosen]).values()]
            values += merged.metrics().values() if pixels else [None] * 4
            flagged = ()
            if limit is not None and 0 < label[chosen].sum() < chosen.sum():
                flagged = tuple(float((score[chosen & (label == k)] > limit).mean()) for k in (0, 1))
            percent = (None if v is None else round(100 * v, 1) for v in values)
            found[name][kind] = Row(int(chosen.sum()), int(label[chosen].sum()), *percent, flagged)
    return found


def chance(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same everywhere, so that every metric is what guessing gives on average."""
    return torch.zeros_like(x[:, 0]), torch.zeros(len(x))


def report(model: VisualAD, name: str, batches: Iterable[Batch]) -> str:
    """The table of one set of images: the model, also by kind of defect, and what it has to beat. Of the
    contrasts the one of the best image AUROC."""
    torch.manual_seed(SEED)
    untrained = VisualAD("tiny").to(find_device())
    untrained.sigma = model.sigma
    methods = {"tiny": model.infer, "untrained": untrained.infer, "chance": chance}
    for scale in (1, 2, 4, 8):
        methods[f"contrast, {scale} px"] = contrast(scale)
    found = measure(methods, batches, model.threshold and model.threshold["value"])
    best = max((key for key in found if "px" in key), key=lambda k: found[k]["all"].image_auroc or 0)
    lines = [f"| {name} | {' | '.join(HEADS)} |", "|---" * (len(HEADS) + 1) + "|"]
    for method in ("tiny", "untrained", best, "chance"):
        for kind, row in found[method].items():
            label = method if kind == "all" else f"{method}: {kind}"
            shown = ["-" if value is None else f"{value:.1f}" for value in row[2:-1]]
            flagged = " / ".join(f"{100 * rate:.1f}" for rate in row.flagged) if method == "tiny" else ""
            lines.append(f"| {label} | {row.images} / {row.anomalous} | {' | '.join(shown)} | {flagged} |")
    return "\n".join(lines)


def gallery(model: VisualAD, count: int = 400) -> bytes:
    """A PNG of held-out pictures picked by rank alone, as image, mask and heatmap. Left: of the anomalous
    ones found, the quartiles by score. Right: of the missed, the median and last; the worst false alarm.
    Raises ValueError where the model finds or misses none."""
    shown = []
    for batch in procedural(REPORT, count, model.image_size):
        maps, scores = model.infer(batch.images.to(find_device()))
        shown += zip(scores.tolist(), batch.labels, batch.images, maps.cpu(), batch.masks, strict=True)
    shown.sort(key=lambda entry: entry[0])
    limit = model.threshold["value"]
    found = [entry for entry in shown if entry[1] and entry[0] > limit]
    missed = [entry for entry in shown if entry[1] and entry[0] <= limit]
    if not found or not missed or len(found) + len(missed) == len(shown):
        raise ValueError(
            f"of {count} pictures {len(found)} were found and {len(missed)} missed: none to show"
        )
    left = [found[len(found) * k // 4] for k in (3, 2, 1)]
    right = [missed[len(missed) // 2], missed[0], [entry for entry in shown if not entry[1]][-1]]
    strips = [
        [Image.open(io.BytesIO(strip(x, heat, mask, model.display_high))) for _, _, x, heat, mask in column]
        for column in (left, right)
    ]
    w, h = strips[0][0].width + 24, strips[0][0].height + 8
    whole, png = Image.new("RGB", (2 * w - 24, 3 * h - 8), "white"), io.BytesIO()
    for i, column in enumerate(strips):
        for j, panel in enumerate(column):
            whole.paste(panel, (i * w, j * h))
    whole.save(png, "PNG", optimize=True)
    return png.getvalue()


def main() -> int:
    """Exit status: 0; 2 for an error; 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="tiny.py", description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="measure the bundled model instead of training")
    parser.add_argument(
        "--data", type=nonempty, nargs="*", default=[], help="datasets that evaluate.py reads"
    )
    parser.add_argument(
        "--pictures", type=nonempty, help="also write three finds and three failures to this PNG"
    )
    parser.add_argument(
        "--images", type=int, default=200_000, help="how many to draw and train on (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=16, help="of all processes together (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="the full rate (%(default)s)")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that draw, of each one (%(default)s)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from tiny.state in --out, which it keeps until the last stage",
    )
    parser.add_argument(
        "--init", type=nonempty, help="a finished tiny.safetensors to start from, not from nothing"
    )
    parser.add_argument(
        "--skip", type=int, default=0, help="pictures to leave out, as --init has seen them (%(default)s)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of products")
    parser.add_argument(
        "--out", type=nonempty, default=Path(__file__).parent, help="folder of tiny.safetensors"
    )
    parser.set_defaults(device=find_device())
    return guarded("tiny", run, parser.parse_args())


def run(args: argparse.Namespace) -> int:
    # Before torch starts its threads: some processors take ten times as long over numbers near 1e-40.
    torch.set_flush_denormal(True)
    if args.init and not args.init.is_file():
        raise ValueError(f"--init {args.init} is no file")
    if args.init and args.init.resolve() == (args.out / "tiny.safetensors").resolve():
        raise ValueError(f"--init {args.init} would be overwritten: choose another --out")
    if args.skip < 0:
        raise ValueError(f"--skip must be at least 0, got {args.skip}")
    for path in (args.out / "tiny.safetensors", args.pictures):  # now, not after hours
        if path:
            check_target(path)
    roots = [Path(__file__).parent.parent / "examples", *args.data]
    sets = {root.resolve().name: labelled(root) for root in roots}
    if not args.report:
        state = args.out / "tiny.state" if args.resume else None
        model = train(
            args.images,
            args.batch,
            args.lr,
            args.workers,
            state=state,
            init=args.init,
            skip=args.skip,
            dtype=getattr(torch, args.dtype),
        )
        if ranks()[0]:
            return 0
        print("choosing the threshold on 2,000 images", flush=True)
        decide(model)
        save(model, args.out)
    model = VisualAD.from_pretrained(args.out / "tiny.safetensors", device=find_device())
    if args.pictures:
        write_atomic(args.pictures, gallery(model))
    print(report(model, "procedural", procedural(REPORT, 2000, model.image_size)))
    for name, classes in sets.items():
        for cls, records in classes.items():
            title = name if len(classes) == 1 else f"{name}, {cls}"
            print(f"\n{report(model, title, photographs(records, model.image_size))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
