"""The notebooks run from their first cell to their last."""

import json
import pathlib
import sys

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / 'notebooks'


def read(name):
    """The notebook and its cells of code."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == 'code']


def outputs_of(cells):
    return [output for cell in cells for output in cell.outputs]


def printed(cells):
    texts = [output.text for output in outputs_of(cells) if output.get('name') == 'stdout']
    return ''.join(texts)


def pictures(cells):
    return sum('image/png' in output.get('data', {}) for output in outputs_of(cells))


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run a notebook on a kernel of this interpreter, whichever others are installed."""
    kernel = tmp_path / 'kernels' / 'tested' / 'kernel.json'
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    kernel.write_text(json.dumps({'argv': command, 'display_name': 'tested', 'language': 'python'}))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path))
    monkeypatch.setenv('PYTHONPATH', str(NOTEBOOKS.parent))
    monkeypatch.setenv('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

    def run(name):
        notebook, cells = read(name)
        client = nbclient.NotebookClient(notebook, kernel_name='tested', timeout=300)
        client.execute(cwd=str(tmp_path))
        assert all(cell.execution_count for cell in cells)
        kinds = {output.output_type for output in outputs_of(cells)}
        assert kinds <= {'stream', 'display_data'}
        return cells

    return run


def test_the_tour(execute):
    _, cells = read('tour.ipynb')
    assert not outputs_of(cells)
    assert sum(bool(line.strip()) for cell in cells for line in cell.source.splitlines()) <= 70
    cells = execute('tour.ipynb')
    assert pictures(cells) == 2
    for word in ('parameters:', 'sampler and scorer differ by', 'loss of group 0', 'reward'):
        assert word in printed(cells)


def test_the_coefficients(execute):
    """The stored pictures are small, and the stored numbers are those that the package prints."""
    _, stored = read('coefficients.ipynb')
    assert pictures(stored) == 4
    assert (NOTEBOOKS / 'coefficients.ipynb').stat().st_size < 100_000
    cells = execute('coefficients.ipynb')
    assert pictures(cells) == 4
    assert 'GRPO' in printed(cells)
    assert printed(cells) == printed(stored)
