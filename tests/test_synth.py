"The callbacks that synthesize, the decoder's training and the controls: defaults, seeds, gradients, what moves"
import inspect, math, pickle, random, warnings
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from torch import nn, Tensor, tensor
from fastcore.imports import equals
from fastcore.test import is_close
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import *
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner
from fastai.torch_core import set_seed
from training import silent, small, small_methods
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.methods.base import SSLMethod
from fgsynth.methods.health import HealthCallback
from fgsynth.methods.learner import ssl_learner
from fgsynth.methods.mocov2 import MoCoV2
from fgsynth.methods.simsiam import SimSiam
from fgsynth.synth.perturb import FeatureBank, MODES, Synthesis
from fgsynth.synth.decoding import SynthCallback, UnscaleDecoderGrads, needs_pretraining, pretrain_where_needed
from fgsynth.synth.callbacks import PAPER, DecoderCallback, PerturbCallback, SynthPairCallback, synth_pairs
from fgsynth.synth.controls import ClassNoise, synth_callbacks, synth_modes
from fgsynth.runs.presets import read_preset

classes = DecoderCallback,PerturbCallback,SynthPairCallback

@pytest.fixture(scope='module')
def items():
    set_seed(0)
    return get_dataset('finches', n_train=256, n_test=64, size=32)

@pytest.fixture
def dls(items):
    set_seed(0)
    return ssl_dls(items, size=32, bs=64)

narrow_pairs = partial(synth_pairs, decoder_width=4)

def make(dls, method=None, cbs=None, side=3, **kw):
    return silent(ssl_learner(dls, small(side), method or MoCoV2(K=128), cbs=cbs, **kw))

def alone(cb, **learn):
    "A callback with as much of a learner as it needs"
    cb.learn = SimpleNamespace(**learn)
    return cb

class EachStep(Callback):
    "Looks at each step before anything is updated"
    order = 9
    def __init__(self, look): self.look = look
    def after_loss(self): self.look(self.learn)

# defaults and keywords

def defaults(f):
    "Arguments that have a default other than None"
    found = {k:o.default for k,o in inspect.signature(f).parameters.items()}
    return {k:v for k,v in found.items() if v is not None and v is not inspect.Parameter.empty}

def test_defaults_stand_on_the_classes():
    pairs = dict(max_pairs=.5)
    assert defaults(SynthCallback) == pairs
    assert defaults(DecoderCallback) == pairs | dict(beta=0., update='own', decoder_lr=1e-3, decoder_width=32)
    assert defaults(PerturbCallback) == pairs | dict(mode='both', sigma_cam=3., sigma_var=3., tau=.905, target='-loss',
                                                     relative=True, bank_size=4096, norm='min_max')
    assert defaults(SynthPairCallback) == pairs | dict(lam=.5, augment='whole', residual=True, anchor='view')
    assert defaults(Learner.pretrain_decoder) == dict(n_epoch=5, lr=5e-3, bs=16)

@pytest.mark.parametrize('cls', classes)
def test_signatures_name_every_argument(cls):
    assert 'max_pairs' in inspect.signature(cls).parameters and 'kwargs' not in inspect.signature(cls).parameters
    with pytest.raises(TypeError): cls(sigma=3.)

def test_each_setting_goes_where_it_belongs():
    decoder,perturber,pair = synth_pairs('cam', max_pairs=7, decoder_width=4, tau=.5, lam=.1)
    assert [cb.max_pairs for cb in (decoder,perturber,pair)] == [7]*3
    assert (decoder.decoder_width, perturber.tau, perturber.mode, pair.lam) == (4, .5, 'cam', .1)

def test_the_papers_settings_are_those_of_its_preset():
    preset = read_preset('paper').values
    assert PAPER == {k:preset[k] for k in PAPER if k!='relative'} | {'relative': not preset['absolute']}
    assert synth_pairs(paper=True)[1].sigma_cam == 1.
    assert synth_pairs(paper=True, sigma_cam=2.)[1].sigma_cam == 2.

@pytest.mark.parametrize('kwargs,said', [
    (dict(sigma=3.), 'sigma_cam'), (dict(distance=0.), 'above 0'), (dict(distance=-.5), 'above 0'),
    (dict(sigma_cam=-.1), 'from 0 up'), (dict(sigma_var=-.1), 'from 0 up'), (dict(norm='ranks'), "did you mean 'rank'"),
    (dict(features='view'), "update='frozen'"), (dict(features='x', update='frozen'), "first 'view'"),
    (dict(features='view', update='frozen', beta=.5), 'beta=0'), (dict(mode='bath'), "did you mean 'both'")])
def test_what_cannot_be_meant_is_said(kwargs, said):
    with pytest.raises(InputError, match=said): synth_pairs(**kwargs)

@pytest.mark.parametrize('kwargs', [dict(distance=.5), dict(sigma_cam=0), dict(sigma_var=0, sigma_cam=.5)])
def test_the_smallest_strengths_are_allowed(kwargs): PerturbCallback(**kwargs)

def test_callbacks_that_disagree_are_an_error(dls):
    with pytest.raises(InputError, match='disagree'): make(dls, cbs=[DecoderCallback(), PerturbCallback(max_pairs=3)])

def test_callbacks_come_one_after_the_other():
    "After the method and before its health is looked at; gradients have their size back before they are clipped"
    orders = [SSLMethod.order, *(o.order for o in classes), HealthCallback.order]
    assert sorted(set(orders)) == orders
    assert MixedPrecision.order < UnscaleDecoderGrads.order < GradientClip.order

def test_callbacks_can_be_copied_and_pickled():
    for cb in synth_pairs(sigma_cam=2., lam=.25):
        for other in deepcopy(cb), pickle.loads(pickle.dumps(cb)):
            assert type(other) is type(cb) and other.max_pairs==.5
            for n in 'sigma_cam','lam': assert getattr(other, n, None) == getattr(cb, n, None)

# how many of a batch, and which random numbers

@pytest.mark.parametrize('most,batch,n', [(None,32,32), (.5,32,16), (.5,3,2), (.01,32,2), (.08,32,3), (.1,32,3),
                                          (1,32,32), (1.,32,32), (2,32,2), (20,32,20), (40,32,32), (.5,1,1)])
def test_how_many_of_a_batch(most, batch, n):
    assert alone(SynthPairCallback(max_pairs=most), ssl=SimpleNamespace(clean=[0]*batch)).n_pairs() == n

@pytest.mark.parametrize('seed,want', [(5, 5+2*(3*10+35)), (2**62+5, 2**62+135), (2**63-1, 129)])
def test_each_step_has_a_seed(seed, want):
    torch.manual_seed(seed)
    first = SimpleNamespace(past_steps=0)
    assert alone(PerturbCallback(), epoch=3, n_iter=10, train_iter=35, ssl=first).step_seed() == want

def flat(r, g, b): return tensor([r,g,b]).view(1,3,1,1).expand(2,3,4,4)

x = flat(.9,.1,.5)
made = dict(rec=flat(.1,.8,.5), code=torch.zeros(2,1), z_pert=torch.zeros(2,1))
shaken = flat(.8,.1,.25)

def look(cb, train_iter=35, **synth):
    "What a callback encodes of its pairs in one step, and the learner"
    ssl = SimpleNamespace(past_steps=0, clean=x, whole=lambda o: o+torch.rand(1), view=lambda o: o+torch.rand(1)+9)
    alone(cb, epoch=3, n_iter=10, train_iter=train_iter, terms={}, dls=SimpleNamespace(device=torch.device('cpu')),
          synth=Synthesis(x=x, **synth), ssl=ssl, model=SimpleNamespace(decoder=lambda z: shaken))
    return cb.images(),cb.learn

def test_a_pair_is_the_clean_image_and_its_change():
    images,learn = look(SynthPairCallback(augment='none', max_pairs=None), **made)
    assert len(images) == 1
    assert is_close(images[0], flat(1.,0.,.25), 1e-6) # what leaves [0, 1] is cut
    assert is_close((learn.synth.diff, learn.terms['pair_diff']), [(.1**2+.1**2+.25**2)/3]*2, 1e-6)
    assert equals(learn.synth.pair[0], x)

def test_a_pair_of_the_paper_is_decoded():
    images,_ = look(SynthPairCallback(augment='none', max_pairs=None, anchor='rec', residual=False), **made)
    assert equals(images, [made['rec'], shaken])

def test_a_pair_without_noise_is_clean_and_decoded():
    images,_ = look(SynthPairCallback(augment='none', max_pairs=1.), rec=made['rec'])
    assert equals(images, [made['rec']])

def same_twice(**kw): return SynthPairCallback(pair=lambda o: (o,o), max_pairs=None, **kw)

def test_pairs_are_looked_at_with_random_numbers_of_their_own():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    steps = ('whole',35), ('whole',35), ('whole',36), ('view',35)
    drawn = [look(same_twice(augment=a, anchor='rec'), train_iter=i)[0] for a,i in steps]
    assert equals(torch.get_rng_state(), before)
    torch.manual_seed((7 + 2*(3*10+35)) + 1)
    u,v = torch.rand(1),torch.rand(1)
    assert is_close(drawn[0], [x+u, x+v], 1e-6)
    assert equals(drawn[0], drawn[1])
    assert (drawn[0][0]-drawn[2][0]).abs().min() > 1e-6
    assert is_close(drawn[3], [x+u+9, x+v+9], 1e-6)

@pytest.mark.parametrize('seed,to', [(2**62, 2**62+131), (2**63-1-130, 0)])
def test_seeds_start_anew_where_they_end(seed, to):
    torch.manual_seed(seed)
    (last,),_ = look(same_twice())
    torch.manual_seed(to)
    assert is_close(last, x+torch.rand(1), 1e-6)

@pytest.mark.parametrize('diff,want', [(.02, 1.), (.01, 2**.25), (.04, 2**-.25), (2., .7), (.0001, 1.4), (0., 1.4)])
def test_distance_goes_half_a_step(diff, want):
    "On the log scale, and at most 1.4-fold"
    bank = FeatureBank(4, 2)
    bank.gain.fill_(3.)
    synth,model = Synthesis(diff=tensor(diff)),SimpleNamespace(bank=bank)
    alone(PerturbCallback(), synth=synth, model=model).after_step()
    assert bank.gain.item() == 3.
    alone(PerturbCallback(distance=.02), synth=synth, model=model).after_step()
    assert is_close(bank.gain.item()/3, want, 1e-5)
    before = bank.gain.item()
    alone(PerturbCallback(distance=.02), synth=Synthesis(), model=model).after_step() # nothing was compared
    assert bank.gain.item() == before

@pytest.mark.parametrize('tau_abs,want', [(None, .9/4), (.3, .3)])
def test_threshold_is_relative_or_absolute(tau_abs, want):
    cb = alone(PerturbCallback(tau=.9, tau_abs=tau_abs), model=SimpleNamespace(bank=FeatureBank(4, 16)))
    assert is_close(cb.threshold(), want)

@pytest.mark.parametrize('size,want', [(10,128), (200,200), (4096,256)])
def test_the_bank_holds_two_batches_and_no_more_than_all_images(dls, size, want):
    assert make(dls, cbs=narrow_pairs(bank_size=size)).model.bank.size == want

# a run

def test_what_a_run_keeps_for_pictures(dls):
    learn = make(dls, MoCoV2(), narrow_pairs())
    learn.fit(1, .03)
    columns = 'epoch train_loss ssl_loss feat_std rec_loss pair_loss pair_diff time'
    assert learn.recorder.metric_names == columns.split()
    assert all(math.isfinite(v) for v in learn.recorder.values[-1])
    s = learn.synth
    assert [getattr(s,n).shape for n in ('z','s_hat','n_cam','n_var','noise','z_pert')] == [(32,72)]*6
    assert [o.shape for o in (s.x, s.rec, s.pert, *s.pair)] == [(32,3,32,32)]*5
    assert [getattr(s,n).requires_grad for n in ('z','z_pert','rec','pert','s_hat')] == [False]*5
    assert is_close(s.z_pert, s.z + s.noise, 1e-5)
    assert is_close(s.noise, s.n_cam + s.n_var, 1e-5)
    assert s.mask.any() and s.n_var[:,~s.mask].abs().sum().item() == 0.
    assert is_close(s.unit, learn.model.bank.unit(), 1e-6) # relative: in units of the features' standard deviation
    assert is_close(s.rec, learn.model.decoder(s.z), .5)   # the decoder has moved one step since

def first_step(dls, cbs):
    "The first step's views and synthesis, and the model before it"
    kept = SimpleNamespace()
    def look(learn):
        kept.views,kept.synth,kept.model = learn.xb,getattr(learn, 'synth', None),deepcopy(learn.model)
        raise CancelFitException()
    set_seed(0)
    learn = make(dls, MoCoV2(K=256), [*cbs, EachStep(look)])
    set_seed(0)
    dls.train.rng.seed(0)
    learn.fit(1)
    return kept

residual_pairs = partial(synth_pairs, paper=True, residual=True)

@pytest.fixture(scope='module')
def first_steps(items):
    dls = ssl_dls(items, size=32, bs=64)
    kinds = dict(plain=[], all=residual_pairs(), crops=residual_pairs(augment='view', max_pairs=20),
                 near=residual_pairs(augment='view', anchor='view', max_pairs=20))
    return SimpleNamespace(**{k:first_step(dls, cbs) for k,cbs in kinds.items()})

def test_pairs_do_not_disturb_the_methods_views(first_steps):
    f = first_steps
    for other in f.all, f.crops, f.near: assert equals(f.plain.views, other.views)
    assert is_close(f.near.synth.pert, f.crops.synth.pert, 1e-6)

def test_residual_pairs_by_hand(first_steps):
    s,m = first_steps.all.synth,first_steps.all.model
    assert equals(s.pair[0], s.x)
    assert is_close(s.pair[1], (s.x + m.decoder(s.z_pert) - m.decoder(s.z)).clamp(0,1), 1e-4)
    assert is_close(s.diff, F.mse_loss(*s.pair), 1e-6)

def test_max_pairs_cuts_everything(first_steps):
    s,all_ = first_steps.crops.synth,first_steps.all.synth
    assert [len(getattr(s, n)) for n in ('x','z','rec','pert','noise','cos')] == [20]*6
    assert equals(s.x, all_.x[:20])
    assert (s.cos-all_.cos[:20]).abs().max() > 1e-3 # other crops were compared

def test_in_the_first_batch_the_bank_has_no_opinion(first_steps):
    s = first_steps.all.synth
    assert (s.mask.any().item(), s.n_var.abs().sum().item()) == (False, 0.)

def passes(dls, **kw):
    "Passes through the encoder in each step, and the learner"
    learn,n = make(dls, cbs=narrow_pairs(update='frozen', **kw)),[]
    learn.model.encoder.register_forward_hook(lambda *o: n.append(1))
    learn.fit(1, .01)
    return len(n)/len(dls.train),learn

def test_features_of_the_view_save_a_pass(dls):
    assert passes(dls)[0] == 3.
    n,learn = passes(dls, features='view')
    assert n == 2.
    assert equals(learn.synth.z, learn.model.last_features[:len(learn.synth.z)])
    assert (learn.synth.pert!=learn.synth.rec).any()

@pytest.mark.parametrize('mode', ['random','low_var'])
def test_distance_holds_the_pairs_difference(dls, mode):
    learn = make(dls, MoCoV2(K=256), synth_pairs(mode, distance=.004, update='frozen'))
    learn.fit(6, .001)
    assert abs(math.log(learn.synth.diff.item()/.004)) < .4
    assert 'bank.gain' in learn.model.state_dict()

# where gradients go

def gradients(dls, *cbs, base=0.):
    "Of the encoder and the decoder in the first step, with the method's own loss silenced"
    found = {}
    class Grads(Callback):
        order = 9
        def after_backward(self):
            net = self.learn.model
            found.update(encoder=net.encoder.body[0].weight.grad, decoder=net.decoder.expand.weight.grad)
            raise CancelFitException()
    class Silent(MoCoV2):
        def loss(self, q, k): return super().loss(q, k)*base
    set_seed(0)
    dls.train.rng = random.Random(0)
    make(dls, Silent(K=128), [*cbs, Grads()]).fit(1)
    return [torch.zeros(1) if g is None else g for g in (found['encoder'], found['decoder'])]

def test_the_reconstruction_error_reaches_the_encoder_only_with_beta(dls):
    encoder,both = gradients(dls, DecoderCallback(beta=1.))
    assert encoder.any() and both.any()
    encoder,decoder = gradients(dls, DecoderCallback(beta=0.))
    assert not encoder.any()
    assert is_close(decoder/both.std(), both/both.std(), 1e-3)

def test_a_frozen_decoder_passes_the_error_on(dls):
    encoder,decoder = gradients(dls, DecoderCallback(beta=1., update='frozen'))
    assert encoder.any() and not decoder.any()

def test_the_pair_does_not_train_the_decoder(dls):
    encoder,decoder = gradients(dls, *narrow_pairs(update='frozen', anchor='rec'))
    assert encoder.any() and not decoder.any()
    encoder,_ = gradients(dls, *narrow_pairs(beta=0., update='frozen', lam=0.))
    assert not encoder.any()

def test_a_frozen_decoder_keeps_no_graph(dls):
    learn,kept = make(dls, cbs=narrow_pairs(update='frozen')),[]
    learn.model.decoder.register_forward_hook(lambda *o: kept.append(torch.is_grad_enabled()))
    learn.fit(1, .01)
    assert set(kept) == {False}

def test_noise_alone_keeps_no_graph(dls):
    learn = make(dls, cbs=PerturbCallback())
    assert learn.synth.z is None
    learn.fit(1, .01)
    assert learn.synth.z.requires_grad is False

@pytest.mark.parametrize('update,moves', [('own',True), ('joint',True), ('frozen',False)])
def test_who_moves_the_decoder(dls, update, moves):
    learn = make(dls, cbs=narrow_pairs(update=update))
    before = learn.model.decoder.expand.weight.clone()
    learn.fit(1, .03)
    assert (learn.model.decoder.expand.weight!=before).any().item() == moves
    own = list(learn.model.decoder.parameters())
    assert len(learn.opt.param_lists[1]) == 4 + (update=='joint')*len(own)

def test_looking_changes_nothing(dls):
    "With lam=0, beta=0 and a frozen decoder, training equals the method alone, bit for bit"
    def trained(cbs):
        set_seed(0)
        learn = ssl_learner(dls, 'timm/test_byobnet', MoCoV2(K=128), cbs=cbs)
        set_seed(1)
        dls.train.rng = random.Random(0)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .03)
        return learn.model.encoder.state_dict()
    a,b = trained([]),trained(narrow_pairs(beta=0., lam=0., update='frozen'))
    assert all(a[k].equal(b[k]) for k in a)

# the pre-training

def test_pretraining_encodes_each_image_once_and_leaves_the_rest_alone(dls):
    learn = make(dls, cbs=narrow_pairs(update='frozen'))
    net,seen = learn.model,[]
    net.decoder.requires_grad_(False)
    net.encoder.eval()
    before = deepcopy(net.state_dict())
    hook = net.encoder.register_forward_hook(lambda *o: seen.append(1))
    pre = learn.pretrain_decoder(2, bs=dls.train.bs)
    hook.remove()
    assert len(seen) == len(dls.train)
    assert (net.encoder.training, net.projector.training) == (False, True)
    moved = {k.split('.')[0] for k,v in net.state_dict().items() if isinstance(v, Tensor) and not v.equal(before[k])}
    assert moved == {'decoder'}
    assert {(o.requires_grad, o.grad) for o in net.decoder.parameters()} == {(False,None)}
    assert (pre.recorder.metric_names, len(pre.recorder.losses)) == (['epoch','train_loss','time'], 8)
    assert bool(net.decoder.calibrated) is True
    assert set(vars(learn.synth).values()) == {None} # nothing was synthesized yet

def test_pretraining_takes_small_batches(dls):
    learn = make(dls, cbs=narrow_pairs(update='frozen'))
    n = len(dls.train)*dls.train.bs
    pre = learn.pretrain_decoder(2, bs=8)
    assert (pre.dls.train.bs, len(pre.recorder.losses), learn.dls.train.bs) == (8, 2*n//8, dls.train.bs)
    assert learn.pretrain_decoder(1, bs=1000).dls.train.bs == dls.train.bs
    with pytest.raises(InputError, match='at least one image, not 0'): learn.pretrain_decoder(1, bs=0)

def test_pretraining_takes_another_loss(dls):
    learn,seen = make(dls, cbs=narrow_pairs(update='frozen')),[]
    def loss(drawn, x): seen.append(drawn.shape==x.shape); return (drawn - x).abs().mean()
    pre = learn.pretrain_decoder(1, loss_func=loss)
    assert seen==[True]*len(pre.dls.train) and pre.recorder.losses[0] > .01

@pytest.mark.parametrize('half', [False,True])
def test_pretraining_computes_as_the_training_will(dls, half):
    learn,seen = make(dls, cbs=narrow_pairs(update='frozen')),set()
    if half: learn.to_bf16()
    hook = learn.model.decoder.register_forward_hook(lambda m, x, out: seen.add(out.dtype))
    pre = learn.pretrain_decoder(3)
    hook.remove()
    assert seen == {torch.bfloat16 if half else torch.float32}
    assert {p.dtype for p in learn.model.parameters()} == {torch.float32}
    full = make(dls, cbs=narrow_pairs(update='frozen')).pretrain_decoder(3)
    assert is_close(pre.recorder.values[-1][0], full.recorder.values[-1][0], eps=.003)

def test_pretraining_shows_a_bar_where_the_training_would(dls):
    bars = []
    class Bar(Callback):
        def before_fit(self): bars.append(hasattr(self.learn, 'progress'))
    learn = ssl_learner(dls, small(3), MoCoV2(K=128), cbs=narrow_pairs())
    with learn.no_logging():
        learn.pretrain_decoder(1, cbs=Bar())
        with learn.no_bar(): learn.pretrain_decoder(1, cbs=Bar())
        learn.remove_cb(learn.progress)
        learn.pretrain_decoder(1, cbs=Bar())
    assert bars == [True,False,False]

def test_without_pretraining_the_first_batch_calibrates(dls):
    learn = make(dls, cbs=narrow_pairs())
    decoder,calls = learn.model.decoder,[]
    assert bool(decoder.calibrated) is False
    once = decoder.calibrate
    decoder.calibrate = lambda z: (calls.append(1), once(z))
    learn.fit(1, .01)
    assert len(calls) == 1
    assert bool(decoder.calibrated) is True
    assert len(learn.model.decoder_opt.opt.state) == len(list(decoder.parameters()))

def test_pretraining_is_watched(dls):
    "It names the encoder's weight"
    learn = make(dls, cbs=narrow_pairs())
    learn.model.encoder.body[0].bias.data[0] = float('nan')
    with pytest.raises(InputError, match='encoder.body.0.bias was not finite at step 0'): learn.pretrain_decoder(1)

def test_pretraining_without_a_decoder_is_an_error(dls):
    with pytest.raises(InputError, match='no decoder to pre-train'): make(dls).pretrain_decoder(1)

def test_pretraining_where_needed(dls):
    learn,epochs = make(dls, cbs=DecoderCallback(decoder_width=4)),[]
    class Count(Callback):
        def after_epoch(self): epochs.append(1)
    assert pretrain_where_needed(learn, 0, cbs=Count()) == 0.
    assert pretrain_where_needed(make(dls), 2, cbs=Count()) == 0.
    assert not epochs and not learn.model.decoder.calibrated
    assert pretrain_where_needed(learn, 2, cbs=Count()) > 0
    assert len(epochs) == 2 and learn.model.decoder.calibrated
    assert needs_pretraining(learn, 2) and not needs_pretraining(learn, 0)
    assert not needs_pretraining(make(dls), 2)

# warnings

class Grey(nn.Module):
    "A decoder that draws the same for all images"
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(3,1,1))
    def forward(self, z): return self.w.sigmoid().expand(len(z), 3, 32, 32)

def warned(dls, cbs, n=3, **health):
    set_seed(0)
    learn = make(dls, cbs=[*cbs, HealthCallback(every=2, **health)], health=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        learn.fit(n, .01)
    return [str(o.message) for o in found]

def test_a_decoder_without_contrast_is_warned_of(dls):
    assert ['draws nearly the same' in o for o in warned(dls, synth_pairs(decoder=Grey()), patience=8)] == [True]

def test_a_stale_bank_is_warned_of(dls):
    "With two features a step none is overwritten, so the oldest is from the first step"
    steps,size = 3*len(dls.train),make(dls, cbs=narrow_pairs()).model.bank.size
    assert size/2 > steps > 10
    assert ['more than 10 steps old' in o for o in warned(dls, narrow_pairs(max_pairs=2), stale=10)] == [True]
    assert warned(dls, narrow_pairs(max_pairs=2), stale=steps) == []

def test_a_healthy_run_is_not_warned_of(dls):
    "32 features a step, and a look every other step"
    most = math.ceil(make(dls, cbs=narrow_pairs()).model.bank.size/32) + 2
    assert warned(dls, narrow_pairs(max_pairs=32), n=6, stale=most, patience=8) == []
    assert ['steps old' in o for o in warned(dls, narrow_pairs(max_pairs=32), n=6, stale=most//2)] == [True]

def test_the_memory_does_not_age_while_the_decoder_is_trained(dls):
    learn = make(dls, cbs=narrow_pairs(), health=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        learn.pretrain_decoder(3, cbs=HealthCallback(every=2, stale=2, watch=learn.model))
    assert not [o for o in found if 'stale' in str(o.message)]

# any method, and neighbours

@pytest.mark.parametrize('name', small_methods)
def test_pairs_change_what_any_method_learns(dls, name):
    def terms(cbs):
        set_seed(0)
        learn = make(dls, small_methods[name](), cbs, side=1 if name=='lewel' else 3) # see `side_for`
        learn.fit(1, .02)
        return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    without,pairs = terms(None),terms(narrow_pairs())
    assert all(math.isfinite(v) for v in pairs.values())
    assert pairs['pair_diff'] > 0 and without['ssl_loss'] != pairs['ssl_loss']
    assert pairs['feat_std'] > .05 # no collapse within an epoch

class Bf16(Callback):
    "bfloat16 autocast, as somebody might write it"
    order = 10
    def before_batch(self): self.ctx = torch.autocast('cpu', torch.bfloat16); self.ctx.__enter__()
    def after_loss(self): self.ctx.__exit__(None, None, None)

@pytest.mark.parametrize('extra', [Bf16(), GradientAccumulation(128)], ids=['bfloat16','accumulation'])
def test_losses_stay_finite_beside(dls, extra):
    learn = make(dls, MoCoV2(), [*narrow_pairs(), extra])
    learn.fit(1, .02)
    assert all(math.isfinite(v) for v in learn.recorder.values[-1])

@pytest.fixture
def validated(items, tmp_path):
    "A learner with a validation part"
    set_seed(0)
    return make(ssl_dls(items, size=32, bs=64, valid_pct=.25), SimSiam(64,16), narrow_pairs(), path=tmp_path)

def test_lr_find_summary_and_early_stop(validated):
    learn = validated
    learn.lr_find(num_it=20, show_plot=False)
    assert 'Decoder' in repr(learn.summary()) or 'PixelShuffle' in repr(learn.summary())
    learn.fit(3, .02, cbs=EarlyStoppingCallback('valid_loss', min_delta=1e9, patience=1))
    assert len(learn.recorder.values) == 2
    assert 'train_pair_loss' in learn.recorder.metric_names

def test_validation_decodes_and_does_nothing_more(validated):
    learn = validated
    learn.fit(1, .02)
    n = learn.model.bank.count.item()
    got = dict(zip([o for o in learn.recorder.metric_names if 'valid' in o], learn.validate()))
    assert (got['valid_pair_loss'], learn.model.bank.count.item()) == (None, n)
    errors = []
    for images,_ in learn.dls.valid:
        first = images.as_subclass(Tensor)[:round(len(images)/2)]
        with torch.no_grad(): decoded = learn.model.eval().decoder(learn.model.encoder(first))
        errors.append((F.mse_loss(decoded, first).item(), len(images)))
    assert is_close(got['valid_rec_loss'], sum(e*n for e,n in errors)/sum(n for _,n in errors), 1e-5)

# controls

raw = tensor([[3.,4.],[1.,0.],[0.,2.],[5.,5.]])

def class_noise(*labels):
    "With a bank that holds the images 0, 1, 2 and 4, and has room for two more"
    bank = FeatureBank(6, 2).add(raw, tensor([0,1,2,4]))
    bank.gain.fill_(.5)
    cb = alone(ClassNoise(), model=SimpleNamespace(bank=bank))
    cb.labels = tensor(labels)
    return cb

@pytest.mark.parametrize('seed', range(8))
def test_class_noise_moves_towards_the_only_mate(seed):
    cb,generator = class_noise(0,0,1,1,2),torch.Generator().manual_seed(seed)
    z = torch.randn(5, 2)
    p = cb.shake(None, z, torch.arange(5), None, generator)
    to = torch.stack([raw[1], raw[0], z[2], raw[2], z[4]]) # 2 and 4 have no mate in the bank
    assert is_close(p.z, z + (to-z)/2, 1e-6)
    assert is_close(p.noise, (to-z)/2, 1e-6)
    assert (p.n_cam.abs().sum().item(), p.n_var.abs().sum().item()) == (0., 0.)

def test_class_noise_takes_now_one_mate_and_now_the_other():
    cb = class_noise(0,0,1,1,1)
    def noise(seed): return cb.shake(None, raw, tensor([3]*4), None, torch.Generator().manual_seed(seed)).noise[0]
    assert {tuple(noise(s).tolist()) for s in range(9)} == {tuple(((o-raw[0])/2).tolist()) for o in (raw[2],raw[3])}

def test_class_noise_in_training(dls, items):
    "The shaken feature is one that the bank holds of another image of the class"
    moved = []
    def look(learn):
        s,bank,y = learn.synth,learn.model.bank,items.train_labels
        ids,moves = learn.yb[0][:len(s.z)],s.noise.abs().sum(1)>0
        near = torch.cdist(F.normalize(s.z_pert[moves], dim=1), bank.feats[:len(bank)]).min(1)
        assert is_close(near.values, torch.zeros(len(near.values)), 1e-3)
        own,other = ids[moves],bank.ids[near.indices]
        assert equals(y[own], y[other])
        assert (own!=other).all()
        moved.append(moves)
    learn = make(dls, MoCoV2(K=256), [DecoderCallback(), ClassNoise(), SynthPairCallback(), EachStep(look)])
    learn.fit(1, .001)
    assert moved[-1].all() # by now every class has been seen

def test_class_noise_needs_labels(items):
    unlabelled = deepcopy(items)
    unlabelled.train_labels = None
    learn = make(ssl_dls(unlabelled, size=32, bs=64), cbs=synth_callbacks('within'))
    with pytest.raises(InputError, match='needs labels'): learn.fit(1)

@pytest.mark.parametrize('synth,names', [
    ('none', []), ('reconstruction', ['DecoderCallback']),
    ('views', ['SynthPairCallback']), ('jitter', ['SynthPairCallback']),
    ('within', ['DecoderCallback','ClassNoise','SynthPairCallback']),
    *((m, ['DecoderCallback','PerturbCallback','SynthPairCallback']) for m in MODES)])
def test_callbacks_of_a_mode(synth, names):
    cbs = synth_callbacks(synth, lam=.25, beta=.5, max_pairs=.75, distance=.01)
    assert [type(cb).__name__ for cb in cbs] == names
    given = dict(lam=.25, beta=.5, distance=.01)
    for cb in cbs:
        for k in given.keys() & inspect.signature(type(cb)).parameters: assert getattr(cb, k) == given[k]
        assert cb.max_pairs == (None if synth=='reconstruction' else .75)
    if synth in MODES: assert cbs[1].mode == synth

def test_every_mode_is_tried(): assert set(synth_modes) == {'none','reconstruction','views','jitter','within',*MODES}

@pytest.mark.parametrize('synth,augment', [('views','view'), ('jitter','whole')])
def test_controls_without_a_decoder_pair_the_clean_image(synth, augment):
    cb, = synth_callbacks(synth, augment='none')
    assert cb.augment == augment
    assert equals(cb.pair(x), (x,x))

@pytest.mark.parametrize('synth', [m for m in synth_modes if m!='none'])
def test_a_misspelt_setting_is_named_in_every_mode(synth):
    with pytest.raises(InputError, match='sigma_cam'): synth_callbacks(synth, sigma=3.)

def test_a_misspelt_mode_is_named():
    with pytest.raises(InputError, match="did you mean 'both'"): synth_callbacks('bath')
