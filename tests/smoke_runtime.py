"""Train for one epoch on drawn finches with whatever versions are installed, and without nbdev, in Python and by the
commands: what `pip install` gives a user. Run it with `python tests/smoke_runtime.py`; it is no pytest file because it
also runs where pytest is absent."""
import subprocess, sys, tempfile
from importlib import import_module
from pkgutil import walk_packages
from pathlib import Path
import torch, fastai, fastcore, fgsynth
from fastai.vision.all import *
from fgsynth.all import *

def command(name, *args):
    "What a command says"
    r = subprocess.run([str(o) for o in (Path(sys.executable).parent/name, *args)], capture_output=True, text=True)
    assert not r.returncode, r.stdout + r.stderr
    return r.stdout

def all_commands(d):
    "The demo in small, what follows a run, and help for the rest"
    said = command('fgsynth_demo', '--small', '--n_train', 64, '--n_test', 64, '--epochs', 1, '--pretrain_epochs', 1,
                   '--size', 64, '--out', d/'demo')
    assert 'Wrote' in said, said
    command('fgsynth_train', '--data', 'finches', '--preset', 'smoke', '--epochs', 1, '--bs', 32, '--out', d/'run')
    assert 'mAP' in command('fgsynth_eval', d/'run')
    for name in 'table','data','search','label','export','explore':
        assert 'usage' in command(f'fgsynth_{name}', '--help')

def main():
    print(f'python {sys.version.split()[0]}, torch {torch.__version__},',
          f'fastai {fastai.__version__}, fastcore {fastcore.__version__}')
    set_seed(0)
    items = get_dataset('finches', n_train=256, n_test=128, size=32)
    for method in map(get_method, methods):
        dls = ssl_dls(items, size=64 if isinstance(method, LEWEL) else 32, bs=32)
        learn = ssl_learner(dls, 'resnet18', method, cbs=synth_pairs())
        learn.pretrain_decoder(1)
        learn.fit(1, 0.03)
        assert all(np.isfinite(o) for o in learn.recorder.values[-1]), learn.recorder.values
    print('linear probe:', learn.linear_probe(items, pct=0.5))
    print('retrieval:', learn.retrieval(items))
    with tempfile.TemporaryDirectory() as d:
        save_encoder(learn, Path(d)/'enc.safetensors')
        enc = load_encoder(Path(d)/'enc.safetensors')
        all_commands(Path(d))
    for module in walk_packages(fgsynth.__path__, 'fgsynth.'): import_module(module.name)
    assert isinstance(enc, nn.Module)
    assert 'nbdev' not in sys.modules, 'the library imports nbdev'
    print('ok')

if __name__=='__main__': main()
