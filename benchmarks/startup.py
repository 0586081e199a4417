"""How long until something happens? Imports, and a redraw of the explorer"""
import subprocess, sys
from fastcore.script import call_parse
from common import alternate, now, rows_of, save

def _import(code): return lambda: subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)

@call_parse
def main(rounds:int=5): # Turns
    fs = {'fastai.vision.all':_import('import fastai.vision.all'),
          'and fgsynth.all':_import('import fastai.vision.all, fgsynth.all')}
    rows = rows_of(alternate(fs, rounds), 'fastai.vision.all')
    rows[1]['more'] = rows[1]['seconds']-rows[0]['seconds']
    save('import', 'Import, seconds', rows)
    from fastai.vision.all import set_seed
    from fgsynth.all import Explorer, MoCoV2, get_dataset, ssl_dls, ssl_learner, synth_pairs
    items,fs = get_dataset('finches', n_train=256, n_test=2, size=64),{}
    def moves(ex, name, values):
        def f():
            ts = []
            for v in values: t = now(); setattr(getattr(ex.controls, name), 'value', v); ts.append(now()-t)
            return ts
        return f
    for arch in 'timm/test_byobnet','resnet18','lite0':
        set_seed(0)
        try: learn = ssl_learner(ssl_dls(items, size=64, bs=64), arch, MoCoV2(), cbs=synth_pairs(decoder_width=16))
        except ValueError as e: print(e); continue                           # lite0 is an extra
        with learn.no_bar(), learn.no_logging(): learn.pretrain_decoder(1); learn.fit(1)
        ex = Explorer.from_learner(learn); ex.widget()
        to = dict(sigma_cam=(0.,1.,2.,4.,5.), tau=(.1,.5,1.,2.,2.5), seed=(1,2,3,4,5), first=(6,12,18,3,9))
        for name,values in to.items():
            fs[f'{arch}: {name}'] = moves(ex, name, values)
    rows = rows_of(alternate(fs, rounds), next(iter(fs)))
    save('redraw', 'Redraw of the explorer, six images of 64 pixels, after a move of a control', rows)
