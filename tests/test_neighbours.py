"Callbacks of fastai that people use beside ours: each does what it does elsewhere, and ours go on doing what they do"
import random, sys, types
import pytest, torch
from conftest import root
from torch import Tensor, nn, tensor
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import ParamScheduler, SchedLin
from fastai.basics import L
from fastai.torch_core import set_seed
from fastai.callback.training import GradientAccumulation, GradientClip
from training import silent
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.nets.networks import Encoder
from fgsynth.runs.resume import CheckpointCallback, read_checkpoint
from fgsynth.methods.mocov2 import MoCoV2
from fgsynth.methods.simsiam import SimSiam
from fgsynth.methods.base import batch_stats_only
from fgsynth.methods.learner import ssl_learner
from fgsynth.synth.callbacks import PerturbCallback, synth_pairs

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=128, n_test=8, size=32)

def small(bn=False):
    layers = [nn.Conv2d(3,8,3,2), *[nn.BatchNorm2d(8)]*bn, nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten()]
    return Encoder(nn.Sequential(*layers), 72)

def make(items, *cbs, method=None, bs=32, pairs=True, valid_pct=0., bn=False, **kw):
    "A learner, the same each time"
    set_seed(0)
    dls = ssl_dls(items, size=32, bs=bs, valid_pct=valid_pct)
    synth = synth_pairs(decoder_width=4) if pairs else []
    return silent(ssl_learner(dls, small(bn), method or MoCoV2(K=64), cbs=[*synth, *cbs], **kw))

def fit(learn, n, lr=None, **kw):
    "The same order and random numbers each time"
    set_seed(0); learn.dls.train.rng = random.Random(0)
    learn.fit(n, lr, **kw)
    return learn

def state(learn, but=()):
    tensors = {k:v for k,v in learn.model.state_dict().items() if isinstance(v, Tensor)}
    return {k:v.clone() for k,v in tensors.items() if not k.startswith(tuple(but) or '-')}
def differ(a, b): return [k for k in a if not a[k].equal(b[k])]
def losses(learn): return torch.stack(list(learn.recorder.losses))
def copied(w): return w.detach().clone()
def grad_norm(ps): return sum((p.grad**2).sum() for p in ps if p.grad is not None)**.5

class At(Callback):
    "Calls `f(learn)` at an event"
    def __init__(self, event, f, order=99): setattr(self, event, lambda: f(self.learn)); self.order = order

def test_bfloat16(items):
    "Close to float32, and whatever is kept or explained stays float32"
    seen = []
    def look(l): seen.append([l.synth.s_hat.dtype, l.synth.noise.dtype, l.model.decoder.expand.weight.grad.dtype])
    half,full = make(items, At('after_backward', look), precision='bf16'),make(items)
    fit(half, 2, .01); fit(full, 2, .01)
    assert set(sum(seen, []))=={torch.float32} and len(seen)==8
    assert {k:v.dtype for k,v in state(half).items()}=={k:v.dtype for k,v in state(full).items()}
    assert 0 < (losses(half)-losses(full)).abs().max() < .1

class Half(MixedPrecision):
    "fastai's float16 with a gradient scaler, which it makes for GPUs alone, on this processor"
    def before_fit(self):
        self.autocast,self.scales = torch.autocast('cpu', torch.float16),L()
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**10)

def test_float16_with_a_scaler(items):
    "Close to float32; a step whose gradients overflow is left out, by the encoder and by the decoder's own optimizer"
    half,full = make(items, Half()),make(items)
    fit(half, 2, .01); fit(full, 2, .01)
    assert 0 < (losses(half)-losses(full)).abs().max() < .1
    a,b,start = state(half),state(full),state(make(items))
    for k in 'encoder.body.0.weight','decoder.expand.weight': # they went the same way
        assert (a[k]-b[k]).norm() < .1*(b[k]-start[k]).norm(), k
    seen = []
    def spoil(l):
        if l.train_iter==1: l.model.encoder.body[0].weight.grad[0] = l.model.decoder.expand.weight.grad[0] = torch.inf
    def look(l):
        enc,dec = l.model.encoder.body[0].weight,l.model.decoder.expand.weight
        seen.append((l.scaler.get_scale(), copied(enc), copied(dec)))
    learn = fit(make(items, Half(), At('after_backward', spoil), At('after_batch', look)), 1, .01)
    scales,enc,dec = zip(*seen)
    assert scales==(2**10, 2**9, 2**9, 2**9)
    for w in enc,dec: assert [w[i].equal(w[i+1]) for i in range(3)]==[True,False,False]
    assert losses(learn).isfinite().all()

def test_float16_step_that_is_none_moves_no_slow_copy(items):
    "The key encoder follows where the optimizer stepped, and nowhere else"
    seen = []
    def spoil(l):
        if l.train_iter==1: l.model.encoder.body[0].weight.grad[0] = torch.inf
    def look(l): seen.append([copied(enc.body[0].weight) for enc in (l.model.encoder, l.model.key_encoder)])
    fit(make(items, Half(), At('after_backward', spoil), At('after_batch', look), method=MoCoV2(momentum=.5)), 1, .01)
    for w in zip(*seen): assert [w[i].equal(w[i+1]) for i in range(3)]==[True,False,False]

def test_float16_and_gradient_clip(items):
    "What is clipped has its own size, the decoder's gradients too, and not that of the scaled loss"
    def norms(*cbs):
        seen = {}
        def look(l):
            for n in 'encoder','projector','decoder': seen[n] = grad_norm(getattr(l.model, n).parameters())
            raise CancelFitException()
        fit(make(items, *cbs, GradientClip(.5), At('before_step', look)), 1, .01)
        return seen
    full,half = norms(),norms(Half())
    assert all(abs(half[k]/full[k]-1)<.05 for k in full), (full, half)

def test_float16_goes_on_where_it_stopped(items, tmp_path):
    """The scaler is in the checkpoint too: stopped after a step that was given up and taken up again, the run ends with
    the weights of one that never stopped, to the bit"""
    def run(folder, stop=None):
        def spoil(l):
            if l.train_iter==1: l.model.encoder.body[0].weight.grad[0] = torch.inf
        def end(l):
            if l.train_iter==stop: raise KeyboardInterrupt
        keep = CheckpointCallback(tmp_path/folder, every=1, resume=True)
        learn = make(items, Half(), At('after_backward', spoil), At('after_batch', end), keep)
        if stop is None: return fit(learn, 2, .01)
        with pytest.raises(KeyboardInterrupt): fit(learn, 2, .01)
    for stop in 3,6: run('stopped', stop)
    a,b = run('whole'),run('stopped')
    sa,sb = (read_checkpoint(tmp_path/o)['scaler'] for o in ('whole','stopped'))
    assert sa==sb and sa['scale']==2**9
    assert not differ(state(a), state(b)) and losses(a).equal(losses(b))

def test_synchronised_batch_norm(items):
    """What several processes share is a batch norm like the others: frozen where it should be, and decoded images leave
    no trace in it"""
    learn = make(items, bn=True); net = learn.model
    net.frozen_bn = True; net.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(net.encoder)
    bns = [m for m in net.encoder.modules() if isinstance(m, nn.SyncBatchNorm)]
    net.train()
    assert bns and not any(m.training for m in bns)
    with batch_stats_only(net): assert not any(m.track_running_stats for m in bns)
    assert all(m.track_running_stats for m in bns)

def test_gradient_accumulation_equals_the_large_batch(items):
    """Two batches of 32 make the step of one of 64. The limits: what couples images within a batch is not accumulated,
    that is batch norm and in-batch negatives, so there are none here; and a queue moves with every batch, so the second
    one meets keys of the first: here it stands still."""
    class Still(MoCoV2):
        def enqueue(self, q, k): pass
    def views(x): return [x, x.flip(-1)]
    def trained(*cbs, bs):
        return fit(make(items, *cbs, bs=bs, pairs=False, method=Still(K=64, momentum=.5, views=views)), 2, .1)
    a,b,c = trained(bs=64),trained(GradientAccumulation(64), bs=32),trained(bs=32)
    (sa,sb,sc) = map(state, (a, b, c))
    def far(x, y): return max((x[k]-y[k]).abs().max() for k in x if x[k].is_floating_point())
    assert far(sa, sb)<1e-5 and far(sa, sc)>1e-3 # the key encoder, too, follows at each step of the optimizer
    d = fit(make(items, GradientAccumulation(64), method=MoCoV2(K=96)), 1, .1)
    ids = set(d.model.queue_ids.tolist())
    assert d.model.ptr==128%96 and ids<=set(range(128)) and d.model.bank.count==4*16 # queue and bank: per batch

def test_gradient_clip(items):
    """After clipping the gradients of all parameters together, the decoder's among them, are as long as was asked for,
    and the step follows them"""
    seen = {}
    def look(l):
        w = l.model.encoder.body[0].weight
        seen.update(norm=grad_norm(l.model.parameters()), w=copied(w), g=w.grad.clone())
    def stop(l):
        seen['new'] = copied(l.model.encoder.body[0].weight)
        raise CancelFitException()
    learn = make(items, GradientClip(.01), At('before_step', look), At('after_step', stop, order=98), wd=0.)
    learn.fit(1, .1)
    assert abs(seen['norm']-.01)<1e-6 and seen['g'].abs().sum()>0
    assert torch.allclose(seen['new'], seen['w'] - .1*seen['g'], atol=1e-8)

def test_channels_last(items):
    "The memory format changes the order of sums and nothing else"
    a,b = make(items, channels_last=True),make(items, channels_last=False)
    fit(a, 1, .01); fit(b, 1, .01)
    w = a.model.encoder.body[0].weight
    assert w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous()
    assert b.model.encoder.body[0].weight.is_contiguous()
    assert torch.allclose(losses(a), losses(b), atol=1e-4)

def test_param_scheduler(items):
    "Both groups follow the schedule; the decoder's own optimizer has its own rate"
    seen = []
    learn = make(items, At('before_step', lambda l: seen.append([h['lr'] for h in l.opt.hypers])))
    fit(learn, 2, cbs=ParamScheduler({'lr':SchedLin(.1, .02)}))
    assert torch.allclose(tensor(seen), tensor([[.1 - .08*i/8]*2 for i in range(8)]))
    assert [g['lr'] for g in learn.model.decoder_opt.opt.param_groups]==[1e-3]

def test_validate_changes_nothing(items):
    learn = make(items, valid_pct=.25, bn=True); learn.fit(1, .01)
    before = state(learn)
    got = learn.validate()
    assert not differ(before, state(learn)) and learn.model.bank.count==3*16
    names = [n for n in learn.recorder.metric_names if n.startswith('valid_')]
    got = dict(zip(names, got))
    x = torch.stack([learn.dls.valid_ds[i][0] for i in range(32)]).float().as_subclass(Tensor)/255
    with torch.no_grad(): rec = learn.model.eval().decoder(learn.model.encoder(x[:16]))
    assert abs(got['valid_rec_loss'] - ((rec-x[:16])**2).mean())<1e-5

def test_summary(items):
    "Counts the parameters that are there, and changes none"
    learn = make(items); before = state(learn)
    text = repr(learn.summary())
    for what,grad in ('trainable',True),('non-trainable',False):
        n = sum(p.numel() for p in learn.model.parameters() if p.requires_grad==grad)
        assert f'Total {what} params: {n:,}' in text
    assert not differ(before, state(learn))

def test_freeze(items):
    """A frozen encoder stays as it is, except for its batch norms, as in fastai; the heads learn, and the key encoder
    follows what stands still"""
    learn = make(items, bn=True); start = state(learn)
    learn.freeze(); learn.fit(1, .1)
    now = differ(start, state(learn))
    assert not [k for k in now if k.startswith(('encoder.body.0.','key_encoder.body.0.'))]
    assert 'encoder.body.1.weight' in now and 'projector.0.weight' in now and 'decoder.expand.weight' in now

def test_loggers(items, monkeypatch, tmp_path):
    """TensorBoard, W&B and CSVLogger get a value for each of our terms, the one in the training table (their packages
    are stood in for)"""
    written,logged = {},{}
    class SummaryWriter:
        def __init__(self, log_dir=None): pass
        def add_scalar(self, name, v, step): written[name] = float(v)
        def close(self): pass
    tb = types.ModuleType('torch.utils.tensorboard'); tb.SummaryWriter = SummaryWriter
    wandb = types.ModuleType('wandb')
    wandb.run = types.SimpleNamespace(step=0, summary={})
    wandb.config = types.SimpleNamespace(update=lambda *a, **k: None)
    wandb.log = lambda d, step=None: logged.update(d)
    stand_ins = {'tensorboard':types.ModuleType('tensorboard'), 'torch.utils.tensorboard':tb, 'wandb':wandb}
    for n,m in stand_ins.items(): monkeypatch.setitem(sys.modules, n, m)
    from fastai.callback.tensorboard import TensorBoardCallback
    from fastai.callback.wandb import WandbCallback
    for n in 'fastai.callback.tensorboard','fastai.callback.wandb': monkeypatch.delitem(sys.modules, n) # not for others
    board,wb = TensorBoardCallback(trace_model=False, log_preds=False),WandbCallback(log_preds=False)
    learn = make(items, board, wb, CSVLogger(tmp_path/'log.csv'), path=tmp_path)
    learn.fit(2, .01)
    table = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    head,*rows = [l.split(',') for l in (tmp_path/'log.csv').read_text().splitlines()]
    for n in 'ssl_loss','feat_std','rec_loss','pair_loss','pair_diff':
        assert written[n]==logged[n]==table[n], n
        assert abs(float(rows[-1][head.index(n)])-table[n])<1e-6

@pytest.mark.parametrize('method', [MoCoV2, SimSiam])
def test_saliency_leaves_gradients_alone(items, method):
    "Scores and bank beside the method: the gradients of all its parameters are those without them"
    def grads(*cbs):
        kept = {}
        def keep(l):
            ps = [(n,p) for n,p in l.model.named_parameters() if 'decoder' not in n]
            kept.update({n:p.grad.clone() for n,p in ps if p.grad is not None})
            raise CancelFitException()
        fit(make(items, *cbs, At('after_backward', keep), method=method(), pairs=False, bn=True), 1, .1)
        return kept
    a,b = grads(),grads(PerturbCallback())
    assert a.keys()==b.keys() and len(a)>5 and not differ(a, b)
    assert all(g.abs().sum()>0 for g in a.values() if g.dim()>1)

class Hold(Callback):
    "Holds on to each step's graph: a leak"
    order = 98
    def before_fit(self): self.held = []
    def after_loss(self): self.held.append((self.learn.loss_grad, torch.zeros_like(self.learn.ssl.clean)+1))

def growth(*cbs):
    "By how many MB the resident size of this process grows in 200 steps after the first 40"
    import psutil
    size = []
    def look(l): size.append(psutil.Process().memory_info().rss/1e6)
    items = get_dataset('finches', n_train=64, n_test=8, size=32)
    method = MoCoV2(K=64, views=lambda x: [x, x.flip(-1)])
    make(items, At('after_epoch', look), *cbs, bs=16, method=method).fit(60, .001)
    return size[-1]-size[9] # 4 steps an epoch

def test_memory_does_not_grow(forked, tmp_path):
    "In a process of its own; that a leak would be seen is seen"
    pytest.importorskip('psutil')
    setup = f"import sys; sys.path.insert(0, {str(root/'tests')!r}); from test_neighbours import *"
    (tmp_path/'grow.py').write_text(f'{setup}; print(growth(), growth(Hold()))')
    r = forked(tmp_path/'grow.py')
    assert r.returncode==0, r.stderr
    fine,leak = map(float, r.stdout.split()[-2:])
    assert fine<20 and leak>50, (fine, leak)
