"""What does a training step cost? The full method against MoCo v2 alone, each trick by itself, and MoCo v2 against
its bare passes"""
import statistics
from copy import deepcopy
from fastcore.script import call_parse
from fastai.vision.all import *
from fgsynth.all import *
from common import alternate, gtsrb, in_a_row, now, rows_of, save

class Clock(Callback):
    "Stop after `n` steps and keep the seconds of each but the first, which also fetches the first batch"
    order = 99
    def __init__(self, n): self.n = n
    def before_fit(self): self.t = []
    def after_batch(self):
        self.t.append(now())
        if len(self.t)>self.n: raise CancelFitException
    @property
    def seconds(self): return [b-a for a,b in zip(self.t[1:], self.t[2:])]

def stepper(learn, n):
    def f():
        clock = Clock(n)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=clock)
        return clock.seconds
    return f

def bare(learn, bs, size):
    "The passes of MoCo v2 alone, on random tensors: query forward and backward, key forward"
    net = deepcopy(learn.model).train()
    x,y = (torch.rand(bs, 3, size, size, device=learn.dls.device) for _ in range(2))
    params = [p for p in net.parameters() if p.requires_grad]
    def f():
        q = net.projector(net.encoder(x))
        with torch.no_grad(): k = net.key_projector(net.key_encoder(y))
        torch.autograd.grad((q*k).sum(), params)
    return f

@call_parse
def main(
    arch:str='resnet18', # Encoder
    size:int=64, # Side of the images, pixels
    bs:int=128, # Images in a batch
    steps:int=5, # Steps in a row
    rounds:int=3, # Turns of each
    out:str='step', # Name of the file in results/bench
):
    if gtsrb.exists(): items = get_dataset('gtsrb', gtsrb)
    else: items = get_dataset('finches', n_train=bs*(steps+3), n_test=2, size=size)
    dls = ssl_dls(items, size=size, bs=bs)
    # from the paper's letter to what we do, one change at a time
    half = dict(paper=True, relative=True, sigma_cam=3., sigma_var=3.)
    tricks = {'the paper, to the letter':{},
              'decoder half as wide':dict(decoder_width=16),
              'error not into the encoder':dict(beta=0.),
              'decoder frozen':dict(update='frozen'),
              'real detail, shown whole':dict(residual=True, augment='whole'),
              'against the first view':dict(anchor='view'),
              'half of the batch':dict(max_pairs=.5),
              'a quarter of the batch':dict(max_pairs=.25),
              'half, features of the first view':dict(max_pairs=.5, features='view')}
    new = lambda cbs=None, **kw: ssl_learner(dls, arch, MoCoV2(), cbs=cbs, **kw)
    learners,kw = {'MoCo v2':new(), 'MoCo v2, channels first':new(channels_last=False)},dict(half)
    for k,v in tricks.items(): kw.update(v); learners[k] = new(synth_pairs(**kw))
    learners['MoCo v2, bf16'] = new(precision='bf16')
    learners['half of the batch, bf16'] = new(synth_pairs(**{**kw, 'features':None}), precision='bf16')
    fs = {k:stepper(l, steps) for k,l in learners.items()}
    b = bare(learners['MoCo v2'], bs, size)
    times = alternate({'bare passes':lambda: in_a_row(b, steps-1), **fs}, rounds)
    save(out, f'A step of {arch}, {size} pixels, batch {bs}', rows_of(times, 'MoCo v2'), arch=arch, size=size, bs=bs)
