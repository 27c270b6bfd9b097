"""The examples run as a reader would run them, and do what they say."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path, *launcher: str) -> str:
    result = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / name)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_plain_pytorch(tmp_path):
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", run("plain_pytorch.py", tmp_path))]
    assert len(losses) == 5
    assert losses[-1] < 0.5 * losses[0]


def test_plug_in(tmp_path):
    output = run("plug_in.py", tmp_path)
    assert float(re.search(r"accuracy of the last batch: (\d+)%", output)[1]) > 80
    # 125 batches an epoch, two to a step: 63 steps, 252 in all; refreshes at 50, 100, 150, 200, 250.
    assert re.findall(r"selected before step (\d+)", output) == ["1", "50", "100", "150", "200", "250"]


def test_plug_in_under_fsdp2(tmp_path):
    output = run("plug_in_fsdp2.py", tmp_path, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    assert float(re.search(r"accuracy of the last batch: (\d+)%", output)[1]) > 80
    # 2000 rows, 16 on each of two ranks: 63 steps an epoch, 252 in all.
    assert re.findall(r"selected before step (\d+)", output) == ["1", "50", "100", "150", "200", "250"]


def test_hot_swap(tmp_path):
    output = run("hot_swap.py", tmp_path)
    assert [
        int(size) < 0.1 * int(whole) for size, whole in re.findall(r": (\d+) KiB, of a model of (\d+)", output)
    ] == [
        True,
        True,
    ]
    assert (
        re.findall(r"equal to the trained model: (\w+); .*, equal to the base: (\w+)", output) == [("True", "True")] * 3
    )
