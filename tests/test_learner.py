"The learner: precision, frozen stages, schedules, pictures, and what it says when training goes wrong"
import inspect, os, random, warnings
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from copy import deepcopy
from math import cos, pi
from torch import nn
from fastai.callback.core import Callback
from fastai.callback import schedule                                         # which brings `lr_find`
from fastai.data.core import DataLoaders
from fastai.learner import Learner, noop
from fastai.losses import MSELossFlat
from fastai.torch_core import set_seed
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.nets.encoders import create_encoder
from fgsynth.nets.networks import Encoder
from fgsynth.methods.base import SSLMethod
from fgsynth.methods.health import HealthCallback
from fgsynth.methods.learner import faster_precision, ssl_learner
from fgsynth.methods.mocov2 import MoCoV2
from fgsynth.methods.simsiam import SimSiam
from training import close, quietly, small

nan,inf = float('nan'),float('inf')

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=256, n_test=64, size=32)

@pytest.fixture(scope='module')
def dls(items): return ssl_dls(items, size=32, bs=64)

def tiny():
    "A small network with batch norm"
    layers = nn.Conv2d(3,8,3,2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return Encoder(nn.Sequential(*layers), 128)

def trained(dls, **kw):
    "A learner after one epoch that is the same each time, and its losses"
    set_seed(0); l = ssl_learner(dls, tiny(), MoCoV2(), **kw)
    set_seed(0); dls.train.rng = random.Random(0)
    return l,torch.stack(list(quietly(l, 1, .01).recorder.losses))

@pytest.fixture(scope='module')
def plain(dls): return trained(dls)

# defaults and what is wrong

def test_ways_to_name_a_method(dls):
    assert type(ssl_learner(dls, small()).ssl) is MoCoV2
    assert type(ssl_learner(dls, small(), SimSiam).ssl) is SimSiam
    with pytest.raises(InputError, match="did you mean 'simsiam'"): ssl_learner(dls, small(), 'simsaim')

def test_where_nothing_is_said_the_papers_values_are_taken(dls):
    "Section 4.1; no frozen stage; channels innermost"
    l = ssl_learner(dls, 'timm/test_byobnet')
    assert (l.ssl.temperature, l.ssl.momentum, SSLMethod().temperature, l.lr, l.moms)==(.2, .999, .2, .03, (.9,.9,.9))
    assert {o.requires_grad for o in l.model.encoder.parameters()}=={True}
    w = l.model.encoder.body.stem.conv.weight
    assert (w.is_contiguous(memory_format=torch.channels_last), w.is_contiguous())==(True, False)

def test_channels_lie_outermost_where_that_is_asked_for(dls):
    "Of a network by name, too, whose encoder comes with its channels innermost"
    l = ssl_learner(dls, 'timm/test_byobnet', channels_last=False)
    assert all(o.is_contiguous() for o in l.model.parameters())

def test_batch_norm_is_frozen_from_weights_of_ones_own(dls, tmp_path):
    torch.save(create_encoder('timm/test_byobnet').body.state_dict(), tmp_path/'local.pth')
    made = [ssl_learner(dls, 'timm/test_byobnet', weights=tmp_path/'local.pth', frozen_bn=o) for o in (None,False)]
    assert [l.model.frozen_bn for l in made]==[True,False]

def test_batch_norm_learns_otherwise(dls):
    l = ssl_learner(dls, 'timm/test_byobnet')
    was = {n:b.clone() for n,b in l.model.encoder.named_buffers() if 'running_mean' in n}
    quietly(l)
    assert all((b-was[n]).abs().max()>0 for n,b in l.model.encoder.named_buffers() if n in was)

def test_signature_has_what_a_fastai_learner_takes():
    assert {'path','metrics'} <= set(inspect.signature(ssl_learner).parameters)

# precision

def test_bfloat16_changes_the_numbers_a_little_and_nothing_that_is_kept(dls, plain):
    (a,la),(b,lb) = plain,trained(dls, precision='bf16')
    assert 0<(la-lb).abs().max()<.05, (la,lb)
    assert {p.dtype for p in b.model.state_dict().values()}=={p.dtype for p in a.model.state_dict().values()}

def test_precision_that_does_not_exist(dls):
    with pytest.raises(InputError, match='precision'): ssl_learner(dls, 'resnet18', precision='fp8')

def test_measuring_leaves_the_encoder_alone():
    enc = create_encoder('resnet18').to(memory_format=torch.channels_last)
    faster_precision(enc, 32, 16, rounds=1)
    assert [p.grad for p in enc.parameters()]==[None]*len(list(enc.parameters()))

class Net(nn.Module):
    "Remembers its passes"
    passes = []
    def __init__(self): super().__init__(); self.l = nn.Linear(3, 2)
    def forward(self, x):
        o = self.l(x.mean((2,3)))
        self.passes.append((x.shape, o.dtype, x.is_contiguous(memory_format=torch.channels_last)))
        return o

@pytest.fixture
def measured(monkeypatch):
    "What is chosen when the passes take so many seconds"
    def _f(*seconds, **kw):
        Net.passes.clear(); clock = iter([t for i,s in enumerate(seconds) for t in (100.*i, 100.*i+s)])
        monkeypatch.setattr('time.perf_counter', lambda: next(clock))
        return faster_precision(Net(), 8, 4, **kw)
    return _f

def test_passes_take_turns_and_their_median_counts(measured):
    "Not the first of each kind"
    assert measured(9,.1, 2,1, 4,8, 3,2)==('bf16', 1.5)
    assert Net.passes==[((4,3,8,8), o, True) for o in (torch.float32,torch.bfloat16)]*4
    assert measured(1,1, 5,1, 1,1, 3,1, 2,1, 4,1, rounds=5)==('bf16', 3.)

def test_bfloat16_must_be_more_than_a_tenth_faster(measured):
    assert measured(1,1, 11,10, rounds=1)==('fp32', 1.1)
    assert measured(1,1, 12,10, rounds=1)==('bf16', 1.2)

def test_several_processes_do_not_measure_each_by_itself(dls, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(InputError, match='several processes'): ssl_learner(dls, small(), precision='auto')
    monkeypatch.setenv('WORLD_SIZE', '1')
    assert ssl_learner(dls, small(), precision='auto').precision in ('fp32','bf16')

def test_compiled_network_trains_the_same(dls, plain):
    "And keeps the names of its state (the backend that generates no code is quick)"
    (a,la),(c,lc) = plain,trained(dls, compile=dict(backend='eager'))
    assert close(lc, la, 1e-4)
    assert list(c.model.state_dict())==list(a.model.state_dict())

def test_encoder_and_key_encoder_are_compiled(dls, monkeypatch):
    told = []
    monkeypatch.setattr(nn.Module, 'compile', lambda self, **kw: told.append(kw))
    for kw in dict(compile=True), dict(compile=dict(backend='eager')), dict(compile=False), {}:
        ssl_learner(dls, 'timm/test_byobnet', **kw)
    assert told==[{},{}] + [dict(backend='eager')]*2

# stages and schedules

def test_learning_rates_rise_from_stage_to_stage():
    few = ssl_dls(get_dataset('finches', n_train=16, n_test=8, size=32), size=32, bs=8)
    learn = ssl_learner(few, 'resnet18', frozen_stages=2, by_stage=True)
    was = deepcopy(learn.model.encoder.state_dict())
    quietly(learn, 1, slice(1e-3, 3.2e-2))
    assert close([h['lr'] for h in learn.opt.hypers], [1e-3*2**i for i in range(6)], 1e-6)
    assert [len(g) for g in learn.opt.param_lists]==[0,0,15,15,15,4]
    now = learn.model.key_encoder.state_dict()
    assert all(v.equal(was[k]) for k,v in now.items() if 'layer1' in k or k.startswith('body.bn1'))

def test_freeze_to_counts_stages(dls):
    l = ssl_learner(dls, 'resnet18', by_stage=True); l.freeze_to(4)
    def trains(stage):
        ps = l.model.encoder.body.get_submodule(stage).parameters()
        return any(p.requires_grad for p in ps if p.dim()>1)
    assert [trains(o) for o in ('conv1','layer3','layer4')]==[False,False,True]

def test_all_stages_frozen(dls):
    learn = ssl_learner(dls, 'timm/test_byobnet', frozen_stages=5)
    assert not any(o.requires_grad for o in learn.model.encoder.parameters())

@pytest.mark.parametrize('n', [-1, 6])
def test_number_of_stages_that_there_are_not(dls, n):
    with pytest.raises(InputError, match='has 5'): ssl_learner(dls, 'resnet18', frozen_stages=n)

class Rates(Callback):
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append([h['lr'] for h in self.opt.hypers])

def fit_cosine(learn, *args):
    with learn.no_bar(), learn.no_logging(): learn.fit_cosine(*args)
    return learn.rates.seen

@pytest.mark.parametrize('method,n', [(MoCoV2(),2), (SimSiam(64,16),3)], ids=['mocov2','simsiam'])
def test_learning_rates_fall_along_half_a_cosine(dls, method, n):
    "But for SimSiam's predictor; and afterwards the learner is as it was"
    l = ssl_learner(dls, 'timm/test_byobnet', method, cbs=Rates())
    seen = fit_cosine(l, 2, [.01] + [.05]*(n-1))
    assert close(seen, [[.01*f, .05*f, .05][:n] for f in ((1+cos(pi*i/8))/2 for i in range(8))], 1e-6)
    assert len(l.recorder.lrs)==8
    quietly(l, 1, .01)
    assert len(l.opt.hypers)==2
    l.freeze()
    assert {p.requires_grad for h in l.model.heads for p in getattr(l.model, h).parameters()}=={True}

def test_held_head_beside_stages(dls):
    l = ssl_learner(dls, 'timm/test_byobnet', SimSiam(64,16), frozen_stages=1, by_stage=True, cbs=Rates())
    first,*_,last = fit_cosine(l, 1, slice(.01,.64))
    assert close(first, [.01*2**i for i in range(7)])
    assert close(last[6], .64)
    assert last[5]<.1

def test_cosine_starts_at_the_learners_rate(dls):
    assert close(fit_cosine(ssl_learner(dls, 'timm/test_byobnet', cbs=Rates(), lr=.2), 1)[0], [.2,.2])

# what a fastai user expects

def test_table_has_validation_columns_where_there_is_validation(items, dls, plain):
    assert plain[0].recorder.metric_names==['epoch','train_loss','ssl_loss','feat_std','time']
    l = ssl_learner(dls, small()); v = ssl_learner(ssl_dls(items, size=32, bs=64, valid_pct=.25), small())
    assert (l.recorder.train_metrics, l.recorder.valid_metrics)==(True, False)
    assert v.recorder.valid_metrics

def test_loss_is_plotted_without_validation(plain): plain[0].recorder.plot_loss(); plt.close()

def test_usual_tools_of_fastai(items, tmp_path):
    learn = ssl_learner(ssl_dls(items, size=32, bs=64, valid_pct=.25), small(), SimSiam(64,16), path=tmp_path)
    quietly(learn)
    assert 'valid_ssl_loss' in learn.recorder.metric_names
    with learn.no_bar():
        assert len(learn.validate())==3
        r = learn.lr_find(num_it=20, show_plot=False)
    assert 0 < r.valley < 10
    text = repr(learn.summary())
    assert 'Total trainable params' in text and 'Conv2d' in text
    learn.freeze(); assert [p.requires_grad for p in learn.model.encoder.parameters()]==[False]*2

def drawn(learn, **kw):
    "Size of the picture, its labels, and what is in it"
    plt.close('all'); learn.show_batch(**kw); fig = plt.gcf()
    size = [len(fig.axes), *fig.get_size_inches()]
    names = {i:a.get_ylabel() for i,a in enumerate(fig.axes) if a.get_ylabel()}
    return size, names, [a.images[0].get_array() for a in fig.axes]

def test_show_batch_has_clean_images_above_their_views(items, dls):
    learn = ssl_learner(dls, small())
    size,names,ims = drawn(learn)
    assert close(size, [18, 6*1.3, 3*1.3])
    assert names=={0:'clean', 6:'view 1', 12:'view 2'}
    train = items.train.permute(0,2,3,1).numpy()/255
    far = [np.abs(train-a).max((1,2,3)).min() for a in ims] # from the nearest training image
    assert max(far[:6])<1e-6 and min(far[6:])>.05
    assert close(drawn(learn, max_n=1, figsize=(2,3))[0], [3,2,3])
    plt.close('all')

def test_show_batch_of_other_learners_is_their_loaders(dls, monkeypatch):
    monkeypatch.setattr(dls, 'show_batch', lambda max_n: max_n, raising=False)
    assert Learner(dls, nn.Linear(1,1), loss_func=noop).show_batch(max_n=3)==3

# what goes wrong

class Break(Callback):
    "Calls `f(learn)` before a step"
    order = -1
    def __init__(self, f, at=2): self.f,self.at = f,at
    def before_batch(self):
        if self.training and self.train_iter==self.at: self.f(self.learn)

def plain_fit(*cbs, n=1):
    "A learner that has nothing of ours but the callback"
    x = torch.randn(64, 5)
    dls = DataLoaders.from_dsets([(a,a.sum()) for a in x], [], bs=8, device='cpu', drop_last=True)
    net = nn.Sequential(nn.Linear(5,4), nn.ReLU(), nn.Linear(4,1), nn.Flatten(0))
    return quietly(Learner(dls, net, loss_func=MSELossFlat(), lr=.01, cbs=[HealthCallback(), *cbs]), n)

class Root(Callback):
    "A loss that is finite, with a gradient that is not"
    def after_loss(self): self.learn.loss_grad = self.learn.loss_grad + (self.learn.pred*0).sum().sqrt()

def grow(learn): learn.opt.set_hyper('lr', 1e38)
def weight(learn): learn.model[2].weight.data[0,1] = nan
def bias(learn): learn.model[0].bias.data.fill_(inf)
def images(learn): learn.xb[0].mul_(nan)

@pytest.mark.parametrize('words,cb,n', [
    ('2.weight was not finite at step 2 .epoch 0.', Break(weight), 1),
    ('0.bias was not finite at step 11 .epoch 1.', Break(bias, 11), 2),
    ('the batch of images was not finite at step 5', Break(images, 5), 1),
    ('was not finite at step 4', Break(grow, 3), 1), # the step makes the weights infinite, and the next one meets them
    ('was not finite at step 8', Break(grow, 7), 1), # in the last step, which no other follows
    ('the gradient of 2.bias was not finite at step 0', Root(), 1),
], ids=['weight','bias','images','step','last step','gradient'])
def test_first_thing_that_is_not_finite_is_named(words, cb, n):
    with pytest.raises(InputError, match=words): plain_fit(cb, n=n)

def test_lr_find_may_explode():
    learn = plain_fit(n=3); assert learn.health.n_steps==24
    with learn.no_bar(): learn.lr_find(stop_div=False, num_it=8, end_lr=1e38, show_plot=False)

def ssl_weight(l): l.model.encoder.body.stem.conv.weight.data[3] = nan
def ssl_queue(l): l.model.queue[7,9] = nan
def ssl_image(l): l.xb[0][2,0,5,5] = nan

@pytest.mark.parametrize('f,name', [
    (ssl_weight, 'encoder.body.stem.conv.weight'),
    (ssl_queue, 'queue'),
    (ssl_image, 'the batch of images'),
])
def test_what_is_not_finite_is_named_in_a_self_supervised_run(dls, f, name):
    with pytest.raises(InputError, match=f'{name} was not finite at step 4 .epoch 1.'):
        quietly(ssl_learner(dls, 'timm/test_byobnet', cbs=Break(f, 4)), 2, .03)

class Same(nn.Module):
    "Says the same of every image"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(16))
    def forward(self, x): return self.w + 0*x.mean((1,2,3))[:,None]

def warned(dls, arch, patience):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        health = HealthCallback(every=4, patience=patience)
        quietly(ssl_learner(dls, arch, SimSiam(64,16), health=False, cbs=health), 3, .01)
    return ['collapsed: for 8 steps' in str(o.message) for o in w]

def test_collapse_is_warned_of_once(dls):
    "Though twelve steps are like that; not before its patience is at an end, and not where images differ"
    assert warned(dls, Encoder(Same(), 16), 8)==[True]
    assert warned(dls, Encoder(Same(), 16), 13)==[]
    assert warned(dls, 'timm/test_byobnet', 8)==[]
    assert HealthCallback().patience==100

def test_health_can_be_left_out(dls): assert not hasattr(ssl_learner(dls, 'resnet18', health=False), 'health')
