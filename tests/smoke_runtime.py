"""Train for one epoch on drawn finches with whatever versions are installed, and without nbdev: what a user's
`pip install` gives. Run it with `python tests/smoke_runtime.py`; it is no pytest file because it also runs where
pytest is absent."""
import sys, tempfile
from pathlib import Path
import torch, fastai, fastcore
from fastai.vision.all import *
from fgsynth.all import *

def main():
    print(f'python {sys.version.split()[0]}, torch {torch.__version__},',
          f'fastai {fastai.__version__}, fastcore {fastcore.__version__}')
    set_seed(0)
    items = get_dataset('finches', n_train=256, n_test=128, size=32)
    for method in (MoCoV2(), SimSiam(), SimCLR(), BYOL(), DINO(n_local=1)):
        dls = ssl_dls(items, size=32, bs=32)
        learn = ssl_learner(dls, 'resnet18', method, cbs=synth_pairs())
        learn.pretrain_decoder(1)
        learn.fit(1, 0.03)
        assert all(np.isfinite(o) for o in learn.recorder.values[-1]), learn.recorder.values
    print('linear probe:', learn.linear_probe(items, pct=0.5))
    print('retrieval:', learn.retrieval(items))
    with tempfile.TemporaryDirectory() as d:
        save_encoder(learn, Path(d)/'enc.safetensors')
        enc = load_encoder(Path(d)/'enc.safetensors')
    assert isinstance(enc, nn.Module)
    assert 'nbdev' not in sys.modules, 'the library imports nbdev'
    print('ok')

if __name__=='__main__': main()
