"""Execute notebooks and save them with their outputs: `python examples/notebooks/execute.py NOTEBOOK ...`."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TIMEOUT_SECONDS = 900
"""Limit of one cell."""


def execute(path: Path) -> nbformat.NotebookNode:
    """Return the executed notebook. Raises CellExecutionError if a cell fails.

    The notebook's commands run with the Python of this process: its folder comes first on PATH.
    """
    path_variable = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=TIMEOUT_SECONDS, kernel_name="python3", coalesce_streams=True).execute(
        env={**os.environ, "PATH": path_variable, "PYTHONWARNINGS": "ignore"}
    )
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of this run
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:]:
        nbformat.write(execute(Path(name)), name)
