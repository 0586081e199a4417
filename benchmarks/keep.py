"What does it cost to cut views out of pictures that are larger than the views? Memory, the views, and a whole step"
from fastcore.script import call_parse
from fastai.vision.all import *
from fgsynth.all import *
from common import alternate, in_a_row, rows_of, save
from step import stepper

def viewer(dls, learn, n):
    "Fetch `n` batches and make their clean images and views"
    def f():
        batches = iter(dls.train)
        return in_a_row(lambda: learn.ssl.views(next(batches)[0]), n)
    return f

@call_parse
def main(
    arch:str='resnet18', # Encoder
    size:int=64, # Side of the views, pixels
    bs:int=64, # Images in a batch
    steps:int=5, # Steps in a row
    rounds:int=4, # Turns of each
):
    items = get_dataset('finches', n_train=bs*(steps+2), n_test=2, size=4*size)
    loaders = {keep:ssl_dls(items, size=size, bs=bs, keep=keep) for keep in (1,1.5,2,3,4)}
    learners = {k:ssl_learner(dls, arch, MoCoV2()) for k,dls in loaders.items()}
    for what,fs in (('views', {k:viewer(dls, learners[k], steps) for k,dls in loaders.items()}),
                    ('step', {k:stepper(l, steps) for k,l in learners.items()})):
        rows = rows_of(alternate(fs, rounds), 1)
        for r in rows: r['mb_per_1000'] = round(3*(r['name']*size)**2/1e3, 1)
        question = f'{what.capitalize()} of {arch}, {size} pixels, batch {bs}, by how large pictures are kept'
        save(f'keep_{what}', question, rows, arch=arch, size=size, bs=bs)
