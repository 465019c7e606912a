"""The file copied alone, cut off, installed, or loaded through torch.hub: pytest tests/test_single_file.py"""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, ROOT

from visualad import BACKBONES, VisualAD

SOURCE = (ROOT / "visualad.py").read_text()


def run(code: str, folder, **env) -> str:
    """The output of Python code in a folder, without this repository on the path."""
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **env}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_torch_and_the_standard_library_are_imported_at_the_top():
    names = set()
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch"}


def test_the_method_is_read_in_300_lines_and_stands_alone(tmp_path):
    start, end = SOURCE.index("# --- 1."), SOURCE.index("# --- 6.")
    assert len(SOURCE[start:end].strip().splitlines()) <= 300
    (tmp_path / "method.py").write_text(SOURCE[:end])
    code = "import torch, method; print(method.VisualAD('tiny')(torch.rand(1, 3, 80, 160)).map.shape)"
    assert "[1, 80, 160]" in run(code, tmp_path)


def test_copied_alone_it_imports_and_works_and_says_what_is_missing(tmp_path):
    (tmp_path / "visualad.py").write_text(SOURCE)
    code = f"""
import torch
from visualad import VisualAD
print(VisualAD("tiny").predict(torch.rand(3, 50, 70)).map.shape)
m = VisualAD.from_pretrained({str(GOLDEN / "visualad_official.pth")!r},
                             backbone_weights={str(GOLDEN / "clip_openai.safetensors")!r})
print(m.predict(torch.rand(3, 50, 70)).anomalous)
try:
    VisualAD.from_pretrained("tiny")
except FileNotFoundError as error:
    print(error)
"""
    printed = run(code, tmp_path)
    assert "(50, 70)" in printed and "None" in printed
    assert "tiny.safetensors" in printed and str(tmp_path / "weights") in printed


def test_importing_it_brings_no_package_but_torch(tmp_path):
    (tmp_path / "visualad.py").write_text(SOURCE)
    code = "import sys, torch; had = set(sys.modules); import visualad; print(sorted(set(sys.modules) - had))"
    loaded = {name.partition(".")[0] for name in ast.literal_eval(run(code, tmp_path))}
    assert loaded - set(sys.stdlib_module_names) <= {"visualad", "torch"}


def test_the_wheel_carries_the_module_the_command_and_the_bundled_model(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
        entry = next(n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "visualad = visualad:main" in archive.read(entry).decode()
    assert names == {"visualad.py", "visualad_weights/tiny.safetensors", "visualad_weights/README.md"}
    (tmp_path / "elsewhere").mkdir()
    code = "from visualad import VisualAD; print(VisualAD.from_pretrained('tiny').layers)"
    assert run(code, tmp_path / "elsewhere", PYTHONPATH=str(tmp_path / "site")).strip() == "(1, 3)"


# --- torch.hub


def hub(code: str, folder) -> str:
    load = f"load = lambda name, **kw: torch.hub.load({str(ROOT)!r}, name, source='local', **kw)"
    return run(f"import sys, torch\n{load}\n{code}", folder)


def test_hub_loads_beside_a_foreign_utils_module(tmp_path):
    (tmp_path / "utils.py").write_text("MINE = True\n")
    code = """
import utils
model = load("visualad_tiny")
shape = model.predict(torch.rand(3, 40, 50)).map.shape
print(utils.MINE, sys.modules["utils"] is utils, model.training, *shape)
"""
    assert hub(code, tmp_path).split() == ["True", "True", "False", "40", "50"]


def test_hub_lists_models_only_each_with_its_help():
    import hubconf

    public = {n: f for n, f in vars(hubconf).items() if callable(f) and not n.startswith("_")}
    sizes = ["vits14", "vitb14", "vitl14", "vitg14"]
    assert set(public) == {
        "visualad_tiny",
        *(f"visualad_clip_{size}" for size in ("vitb32", "vitb16", "vitl14", "vitl14_336")),
        *(f"visualad_dinov2_{size}" for size in sizes),
        *(f"visualad_dinov2_{size}_reg" for size in sizes),
    }
    for name, function in public.items():
        assert function.__doc__ and "px" in function.__doc__, name
        assert next(iter(inspect.signature(function).parameters)) == "pretrained"
    assert set(hubconf.dependencies) == {"torch", "safetensors", "huggingface_hub", "numpy"}


def test_hub_without_weights_downloads_nothing():
    import hubconf

    model = hubconf.visualad_dinov2_vits14_reg(pretrained=False)
    assert model.backbone.cfg.registers == 4 and model.layers == (3, 6, 9, 12) and not model.training
    with pytest.raises(ValueError, match="device"):
        hubconf.visualad_tiny(pretrained=False, device="cpu")
    with pytest.raises(ValueError, match="visa.*tiny"):
        hubconf.visualad_tiny("visa")


@pytest.mark.parametrize("pretrained", [True, "visa", "mvtec"])
def test_hub_says_where_nobody_has_published_weights(pretrained):
    import hubconf

    with pytest.raises(ValueError, match="clip-vit-b16.*train.py"):
        hubconf.visualad_clip_vitb16(pretrained=pretrained)


def test_hub_takes_a_source_of_its_own_backbone_only(tmp_path):
    import hubconf

    model = hubconf.visualad_tiny()
    model.tokens.data += 1
    model.save_pretrained(tmp_path)
    assert torch.equal(hubconf.visualad_tiny(pretrained=str(tmp_path)).tokens, model.tokens)
    with pytest.raises(ValueError, match="not trained on dinov2-vit-s14"):
        hubconf.visualad_dinov2_vits14(pretrained=str(tmp_path))


def test_hub_takes_a_file_that_holds_its_backbone_whole(tmp_path):
    import hubconf

    own = VisualAD(replace(BACKBONES["dinov2-vit-s14"], repo=None))
    own.save_pretrained(tmp_path)
    assert torch.equal(hubconf.visualad_dinov2_vits14(str(tmp_path)).tokens, own.tokens)
    with pytest.raises(ValueError, match="not trained on dinov2-vit-s14-reg"):
        hubconf.visualad_dinov2_vits14_reg(str(tmp_path))


def test_hub_names_of_the_authors_checkpoints(monkeypatch):
    import hubconf

    asked = []

    class Stop(Exception):
        pass

    def record(source, **kwargs):
        asked.append((source, kwargs))
        raise Stop

    monkeypatch.setattr(hubconf._VisualAD, "from_pretrained", record)
    for pretrained in (True, "visa", "mvtec", "me/mine"):
        with pytest.raises(Stop):
            hubconf.visualad_clip_vitl14_336(pretrained=pretrained, device="cpu")
    names = ["clip-vit-l14-336-visa", "clip-vit-l14-336-visa", "clip-vit-l14-336-mvtec", "me/mine"]
    assert asked == [(name, {"device": "cpu"}) for name in names]


# --- the repository


def test_there_are_four_modules_and_no_others():
    assert {p.name for p in ROOT.glob("*.py")} <= {"visualad.py", "hubconf.py", "train.py", "evaluate.py"}


def test_the_bundled_model_is_small():
    assert (ROOT / "weights" / "tiny.safetensors").stat().st_size < 12e6


def test_ruff_is_clean():
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *check, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_public_signature_is_typed():
    import hubconf
    import visualad

    for module in (visualad, hubconf):
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            methods = [thing]
            if inspect.isclass(thing):  # VisualAD is one class in three parts
                parts = [part for part in thing.__mro__ if part.__module__ == module.__name__]
                methods = [m for part in parts for n, m in vars(part).items() if not n.startswith("_")]
            for function in methods:
                function = getattr(function, "__func__", function)
                if not inspect.isfunction(function) or re.match("<", function.__name__):
                    continue
                hints = inspect.signature(function)
                missing = [p for p in hints.parameters if p not in ("self", "cls")]
                missing = [p for p in missing if hints.parameters[p].annotation is inspect.Parameter.empty]
                assert not missing and hints.return_annotation is not inspect.Signature.empty, (
                    name,
                    function,
                    missing,
                )
