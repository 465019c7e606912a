"""What README shows runs as it stands: pytest tests/test_readme.py"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, python

import visualad

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
CHECKS = {  # what must hold after the block that contains the key
    "result.map.shape": "assert result.anomalous and result.map.shape == (256, 256)",
    "torch.hub.load": "assert model.predict('examples/normal/brick.png').anomalous is False",
    "corners": "assert whole.isfinite().all() and whole.max() > 0.5",
    "onnxruntime": """
torch.manual_seed(0)
for shape in (1, 3, 224, 224), (3, 3, 80, 120), (2, 3, 160, 64):
    images = torch.rand(shape)
    for got, want in zip(session.run(None, {"images": images.numpy()}), model.infer(images)):
        numpy.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)""",
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone holds for its user, in another folder."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("visualad.py", "hubconf.py", "evaluate.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("examples", "weights"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_python_blocks_run(name, clone):
    (code,) = (block for block in BLOCKS if name in block)
    python("-c", f"{code}\n{CHECKS[name]}", folder=clone)


def test_a_watched_folder_is_scored_as_photos_come(clone):
    (code,) = (block for block in BLOCKS if "inbox" in block)
    (clone / "inbox").mkdir()
    shutil.copy(clone / "examples" / "normal" / "brick.png", clone / "inbox")
    command = [sys.executable, "-uc", code]
    with subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout.readline().startswith("inbox/brick.png -0.38")
        shutil.copy(clone / "examples" / "anomalous" / "brick-crack.png", clone / "inbox")
        assert watch.stdout.readline().startswith("inbox/brick-crack.png 0.82")
        watch.kill()


def test_every_block_is_short_and_run_or_names_what_exists():
    others = [code for code in BLOCKS if not any(name in code for name in CHECKS)]
    assert len(others) == 2 and all(code.startswith("# ") for code in others)
    for code in others:
        compile(code, "README.md", "exec")
        assert set(re.findall(r'from_pretrained\("([^"]+)"', code)) <= visualad.PRETRAINED.keys()
    for code in BLOCKS:
        assert len([line for line in code.splitlines() if line]) <= 11
    lines = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(lines) == 2 and sum("pytest" in line for line in lines) == 1  # which CI finds
    assert len(README) <= 10_000


def test_the_first_command_scores_every_example(clone):
    (command,) = re.findall(r"^pip install .* && (python visualad.py .*)$", README, re.MULTILINE)
    printed = python(*command.split()[1:], folder=clone)
    examples = visualad.images_below(clone / "examples")
    assert len(list((clone / "heatmaps").rglob("*.png"))) == len(examples) >= 6
    claim = r"flags six of the six\s+anomalous\s+examples\s+and\s+none\s+of\s+the\s+four\s+normal"
    assert re.search(claim, README)
    flagged = [len(re.findall(f"ANOMALOUS  examples/{kind}/", printed)) for kind in ("anomalous", "normal")]
    assert flagged == [6, 0]


def test_what_is_mentioned_exists(clone):
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
    helps = {name: python(name, "--help") for name in ("visualad.py", "evaluate.py", "train.py")}
    for program, flags in re.findall(r"^python (\w+\.py) (.*)$", README, re.MULTILINE):
        assert set(re.findall(r"--[a-z-]+", flags)) <= set(re.findall(r"--[a-z-]+", helps[program]))
    table = README.partition("| name | backbone |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == visualad.PRETRAINED.keys()


def test_the_commands_for_ones_own_product_run_on_photos(clone):
    for name in ("my_photos", "new_photos", "good_photos"):
        shutil.copytree(clone / "examples" / "normal", clone / name)
    block = next(b for b in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "my_photos" in b)
    for line in block.splitlines():
        python(*line.split()[1:], folder=clone)
