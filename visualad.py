"""VisualAD in one file: zero-shot visual anomaly detection with two learned tokens in a frozen ViT.

    model = VisualAD.from_pretrained("tiny")       # or a Hugging Face repo, a folder, a file
    result = model.predict("photo.jpg")            # result.score, result.map [H, W], result.anomalous
    out = model(images)                            # images [B, 3, H, W], RGB in [0, 1] -> out.map, out.score

Paper: Hou et al., "VisualAD: Language-Free Zero-Shot Anomaly Detection via Vision Transformer", CVPR 2026,
arXiv:2603.07952. Where the paper and the authors' program differ, this file does what the program does.

 1 backbones as data   2 the frozen ViT   3 SCA and SAF   4 VisualAD   5 scoring     (the method: torch only)
 6 weights and checkpoints   7 images in, predictions out   8 command line           (may be cut off)

 B images   H W pixels   h w patch rows, columns   N = h * w patches   D width   K anchors   L tapped layers
 S = P + N sequence, P prefix tokens [t_a, t_n, cls, registers]; layers are counted from 1, as in the paper
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.client import HTTPException
from itertools import islice
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np

Layers = tuple[int, ...] | None
Weights = str | os.PathLike | Mapping[str, Any]  # a file or folder, or a state dict


# --- 1. backbones as data --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Backbone:
    """What tells one vision transformer from another. The defaults are DINOv2's."""

    width: int
    depth: int
    heads: int
    patch: int
    grid: int  # positions were trained on grid x grid patches
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
    layers: tuple[int, ...] = ()  # tapped blocks; (): at each quarter of the depth; a `replace` keeps them
    repo: str | None = None  # on Hugging Face; None: hosted nowhere
    file: str = "model.safetensors"

    def __post_init__(self) -> None:
        quarters = sorted({math.ceil(self.depth * i / 4) for i in (1, 2, 3, 4)})
        object.__setattr__(self, "layers", tuple(self.layers or quarters))

    @classmethod
    def from_weights(cls, state: dict[str, Tensor], **overrides: Any) -> Backbone:
        """An unlisted checkpoint's sizes and kind, read by section 6 (heads = width / 64); what tensors don't
        tell (activation, mean, std, input size) is the family's default or an override. Raises ValueError."""
        return cls(**{**read_sizes(backbone_state(state)), **overrides})


CLIP = dict(activation="quick_gelu", eps=1e-5, pre_norm=True, patch_bias=False, layer_scale=False,
            resample="bilinear", mean=(0.48145466, 0.4578275, 0.40821073),
            std=(0.26862954, 0.26130258, 0.27577711))  # fmt: skip
BACKBONES = {
    "tiny": Backbone(128, 3, 2, 8, 28, stem=(32, *[64] * 4, *[128] * 4), layer_scale=False, image_size=224,
                     layers=(1, 3)),
    "clip-vit-b32": Backbone(768, 12, 12, 32, 7, **CLIP, repo="openai/clip-vit-base-patch32"),
    "clip-vit-b16": Backbone(768, 12, 12, 16, 14, **CLIP, repo="openai/clip-vit-base-patch16"),
    "clip-vit-l14": Backbone(1024, 24, 16, 14, 16, **CLIP, repo="openai/clip-vit-large-patch14"),
    "clip-vit-l14-336": Backbone(1024, 24, 16, 14, 24, **CLIP, file="open_clip_model.safetensors",
                                 repo="timm/vit_large_patch14_clip_336.openai"),
}  # fmt: skip
for _size, _width, _depth in ("small", 384, 12), ("base", 768, 12), ("large", 1024, 24), ("giant", 1536, 40):
    _mlp = dict(activation="swiglu", hidden=4096) if _size == "giant" else {}
    _dino = dict(width=_width, depth=_depth, heads=_width // 64, patch=14, grid=37, **_mlp)
    _reg = dict(registers=4, resample="bicubic-antialias", repo=f"facebook/dinov2-with-registers-{_size}")
    BACKBONES[f"dinov2-vit-{_size[0]}14"] = Backbone(**_dino, repo=f"facebook/dinov2-{_size}")
    BACKBONES[f"dinov2-vit-{_size[0]}14-reg"] = Backbone(**_dino, **_reg)


# --- 2. the frozen ViT -----------------------------------------------------------------------------------
ACTIVATIONS = {  # the function, and how many values it makes one of
    "gelu": (F.gelu, 1),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), 1),
    "swiglu": (lambda x: F.silu(x[..., : x.shape[-1] // 2]) * x[..., x.shape[-1] // 2 :], 2),
}


def resample(table: Tensor, size: tuple[int, int], mode: str) -> Tensor:  # [g, g, D] -> [h * w, D]
    """A table of positions read at another grid; on its own grid it stays as it is."""
    if table.shape[:2] != size:
        mode, _, antialias = mode.partition("-")
        x = F.interpolate(table.float().permute(2, 0, 1)[None], size, mode=mode, antialias=bool(antialias))
        table = x[0].permute(1, 2, 0).to(table.dtype)
    return table.flatten(0, 1)


class Block(nn.Module):
    def __init__(self, cfg: Backbone):
        super().__init__()
        D, hidden = cfg.width, cfg.hidden or 4 * cfg.width
        self.heads, self.activation = cfg.heads, cfg.activation  # the name: a lambda cannot be pickled
        self.norm1, self.norm2 = nn.LayerNorm(D, cfg.eps), nn.LayerNorm(D, cfg.eps)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.fc1, self.fc2 = nn.Linear(D, hidden * ACTIVATIONS[cfg.activation][1]), nn.Linear(hidden, D)
        self.ls1, self.ls2 = (nn.Parameter(torch.ones(D)) if cfg.layer_scale else None for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # [B, S, D] -> [B, S, D]
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if x.is_cpu and x.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            # The fused kernel gains nothing from bf16 here; two heads at a time, in cache, are twice as fast.
            heads = zip(*(t.flatten(0, 1).split(2) for t in (q * q.shape[-1] ** -0.5, k, v)), strict=True)
            y = torch.cat([(a @ b.mT).softmax(dim=-1) @ c for a, b, c in heads]).view_as(q)
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
        self.cfg, stem, pairs = cfg, [], [*zip((3, *cfg.stem), cfg.stem, strict=False)]
        for a, b in pairs:
            # Each image's own channel statistics: what is odd within ONE image is what a detector looks for.
            stem += [nn.Conv2d(a, b, 3, 1 + (a < b), 1), nn.InstanceNorm2d(b, affine=True), nn.GELU()]
        self.stem, side = nn.Sequential(*stem), cfg.patch // 2 ** sum(a < b for a, b in pairs)
        self.patch_embed = nn.Conv2d((3, *cfg.stem)[-1], cfg.width, side, side, bias=cfg.patch_bias)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + cfg.grid**2, cfg.width))
        self.register_tokens = nn.Parameter(0.02 * torch.randn(1, cfg.registers, cfg.width))
        self.norm_pre = nn.LayerNorm(cfg.width, cfg.eps) if cfg.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.width, cfg.eps)

    def forward(
        self, x: Tensor, guests: Tensor | None = None, layers: Layers = None, norm: nn.Module | None = None
    ) -> dict[int, Tensor]:
        """Normalised images [B, 3, H, W] -> {layer: [B, S, D]} for the asked layers (None: its taps) and
        always the last, after the backbone's own final norm (or `norm`). guests [G, D] ride before the
        class token and share its position; without them this is the plain ViT."""
        cfg, norm = self.cfg, norm or self.norm
        layers = check_layers(cfg.layers if layers is None else layers, cfg.depth)
        h, w = x.shape[-2] // cfg.patch, x.shape[-1] // cfg.patch
        cls, cls_position, positions = self.cls_token[0], self.pos_embed[0, :1], self.pos_embed[0, 1:]
        positions = resample(positions.unflatten(0, (cfg.grid, cfg.grid)), (h, w), cfg.resample)  # [N, D]
        prefix = cls if guests is None else torch.cat([guests.to(cls.dtype), cls])
        prefix = torch.cat([prefix + cls_position, self.register_tokens[0]])  # [P, D]; registers: no position
        x, p = self.stem(x.to(prefix.dtype)), self.patch_embed  # 1 x 1: conv2d rounds by the thread count
        x = p(x).flatten(2).mT if p.stride[0] > 1 else F.linear(x.flatten(2).mT, p.weight[..., 0, 0], p.bias)
        z, out = self.norm_pre(torch.cat([prefix.expand(x.shape[0], -1, -1), x + positions], dim=1)), {}
        for layer, block in enumerate(self.blocks, 1):
            z = block(z)
            if layer in layers or layer == cfg.depth:
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
        self.alpha, self.dropout = nn.Parameter(torch.tensor([0.01])), nn.Dropout(dropout)
        for linear in (self.q, self.k, self.v, self.out):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tensor, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """tokens [B, 2, D], patches [B, N, D], size (h, w) -> sharpened tokens [B, 2, D]."""
        q = self.norm_q(self.q(self.anchors))  # [K, D]
        k = self.norm_k(self.k(patches + resample(self.pos, size, "bilinear")))  # [B, N, D]
        attention = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)  # [B, K, N]: no token in it, but
        attention = self.dropout(attention.repeat(1, 2, 1))  # [B, 2K, N]: each of the two drops its own
        # The program makes values of all N patches, then averages; averaging first is the same sum for less.
        u = self.v(attention @ patches).unflatten(1, (2, -1))  # [B, 2, K, D]
        gate = self.gate(tokens).sigmoid()  # [B, 2, K]
        return tokens + self.alpha * self.dropout(self.out((gate[..., None] * u).sum(dim=2)))


class SAF(nn.Module):
    """The MLP that realigns frozen patches with the learned tokens: no residual, no norm."""

    def __init__(self, width: int, dropout: float = 0.1):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, patches: Tensor) -> Tensor:  # [B, N, D] -> [B, N, D]
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(patches)))))


# --- 4. VisualAD -----------------------------------------------------------------------------------------
class Output(NamedTuple):
    """Of `VisualAD.forward`. `map` lies in [-2L, 2L], a layer's in [-2, 2]; 0: as close to either token."""

    map: Tensor  # [B, H, W], the sum of layer_maps, not smoothed
    score: Tensor  # [B], mean of the brightest 1 % of the map
    layer_maps: Tensor  # [B, L, H, W]
    tokens: Tensor  # [B, 2, D], anomaly and normal, after the last layer's SCA


class VisualAD(nn.Module):
    """Two learned tokens in a frozen ViT, one SCA and one SAF per tapped layer; random until loaded.
    backbone: a name in `BACKBONES` or a `Backbone`. layers: the tapped blocks; None: the backbone's own.
    image_size: side in pixels that SCA learns positions at, a multiple of the patch; None: the backbone's."""

    def __init__(
        self, backbone: str | Backbone, layers: Layers = None, anchors: int = 4, image_size: int | None = None
    ):
        super().__init__()
        cfg = BACKBONES.get(backbone) if isinstance(backbone, str) else backbone
        if not isinstance(cfg, Backbone):
            raise ValueError(f"unknown backbone {backbone!r}; known: {', '.join(BACKBONES)}")
        self.layers, self.anchors = check_layers(cfg.layers if layers is None else layers, cfg.depth), anchors
        self.image_size = cfg.image_size // cfg.patch * cfg.patch if image_size is None else image_size
        check_size((self.image_size, self.image_size), cfg.patch)
        self.sigma = 4.0  # of the smoothing at test time, in pixels of the input
        self.backbone = ViT(cfg).requires_grad_(False)
        self.norm = nn.LayerNorm(cfg.width, cfg.eps)  # in use: trained, or a copy of the backbone's
        self.tokens = nn.Parameter(0.1 / math.sqrt(cfg.width) * torch.randn(2, cfg.width))  # anomaly, normal
        grid = self.image_size // cfg.patch
        self.sca = nn.ModuleDict({str(layer): SCA(cfg.width, anchors, grid) for layer in self.layers})
        self.saf = nn.ModuleDict({str(layer): SAF(cfg.width) for layer in self.layers})
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(cfg, name)).view(3, 1, 1), persistent=False)

    def patch_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """RGB [B, 3, H, W] in [0, 1] -> maps on the patch grid [B, L, h, w], last SCA's tokens [B, 2, D]."""
        h, w = (side // self.backbone.cfg.patch for side in images.shape[-2:])
        z = self.backbone((images - self.mean) / self.std, self.tokens, self.layers, self.norm)
        maps = []
        for layer in self.layers:
            p = z[layer][:, -h * w :]  # [B, N, D]
            t = self.sca[str(layer)](z[max(z)][:, :2], p, (h, w))  # [B, 2, D]: the last block's t_a, t_n
            p, u = F.normalize(self.saf[str(layer)](p), dim=-1), F.normalize(t, dim=-1)
            maps.append((p @ (u[:, 0] - u[:, 1])[..., None]).view(-1, h, w))  # cos(p, t_a) - cos(p, t_n)
        return torch.stack(maps, dim=1), t

    def forward(self, images: Tensor) -> Output:
        """RGB [B, 3, H, W] in [0, 1], H and W multiples of the patch -> `Output`, map not smoothed. Raises
        ValueError for another shape or dtype; values are not looked at: that would stall the device."""
        check_images(images, self.backbone.cfg.patch)
        maps, tokens = self.patch_maps(images)
        layer_maps = upsample(maps, images.shape[-2:])
        fused = layer_maps.sum(dim=1)
        return Output(fused, image_score(fused), layer_maps, tokens)

    @torch.no_grad()
    def infer(self, images: Tensor, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        """The test-time path, no dropout: images as for `forward` -> smoothed map [B, H, W], score [B].
        sigma: of the Gaussian, in pixels of the input; None: the model's. Raises ValueError."""
        check_images(images, self.backbone.cfg.patch)
        training = [module for module in self.modules() if module.training]
        try:
            maps, _ = self.eval().patch_maps(images)
        finally:
            for module in training:
                module.training = True
        # Sum and bilinear resampling are linear: upsampling the summed small map gives forward's map.
        maps = upsample(maps.float().sum(dim=1, keepdim=True), images.shape[-2:])[:, 0]
        fused = smooth(maps, self.sigma if sigma is None else sigma)
        return fused, image_score(fused)


def check_layers(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    if not layers or min(layers) < 1 or max(layers) > depth:
        raise ValueError(f"tapped layers must lie in 1..{depth}, got {list(layers)}")
    return tuple(sorted(set(layers)))


def check_size(size: Sequence[int], patch: int) -> None:
    for side in size:
        if side != (low := max(side // patch, 1) * patch):
            raise ValueError(f"sides must be multiples of {patch} px, got {side}; near: {low}, {low + patch}")


def check_images(images: Tensor, patch: int) -> None:
    shape, got = list(getattr(images, "shape", ())), getattr(images, "dtype", type(images).__name__)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape or not getattr(got, "is_floating_point", False):
        raise ValueError(f"images must be a float tensor [B, 3, H, W], RGB in [0, 1]; got {got} {shape}")
    check_size(shape[2:], patch)


# --- 5. scoring ------------------------------------------------------------------------------------------
def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:  # [B, L, h, w] -> [B, L, H, W]
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def image_score(maps: Tensor) -> Tensor:  # [B, H, W] -> [B]
    """Mean of the brightest 1 % of each map's pixels."""
    k = -(-maps.shape[-2] * maps.shape[-1] // 100)  # rounded up, in integers: 0.01 is no float
    return maps.flatten(1).topk(k, sorted=False).values.mean(dim=1)


def smooth(maps: Tensor, sigma: float) -> Tensor:  # [B, H, W] -> [B, H, W]
    """Gaussian of sigma pixels, as scipy.ndimage.gaussian_filter with its defaults; 0: none."""
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be a finite number of pixels >= 0, got {sigma}")
    offsets = torch.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    weights = torch.softmax(-0.5 * (offsets.double() / (sigma or 1)) ** 2, dim=0)  # 0: one offset, no change
    blur = []  # for the rows, then for the columns: the Gaussian on n pixels as a matrix [n, n]
    for n in maps.shape[-2:]:
        pixel = (torch.arange(n)[:, None] + offsets) % (2 * n)
        pixel = torch.minimum(pixel, 2 * n - 1 - pixel)  # scipy's 'reflect' repeats the border pixel
        blur.append(torch.zeros(n, n).double().scatter_add_(1, pixel, weights.expand(n, -1)).to(maps))
    with torch.autocast(maps.device.type, enabled=False):  # the caller's would round the map to 8 bits
        return blur[0] @ maps @ blur[1].mT


# --- 6. weights and checkpoints --------------------------------------------------------------------------
OFFICIAL = (
    "https://media.githubusercontent.com/media/7HHHHH/VisualAD/8479132d641456345019aed1c8bb6b2d11941068"
)
PRETRAINED = {  # name -> path and sha256 of the authors' checkpoint; None: bundled with this file
    "tiny": None,
    "clip-vit-l14-336-visa": (
        "weight/train_on_visa/CLIP.pth", "fed8ed5e0973e9adb53a2c91e066eb5ba3f9a42fbf80f115a26998629d1f0a5b"),
    "clip-vit-l14-336-mvtec": (
        "weight/train_on_mvtec/CLIP.pth", "596f3ed0c0cfe78a314b41fc42a8adfc26b86ab1928f058ce256135cb407b32c"),
}  # fmt: skip
OFFICIAL_BACKBONES = {
    "ViT-B/32": "clip-vit-b32", "ViT-B/16": "clip-vit-b16",
    "ViT-L/14": "clip-vit-l14", "ViT-L/14@336px": "clip-vit-l14-336",
}  # fmt: skip

# Tensor names: (pattern, ours), full match, the first row wins; None drops on purpose. One table reads OpenAI
# and open_clip ("visual."), Hugging Face CLIP and DINOv2, DINOv2's release, timm, and our own.
HF = r"(?:vision_model\.)?"
BLOCK = rf"(?:visual\.transformer\.resblocks|{HF}encoder\.layers?|blocks)\.(\d+)\."
BACKBONE_NAMES = [
    (rf"(?:visual\.|{HF}embeddings\.)class_embedding|(?:embeddings\.)?cls_token", "cls_token"),
    (rf"visual\.positional_embedding|{HF}embeddings\.position_embedding\.weight", "pos_embed"),
    (r"embeddings\.position_embeddings|pos_embed", "pos_embed"),
    (r"(?:embeddings\.)?register_tokens|reg_token", "register_tokens"),
    (r"(?:visual\.conv1|patch_embed(?:\.proj)?)\.(weight|bias)", r"patch_embed.\1"),
    (rf"{HF}embeddings\.patch_embedding(?:s\.projection)?\.(weight|bias)", r"patch_embed.\1"),
    (rf"(?:visual\.ln_pre|{HF}pre_layrnorm|norm_pre)\.(.*)", r"norm_pre.\1"),
    (rf"(?:visual\.ln_post|{HF}post_layernorm|layernorm|norm)\.(.*)", r"norm.\1"),
    (BLOCK + r"(?:ln_|layer_norm|norm)([12])\.(.*)", r"blocks.\1.norm\2.\3"),
    (BLOCK + r"(?:attn\.in_proj_|(?:attn\.)?qkv\.)(weight|bias)", r"blocks.\1.qkv.\2"),
    (BLOCK + r"(?:self_attn|attention)\.([qkv])_proj\.(.*)", r"blocks.\1.qkv.\2.\3"),
    (BLOCK + r"attention\.attention\.([qkv])(?:uery|ey|alue)\.(.*)", r"blocks.\1.qkv.\2.\3"),
    (BLOCK + r"(?:(?:self_)?attn\.(?:out_)?proj|proj)\.(.*)", r"blocks.\1.proj.\2"),
    (BLOCK + r"attention\.(?:o_proj|output\.dense)\.(.*)", r"blocks.\1.proj.\2"),
    (BLOCK + r"(?:mlp\.)?(?:c_fc|fc1|w12|weights_in)\.(.*)", r"blocks.\1.fc1.\2"),
    (BLOCK + r"mlp\.(gate|up)_proj\.(.*)", r"blocks.\1.fc1.\2.\3"),
    (BLOCK + r"(?:mlp\.)?(?:c_proj|fc2|w3|weights_out|down_proj)\.(.*)", r"blocks.\1.fc2.\2"),
    (BLOCK + r"(?:ls|layer_scale)([12])(?:\.gamma|\.lambda1)?", r"blocks.\1.ls\2"),
    (r"(stem\..*)", r"\1"),
    (r"visual\.proj|visual_projection\..*|head\..*|(?:embeddings\.)?mask_token|(?:.*\.)?position_ids", None),
    (r"transformer\.resblocks\..*|positional_embedding|token_embedding\.weight|ln_final\..*|attn_mask", None),
    (r"text_model\..*|text_projection(?:\..*)?|logit_(?:scale|bias)", None),
    (r"input_resolution|context_length|vocab_size", None),
]
PARTS = {
    "q": ("q", "k", "v"),
    "gate": ("gate", "up"),
}  # the first part of what some families split -> all, in order
SCA_NAME, SAF_NAME = r"cross_attn\.layer_attentions\.layer_(\d+)\.", r"layer_transforms\.layer_(\d+)\.mlp\."
OFFICIAL_NAMES = [
    (r"(anomaly|normal)_token", r"tokens.\1"),
    (r"ln_post_(weight|bias)", r"norm.\1"),
    (SAF_NAME + r"0\.(.*)", r"saf.\1.fc1.\2"),
    (SAF_NAME + r"3\.(.*)", r"saf.\1.fc2.\2"),
    (SCA_NAME + r"anchor_queries", r"sca.\1.anchors"),
    (SCA_NAME + r"pos_encoding", r"sca.\1.pos"),
    (SCA_NAME + r"res_scale", r"sca.\1.alpha"),
    (SCA_NAME + r"([qkv])_proj\.(.*)", r"sca.\1.\2.\3"),
    (SCA_NAME + r"([qk])_norm\.(.*)", r"sca.\1.norm_\2.\3"),
    (SCA_NAME + r"gate\.0\.(.*)", r"sca.\1.gate.\2"),
    (SCA_NAME + r"out_proj\.(.*)", r"sca.\1.out.\2"),
]


def rename(state: Mapping[str, Any], table: list, what: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a nested state, fp32, under the table's names; what is no tensor is metadata: ignored.
    Raises ValueError for names that no row knows, or two of one meaning."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        key, new = f"{prefix}{name}", {}
        value = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if isinstance(value, Mapping):
            new = rename(value, table, what, f"{key}.")
        elif isinstance(value, Tensor):
            row = next(((m, to) for pattern, to in table if (m := re.fullmatch(pattern, key))), None)
            if row is None:
                raise ValueError(f"{what} holds an unknown tensor, {key} {list(value.shape)}")
            new = {row[0].expand(row[1]): value.detach().float()} if row[1] else {}
        if twice := new.keys() & out.keys():
            raise ValueError(f"{what} holds {twice.pop()} twice, once as {key}")
        out.update(new)
    return out


def check_fit(want: Mapping[str, Tensor], got: Mapping[str, Tensor], what: str) -> None:
    """Raises one ValueError for all tensors that are missing, unknown or of another shape."""
    shapes = [k for k in want if k in got and got[k].shape != want[k].shape]
    wrong = {
        "missing": [k for k in want if k not in got],
        "unknown": [k for k in got if k not in want],
        "of another shape": [f"{k} {list(got[k].shape)}, wanted {list(want[k].shape)}" for k in shapes],
    }
    faults = [f"{len(names)} {fault}: {', '.join(names[:4])}" for fault, names in wrong.items() if names]
    if faults:
        raise ValueError(f"{what} does not fit: {'; '.join(faults)}")


def read_tensors(path: Path) -> dict[str, Any]:
    """From a .safetensors file, a pickle of plain tensors, or a folder that holds one, as on Hugging Face."""
    if path.is_dir():
        names = [path / n for n in ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")]
        path = next((name for name in names if name.is_file()), names[0])
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        cause = str(error).strip().partition("\n")[0]
        cause = re.sub(" (This file can still|In PyTorch).*", "", cause)  # how to run the code of a stranger
        if "TorchScript" in cause:
            cause = "OpenAI's TorchScript archives need code to be read; take open_clip_model.safetensors of "
            cause += "timm/vit_large_patch14_clip_336.openai on Hugging Face, which holds the same weights"
        raise ValueError(f"cannot read {path} as plain tensors: {cause}") from error


def backbone_state(weights: Weights) -> dict[str, Tensor]:
    """A backbone's weights of any known family, a path or a state dict -> fp32 tensors under ViT's names."""
    named = isinstance(weights, Mapping)
    if not named and not isinstance(weights, (str, os.PathLike)):
        raise ValueError(f"a backbone's weights are a path or a state dict, got {type(weights).__name__}")
    state, what = (weights, "the state dict") if named else (read_tensors(Path(weights)), str(weights))
    whole = {k[9:]: v for k, v in state.items() if str(k).startswith("backbone.")}
    state = rename(whole or state, BACKBONE_NAMES, what)
    for key in list(state):
        name, part, leaf = ["", "", *key.rsplit(".", 2)][-3:]
        parts = [f"{name}.{p}.{leaf}" for p in PARTS.get(part, ())]
        if parts and all(p in state for p in parts):
            state[f"{name}.{leaf}"] = torch.cat([state.pop(p) for p in parts])
    if missing := {"cls_token", "pos_embed", "patch_embed.weight", "blocks.0.fc2.weight"} - state.keys():
        raise ValueError(f"{what} is no vision transformer of a known family: it lacks {sorted(missing)}")
    width = state["cls_token"].numel()
    state.setdefault("register_tokens", torch.zeros(0, width))
    for key in ("cls_token", "pos_embed", "register_tokens"):
        if state[key].numel() % width:
            raise ValueError(f"{what}: {key} {list(state[key].shape)} does not fit a width of {width}")
        state[key] = state[key].reshape(1, -1, width)
    if math.isqrt(rows := state["pos_embed"].shape[1]) ** 2 == rows:
        # timm's register models have the class position added to the class token: guests would get none.
        warnings.warn(f"{what} has no class position: use it only with tokens trained on it", stacklevel=3)
        state["pos_embed"] = F.pad(state["pos_embed"], (0, 0, 1, 0))
    return {key: value.clone() for key, value in state.items()} if named else state


def read_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a `Backbone` that a state under our names tells."""
    width, hidden = state["cls_token"].shape[-1], state["blocks.0.fc2.weight"].shape[1]
    convs = [k for k, v in state.items() if k.startswith("stem.") and v.ndim == 4]
    stem = tuple(len(state[k]) for k in sorted(convs, key=lambda k: int(k.split(".")[1])))
    fields = dict(CLIP) if "norm_pre.weight" in state else {}
    if registers := state["register_tokens"].shape[1]:
        fields |= dict(registers=registers, resample="bicubic-antialias")
    if state["blocks.0.fc1.weight"].shape[0] == 2 * hidden:
        fields["activation"] = "swiglu"
    fields |= dict(
        width=width, heads=width // 64 or 1, hidden=None if hidden == 4 * width else hidden, stem=stem
    )
    fields |= dict(patch_bias="patch_embed.bias" in state, layer_scale="blocks.0.ls1" in state)
    fields["depth"] = sum(k.endswith(".fc2.weight") for k in state)
    halved = sum(a < b for a, b in zip((3, *stem), stem, strict=False))
    fields["patch"] = state["patch_embed.weight"].shape[-1] * 2**halved
    return {**fields, "grid": math.isqrt(state["pos_embed"].shape[1] - 1)}


def check_target(path: Path) -> None:
    """Makes the folders of a file to be written. Raises ValueError where a device, a pipe, a folder or what
    the shell sends /dev/stdout to would have to make way for it."""
    if path.exists() and not path.is_file() or re.match("/dev/(std|fd/)|/proc/", str(path)):
        raise ValueError(f"{path} is no regular file: name another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"cannot write {path}: {path.parent} is no folder") from None


def write_atomic(path: Path, data: bytes) -> None:
    """Whole or not at all: written beside the target (of a link), synced, renamed. Makes missing folders.
    Raises ValueError as `check_target`."""
    check_target(path)
    path = real(path)
    part = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}.part")  # never longer than a name may be
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def bundled() -> Path:
    """The bundled model: beside this file in a clone, in the package `visualad_weights` where pip put it."""
    spec = importlib.util.find_spec("visualad_weights")
    folders = [Path(__file__).parent / "weights", *map(Path, spec.submodule_search_locations if spec else ())]
    for folder in folders:
        if (folder / "tiny.safetensors").is_file():
            return folder / "tiny.safetensors"
    places = " or ".join(map(str, folders))
    raise FileNotFoundError(f"the bundled model, tiny.safetensors, is not in {places}; copy it there")


def fetch(repo: str, file: str, hub: Mapping[str, Any], instead: str) -> Path:
    """A file of a Hugging Face repo; a cached copy, if there is one, without asking the network."""
    from huggingface_hub import hf_hub_download

    tries = [True] if hub["local_files_only"] else [False] if hub["force_download"] else [True, False]
    for local in tries:
        try:
            return Path(hf_hub_download(repo, file, **{**hub, "local_files_only": local}))
        except Exception as error:
            failure = error
    cause = str(failure).strip().partition("\n")[0]
    raise FileNotFoundError(
        f"could not get {file} of {repo} from Hugging Face: {cause}; {instead}"
    ) from failure


def fetch_official(name: str, hub: Mapping[str, Any]) -> Path:
    """One of the authors' files, in the torch hub cache under a name of its own, its sha256 verified."""
    file, sha256 = PRETRAINED[name]
    url = f"{os.environ.get('VISUALAD_URL') or OFFICIAL}/{file}"  # the variable: a mirror
    folder = Path(hub["cache_dir"] or torch.hub.get_dir()).expanduser() / "checkpoints"
    path = folder / f"visualad-{name}-{sha256[:8]}.pth"
    if hub["force_download"] or not path.is_file():
        try:
            if hub["local_files_only"]:
                raise OSError("local_files_only is set")
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (OSError, RuntimeError, HTTPException) as error:
            hint = f"get it elsewhere and give its path, or put it at {path}"
            raise FileNotFoundError(f"could not get {url}: {error}; {hint}") from error
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{path} is damaged: sha256 {found}, wanted {sha256}; delete it and try again")
    return path


def find(source: str, hub: Mapping[str, Any]) -> Path:
    """The checkpoint file behind whatever `from_pretrained` takes."""
    path = Path(source)
    if source in PRETRAINED:
        return fetch_official(source, hub) if PRETRAINED[source] else bundled()
    if path.is_dir():
        path = path / "model.safetensors"
    if path.is_file():
        return path
    if path.suffix in (".safetensors", ".pth", ".pt") or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        known = f"{', '.join(PRETRAINED)}, a folder that save_pretrained wrote, a Hugging Face repo id"
        raise FileNotFoundError(f"no file {path}; also taken: {known}")
    return fetch(source, "model.safetensors", hub, "give a local folder or file instead")


def default_weights(cfg: Backbone, hub: Mapping[str, Any]) -> Path:
    """The file of a backbone's weights where nobody gave any."""
    if cfg == BACKBONES["tiny"]:
        return bundled()
    if cfg.repo is None:
        raise ValueError("this backbone is hosted nowhere: pass backbone_weights=PATH")
    return fetch(cfg.repo, cfg.file, {**hub, "revision": None}, "pass backbone_weights=PATH instead")


def read_ours(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a file that `save_pretrained` wrote; the config is in its header."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {})["config"])
        later = dict(sigma=4.0, threshold=None, display_high=None, backbone_digest=None)
        config = later | config
        if isinstance(cfg := config["backbone"], str):
            config["backbone"] = BACKBONES[cfg]
        else:
            config["backbone"] = Backbone(
                **{k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items()}
            )
        if not config["backbone"].file.endswith(".safetensors"):
            raise ValueError("a backbone is fetched as safetensors only")
        if not 0 <= config["sigma"] < math.inf:
            raise ValueError("sigma must be a finite number of pixels >= 0")
        if limit := config["threshold"]:
            config["threshold"] = {**limit, "value": float(limit["value"]), "size": list(limit["size"])}
        keys = "backbone layers anchors image_size sigma threshold display_high backbone_digest".split()
        return {key: config[key] for key in keys}, read_tensors(path)
    except Exception as error:
        hint = "a backbone alone goes in as backbone_weights"
        raise ValueError(f"{path} has no sound VisualAD config in its header: {error!r}; {hint}") from error


def read_official(
    path: Path, frozen: Mapping[str, Tensor] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of one of the authors' files; an unlisted backbone takes its sizes from `frozen`."""
    data = read_tensors(path)
    needed = "backbone features_list image_size cross_attn cross_attn_config layer_transforms".split()
    if missing := [key for key in needed if data.get(key) is None]:
        raise ValueError(f"{path} is no VisualAD checkpoint: it lacks {', '.join(missing)}")
    if (name := OFFICIAL_BACKBONES.get(data["backbone"])) is None and frozen is None:
        raise ValueError(
            f"{path} is for {data['backbone']!r}, which is not listed: pass backbone_weights=PATH"
        )
    cfg = BACKBONES[name] if name else Backbone(**read_sizes(frozen))
    state = rename(data, OFFICIAL_NAMES, str(path))
    if {"tokens.anomaly", "tokens.normal"} <= state.keys():
        state["tokens"] = torch.stack([state.pop("tokens.anomaly"), state.pop("tokens.normal")])
    grid = data["image_size"] // cfg.patch  # their convolution too leaves out what makes no patch
    for key in [key for key in state if key.endswith(".pos")]:
        rows = state[key].flatten(0, -2)  # a flat table of which training used the first grid * grid rows
        if len(rows) < grid**2:
            raise ValueError(f"{path}: {key} has {len(rows)} positions, wanted {grid} x {grid}")
        state[key] = rows[: grid**2].unflatten(0, (grid, grid))
    config = dict(backbone=cfg, layers=data["features_list"], image_size=grid * cfg.patch)
    config |= dict(anchors=data["cross_attn_config"]["num_anchors"])
    return {**config, "sigma": 4.0, "threshold": None, "display_high": None, "backbone_digest": None}, state


def weights_digest(backbone: Mapping[str, Tensor]) -> str:
    """Tells a backbone's weights from others: of every 997th value of each tensor, in half precision, because
    the same weights come as fp16 and fp32 files."""
    sample = torch.cat([backbone[key].detach().flatten()[::997].half().cpu() for key in sorted(backbone)])
    return hashlib.sha256(bytes(sample.view(torch.uint8).tolist())).hexdigest()[:16]


def check_threshold(made: Any) -> None:
    kinds = dict(value=(int, float), size=(list, tuple), sigma=(int, float))
    sound = isinstance(made, dict) and all(isinstance(made.get(key), kind) for key, kind in kinds.items())
    if not (made is None or sound and len(made["size"]) == 2):
        wanted = "None or a dict of value (a float), size [H, W], sigma and made, as calibrate sets it"
        raise ValueError(f"threshold must be {wanted}; got {made!r}")


CARD = """---
library_name: visualad
tags: [anomaly-detection, zero-shot, visualad]
---
# VisualAD on {name}

Zero-shot anomaly detection with two learned tokens in a frozen vision transformer (arXiv:2603.07952).

    from visualad import VisualAD
    model = VisualAD.from_pretrained("{repo_id}")
    result = model.predict("photo.jpg")  # result.score, result.map, result.anomalous

Tapped layers {layers}, input {image_size} px, threshold {threshold}.
{notes}
"""


class VisualAD(VisualAD):
    """The same model: how it is loaded and saved. One class in three parts, so the method reads alone."""

    threshold: dict[str, Any] | None = None  # value, the size and sigma it holds for, how it was made
    display_high: float | None = None  # the map value at which `overlay` shows its full colour
    norm_loaded = False  # whether `norm` is a trained one, from a checkpoint
    backbone_digest: str | None = None  # of the weights that were loaded into a hosted backbone

    @classmethod
    def from_backbone(
        cls, backbone: str | Backbone, backbone_weights: Weights | None = None, *, layers: Layers = None,
        anchors: int = 4, image_size: int | None = None, token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None, local_files_only: bool = False,
        force_download: bool = False,
    ) -> VisualAD:  # fmt: skip
        """A frozen backbone with a fresh learned part: where training starts.

        backbone_weights: a path or a state dict; None: the backbone's Hugging Face repository. The last four
        arguments are huggingface_hub's. Raises as `from_pretrained` does.
        """
        model = cls(backbone, layers, anchors, image_size)
        if backbone_weights is None:
            hub = dict(token=token, cache_dir=cache_dir)
            hub |= dict(local_files_only=local_files_only, force_download=force_download)
            backbone_weights = default_weights(model.backbone.cfg, hub)
        return model.load_backbone(backbone_weights)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, *, backbone_weights: Weights | None = None,
        final_norm: str | None = None, device: str | torch.device | None = None,
        dtype: torch.dtype | None = None, revision: str | None = None, token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None, local_files_only: bool = False,
        force_download: bool = False,
    ) -> VisualAD:  # fmt: skip
        """A trained model, in eval mode.

        source: a name in `PRETRAINED`, a folder, a .safetensors file, one of the authors' .pth files, or a
            Hugging Face repo id, with huggingface_hub's arguments. Cached copies come before the network.
        backbone_weights: a path or a state dict; None: what is in the file, or the backbone's own repository.
        final_norm: "backbone" or "checkpoint", the trained one. None: "checkpoint", but "backbone" for the
            authors' files: their published numbers were made so.
        dtype: of the frozen backbone; its final norm and what was learned stay fp32.
        Raises ValueError for what is damaged or does not fit, FileNotFoundError for what cannot be had; warns
        where the model was trained on other backbone weights than these.
        """
        if final_norm not in (None, "backbone", "checkpoint"):
            raise ValueError(f"final_norm must be 'backbone', 'checkpoint' or None, got {final_norm!r}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
        hub = dict(revision=revision, token=token, cache_dir=cache_dir)
        hub |= dict(local_files_only=local_files_only, force_download=force_download)
        path = find(os.fspath(source), hub)
        ours = path.suffix == ".safetensors"
        frozen = None if backbone_weights is None else backbone_state(backbone_weights)
        config = None
        try:
            config, state = read_ours(path) if ours else read_official(path, frozen)
            cfg = config["backbone"]
            with torch.device("meta"):  # no random numbers that are overwritten at once
                model = cls(cfg, config["layers"], config["anchors"], config["image_size"])
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            if config is None and str(path) in str(error):  # raised by the readers, which know what is wrong
                raise
            raise ValueError(f"{path} is no sound VisualAD checkpoint: {error!r}") from error
        for name in ("mean", "std"):
            setattr(model, name, torch.tensor(getattr(cfg, name)).view(3, 1, 1))
        inside = {k.removeprefix("backbone."): state.pop(k) for k in list(state) if k.startswith("backbone.")}
        if frozen is None:
            frozen = inside or backbone_state(default_weights(cfg, hub))
        check_fit(model.backbone.state_dict(), frozen, "the backbone's file")
        model.backbone_digest = weights_digest(frozen) if cfg.repo else None
        if (made := config["backbone_digest"]) not in (None, model.backbone_digest):
            told = f"{path} was trained on backbone weights of digest {made}, not {model.backbone_digest}"
            warnings.warn(f"{told}: its scores mean nothing on these; pass backbone_weights", stacklevel=2)
        model.sigma = config["sigma"]
        model.norm_loaded = final_norm == "checkpoint" or (ours and not final_norm)
        if not model.norm_loaded:
            state |= {key: frozen[key].clone() for key in ("norm.weight", "norm.bias")}
        state = {key: value.float() for key, value in state.items()}
        check_fit(model.learned(), state, str(path))
        model.load_state_dict(state | {f"backbone.{k}": v.cpu() for k, v in frozen.items()}, assign=True)
        for name, parameter in model.backbone.named_parameters():
            if dtype is not None and not name.startswith("norm."):
                parameter.data = parameter.data.to(dtype)
        if model.norm_loaded and made in (None, model.backbone_digest):  # else other scores: none holds
            model.threshold, model.display_high = config["threshold"], config["display_high"]
        try:
            return model.to(device).eval()
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"device {device}: {error}") from error

    def load_backbone(self, weights: Weights) -> VisualAD:
        """Fills the frozen backbone, strictly, from a path or a state dict; `norm`, its copy, too, while that
        was neither trained nor loaded. Other weights than it had give other scores: the threshold goes.
        Returns the model. Raises ValueError, FileNotFoundError."""
        state, own = backbone_state(weights), self.backbone.norm
        check_fit(self.backbone.state_dict(), state, "the backbone's file")
        digest = weights_digest(state)
        if digest != weights_digest(self.backbone.state_dict()):
            self.threshold = self.display_high = None
        same = all(map(torch.equal, self.norm.parameters(), own.parameters()))  # no training step yet
        self.backbone.load_state_dict(state)
        self.backbone_digest = digest if self.backbone.cfg.repo else None
        if same and not self.norm_loaded:
            self.norm.load_state_dict(own.state_dict())
        return self

    def learned(self) -> dict[str, Tensor]:
        """Exactly what training changes and saving keeps: tokens, final norm, SCA and SAF."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("backbone.")}

    def config(self) -> dict[str, Any]:
        """What rebuilds the model around its tensors, as JSON values."""
        cfg = self.backbone.cfg
        listed = next((name for name, known in BACKBONES.items() if known == cfg and cfg.repo), None)
        config = dict(backbone=listed or asdict(cfg), layers=self.layers, anchors=self.anchors)
        config |= dict(image_size=self.image_size, sigma=self.sigma, threshold=self.threshold)
        config |= dict(display_high=self.display_high, backbone_digest=self.backbone_digest)
        return json.loads(json.dumps(config))

    def save_pretrained(
        self, save_directory: str | os.PathLike, *, config: Mapping | None = None,
        repo_id: str | None = None, push_to_hub: bool = False, model_card_kwargs: Mapping | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:  # fmt: skip
        """Writes model.safetensors, complete in itself, config.json, a copy of its config, and a card,
        README.md, if there is none. The frozen backbone goes into the file only if it is hosted nowhere.

        The final norm that is in use goes in as the trained one, also where it was the backbone's own.
        config: further JSON entries. model_card_kwargs: `notes` is text for the card. push_to_hub: upload to
        repo_id too (None: the folder's name); returns the commit's address then.
        """
        from safetensors.torch import save

        folder = Path(save_directory)
        check_threshold(self.threshold)  # an error now, not when it is loaded
        config = {**(config or {}), **self.config()}
        state = self.learned() if self.backbone.cfg.repo else self.state_dict()
        state = {key: value.contiguous() for key, value in state.items()}
        if not (folder / "README.md").exists():
            name = config["backbone"] if isinstance(config["backbone"], str) else "a backbone of its own"
            card = {"notes": "", **config, **(model_card_kwargs or {}), "name": name}
            card["repo_id"] = repo_id or str(save_directory)
            card["threshold"] = self.threshold and f"{self.threshold['value']:.4f}"
            write_atomic(folder / "README.md", CARD.format(**card).encode(errors="backslashreplace"))
        write_atomic(folder / "config.json", json.dumps(config, indent=2).encode())
        header = {"format": "pt", "config": json.dumps(config)}
        write_atomic(folder / "model.safetensors", save(state, header))
        if push_to_hub:
            upload = dict(config=config, model_card_kwargs=model_card_kwargs) | push_to_hub_kwargs
            return self.push_to_hub(repo_id or folder.name, **upload)
        return None

    def push_to_hub(
        self, repo_id: str, *, config: Mapping | None = None, commit_message: str = "Upload VisualAD",
        private: bool | None = None, token: str | bool | None = None, branch: str | None = None,
        model_card_kwargs: Mapping | None = None, **upload: Any,
    ) -> str:  # fmt: skip
        """Uploads what `save_pretrained` writes and returns the commit's address. A card that the repository
        has stays, unless model_card_kwargs say what a new one is to tell. Arguments are those of
        huggingface_hub; `upload`: create_pr, allow_patterns, ignore_patterns, delete_patterns."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        private = {} if private is None else {"private": private}
        repo_id = api.create_repo(repo_id, exist_ok=True, **private).repo_id
        upload |= dict(repo_id=repo_id, commit_message=commit_message, revision=branch)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, config=config, repo_id=repo_id, model_card_kwargs=model_card_kwargs)
            if not model_card_kwargs and api.file_exists(repo_id, "README.md", revision=branch):
                (Path(folder) / "README.md").unlink()
            return api.upload_folder(folder_path=folder, **upload)


# --- 7. images in, predictions out -----------------------------------------------------------------------
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
HEATMAP = "visualad heatmap"  # what a heatmap's PNG says of its software


class Prediction(NamedTuple):
    """Of one image, whose size the map has."""

    score: float  # mean of the brightest 1 % of the smoothed map, at the network's input size
    map: np.ndarray  # [H, W], float32, smoothed
    anomalous: bool | None  # score > threshold; None without a threshold for this size and sigma


def real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on a link that leads in a circle


def is_heatmap(path: Path) -> bool:
    """Whether an earlier run of this library wrote this picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Software") == HEATMAP
    except Exception:  # no image, or one too large to be opened: none of ours
        return False


def image_files(folder: Path) -> list[Path]:
    """Every image below a folder, sorted, also through links to folders; but what is hidden, and the heatmaps
    of earlier runs. Raises FileNotFoundError where there is none."""

    def walk(here: Path, above: tuple[Path, ...]) -> Iterator[Path]:
        place = real(here)
        for path in here.iterdir() if place not in above else ():  # a link may lead in a circle
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield from walk(path, (*above, place))
            elif path.suffix.lower() in IMAGE_SUFFIXES and not (path.suffix == ".png" and is_heatmap(path)):
                yield path

    if files := sorted(walk(folder, ())):
        return files
    looked = " ".join(sorted(IMAGE_SUFFIXES))
    raise FileNotFoundError(f"no image below {folder}; looked for {looked}, heatmaps of ours left out")


def is_one(images: Any) -> bool:
    """Whether this is one image (or a mistake), not several."""
    if isinstance(images, (str, os.PathLike)):
        if not os.fspath(images):  # Path("") is the current folder
            raise ValueError("the name of an image or folder is empty")
        return not Path(images).is_dir()
    if isinstance(images, Tensor):
        return images.ndim != 4
    return hasattr(images, "shape") or not isinstance(images, Iterable)


def each(images: Any) -> Iterator[Any]:
    """Whatever `predict` takes, one image at a time."""
    if is_one(images):
        yield images
    elif isinstance(images, Tensor):
        yield from images
    else:
        for image in image_files(Path(images)) if isinstance(images, (str, os.PathLike)) else images:
            yield from each(image)


def decode(image: Any) -> Tensor | np.ndarray:
    """A path or a PIL image, turned as its EXIF says -> RGB [H, W, 3] in 8 bits, or [H, W] in 16; anything
    else passes through."""
    import numpy as np

    if isinstance(image, (str, os.PathLike)):
        from PIL import Image

        try:
            with Image.open(image) as file:
                return decode(file)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"cannot read {os.fspath(image)} as an image: {error}") from error
    if not hasattr(image, "getexif"):
        return image
    try:
        image.load()
    except Exception as error:
        raise ValueError(f"cannot read the PIL image: {error}") from error
    from PIL import ImageOps

    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    if image.mode in ("I", "F") and not wide:
        raise ValueError(f"mode {image.mode} has no known range; pass an array in [0, 1]")
    image = ImageOps.exif_transpose(image)
    return np.array(image, dtype=np.uint16) if wide else np.array(image.convert("RGB"))


def to_tensor(image: Any) -> Tensor:
    """Any single image that `predict` takes -> RGB [3, H, W], uint8, or fp32 in [0, 1] if 8 bits are too few.
    Raises ValueError for anything else, FileNotFoundError for a missing file."""
    import numpy as np

    image = decode(image)
    if not isinstance(image, (np.ndarray, Tensor)):
        raise ValueError(f"an image is a path, a PIL image, an array or a tensor, got {type(image).__name__}")
    got = f"{image.dtype} {list(image.shape)}"
    if isinstance(image, np.ndarray):
        if image.dtype.kind == "u" and image.itemsize == 2:  # in either byte order
            image = image.astype(np.float32) / 65535
        if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
            raise ValueError(f"an array must be uint8, uint16 or float in [0, 1], got {got}")
        # A copy: the caller's array may be read-only, reversed or in another byte order.
        image = torch.from_numpy(np.array(image, dtype=np.uint8 if image.dtype == np.uint8 else np.float32))
        if image.ndim in (2, 3):
            image = image.expand(3, -1, -1) if image.ndim == 2 else image.movedim(-1, 0)
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"an array must be [H, W, 3] or [H, W], a tensor [3, H, W], not empty; got {got}")
    image = image.detach().cpu()
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"a tensor must be uint8 or float in [0, 1], got {got}")
    image = image.float()
    low, high = (float(value) for value in image.aminmax())
    if not -1e-6 <= low <= high <= 1 + 1e-6:  # rounding; `resize` clamps
        raise ValueError(f"float values must lie in [0, 1], got {low:g} to {high:g}")
    levels = (image * 255).round()
    # An 8-bit image that comes as floats is resized as one: the same picture must get the same score.
    return levels.byte() if torch.allclose(levels / 255, image, rtol=0, atol=1e-6) else image


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
        while waiting:
            yield waiting.popleft().result()


def overlay(image: Any, map: np.ndarray | Tensor, *, low: float = 0.0, high: float) -> Any:
    """The heatmap on its image, as a PIL image: transparent at `low`, yellow, then full red at `high`. Keep
    one scale for all images, so that a normal one stays plain.

    image: anything single that `predict` takes. map: [H, W], of its size. Raises ValueError.
    """
    import numpy as np
    from PIL import Image

    map = map.detach().cpu() if isinstance(map, Tensor) else torch.from_numpy(np.array(map, np.float32))
    image, map = to_tensor(image), map.float()
    if map.shape != image.shape[1:] or not map.isfinite().all() or not low < high:
        got = f"{list(map.shape)} on {list(image.shape[1:])}, {low} to {high}"
        raise ValueError(f"map must be finite and of the image's size, and low be below high; got {got}")
    image = image / 255 if image.dtype == torch.uint8 else image
    heat = ((map - low) / (high - low)).clamp(0, 1)
    red = torch.stack([torch.ones_like(heat), 1 - heat, torch.zeros_like(heat)])
    pixels = ((image + heat * (red - image)) * 255).round().byte()
    return Image.fromarray(pixels.movedim(0, -1).contiguous().numpy())


class VisualAD(VisualAD):
    """VisualAD, whole: `from_pretrained` loads it, `predict` scores images, `calibrate` sets its threshold,
    `save_pretrained` keeps it; `forward` and `infer` take tensors. Arguments: see section 4."""

    def predict(
        self, images: Any, *, size: int | Sequence[int] | None = None, batch_size: int = 8,
        sigma: float | None = None,
    ) -> Prediction | list[Prediction]:  # fmt: skip
        """Scores and maps for images of any size: one `Prediction` for one image, else a list in order.

        images: a path, a folder (recursive, sorted), a PIL image, an array [H, W, 3] or [H, W] (uint8, uint16
            or float in [0, 1]), a tensor [3, H, W] or [B, 3, H, W], or an iterable that mixes them.
        size: the network's input, a side or (H, W), multiples of the patch; None: `image_size`.
        sigma: of the smoothing, in pixels of that input; None: the model's. The score is taken there, the map
            then resized.
        Raises ValueError for what is no image, FileNotFoundError.
        """
        found = list(self.predict_iter(images, size=size, batch_size=batch_size, sigma=sigma))
        return found[0] if is_one(images) else found

    def predict_iter(
        self, images: Any, *, size: int | Sequence[int] | None = None, batch_size: int = 8,
        sigma: float | None = None,
    ) -> Iterator[Prediction]:  # fmt: skip
        """`predict`, one prediction after the other, in constant memory. Up to three batches are read ahead;
        with batch_size=1 each answer comes before the next image is asked for."""
        size = self.input_size(size)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        sigma = self.sigma if sigma is None else sigma
        limit = self.threshold_for(size, sigma)

        def prepare(image: Any) -> tuple[Tensor, torch.Size]:
            if isinstance(image, tuple):
                return image
            image = to_tensor(image)
            return resize(image, size), image.shape[1:]

        # Threads read files alone: whoever yields arrays may use their memory again for the next one.
        items = (x if isinstance(x, (str, os.PathLike)) else prepare(x) for x in each(images))
        ready = ahead(prepare, items, 2 * batch_size if batch_size > 1 else 0)
        while batch := list(islice(ready, batch_size)):
            maps, scores = self.infer(torch.stack([x for x, _ in batch]).to(self.tokens.device), sigma)
            if not scores.isfinite().all():
                raise ValueError("scores are not finite: damaged weights, or a dtype too narrow for them")
            for small, score, (_, own) in zip(maps, scores.tolist(), batch, strict=True):
                heat = upsample(small[None, None].float(), own)[0, 0].cpu().numpy()
                yield Prediction(score, heat, None if limit is None else score > limit)

    def input_size(self, size: int | Sequence[int] | None) -> tuple[int, int]:
        size = self.image_size if size is None else size
        try:
            h, w = map(index, size if isinstance(size, Sequence) else (size, size))
        except (TypeError, ValueError):
            raise ValueError(f"size must be a side or (H, W), whole pixels; got {size!r}") from None
        check_size((h, w), self.backbone.cfg.patch)
        return h, w

    def threshold_for(self, size: tuple[int, int], sigma: float) -> float | None:
        """The threshold's value, if it was made at this size and sigma: others give other scores."""
        check_threshold(made := self.threshold)
        return made["value"] if made and (tuple(made["size"]), made["sigma"]) == (size, sigma) else None

    def calibrate(
        self, normal_images: Any, quantile: float = 0.99, *, size: int | Sequence[int] | None = None,
        batch_size: int = 8, sigma: float | None = None,
    ) -> float:  # fmt: skip
        """Sets `threshold` just above the score that this quantile of normal images keeps to; returns it.
        n images cannot hold false alarms below about 1 / (n + 1): for 1 % take 100. Raises ValueError."""
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must lie in (0, 1], got {quantile}")
        found = self.predict_iter(normal_images, size=size, batch_size=batch_size, sigma=sigma)
        scores = sorted(prediction.score for prediction in found)
        if not scores:
            raise ValueError("calibrate needs at least one normal image")
        place = math.ceil(quantile * len(scores) - 1e-9)  # 0.07 * 100 is a little more than 7
        value = scores[max(place, 1) - 1]
        value += 1e-5  # an image in another batch has other last digits
        made = f"{quantile:g} of {len(scores)} normal images"
        sigma = float(self.sigma if sigma is None else sigma)
        self.threshold = dict(value=value, size=list(self.input_size(size)), sigma=sigma, made=made)
        return value


# --- 8. command line -------------------------------------------------------------------------------------
def find_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def targets(sources: Sequence[Path], out: Path) -> dict[Path, Path]:
    """{image: its heatmap}, which keeps the path below the given folder; no two images share one."""
    found, taken, place = {}, set(), real(out)
    for source in sources:
        for path in image_files(source) if source.is_dir() else [source]:
            if path in found:
                continue
            if place in real(path).parents:
                raise ValueError(f"--out {out} holds images to be read, as {path}: choose another folder")
            target = out / path.relative_to(source if source.is_dir() else source.parent).with_suffix(".png")
            stem, n = target.stem, 1
            while target in taken:  # a.jpg beside a.png, or one name in two folders
                target, n = target.with_stem(f"{stem}-{n}"), n + 1
            taken.add(target)
            found[path] = target
    return found


def heatmap_png(image: Any) -> bytes:
    """A PNG of a PIL image that says who wrote it, so that `check_heatmaps` lets a later run replace it."""
    from PIL.PngImagePlugin import PngInfo

    info, png = PngInfo(), io.BytesIO()
    info.add_text("Software", HEATMAP)
    image.save(png, "PNG", compress_level=1, pnginfo=info)
    return png.getvalue()


def check_heatmaps(paths: Iterable[Path]) -> None:
    """Raises ValueError where anything but a heatmap of an earlier run would be replaced, also by a link."""
    for path in filter(os.path.lexists, paths):
        if not is_heatmap(path):
            raise ValueError(f"{path} is there and is no heatmap of an earlier run: choose another folder")


def nonempty(name: str) -> Path:
    """A path for argparse. An empty one is an unset variable of the shell, not the current folder."""
    if not name:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(name)


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that mean the same in every program of this library; `load_model` reads them."""
    add = parser.add_argument
    add("--model", default="tiny", help=f"{', '.join(PRETRAINED)}, a Hugging Face repo, a folder or a file")
    add("--backbone-weights", type=nonempty, metavar="PATH", help="of the frozen backbone, for offline use")
    add("--final-norm", choices=("backbone", "checkpoint"), help="default: as the file's numbers were made")
    add("--size", metavar="N|HxW", help="network input, a side or both; default: the model's")
    add("--sigma", type=float, help="of the smoothing, in pixels of the input; default: the model's")
    add("--device", default=find_device(), help="(%(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the backbone")
    add("--batch-size", type=int, default=8, metavar="N", help="(%(default)s)")


def check_report(path: Path, args: argparse.Namespace, inputs: Iterable[Path]) -> None:
    """For a file of results. Raises ValueError as `check_target`, where the run reads this file, and for the
    name of an image or of weights, or without permission."""
    check_target(path)
    model = Path(args.model)
    read = {real(p) for p in (*inputs, args.backbone_weights, model, model / "model.safetensors") if p}
    if real(path) in read or real(path).suffix.lower() in IMAGE_SUFFIXES | {".safetensors", ".pth", ".bin"}:
        raise ValueError(f"{path} is read in this run or named like an image or weights: name another file")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"no permission to write {path}")


def load_model(args: argparse.Namespace) -> tuple[VisualAD, tuple[int, int]]:
    """The model and its input size (H, W); the model's sigma goes into `args` where none was given. Raises as
    `from_pretrained` and `input_size` do, and for a batch size or sigma that nothing can be scored with."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.sigma is not None and not 0 <= args.sigma < math.inf:
        raise ValueError(f"--sigma must be a finite number of pixels >= 0, got {args.sigma}")
    if args.size and not re.fullmatch(r"\d+(x\d+)?", args.size):
        raise ValueError(f"--size must be N or HxW, got {args.size}")
    size = [int(side) for side in args.size.split("x")] * (2 - args.size.count("x")) if args.size else None
    options = dict(backbone_weights=args.backbone_weights, final_norm=args.final_norm, device=args.device)
    model = VisualAD.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **options)
    args.sigma = model.sigma if args.sigma is None else args.sigma
    return model, model.input_size(size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores images and writes heatmaps. Exit status: 0; 1 where an image was unreadable; 2 for an error;
    130 when interrupted."""
    parser = argparse.ArgumentParser(prog="visualad", description="Finds anomalies in images of anything.")
    add = parser.add_argument
    add("images", nargs="+", type=nonempty, metavar="IMAGE_OR_FOLDER")
    model_flags(parser)
    add("--out", type=nonempty, default=Path("heatmaps"), metavar="FOLDER", help="for heatmaps (%(default)s)")
    add("--json", type=nonempty, metavar="FILE", help="write the results here too")
    which = parser.add_mutually_exclusive_group().add_argument
    which("--threshold", type=float, metavar="X", help="anomalous above this score; default: the model's own")
    which("--calibrate", type=nonempty, metavar="FOLDER", help="take it from a folder of normal images")
    if threading.current_thread() is threading.main_thread():  # docker and timeout end a run so
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(parser.parse_args(arguments))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"visualad: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("visualad: interrupted", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm  # comes with huggingface_hub

    if args.threshold is not None and not math.isfinite(args.threshold):
        raise ValueError(f"--threshold must be a finite number, got {args.threshold}")
    files = targets(args.images, args.out)
    good = [*targets([args.calibrate], args.out)] if args.calibrate else []
    if args.json:
        check_report(args.json, args, [*files, *good])  # now, not after an hour
    check_heatmaps(files.values())
    check_target(args.out / "any.png")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that it cannot write stops nothing
    model, size = load_model(args)
    settings = dict(size=size, sigma=args.sigma, batch_size=args.batch_size)
    if good:
        model.calibrate(good, **settings)
        print(f"calibrated on {len(good)} images of {args.calibrate}")
    if args.threshold is not None:
        model.threshold = dict(value=args.threshold, size=list(size), sigma=args.sigma, made="--threshold")
    high = model.display_high or len(model.layers)  # half of what the map can reach
    images, errors, read = [], [], deque()

    def attempt(path: Path) -> tuple[Path, Tensor | Exception]:
        try:
            return path, to_tensor(path)
        except (ValueError, OSError) as error:
            return path, error

    def readable() -> Iterator[Tensor]:
        for path, image in ahead(attempt, files, 2):
            if isinstance(image, Tensor):
                read.append((path, image))
                yield image
            else:
                errors.append(dict(path=str(path), error=str(image)))
                tqdm.write(f"{'-':>8}  {'ERROR':9}  {path}: {image}", file=sys.stderr)

    print(f"{'score':>8}  {'verdict':9}  image")
    results = tqdm(model.predict_iter(readable(), **settings), total=len(files), disable=None, leave=False)
    try:
        for score, heat, anomalous in results:
            path, image = read.popleft()
            write_atomic(files[path], heatmap_png(overlay(image, heat, high=high)))
            images.append(dict(path=str(path), score=score, anomalous=anomalous, heatmap=str(files[path])))
            verdict = {None: "-", True: "ANOMALOUS", False: "normal"}[anomalous]
            tqdm.write(f"{score:8.4f}  {verdict:9}  {path}", file=sys.stdout)
    finally:  # also when interrupted: what was found is not lost
        if args.json and (images or errors):  # else what an earlier run found is worth more
            settings |= dict(threshold=model.threshold, display_high=high, final_norm=args.final_norm)
            settings |= dict(device=args.device, dtype=args.dtype)
            report = dict(model=args.model, settings=settings, images=images, errors=errors)
            report |= dict(complete=len(images) + len(errors) == len(files))
            write_atomic(args.json, json.dumps(report, indent=2).encode())
    limit = model.threshold_for(size, args.sigma)
    verdict = (
        f"no threshold{' for this size and sigma' if model.threshold else ''}"
        if limit is None
        else f"{sum(i['anomalous'] for i in images)} above {limit:.4f}"
    )
    print(f"{len(images)} images, {verdict}, {len(errors)} unreadable; heatmaps in {args.out}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
