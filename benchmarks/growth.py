"""How do time and memory of a step grow? One number at a time, each point in a process of its own"""
import json, resource, statistics, subprocess, sys
from fastcore.script import call_parse
from fastai.vision.all import *
from fgsynth.all import *
from common import save
from step import Clock

base = dict(size=64, bs=64, d=512, K=4096, bank=4096, n=8192)
axes = dict(size=(32,64,96,128), bs=(32,64,128,256), d=(256,512,1024,2048), K=(1024,4096,16384,65536),
            bank=(1024,4096,16384,65536), n=(1000,10_000,100_000))
# what each should follow: time of a step, and memory, are a + b * law
laws = dict(size='size²', bs='batch', d='d', K='K', bank='bank', n='images (memory only)')

def point(size, bs, d, K, bank, n, steps=6):
    "Seconds of a step and peak memory with random images and a small encoder of `d` features"
    torch.manual_seed(0)
    n = max(n, bs*(steps+2))
    x = torch.empty(n, 3, size, size, dtype=torch.uint8).random_(256)
    items = Items('random', x, x[:2])
    conv = lambda i,o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    enc = Encoder(nn.Sequential(conv(3,32), conv(32,64), conv(64,d), nn.AdaptiveAvgPool2d(1), nn.Flatten()), d)
    dls = ssl_dls(items, size=size, bs=bs, cache=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # the queue may be longer than the data: that is what is measured
        learn = ssl_learner(dls, enc, MoCoV2(K=K), cbs=synth_pairs(update='frozen', beta=0., bank_size=bank))
    if len(learn.model.bank.feats)!=bank: learn.model.bank = FeatureBank(bank, d)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = Clock(steps)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return dict(seconds=statistics.median(clock.seconds), megabytes=peak/2**10, megabytes_before=before/2**10)

def apart(p):
    "`point` in a process of its own"
    command = [sys.executable, '-W', 'ignore', __file__, '--one', json.dumps(p)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])

@call_parse
def main(
    one:str=None, # For the processes that this one starts: a point as JSON
    rounds:int=2, # Measurements of each point; the fastest counts
):
    if one: print(json.dumps(point(**json.loads(one)))); return
    rows = []
    for axis,values in axes.items():
        for v in values:
            p = {**base, axis:v}
            out = [apart(p) for _ in range(rounds)]
            rows.append(dict(axis=axis, value=v, law=laws[axis], **min(out, key=lambda o: o['seconds'])))
    save('growth', 'A step with synthesized pairs, one number at a time', rows, base=base)
