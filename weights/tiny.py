"""Trains the bundled model from nothing on procedural pictures, or writes some of them as a dataset.

No photograph and no downloaded weight is used; a picture is a function of (SEED, split, index) alone.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))  # this script lies beside the module, not in it
from train import loss_terms  # noqa: E402
from visualad import BACKBONES, Output, VisualAD, find_device, write_atomic  # noqa: E402
from weights.pictures import REPORT, SELECT, TRAIN, sample  # noqa: E402

EXAMPLES = """python weights/tiny.py --out runs/tiny --resume      # train; go on if it was interrupted
       python weights/tiny.py --write runs/drawn --split report    # for evaluate.py --data runs/drawn"""
SEED = 111
SIZES, SHARE = (160, 224), 0.7  # px, and the images' share of the smaller ones, which are twice as fast
WARM_UP = 500  # steps to the full rate, which stays as long as the size and then falls to nothing
KEEP = 500  # steps from one saved state to the next
SCALE = 8.0  # of map values in the loss: plain cosine differences saturate the sigmoid late
DENSE, DEFECT = 4.0, 4.0  # weights of the added cross-entropy and, in it, of a defective pixel
AVERAGE = 0.999  # how much of the average of the weights a step keeps
# On a CPU the fused attention's backward pass is slow at this size, and so are products in fp32.
ATTENTION = ([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], [SDPBackend.MATH])


class Pictures(Dataset):
    """Pictures of one split, [3, size, size] in [0, 1], and masks; the smaller size below index `small`."""

    def __init__(self, split: int, indices: range, small: int = 0):
        self.split, self.indices, self.small = split, indices, small

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        index = self.indices[i]
        rng, size = np.random.default_rng([SEED, self.split, index]), SIZES[index >= self.small]
        image, mask, _ = sample(rng, size, self.split)
        return torch.from_numpy(image).permute(2, 0, 1).float() / 255, torch.from_numpy(mask)


def loss(out: Output, mask: Tensor) -> Tensor:
    """The paper's loss, its map values multiplied by SCALE, and the cross-entropy of every pixel: a backbone
    that starts from nothing learns faster with a plain gradient beside those of focal and dice."""
    out = Output(*(t.float() for t in out))
    out = out._replace(score=SCALE * out.score, layer_maps=SCALE * out.layer_maps)
    paper = loss_terms(out, mask.float(), mask.flatten(1).any(dim=1).float())["total"]
    truth, weight = mask[:, None].float().expand_as(out.layer_maps), torch.tensor(DEFECT, device=mask.device)
    return paper + DENSE * F.binary_cross_entropy_with_logits(out.layer_maps, truth, pos_weight=weight)


@torch.no_grad()
def mimic(model: VisualAD) -> None:
    """Attention starts half way to what trained ViTs come to: q^T k near 0.7 of the identity (as far as a
    head's rank goes), so that a patch looks at its likes, and proj v near -0.4 of it, which takes their mean
    away and leaves what is odd. The form and both figures are from Trockman and Kolter, "Mimetic
    initialization of self-attention layers", ICML 2023; why it suits anomalies is ours."""
    D, heads = BACKBONES["tiny"].width, BACKBONES["tiny"].heads
    for block in model.backbone.blocks:
        q, k, v = block.qkv.weight.chunk(3)
        u, s, vh = torch.linalg.svd(0.4 * torch.randn(D, D) / D**0.5 - 0.4 * torch.eye(D))
        v.copy_(s.sqrt()[:, None] * vh)
        block.proj.weight.copy_(u * s.sqrt())
        for rows_q, rows_k in zip(q.chunk(heads), k.chunk(heads), strict=True):
            u, s, vh = torch.linalg.svd(0.7 * torch.randn(D, D) / D**0.5 + 0.7 * torch.eye(D))
            rows_q.copy_((u * s.sqrt()).T[: D // heads])
            rows_k.copy_((s.sqrt()[:, None] * vh)[: D // heads])


def train(images: int, batch: int, lr: float, workers: int, state: Path | None = None) -> VisualAD:
    """All of the model from nothing, each picture once; returns the average of the last steps' weights.
    state: file that keeps the training and that it goes on from; ValueError where it is of another one."""
    total, device = max(images // batch, 1), find_device()
    first = int(SHARE * total)
    torch.manual_seed(SEED)
    model = VisualAD("tiny")
    mimic(model)
    model.to(device).requires_grad_(True).eval()  # no dropout: no picture is ever seen twice
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = dict(params=[p for p in model.parameters() if p.ndim <= 1], weight_decay=0.0)
    optimizer = torch.optim.AdamW([dict(params=matrices), vectors], lr, weight_decay=0.05)
    parts, done = dict(model=model, average=average, optimizer=optimizer), 0
    digest = hashlib.sha256(Path(__file__).with_name("pictures.py").read_bytes()).hexdigest()
    settings = dict(images=images, batch=batch, lr=lr, pictures=digest)
    if state and state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["settings"] != settings:
            raise ValueError(f"{state} is of another training, {saved['settings']}, not {settings}")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done = saved["step"]
    drawn = Pictures(TRAIN, range(done * batch, total * batch), first * batch)
    loader = DataLoader(drawn, batch, num_workers=workers)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    began, running = time.time(), 0.0
    for step, (x, mask) in enumerate(loader, done + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / WARM_UP, 1.0, (total - step + 1) / (total - first))
        with torch.autocast(device, torch.bfloat16), sdpa_kernel(ATTENTION[device == "cpu"]):
            out = model(x.to(device))
        value = loss(out, mask.to(device))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        running += (value.item() - running) / min(step - done, 100)
        if step % 100 == 0:
            rate = (step - done) * batch / (time.time() - began)
            print(f"{step * batch:7d} images  loss {running:.4f}  {rate:.0f} images/s", flush=True)
        if state and step % KEEP == 0:
            buffer = io.BytesIO()
            kept = {name: part.state_dict() for name, part in parts.items()}
            torch.save(dict(kept, settings=settings, step=step), buffer)
            write_atomic(state, buffer.getvalue())
    return average.module


def decide(model: VisualAD, count: int = 2000) -> None:
    """A threshold that at most 5 % of held-out normal pictures are above."""
    normal = (image for image, mask in Pictures(SELECT, range(count)) if not mask.any())
    model.calibrate(normal, 0.95, batch_size=25)


def write(folder: Path, split: int, count: int) -> None:
    """The first pictures of a split as a dataset of one class in MVTec-AD's layout."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: its files would be measured too")
    for i in range(count):
        image, mask, kind = sample(np.random.default_rng([SEED, split, i]), SIZES[-1], split)
        files = {folder / "drawn/test" / kind / f"{i:05d}.png": image}
        if mask.any():
            files[folder / "drawn/ground_truth" / kind / f"{i:05d}_mask.png"] = mask
        for path, pixels in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(usage=EXAMPLES, description=__doc__)
    add = parser.add_argument
    add("--images", type=int, help="how many to train on (200,000) or to write (2,000)")
    add("--batch", type=int, default=8, help="images a step (%(default)s)")
    add("--lr", type=float, default=1e-3, help="the full rate (%(default)s)")
    add("--workers", type=int, default=1, help="processes that draw (%(default)s)")
    add("--out", type=Path, default=Path("runs/tiny"), help="folder of tiny.safetensors (%(default)s)")
    add("--resume", action="store_true", help="keep tiny.state in --out, and go on from it")
    add("--write", type=Path, metavar="FOLDER", help="write pictures there instead of training")
    add("--split", choices=("select", "report"), default="report", help="of --write (%(default)s)")
    args = parser.parse_args(arguments)
    # Before torch starts its threads: some processors take ten times as long over numbers near 1e-40.
    torch.set_flush_denormal(True)
    try:
        if args.write:
            write(args.write, dict(select=SELECT, report=REPORT)[args.split], args.images or 2000)
            return
        args.out.mkdir(parents=True, exist_ok=True)
        state = args.out / "tiny.state" if args.resume else None
        model = train(args.images or 200_000, args.batch, args.lr, args.workers, state)
        decide(model)
        # The final norm was trained as the backbone's own, which is otherwise unused.
        model.backbone.norm.load_state_dict(model.norm.state_dict())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            write_atomic(args.out / "tiny.safetensors", (Path(folder) / "model.safetensors").read_bytes())
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
