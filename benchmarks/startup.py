"""How long until something happens? Imports, and a redraw of the explorer"""
import subprocess, sys
from fastcore.script import call_parse
from common import alternate, now, rows_of, save

def _import(code): return lambda: subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)

@call_parse
def main(rounds:int=5): # Turns
    rows = rows_of(alternate({'fastai.vision.all':_import('import fastai.vision.all'), 'and fgsynth.all':_import('import fastai.vision.all, fgsynth.all')}, rounds), 'fastai.vision.all')
    rows[1]['more'] = rows[1]['seconds']-rows[0]['seconds']
    save('import', 'Import, seconds', rows)
    from fastai.vision.all import set_seed
    from fgsynth.all import Explorer, MoCoV2, get_dataset, ssl_dls, ssl_learner, synth_pairs
    set_seed(0)
    items = get_dataset('finches', n_train=256, n_test=2, size=64)
    learn = ssl_learner(ssl_dls(items, size=64, bs=64), 'timm/test_byobnet', MoCoV2(), cbs=synth_pairs(decoder_width=16))
    with learn.no_bar(), learn.no_logging(): learn.pretrain_decoder(1); learn.fit(1)
    ex = Explorer.from_learner(learn); ex.widget()
    def redraw():
        ts = []
        for s in (0.,1.,2.,4.,5.): t = now(); ex.controls.sigma_cam.value = s; ts.append(now()-t)
        return ts
    save('redraw', 'Redraw of the explorer after a move of a slider', rows_of(alternate({'redraw':redraw}, rounds), 'redraw'))
