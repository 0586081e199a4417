"What `test_distrib.py` runs in each process; prints what it found from the first one"
import random, sys, warnings
from contextlib import contextmanager, nullcontext
import torch, torch.distributed as dist
from fastai.basics import *
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.distributed import *
from training import Nothing, side_for, small_methods
from torch import nn
from fgsynth.core import InputError
from fgsynth.data.items import Items
from fgsynth.data.loaders import ssl_dls
from fgsynth.data.views import whole_views
from fgsynth.distrib import Shuffle, gather, gather_with_grad, join_processes, rank, world
from fgsynth.evaluate.measures import evaluate
from fgsynth.evaluate.features import features
from fgsynth.evaluate.monitor import Monitor
from fgsynth.data.drawing import draw_finches
from fgsynth.nets.networks import Encoder
from fgsynth.nets.heads import MLPHead
from fgsynth.nets.saliency import Saliency
from fgsynth.methods.mocov2 import MoCoModel, MoCoV2
from fgsynth.methods.simsiam import SimSiam, SimSiamModel
from fgsynth.methods.nnclr import NNCLR, NNCLRModel
from fgsynth.methods.mean_shift import MeanShift, MeanShiftModel
from fgsynth.methods.contrastive_crop import ContrastiveCrop
from fgsynth.methods.lcr import LCR
from fgsynth.methods.dilo import DiLo
from fgsynth.methods.cvsa import CVSA
from fgsynth.methods.base import SSLMethod
from fgsynth.methods.learner import ssl_learner
from fgsynth.synth.callbacks import synth_pairs

torch.set_num_threads(1)

def net(bn=False, side=4):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8) if bn else nn.Identity()
    body = nn.Sequential(nn.Conv2d(3, 8, 5, 4), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(side), nn.Flatten())
    return Encoder(body, 8*side**2)

def flock(n):
    x = draw_finches([i%8 for i in range(n)], 32, seed=5)[0]
    return Items('flock', x, x[:0], torch.arange(n)%8, torch.arange(0), [str(i) for i in range(8)])

def two(x, *n): return [x, x.flip(3)] # views that nothing random is in

def train(method, n, bs, epochs, still=False, bn=False, cbs=None, items=None, valid_pct=0., side=4):
    "A learner after some epochs; `still`: images in their order"
    dls = ssl_dls(items or flock(n), size=32, bs=bs, valid_pct=valid_pct, cache='auto' if items is None else False)
    if still: dls.train.shuffle = False
    torch.manual_seed(1)
    if cbs is None: cbs = synth_pairs(decoder_width=8)
    learn = ssl_learner(dls, net(bn, side), method, cbs=cbs, frozen_bn=not bn)
    with processes(learn): learn.fit(epochs, .05)
    return learn

@contextmanager
def processes(learn):
    "Inside, the learner trains quietly in as many processes as there are"
    together = learn.distrib_ctx(sync_bn=False, cpu=True) if world_size>1 else nullcontext()
    with learn.no_bar(), learn.no_logging(), together: yield

def state(learn, *leave):
    tensors = {k:v for k,v in learn.model.state_dict().items() if isinstance(v, Tensor)}
    return {k:v for k,v in tensors.items() if not any(o in k for o in leave)}

def columns(learn, epoch=-1):
    names,values = learn.recorder.metric_names[1:],learn.recorder.values[epoch]
    return {k:tensor(v) for k,v in zip(names, values) if v is not None}

def same_columns(learn):
    seen = torch.stack([v for i in range(len(learn.recorder.values)) for v in columns(learn, i).values()])
    assert gather(seen).view(world(), -1).diff(dim=0).eq(0).all(), 'columns differ'

def same_everywhere(learn, *leave):
    "Parameters and buffers of all processes, compared to the bit"
    return all(gather(v[None]).eq(v).all() for v in state(learn, *leave).values())

world_size = num_distrib() or 1
no_noise = dict(sigma_cam=0, sigma_var=0, max_pairs=None, augment='none', beta=.5, decoder_width=8)
as_written = dict(no_noise, anchor='rec', residual=False, update='joint')

def alike(out):
    "Weights of the same training, written to a file"
    res = {}
    kinds = dict(mocov2=lambda: MoCoV2(K=96, momentum=.9, views=two),
                 contrast=lambda: Contrast(views=two),
                 simsiam=lambda: Smooth(views=two),
                 nnclr=lambda: SmoothNNCLR(views=two),
                 mean_shift=lambda: SmoothMeanShift(momentum=.9, views=two),
                 lcr=lambda: SmoothLCR(K=96, momentum=.9, views=two))
    runs = [(n,m,as_written) for n,m in kinds.items()]
    runs += [(f'{n}, defaults', kinds[n], no_noise) for n in ('mocov2','contrast')]
    runs += [('mocov2 alone', kinds['mocov2'], None)]
    for name,m,cbs in runs:
        learn = train(m(), 48, 48//world_size, 3, still=True, cbs=[] if cbs is None else synth_pairs(**cbs))
        if world_size>1: assert same_everywhere(learn), name
        res |= {f'{name}.{k}':v for k,v in state(learn, 'bank').items()} # whose length goes by the batch
        shared = 'train_loss','ssl_loss','rec_loss','pair_loss'
        res |= {f'{name}.{k}':v for k,v in columns(learn).items() if k in shared}
    crops = train(Smooth(views=two), 48, 48//world_size, 3, still=True, cbs=[ContrastiveCrop(every=.4, threshold=.5)])
    if world_size>1: assert same_everywhere(crops), 'crops'
    res |= {f'crops.{k}':v for k,v in state(crops).items()}
    plain = whole_views(32, 2, p_jitter=0, p_grey=0, p_blur=0)
    for name,cb in dict(dilo=DiLo(p_keep=1, every=.4), cvsa=CVSA(p_swap=0, every=.4),
                        given=DiLo(p_keep=0, p_blur=0, saliency=lambda x: torch.ones_like(x[:,0]))).items():
        learn = train(Smooth(views=plain), 48, 48//world_size, 3, still=True, cbs=[cb])
        if world_size>1: assert same_everywhere(learn), name
        assert learn.model.masks.any()
        terms = {k:v for k,v in columns(learn).items() if k in ('ssl_loss','align_loss')}
        res |= {f'{name}.{k}':v for k,v in (state(learn) | terms).items()}
    look = Monitor(flock(48), measures=['knn','map','agreement','rank'])
    watched = train(Smooth(views=two), 48, 48//world_size, 2, still=True, cbs=[look])
    if world_size>1: assert same_everywhere(watched), 'watched'
    res |= {f'{when}.{k}':tensor(v) for when,o in dict(start=look.start, end=look.last).items() for k,v in o.items()}
    learn = train(Smooth(views=two), 60, 48//world_size, 2, still=True, valid_pct=.2, cbs=synth_pairs(**as_written))
    valid = {k:v for k,v in columns(learn).items() if 'valid' in k and k!='valid_feat_std'} # which is of a batch
    res |= {f'with a validation part.{k}':v for k,v in valid.items()}
    if rank()==0: torch.save(res, out)

class Contrast(SSLMethod):
    "In-batch contrast of projections, which is what a method does that says nothing else"
    def saliency(self): return Saliency(self.net.projector, kind='in_batch', temperature=self.temperature)

class Smooth(SimSiam):
    "SimSiam with heads that have no batch norm"
    def build(self, encoder, dls):
        return SimSiamModel(encoder, MLPHead(128, 64, 64), MLPHead(64, 16, 64))

class SmoothNNCLR(NNCLR):
    "And NNCLR"
    def build(self, encoder, dls): return NNCLRModel(encoder, MLPHead(128, 64, 16), MLPHead(16, 32, 16), 16, 96)

class SmoothMeanShift(MeanShift):
    "And mean shift"
    def build(self, encoder, dls): return MeanShiftModel(encoder, MLPHead(128, 64, 16), MLPHead(16, 32, 16), 16, 96)

class SmoothLCR(LCR):
    "And a mask's head"
    def build(self, encoder, dls):
        model = super().build(encoder, dls)
        for e in model.encoder,model.key_encoder: e.mask_head.bn = Nothing()
        return model

def everything():
    "All methods on real views, with images that do not come out even"
    if world_size>1: # make the group
        Learner(DataLoaders(device='cpu'), nn.Linear(1,1), loss_func=noop).distrib_ctx(cpu=True).__enter__()
    s = Shuffle(x := torch.randn(5, 3)+10*rank()); f = lambda o: o*2+1
    assert torch.equal(s.restore(f(s.images)), f(x)) and not torch.equal(s.images, x)
    assert sorted(gather(s.images)[:,0].tolist())==sorted(gather(x)[:,0].tolist())
    x = torch.randn(4, 2, requires_grad=True); w = torch.arange(4*world()*2.).view(-1, 2)
    (gather_with_grad(x)*w).sum().backward(); assert torch.equal(x.grad, world()*w.chunk(world())[rank()])
    x = torch.rand(6, 3, 32, 32)*(1+rank())
    # batch statistics of other images, where there are any
    for shuffled,frozen in (True,False),(False,False),(True,True):
        m = MoCoModel(net(bn=True), MLPHead(128, 128, 16), 16, 8, frozen, shuffled)
        for training in True,False:
            keys = m.train(training)(x, x)[1]
            unshuffled = m.key_projector(m.key_encoder(x))
            assert torch.allclose(keys, unshuffled, atol=1e-5)!=(shuffled and not frozen and training)
    for name in sorted(small_methods):
        for bn in (False,True) if name=='mocov2' else (True,):
            learn = train(small_methods[name](), 50, 8, 2, bn=bn, side=side_for(name))
            assert same_everywhere(learn, 'running_', 'num_batches'), name
            assert not gather(torch.rand(3)).view(world(), 3).diff(dim=0).eq(0).any(), 'every process drew the same'
            assert len(learn.recorder.losses)==2*(-(-50//world())//8), learn.recorder.losses
            same_columns(learn)
            if rank()==0:
                table = {k:f'{v:.3f}' for k,v in columns(learn).items()}
                print(name, 'batch norm' if bn else 'no batch norm', table)
    numbers = []
    def drawn(x): numbers.append([random.random(), np.random.rand(), torch.rand(1).item()]); return two(x)
    learn = train(SimSiam(32, 16, views=drawn), 50, 8, 1, cbs=[])
    with processes(learn):
        for _ in range(2): learn.fit(1, .01)
    numbers = gather(torch.tensor(numbers, dtype=torch.double))
    assert len(numbers.unique())==numbers.numel()==3*3*world()*(-(-50//world())//8), 'a fit drew what was drawn before'
    stop = EarlyStoppingCallback(patience=1)                                 # `valid_loss`, and all must stop together
    learn = train(SimSiam(32, 16), 67, 8, 12, bn=True, valid_pct=.25, cbs=[*synth_pairs(decoder_width=8), stop])
    same_columns(learn)
    last = [columns(learn, i)['valid_loss'] for i in (-2,-1)]
    assert stop.epoch==len(learn.recorder.values)-1<11 and last[1]>=last[0], last
    learn = ssl_learner(ssl_dls(flock(50), size=32, bs=8), net(), cbs=synth_pairs(decoder_width=8))
    for q in learn.model.parameters(): q.data.mul_(1+rank())                 # made without a seed, say
    with processes(learn): learn.pretrain_decoder(1)
    assert same_everywhere(learn), 'decoders of different encoders'

def measures(out):
    "What `evaluate` says of images that do not come out even, one file among them unreadable"
    from PIL import Image
    dev = join_processes()
    data,folder = flock(90),Path(out).parent/f'files{world_size}'
    if rank()==0:
        folder.mkdir()
        for i,x in enumerate(data.train[:23]): Image.fromarray(x.permute(1,2,0).numpy()).save(folder/f'{i:02}.png')
        (folder/'07.png').write_bytes(b'not an image')
    if world_size>1: dist.barrier()
    x,y = data.train,data.train_labels
    items = Items('flock', x[:50], x[50:87], y[:50], y[50:87], data.classes)
    enc = net().to(dev)
    res = {k:tensor(v) for k,v in evaluate(enc, items, 32, bs=16, distributed=True, epochs=5).items()}
    res['files'] = features(enc, sorted(folder.glob('*.png')), bs=4, size=32, distributed=True)
    res['two'] = features(enc, data.train[:2], distributed=True)                   # fewer than processes
    for k,v in res.items(): assert gather(v[None]).eq(v).all(), k
    if world_size>1:
        # training on files that are decoded on demand: each process takes as many steps, though one meets the
        # unreadable file
        learn = train(MoCoV2(dim=32), 0, 4, 2, items=Items('files', L(sorted(folder.glob('*.png'))), L()))
        assert len(learn.recorder.losses)==2*(-(-23//world_size)//4), learn.recorder.losses
    if rank()==0: torch.save(res, out)

class Door:
    "PyTorch's collectives, which take only tensors that have gone through the door, as NCCL only takes GPUs'"
    def __init__(self): self.passed,self.calls = [],0
    def __getattr__(self, name): return getattr(dist, name)
    def on_wire(self, x):
        self.passed.append(x.clone()) # as a copy on the GPU would be
        return self.passed[-1]
    def check(self, x):
        assert any(x is o for o in self.passed), 'on the wire without a GPU'
        self.calls += 1
    def all_reduce(self, x): self.check(x); dist.all_reduce(x)
    def broadcast(self, x, src): self.check(x); dist.broadcast(x, src)
    def all_gather(self, rows, x): self.check(x); dist.all_gather(rows, x)

def door(out):
    "Trainings and the measures above, through collectives that refuse whatever has not gone through the door"
    from fgsynth import distrib
    distrib.dist = wire = Door()
    distrib.on_wire = wire.on_wire
    for method in MoCoV2(dim=32), SimSiam(32, 16):
        learn = train(method, 24, 4, 1, bn=True)
        assert same_everywhere(learn, 'running_', 'num_batches')
    n = wire.calls
    measures(out)
    assert n>20 and wire.calls>n+10, (n, wire.calls)

class Synced(nn.SyncBatchNorm):
    "Synchronised batch norm on a CPU: in training it waits for all processes"
    def forward(self, x):
        if self.training: dist.all_reduce(s := x.detach().mean((0,2,3)))
        return x - s[:,None,None]/world() if self.training else x

def alone():
    "What only one process does, or needs, does not leave the others waiting"
    from PIL import Image
    dev = join_processes()
    # a pre-training whose encoder waits for all: each process has seen other images
    enc = net(bn=True)
    enc.body[1] = Synced(8)
    learn = ssl_learner(ssl_dls(flock(50), size=32, bs=8), enc, cbs=synth_pairs(decoder_width=8))
    with processes(learn): learn.pretrain_decoder(4)
    assert same_everywhere(learn, 'running_'), 'other decoders'
    # a share in which nothing can be read
    folder = Path(sys.argv[2])
    if rank()==0:
        for i,x in enumerate(flock(12).train[:12]):
            if i<6: Image.fromarray(x.permute(1,2,0).numpy()).save(folder/f'{i:02}.png')
            else: (folder/f'{i:02}.png').write_bytes(b'not an image')
    dist.barrier()
    z = features(net().to(dev), sorted(folder.glob('*.png')), bs=2, size=32, distributed=True)
    assert z.shape==(6, 128) and gather(z[None]).eq(z).all()
    # an encoder that fails in one process
    def failing(x):
        if rank()==1: raise ZeroDivisionError
        return net()(x)
    class Failing(nn.Module):
        def forward(self, x): return failing(x)
    try: features(Failing(), flock(8).train, distributed=True)
    except (ZeroDivisionError,InputError) as e: print(f'{rank()} {type(e).__name__}\n', end='', flush=True) # one write

if __name__=='__main__':
    warnings.simplefilter('ignore')
    what,*args = sys.argv[1:]
    dict(alike=alike, everything=everything, measures=measures, door=door, alone=lambda folder: alone())[what](*args)
    if world_size>1: dist.destroy_process_group()
