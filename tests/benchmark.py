"""Speed and memory as ratios within one run: python tests/benchmark.py [--only NAME ...]

Rates are FLOPs of the model's matrix products, counted by torch, over time, against plain products of the
model's own shapes right before and after. Weights are random: they do not matter here. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from evaluate import PixelHistogram  # noqa: E402
from visualad import VisualAD, find_device, main, upsample  # noqa: E402


def seconds(function, repeat: int = 3) -> float:
    """The fastest of a few runs, after one that warms up, each until the device is done."""

    def run() -> float:
        start = time.perf_counter()
        function()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start

    run()
    return min(run() for _ in range(repeat))


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the four products of a ViT-L block at 518 px: 1372 rows, width 1024."""
    rows, width = 1372, 1024
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    options = dict(device=device, dtype=dtype)
    pairs = [(torch.randn(rows, a, **options), torch.randn(a, b, **options)) for a, b in shapes]
    flops = sum(2 * rows * a * b for a, b in shapes)
    return 5 * flops / seconds(lambda: [a @ b for _ in range(5) for a, b in pairs])


@torch.no_grad()
def inference(dtype: torch.dtype, device: str) -> None:
    """clip-vit-l14-336 at 518 px against the machine's own matrix-multiply rate."""
    model = VisualAD("clip-vit-l14-336").to(device).eval()
    for name, parameter in model.backbone.named_parameters():
        parameter.data = parameter.data if name.startswith("norm.") else parameter.data.to(dtype)
    images = torch.rand(1, 3, 518, 518, device=device)
    # torch counts no FLOPs in the CPU's fused attention: count with the plain one
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.infer(images)
    flops, before = counter.get_total_flops(), matmul_rate(dtype, device)
    took = seconds(lambda: model.infer(images))
    rate, reached = max(before, matmul_rate(dtype, device)), flops / took
    print(
        f"clip-vit-l14-336, 518 px, {str(dtype)[6:]}, {device}: {took:.2f} s an image, "
        f"{reached / 1e9:.0f} GFLOP/s; matmul {rate / 1e9:.0f} GFLOP/s; ratio {reached / rate:.2f}"
    )


def end_to_end(_dtype: torch.dtype, device: str) -> None:
    """tiny on 518 px files: decoding, scoring, heatmaps written."""
    from PIL import Image

    rng, count = np.random.default_rng(0), 64
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            pixels = rng.integers(0, 255, (65, 65, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((518, 518), Image.BICUBIC).save(f"{folder}/{i}.png")
        arguments = [folder, "--out", f"{folder}/out", "--device", device]
        start = time.perf_counter()
        command = [sys.executable, str(ROOT / "visualad.py"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        whole = time.perf_counter() - start
        model, files = VisualAD.from_pretrained("tiny", device=device), sorted(Path(folder).glob("*.png"))
        predict = count / seconds(lambda: model.predict(files))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            scored = count / seconds(lambda: main(arguments))
    print(
        f"tiny, {count} PNG files of 518 px, {device}: predict {predict:.0f} images/s; with heatmaps written "
        f"{scored:.0f} images/s; the whole command, start included, {whole:.1f} s"
    )


@torch.no_grad()
def pixel_metrics(_dtype: torch.dtype, device: str) -> None:
    """evaluate.py's four pixel metrics, regions included, against scikit-learn's three and a forward pass."""
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    def field(side: int) -> torch.Tensor:
        return upsample(torch.randn(83, 1, side, side, device=device), (518, 518))[:, 0]

    masks = field(20) > 1.6
    maps = 0.5 * field(37) + 0.3 * masks

    def histogram() -> PixelHistogram:
        seen = PixelHistogram(-8, 8, device=device)
        for part, mask in zip(maps.split(8), masks.split(8), strict=True):
            seen.update(part, mask)
        return seen

    ours = seconds(lambda: histogram().metrics())
    truth, values = (x.flatten().cpu().numpy() for x in (masks, maps))
    start = time.perf_counter()
    expected = roc_auc_score(truth, values), average_precision_score(truth, values)
    precision_recall_curve(truth, values)
    theirs, found = time.perf_counter() - start, histogram().metrics()
    error = max(abs(found["auroc"] - expected[0]), abs(found["ap"] - expected[1]))
    print(
        f"pixel metrics of 83 maps of 518 px, {device}: {ours:.2f} s, AUPRO included; "
        f"scikit-learn without it {theirs:.1f} s; ratio {theirs / ours:.0f}; largest difference {error:.0e}"
    )
    model = VisualAD("clip-vit-l14-336").to(device).eval()
    for name, parameter in model.backbone.named_parameters():
        parameter.data = parameter.data if name.startswith("norm.") else parameter.data.bfloat16()
    images, seen = torch.rand(8, 3, 518, 518, device=device), PixelHistogram(-8, 8, device=device)
    forward = seconds(lambda: model.infer(images), 1)
    update = seconds(lambda: seen.update(maps[:8], masks[:8]))
    print(
        f"histograms and regions of 8 maps, {device}: {update / forward:.2%} of their bf16 L/14 forward pass"
    )


def training(_dtype: torch.dtype, device: str) -> None:
    """train.py's step of clip-vit-l14-336 at 518 px against the same step in plain fp32, focal by one-hot."""
    batch = 4 if device == "cpu" else 8  # 8 in fp32 need 23 GB
    torch.manual_seed(0)
    model = VisualAD("clip-vit-l14-336").to(device).train()
    images, labels = torch.rand(batch, 3, 518, 518, device=device), torch.ones(batch, device=device)
    masks = (torch.rand(batch, 518, 518, device=device) > 0.95).float()
    optimizer = torch.optim.AdamW(train.param_groups(model), weight_decay=0.01)

    def ours() -> None:
        with train.backbone_in(model, torch.bfloat16):
            train.step(model, optimizer, (images, masks, labels), (batch, batch))

    def plain() -> None:
        output = model(images)
        terms = train.loss_terms(output._replace(layer_maps=output.layer_maps[:, :0]), masks, labels)
        total = terms["image"] + terms["token"]
        for layer in output.layer_maps.unbind(1):
            probability = torch.stack([1 - layer.sigmoid(), layer.sigmoid()], dim=1)
            target = F.one_hot(masks.long(), 2).movedim(-1, 1).float().clamp(1e-5, 1 - 1e-5)
            p = (target * probability).sum(dim=1) + 1e-5
            q, both = layer.sigmoid(), layer.sigmoid().sum(dim=(1, 2)) + masks.sum(dim=(1, 2))
            dice = 1 - ((2 * (q * masks).sum(dim=(1, 2)) + 1) / (both + 1)).mean()
            total = total - ((1 - p) ** 2 * p.log()).mean() + dice
        total.backward()
        train.clip_tokens(model)
        optimizer.step()
        optimizer.zero_grad()

    took, peaks = [], []
    for function in (plain, ours):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took.append(seconds(function, 1))
        peaks.append(torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None)
    memory = f"; peak {peaks[0]:.1f} and {peaks[1]:.1f} GiB" if device == "cuda" else ""
    print(
        f"training step, clip-vit-l14-336, 518 px, batch {batch}, {device}: plain fp32 {batch / took[0]:.3f} "
        f"images/s, train.py in bf16 {batch / took[1]:.3f}; ratio {took[0] / took[1]:.2f}{memory}"
    )


def memory(dtype: torch.dtype, device: str) -> None:
    """The peak of one image above the weights, in a process of its own; on CUDA the allocator's peak."""
    code = f"""
import resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from visualad import VisualAD
model = VisualAD("clip-vit-l14-336").to({device!r}).eval()
for name, parameter in model.backbone.named_parameters():
    parameter.data = parameter.data if name.startswith("norm.") else parameter.data.to({dtype})
weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
images = torch.rand(1, 3, 518, 518, device={device!r})
if {device!r} == "cuda":
    torch.cuda.reset_peak_memory_stats()
    model.infer(images)
    print(weights, torch.cuda.max_memory_allocated() / 2**20 - weights)
else:
    import threading, time
    page, base, peak, done = resource.getpagesize(), None, 0, False
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * page / 2**20
    def watch():
        global peak
        while not done:
            peak = max(peak, resident())
            time.sleep(0.002)
    base = resident()
    thread = threading.Thread(target=watch)
    thread.start()
    model.infer(images)
    done = True
    thread.join()
    print(weights, peak - base)
"""
    weights, extra = map(float, subprocess.check_output([sys.executable, "-c", code]).split())
    print(
        f"clip-vit-l14-336, one image of 518 px, {str(dtype)[6:]}, {device}: weights {weights:.0f} MiB, "
        f"peak {extra:.0f} MiB above"
    )


if __name__ == "__main__":
    parts = dict(inference=inference, end_to_end=end_to_end, pixel_metrics=pixel_metrics)
    parts |= dict(training=training, memory=memory)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    only, device = parser.parse_args().only, find_device()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, device {device}", flush=True)
    for name in only:
        for dtype in (torch.float32, torch.bfloat16) if name in ("inference", "memory") else (torch.float32,):
            parts[name](dtype, device)
            sys.stdout.flush()
