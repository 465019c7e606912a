"""Trains tokens, SCA, SAF and the final norm by the paper's recipe; the backbone stays as it is.

   python train.py --data VISA --backbone clip-vit-l14-336 --protocol paper --out runs/visa
   python train.py --data my_photos --model tiny --synthetic only --epochs 30 --lr 1e-3 --out runs/product
   torchrun --nproc-per-node=8 train.py ...      # the same batches, shared out

1 losses   2 optimiser   3 samples   4 the loop   5 command line

B images of a batch   L tapped layers   H W pixels of the network's input, a square
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from evaluate import (
    Record,
    Told,
    check_outside,
    data_flags,
    deaf,
    digest_of,
    evaluate,
    fingerprint,
    gather,
    guarded,
    load_data,
    load_state,
    ranks,
    read,
    shrink,
    table,
)
from visualad import (
    BACKBONES,
    PRETRAINED,
    Output,
    VisualAD,
    find_device,
    nonempty,
    real,
    resize,
    write_atomic,
)


# --- 1. losses -------------------------------------------------------------------------------------------
def loss_terms(
    output: Output, masks: Tensor, labels: Tensor, counts: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """The paper's loss and its parts: image, pixel = focal + dice, token, total = image + pixel + token.

    output: of `VisualAD.forward`. masks: float [B, H, W], 1 anomalous, 0 normal, NaN everywhere where pixels
    are unknown: such an image leaves focal and dice. labels: float [B], 1 anomalous, 0 normal.
    counts: what the sums over images are divided by, the number of all images of the batch and of those
    with a mask; None: those given. A share of a batch adds up with the others to the loss of the whole.
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
def param_groups(model: VisualAD, lr: float = 1e-4, token_lr: float = 1e-3) -> list[dict[str, Any]]:
    """The two tokens, then everything else that is learned, for AdamW."""
    # The authors' program trains and saves the final norm too, but its test never loads it; ours does.
    learned = model.learned()
    rest = [p for name, p in model.named_parameters() if name in learned and p is not model.tokens]
    return [dict(params=[model.tokens], lr=token_lr), dict(params=rest, lr=lr)]


def token_rate(epoch: int, epochs: int, token_lr: float = 1e-3) -> float:
    """The tokens' learning rate in an epoch counted from 0: cosine from token_lr towards 1e-4, or less. The
    rest's stays at --lr: the authors' schedule would move it too, but for their 1e-4, where it ends."""
    low = min(1e-4, token_lr)
    return low + (token_lr - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def clip_tokens(model: VisualAD) -> None:
    """Scales the gradient of each token to a norm of at most 1; nothing else is clipped."""
    gradient = model.tokens.grad
    gradient.mul_((1 / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1))


# --- 3. samples ------------------------------------------------------------------------------------------
PAINT, ORDER, DROPOUT = range(3)  # what random numbers are for, so that no two streams coincide


class Samples(Dataset):
    """(epoch, i) -> image fp32 [3, H, W], mask float [H, W] (NaN: unknown), label float. What is drawn at
    random is a function of (seed, epoch, i), so that neither workers nor an interruption change it.

    synthetic: paint procedural defects on every second image that is not anomalous.
    """

    def __init__(self, records: Sequence[Record], side: int, seed: int = 111, synthetic: bool = False):
        self.records, self.size, self.seed, self.synthetic = list(records), (side, side), seed, synthetic

    def __len__(self) -> int:
        return len(self.records)

    def has_mask(self, i: int) -> bool:
        record = self.records[i]
        return record.known or (self.synthetic and not record.label)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
        epoch, i = key
        image, mask = read(self.records[i])
        image, label = resize(image, self.size), float(self.records[i].label or 0)
        mask = torch.zeros(self.size, dtype=torch.bool) if mask is None else shrink(mask, self.size)
        rng = np.random.default_rng([PAINT, self.seed, epoch, i])
        if self.synthetic and not label and rng.random() < 0.5:
            from weights.pictures import paint

            image, mask = paint(rng, image)
            label = float(mask.any())
        return image, mask.float() if self.has_mask(i) else torch.full(self.size, math.nan), label


def batches(n: int, size: int, seed: int, epoch: int) -> list[list[int]]:
    """The order of an epoch in batches, the last one smaller: a function of (seed, epoch)."""
    order = np.random.default_rng([ORDER, seed, epoch]).permutation(n).tolist()
    return [order[i : i + size] for i in range(0, n, size)]


# --- 4. the loop -----------------------------------------------------------------------------------------
class BackboneIn:
    """`with BackboneIn(model, dtype):` runs the frozen backbone, and nothing else, in autocast: its weights
    stay fp32, and so do tokens, SCA, SAF and losses. One object a run: what is compiled sees one forward."""

    def __init__(self, model: VisualAD, dtype: torch.dtype):
        forward, device = model.backbone.forward, model.tokens.device.type

        def cast(*inputs: Any, **options: Any) -> dict[int, Tensor]:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                found = forward(*inputs, **options)
            return {layer: z.float() for layer, z in found.items()}

        self.backbone, self.cast = model.backbone, cast

    def __enter__(self) -> None:
        self.backbone.forward = self.cast

    def __exit__(self, *_: Any) -> None:
        del self.backbone.forward  # an attribute of this instance: the method is back


def step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[Tensor],
    counts: tuple[int, int], weight: float = 1.0, accumulate: int = 1,
) -> dict[str, float]:  # fmt: skip
    """One optimiser step, unless loss or gradient is not finite; returns the loss terms of the whole batch.

    batch: images, masks, labels of this rank's share. counts: of the images, and of those with a mask, in the
    whole batch. weight: the number of ranks, because DistributedDataParallel averages; 0 for an idle one.
    """
    parts = list(zip(*(x.tensor_split(min(accumulate, len(x))) for x in batch), strict=True))
    sums = 0
    for i, (images, masks, labels) in enumerate(parts):
        sync = i == len(parts) - 1 or not isinstance(model, DistributedDataParallel)
        with contextlib.nullcontext() if sync else model.no_sync():
            terms = loss_terms(model(images), masks, labels, counts)
            (weight * terms["total"]).backward()
        sums = sums + torch.stack(list(terms.values())).detach().cpu().double() * (weight > 0)
    if dist.is_initialized():
        dist.all_reduce(sums)
    found = dict(zip(terms, sums.tolist(), strict=True))
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not math.isfinite(float(torch.nn.utils.get_total_norm(gradients))):
        found["total"] = math.nan
    if math.isfinite(found["total"]):
        clip_tokens(getattr(model, "module", model))
        optimizer.step()
        optimizer.zero_grad()
    return found


def fit(
    model: VisualAD, samples: Samples, out: Path, *, epochs: int = 1, batch_size: int = 8, lr: float = 1e-4,
    token_lr: float = 1e-3, accumulate: int = 1, dtype: torch.dtype = torch.float32, compiled: bool = False,
    checkpoint_activations: bool = False, workers: int = 0, save_every: float = 10.0, resume: bool = False,
    key: Mapping[str, Any] | None = None, each_epoch: Callable[[int], None] | None = None,
) -> bool:  # fmt: skip
    """Trains in place; writes log.jsonl, a line a step, and checkpoint.pt every `save_every` minutes, after
    each epoch and when asked to stop. False when it was: `resume` goes on as if nothing had happened.

    key: refused if the checkpoint has another. each_epoch: called with the epoch, from 1, after each, and
    again if the run was interrupted there.
    Raises ValueError where the loss is not finite, naming the images; OSError, the old checkpoint whole.
    """
    rank, world = ranks()
    path, per_epoch = out / "checkpoint.pt", -(-len(samples) // batch_size)
    optimizer = torch.optim.AdamW(param_groups(model, lr, token_lr), weight_decay=0.01)
    fresh: dict[str, Any] = dict(key=dict(key or {}), step=0)
    state = load_state(path, fresh) if resume else fresh
    if len(set(gather(state["step"]))) > 1:
        raise ValueError(f"the ranks found different checkpoints: {out} must be one folder for all")
    if done := state["step"]:
        model.load_state_dict({**model.state_dict(), **state["learned"]})
        optimizer.load_state_dict(state["optimizer"])

    def save() -> None:
        if rank == 0:
            buffer = io.BytesIO()
            kept = dict(
                key=fresh["key"], step=done, learned=model.learned(), optimizer=optimizer.state_dict()
            )
            torch.save(kept, buffer)
            write_atomic(path, buffer.getvalue())

    if not done:
        save()  # what cannot be written is known now, and a run can be resumed from its first step on
    if rank == 0:  # what was logged after the checkpoint will be logged again
        log = out / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True)[:done] if done and log.is_file() else []
        write_atomic(log, "".join(lines).encode())
    stop: list[int] = []

    def ask(*_: Any) -> None:  # finish the step first; the second time, don't
        if stop:
            raise KeyboardInterrupt
        stop.append(1)
        if rank == 0:  # unbuffered: a signal can come in the middle of a print
            os.write(2, b"\ntrain: will stop after this step or evaluation; a second time stops it at once\n")

    model.train()
    for block in model.backbone.blocks if checkpoint_activations else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if compiled:
        model.patch_maps = torch.compile(model.patch_maps)
    wrapped = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    cast = BackboneIn(model, dtype)
    options = dict(num_workers=workers, pin_memory=model.tokens.is_cuda, worker_init_fn=deaf)
    handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    passed = done // per_epoch * len(samples) + done % per_epoch * batch_size
    bar = tqdm(total=epochs * len(samples), initial=passed, unit=" images", disable=rank > 0 or None)
    saved = time.monotonic()
    try:
        if each_epoch and done and done % per_epoch == 0:
            each_epoch(done // per_epoch)
        for epoch in range(done // per_epoch, epochs):
            optimizer.param_groups[0]["lr"] = token_rate(epoch, epochs, token_lr)
            plan = batches(len(samples), batch_size, samples.seed, epoch)[done % per_epoch :]
            # A rank with no image in a small last batch computes one with weight 0: the others wait for it.
            mine = [[(epoch, i) for i in batch[rank::world] or batch[:1]] for batch in plan]
            for batch, share in zip(plan, DataLoader(samples, batch_sampler=mine, **options), strict=True):
                # Dropout too is a function of (seed, step, rank): there is no random state to be kept.
                rng = np.random.default_rng([DROPOUT, samples.seed, done, rank])
                torch.manual_seed(int(rng.integers(2**63)))
                share = [x.float().to(model.tokens.device, non_blocking=True) for x in share]
                counts = len(batch), sum(map(samples.has_mask, batch))
                with cast:
                    terms = step(wrapped, optimizer, share, counts, world * (rank < len(batch)), accumulate)
                if not math.isfinite(terms["total"]):
                    if rank:
                        raise Told
                    names = ", ".join(str(samples.records[i].path) for i in batch)
                    what = f"step {done + 1}: the loss or its gradient is no finite number"
                    raise ValueError(f"{what}; the checkpoint before is kept; images: {names}")
                done += 1
                if not counts[1]:  # nobody knows, which is not 0
                    terms |= dict.fromkeys(("pixel", "focal", "dice"))
                bar.update(len(batch))
                shown = {name: f"{value:.3f}" for name, value in terms.items() if value is not None}
                bar.set_postfix(shown, refresh=False)
                if rank == 0:
                    rates = [group["lr"] for group in optimizer.param_groups]
                    line = dict(step=done, epoch=epoch + 1, token_lr=rates[0], lr=rates[1], **terms)
                    with open(log, "a") as file:
                        file.write(json.dumps(line) + "\n")
                due = rank == 0 and time.monotonic() - saved > 60 * save_every
                told = gather((bool(stop), due))
                if any(asked for asked, _ in told):
                    save()
                    return False
                if told[0][1]:
                    save()
                    saved = time.monotonic()
            save()
            if each_epoch:
                each_epoch(epoch + 1)
            saved = time.monotonic()
            if any(gather(bool(stop))):  # during the evaluation
                return False
        return True
    finally:
        bar.close()
        for module in (model, *model.backbone.blocks):
            for name in ("forward", "patch_maps"):
                module.__dict__.pop(name, None)  # uncompiled, not checkpointed
        for number, handler in handlers.items():
            signal.signal(number, handler)


def decide(model: VisualAD, samples: Samples, batch_size: int, workers: int) -> str:
    """Sets the threshold of best F1 on the images trained on, and a colour scale whose full red one in ten of
    the anomalous ones reaches. Returns how it was chosen."""
    rank, world = ranks()
    model.threshold = model.display_high = None  # those of the model it began with
    rows: list[tuple[float, float, float]] = []  # score, label, peak of the map
    keys = [(0, i) for i in range(rank, len(samples), world)]
    loader = DataLoader(samples, batch_size, sampler=keys, num_workers=workers, worker_init_fn=deaf)
    for images, _, labels in loader:
        maps, scores = model.eval().infer(images.to(model.tokens.device))
        rows += zip(scores.tolist(), labels.tolist(), maps.amax(dim=(1, 2)).tolist(), strict=True)
    everyones = [row for share in gather(rows) for row in share]
    score, label, peak = np.array(sorted(everyones, reverse=True)).T
    if not np.isfinite(score).all():
        raise ValueError("the trained model's scores are not finite")
    if not 0 < label.sum() < len(label):
        return "none: normal and anomalous images are both needed to choose one"
    hits = label.cumsum()
    f1 = 2 * hits / (np.arange(1, len(label) + 1) + label.sum())
    f1[:-1][score[:-1] == score[1:]] = 0  # equal scores are flagged together
    best = int(f1.argmax())
    value = (score[best] + score[best + 1]) / 2 if best + 1 < len(score) else score[best] - 1e-3
    made = f"best F1 ({f1[best]:.3f}) on the {len(score)} images trained on"
    size = list(samples.size)
    model.threshold = dict(value=float(value), size=size, sigma=model.sigma, made=made)
    model.display_high = max(float(np.quantile(peak[label == 1], 0.9)), 0.01)
    return made


# --- 5. command line -------------------------------------------------------------------------------------
FILES = ("checkpoint.pt", "log.jsonl", "eval.jsonl", "model.safetensors", "config.json", "README.md")
PAPER_EPOCHS = {"visa": 1, "mvtec": 2}


def has_bf16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for an error; 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    data_flags(parser)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--backbone", choices=BACKBONES, help="begin with a fresh learned part on this one")
    start.add_argument("--model", help="begin with this trained one: whatever from_pretrained takes")
    add("--backbone-weights", type=nonempty, metavar="PATH", help="of the frozen backbone, for offline use")
    add("--out", type=nonempty, required=True, metavar="FOLDER", help="for model, card, log and checkpoint")
    add("--protocol", choices=("paper",), help="the published epochs; the other defaults but --dtype are too")
    add("--epochs", type=int, metavar="N", help="(1)")
    add("--batch-size", type=int, default=8, metavar="N", help="of all ranks together (%(default)s)")
    add("--accumulate", type=int, default=1, metavar="N", help="parts a batch is computed in (%(default)s)")
    add("--size", type=int, metavar="N", help="side of the input, with --backbone; default: the backbone's")
    add("--lr", type=float, default=1e-4, help="of SCA, SAF and norm (%(default)s)")
    add("--token-lr", type=float, default=1e-3, help="of the tokens, in the first epoch (%(default)s)")
    add("--seed", type=int, default=111, help="(%(default)s)")
    add("--synthetic", nargs="?", choices=("mix", "only"), const="mix", help="paint defects on every second "
        "image that is not anomalous; only: and leave the real anomalous ones out")  # fmt: skip
    add("--device", default=find_device(), help="(%(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), help="of the frozen backbone; default: by the hardware")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--checkpoint-activations", action="store_true", help="less memory, more time")
    add("--save-every", type=float, default=10, metavar="MINUTES", help="(%(default)s)")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on where the checkpoint in --out ends")
    again.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    add("--eval", type=nonempty, metavar="ROOT", help="score this dataset after each epoch")
    return guarded("train", run, parser.parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    rank, world = ranks()
    if args.model and args.size:
        raise ValueError("--size goes with --backbone: a trained model has learned positions at its own size")
    if not (0 < args.lr < math.inf and 0 < args.token_lr < math.inf):
        raise ValueError(f"--lr and --token-lr must be above 0, got {args.lr} and {args.token_lr}")
    if not (0 <= args.seed < 2**63 and 0 <= args.save_every < math.inf and args.batch_size >= world):
        got = f"{args.seed}, {args.save_every}, {args.batch_size} for {world} processes"
        raise ValueError(f"wanted --seed and --save-every >= 0, --batch-size >= processes, got {got}")
    check_outside(args.data, args.out)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is no folder")
    for name in ("epochs", "batch_size", "accumulate"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    start = real(Path(args.model)) if args.model and args.model not in PRETRAINED else None
    if start and real(args.out) in (start, *start.parents):
        raise ValueError(f"--model {args.model} lies in --out, where the new one goes: choose another folder")
    there = [name for name in FILES if (args.out / name).exists()]
    if there and not args.resume and not args.overwrite:
        raise ValueError(f"{args.out} holds {', '.join(there)}: --resume or --overwrite, or another folder")
    if args.resume and there and "checkpoint.pt" not in there:
        raise ValueError(f"{args.out} holds {', '.join(there)}, but no checkpoint.pt: begin with --overwrite")
    others = [path for path in args.out.iterdir() if not path.match(".*.part")] if args.out.is_dir() else []
    if others and not there:
        raise ValueError(f"{args.out} holds something else: choose a new folder")

    torch.manual_seed(args.seed)
    if args.model:
        options = dict(backbone_weights=args.backbone_weights, device=args.device)
        model = VisualAD.from_pretrained(args.model, **options)
    else:
        model = VisualAD.from_backbone(args.backbone, args.backbone_weights, image_size=args.size)
    side = model.to(args.device).image_size
    layout, records, faults = load_data(args)
    name = layout.names[0]
    epochs = args.epochs or (PAPER_EPOCHS.get(name) if args.protocol else 1)
    if not epochs:
        raise ValueError(f"--protocol paper is for {', '.join(PAPER_EPOCHS)}, not {name}: give --epochs")
    if args.protocol and not args.epochs and rank == 0:
        print(f"--protocol paper, taken for {name}: epochs {epochs}", flush=True)
    if args.synthetic == "only":
        records = [record for record in records if record.label != 1]
    labels = {record.label for record in records}
    if not records:
        raise ValueError("--synthetic only leaves the anomalous images out, and there are no others")
    if None in labels and not args.synthetic:
        raise ValueError("nothing says which images are anomalous: --synthetic takes all as normal")
    if rank == 0 and (labels == {1} or (labels == {0} and not args.synthetic)):
        kind = "anomalous" if 1 in labels else "normal"
        hint = "--synthetic paints defects on normal ones"
        print(f"train: warning: every image is {kind}; {hint}", file=sys.stderr)
    evaluated = None
    if args.eval:
        other = dict(data=args.eval, dataset="auto", split="test", classes=None, limit=None)
        _, evaluated, _ = load_data(argparse.Namespace(**{**vars(args), **other}))
        if {record.label for record in evaluated} == {None}:
            raise ValueError(f"--eval {args.eval} has no labels to score against")

    samples = Samples(records, side, args.seed, bool(args.synthetic))
    dtype = args.dtype or ("bfloat16" if has_bf16(args.device) else "float32")
    chosen = "model backbone batch_size accumulate lr token_lr seed synthetic compile checkpoint_activations"
    key = {name: getattr(args, name) for name in chosen.split()} | dict(epochs=epochs, side=side, dtype=dtype)
    key |= dict(data=str(args.data), images=digest_of(records), weights_sha256=fingerprint(model))
    key |= dict(device=model.tokens.device.type)

    if rank == 0:
        print(
            f"{epochs} epochs of {len(samples)} images, batch {args.batch_size}, {side} px, {dtype}",
            flush=True,
        )

    def each_epoch(epoch: int) -> None:
        options = dict(size=side, batch_size=args.batch_size, workers=args.workers)
        if evaluated and (result := evaluate(model, evaluated, **options)):
            print(f"after epoch {epoch}, {args.eval}:")
            print(table(result, Counter(record.cls for record in evaluated), "exact"), flush=True)
            scored = args.out / "eval.jsonl"
            lines = scored.read_text().splitlines() if scored.exists() else []
            line = dict(epoch=epoch, data=str(args.eval), classes=result["classes"], mean=result["mean"])
            # After a kill an epoch may come again.
            lines = [old for old in lines if json.loads(old)["epoch"] < epoch] + [json.dumps(line)]
            write_atomic(scored, "".join(f"{line}\n" for line in lines).encode())

    gather(None)  # no rank removes what another has yet to see
    if rank == 0:  # a run that is replaced, and what a kill in the middle of a save left behind
        stale = there if args.overwrite else []
        for path in [*(args.out / name for name in stale), *args.out.glob(".*.part")]:
            path.unlink()
    try:
        finished = fit(
            model, samples, args.out, epochs=epochs, batch_size=args.batch_size, lr=args.lr,
            token_lr=args.token_lr, accumulate=args.accumulate, dtype=getattr(torch, dtype),
            compiled=args.compile, checkpoint_activations=args.checkpoint_activations, workers=args.workers,
            save_every=args.save_every, resume=args.resume, key=key, each_epoch=each_epoch,
        )  # fmt: skip
        made = decide(model, samples, args.batch_size, args.workers) if finished else ""
    except KeyboardInterrupt:
        finished = False
    if not finished:
        if rank == 0:
            print(f"train: stopped; the same command with --resume goes on from {args.out}", file=sys.stderr)
        return 130
    if rank == 0:
        what = f"{args.model or args.backbone} on {len(records)} images of {args.data.resolve().name}"
        what += ", procedural defects painted on every second normal one" if args.synthetic else ""
        what += f"; {epochs} epochs, batch {args.batch_size}, lr {args.lr}, tokens {args.token_lr}"
        notes = f"Trained from {what}, seed {args.seed}. Threshold: {made}."
        model.save_pretrained(args.out, model_card_kwargs=dict(notes=notes))
        value = f"{model.threshold['value']:.4f}, " if model.threshold else ""
        print(f"{args.out}: model.safetensors and its card; threshold {value}{made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
