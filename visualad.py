"""VisualAD in one file: zero-shot visual anomaly detection with two learned tokens in a frozen ViT.

    model = VisualAD.from_pretrained("tiny")       # or a Hugging Face repo, a folder, a file
    result = model.predict("photo.jpg")            # result.score, result.map [H, W], result.anomalous
    out = model(images)                            # images [B, 3, H, W], RGB in [0, 1] -> out.map, out.score

Paper: Hou et al., "VisualAD: Language-Free Zero-Shot Anomaly Detection via Vision Transformer", CVPR 2026,
arXiv:2603.07952. Where the paper and the authors' program differ, this file does what the program does.

 1 backbones as data   2 the frozen ViT   3 SCA and SAF   4 the network   5 scoring   (the method: torch only)
 6 weights   7 images   8 VisualAD: load, predict, save   9 command line                (may be cut off)

 B images   H W pixels   h w patch rows, columns   N = h * w patches   D width   K anchors   L tapped layers
 S = P + N sequence, P prefix tokens [t_a, t_n, cls, registers]; layers are counted from 1, as in the paper
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.hub import tqdm  # the package's own, which comes with huggingface_hub

if TYPE_CHECKING:
    import numpy as np

Taps = tuple[int, ...] | None  # layers; None: the backbone's own
Weights = str | os.PathLike | Mapping[str, Any]  # a file or folder, or a state dict


# --- 1. backbones as data --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Backbone:
    """What tells one vision transformer from another. The defaults are DINOv2's."""

    width: int
    depth: int
    heads: int
    patch: int
    grid: int = 0  # positions were trained on grid x grid patches; 0: there is no table, they are rotary
    registers: int = 0
    hidden: int | None = None  # of the MLP; None: 4 * width
    activation: str = "gelu"  # a key of ACTIVATIONS
    eps: float = 1e-6  # of every LayerNorm
    pre_norm: bool = False  # a norm before the first block
    patch_bias: bool = True
    layer_scale: bool = True
    stem: tuple[int, ...] = ()  # widths of convolutions before the patch projection; a rise halves the image
    resample: str = "bicubic"  # of positions to another grid: bilinear, bicubic or bicubic-antialias
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    image_size: int = 518  # network input in pixels, rounded down to a multiple of the patch
    sigma: float = 4.0  # of the smoothing at test time, in pixels of the input
    layers: tuple[int, ...] = ()  # tapped blocks; (): at each quarter of the depth; a `replace` keeps them
    repo: str | None = None  # on Hugging Face; None: hosted nowhere
    file: str = "model.safetensors"

    def __post_init__(self) -> None:
        quarters = sorted({math.ceil(self.depth * i / 4) for i in (1, 2, 3, 4)})
        object.__setattr__(self, "layers", tuple(self.layers or quarters))

    @classmethod
    def from_weights(cls, weights: Weights, **overrides: Any) -> Backbone:
        """An unlisted backbone by its file, folder or state dict, as section 6 reads it."""
        return cls(**read_fields(weights) | overrides)


CLIP = dict(activation="quick_gelu", eps=1e-5, pre_norm=True, patch_bias=False, layer_scale=False,
            resample="bilinear", mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711))  # fmt: skip
DINOV2, GATED = dict(patch=14, grid=37), dict(activation="swiglu")
REG, DINOV3 = dict(registers=4, resample="bicubic-antialias"), dict(patch=16, registers=4, eps=1e-5)
PLUS = DINOV3 | GATED
BACKBONES = {
    "tiny": Backbone(128, 3, 2, 8, 28, stem=(32, *[64] * 4, *[128] * 4), layer_scale=False, image_size=224,
                     sigma=1.7, layers=(1, 3)),
    "clip-vit-b32": Backbone(768, 12, 12, 32, 7, **CLIP, repo="openai/clip-vit-base-patch32"),
    "clip-vit-b16": Backbone(768, 12, 12, 16, 14, **CLIP, repo="openai/clip-vit-base-patch16"),
    "clip-vit-l14": Backbone(1024, 24, 16, 14, 16, **CLIP, repo="openai/clip-vit-large-patch14"),
    "clip-vit-l14-336": Backbone(1024, 24, 16, 14, 24, **CLIP, file="open_clip_model.safetensors",
                                 repo="timm/vit_large_patch14_clip_336.openai"),
    "dinov2-vit-s14": Backbone(384, 12, 6, **DINOV2, repo="facebook/dinov2-small"),
    "dinov2-vit-b14": Backbone(768, 12, 12, **DINOV2, repo="facebook/dinov2-base"),
    "dinov2-vit-l14": Backbone(1024, 24, 16, **DINOV2, repo="facebook/dinov2-large"),
    "dinov2-vit-g14": Backbone(1536, 40, 24, **DINOV2, **GATED, hidden=4096, repo="facebook/dinov2-giant"),
    "dinov3-vit-s16": Backbone(384, 12, 6, **DINOV3, repo="timm/vit_small_patch16_dinov3.lvd1689m"),
    "dinov3-vit-s16plus": Backbone(384, 12, 6, **PLUS, repo="timm/vit_small_plus_patch16_dinov3.lvd1689m"),
    "dinov3-vit-b16": Backbone(768, 12, 12, **DINOV3, repo="timm/vit_base_patch16_dinov3.lvd1689m"),
    "dinov3-vit-l16": Backbone(1024, 24, 16, **DINOV3, repo="timm/vit_large_patch16_dinov3.lvd1689m"),
    "dinov3-vit-h16plus": Backbone(1280, 32, 20, **PLUS, repo="timm/vit_huge_plus_patch16_dinov3.lvd1689m"),
}  # fmt: skip
for _name in [name for name in BACKBONES if name.startswith("dinov2")]:
    _repo = BACKBONES[_name].repo.replace("dinov2-", "dinov2-with-registers-")
    BACKBONES[f"{_name}-reg"] = replace(BACKBONES[_name], **REG, repo=_repo)


# --- 2. the frozen ViT -----------------------------------------------------------------------------------
ACTIVATIONS = {  # the function, and how many values it makes one of
    "gelu": (F.gelu, 1),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), 1),
    "swiglu": (lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :], 2),
}


def resample(table: Tensor, size: tuple[int, int], mode: str) -> Tensor:  # [g, g, D] -> [h * w, D]
    """A table of positions read at another grid; at its own, but for a compiler, it stays as it is."""
    if torch.compiler.is_compiling() or table.shape[:2] != size:
        mode, _, antialias = mode.partition("-")
        x = F.interpolate(table.float().permute(2, 0, 1)[None], size, mode=mode, antialias=bool(antialias))
        table = x[0].permute(1, 2, 0).to(table.dtype)
    return table.flatten(0, 1)


def rotary(size: tuple[int, int], dim: int, device: torch.device) -> Tensor:  # (h, w) -> [2, N, dim]
    """Cosine and sine of DINOv3's angles: by each patch's centre, row then column, both in [-1, 1]."""
    at = [(torch.arange(n, device=device).float() + 0.5) / n * 2 - 1 for n in size]
    at = torch.stack(torch.meshgrid(*at, indexing="ij"), dim=-1).flatten(0, 1)  # [N, 2]
    periods = 100 ** (torch.arange(dim // 4, device=device).float() / (dim // 4))
    angles = (2 * math.pi * at[..., None] / periods).flatten(1).tile(2)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turn: Tensor) -> Tensor:  # [B, heads, S, dim], of which the last N, the patches, turn
    x, patches = x[..., : -turn.shape[1], :], x[..., -turn.shape[1] :, :]
    a, b = patches.chunk(2, dim=-1)
    patches = patches * turn[0] + torch.cat([-b, a], dim=-1) * turn[1]
    return torch.cat([x, patches.to(x.dtype)], dim=-2)


class PatchEmbed(nn.Module):
    """A linear map of each patch; where there is a stem, its convolutions see the image first."""

    def __init__(self, cfg: Backbone):
        super().__init__()
        stem, pairs = [], [*zip((3, *cfg.stem), cfg.stem, strict=False)]
        for a, b in pairs:
            # Each image's own channel statistics: what is odd within ONE image is what a detector looks for.
            stem += [nn.Conv2d(a, b, 3, 1 + (a < b), 1), nn.InstanceNorm2d(b, affine=True), nn.GELU()]
        self.stem, side = nn.Sequential(*stem), cfg.patch // 2 ** sum(a < b for a, b in pairs)
        self.proj = nn.Conv2d((3, *cfg.stem)[-1], cfg.width, side, side, bias=cfg.patch_bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, N, D]
        return self.proj(self.stem(x)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, cfg: Backbone):
        super().__init__()
        D, hidden = cfg.width, cfg.hidden or 4 * cfg.width
        self.heads, self.activation = cfg.heads, cfg.activation  # the name: a lambda cannot be pickled
        self.norm1, self.norm2 = nn.LayerNorm(D, cfg.eps), nn.LayerNorm(D, cfg.eps)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.fc1, self.fc2 = nn.Linear(D, hidden * ACTIVATIONS[cfg.activation][1]), nn.Linear(hidden, D)
        self.ls1, self.ls2 = (nn.Parameter(torch.ones(D)) if cfg.layer_scale else None for _ in range(2))

    def forward(self, x: Tensor, turn: Tensor | None = None) -> Tensor:  # [B, S, D] -> [B, S, D]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if plain and x.is_cpu and x.dtype == torch.bfloat16:
            # The fused kernel gains nothing from bf16 here; two heads at a time, in cache, are twice as fast.
            heads = zip(*(t.flatten(0, 1).split(2) for t in (q * q.shape[-1] ** -0.5, k, v)), strict=True)
            y = torch.cat([(a @ b.transpose(1, 2)).softmax(dim=-1) @ c for a, b, c in heads]).view_as(q)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(y.transpose(1, 2).flatten(2))
        x = x + (y if self.ls1 is None else self.ls1 * y)
        y = self.fc2(ACTIVATIONS[self.activation][0](self.fc1(self.norm2(x))))
        return x + (y if self.ls2 is None else self.ls2 * y)


class ViT(nn.Module):
    """The plain vision transformer behind every `Backbone`."""

    def __init__(self, cfg: Backbone):
        super().__init__()
        if cfg.heads < 1 or cfg.width % cfg.heads or cfg.activation not in ACTIVATIONS:
            raise ValueError(f"heads must divide the width, activation be of {[*ACTIVATIONS]}; got {cfg}")
        self.cfg, self.patch_embed = cfg, PatchEmbed(cfg)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, cfg.width))
        if cfg.grid:
            self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + cfg.grid**2, cfg.width))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, cfg.registers, cfg.width))
        self.norm_pre = nn.LayerNorm(cfg.width, cfg.eps) if cfg.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, cfg.eps)

    def forward(
        self, x: Tensor, guests: Tensor | None = None, layers: Taps = None, norm: nn.Module | None = None
    ) -> dict[int, Tensor]:
        """Normalised images [B, 3, H, W] -> {layer: [B, S, D]} for some layers (None: its taps) and the last,
        after the final norm (or `norm`). guests [G, D] ride before the class token, at its position."""
        cfg, norm, turn = self.cfg, norm or self.norm, None
        wanted = {*(cfg.layers if layers is None else layers), cfg.depth}
        size = x.shape[-2] // cfg.patch, x.shape[-1] // cfg.patch
        prefix, x = self.cls_token[0], self.patch_embed(x.to(self.cls_token.dtype))  # [1, D], [B, N, D]
        prefix = prefix if guests is None else torch.cat([guests.to(prefix.dtype), prefix])
        if cfg.grid:
            positions = self.pos_embed[0, 1:].unflatten(0, (cfg.grid, cfg.grid))
            prefix, x = prefix + self.pos_embed[0, :1], x + resample(positions, size, cfg.resample)
        else:
            turn = rotary(size, cfg.width // cfg.heads, x.device)
        prefix = torch.cat([prefix, self.register_tokens[0]])  # [P, D]; registers have no position
        z, out = self.norm_pre(torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)), {}
        for layer, block in enumerate(self.blocks, 1):
            z = block(z, turn)
            if layer in wanted:
                out[layer] = norm(z.to(norm.weight.dtype))
        return out


# --- 3. SCA and SAF --------------------------------------------------------------------------------------
class SCA(nn.Module):
    """Spatial-aware cross-attention: anchors look the patches over, a token takes what its gate lets in."""

    def __init__(self, width: int, anchors: int, grid: int, dropout: float = 0.1):
        super().__init__()
        self.anchors = nn.Parameter(0.02 * torch.randn(anchors, width))
        self.pos = nn.Parameter(0.02 * torch.randn(grid, grid, width))
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gate, self.out = nn.Linear(width, anchors), nn.Linear(width, width)
        self.alpha, self.dropout = nn.Parameter(torch.tensor([0.01])), dropout
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, patches: Tensor, size: tuple[int, int], drop: bool = False) -> Tensor:
        """tokens [B, 2, D], patches [B, N, D], size (h, w) -> sharpened tokens [B, 2, D]."""
        q = self.norm_q(self.q(self.anchors))  # [K, D]
        k = self.norm_k(self.k(patches + resample(self.pos, size, "bilinear")))  # [B, N, D]
        attention = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)  # [B, K, N]
        attention = F.dropout(attention.repeat(1, 2, 1), self.dropout, drop)  # [B, 2K, N]: a mask per token
        # The program makes values of all N patches, then averages; averaging first is the same sum for less.
        u = self.v(attention @ patches).unflatten(1, (2, -1))  # [B, 2, K, D]
        gate = self.gate(tokens).sigmoid()[..., None]  # [B, 2, K, 1]
        update = self.out((gate * u).sum(dim=2))  # [B, 2, D]
        return tokens + self.alpha * F.dropout(update, self.dropout, drop)


class SAF(nn.Module):
    """The MLP that realigns frozen patches with the learned tokens: no residual, no norm."""

    def __init__(self, width: int, dropout: float = 0.1):
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(width, width), nn.Linear(width, width), dropout
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, patches: Tensor, drop: bool = False) -> Tensor:  # [B, N, D] -> [B, N, D]
        x = F.dropout(F.gelu(self.fc1(patches)), self.dropout, drop)
        return F.dropout(self.fc2(x), self.dropout, drop)


# --- 4. the network --------------------------------------------------------------------------------------
class Output(NamedTuple):
    map: Tensor  # [B, H, W] in [-2L, 2L], the sum of layer_maps, not smoothed; 0: as close to either token
    score: Tensor  # [B], mean of the brightest 1 % of this map
    layer_maps: Tensor  # [B, L, H, W] in [-2, 2]
    tokens: Tensor  # [B, 2, D], anomaly and normal, after the last layer's SCA


class VisualADNet(nn.Module):
    """Two learned tokens in a frozen ViT, one SCA and one SAF per tapped layer; random until loaded.
    backbone: a name in `BACKBONES` or a `Backbone`. layers: the tapped blocks; None: the backbone's own.
    image_size: side in pixels that SCA learns positions at, a multiple of the patch; 0: the backbone's."""

    def __init__(self, backbone: str | Backbone, layers: Taps = None, anchors: int = 4, image_size: int = 0):
        super().__init__()
        cfg = BACKBONES.get(backbone) if isinstance(backbone, str) else backbone
        if not isinstance(cfg, Backbone):
            raise ValueError(f"unknown backbone {backbone!r}; known: {', '.join(BACKBONES)}")
        self.layers, self.anchors = tuple(sorted(set(cfg.layers if layers is None else layers))), anchors
        if not self.layers or self.layers[0] < 1 or self.layers[-1] > cfg.depth:
            raise ValueError(f"tapped layers must lie in 1..{cfg.depth}, got {list(self.layers)}")
        self.image_size = image_size or cfg.image_size // cfg.patch * cfg.patch
        grid, _ = patch_grid((self.image_size, self.image_size), cfg.patch)
        self.sigma = cfg.sigma
        self.backbone = ViT(cfg).requires_grad_(False)
        self.norm = nn.LayerNorm(cfg.width, cfg.eps)  # used for the backbone's own: trained, or a copy
        self.tokens = nn.Parameter(0.1 / math.sqrt(cfg.width) * torch.randn(2, cfg.width))  # anomaly, normal
        self.sca = nn.ModuleDict({str(layer): SCA(cfg.width, anchors, grid) for layer in self.layers})
        self.saf = nn.ModuleDict({str(layer): SAF(cfg.width) for layer in self.layers})
        for name, value in (("mean", cfg.mean), ("std", cfg.std)):  # on the CPU: real in a meta model too
            self.register_buffer(name, torch.tensor(value, device="cpu").view(3, 1, 1), persistent=False)

    def patch_maps(self, images: Tensor, drop: bool = False) -> tuple[Tensor, Tensor]:
        """RGB [B, 3, H, W] in [0, 1] -> maps on the patch grid [B, L, h, w], last SCA's tokens [B, 2, D]."""
        shape, got = list(getattr(images, "shape", ())), getattr(images, "dtype", type(images).__name__)
        if len(shape) != 4 or shape[1] != 3 or 0 in shape or not getattr(got, "is_floating_point", False):
            raise ValueError(f"images must be a float tensor [B, 3, H, W], RGB in [0, 1]; got {got} {shape}")
        h, w = patch_grid(shape[2:], self.backbone.cfg.patch)
        images = (images - self.mean.to(images.device)) / self.std.to(images.device)
        z = self.backbone(images, self.tokens, self.layers, self.norm)
        last, maps = z[self.backbone.cfg.depth][:, :2], []  # [B, 2, D], the tokens after the last block
        for layer in self.layers:
            p = z[layer][:, -h * w :]  # [B, N, D]
            t = self.sca[str(layer)](last, p, (h, w), drop)  # [B, 2, D]
            p, u = F.normalize(self.saf[str(layer)](p, drop), dim=-1), F.normalize(t, dim=-1)
            maps.append((p @ (u[:, 0] - u[:, 1])[..., None]).view(-1, h, w))  # cos(p, t_a) - cos(p, t_n)
        return torch.stack(maps, dim=1), t

    def forward(self, images: Tensor) -> Output:
        """RGB [B, 3, H, W] in [0, 1], H and W multiples of the patch -> `Output`, map not smoothed. Raises
        ValueError for another shape or dtype; values are not looked at: that would stall the device."""
        maps, tokens = self.patch_maps(images, self.training)
        layer_maps = upsample(maps, images.shape[-2:])
        fused = layer_maps.sum(dim=1)
        return Output(fused, image_score(fused), layer_maps, tokens)

    @torch.no_grad()
    def infer(self, images: Tensor, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        """The test-time path, without dropout: images as for `forward` -> smoothed map [B, H, W], score [B].
        sigma: of the Gaussian, in pixels of the input; None: the model's. Raises ValueError."""
        maps, _ = self.patch_maps(images)
        # Sum and bilinear resampling are linear: upsampling the summed small map gives forward's map.
        fused = upsample(maps.float().sum(dim=1, keepdim=True), images.shape[-2:])[:, 0]
        fused = smooth(fused, self.sigma if sigma is None else sigma)
        return fused, image_score(fused)


def patch_grid(size: Sequence[int], patch: int) -> tuple[int, int]:  # (H, W) -> (h, w)
    for side in size:
        if side != (low := max(side // patch, 1) * patch):
            raise ValueError(f"sides must be multiples of {patch} px, got {side}; near: {low}, {low + patch}")
    return size[0] // patch, size[1] // patch


# --- 5. scoring ------------------------------------------------------------------------------------------
def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:  # [B, L, h, w] -> [B, L, H, W]
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def image_score(maps: Tensor) -> Tensor:  # [B, H, W] -> [B]
    """Mean of the brightest 1 % of each map's pixels."""
    k = (maps.shape[-2] * maps.shape[-1] + 99) // 100  # rounded up; ONNX would cut -(-n // 100) instead
    return maps.flatten(1).topk(k, sorted=False).values.mean(dim=1)


def smooth(maps: Tensor, sigma: float) -> Tensor:  # [B, H, W] -> [B, H, W]
    """Gaussian of sigma pixels, as scipy.ndimage.gaussian_filter with its defaults; 0: none."""
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be a finite number of pixels >= 0, got {sigma}")
    radius, blur = int(4 * sigma + 0.5), []
    offsets = torch.arange(-radius, radius + 1, device="cpu")
    weights = torch.softmax(-0.5 * (offsets.double() / (sigma or 1)) ** 2, dim=0)  # 0: one offset, no change
    for n in maps.shape[-2:]:  # rows, then columns: the Gaussian on n pixels as a matrix [n, n]
        row = torch.arange(n, device="cpu")
        pixel = (row[:, None] + offsets) % (2 * row[-1] + 2)  # by a tensor: ONNX has no other way
        pixel = torch.minimum(pixel, 2 * row[-1] + 1 - pixel)  # scipy's 'reflect' repeats the border pixel
        matrix = torch.zeros(n, n, dtype=torch.double, device="cpu")
        blur.append(matrix.scatter_add(1, pixel, weights.expand(n, -1)).to(maps))
    with torch.autocast(maps.device.type, enabled=False):  # the caller's would round the map to 8 bits
        return blur[0] @ maps @ blur[1].transpose(0, 1)


# --- 6. weights ------------------------------------------------------------------------------------------
torch.utils._pytree._register_namedtuple(Output, serialized_type_name="visualad.Output")  # torch.export.save
HOST = "https://media.githubusercontent.com/media/7HHHHH/VisualAD/8479132d641456345019aed1c8bb6b2d11941068"
PRETRAINED = {  # name -> sha256 of the authors' checkpoint; None: bundled with this file
    "tiny": None,
    "clip-vit-l14-336-visa": "fed8ed5e0973e9adb53a2c91e066eb5ba3f9a42fbf80f115a26998629d1f0a5b",
    "clip-vit-l14-336-mvtec": "596f3ed0c0cfe78a314b41fc42a8adfc26b86ab1928f058ce256135cb407b32c",
}
OFFICIAL_NAMES = {  # what stands in the names of the authors' tensors, and in ours
    "cross_attn.layer_attentions.layer_": "sca.", "anchor_queries": "anchors", "pos_encoding": "pos",
    "res_scale": "alpha", "_proj": "", "q_norm": "norm_q", "k_norm": "norm_k", "gate.0": "gate",
    "layer_transforms.layer_": "saf.", "mlp.0": "fc1", "mlp.3": "fc2", "ln_post_": "norm.",
}  # fmt: skip
# How OpenAI, open_clip, Hugging Face, Meta and timm spell our names, to be replaced in this order once what
# stands before all names of the one ViT is cut off. DROPPED is left out on purpose.
CLS = r"(?:embeddings\.)?(?:class_embedding|cls_token)"
DROPPED = r"proj|(visual_projection|head|local_cls_norm)\..*|.*(mask_token|position_ids|bias_mask|periods)"
SPELLINGS = [
    (r"\b_\w+\.|^embeddings\.|\b(self_)?attn\.|\battention\.|\bmlp\.", ""),
    (r"^(transformer\.resblocks|encoder\.layers?|(model\.)?layer|blocks\.\d+)(?=\.\d+\.)", "blocks"),
    (r"\.(projection|gamma|lambda1)\b", ""), (r"class_embedding", "cls_token"),
    (r"position(al)?_embeddings?(\.weight)?", "pos_embed"), (r"reg_token|storage_tokens", "register_tokens"),
    (r"^(conv1|patch_embed(ding)?s?(\.proj)*)(?=\.\w+$)", "patch_embed.proj"),
    (r"pre_layrnorm|ln_pre", "norm_pre"), (r"post_layernorm|ln_post|^layernorm", "norm"),
    (r"ln_(?=\d)|layer_norm", "norm"), (r"layer_scale|gamma_", "ls"), (r"in_proj_", "qkv."),
    (r"\b([qkv])(_proj\.|uery\.|ey\.|alue\.|_(?=bias))", r"qkv.\1."), (r"c_fc|w12|weights_in", "fc1"),
    (r"c_proj|w3|weights_out|down_proj", "fc2"), (r"out_proj|o_proj|output\.dense", "proj"),
    (r"gate_proj|\bw1\b|fc1_g", "fc1.gate"), (r"up_proj|\bw2\b|fc1_x", "fc1.up"),
]  # fmt: skip


def read_tensors(weights: Weights) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors, fp32, of a state dict, a .safetensors file, a pickle of plain data, the shards of an index, or
    a folder that holds one of these, as on Hugging Face; and its header, or all of the authors' file."""
    from safetensors import safe_open

    if isinstance(weights, Mapping):
        return flatten(weights), {}
    names = "model.safetensors model.safetensors.index.json open_clip_model.safetensors pytorch_model.bin"
    path = next((file for name in names.split() if (file := Path(weights, name)).is_file()), Path(weights))
    try:
        if path.suffix == ".json":
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            return {key: x for name in shards for key, x in read_tensors(path.with_name(name))[0].items()}, {}
        if path.suffix != ".safetensors":
            data = torch.load(path, map_location="cpu", weights_only=True)
            return flatten(data), data if "features_list" in data else {}
        with safe_open(path, "pt") as file:
            return flatten({key: file.get_tensor(key) for key in file.keys()}), file.metadata() or {}
    except FileNotFoundError:
        raise
    except Exception as error:  # of a text file torch says "pop from empty list"
        raise ValueError(f"{path} cannot be read as weights: {type(error).__name__}") from error


def flatten(state: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of nested dicts and lists, fp32, under dotted names; what is no tensor is left out."""
    if isinstance(state, Tensor):
        return {name: state.detach().float()}
    state = dict(enumerate(state)) if isinstance(state, (list, tuple)) else state
    inner = state.items() if isinstance(state, Mapping) else ()
    return {k: x for key, y in inner for k, x in flatten(y, f"{name}.{key}".lstrip(".")).items()}


def backbone_state(weights: Weights) -> dict[str, Tensor]:
    """A backbone's file, folder or state dict of any known family -> its tensors, fp32, under ViT's names.
    Raises ValueError where it is not just one, whole."""
    what = "the state dict" if isinstance(weights, Mapping) else str(weights)
    found, _ = read_tensors(weights)
    starts = {key[: match.start(1)] for key in found if (match := re.search(rf"(?:^|\.)({CLS})$", key))}
    if len(starts) != 1:
        seen = f"several, after {sorted(starts)}" if starts else f"{', '.join([*found][:3])}, ..."
        raise ValueError(f"{what} must hold one vision transformer of a known family; it holds {seen}")
    start, state = starts.pop(), {}
    for key in [key for key in found if key.startswith(start)]:
        if not re.fullmatch(DROPPED, name := key.removeprefix(start)):
            for pattern, ours in SPELLINGS:
                name = re.sub(pattern, ours, name)
            state[name] = found[key].clone()
    for key in [key for key in state if re.search(r"\.(q|up)\.", key)]:  # what some families split
        name, part, leaf = key.rsplit(".", 2)
        parts = [f"{name}.{x}.{leaf}" for x in (("q", "k", "v") if part == "q" else ("gate", "up"))]
        state[f"{name}.{leaf}"] = torch.cat([state.pop(x) for x in parts if x in state])
    if lacks := {"patch_embed.proj.weight", "blocks.0.fc1.weight", "blocks.0.fc2.weight"} - state.keys():
        raise ValueError(f"{what} is not a whole vision transformer of a known family: it lacks {min(lacks)}")
    width = state["cls_token"].numel()
    if "pos_embed" not in state and f"{start}blocks.0.qkv.weight" not in found:
        # DINOv3's keys have no bias, whatever its release holds there; a file of ours may have been trained.
        for key in [key.replace("weight", "bias") for key in state if "qkv.weight" in key]:
            bias = state.get(key, torch.zeros(3 * width))
            state[key] = torch.cat([bias[:width], 0 * bias[:width], bias[-width:]])
    state.setdefault("register_tokens", torch.zeros(0, width))
    for key in {"cls_token", "register_tokens", "pos_embed"} & state.keys():
        state[key] = state[key].reshape(1, -1, width)
    if "pos_embed" in state and math.isqrt(rows := state["pos_embed"].shape[1]) ** 2 == rows:
        # timm's register models have the class position added to the class token: guests would get none.
        warnings.warn(f"{what} has no class position: use it only with tokens trained on it", stacklevel=3)
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    return state


def read_json(weights: Weights) -> dict[str, Any]:
    """Fields of a `Backbone` that no tensor tells, from the JSON of transformers, timm or open_clip."""
    folder = Path(os.devnull if isinstance(weights, Mapping) else weights)
    folder = folder if folder.is_dir() else folder.parent
    files = [folder / name for name in ("config.json", "preprocessor_config.json", "open_clip_config.json")]
    found = {key: x for file in files if file.is_file() for key, x in json.loads(file.read_text()).items()}
    vision, clip = found.get("vision_config", found), found.get("model_cfg")
    pixels = found.get("pretrained_cfg") or found.get("preprocess_cfg") or {}
    told = dict(activation=vision.get("hidden_act"), heads=vision.get("num_attention_heads"))
    if clip:  # of open_clip, whose weights are of plain GELU unless it says otherwise
        told["activation"] = "quick_gelu" if clip.get("quick_gelu") else "gelu"
        told["heads"] = clip["vision_cfg"]["width"] // clip["vision_cfg"].get("head_width", 64)
    told |= {name: found.get(f"image_{name}", pixels.get(name)) for name in ("mean", "std")}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in told.items() if x}


def read_fields(weights: Weights) -> dict[str, Any]:
    """The fields of a `Backbone` by its tensors, the files beside them, and its family."""
    state = backbone_state(weights)
    width, hidden = state["cls_token"].shape[2], state["blocks.0.fc2.weight"].shape[1]
    registers, rows = state["register_tokens"].shape[1], state.get("pos_embed", torch.zeros(1, 0)).shape[1]
    heads = {1280: 16, 1408: 16, 1664: 16} if rows else {4096: 32}  # by width, where they are not 64 wide
    family = DINOV3 if not rows else REG if registers else {}
    if "norm_pre.weight" in state:  # OpenAI's CLIP, but of these widths LAION's
        family = CLIP | (dict(activation="gelu") if width in heads else {})
    fields = family | dict(width=width, heads=heads.get(width, width // 64 or 1), registers=registers)
    fields |= dict(depth=sum(".fc2.weight" in key for key in state), grid=math.isqrt(max(rows - 1, 0)))
    fields |= dict(hidden=hidden if hidden != 4 * width else None, layer_scale="blocks.0.ls1" in state)
    fields |= dict(patch=state["patch_embed.proj.weight"].shape[-1]) | read_json(weights)
    return fields | (GATED if len(state["blocks.0.fc1.weight"]) == 2 * hidden else {})


def locate(source: str, file: str, hub: Mapping[str, Any]) -> Path:
    """The file or folder of a name in `PRETRAINED`, of a Hugging Face repo that holds `file`, or of a path.
    Raises FileNotFoundError."""
    import huggingface_hub

    path, bundled = Path(source), "weights/tiny.safetensors"
    try:
        if source == "tiny":  # beside this file in a clone, or where pip puts it
            path = next(Path(__file__).parent.glob(f"*{bundled}"), Path(bundled))
        elif sha256 := PRETRAINED.get(source):
            folder = Path(hub.get("cache_dir") or f"{torch.hub.get_dir()}/checkpoints")
            path = folder / f"visualad-{source}-{sha256}.pth"
            if not path.exists() and not hub.get("local_files_only"):
                folder.mkdir(parents=True, exist_ok=True)
                url = f"{HOST}/weight/train_on_{source.rpartition('-')[2]}/CLIP.pth"
                torch.hub.download_url_to_file(url, str(path), sha256)
        elif source.count("/") == 1 and not path.exists() and path.suffix not in (".safetensors", ".pth"):
            path = Path(huggingface_hub.hf_hub_download(source, file, **hub))
    except (OSError, RuntimeError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise FileNotFoundError(f"could not get {source}: {cause}; give a local path") from error
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; give a path, a repo id or {', '.join(PRETRAINED)}")
    return path


def read_model(source: str, backbone_weights: Weights | None, hub: Mapping[str, Any]) -> tuple[dict, dict]:
    """Config and tensors behind whatever `from_pretrained` takes. Raises ValueError, FileNotFoundError."""
    state, data = read_tensors(locate(source, "model.safetensors", hub))
    if "features_list" not in data and "config" not in data:
        raise ValueError(f"{source} is no VisualAD model; a backbone alone goes in as backbone_weights")
    if "config" in data:
        config = json.loads(data["config"])
        fields = {key: tuple(x) if isinstance(x, list) else x for key, x in config["backbone"].items()}
        return config | dict(backbone=Backbone(**fields), final_norm="checkpoint"), state
    name = "clip-" + data["backbone"].lower().replace("/", "").replace("@", "-").removesuffix("px")
    if name not in BACKBONES and backbone_weights is None:
        raise ValueError(f"{source} is for {data['backbone']!r}, not listed here: pass backbone_weights=PATH")
    cfg = BACKBONES.get(name) or Backbone.from_weights(backbone_weights)
    for theirs, ours in OFFICIAL_NAMES.items():
        state = {key.replace(theirs, ours): value for key, value in state.items()}
    state["tokens"] = torch.stack([state.pop("anomaly_token"), state.pop("normal_token")])
    grid = data["image_size"] // cfg.patch  # their convolution too leaves out what makes no patch
    for key in [key for key in state if key.endswith(".pos")]:  # a flat table: training used the first rows
        state[key] = state[key].flatten(0, -2)[: grid**2].unflatten(0, (grid, grid))
    config = dict(backbone=cfg, layers=data["features_list"], image_size=grid * cfg.patch, sigma=cfg.sigma)
    config |= dict(anchors=data["cross_attn_config"]["num_anchors"], threshold=None, final_norm="backbone")
    return config, state


def write_atomic(path: Path, data: bytes) -> None:
    """Whole or not at all: written beside the target, then renamed. Makes missing folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


# --- 7. images -------------------------------------------------------------------------------------------
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}


def images_below(folder: Path, without: Path | None = None) -> list[Path]:
    """The images in a folder and below, sorted; not those that are hidden or below `without`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = [path for path in paths if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    if without and not os.path.abspath(folder).startswith(out := os.path.join(os.path.abspath(without), "")):
        paths = [path for path in paths if not os.path.abspath(path).startswith(out)]
    if not paths:
        place = f"{folder} and outside {without}" if without else folder
        raise FileNotFoundError(f"no image below {place}; looked for {' '.join(sorted(IMAGE_SUFFIXES))}")
    return paths


def is_one(images: Any) -> bool:
    """Whether this is one image (or a mistake), not several."""
    if isinstance(images, (str, os.PathLike)):
        return not Path(images).is_dir()
    if isinstance(images, Tensor):
        return images.ndim != 4
    whole = isinstance(images, (bytes, bytearray)) or hasattr(images, "read") or hasattr(images, "shape")
    return whole or not isinstance(images, Iterable)


def each(images: Any) -> Iterator[Any]:
    """Whatever `predict` takes, one image at a time."""
    if is_one(images):
        yield images
    else:
        for image in images_below(Path(images)) if isinstance(images, (str, os.PathLike)) else images:
            yield from each(image)


def to_tensor(image: Any) -> Tensor:
    """Any single image that `predict` takes -> RGB [3, H, W], uint8, or fp32 in [0, 1] if 8 bits are too few.
    Raises ValueError for anything else, FileNotFoundError for a missing file."""
    import numpy as np
    from PIL import Image, ImageOps

    image = io.BytesIO(image) if isinstance(image, (bytes, bytearray)) else image
    if isinstance(image, (str, os.PathLike)) or hasattr(image, "read"):
        try:
            with Image.open(getattr(image, "file", image)) as opened:  # a web upload holds its file
                return to_tensor(opened)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"cannot read {image} as an image: {error}") from error
    if isinstance(image, Image.Image):
        deep = image.format in ("PNG", "TIFF", "PPM") and re.search(r";16|'RGB', \d{4}", str(image.tile))
        inverted = getattr(image, "tag_v2", {}).get(262) == 0  # a TIFF's white: Pillow turns 8 bits alone
        image.load()
        wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        if (deep or image.mode in ("I", "F")) and (inverted or not wide):
            raise ValueError("Pillow cannot read all of its bits: pass an array, uint16 or float in [0, 1]")
        image = ImageOps.exif_transpose(image)
        image = np.array(image, dtype=np.uint16) if wide else np.array(image.convert("RGB"))
    got = f"{getattr(image, 'dtype', type(image).__name__)} {list(getattr(image, 'shape', ()))}"
    if isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.dtype.kind in "uf":
        # A copy: the caller's array may be read-only, reversed or in another byte order.
        image = np.atleast_3d(np.asarray(image)).astype(image.dtype.newbyteorder("="), order="C")
        image = torch.from_numpy(image).movedim(-1, 0)
        image = image.repeat(3, 1, 1) if len(image) == 1 else image
        image = image.float() / 65535 if image.dtype == torch.uint16 else image
    sound = isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3 and image.numel() > 0
    if not sound or not (image.dtype == torch.uint8 or image.is_floating_point()):
        wanted = "a file, a PIL image, an array [H, W, 3] or [H, W] or a tensor [3, H, W]"
        raise ValueError(f"an image is {wanted}, of uint8 or float (arrays: uint16 too); got {got}")
    image = image.detach().cpu()
    if image.dtype == torch.uint8:
        return image
    low, high = (float(value) for value in image.float().aminmax())
    if not -1e-6 <= low <= high <= 1 + 1e-6:  # by a rounding, which is clamped below
        raise ValueError(f"float values must lie in [0, 1], got {low:g} to {high:g}")
    levels = (image.float() * 255).round()
    # An 8-bit image that comes as floats is resized as one: the same picture must get the same score.
    eight = torch.allclose(levels / 255, image.float(), rtol=0, atol=1e-6)
    return levels.byte() if eight else image.float().clamp(0, 1)


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """[3, H, W], uint8 or fp32 in [0, 1] -> fp32 at `size` (H, W): bicubic, antialiased, clamped, and rounded
    to 1/255 where the input is; photographs come within 2/255 of PIL's."""
    image = F.interpolate(image[None], tuple(size), mode="bicubic", antialias=True)[0]
    return image.float() / 255 if image.dtype == torch.uint8 else image.clamp(0, 1)


def ahead(function: Callable[[Any], Any], items: Iterable[Any], depth: int) -> Iterator[Any]:
    """function(item) for each item, in order, computed by threads up to `depth` items ahead."""
    with ThreadPoolExecutor(max(1, min(depth, os.cpu_count() or 1))) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def overlay(image: Any, map: np.ndarray | Tensor, *, low: float = 0.0, high: float) -> Any:
    """The heatmap [H, W] on its image, as a PIL image: plain at `low`, yellow, then full red at `high`. Keep
    one scale for all images, so that a normal one stays plain. Raises ValueError."""
    from PIL import Image

    image, heat = to_tensor(image), torch.as_tensor(map).detach().cpu().float()
    if heat.shape != image.shape[1:] or not heat.isfinite().all() or not low < high:
        got = f"{list(heat.shape)} on {list(image.shape[1:])}, {low} to {high}"
        raise ValueError(f"map must be finite and of the image's size, and low be below high; got {got}")
    image = image / 255 if image.dtype == torch.uint8 else image
    heat = ((heat - low) / (high - low)).clamp(0, 1)
    red = torch.stack([torch.ones_like(heat), 1 - heat, torch.zeros_like(heat)])
    pixels = ((image + heat * (red - image)) * 255).round().byte()
    return Image.fromarray(pixels.movedim(0, -1).contiguous().numpy())


# --- 8. VisualAD -----------------------------------------------------------------------------------------
class Prediction(NamedTuple):
    score: float  # mean of the brightest 1 % of the smoothed map, at the network's input size
    map: np.ndarray  # [H, W] of the image, float32, smoothed
    anomalous: bool | None  # score > threshold; None without a threshold


class VisualAD(VisualADNet):
    """The detector: `from_pretrained` loads it, `predict` scores images, `calibrate` sets its threshold,
    `save_pretrained` keeps it; `forward` and `infer` take tensors. A state_dict holds tensors alone: `sigma`
    and `threshold` are attributes, which save_pretrained, pickle and deepcopy keep."""

    threshold: float | None = None  # of the score, for the size and sigma that it was made with

    @classmethod
    def from_backbone(
        cls, backbone: str | Backbone, backbone_weights: Weights | None = None, *, layers: Taps = None,
        anchors: int = 4, image_size: int = 0, **hub: Any,
    ) -> VisualAD:  # fmt: skip
        """A frozen backbone with a fresh learned part: where training starts. Arguments and errors are those
        of `VisualADNet` and `from_pretrained`. Weights of a listed backbone are taken for the hosted ones and
        not saved: for others take `Backbone.from_weights`."""
        model = cls(backbone, layers, anchors, image_size)
        return model.fill(model.learned(), backbone_weights, "backbone", hub)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, backbone_weights: Weights | None = None,
        final_norm: str | None = None, device: str | torch.device | None = None,
        dtype: torch.dtype | None = None, **hub: Any,
    ) -> VisualAD:  # fmt: skip
        """A trained model, in eval mode.

        source: a name in `PRETRAINED`, a folder, a file of ours or the authors', or a Hugging Face repo id.
        backbone_weights: a path or state dict, for a file without its backbone; None: where that is hosted.
        final_norm: "backbone" or "checkpoint", the trained one. None: "checkpoint", but "backbone" for the
            authors' files, whose published numbers were made so. A threshold is for the norm it came with.
        dtype: of the frozen backbone; what was learned stays fp32.
        hub: token, cache_dir, revision, local_files_only, force_download, as huggingface_hub has them; of
            these the authors' files know cache_dir and local_files_only.
        Raises ValueError for what does not fit, FileNotFoundError for what cannot be had.
        """
        if final_norm not in (None, "backbone", "checkpoint"):
            raise ValueError(f"final_norm must be 'backbone', 'checkpoint' or None, got {final_norm!r}")
        config, state = read_model(os.fspath(source), backbone_weights, hub)
        norm = final_norm or config["final_norm"]
        with torch.device("meta"):  # no random numbers that are overwritten at once
            model = cls(config["backbone"], config["layers"], config["anchors"], config["image_size"])
        model.fill(state, backbone_weights, norm, hub).sigma = config["sigma"]
        model.threshold = config["threshold"] if norm == config["final_norm"] else None
        model.backbone.to(dtype=dtype)
        return model.to(torch.get_default_device() if device is None else device).eval()

    def fill(self, state: Mapping, weights: Weights | None, norm: str, hub: Mapping) -> VisualAD:
        """Loads what was learned from `state`, the backbone from there, its weights or where it is hosted.
        norm: "backbone" or "checkpoint", as of `from_pretrained`. Raises ValueError, FileNotFoundError."""
        cfg = self.backbone.cfg
        if unknown := hub.keys() - {"token", "cache_dir", "revision", "local_files_only", "force_download"}:
            raise TypeError(f"unknown arguments: {', '.join(sorted(unknown))}")
        if "backbone.cls_token" in state:
            weights = state
        elif weights is None:
            source = "tiny" if cfg == BACKBONES["tiny"] else cfg.repo
            if source is None:
                raise ValueError("this backbone is hosted nowhere: pass backbone_weights=PATH")
            weights = locate(source, cfg.file, {**hub, "revision": None})
        for name, told in read_json(weights).items():
            if getattr(cfg, name) not in (told, "swiglu"):
                here = f"{name} is {told}, here {getattr(cfg, name)}"
                raise ValueError(f"by the files beside {weights} {here}: use Backbone.from_weights")
        state = {**state, **{f"backbone.{key}": x for key, x in backbone_state(weights).items()}}
        if norm == "backbone":
            state |= {name: state[f"backbone.{name}"].clone() for name in ("norm.weight", "norm.bias")}
        try:
            self.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit: {error}") from error
        return self

    def learned(self) -> dict[str, Tensor]:
        """Exactly what training changes and saving keeps: tokens, final norm, SCA and SAF."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("backbone.")}

    def save_pretrained(self, folder: str | os.PathLike, *, repo_id: str = "", notes: str = "") -> None:
        """Writes model.safetensors, complete in itself, config.json, a copy of what stands in its header, and
        README.md, a card, if there are `notes` for it or there is none. The backbone goes in if it is hosted
        nowhere or was tuned, that is, has parameters that require gradients."""
        from huggingface_hub import ModelCardData
        from safetensors.torch import save

        folder, cfg = Path(folder), self.backbone.cfg
        hosted = cfg.repo is not None and not any(x.requires_grad for x in self.backbone.parameters())
        names = ("layers", "anchors", "image_size", "sigma", "threshold")
        config = {name: getattr(self, name) for name in names}
        config["backbone"] = asdict(cfg if hosted else replace(cfg, repo=None))
        config = json.dumps(config, indent=2)
        if notes or not (folder / "README.md").exists():
            data = ModelCardData(license="mit", pipeline_tag="image-segmentation", library_name="visualad")
            data.base_model, data.tags = cfg.repo, ["anomaly-detection"]
            text = f"---\n{data}\n---\n# VisualAD on {cfg.repo or 'its own backbone'}\n\n"
            text += "Zero-shot anomaly detection (arXiv:2603.07952). Score, map and verdict of an image:\n"
            text += f'`VisualAD.from_pretrained("{repo_id or folder}").predict("photo.jpg")`\n\n{notes}\n'
            write_atomic(folder / "README.md", text.encode())
        write_atomic(folder / "config.json", config.encode())  # by which Hugging Face counts downloads
        state = self.learned() if hosted else self.state_dict()
        state = {key: value.contiguous() for key, value in state.items()}
        write_atomic(folder / "model.safetensors", save(state, {"format": "pt", "config": config}))

    def push_to_hub(self, repo_id: str, *, notes: str = "", private: bool = False, **upload: Any) -> str:
        """Uploads what `save_pretrained` writes and returns the commit's address. upload: a token, arguments
        of huggingface_hub's upload_folder, as ignore_patterns="README.md" where a card is to stay."""
        from huggingface_hub import HfApi

        api = HfApi(token=upload.pop("token", None))
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private or None).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, repo_id=repo_id, notes=notes)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, **upload)

    def predict_iter(
        self, images: Any, *, size: int | Sequence[int] | None = None, batch_size: int = 8,
        sigma: float | None = None,
    ) -> Iterator[Prediction]:  # fmt: skip
        """Scores and maps for images of any size, one after the other, in constant memory.

        images: a file (its path, its bytes or opened), a folder (recursive, sorted), a PIL image, an array
            [H, W, 3] or [H, W] (uint8, uint16 or float in [0, 1]), a tensor [3, H, W] or [B, 3, H, W], or an
            iterable that mixes them, of which up to three batches are read ahead, and with batch_size=1 none.
        size: the network's input, a side or (H, W), multiples of the patch; None: `image_size`.
        sigma: of the smoothing, in pixels of that input; None: the model's. The score is taken there, the map
            then resized. Raises ValueError for what is no image, FileNotFoundError.
        """
        size = self.input_size(size)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")

        def prepare(image: Any) -> tuple[Tensor, torch.Size]:
            image = to_tensor(image)
            return resize(image, size), image.shape[1:]

        # Threads read files alone: whoever yields arrays may use their memory again for the next one.
        items = (x if isinstance(x, (str, os.PathLike)) else prepare(x) for x in each(images))
        ready = ahead(lambda x: x if isinstance(x, tuple) else prepare(x), items, 2 * (batch_size - 1))
        while batch := list(islice(ready, batch_size)):
            maps, scores = self.infer(torch.stack([x for x, _ in batch]).to(self.tokens.device), sigma)
            if not scores.isfinite().all():
                raise ValueError("scores are not finite: damaged weights, or a dtype too narrow for them")
            for small, score, (_, own) in zip(maps, scores.tolist(), batch, strict=True):
                heat = upsample(small[None, None].float(), own)[0, 0].cpu().numpy()
                yield Prediction(score, heat, None if self.threshold is None else score > self.threshold)

    def predict(self, images: Any, **options: Any) -> Prediction | list[Prediction]:
        """One `Prediction` for one image, else a list in order. Arguments and errors are `predict_iter`'s."""
        found = list(self.predict_iter(images, **options))
        return found[0] if is_one(images) else found

    def input_size(self, size: int | Sequence[int] | None) -> tuple[int, int]:
        """The network's input (H, W) for a side, (H, W) or None. Raises ValueError."""
        size = self.image_size if size is None else size
        h, w = size if isinstance(size, Sequence) else (size, size)
        patch_grid((h, w), self.backbone.cfg.patch)
        return h, w

    def calibrate(self, normal_images: Any, quantile: float = 0.99, **options: Any) -> float:
        """Sets `threshold` just above the score that this quantile of normal images keeps to; returns it.
        n images cannot hold false alarms below about 1 / (n + 1): for 1 % take 100. options: of `predict`;
        decide with the same. Raises ValueError."""
        import numpy as np

        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must lie in (0, 1], got {quantile}")
        scores = [prediction.score for prediction in self.predict_iter(normal_images, **options)]
        if not scores:
            raise ValueError("calibrate needs at least one normal image")
        value = float(np.quantile(scores, quantile, method="inverted_cdf"))
        self.threshold = value + 1e-5  # an image in another batch has other last digits
        return self.threshold


# --- 9. command line -------------------------------------------------------------------------------------
def find_device(name: str = "") -> str:
    """The device of that name, or the best there is. Raises ArgumentTypeError where it is not there."""
    best = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    if name and name.partition(":")[0] not in ("cpu", best):
        raise argparse.ArgumentTypeError(f"{name} is not there, the best is {best}")
    return name or best


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that mean the same in every program of this library; `load_model` reads them."""
    add = parser.add_argument
    add("--model", default="tiny", help=f"{', '.join(PRETRAINED)}, a Hugging Face repo, a folder or a file")
    add("--backbone-weights", metavar="PATH", help="of the frozen backbone, for offline use")
    add("--final-norm", choices=("backbone", "checkpoint"), help="default: as the file's numbers were made")
    add("--size", metavar="N|HxW", help="network input, multiples of the patch; default: the model's")
    add("--sigma", type=float, help="of the smoothing, in pixels of the input; default: the model's")
    add("--device", type=find_device, default=find_device(), help="(%(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the backbone")
    add("--batch-size", type=int, default=8, metavar="N", help="(%(default)s)")


def load_model(args: argparse.Namespace) -> tuple[VisualAD, dict[str, Any]]:
    """The model that the flags name, and size, sigma and batch_size for its `predict`. Raises ValueError."""
    options = dict(backbone_weights=args.backbone_weights, final_norm=args.final_norm, device=args.device)
    model = VisualAD.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **options)
    size = model.input_size([int(side) for side in (args.size.split("x", 1) * 2)[:2]] if args.size else None)
    sigma = model.sigma if args.sigma is None else args.sigma
    if (size, sigma) != (model.input_size(None), model.sigma):
        model.threshold = None  # which does not hold for these
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    return model, dict(size=size, sigma=sigma, batch_size=args.batch_size)


def run(args: argparse.Namespace) -> int:
    files = dict.fromkeys(p for x in args.images for p in (images_below(x, args.out) if x.is_dir() else [x]))
    base = os.path.commonpath([os.path.abspath(x if x.is_dir() else x.parent) for x in args.images])
    model, options = load_model(args)
    if args.calibrate:
        model.calibrate(images_below(args.calibrate, args.out), **options)
    elif args.threshold is not None:
        model.threshold = args.threshold
    images, errors = [], []

    def read(path: Path) -> tuple[Path, Tensor] | None:
        try:
            return path, to_tensor(path)
        except (ValueError, OSError) as error:
            errors.append(dict(path=str(path), error=str(error)))
            tqdm.write(f"{'-':>8}  {'ERROR':9}  {path}: {error}", file=sys.stderr)

    print(f"{'score':>8}  {'verdict':9}  image")
    bar = tqdm(ahead(read, files, 2 * args.batch_size), total=len(files), disable=None, leave=False)
    ready = filter(None, bar)
    try:
        while chunk := list(islice(ready, args.batch_size)):
            found = model.predict_iter((image for _, image in chunk), **options)
            for (path, image), (score, heat, anomalous) in zip(chunk, found, strict=True):
                target = args.out / f"{os.path.relpath(path, base)}.png"  # a.jpg -> a.jpg.png: no two collide
                target.parent.mkdir(parents=True, exist_ok=True)
                overlay(image, heat, high=len(model.layers)).save(target, compress_level=1)
                images.append(dict(path=str(path), score=score, anomalous=anomalous, heatmap=str(target)))
                verdict = {None: "-", True: "ANOMALOUS", False: "normal"}[anomalous]
                tqdm.write(f"{score:8.4f}  {verdict:9}  {path}", file=sys.stdout)
    finally:  # also when interrupted: what was found is not lost
        if args.json:
            settings = options | dict(threshold=model.threshold)
            failed = sorted(errors, key=lambda error: error["path"])
            report = dict(model=args.model, settings=settings, images=images, errors=failed)
            write_atomic(args.json, json.dumps(report, indent=2).encode())
    limit, flagged = model.threshold, sum(bool(image["anomalous"]) for image in images)
    told = "no threshold" if limit is None else f"{flagged} anomalous (above {limit:.4f})"
    print(f"{len(images)} images, {told}, {len(errors)} unreadable; heatmaps in {args.out}")
    return 1 if errors else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores images and writes heatmaps. Exit status: 0; 1 where an image was unreadable; 2 for an error."""
    usage = "\n  python visualad.py photos --json scores.json\n  python visualad.py *.png --calibrate good"
    parser = argparse.ArgumentParser(usage=usage, description="Finds anomalies in images of anything.")
    parser._negative_number_matcher = re.compile(r"-[\d.]")  # or -5e-05 would be taken for a flag
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER", help="a folder: all in it and below")
    model_flags(parser)
    add("--out", type=Path, default=Path("heatmaps"), metavar="FOLDER", help="for heatmaps (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the results here too")
    which = parser.add_mutually_exclusive_group().add_argument
    which("--threshold", type=float, metavar="X", help="anomalous above this score; default: the model's own")
    which("--calibrate", type=Path, metavar="FOLDER", help="take it from a folder of normal images")
    try:
        return run(parser.parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"visualad: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
