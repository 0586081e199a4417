"What may be changed about a learner: frozen parts, other images, late callbacks, files, exports, random numbers"
import random, warnings, zipfile
from functools import partial
from types import SimpleNamespace
import numpy as np, pytest, torch
from torch import nn, Tensor
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from fastai.learner import Learner, load_learner, noop
from fastai.losses import MSELossFlat
from fastai.optimizer import OptimWrapper
from fastai.torch_core import set_seed
from fgsynth.core import InputError
from fgsynth.distrib import seeded
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.evaluate import probe                                            # which gives learners `linear_probe`
from fgsynth.evaluate.features import features
from fgsynth.nets.encoders import create_encoder
from fgsynth.methods.dino import DINO
from fgsynth.methods.health import HealthCallback
from fgsynth.methods.learner import faster_precision, freeze_stages, ssl_learner
from fgsynth.methods.mocov2 import MoCoV2
from fgsynth.methods.simsiam import SimSiam
from fgsynth.show import explore                                              # which gives learners their pictures
from fgsynth.synth.callbacks import DecoderCallback, PerturbCallback, SynthPairCallback, synth_pairs
from fgsynth.synth.controls import synth_callbacks
from training import close, quietly, small

net = 'timm/test_byobnet'

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=128, n_test=32, size=32)

@pytest.fixture(scope='module')
def dls(items): return ssl_dls(items, size=32, bs=32)

def tiny_dino(**kw): return DINO(**{**dict(K=32, n_local=0, hidden=64, dim=16), **kw})

def values(m): return {k:v.clone() for k,v in m.state_dict().items() if isinstance(v, Tensor)}

def moved(m, was): return {k for k,v in values(m).items() if not v.equal(was[k])}

# frozen is not lost

def cosine(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit_cosine(1, .03)

def exported(learn): learn.export('x.pkl')

between = dict(nothing=noop, cosine=cosine, fit=quietly, renewed=lambda l: l.create_opt(), export=exported,
               saved=lambda l: (l.save('x'), l.load('x')), whole=lambda l: (l.freeze_to(9), cosine(l)))

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('do', between)
@pytest.mark.parametrize('method', ['mocov2','simsiam'])
def test_what_freeze_froze_trains_after_unfreeze(dls, tmp_path, method, do):
    "Whatever happens in between; SimSiam's predictor has a group of its own under fit_cosine"
    learn = ssl_learner(dls, net, SimSiam(64,16) if method=='simsiam' else MoCoV2(), path=tmp_path, model_dir='.')
    learn.freeze(); between[do](learn); learn.unfreeze()
    was = values(learn.model)
    quietly(learn, 1, .03)
    names = {n for n,_ in learn.model.named_parameters() if not n.startswith('key_')}
    assert names <= moved(learn.model, was)

@pytest.mark.parametrize('by_stage', [False,True])
def test_frozen_stages_are_never_thawed(by_stage):
    few = ssl_dls(get_dataset('finches', n_train=16, n_test=8, size=32), size=32, bs=8)
    learn = ssl_learner(few, 'resnet18', frozen_stages=2, by_stage=by_stage)
    was,frozen = values(learn.model.encoder),('body.conv1','body.bn1','body.layer1')
    learn.freeze(); cosine(learn); learn.unfreeze(); quietly(learn, 1, .03)
    now = moved(learn.model.encoder, was)
    assert not [n for n in now if n.startswith(frozen)]
    assert {n for n,_ in learn.model.encoder.named_parameters() if not n.startswith(frozen)} <= now

def test_stages_of_an_encoder_frozen_by_hand_are_frozen_stages(dls):
    enc = create_encoder('resnet18'); freeze_stages(enc, 1)
    learn = ssl_learner(dls, enc); learn.freeze(); learn.unfreeze()
    still = {n for n,p in learn.model.encoder.named_parameters() if not p.requires_grad}
    assert still == set(learn.model.fixed) == {'body.conv1.weight','body.bn1.weight','body.bn1.bias'}

def test_an_encoder_that_another_learner_froze_can_be_thawed(dls):
    first = ssl_learner(dls, net); first.freeze()
    learn = ssl_learner(dls, first.model.encoder); learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.encoder.parameters())

def test_what_a_network_holds_fixed_by_itself_stays_fixed(dls):
    body = nn.Sequential(nn.Conv2d(3,8,3,2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,4))
    body[0].bias.requires_grad_(False)
    learn = ssl_learner(dls, body); learn.freeze(); learn.unfreeze()
    assert [n for n,p in learn.model.encoder.named_parameters() if not p.requires_grad] == ['body.0.bias']

def test_what_is_frozen_after_a_fit_stands_still(dls):
    "Neither momentum nor weight decay moves it on"
    learn = quietly(ssl_learner(dls, net, wd=.1))
    was = values(learn.model.encoder)
    learn.model.encoder.requires_grad_(False)
    quietly(learn, 1, .03)
    assert not [n for n,_ in learn.model.encoder.named_parameters() if n in moved(learn.model.encoder, was)]

def test_an_exported_learner_goes_on_as_if_nothing_had_happened(dls, tmp_path):
    "Frozen or not; and when the export fails, it has lost nothing"
    learn = ssl_learner(dls, net, path=tmp_path); learn.freeze(); quietly(learn)
    opt,memory = learn.opt,values(learn.model)
    learn.export()
    learn.nobody_can_pickle_this = (i for i in range(3))
    with pytest.raises(TypeError): learn.export()
    assert learn.dls is dls and learn.opt is opt and not moved(learn.model, memory)
    assert [o.name for o in tmp_path.iterdir()] == ['export.pkl']
    load_learner(tmp_path/'export.pkl')

# other images

def test_views_follow_the_images(items):
    learn = quietly(ssl_learner(ssl_dls(items, size=32, bs=32), net, SimSiam(64,16)))
    for size in 48,64:
        learn.dls = ssl_dls(items, size=size, bs=32)
        seen = []
        class Sizes(Callback):
            order = 1
            def after_loss(self): seen.extend([*[v.shape[-1] for v in self.xb], self.learn.ssl.clean.shape[-1]])
        quietly(learn, 1, cbs=Sizes())
        assert set(seen) == {size}
        assert learn.ssl.whole(torch.rand(2,3,size,size)).shape[-1] == size

def test_views_of_ones_own_stay_as_they_are(items):
    mine = lambda x: (x, x.flip(-1))
    learn = ssl_learner(ssl_dls(items, size=32, bs=32), net, SimSiam(64, 16, views=mine))
    learn.dls = ssl_dls(items, size=48, bs=32)
    assert learn.ssl.views is mine

@pytest.mark.parametrize('kw,said', [
    (dict(arch='timm/test_vit3'), 'encoder takes images of 32 pixels and these have 48'),
    (dict(cbs=synth_pairs), 'decoder draws images of 32 pixels and these have 48'),
    (dict(cbs=DecoderCallback), 'take size=32')])
def test_images_of_a_size_that_does_not_fit_are_refused(items, dls, kw, said):
    "And the learner stays as it was"
    arch,cbs = kw.get('arch', net),kw.get('cbs', noop)()
    learn = ssl_learner(dls, arch, cbs=cbs)
    with pytest.raises(InputError, match=said): learn.dls = ssl_dls(items, size=48, bs=32)
    assert learn.dls is dls
    quietly(learn, 1, .01)

def test_an_encoder_for_another_size_is_refused_from_the_start(dls):
    with pytest.raises(InputError, match='takes images of 48 pixels'):
        ssl_learner(dls, create_encoder('timm/test_vit3', size=48))

def test_a_network_that_takes_any_size_is_not_refused(items, dls):
    "Though it was made for one: this Vision Transformer stretches the embeddings of its positions"
    learn = ssl_learner(dls, create_encoder('timm/test_vit', size=32))
    learn.dls = ssl_dls(items, size=48, bs=32)
    quietly(learn, 1, .01)

def test_loaders_that_know_no_size_are_refused(dls):
    learn = ssl_learner(dls, net)
    with pytest.raises(InputError, match='how large'): learn.dls = SimpleNamespace()
    assert learn.dls is dls

def test_columns_follow_the_validation_part(items):
    with_part,without = [ssl_dls(items, size=32, bs=32, valid_pct=o) for o in (.25,0)]
    learn = ssl_learner(with_part, net)
    for dls,has in (without,False),(with_part,True),(without,False):
        learn.dls = dls
        quietly(learn)
        assert ('valid_ssl_loss' in learn.recorder.metric_names) == has
        learn.recorder.plot_loss()

def test_indices_are_those_of_the_data_set(items, dls):
    "Another size of the same images leaves them, other images do not"
    learn = quietly(ssl_learner(dls, small(), MoCoV2(K=64, mask_same_image=True), cbs=PerturbCallback()))
    ids = learn.model.queue_ids,learn.model.bank.ids
    assert all(o.max()>=0 for o in ids)
    learn.dls = ssl_dls(items, size=32, bs=32)
    assert all(o.max()>=0 for o in ids)
    feats = learn.model.bank.feats.clone()
    learn.dls = ssl_dls(get_dataset('finches', n_train=64, n_test=8, size=32, seed=3), size=32, bs=32)
    assert [o.max() for o in ids] == [-1,-1] and feats.equal(learn.model.bank.feats)
    quietly(learn)

def test_class_noise_takes_no_mates_from_the_data_set_before(items, dls):
    "With fewer images, their indices would lie outside"
    learn = quietly(ssl_learner(dls, small(), MoCoV2(K=64), cbs=synth_callbacks('within')))
    learn.dls = ssl_dls(get_dataset('finches', n_train=40, n_test=8, size=32), size=32, bs=32)
    quietly(learn)

# files

def said(f):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always'); f()
    return [str(o.message) for o in found if 'begins anew' in str(o.message)]

kinds = dict(mocov2=MoCoV2, masked=lambda: MoCoV2(mask_same_image=True), simsiam=lambda: SimSiam(64,16), dino=tiny_dino)

@pytest.mark.parametrize('name', kinds)
@pytest.mark.parametrize('n', [64, 160])
def test_a_file_of_fewer_or_more_images(dls, tmp_path, name, n):
    "Queue and bank begin anew; weights, decoder and momentum are taken over, and training goes on"
    def make(dls): return ssl_learner(dls, small(), kinds[name](), cbs=synth_pairs(decoder_width=4), path=tmp_path)
    learn = quietly(make(dls)); learn.save('there')
    other = quietly(make(ssl_dls(get_dataset('finches', n_train=n, n_test=8, size=32), size=32, bs=32)))
    words, = said(lambda: other.load('there'))
    assert 'bank' in words and ('queue' in words)==name.startswith('m')
    old,new = values(learn.model),values(other.model)
    for k in new:
        if k.split('.')[0] not in ('bank','queue','queue_ids','ptr'): assert new[k].equal(old[k]), k
    m = other.model
    assert len(m.bank)==0 and not m.bank.ready() and m.bank.size==n
    if hasattr(m, 'queue'):
        assert (len(m.queue), m.ptr, m.queue_ids.max())==(n, 0, -1) and close(m.queue.norm(dim=1), torch.ones(n))
    for a,b in zip(learn.model.parameters(), m.parameters()):
        was,now = [l.opt.state.get(p, {}).get('grad_avg') for l,p in ((learn,a), (other,b))]
        assert was is None or was.equal(now)
    quietly(other, 2, .01)

def test_a_file_of_as_many_images_is_taken_over_whole(dls, tmp_path):
    a,b = [ssl_learner(dls, small(), cbs=synth_pairs(decoder_width=4), path=tmp_path) for _ in range(2)]
    quietly(a).save('there')
    assert said(lambda: b.load('there'))==[] and not moved(b.model, values(a.model))

def test_prototypes_of_more_images_stay_here(dls, tmp_path):
    "By default there are as many as images, above a thousand; their momentum is of the other shape"
    a,b = [ssl_learner(dls, small(), tiny_dino(K=K, freeze_last=0), path=tmp_path) for K in (40,32)]
    quietly(a).save('there')
    mine = values(b.model)
    words, = said(lambda: b.load('there'))
    assert 'prototypes' in words
    stay = {k for k in mine if 'prototypes' in k or k=='centre'}
    assert moved(b.model, mine).isdisjoint(stay) and b.model.projector[0].weight.equal(a.model.projector[0].weight)
    quietly(b, 1, .01)

@pytest.mark.parametrize('make', [lambda d,p: ssl_learner(d, net, path=p),
    lambda d,p: ssl_learner(d, small(), SimSiam(64,16), path=p),
    lambda d,p: ssl_learner(d, small(), cbs=synth_pairs(decoder_width=8), path=p)], ids=['encoder','method','decoder'])
def test_a_file_of_another_make_changes_nothing(dls, tmp_path, make):
    "Not even where its tensors would fit"
    quietly(ssl_learner(dls, small(), cbs=synth_pairs(decoder_width=4), path=tmp_path)).save('there')
    learn = quietly(make(dls, tmp_path)); was = values(learn.model)
    with pytest.raises(InputError, match='another make'): learn.load('there')
    assert not moved(learn.model, was)

def test_a_file_that_is_not_there_is_named(dls, tmp_path):
    learn = ssl_learner(dls, small(), path=tmp_path)
    with pytest.raises(FileNotFoundError, match='nowhere'): learn.load('nowhere')

def test_an_emptied_bank_is_not_stale(dls):
    "Its age is counted from the moment at which it was emptied"
    health = HealthCallback(every=1, stale=9)
    cbs = [*synth_pairs(decoder_width=4, max_pairs=None), health]
    learn = quietly(ssl_learner(dls, small(), health=False, cbs=cbs), 2)
    for _ in range(3): learn.model.bank.clear(); quietly(learn, 1)
    assert 'bank' not in health.warned

# callbacks that come late

def test_pairs_given_to_one_fit(dls):
    "Do what they do in a learner that was made with them, and go on with their decoder in the next"
    set_seed(0); learn = ssl_learner(dls, small())
    quietly(learn)
    quietly(learn, 1, .03, cbs=synth_pairs(decoder_width=4))
    assert {'rec_loss','pair_loss','pair_diff'} <= set(learn.recorder.metric_names)
    assert all(v is not None for v in learn.recorder.values[-1])
    decoder,count = learn.model.decoder,learn.model.bank.count.item()
    assert not [cb for cb in learn.cbs if hasattr(cb, 'max_pairs')]
    quietly(learn, 1, .03, cbs=synth_pairs(decoder_width=4))
    assert learn.model.decoder is decoder and learn.model.bank.count.item() > count

@pytest.mark.parametrize('update', ['own','joint','frozen'])
@pytest.mark.parametrize('fitted', [False,True])
def test_pairs_added_later_train_as_those_there_from_the_start(dls, update, fitted):
    "Losses are the same to the bit where nothing else has happened yet; in the middle of training they are finite"
    def losses(late):
        set_seed(0); cbs = synth_pairs(decoder_width=4, update=update, beta=.5)
        learn = ssl_learner(dls, small(), cbs=None if late else cbs)
        if fitted: set_seed(1); quietly(learn)
        if late: learn.add_cbs(cbs)
        w = learn.model.decoder.expand.weight.detach().clone()
        set_seed(2); learn.dls.train.rng = random.Random(2)
        quietly(learn, 2, .03)
        assert learn.model.decoder.expand.weight.equal(w) == (update=='frozen')
        return learn.recorder.losses
    late = losses(True)
    assert torch.stack(late).isfinite().all()
    if not fitted: assert late == losses(False)

def test_pairs_added_later_can_be_pretrained_and_looked_at(dls, items):
    learn = ssl_learner(dls, small()); learn.add_cbs(synth_pairs(decoder_width=4))
    with learn.no_bar(), learn.no_logging(): learn.pretrain_decoder(1)
    assert learn.synthesizer()(items.test[:4].float()/255).pert.shape == (4,3,32,32)

def test_momentum_survives_a_decoder_that_joins_the_optimizer(dls):
    learn = quietly(ssl_learner(dls, small()))
    p = learn.model.projector[0].weight; was = learn.opt.state[p]['grad_avg'].clone()
    learn.add_cbs(synth_pairs(decoder_width=4, update='joint'))
    assert learn.opt.state[p]['grad_avg'].equal(was)
    assert {id(o) for o in learn.model.decoder.parameters()} <= {id(o) for g in learn.opt.param_lists for o in g}

def test_the_same_with_an_optimizer_of_pytorch(dls):
    opt = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))
    learn = quietly(ssl_learner(dls, small(), opt_func=opt))
    p = learn.model.projector[0].weight; was = learn.opt.opt.state[p]['momentum_buffer'].clone()
    learn.add_cbs(DecoderCallback(update='joint', decoder_width=4))
    assert learn.opt.opt.state[p]['momentum_buffer'].equal(was)
    quietly(learn)

def test_a_decoder_whose_callback_is_gone_stands_still(dls):
    learn = ssl_learner(dls, small())
    quietly(learn, 1, .03, cbs=synth_pairs(decoder_width=4, update='joint'))
    was = values(learn.model.decoder)
    quietly(learn, 1, .03)
    assert not moved(learn.model.decoder, was)

def test_a_decoder_that_was_frozen_learns_again_for_a_callback_that_trains_it(dls):
    learn = ssl_learner(dls, small())
    quietly(learn, 1, .03, cbs=synth_pairs(decoder_width=4, update='frozen'))
    was = values(learn.model.decoder)
    quietly(learn, 1, .03, cbs=synth_pairs(decoder_width=4))
    assert 'expand.weight' in moved(learn.model.decoder, was)

@pytest.mark.parametrize('cbs,words', [
    (lambda: synth_pairs(decoder_width=4), 'already'),
    (lambda: DecoderCallback(), 'already'),
    (lambda: PerturbCallback(max_pairs=3), 'disagree'),
    (lambda: [Callback(), PerturbCallback(max_pairs=3)], 'disagree')])
@pytest.mark.parametrize('how', ['add','fit'])
def test_what_cannot_join_is_refused_and_leaves_no_trace(dls, cbs, words, how):
    learn = ssl_learner(dls, small(), cbs=synth_pairs(decoder_width=4))
    learn.remove_cb(learn.progress); was = list(learn.cbs)
    with pytest.raises(InputError, match=words): learn.add_cbs(cbs()) if how=='add' else quietly(learn, cbs=cbs())
    assert list(learn.cbs) == was and learn.decoder in was and learn.perturb in was
    quietly(learn)

def test_a_pair_without_a_decoder_is_refused_late_as_well(dls):
    learn = ssl_learner(dls, small())
    with pytest.raises(InputError, match='needs a decoder'): quietly(learn, cbs=SynthPairCallback())
    quietly(learn)

def test_pairs_on_a_learner_that_is_not_self_supervised(dls):
    plain = Learner(dls, nn.Linear(1,1), loss_func=MSELossFlat())
    with pytest.raises(InputError, match='ssl_learner'): quietly(plain, cbs=synth_pairs())

# predictions

def test_there_are_no_losses_of_single_images_and_no_classes(items):
    learn = ssl_learner(ssl_dls(items, size=32, bs=32, valid_pct=.25), small())
    for f,words in [(lambda: learn.get_preds(with_loss=True), 'whole batch'),
                    (lambda: learn.predict(items.test[0]), 'tells no classes'),
                    (lambda: learn.show_results(), 'tells no classes')]:
        with learn.no_bar(), pytest.raises(InputError, match=words): f()
    with learn.no_bar(): (q,k),ids = learn.get_preds()
    assert q.shape==k.shape==(32,128) and ids.tolist()==learn.dls.valid_ds.y.tolist()

# what is exported

class Keeper(Callback):
    "Keeps images and features in many ways"
    order = 9
    def after_batch(self):
        x,z = self.learn.ssl.clean,self.learn.model.last_features
        self.one,self.many,self.named,self.array = x.clone(),[x.clone()],{'z':dict(a=z)},x.numpy().copy()
        self.ns,self.learn.mine = SimpleNamespace(z=z),z

def rows_of(tensor):
    "Some bytes from the middle of some rows, unless they are all alike"
    rows = [r.numpy().tobytes() for r in tensor.detach().contiguous().flatten(1)[-24:]]
    return {o for o in (r[len(r)//2:][:64] for r in rows) if len(set(o))>8}

exports = dict(mocov2=dict(), simsiam=dict(method=lambda: SimSiam(64,16)), keeper=dict(cbs=Keeper),
               pairs=dict(cbs=synth_pairs), within=dict(cbs=lambda: synth_callbacks('within')))

@pytest.mark.parametrize('kw', exports.values(), ids=exports)
def test_no_image_and_no_feature_is_exported(items, tmp_path, kw):
    dls = ssl_dls(items, size=32, bs=32, valid_pct=.25)
    learn = ssl_learner(dls, small(), kw.get('method', noop)(), cbs=kw.get('cbs', noop)(), path=tmp_path)
    quietly(learn, 2, .01)
    learn.show_batch()
    net = learn.model
    secret = rows_of(learn.ssl.clean) | rows_of(net.last_features)
    for x in items.train.float()/255, items.train: secret |= rows_of(x)
    if hasattr(net, 'queue'): secret |= rows_of(net.queue)
    if hasattr(net, 'bank'): secret |= rows_of(net.bank.feats) | rows_of(net.bank.feats*net.bank.norms[:,None])
    if learn.__dict__.get('synth'): secret |= rows_of(learn.synth.z)
    assert len(secret)>40
    learn.save('all')
    def leaked(file):
        with zipfile.ZipFile(file) as z: everything = b''.join(z.read(n) for n in z.namelist())
        return sum(s in everything for s in secret)
    learn.export()
    assert leaked(tmp_path/'export.pkl')==0
    if hasattr(net, 'queue'): assert leaked(tmp_path/'models/all.pth')>0   # which the test would notice
    loaded = load_learner(tmp_path/'export.pkl')
    x = items.test[:4]
    assert close(features(loaded.model.encoder, x), features(net.encoder, x), 1e-6)
    loaded.dls = dls
    quietly(loaded, 1, .01)

# random numbers

@pytest.fixture
def gpus(monkeypatch):
    "Generators of devices that are not there: two GPUs, and Apple's; and whoever seeds all of them is noted"
    make = torch.Generator
    there = {d:make().manual_seed(i) for i,d in enumerate(['cuda:0','cuda:1','mps'])}
    def key(device='cuda'): d = torch.device(device); return 'mps' if d.type=='mps' else f'cuda:{d.index or 0}'
    seeded_all = []
    for o,default in (torch.cuda,'cuda'),(torch.mps,'mps'):
        monkeypatch.setattr(o, 'get_rng_state', lambda device=default: there[key(device)].get_state())
        monkeypatch.setattr(o, 'set_rng_state', lambda state, device=default: there[key(device)].set_state(state))
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', lambda s: seeded_all.append('cuda'))
    monkeypatch.setattr(torch.mps, 'manual_seed', lambda s: seeded_all.append('mps'))
    monkeypatch.setattr(torch, 'Generator', lambda device='cpu': make())
    def states(): return {k:g.get_state().clone() for k,g in there.items()}
    return SimpleNamespace(there=there, seeded_all=seeded_all, states=states)

def same(a, b): return all(a[k].equal(b[k]) for k in a)

@pytest.mark.parametrize('device', ['cpu','cuda:0','cuda:1','mps'])
def test_what_is_drawn_aside_is_put_back_on_every_device(gpus, device):
    before,fresh = gpus.states(),torch.Generator().manual_seed(5).get_state()
    def draw(): return random.random(), np.random.rand(), torch.rand(1).item()
    set_seed(1); want = draw(); set_seed(1); gpus.seeded_all.clear()
    for _ in range(2):
        with seeded(5, device):
            inside = draw()
            for d,g in gpus.there.items():
                assert g.get_state().equal(fresh if d==device else before[d])
            if device!='cpu': torch.rand(3, generator=gpus.there[device])
        assert same(gpus.states(), before)
    assert draw()==want and inside!=want and not gpus.seeded_all
    with pytest.raises(ZeroDivisionError):
        with seeded(5, device): 1/0
    assert same(gpus.states(), before)

@pytest.fixture(scope='module')
def drawn(dls): return quietly(ssl_learner(dls, small(), cbs=synth_pairs(decoder_width=4)))

aside = dict(
    pairs=lambda l,i: l.show_pairs(), noise=lambda l,i: l.show_noise(), attention=lambda l,i: l.show_attention(),
    variance=lambda l,i: l.show_variance(), retrieval=lambda l,i: l.show_retrieval(i, n=2, k=2),
    explorer=lambda l,i: l.explore().picture(), page=lambda l,i: l.explore().to_html(sigmas=(0,1), modes=('cam',)),
    probe=lambda l,i: l.linear_probe(i, epochs=1, augment=True), step=lambda l,i: l.synth_pair.images(),
    export=lambda l,i: l.export())

@pytest.mark.parametrize('what', aside)
def test_pictures_and_measures_do_not_disturb_the_training(drawn, items, what, gpus, tmp_path):
    "No generator of any device moves, and none is seeded"
    drawn.path = tmp_path
    drawn.ssl.clean,drawn.epoch,drawn.n_iter,drawn.training = items.train[:8].float()/255,0,4,True
    before = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state(),gpus.states()
    aside[what](drawn, items)
    assert before[:2]==(random.getstate(), np.random.get_state()[1].tolist())
    assert before[2].equal(torch.get_rng_state()) and same(before[3], gpus.states()) and not gpus.seeded_all

def test_measuring_the_precision_draws_aside():
    "A network with dropout, which draws in training"
    drops = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(3*32**2, 2))
    before = torch.get_rng_state()
    faster_precision(drops, 32, 2, rounds=1)
    assert before.equal(torch.get_rng_state())

class Noise(Callback):
    order = 9
    def before_fit(self): self.seen = []
    def after_loss(self): self.seen.append((self.learn.synth.noise.clone(), self.learn.synth_pair.step_seed()))

def test_noise_and_colours_are_not_replayed_in_a_second_fit(dls, tmp_path):
    "Nor in a learner that loads the first one's file, which goes on as the first one would"
    def make(): return ssl_learner(dls, small(), cbs=[*synth_pairs('random', decoder_width=4), Noise()], path=tmp_path)
    set_seed(0); learn = make(); seeds = []
    for _ in range(3):
        quietly(learn, 2, .01); seeds += [s for _,s in learn.noise.seen]
    assert seeds[:8]==[torch.initial_seed() + 2*(e*4+e*4+i) for e in range(2) for i in range(4)] # as ever in the first
    assert len(set(seeds))==len(seeds)==24 and min(abs(a-b) for a,b in zip(seeds, seeds[1:]))>=2
    learn.save('there'); other = make(); other.load('there')
    for l in learn,other: quietly(l, 1, .01)
    assert [s for _,s in learn.noise.seen]==[s for _,s in other.noise.seen]

@pytest.mark.parametrize('synth', ['views','jitter'])
def test_controls_without_a_bank_are_not_replayed_either(dls, synth):
    learn = ssl_learner(dls, small(), cbs=synth_callbacks(synth)); seeds = []
    class Seeds(Callback):
        order = 9
        def after_loss(self): seeds.append(self.learn.synth_pair.step_seed())
    for _ in range(2): quietly(learn, 1, .01, cbs=Seeds())
    assert len(set(seeds))==8

def test_pairs_given_to_each_fit_are_not_replayed(dls):
    learn,seeds = ssl_learner(dls, small()),[]
    class Seeds(Callback):
        order = 9
        def after_loss(self): seeds.append(self.learn.synth_pair.step_seed())
    for _ in range(2): quietly(learn, 1, .01, cbs=[*synth_pairs(decoder_width=4), Seeds()])
    assert len(set(seeds))==8

@pytest.mark.parametrize('rest,want', [(0, [True]*3), (1, [False,True,True]), (2, [False,False,True])])
def test_prototypes_rest_in_the_first_epochs_of_all_fits(dls, tmp_path, rest, want):
    "Fits of one epoch each, the last of them in a learner that loads the file of the one before"
    def make(): return ssl_learner(dls, small(), tiny_dino(freeze_last=rest), path=tmp_path)
    learn,got = make(),[]
    for i in range(3):
        if i==2: learn.save('there'); learn = make(); learn.load('there')
        was = learn.model.prototypes.weight.detach().clone()
        quietly(learn, 1, .05); got.append(not learn.model.prototypes.weight.equal(was))
    assert got==want

def test_a_file_without_a_count_of_steps_is_of_a_trained_model(dls, tmp_path):
    learn = ssl_learner(dls, small(), tiny_dino(), path=tmp_path); learn.create_opt()
    state = {k:v for k,v in learn.model.state_dict().items() if k!='step_count'}
    torch.save(dict(model=state, opt=learn.opt.state_dict()), tmp_path/'old.pth')
    learn.model_dir = '.'; learn.load('old')
    was = learn.model.prototypes.weight.detach().clone()
    quietly(learn, 1, .05); assert not learn.model.prototypes.weight.equal(was)

# validation

@pytest.fixture
def validated(items): return ssl_dls(items, size=32, bs=32, valid_pct=.25)

def test_the_last_synthesis_is_that_of_the_training(validated, items):
    "After a fit, and after looking at other images"
    class Clean(Callback):
        order = 9
        def after_loss(self):
            if self.training: self.x = self.learn.synth.x
    learn = ssl_learner(validated, small(), cbs=[*synth_pairs(decoder_width=4), Clean()])
    quietly(learn, 2, .01)
    def check():
        s = learn.synth
        assert s.x is learn.clean.x and len({len(o) for o in (s.x, s.z, s.rec, s.pert, s.noise, s.cos)})==1
        assert close(s.pair[0], s.x) and close(s.pair[1], (s.x + s.pert - s.rec).clamp(0, 1), 1e-6)
        assert close(s.z_pert, s.z + s.noise, 1e-6)
    check()
    with learn.no_bar(): learn.validate(); check(); learn.get_preds(); check()

def test_a_term_of_ones_own_leaves_no_trace_in_validation(validated):
    from fgsynth.synth.decoding import SynthCallback
    class UnitLength(SynthCallback):
        order = 1
        def setup(self): self.learn.ssl.add_term('length_loss')
        def after_loss(self): self.add_loss('length_loss', (self.clean_features(True).norm(dim=1)-1).pow(2).mean(), 2.)
    learn = quietly(ssl_learner(validated, small(), cbs=UnitLength()), 1, .001)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert learn.synth.x.shape[0]==16
    assert close(row['valid_loss'], row['valid_ssl_loss'] + 2*row['valid_length_loss'], 1e-4)

@pytest.mark.parametrize('beta', [0., .5, 2.])
@pytest.mark.parametrize('update', ['own','joint','frozen'])
def test_the_validation_loss_has_the_reconstruction(validated, beta, update):
    cbs = DecoderCallback(beta=beta, update=update, decoder_width=4, max_pairs=None)
    learn = quietly(ssl_learner(validated, small(), cbs=cbs), 1, .01)
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    net,errors = learn.model.eval(),[]
    for images,_ in validated.valid:
        x = images.as_subclass(Tensor)
        with torch.no_grad(): errors.append((net.decoder(net.encoder(x)).double()-x).pow(2).mean().item())
    assert close(row['valid_rec_loss'], np.mean(errors), 1e-5)
    assert close(row['valid_loss'], row['valid_ssl_loss'] + beta*np.mean(errors), 1e-4)
