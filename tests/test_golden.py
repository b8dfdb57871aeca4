"""One seeded training through the real command line, against known losses.

A change of these figures is a change of what everybody's runs learn: it belongs in the changelog.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from far_train.cli.main import main
from far_train.data.dataset import write_dataset
from far_train.training.run_folder import read_metrics

# Loss of each step; the tiny base has random weights. Kernels of other machines and releases differ in the last digits.
LORA = [1.122934, 1.021930, 0.597775, 0.599806, 0.486074, 0.716527]
KV = [1.122934, 1.021223, 0.596346, 0.603378, 0.482773, 0.718195]
# Trained on the images alone, as before there was output preservation, and with it.
IMAGES = ["--no-output-preservation", "--background-weight", "0.3"]
GOLDEN = {
    "lora": (["--lora-lr", "1e-3", *IMAGES], LORA),
    "attention": (["--low-rank-lr", "1e-3", *IMAGES], LORA),  # what it was called before, with the former flag
    "kv": (["--kv-lr", "1e-3", *IMAGES], KV),
    "lora, preserved": (["--lora-lr", "1e-3"], [0.505844, 0.206257, 0.030642, 0.533358, 0.450154, 0.169905]),
    "kv, preserved": (["--kv-lr", "1e-3"], [0.505844, 0.206542, 0.031197, 0.538313, 0.446366, 0.174087]),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_a_seeded_training_has_the_losses_that_it_always_had(tiny_folder: Path, fusion, tmp_path: Path, case: str):
    flags, losses = GOLDEN[case]
    dataset = write_dataset(fusion, tmp_path / "dataset").folder
    command = ["train", "--base", str(tiny_folder), "--dataset", str(dataset), "--out", str(tmp_path / "run")]
    command += ["--steps", "6", "--batch-size", "2", "--prior-batch-size", "1", "--sample-every", "0"]
    command += ["--trainable", case.partition(",")[0], "--train-seed", "11", *flags]
    command += ["--precision", "fp32", "--device", "cpu", "--refinement-weight", "0.1"]
    assert main(command) == 0
    assert [m["loss"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")] == pytest.approx(losses, rel=2e-4)
