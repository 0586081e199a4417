"Masks on the encoder's map: LCR and SAM-SSL-Bilinear, beside any method and on networks of all kinds"
import random
from copy import deepcopy
import pytest, torch
from torch import nn
from fastai.torch_core import set_seed
from training import KeepViews, Nothing, arch_for, close, move, quietly, replay, small, small_methods, unit
from training import unlike_after_a_stop
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.items import Items
from fgsynth.data.loaders import ssl_dls
from fgsynth.evaluate.features import ask_encoder, features
from fgsynth.methods.lcr import LCR, Rationale, rationale_loss
from fgsynth.methods.learner import methods, ssl_learner
from fgsynth.methods.sam_bilinear import BilinearMask, SAMBilinear
from fgsynth.nets.encoders import create_encoder, load_encoder, save_encoder
from fgsynth.nets.masks import MaskHead, masked_encoder
from fgsynth.nets.networks import Encoder
from fgsynth.own.export import export_encoder
from fgsynth.synth.callbacks import synth_pairs
from fgsynth.synth.synthesizer import Synthesizer

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=128, n_test=32, size=32)

@pytest.fixture
def dls(items): set_seed(0); return ssl_dls(items, size=32, bs=32)

plain_methods = [n for n in small_methods if n not in ('lcr','sam_bilinear')]

def beside(mask, name):
    "A class of a method with a mask, and small arguments for it"
    made = small_methods[name]
    return type(f'{mask.__name__}_{name}', (mask, made.func), {})(**made.keywords)

# networks

@pytest.mark.parametrize('arch,size', [('resnet18',64), ('lite0',64), ('vit_tiny_patch16_224',64), ('swin_t',64)])
def test_masked_features_of_networks_of_all_kinds(arch, size):
    "Off, they are the network's own; on, they are what a mask on the layer's output makes of them, by a hook"
    enc = create_encoder(arch, size=size).eval(); x = torch.rand(2, 3, size, size)
    m = masked_encoder(enc, size).eval()
    assert m(x).equal(enc(x))
    nn.init.uniform_(m.mask_head.bn.weight, .5, 2); m.mask_head.extremes.copy_(torch.tensor([.1,.9]))
    name,side,layout = m.layer
    def by_hand(module, inp, out):
        cells = out.permute(0,2,3,1) if layout is None else out
        if isinstance(layout, int): cells = out[:,layout:].unflatten(1, (side,side))
        a = (cells.double()@m.mask_head.conv.weight[:,:,0,0].double().T)/(1+1e-5)**.5*m.mask_head.bn.weight.double()
        w = ((a.clamp(min=0).amax(-1)-.1)/.8).clamp(min=0).float()
        if layout is None: return out*w[:,None]
        if layout=='last': return out*w[...,None]
        return torch.cat([out[:,:layout], out[:,layout:]*w.flatten(1)[...,None]], 1)
    hook = enc.get_submodule(name).register_forward_hook(by_hand); want = unit(enc(x)); hook.remove()
    assert close(m.finished()(x), want, 1e-4) and not close(want, unit(enc(x)), 1e-3)

def test_a_network_without_a_map_is_refused(dls):
    flat = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 8)), 8, size=32)
    for method in LCR(), SAMBilinear():
        with pytest.raises(InputError, match='no feature map'): ssl_learner(dls, flat, method)

def test_features_do_not_depend_on_the_batch():
    m = masked_encoder(create_encoder('timm/test_byobnet'), 32).finished(); x = torch.rand(6,3,32,32)
    for _ in range(20): m.train()(x)
    assert close(features(m, x), torch.cat([features(m, o) for o in x.split(1)]), 1e-5)

def test_extremes_are_running():
    "After one batch and after many; passes that leave batch norms alone leave them alone, too"
    h,a = MaskHead(4, 2).train(),torch.rand(3,2,2)+1
    h.mask(a); assert close(h.extremes, .9*torch.tensor([0.,1.]) + .1*torch.stack([a.min(),a.max()]))
    for _ in range(200): h.mask(a)
    assert close(h.extremes, torch.stack([a.min(),a.max()]), 1e-4)
    h.bn.track_running_stats = False
    before = h.extremes.clone(); h.mask(5*a); assert h.extremes.equal(before)

@pytest.mark.parametrize('head', [MaskHead(4,2), MaskHead(4,2).eval()])
def test_a_constant_attention_has_a_finite_mask(head):
    mask = head.mask(torch.full((2,3,3), 2.)); assert mask.isfinite().all()

def test_an_image_of_which_nothing_is_left_is_pooled_whole():
    "Where all of its cells are below the running minimum; others keep their masks"
    plain = create_encoder('timm/test_byobnet').eval(); x = torch.rand(4,3,64,64)
    m = masked_encoder(plain, 64).finished().eval()
    m.seen = []; m(x); a = m.mask_head(m.seen[0]); m.seen = None
    highest = a.amax((1,2)); m.mask_head.extremes.copy_(torch.stack([highest.sort().values[1:3].mean(), a.max()]))
    whole = highest<m.mask_head.extremes[0]
    assert whole.sum()==2 and close(m(x)[whole], unit(plain(x))[whole], 1e-5)
    assert not close(m(x)[~whole], unit(plain(x))[~whole], 1e-3)

# losses

@pytest.mark.parametrize('target', ['corrected','released'])
def test_the_targets_by_loops(target):
    torch.manual_seed(1); B,C,S = 3,5,4
    maps,grads,mask = torch.randn(B,C,S,S),torch.randn(B,C,S,S),torch.rand(B,S,S)
    m,g,k = maps.double(),grads.double(),mask.double()
    def kl(p, q):
        p,q = p.exp()/p.exp().sum(), q.exp()/q.exp().sum()
        return (p*(p/q).log()).sum()
    want = 0.
    for i in range(B):
        cam = torch.zeros(S, S, dtype=torch.double)
        for r in range(S):
            for c in range(S): cam[r,c] = max(0, sum(m[i,d,r,c]*g[i,d,r,c] for d in range(C)))
        if target=='corrected': want += kl((cam/.4).flatten(), k[i].flatten())/B
        else: want += sum(kl(cam[r]/B, k[i,r]) for r in range(S))/B
    assert close(rationale_loss(mask, maps, grads, target), want, 1e-5)

@pytest.mark.parametrize('target,flows', [('corrected',False), ('released',True)])
def test_what_the_target_lets_through(target, flows):
    "The released target stays in the graph of the map, the corrected one does not"
    maps = torch.randn(2,3,4,4).requires_grad_()
    rationale_loss(torch.rand(2,4,4).requires_grad_(), maps, torch.randn(2,3,4,4), target).backward()
    assert (maps.grad is not None and bool(maps.grad.any()))==flows

def test_a_target_that_is_none():
    with pytest.raises(InputError, match='target'): LCR('correct')
    with pytest.raises(InputError, match='plain'): SAMBilinear(plain=2)

@pytest.mark.parametrize('kind', ['corrected','released','bilinear'])
def test_a_whole_training_in_float64(dls, kind):
    "MoCo v2 with a mask, step by step, each image's own gradient taken by itself; without the head's batch norm"
    kw = dict(K=64, dim=16, momentum=.9)
    method = SAMBilinear(plain=0, **kw) if kind=='bilinear' else LCR(kind, **kw)
    learn = ssl_learner(dls, small(), method, cbs=(keep := KeepViews()))
    for e in learn.model.encoder,learn.model.key_encoder: e.mask_head.bn = Nothing()
    ref = deepcopy(learn.model).double()
    quietly(learn, 2, .05)
    assert learn.model.encoder.layer[0]=='body.0' # a convolution
    queue,n_keys = ref.queue.clone(),[]
    def attention(e, A): return (A.permute(0,2,3,1)@e.mask_head.conv.weight[:,:,0,0].T).relu().amax(-1)
    def mask(a): return (a-a.min())/(a.max()-a.min())
    def features_of(e, A): # by what lies behind the map
        if kind!='bilinear': return e.body[1:](A)
        return unit(e.body[1:](A*mask(attention(e, A)).detach()[:,None]))
    def kl(p, log_q): return (p*(p.log()-log_q)).sum()/len(p)
    def loss_of(v1, v2):
        A = ref.encoder.body[0]((v1-ref.encoder.mean)/ref.encoder.std)
        q = unit(ref.projector(features_of(ref.encoder, A)))
        with torch.no_grad():
            keys = ref.key_encoder.body[0]((v2-ref.encoder.mean)/ref.encoder.std)
            k = unit(ref.key_projector(features_of(ref.key_encoder, keys)))
        losses = -(torch.cat([(q*k).sum(1, keepdim=True), q@queue.clone().T], 1)/.2).log_softmax(1)[:,0]
        G = torch.stack([torch.autograd.grad(l, A, retain_graph=True)[0][i] for i,l in enumerate(losses)])
        for row in k:
            queue[len(n_keys)%64] = row
            n_keys.append(1)
        a = attention(ref.encoder, A)
        if kind=='corrected':
            cam = (A.detach()*G).sum(1).relu()
            return losses.mean() + 1.28*kl((cam/.4).flatten(1).softmax(1), mask(a).flatten(1).log_softmax(1))
        if kind=='released':
            cam = (A*G/len(v1)).sum(1).relu()
            return losses.mean() + 1.28*kl(cam.softmax(-1), mask(a).log_softmax(-1))
        cam = -(A.detach()*G.mean((2,3), keepdim=True)).sum(1)
        return losses.mean() + .64*kl((cam.relu()/.4).flatten(1).softmax(1), (a/.4).flatten(1).log_softmax(1))
    def after_step(i):
        for n in 'encoder','projector': move(getattr(ref, f'key_{n}'), getattr(ref, n), .9)
    trained = [p for m in (ref.encoder, ref.projector) for p in m.parameters()]
    assert close([s[-1] for s in keep.seen], replay(keep.seen, trained, loss_of, after_step), 1e-3)
    for n in 'encoder','key_encoder':
        a,b = getattr(learn.model, n),getattr(ref, n)
        assert close(a.mask_head.conv.weight, b.mask_head.conv.weight, 1e-3)
        assert close(a.body[0].weight, b.body[0].weight, 1e-3)

# beside any method

@pytest.mark.parametrize('name', plain_methods)
@pytest.mark.parametrize('mask', [Rationale, BilinearMask])
def test_beside_every_method_and_pairs(dls, name, mask):
    learn = ssl_learner(dls, arch_for(name), beside(mask, name), cbs=synth_pairs(decoder_width=8))
    before = learn.model.encoder.mask_head.conv.weight.clone()
    quietly(learn, 2, .03)
    assert learn.recorder.losses[-1].isfinite() and not before.equal(learn.model.encoder.mask_head.conv.weight)
    assert 'map_loss' in learn.recorder.metric_names and learn.model.encoder.seen is None

@pytest.mark.parametrize('name', ['lcr','sam_bilinear'])
@pytest.mark.parametrize('n,grey', [(8,77), (2,0)])
def test_images_of_one_colour_and_batches_of_two(name, n, grey):
    dls = ssl_dls(Items('flat', torch.full((n,3,32,32), grey, dtype=torch.uint8), []), size=32, bs=2)
    learn = quietly(ssl_learner(dls, 'timm/test_byobnet', small_methods[name]()), 1, .01)
    assert all(p.isfinite().all() for p in learn.model.parameters())

@pytest.mark.parametrize('name', ['lcr','sam_bilinear'])
def test_bfloat16_is_close(items, name):
    def losses(**kw):
        set_seed(0); dls = ssl_dls(items, size=32, bs=32)
        learn = ssl_learner(dls, 'timm/test_byobnet', small_methods[name](), **kw)
        set_seed(1); dls.train.rng = random.Random(0)
        return torch.stack(list(quietly(learn, 1, .01).recorder.losses))
    a,b = losses(),losses(precision='bf16')
    assert 0<(a-b).abs().max()<.15

@pytest.mark.parametrize('name', ['lcr','sam_bilinear'])
def test_resumed_in_the_middle_of_an_epoch(items, tmp_path, name):
    def make():
        set_seed(0)
        return ssl_learner(ssl_dls(items, size=32, bs=32), 'timm/test_byobnet', small_methods[name]())
    _,unlike = unlike_after_a_stop(make, tmp_path, at=6, n_epoch=3)
    assert not unlike

def test_frozen_batch_norms_leave_that_of_the_head_alone(dls):
    "An encoder from given weights keeps its statistics; the head, which is new, learns its own"
    learn = quietly(ssl_learner(dls, 'timm/test_byobnet', LCR(K=64), frozen_bn=True), 1, .01); m = learn.model.train()
    assert m.encoder.mask_head.bn.training and m.key_encoder.mask_head.bn.training
    assert not any(o.training for o in m.encoder.body.modules() if isinstance(o, nn.BatchNorm2d))
    assert m.encoder.mask_head.bn.num_batches_tracked>0

def test_the_head_learns_as_heads_do(dls):
    "It is in the group of the heads, and in no other, also where the encoder has one group for each stage"
    for by_stage in (False,True):
        model = ssl_learner(dls, 'timm/test_byobnet', LCR(K=64), by_stage=by_stage, frozen_stages=1).model
        groups = [{id(p) for p in g} for g in model.param_groups()]
        head = {id(p) for p in model.encoder.mask_head.parameters()}
        assert head<=groups[-1] and not any(head & g for g in groups[:-1])
        assert sum(map(len, groups))==len(set().union(*groups))

# kept, saved, loaded

def test_saved_and_loaded(dls, tmp_path):
    "By name, and of a network without one; the plain encoder starts from the same file"
    x = torch.rand(3,3,32,32)
    learn = quietly(ssl_learner(dls, 'timm/test_byobnet', LCR(K=64)), 1, .05)
    back = load_encoder(save_encoder(learn, tmp_path/'a.safetensors'))
    assert close(back(x), features(learn.model.encoder.finished(), x), 1e-6) and back.on
    start = create_encoder('timm/test_byobnet', weights=tmp_path/'a.safetensors').eval()
    assert start(x).equal(features(learn.model.encoder, x))
    own = ssl_learner(dls, small(), LCR(K=64)); file = save_encoder(own, tmp_path/'b.safetensors')
    assert close(load_encoder(file, small().body)(x), features(own.model.encoder.finished(), x), 1e-6)

def test_exported(dls, tmp_path):
    "As a program it has its mask; as a plain state dict it would not, and says so"
    learn = quietly(ssl_learner(dls, 'timm/test_byobnet', LCR(K=64)), 1, .05); x = torch.rand(4,3,32,32)
    export_encoder(learn, tmp_path/'e.pt2')
    assert close(torch.export.load(tmp_path/'e.pt2').module()(x), features(learn.model.encoder.finished(), x), 1e-5)
    with pytest.raises(InputError, match='mask'): export_encoder(learn, tmp_path/'e.pth')

@pytest.mark.parametrize('name,on', [('lcr',False), ('sam_bilinear',True)])
def test_pairs_are_synthesized_from_the_features_that_trained(dls, tmp_path, name, on):
    cbs = synth_pairs(decoder_width=8)
    learn = quietly(ssl_learner(dls, 'timm/test_byobnet', small_methods[name](), cbs=cbs), 2, .03)
    assert learn.model.encoder.on==on
    syn = Synthesizer.from_learner(learn); x = torch.rand(4,3,32,32)
    back = Synthesizer.load(syn.save(tmp_path/'s.safetensors'))
    assert back.encoder.on==on and close(back.encoder(x), syn.encoder(x), 1e-6)

def test_the_learner_measures_what_it_keeps(dls, items):
    learn = quietly(ssl_learner(dls, 'timm/test_byobnet', LCR(K=64)), 1, .05)
    seen = []
    ask_encoder(learn, lambda enc, **kw: seen.append(enc.on)); assert seen==[True] and not learn.model.encoder.on

def test_each_is_a_word():
    assert methods['lcr'] is LCR and methods['sam_bilinear'] is SAMBilinear
