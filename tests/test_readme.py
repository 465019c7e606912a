"""What README shows runs as it stands: pytest tests/test_readme.py"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import evaluate
import visualad

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone holds for its user, in another folder."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("visualad.py", "hubconf.py", "evaluate.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("examples", "weights"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


def run(command: list[str], folder) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(code, clone):
    if code.startswith("# needs the network"):
        compile(code, "README.md", "exec")
        for name in re.findall(r'from_pretrained\("([^"]+)"', code):
            assert name in visualad.PRETRAINED
    else:
        assert run([sys.executable, "-c", code], clone)


def test_the_first_command_scores_every_example(clone):
    (command,) = re.findall(r"^pip install .* && (python visualad.py .*)$", README, re.MULTILINE)
    printed = run([sys.executable, *command.split()[1:]], clone)
    examples = visualad.image_files(clone / "examples")
    assert len(list((clone / "heatmaps").rglob("*.png"))) == len(examples) >= 6
    for path in examples:
        assert str(path.relative_to(clone)) in printed
    numbers = "none one two three four five six".split()
    claim = r"flags (\w+) of the six anomalous\s+examples\s+and\s+(\w+)\s+of\s+the\s+four\s+normal"
    claimed = re.search(claim, README).groups()
    flagged = [len(re.findall(f"ANOMALOUS  examples/{kind}/", printed)) for kind in ("anomalous", "normal")]
    assert [numbers[count] for count in flagged] == list(claimed)


def test_the_two_commands_are_one_line_each_and_ci_finds_the_second():
    lines = [line for line in README.splitlines() if line.startswith("pip install")]
    assert len(lines) == 2 and sum("pytest" in line for line in lines) == 1


def test_nothing_is_left_to_fill_in():
    for text in (README, (ROOT / "weights" / "README.md").read_text()):
        assert not re.search(r"@[A-Z]+@|TODO|FIXME", text)


def test_files_and_names_that_are_mentioned_exist():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
    begins = {"visualad.py": "IMAGE_OR_FOLDER", "evaluate.py": "--data ROOT [", "train.py": "--data ROOT ("}
    for program, begin in begins.items():
        shown = begin + README.partition(f"python {program} {begin}")[2].partition("```")[0]
        printed = run([sys.executable, program, "--help"], ROOT)
        flags = (set(re.findall(r"--[a-z-]+", text)) for text in (shown, printed))
        assert next(flags) == next(flags) - {"--help"}
    table = README.partition("| name | backbone |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == visualad.PRETRAINED.keys()


def test_every_benchmark_has_its_command():
    commands = re.findall(r"^python evaluate.py (--data data/(\S+) --dataset (\S+)) ", README, re.MULTILINE)
    assert len(commands) == 13 and all(folder == name for _, folder, name in commands)
    others = {"meta.json", "mpdd", "folders", "images"}
    assert {name for _, _, name in commands} | others == evaluate.DATASETS.keys()
    table = README.partition("| `--dataset` |")[2].partition("\n\n")[0]
    assert evaluate.DATASETS.keys() <= set(re.findall(r"`([\w.-]+)`", table))


def test_the_commands_for_ones_own_product_run_on_photos(clone):
    shutil.copytree(clone / "examples" / "normal", clone / "my_photos")
    block = next(b for b in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "my_photos" in b)
    for line in block.splitlines():
        run([sys.executable, *line.split()[1:]], clone)
    assert visualad.VisualAD.from_pretrained(clone / "runs" / "product").threshold
