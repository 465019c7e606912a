"""Trains tokens, SCA, SAF and the final norm by the paper's recipe; the backbone stays as it is.
Under torchrun the ranks share each batch out and come to the same model.

 1 losses   2 optimiser   3 samples   4 the loop   5 command line
 B images of a batch   L tapped layers   H W pixels of the network's input, a square
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluate import Record, data_flags, evaluate, gather, guarded, load_data, ranks, read, shrink, table
from visualad import BACKBONES, PRETRAINED, Output, VisualAD, ahead, find_device, resize, write_atomic
from weights.pictures import paint


# --- 1. losses -------------------------------------------------------------------------------------------
def loss_terms(
    output: Output, masks: Tensor, labels: Tensor, counts: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The paper's loss and its parts: image, pixel = focal + dice, token, total = image + pixel + token.

    masks: float [B, H, W], 1 anomalous, 0 normal, NaN everywhere where pixels are unknown: such an image
    leaves focal and dice. labels: float [B], 1 anomalous, 0 normal. counts: where these images are a share of
    a batch, how many that has, and how many with a mask: then the losses of the shares add up to its loss.
    """
    known = ~masks.isnan().flatten(1).any(dim=1)
    images, masked = (max(n, 1) for n in (counts or (len(masks), int(known.sum()))))
    labels = labels.to(output.score)
    image = F.binary_cross_entropy_with_logits(output.score, labels, reduction="sum") / images
    token = (F.cosine_similarity(*output.tokens.unbind(1), dim=-1) + 0.5).clamp(min=0).sum() / images

    q, truth = output.layer_maps[known].sigmoid(), masks[known][:, None] > 0.5  # [B, L, H, W], [B, 1, H, W]
    # The authors clamp one-hot targets to [1e-5, 1 - 1e-5] and add 1e-5: for two classes that is this.
    p = (1 - 2e-5) * torch.where(truth, q, 1 - q) + 2e-5
    focal = -((1 - p) ** 2 * p.log()).mean(dim=(2, 3)).sum() / masked
    overlap, both = (q * truth).sum(dim=(2, 3)), q.sum(dim=(2, 3)) + truth.sum(dim=(2, 3))
    dice = (1 - (2 * overlap + 1) / (both + 1)).sum() / masked
    pixel = focal + dice
    return dict(image=image, pixel=pixel, focal=focal, dice=dice, token=token, total=image + pixel + token)


# --- 2. optimiser ----------------------------------------------------------------------------------------
def param_groups(model: VisualAD, lr: float = 1e-4, token_lr: float = 1e-3) -> list[dict]:
    """The two tokens, then all else that is learned: SCA, SAF and, as with the authors, the final norm."""
    rest = [p for p in model.parameters() if p.requires_grad and p is not model.tokens]
    return [dict(params=[model.tokens], lr=token_lr), dict(params=rest, lr=lr)]


def token_rate(epoch: int, epochs: int, token_lr: float = 1e-3) -> float:
    """The tokens' learning rate in an epoch counted from 0: cosine from token_lr towards 1e-4, or less. The
    rest's stays at --lr: the authors' schedule would move it too, but for their 1e-4, where it ends."""
    low = min(1e-4, token_lr)
    return low + (token_lr - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def clip_tokens(model: VisualAD) -> None:
    """Scales the gradient of each token to a norm of at most 1; nothing else is clipped."""
    model.tokens.grad.renorm_(p=2, dim=0, maxnorm=1)


# --- 3. samples ------------------------------------------------------------------------------------------
PAINT, ORDER, DROPOUT = range(3)  # what random numbers are for, so that no two streams coincide


def sample(record: Record, side: int, key: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """Image fp32 [3, H, W], mask float [H, W], NaN where pixels are unknown, label float []. With a key, from
    which all random numbers come, every second image that is not anomalous gets procedural defects."""
    (image, truth), size, label = read(record), (side, side), float(record.label or 0)
    image = resize(image, size)
    mask = torch.full(size, math.nan, device="cpu") if truth is None else shrink(truth, size).float()
    if key and not label:
        rng, mask = np.random.default_rng(key), torch.zeros(size, device="cpu")
        if rng.random() < 0.5:
            image, truth = paint(rng, image)
            mask, label = truth.float(), float(truth.any())
    return image, mask, torch.tensor(label, device="cpu")


def batches(n: int, size: int, seed: int, epochs: int) -> list[tuple[int, list[int]]]:
    """(epoch, indices) of every batch, the last one of an epoch smaller: a function of seed and epoch."""
    orders = [np.random.default_rng([ORDER, seed, epoch]).permutation(n).tolist() for epoch in range(epochs)]
    return [(epoch, order[i : i + size]) for epoch, order in enumerate(orders) for i in range(0, n, size)]


# --- 4. the loop -----------------------------------------------------------------------------------------
@contextlib.contextmanager
def backbone_in(model: VisualAD, dtype: torch.dtype) -> Iterator[None]:
    """Within it the frozen backbone, and nothing else, runs in autocast: all weights stay fp32."""
    cast = torch.autocast(model.tokens.device.type, dtype, enabled=dtype != torch.float32)
    model.backbone.forward = cast(model.backbone.forward)
    try:
        yield
    finally:
        del model.backbone.forward  # an attribute of this instance: the method is back


def step(
    model: VisualAD, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor],
    counts: tuple[int, int], weight: float = 1.0, accumulate: int = 1,
) -> dict[str, float]:  # fmt: skip
    """One optimiser step, unless loss or gradient is not finite; the losses of the whole batch, and the norm.

    batch: images, masks, labels of this rank's share. counts: of the images, and of those with a mask, in
    the whole batch. weight: 0 for a rank without a share. accumulate: parts that are computed in turn.
    """
    sums = 0.0
    for images, masks, labels in zip(*(x.tensor_split(min(accumulate, len(x))) for x in batch), strict=True):
        terms = loss_terms(model(images), masks, labels, counts)
        (weight * terms["total"]).backward()
        sums = sums + weight * torch.stack([*terms.values()]).detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if torch.distributed.is_initialized():
        for x in (sums, *gradients):  # the shares add up to the whole batch
            torch.distributed.all_reduce(x)
    norm = float(torch.nn.utils.get_total_norm(gradients))
    found = dict(zip(terms, sums.tolist(), strict=True), norm=norm)
    if math.isfinite(found["total"] + norm):
        clip_tokens(model)
        optimizer.step()
    optimizer.zero_grad()
    return found


def run(args: argparse.Namespace) -> int:
    """Writes log.jsonl, a line a step; checkpoint.pt each epoch and ten minutes; the model and its card."""
    (rank, world), path, log, done = ranks(), args.out / "checkpoint.pt", args.out / "log.jsonl", 0
    bf16 = args.device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    bf16 |= args.device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    args.dtype = args.dtype or ("bfloat16" if bf16 else "float32")
    torch.manual_seed(args.seed)
    if args.model:
        model = VisualAD.from_pretrained(args.model, backbone_weights=args.backbone_weights)
    else:
        model = VisualAD.from_backbone(args.backbone, args.backbone_weights)
    model.to(args.device).train()
    model.threshold = None  # that of the model it began with
    optimizer = torch.optim.AdamW(param_groups(model, args.lr, args.token_lr), args.lr, weight_decay=0.01)

    records = []
    for record in load_data(args)[1]:
        if record.label is None and record.masked:  # only the mask tells
            record = record._replace(label=int(read(record)[1].any()))
        records += [record] if record.label != 1 or args.synthetic != "only" else []
    plan = batches(len(records), args.batch_size, args.seed, args.epochs)
    if not plan or not (args.synthetic or {1} <= {r.label for r in records} <= {0, 1}):
        raise ValueError("nothing to train on: give images known as anomalous, or normal and --synthetic")
    whole = dict(data=args.eval, dataset="auto", classes=None, limit=None)
    scored = load_data(argparse.Namespace(**vars(args) | whole))[1] if args.eval else []
    settings = vars(args) | dict(data=args.data.resolve().name, images=len(records))
    settings = {k: str(v) for k, v in settings.items() if k not in ("out", "resume", "eval", "device")}
    if args.resume and path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        if other := dict(state["settings"].items() ^ settings.items()):
            raise ValueError(f"{path} is of a run with another {', '.join(sorted(other))}")
        model.load_state_dict(model.state_dict() | state["model"])
        optimizer.load_state_dict(state["adam"])
        done = state["step"]
    if len(set(gather(done))) > 1:
        raise ValueError(f"the ranks found different checkpoints: {args.out} must be one folder for all")
    if rank == 0:  # what was logged after the checkpoint will be logged again
        lines = log.read_text().splitlines(keepends=True)[:done] if done and log.exists() else []
        write_atomic(log, "".join(lines).encode())

    def load(item: tuple[int, list[int]]) -> list[Tensor]:
        epoch, batch = item
        share = batch[rank::world] or batch[:1]  # a rank without one has weight 0: the others wait for it
        keys = [args.synthetic and [PAINT, args.seed, epoch, i] for i in share]
        rows = [sample(records[i], model.image_size, key) for i, key in zip(share, keys, strict=True)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    known = [record.masked or bool(args.synthetic and not record.label) for record in records]
    bar = tqdm(plan[done:], initial=done, total=len(plan), unit="step", disable=rank > 0 or None)
    saved = time.monotonic()
    for (epoch, batch), share in zip(bar, ahead(load, plan[done:], 4), strict=True):
        optimizer.param_groups[0]["lr"] = rate = token_rate(epoch, args.epochs, args.token_lr)
        # Dropout too is a function of (seed, step, rank): there is no random state to be kept.
        torch.manual_seed(int(np.random.default_rng([DROPOUT, args.seed, done, rank]).integers(2**63)))
        share, counts = [x.to(args.device) for x in share], (len(batch), sum(known[i] for i in batch))
        with backbone_in(model, getattr(torch, args.dtype)):
            terms = step(model, optimizer, share, counts, float(rank < len(batch)), args.accumulate)
        if not math.isfinite(terms["total"] + terms["norm"]):
            names = ", ".join(str(records[i].path) for i in batch)
            raise ValueError(f"step {done + 1}: loss or gradient is not finite; images: {names}")
        done += 1
        ended = done == len(plan) or plan[done][0] > epoch
        report = ended and scored and evaluate(model, scored, batch_size=args.batch_size, root=args.eval)
        if rank == 0:
            with open(log, "a") as file:
                line = dict(step=done, epoch=epoch + 1, token_lr=rate, lr=args.lr, **terms)
                file.write(json.dumps(line) + "\n")
            if report:
                tqdm.write(f"after epoch {epoch + 1}, {args.eval}:\n{table(report)}")
                write_atomic(args.out / f"eval-{epoch + 1}.json", json.dumps(report).encode())
            if ended or time.monotonic() - saved > 600:
                kept = dict(settings=settings, step=done, model=model.learned(), adam=optimizer.state_dict())
                torch.save(kept, buffer := io.BytesIO())
                write_atomic(path, buffer.getvalue())
                saved = time.monotonic()
    if rank == 0:
        model.save_pretrained(args.out, notes=f"Trained by train.py: {settings}")
        print(f"{args.out}: model.safetensors and its card; calibrate it on normal images for a threshold")
    return 0


# --- 5. command line -------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for an error."""
    usage = """
  torchrun --nproc-per-node=8 train.py --data VISA --backbone clip-vit-l14-336 --out runs/visa
  python train.py --data photos --model tiny --synthetic only --epochs 30 --lr 1e-3 --out runs/own"""
    parser = argparse.ArgumentParser(usage=usage, description="Trains VisualAD by the paper's recipe.")
    add = parser.add_argument
    data_flags(parser)
    start = parser.add_mutually_exclusive_group(required=True).add_argument
    start("--backbone", metavar="NAME", help=f"a fresh learned part on this one: {', '.join(BACKBONES)}")
    start("--model", metavar="SOURCE", help=f"a trained one: {', '.join(PRETRAINED)}, a repo, folder or file")
    add("--backbone-weights", metavar="PATH", help="of the frozen backbone, for offline use")
    add("--out", type=Path, required=True, metavar="FOLDER", help="for model, card, log and checkpoint")
    add("--epochs", type=int, default=1, metavar="N", help="(%(default)s; the paper: VisA 1, MVTec-AD 2)")
    add("--batch-size", type=int, default=8, metavar="N", help="of all ranks together (%(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="parts a batch is computed in (%(default)s)")
    add("--lr", type=float, default=1e-4, help="of SCA, SAF and norm (%(default)s)")
    add("--token-lr", type=float, default=1e-3, help="of the tokens, in the first epoch (%(default)s)")
    add("--seed", type=int, default=111, help="(%(default)s)")
    what = "paint defects on every second normal image; only: and leave the real anomalous ones out"
    add("--synthetic", nargs="?", choices=("mix", "only"), const="mix", help=what)
    add("--device", type=find_device, default=find_device(), help="(%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen backbone; default: by the hardware")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--eval", type=Path, metavar="ROOT", help="score this dataset after each epoch")
    return guarded("train", run, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
