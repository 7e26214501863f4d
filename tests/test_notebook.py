"""The tour runs from its first cell to its last."""

import json
import pathlib
import sys

import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parents[1]


def test_the_tour(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / 'notebooks' / 'tour.ipynb', as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
    assert not any(cell.outputs for cell in cells)
    assert sum(bool(line.strip()) for cell in cells for line in cell.source.splitlines()) <= 70
    # A kernel of this very interpreter, whatever others are installed.
    kernel = tmp_path / 'kernels' / 'tested' / 'kernel.json'
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    kernel.write_text(json.dumps({'argv': command, 'display_name': 'tested', 'language': 'python'}))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
    client = nbclient.NotebookClient(notebook, kernel_name='tested', timeout=300)
    client.execute(cwd=str(tmp_path))
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {'stream', 'display_data'}
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 2
    printed = ''.join(output.text for output in outputs if output.get('name') == 'stdout')
    for word in ('parameters:', 'sampler and scorer differ by', 'loss of group 0', 'reward'):
        assert word in printed
