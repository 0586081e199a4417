"""Small networks, quiet learners, and a second implementation of a training to compare with"""
import random
from functools import partial
import torch
from torch import nn
from fastcore.basics import noop
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback                       # which brings `no_bar`
from fastai.torch_core import set_seed
from fgsynth.nets.networks import Encoder
from fgsynth.methods.learner import methods
from fgsynth.runs.resume import CheckpointCallback

few = dict(hidden=64, dim=16) # widths that keep a method quick
small_methods = {name:partial(cls, **dict(mocov2=dict(K=128), simsiam=dict(dim=64, bottleneck=16), byol=few,
                                          dino=dict(K=32, n_local=1, **few), mean_shift=few, lewel=few,
                                          lcr=dict(K=128), sam_bilinear=dict(K=128, plain=.3),
                                          nnclr=dict(predictor_hidden=32, **few)).get(name, {}))
                 for name,cls in methods.items()}

def small(side=4):
    "A small network without batch norm, so that float64 and float32 stay close; its features are side*side cells long"
    body = nn.Sequential(nn.Conv2d(3,8,3,2), nn.ReLU(), nn.AdaptiveAvgPool2d(side), nn.Flatten())
    return Encoder(body, 8*side**2)

def side_for(name):
    "What `small` is to be given for a method: LEWEL's features are as long as a cell of its map"
    return 1 if name=='lewel' else 4

def arch_for(name):
    "A small network by name, likewise"
    return 'timm/test_vit' if name=='lewel' else 'timm/test_byobnet'

class Nothing(nn.Identity):
    "In the place of a batch norm"
    track_running_stats = True

def unit(x): return x.double()/x.double().norm(dim=-1, keepdim=True)

def close(a, b, tol=1e-5):
    a,b = [torch.as_tensor(o).detach().double() for o in (a,b)]
    return a.shape==b.shape and bool(((a-b).abs()<=tol).all())

def quietly(learn, n=1, lr=None, **kw):
    "A fit without a table"
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kw)
    return learn

def silent(learn):
    "A learner that draws and writes nothing"
    learn.remove_cb(learn.progress)
    learn.logger = noop
    return learn

def next_losses(learn):
    "Those of one more epoch, with the same order and the same random numbers each time"
    set_seed(7); learn.dls.train.rng = random.Random(7)                     # the loader shuffles by its own
    return quietly(learn, 1, .01).recorder.losses

class KeepViews(Callback):
    "The views and the loss of each step, and the indices of its images"
    order = 1
    def before_fit(self): self.seen,self.ids = [],[]
    def after_loss(self):
        self.seen.append([v.double() for v in self.learn.xb] + [self.learn.loss.item()])
        self.ids.append(self.learn.yb[0].as_subclass(torch.Tensor))

def replay(seen, params, loss_of, after_step=lambda i: None, lr=.05, wd=1e-4):
    "The losses of the same steps in a plain PyTorch loop"
    opt,losses = torch.optim.SGD(params, lr=lr, momentum=.9, weight_decay=wd),[]
    for i,(*views,_) in enumerate(seen):
        loss = loss_of(*views); losses.append(loss.item())
        opt.zero_grad(); loss.backward(); opt.step()
        with torch.no_grad(): after_step(i)
    return losses

def move(copy, original, momentum):
    "One step of an exponential moving average"
    for p,r in zip(copy.parameters(), original.parameters()): p.mul_(momentum).add_(r, alpha=1-momentum)

class Die(Callback):
    "Ends a training before a step of each epoch"
    order = -101
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.train_iter==self.at:
            raise SystemExit

def unlike_after_a_stop(make, folder, at, n_epoch, lr=.05):
    "State of a training, and names of what differs in one that ended before step `at` and went on"
    def trained(name, *cbs, **kw):
        learn = make()
        with learn.no_bar(), learn.no_logging():
            learn.fit(n_epoch, lr, cbs=[CheckpointCallback(folder/name, every=1, **kw), *cbs])
        return learn.model.state_dict()
    whole = trained('whole')
    try: trained('dead', Die(at))
    except SystemExit: pass
    else:
        raise AssertionError(f'no step {at} was reached')
    again = trained('dead', resume=True)
    return whole,[k for k in whole if not whole[k].equal(again[k])]
