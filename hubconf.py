"""torch.hub entry points. `pretrained` is for all of them:

True: the published weights ("visa" where there are two); "visa" or "mvtec": the authors' checkpoints;
SOURCE: whatever `VisualAD.from_pretrained` takes; False: nothing is downloaded, all is random.
Further keywords go to `VisualAD.from_pretrained`. Each returns a `VisualAD`: predict, forward, infer.
"""

from dataclasses import replace as _replace

from visualad import BACKBONES as _BACKBONES
from visualad import VisualAD as _VisualAD

dependencies = ["torch", "safetensors", "huggingface_hub", "numpy"]


def _build(backbone: str, pretrained: bool | str, kwargs: dict) -> _VisualAD:
    if pretrained is False:
        if kwargs:
            raise ValueError(f"pretrained=False loads nothing and takes no {', '.join(kwargs)}")
        return _VisualAD(backbone).eval()
    source = "visa" if pretrained is True and backbone == "clip-vit-l14-336" else pretrained
    if backbone == "clip-vit-l14-336" and source in ("visa", "mvtec"):
        source = f"clip-vit-l14-336-{source}"
    elif backbone == "tiny" and source is True:
        source = "tiny"
    elif source in (True, "visa", "mvtec"):
        raise ValueError(
            f"nobody has published VisualAD weights ({source}) for {backbone}: train them with train.py and "
            "pass their folder or Hugging Face repo as pretrained, or pass pretrained=False"
        )
    model = _VisualAD.from_pretrained(source, **kwargs)
    known = _BACKBONES[backbone]  # a file of one's own backbone says all of it but where it is hosted
    if _replace(model.backbone.cfg, repo=known.repo, file=known.file) != known:
        raise ValueError(f"{source} was not trained on {backbone}, the backbone of this entry point")
    return model


def visualad_tiny(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """The bundled 7 MB model, trained on procedural images alone: 224 px, for a first look and for tests."""
    return _build("tiny", pretrained, kwargs)


def visualad_clip_vitl14_336(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """CLIP ViT-L/14@336px at 518 px, the paper's model: pretrained: "visa" (True), "mvtec", source, False."""
    return _build("clip-vit-l14-336", pretrained, kwargs)


def visualad_clip_vitl14(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """CLIP ViT-L/14 at 518 px; no published weights: pretrained is a source of yours, or False."""
    return _build("clip-vit-l14", pretrained, kwargs)


def visualad_clip_vitb16(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """CLIP ViT-B/16 at 512 px; no published weights: pretrained is a source of yours, or False."""
    return _build("clip-vit-b16", pretrained, kwargs)


def visualad_clip_vitb32(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """CLIP ViT-B/32 at 512 px; no published weights: pretrained is a source of yours, or False."""
    return _build("clip-vit-b32", pretrained, kwargs)


def visualad_dinov2_vits14(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """DINOv2 ViT-S/14 at 518 px; no published weights: pretrained is a source of yours, or False."""
    return _build("dinov2-vit-s14", pretrained, kwargs)


def visualad_dinov2_vitb14(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """DINOv2 ViT-B/14 at 518 px; no published weights: pretrained is a source of yours, or False."""
    return _build("dinov2-vit-b14", pretrained, kwargs)


def visualad_dinov2_vitl14(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """DINOv2 ViT-L/14 at 518 px; no published weights: pretrained is a source of yours, or False."""
    return _build("dinov2-vit-l14", pretrained, kwargs)


def visualad_dinov2_vitg14(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """DINOv2 ViT-g/14 at 518 px; no published weights: pretrained is a source of yours, or False."""
    return _build("dinov2-vit-g14", pretrained, kwargs)


def visualad_dinov2_vits14_reg(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """DINOv2 ViT-S/14 with registers at 518 px; no published weights: pretrained is a source, or False."""
    return _build("dinov2-vit-s14-reg", pretrained, kwargs)


def visualad_dinov2_vitb14_reg(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """DINOv2 ViT-B/14 with registers at 518 px; no published weights: pretrained is a source, or False."""
    return _build("dinov2-vit-b14-reg", pretrained, kwargs)


def visualad_dinov2_vitl14_reg(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """DINOv2 ViT-L/14 with registers at 518 px; no published weights: pretrained is a source, or False."""
    return _build("dinov2-vit-l14-reg", pretrained, kwargs)


def visualad_dinov2_vitg14_reg(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
    """DINOv2 ViT-g/14 with registers at 518 px; no published weights: pretrained is a source, or False."""
    return _build("dinov2-vit-g14-reg", pretrained, kwargs)
