"""The file copied alone, cut off, installed, or loaded through torch.hub: pytest tests/test_single_file.py"""

from __future__ import annotations

import inspect
import re
import sys
import zipfile
from dataclasses import replace

import pytest
from conftest import CLIP, OFFICIAL, ROOT, python

import hubconf
import visualad
from visualad import BACKBONES, VisualAD

SOURCE = (ROOT / "visualad.py").read_text()


def test_the_method_is_one_class_read_in_330_lines_and_stands_alone(tmp_path):
    start, end = SOURCE.index("# --- 1."), SOURCE.index("# --- 6.")
    assert len(SOURCE[start:end].strip().splitlines()) <= 330
    assert SOURCE.count("class VisualAD(") == SOURCE.count("class VisualADNet(") == 1
    (tmp_path / "method.py").write_text(SOURCE[:end])
    code = "import torch, method; print(method.VisualADNet('tiny')(torch.rand(1, 3, 80, 160)).map.shape)"
    assert "[1, 80, 160]" in python("-c", code, folder=tmp_path)


def test_copied_alone_it_imports_torch_alone_and_works_and_says_what_is_missing(tmp_path):
    assert {*re.findall(r"^(?:import|from) (\w+)", SOURCE, re.M)} - sys.stdlib_module_names == {"torch"}
    (tmp_path / "visualad.py").write_text(SOURCE)
    code = f"""
from visualad import VisualAD, torch
print(VisualAD("tiny").predict(torch.rand(3, 50, 70)).map.shape)
m = VisualAD.from_pretrained({str(OFFICIAL)!r}, backbone_weights={str(CLIP)!r})
print(m.predict(torch.rand(3, 50, 70)).anomalous)
try:
    VisualAD.from_pretrained("tiny")
except FileNotFoundError as error:
    print(error)
"""
    shape, verdict, missing = python("-c", code, folder=tmp_path).splitlines()
    assert (shape, verdict) == ("(50, 70)", "None") and "tiny.safetensors" in missing


def test_the_wheel_carries_the_module_the_command_and_the_bundled_model(tmp_path):
    python("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
        entry = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "visualad = visualad:main" in archive.read(entry).decode()
    assert names == {"visualad.py", "visualad_weights/tiny.safetensors", "visualad_weights/README.md"}
    code = "from visualad import VisualAD; print(VisualAD.from_pretrained('tiny').layers)"
    assert python("-c", code, folder=tmp_path, PYTHONPATH=str(tmp_path / "site")).strip() == "(1, 3)"


# --- torch.hub


def test_hub_loads_beside_a_foreign_utils_module(tmp_path):
    (tmp_path / "utils.py").write_text("MINE = True\n")
    code = f"""
import sys, torch, utils
model = torch.hub.load({str(ROOT)!r}, "visualad_tiny", source="local")
shape = model.predict(torch.rand(3, 40, 50)).map.shape
print(utils.MINE, sys.modules["utils"] is utils, model.training, *shape)
"""
    assert python("-c", code, folder=tmp_path).split() == ["True", "True", "False", "40", "50"]


def test_hub_lists_models_only_each_with_its_help():
    public = {n: f for n, f in vars(hubconf).items() if callable(f) and not n.startswith("_")}
    names = [name.replace("-vit-", "_vit").replace("-", "_") for name in BACKBONES]
    assert set(public) == {f"visualad_{name}" for name in names}
    assert {"visualad_tiny", "visualad_clip_vitl14_336", "visualad_dinov3_vits16plus"} < set(public)
    for name, function in public.items():
        assert function.__doc__ and "px" in function.__doc__, name
        assert next(iter(inspect.signature(function).parameters)) == "pretrained"
    assert set(hubconf.dependencies) == {"torch", "safetensors", "huggingface_hub", "numpy"}


def test_hub_without_weights_downloads_nothing_and_says_where_nobody_has_published_any():
    model = hubconf.visualad_dinov2_vits14_reg(pretrained=False)
    assert model.backbone.cfg.registers == 4 and model.layers == (3, 6, 9, 12) and not model.training
    for pretrained in (True, "visa", "mvtec"):
        with pytest.raises(ValueError, match="dinov3-vit-s16.*train.py"):
            hubconf.visualad_dinov3_vits16(pretrained=pretrained)
    with pytest.raises(ValueError, match="visa.*tiny"):
        hubconf.visualad_tiny("visa")


def test_hub_takes_a_source_of_its_own_backbone_only(tmp_path):
    for name, backbone in (("tiny", "tiny"), ("own", replace(BACKBONES["dinov2-vit-s14"], repo=None))):
        VisualAD(backbone).save_pretrained(tmp_path / name)
    assert hubconf.visualad_tiny(pretrained=str(tmp_path / "tiny")).layers == (1, 3)
    assert hubconf.visualad_dinov2_vits14(str(tmp_path / "own")).layers == (3, 6, 9, 12)
    for name in ("tiny", "own"):
        with pytest.raises(ValueError, match="not trained on dinov2-vit-s14-reg"):
            hubconf.visualad_dinov2_vits14_reg(pretrained=str(tmp_path / name))


def test_hub_names_of_the_authors_checkpoints(monkeypatch):
    asked, tiny = [], VisualAD.from_pretrained("tiny")
    record = lambda source, **options: asked.append((source, options)) or tiny  # noqa: E731
    monkeypatch.setattr(hubconf._VisualAD, "from_pretrained", record)
    for pretrained in (True, "visa", "mvtec", "me/mine"):
        with pytest.raises(ValueError, match="not trained on clip-vit-l14-336"):
            hubconf.visualad_clip_vitl14_336(pretrained=pretrained, device="cpu")
    names = ["clip-vit-l14-336-visa", "clip-vit-l14-336-visa", "clip-vit-l14-336-mvtec", "me/mine"]
    assert asked == [(name, {"device": "cpu"}) for name in names]


# --- the repository


def test_there_are_four_modules_and_a_small_bundled_model_and_ruff_is_clean():
    assert {p.name for p in ROOT.glob("*.py")} <= {"visualad.py", "hubconf.py", "train.py", "evaluate.py"}
    assert (ROOT / "weights" / "tiny.safetensors").stat().st_size < 12e6
    python("-m", "ruff", "check", ".")
    python("-m", "ruff", "format", "--check", ".")


@pytest.mark.parametrize("module", [visualad, hubconf])
def test_every_public_signature_is_typed(module):
    public = [x for name, x in vars(module).items() if name[0] != "_"]
    public = [x for x in public if getattr(x, "__module__", None) == module.__name__]
    methods = [x for cls in public if inspect.isclass(cls) for name, x in vars(cls).items() if name[0] != "_"]
    for function in [getattr(x, "__func__", x) for x in [*public, *methods]]:
        if inspect.isfunction(function) and function.__name__ != "<lambda>":
            wanted = {*inspect.signature(function).parameters, "return"} - {"self", "cls"}
            assert wanted <= function.__annotations__.keys(), function
