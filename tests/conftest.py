import os, sys
from importlib.metadata import entry_points
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
from figures import without_figures # noqa

# Tests read the project's settings and relative paths from the repository's top, wherever pytest was started
@pytest.fixture(autouse=True)
def at_top(monkeypatch): monkeypatch.chdir(root)

def call(monkeypatch, command, *args):
    "Run a command in this process, as its console script would"
    monkeypatch.setattr(sys, 'argv', [command, *map(str, args)])
    next(iter(entry_points(group='console_scripts', name=command))).load()()

def save_photos(top, n):
    "So many drawn finches of two species, as files in a folder; returns it"
    from PIL import Image
    from fgsynth.data.finches import finches
    for i,b in enumerate(finches(n, 40, n_species=2, seed=3)):
        Image.fromarray(b.image.permute(1,2,0).numpy()).save(top/f'{i}.png')
    return top

@pytest.fixture
def undrawn():
    "Runs of this process leave no figures"
    with without_figures(): yield

@pytest.fixture(scope='session')
def forked():
    """Run a script, or that of a command, in children of a process that has imported everything (see `forks.py`);
    `figures=False`: without drawing those of runs"""
    if not hasattr(os, 'fork'): pytest.skip('processes are not forked here')
    from forks import forking
    alone = {'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'agg', 'CUDA_VISIBLE_DEVICES':''}
    with forking(os.environ | alone) as run: yield run

# They train runs, start processes or open browsers. They come first, so that no worker is left with one of them at the
# end; those with a long common preparation before the others, so that it is not made twice
slow = ('test_resume test_distrib test_docs test_package test_browser test_cli test_runs test_own test_hostile '
        'test_table test_neighbours test_learner test_methods test_synth test_synthesizer test_evaluate '
        'test_show').split()

def pytest_configure(config): config.addinivalue_line('markers', 'slow: what takes long, or what only Linux has')

def pytest_collection_modifyitems(items):
    order = {name:i for i,name in enumerate(slow)}
    items.sort(key=lambda o: order.get(o.path.stem, len(slow)))
    for o in items:
        if o.path.stem in order: o.add_marker('slow')

@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    "The closing line that `make test` promises"
    report = config.pluginmanager.get_plugin('terminalreporter')
    if hasattr(config, 'workerinput') or not report: return
    n = {k: len(report.stats.get(k, [])) for k in ('passed','failed','error')}
    print(f"{n['passed']} passed, {n['failed'] + n['error']} failed")
