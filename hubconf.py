"""torch.hub entry points: each returns a `VisualAD` (predict, forward, infer) on the backbone of its name.

pretrained: True, the published weights ("visa" where there are two); "visa" or "mvtec", the authors'; a
source, whatever `VisualAD.from_pretrained` takes; False, nothing is downloaded and all is random.
Further keywords go to `VisualAD.from_pretrained`, with False to `VisualAD` itself.
"""

from collections.abc import Callable as _Callable
from dataclasses import replace as _replace

from visualad import BACKBONES as _BACKBONES
from visualad import VisualAD as _VisualAD

dependencies = ["torch", "safetensors", "huggingface_hub", "numpy"]


def _entry(
    backbone: str, weights: str = "no published weights: pretrained is a source of yours, or False"
) -> _Callable:
    def entry(pretrained: bool | str = True, **kwargs: object) -> _VisualAD:
        if pretrained is False:
            return _VisualAD(backbone, **kwargs).eval()
        source = "visa" if pretrained is True and backbone == "clip-vit-l14-336" else pretrained
        if backbone == "clip-vit-l14-336" and source in ("visa", "mvtec"):
            source = f"clip-vit-l14-336-{source}"
        elif backbone == "tiny" and source is True:
            source = "tiny"
        elif source in (True, "visa", "mvtec"):
            raise ValueError(
                f"nobody has published VisualAD weights ({source}) for {backbone}: train them with train.py "
                "and pass their folder or Hugging Face repo as pretrained, or pass pretrained=False"
            )
        model = _VisualAD.from_pretrained(source, **kwargs)
        known = _BACKBONES[backbone]  # a file of one's own backbone says all of it but where it is hosted
        if _replace(model.backbone.cfg, repo=known.repo, file=known.file) != known:
            raise ValueError(f"{source} was not trained on {backbone}, the backbone of this entry point")
        return model

    cfg = _BACKBONES[backbone]
    entry.__doc__ = f"VisualAD on {backbone} at {cfg.image_size // cfg.patch * cfg.patch} px; {weights}."
    return entry


visualad_tiny = _entry(
    "tiny", "bundled, 7 MB, trained on procedural images alone: for a first look and for tests"
)
visualad_clip_vitl14_336 = _entry(
    "clip-vit-l14-336", 'the paper\'s model: pretrained is "visa" (True) or "mvtec"'
)
visualad_clip_vitl14 = _entry("clip-vit-l14")
visualad_clip_vitb16 = _entry("clip-vit-b16")
visualad_clip_vitb32 = _entry("clip-vit-b32")
visualad_dinov2_vits14 = _entry("dinov2-vit-s14")
visualad_dinov2_vitb14 = _entry("dinov2-vit-b14")
visualad_dinov2_vitl14 = _entry("dinov2-vit-l14")
visualad_dinov2_vitg14 = _entry("dinov2-vit-g14")
visualad_dinov2_vits14_reg = _entry("dinov2-vit-s14-reg")
visualad_dinov2_vitb14_reg = _entry("dinov2-vit-b14-reg")
visualad_dinov2_vitl14_reg = _entry("dinov2-vit-l14-reg")
visualad_dinov2_vitg14_reg = _entry("dinov2-vit-g14-reg")
visualad_dinov3_vits16 = _entry("dinov3-vit-s16")
visualad_dinov3_vits16plus = _entry("dinov3-vit-s16plus")
visualad_dinov3_vitb16 = _entry("dinov3-vit-b16")
visualad_dinov3_vitl16 = _entry("dinov3-vit-l16")
visualad_dinov3_vith16plus = _entry("dinov3-vit-h16plus")
