"Synthesizers from learners and files: the callback's scores, the same pictures again, and files of version 0.0.1"
import inspect, json, pickle
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
import torch.nn.functional as F
from fastcore.imports import equals
from fastcore.test import is_close
from fastai.torch_core import set_seed
from safetensors.torch import save_file
from torch import nn
from training import small_methods
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.data.views import Views
from fgsynth.nets.decoder import Decoder
from fgsynth.nets.networks import Encoder
from fgsynth.nets.heads import MLPHead
from fgsynth.nets.saliency import Saliency
from fgsynth.methods.learner import ssl_learner
from fgsynth.methods.mocov2 import MoCoV2
from fgsynth.methods.simclr import SimCLR
from fgsynth.methods.simsiam import SimSiam
from fgsynth.synth.callbacks import DecoderCallback, PerturbCallback, synth_pairs
from fgsynth.synth.perturb import min_max
from fgsynth.synth.synthesizer import Synthesizer

few = {**{name:make() for name,make in small_methods.items()}, 'mocov2':MoCoV2(K=2048), 'simclr':SimCLR(dim=16)}

@pytest.fixture(scope='module')
def items():
    set_seed(0)
    return get_dataset('finches', n_train=128, n_test=8, size=48)

@pytest.fixture(scope='module')
def dls(items): return ssl_dls(items, size=48, bs=32)

@pytest.fixture(scope='module')
def x(items): return items.test[:8].float()/255

@pytest.fixture(scope='module')
def learners(dls):
    "A learner of each method, after one epoch"
    def trained(method):
        set_seed(0)
        learn = ssl_learner(dls, 'timm/test_byobnet', method, cbs=synth_pairs(decoder_width=8))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
        return learn
    return {name:trained(method) for name,method in few.items()}

@pytest.fixture(scope='module')
def synthesizers(learners): return {name:learn.synthesizer() for name,learn in learners.items()}

each_method = pytest.mark.parametrize('name', few)

def same(a, b):
    for k in 'rec','pert','s_hat','noise','cos': assert is_close(getattr(a,k), getattr(b,k), 1e-6), k

# what it makes

def test_random_numbers_are_its_own(synthesizers, x):
    before = torch.get_rng_state()
    synthesizers['mocov2'](x)
    assert equals(torch.get_rng_state(), before)

def test_nothing_keeps_a_graph(synthesizers, x):
    s = synthesizers['mocov2'](x)
    assert not any(v.requires_grad for v in vars(s).values() if isinstance(v, torch.Tensor))

def test_what_is_prepared_is_not_computed_again(synthesizers, x):
    syn = synthesizers['mocov2']
    prepared = syn.prepare(x)
    a,b = syn(x, sigma_cam=6., prepared=prepared),syn(x, sigma_cam=6.)
    assert equals((a.pert, a.cos), (b.pert, b.cos))
    assert prepared.pert is None and a.rec is prepared.rec

def test_noise_is_that_of_training_unless_given(learners, synthesizers, x):
    syn,cb = synthesizers['mocov2'],learners['mocov2'].perturb
    assert syn.defaults == dict(mode=cb.mode, sigma_cam=cb.sigma_cam, sigma_var=cb.sigma_var, tau=pytest.approx(cb.tau),
                                target=cb.target)
    assert syn.norm == cb.norm
    given = dict(syn.defaults, mode='cam', tau=.5)
    assert equals(syn(x, **given).noise, syn(x, mode='cam', tau=.5).noise)

def test_defaults_are_those_of_the_callback():
    syn = Synthesizer(nn.Identity(), Decoder(8, 16), Saliency(nn.Identity(), kind='neg_cosine'))
    ours,theirs = [inspect.signature(c).parameters for c in (Synthesizer, PerturbCallback)]
    for n in 'mode','sigma_cam','sigma_var','tau','target','norm': assert ours[n].default == theirs[n].default
    assert 'bank_size' not in ours and 'kwargs' not in ours
    assert syn.defaults | dict(norm=syn.norm) == {n:theirs[n].default for n in (*syn.defaults, 'norm')}

def test_a_misspelt_setting_is_named():
    with pytest.raises(InputError, match='sigma_cam'):
        Synthesizer(nn.Identity(), Decoder(8, 16), Saliency(nn.Identity(), kind='neg_cosine'), sigma=3.)

@pytest.mark.parametrize('method,first', [('forward','x'), ('prepare','x'), ('scores','x'), ('save','path')])
def test_signatures_survive(method, first):
    assert list(inspect.signature(getattr(Synthesizer, method)).parameters)[1] == first

def test_copies_make_the_same(synthesizers, x):
    syn = synthesizers['simsiam']
    for other in deepcopy(syn), pickle.loads(pickle.dumps(syn)): same(other(x), syn(x))

def test_without_noise_in_training_everything_is_drawn_anyway(dls, x):
    syn = ssl_learner(dls, 'timm/test_byobnet', cbs=DecoderCallback(decoder_width=8)).synthesizer()
    assert syn(x).mask.shape == (syn.encoder.num_features,)

def test_absolute_noise_has_no_unit(dls):
    cbs = synth_pairs(decoder_width=8, relative=False)
    assert ssl_learner(dls, 'timm/test_byobnet', cbs=cbs).synthesizer().unit.item() == 1.

def test_a_learner_without_a_decoder_is_an_error(dls):
    with pytest.raises(InputError, match='no decoder'): ssl_learner(dls, 'timm/test_byobnet').synthesizer()

def scores_of_callback(learn, name, z, key):
    "With heads in evaluation mode, against the same view"
    learn.model.eval()
    learn.yb = (torch.arange(8),)
    queue = getattr(learn.model, 'queue', None)
    if name=='mocov2': learn.model.queue = queue[:1024] # pictures keep so many negatives
    try: return learn.perturb.scores(z, [key]*4)
    finally:
        if name=='mocov2': learn.model.queue = queue

def scores_against_bank(syn, z, key):
    "In training SimCLR's negatives are the other images of the batch, here they come from the bank"
    z = z.clone().requires_grad_()
    q,k = F.normalize(syn.saliency.head(z), dim=1),F.normalize(key, dim=1)
    logits = torch.cat([(q*k).sum(1, keepdim=True), q@syn.saliency.negatives.T], 1)/.1
    loss = -logits.log_softmax(1)[:,0].sum()
    return min_max((-torch.autograd.grad(loss, z)[0]*z).clamp(min=0)).detach()

@each_method
def test_scores_are_those_of_the_callback(learners, synthesizers, x, name):
    learn,syn = learners[name],synthesizers[name]
    z = syn(x).z
    torch.manual_seed(0)
    key = syn.saliency.key_head(syn.encoder(Views(48,1)(x)[0])).detach()
    if learn.ssl.saliency().kind=='in_batch':
        assert syn.saliency.negatives.shape == (len(learn.model.bank), 16)
        assert is_close(syn.saliency.negatives.norm(dim=1).mean(), 1., 1e-4)
        want = scores_against_bank(syn, z, key)
    else: want = scores_of_callback(learn, name, z, key)
    assert is_close(want, syn.scores(x)[0], 1e-3)
    assert syn(x).s_hat.std() > 0

# files

@each_method
def test_files_bring_the_same_pictures_back(synthesizers, x, name, tmp_path):
    syn = synthesizers[name]
    again = Synthesizer.load(syn.save(tmp_path/'new'/'s.safetensors', epochs=3))
    same(again(x), syn(x))
    assert again.info == dict(epochs=3)
    assert (again.saliency.kind, again.saliency.answer) == (syn.saliency.kind, syn.saliency.answer)

def test_a_head_with_batch_norm_comes_back(dls, x, tmp_path):
    syn = ssl_learner(dls, 'resnet18', SimSiam(64,16), cbs=synth_pairs()).synthesizer()
    same(Synthesizer.load(syn.save(tmp_path/'s.safetensors'))(x), syn(x))

def test_a_missing_and_a_foreign_file_are_said(tmp_path):
    with pytest.raises(InputError, match='no file'): Synthesizer.load(tmp_path/'none')
    (tmp_path/'x').write_text('x')
    with pytest.raises(InputError, match='not written by'): Synthesizer.load(tmp_path/'x')
    save_file(dict(v=torch.zeros(3)), tmp_path/'y')
    with pytest.raises(InputError, match='not written by'): Synthesizer.load(tmp_path/'y')

def test_what_cannot_be_saved_is_said(synthesizers, tmp_path):
    unnamed = Encoder(nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 8)
    nameless = Synthesizer(unnamed, Decoder(8, 16), Saliency(nn.Identity(), kind='neg_cosine'))
    with pytest.raises(InputError, match='made by name'): nameless.save(tmp_path/'s.safetensors')
    strange = deepcopy(synthesizers['mocov2'])
    strange.saliency.head = nn.Sequential(nn.Dropout())
    with pytest.raises(InputError, match='with a Dropout'): strange.save(tmp_path/'s.safetensors')
    assert not list(tmp_path.iterdir())

def layers(head):
    "A head in the words of version 0.0.1"
    def one(m):
        if type(m).__name__=='Prototypes': return ['prototypes', m.in_features, m.out_features]
        if isinstance(m, nn.Linear): return ['linear', m.in_features, m.out_features, m.bias is not None]
        if isinstance(m, nn.BatchNorm1d): return ['bn', m.num_features, m.affine]
        return [type(m).__name__.lower()]
    return [one(m) for m in head]

def write_as_version_001(syn, path):
    "Heads without a module around them, negatives always, the decoder's first layer under another name, no 'answer'"
    s,e,d = syn.saliency,syn.encoder,syn.decoder
    state = {f'encoder.{k}':v for k,v in e.state_dict().items()}
    state |= {f"decoder.{k.replace('expand.', 'spread.')}":v for k,v in d.state_dict().items()}
    state |= {f'{n}.{k}':v for n in ('head','key_head') for k,v in getattr(s, n).state_dict().items()}
    state |= dict(v=syn.v, unit=syn.unit, negatives=torch.zeros(0, 1) if s.negatives is None else s.negatives)
    heads = dict(head=layers(s.head), key_head=layers(s.key_head))
    meta = dict(arch=e.arch, size=e.size, num_features=e.num_features, decoder=[d.d, d.size, d.width, d.grid, d.draw],
                heads=heads, norm=syn.norm, loss=s.kind, temperature=s.temperature, **syn.defaults, info=dict(epochs=3))
    save_file({k:v.clone().contiguous() for k,v in state.items()}, path, {'fgsynth':json.dumps(meta)})
    return state,meta

@pytest.mark.parametrize('name,kind', [('mocov2','info_nce'), ('simsiam','neg_cosine'), ('dino','distill')])
def test_files_of_version_001_bring_the_same_pictures_back(synthesizers, x, name, kind, tmp_path):
    syn = synthesizers[name]
    state,meta = write_as_version_001(syn, tmp_path/'old.safetensors')
    assert meta['loss'] == kind and 'answer' not in meta
    assert {'head.0.weight','key_head.0.weight','negatives','decoder.spread.weight'} <= set(state)
    assert (len(state['negatives'])==0) == (kind=='neg_cosine')
    old = Synthesizer.load(tmp_path/'old.safetensors')
    assert (old.saliency.kind, old.info, old.defaults) == (kind, dict(epochs=3), syn.defaults)
    for how in {}, dict(mode='cam', sigma_cam=6., seed=3), dict(target='abs'): same(old(x, **how), syn(x, **how))
    same(Synthesizer.load(old.save(tmp_path/'new.safetensors'))(x), syn(x))
