from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visualad import Backbone, VisualAD

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs would ignore it

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
SMALL = Backbone(64, 4, 1, 14, 4, image_size=56, layers=(2, 4))  # a DINOv2 that nobody hosts


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """What the authors' program printed; the README beside the file says how it was made."""
    return load_file(GOLDEN / "golden_clip.safetensors")


@pytest.fixture
def official() -> VisualAD:
    return VisualAD.from_pretrained(
        GOLDEN / "visualad_official.pth", backbone_weights=GOLDEN / "clip_openai.safetensors"
    )


@pytest.fixture
def model() -> VisualAD:
    """A small random model, in eval mode."""
    torch.manual_seed(0)
    return VisualAD(SMALL).eval()
