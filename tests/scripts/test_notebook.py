"""The notebook runs from top to bottom, as its reader would run it, but for fewer steps."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "miniature.ipynb"
FEW = 'shared += " --max_train_steps 8 --validation_loss_steps 8 --validation_part 1/16"\n'


@pytest.mark.slow
def test_the_notebook_shows_curves_and_icons_of_both_methods(tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a notebook draws into its page
    for name in ("recipes", "train_dreambooth_bilora.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (trains,) = (cell for cell in notebook.cells if "shared = (" in cell.source)
    trains.source = trains.source.replace("runs = ", f"{FEW}runs = ")
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs)
    lowest = dict(re.findall(r"^(LoRA|Bi-LoRA): lowest held-out loss (0\.\d+)$", printed, re.M))
    assert lowest.keys() == {"LoRA", "Bi-LoRA"}
    assert all(0 < float(loss) < 0.12 for loss in lowest.values())  # the base model's is 0.12
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
