"The methods: each against its own implementation in float64, and what their models keep"
import inspect, math, random, warnings
from copy import deepcopy
from types import SimpleNamespace
import pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.torch_core import set_seed
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.nets.encoders import create_encoder
from fgsynth.nets.networks import Encoder, num_features
from fgsynth.nets.heads import MLPHead
from fgsynth.nets.losses import info_nce
from fgsynth.nets.saliency import Saliency, saliency_for_pictures
from fgsynth.methods.base import SSLMethod, SSLModel, batch_stats_only
from fgsynth.methods.mocov2 import MoCoModel, MoCoV2, QueueModel
from fgsynth.methods.simsiam import SimSiam, SimSiamModel
from fgsynth.methods.simclr import SimCLR
from fgsynth.methods.byol import BYOL
from fgsynth.methods.dino import DINO
from fgsynth.methods.nnclr import NNCLR
from fgsynth.methods.mean_shift import MeanShift
from fgsynth.methods.lewel import LEWEL
from fgsynth.methods.learner import ssl_learner
from fgsynth.synth.callbacks import synth_pairs
from training import KeepViews, close, move, next_losses, quietly, replay, side_for, small, small_methods, unit

BatchNorm = nn.modules.batchnorm._BatchNorm

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=256, n_test=64, size=32)

@pytest.fixture(scope='module')
def dls(items): return ssl_dls(items, size=32, bs=64)

class Contrast(SSLMethod):
    "The base class, which says how its loss is explained"
    def saliency(self): return Saliency(self.net.projector, kind='in_batch', temperature=self.temperature)

# the base class

def test_model_keeps_the_features_of_the_first_view():
    enc = create_encoder('resnet18')
    m = SSLModel(enc, MLPHead(512,512,128))
    a,b = m(torch.rand(4,3,32,32), torch.rand(4,3,32,32))
    assert (a.shape, m.last_features.shape, m.last_features.requires_grad)==((4,128), (4,512), False)
    assert [len(g) for g in m.param_groups()]==[len(list(enc.parameters())), 4]
    m.eval(); x,y = torch.rand(2,4,3,32,32); m(x, y)
    assert close(m.last_features, enc(x))

def test_frozen_batch_norm_stays_in_evaluation_mode():
    m = SSLModel(create_encoder('timm/test_byobnet'), nn.Identity(), frozen_bn=True).train()
    assert {o.training for o in m.encoder.modules() if isinstance(o, BatchNorm)}=={False}
    assert m.training

def test_batch_stats_only_leaves_all_as_it_was():
    bn = nn.BatchNorm1d(4).train(); x = torch.randn(16,4)*3 + 1
    net = nn.Sequential(nn.Linear(4,4), bn, nn.BatchNorm1d(4, track_running_stats=False))
    with batch_stats_only(net): net(x)
    assert bn.training and bn.num_batches_tracked==0
    assert [m.track_running_stats for m in net[1:]]==[True,False]
    net(x); assert bn.num_batches_tracked==1

def test_slow_copies_move_by_the_share_that_is_asked_for_and_nothing_else():
    m = SSLModel(nn.Linear(4,3), nn.BatchNorm1d(3)); m.slow_copies('encoder','projector')
    old = deepcopy(m.state_dict()); nn.init.normal_(m.encoder.weight); m.follow(.9)
    assert close(m.key_encoder.weight, .9*old['encoder.weight'] + .1*m.encoder.weight, 1e-6)
    assert m.key_projector.running_mean.equal(old['projector.running_mean'])
    assert {p.requires_grad for n,p in m.named_parameters() if n.startswith('key_')}=={False}

def contrast(a, b):
    "The normalised temperature-scaled cross entropy of SimCLR, written out"
    u = torch.cat([unit(a), unit(b)]); n = len(a); total = 0.
    for i in range(2*n):
        others = torch.stack([u[i]@u[j]/.2 for j in range(2*n) if j!=i])
        total -= (u[i]@u[(i+n)%(2*n)]/.2) - others.logsumexp(0)
    return total/(2*n)

def test_base_class_is_contrast_within_the_batch(dls):
    l = ssl_learner(dls, small(), Contrast()); g = l.model.projector.eval()
    a,b,z = torch.randn(3,5,128)
    assert close(l.ssl.loss(a, b), contrast(a, b), 1e-4)
    assert close(l.ssl.view_loss((a,b), z), contrast(a, g(z)), 1e-4)
    assert close(l.ssl.pair_loss(a, b), contrast(g(a), g(b)), 1e-4)
    p,q = unit(g(z)),unit(b)
    assert close(l.ssl.saliency()(z, b), -(p@q.T/.2).log_softmax(1).diagonal().sum(), 1e-4)
    assert close(saliency_for_pictures(l.ssl.saliency(), z).negatives, p)

def test_method_that_explains_nothing_trains_without_pairs_alone(dls):
    "And with pairs it says what to add"
    quietly(ssl_learner(dls, small(), SSLMethod()))
    with pytest.raises(InputError, match='SSLMethod does not say .* give it a method `saliency`'):
        quietly(ssl_learner(dls, small(), SSLMethod(), cbs=synth_pairs(decoder_width=4)), 2)
    quietly(ssl_learner(dls, small(), Contrast(), cbs=synth_pairs(decoder_width=4)), 2)

def test_step_that_was_given_up_moves_no_copy():
    class Moved(Exception): pass
    class Follows(SSLMethod):
        def follow(self): raise Moved
    m = Follows()
    m.after_cancel_step(); m.after_step(); assert not m.skipped
    with pytest.raises(Moved): m.after_step()

def test_whole_images_stay_whole(dls):
    "What has one colour has one colour afterwards, and left stays left"
    ssl = ssl_learner(dls, small()).ssl
    flat = torch.rand(4,3,1,1).expand(4,3,32,32); w = ssl.whole(flat)
    assert w.shape==flat.shape and close(w, w.mean((2,3), keepdim=True).expand_as(w), 1e-4)
    half = torch.zeros(8,3,32,32); half[...,16:] = .6; w = ssl.whole(half).mean((1,2))
    assert (w[:,-1]>w[:,0]).all()

def test_a_view_is_the_first_that_the_views_give(dls):
    l = ssl_learner(dls, small(), SSLMethod(views=lambda x: (x*2, x*3)))
    assert l.ssl.view(torch.ones(1))==2

def test_only_a_cosine_is_signed(): assert [o.signed for o in (SSLMethod(), MoCoV2(), SimSiam())]==[False,False,True]

@pytest.mark.parametrize('model', [SSLModel, MoCoModel, SimSiamModel])
def test_batch_norm_learns_by_default(model): assert inspect.signature(model).parameters['frozen_bn'].default is False

# each method against another implementation

def kept(dls, method, lr=.05, seed=1, prepare=lambda model: None, side=4, **kw):
    "A learner after one epoch, its model before that in float64, and what it saw"
    set_seed(seed); keep = KeepViews()
    learn = ssl_learner(dls, small(side), method, cbs=keep, **kw); prepare(learn.model)
    ref = deepcopy(learn.model).double().train()
    return quietly(learn, 1, lr),ref,keep.seen

def same_weights(learn, ref, *names, tol=1e-3):
    return all(close(getattr(learn.model, n).body[0].weight, getattr(ref, n).body[0].weight, tol) for n in names)

def test_mocov2(dls):
    "After the pseudocode of the paper: loss, queue and weights, step by step"
    learn,ref,seen = kept(dls, MoCoV2(K=128, momentum=.9), lr=.1)
    state = dict(queue=ref.queue.clone())
    def loss_of(v1, v2):
        q,state['k'] = unit(ref.projector(ref.encoder(v1))),unit(ref.key_projector(ref.key_encoder(v2)))
        logits = torch.cat([(q*state['k']).sum(1, keepdim=True), q@state['queue'].T], 1)/.2
        return -logits.log_softmax(1)[:,0].mean()
    def after_step(i):
        state['queue'] = torch.cat([state['queue'][64:], state['k'].detach()])                 # oldest out, newest in
        for n in 'encoder','projector': move(getattr(ref, f'key_{n}'), getattr(ref, n), .9)
    losses = replay(seen, [*ref.encoder.parameters(), *ref.projector.parameters()], loss_of, after_step, lr=.1)
    assert close([s[-1] for s in seen], losses, 1e-4)
    assert same_weights(learn, ref, 'encoder', 'key_encoder', tol=1e-4)
    assert close(learn.model.queue.roll(-learn.model.ptr.item(), 0), state['queue'], 1e-3)
    assert close(learn.recorder.values[-1][1], sum(losses)/len(losses), 1e-4) # the table has their mean

def test_simsiam(dls):
    "Loss, gradients, and weight decay as PyTorch's SGD has it"
    learn,ref,seen = kept(dls, SimSiam(dim=64, bottleneck=16), seed=2, wd=.05)
    def cosine(a, b): return (unit(a)*unit(b.detach())).sum(1).mean()
    def loss_of(*views):
        z1,z2 = [ref.projector(ref.encoder(v)) for v in views]
        return -(cosine(ref.predictor(z1), z2) + cosine(ref.predictor(z2), z1))/2
    assert close([s[-1] for s in seen], replay(seen, ref.parameters(), loss_of, wd=.05), 1e-4)
    assert same_weights(learn, ref, 'encoder')
    assert close(learn.model.encoder.body[0].bias, ref.encoder.body[0].bias, 1e-3)

def test_simclr(dls):
    "One image after another, as in the paper's Eq. 1"
    learn,ref,seen = kept(dls, SimCLR(temperature=.5))
    def loss_of(*views):
        e = torch.cat([unit(ref.projector(ref.encoder(v))) for v in views]); n,loss = len(e),0
        for i in range(n):
            sims = (e[i]@e.T/.5).exp()
            loss = loss - (sims[(i+n//2)%n]/(sims.sum()-sims[i])).log()/n
        return loss
    assert close([s[-1] for s in seen], replay(seen, ref.parameters(), loss_of), 1e-4)
    assert same_weights(learn, ref, 'encoder')

def rising(m, i, steps): return 1 - (1-m)*(math.cos(math.pi*i/steps)+1)/2

def test_byol(dls):
    "After the paper's Eq. 1 to 3: squared distances, and a momentum that rises"
    learn,ref,seen = kept(dls, BYOL(momentum=.5, hidden=64, dim=16))
    def loss_of(*views):
        p1,p2 = [unit(ref.predictor(ref.projector(ref.encoder(v)))) for v in views]
        with torch.no_grad(): t1,t2 = [unit(ref.key_projector(ref.key_encoder(v))) for v in views]
        return (p1-t2).pow(2).sum(1).mean() + (p2-t1).pow(2).sum(1).mean()
    def after_step(i):
        for n in 'encoder','projector': move(getattr(ref, f'key_{n}'), getattr(ref, n), rising(.5, i, len(seen)))
    online = [*ref.encoder.parameters(), *ref.projector.parameters(), *ref.predictor.parameters()]
    assert close([s[-1] for s in seen], replay(seen, online, loss_of, after_step), 1e-4)
    assert same_weights(learn, ref, 'encoder', 'key_encoder')

def test_dino(dls):
    "Softmax by softmax as in the paper's algorithm 1, centre and teacher included"
    def prepare(m): # so that logits differ from the start
        nn.init.normal_(m.projector[-1].weight); m.key_projector.load_state_dict(m.projector.state_dict())
    learn,ref,seen = kept(dls, DINO(K=32, n_local=2, momentum=.5, hidden=64, dim=16, freeze_last=0), prepare=prepare)
    state = dict(c=torch.zeros(32).double())
    def logits(x, f, g, w): return unit(g(f(x))) @ unit(w).T
    def loss_of(*views):
        qs = [logits(v, ref.encoder, ref.projector, ref.prototypes.weight)/.1 for v in views]
        with torch.no_grad():
            ks = [logits(v, ref.key_encoder, ref.key_projector, ref.key_prototypes.weight) for v in views[:2]]
        terms = [-(((k-state['c'])/.04).softmax(1)*q.log_softmax(1)).sum(1).mean()
                 for a,k in enumerate(ks) for b,q in enumerate(qs) if a!=b]
        assert len(terms)==6
        state['ks'] = ks
        return sum(terms)/6
    def after_step(i):
        state['c'] = .9*state['c'] + .1*torch.cat(state['ks']).mean(0)
        m = rising(.5, i, len(seen))
        for n in 'encoder','projector','prototypes': move(getattr(ref, f'key_{n}'), getattr(ref, n), m)
    student = [*ref.encoder.parameters(), *ref.projector.parameters(), ref.prototypes.weight]
    assert close([s[-1] for s in seen], replay(seen, student, loss_of, after_step), 1e-4)
    assert close(learn.model.centre[0], state['c'], 1e-4)
    assert same_weights(learn, ref, 'encoder', 'key_encoder')

def nearest(memory, z, i, k):
    "The rows of `memory`, pairs of an index and a row, that are most like `z` and not of image `i`"
    return sorted([r for j,r in memory if j!=i], key=lambda r: -float(r@z))[:k]

def test_nnclr(dls):
    "After the pseudocode of the paper, image by image; the memory is a list that forgets the images of itself"
    learn,ref,seen = kept(dls, NNCLR(K=128, hidden=64, predictor_hidden=32, dim=16, temperature=.3))
    memory,ids,steps = [],learn.keep_views.ids,iter(range(len(seen)))
    def loss_of(*views):
        i = ids[next(steps)].tolist()
        z1,z2 = [ref.projector(ref.encoder(v)) for v in views]
        p1,p2 = [unit(ref.predictor(z)) for z in (z1, z2)]
        def one_way(z, p):
            near = [(nearest(memory, r, j, 1) or [r])[0] for j,r in zip(i, unit(z).detach())]
            sims = (torch.stack(near)@p.T/.3).exp()
            return -(sims.diag()/sims.sum(1)).log().mean()
        loss = (one_way(z1, p2) + one_way(z2, p1))/2
        memory.extend(zip(i, unit(z1).detach())); del memory[:-128]
        return loss
    trained = [p for m in (ref.encoder, ref.projector, ref.predictor) for p in m.parameters()]
    assert close([s[-1] for s in seen], replay(seen, trained, loss_of), 1e-3)
    assert same_weights(learn, ref, 'encoder')

def test_mean_shift(dls):
    "After the paper's Eq. 1, image by image: the target itself and what is nearest to it"
    learn,ref,seen = kept(dls, MeanShift(K=128, k=3, momentum=.9, hidden=64, dim=16))
    memory,ids,steps = [],learn.keep_views.ids,iter(range(len(seen)))
    def loss_of(v1, v2):
        i,p = ids[next(steps)].tolist(),unit(ref.predictor(ref.projector(ref.encoder(v1))))
        with torch.no_grad(): t = unit(ref.key_projector(ref.key_encoder(v2)))
        loss = 0
        for j,a,b in zip(i, p, t):
            near = torch.stack([b, *nearest([*memory, *zip(i, t)], b, j, 2)])
            loss = loss + (a-near).pow(2).sum(1).mean()/len(p)
        memory.extend(zip(i, t)); del memory[:-128]
        return loss
    def after_step(i):
        for n in 'encoder','projector': move(getattr(ref, f'key_{n}'), getattr(ref, n), .9)
    trained = [p for m in (ref.encoder, ref.projector, ref.predictor) for p in m.parameters()]
    assert close([s[-1] for s in seen], replay(seen, trained, loss_of, after_step), 1e-3)
    assert same_weights(learn, ref, 'encoder', 'key_encoder')

def test_lewel(dls):
    "Image by image and map by map, with convolutions where the method has linear layers, and a momentum that rises"
    H,K,scale,share = 2,12,.1,.3
    method = LEWEL(momentum=.5, hidden=32, dim=K, n_heads=H, scale=scale, share=share)
    dls.train.rng = random.Random(0) # a ReLU near zero may differ between float32 and float64
    learn,ref,seen = kept(dls, method, side=1)
    assert learn.model.layer[:2]==('body.0', 15)
    def mlp(head, x): # of (B, C, n)
        first,bn,_,last = head
        x = nn.functional.conv1d(x, first.weight[...,None])
        x = (x-x.mean((0,2), keepdim=True))/(x.var((0,2), correction=0, keepdim=True)+bn.eps)**.5
        x = (x*bn.weight[:,None]+bn.bias[:,None]).clamp(min=0)
        return nn.functional.conv1d(x, last.weight[...,None], last.bias)
    def aligned(x, out): # (C, S) and (K, S) of one image
        maps,C = (out/out.norm(dim=0)/scale).exp(),len(x)
        maps = maps/maps.sum(1, keepdim=True)
        return torch.stack([torch.cat([x[h*C//H:(h+1)*C//H]@maps[h*K//H+k] for h in range(H)]) for k in range(K//H)], 1)
    def embed(v, copy=''):
        f,g,a = [getattr(ref, copy+n) for n in ('encoder','projector','aligned_projector')]
        x = f.body[0]((v-f.mean)/f.std).flatten(2)
        out = mlp(g, torch.cat([x.clamp(min=0).mean(2, keepdim=True), x], 2)) # a ReLU follows the map
        return out[...,:1], mlp(a, torch.stack([aligned(i, o) for i,o in zip(x, out[...,1:])]))
    def far(p, t): return 2 - 2*(p/p.norm(dim=1, keepdim=True)*t/t.norm(dim=1, keepdim=True)).sum(1).mean()
    def loss_of(*views):
        with torch.no_grad(): targets = [embed(v, 'key_') for v in views]
        loss = 0
        for v,(t,u) in zip(views, targets[::-1]):
            g,a = embed(v)
            loss = loss + share*far(mlp(ref.predictor, g), t) + (1-share)*far(mlp(ref.aligned_predictor, a), u)
        return loss
    def after_step(i):
        for n in 'encoder','projector','aligned_projector':
            move(getattr(ref, f'key_{n}'), getattr(ref, n), rising(.5, i, len(seen)))
    online = [p for n,p in ref.named_parameters() if not n.startswith('key_')]
    assert close([s[-1] for s in seen], replay(seen, online, loss_of, after_step), 1e-3)
    assert same_weights(learn, ref, 'encoder', 'key_encoder')
    for n in 'aligned_predictor','aligned_projector','key_aligned_projector':
        assert close(getattr(learn.model, n)[-1].weight, getattr(ref, n)[-1].weight, 1e-3), n

@pytest.mark.parametrize('method', [NNCLR(hidden=64, predictor_hidden=32, dim=16), MeanShift(hidden=64, dim=16)])
def test_neighbours_in_bfloat16_and_of_a_batch_without_indices(dls, method):
    "Losses are float32; what was seen has no index where nobody knows the batch"
    learn = ssl_learner(dls, small(), method); m = learn.model
    m.enqueue(torch.randn(40,16), torch.arange(40))
    with torch.autocast('cpu', torch.bfloat16): loss = learn.ssl.loss(*m(*torch.rand(2,8,3,32,32)))
    assert loss.dtype==torch.float32 and loss.isfinite()

def test_neighbours_are_looked_for_in_float32(dls):
    "Under autocast, too: of cosines that differ in the fourth digit, the same is the highest"
    m = QueueModel(nn.Identity(), nn.Identity()); m.add_queue(256, 32)
    m.enqueue(torch.randn(1,32) + .1*torch.randn(256,32), torch.arange(256)); z = m.queue[:64] + .01*torch.randn(64,32)
    want = (unit(z)@m.queue.double().T).argmax(1)
    with torch.autocast('cpu', torch.bfloat16): _,entries,ids = m.neighbours(z)
    assert ids[:,0].equal(want) and entries[:,0].equal(m.queue[want])

@pytest.mark.parametrize('make', [lambda: MeanShift(k=2.5), lambda: MeanShift(k=0)])
def test_a_number_of_neighbours_that_is_none(make):
    with pytest.raises(InputError, match='whole number of neighbours'): make()

@pytest.mark.parametrize('method', [NNCLR(K=0), NNCLR(K=10.5), MeanShift(K=-1)])
def test_a_length_of_the_queue_that_is_none(dls, method):
    with pytest.raises(InputError, match='cannot have the length'): ssl_learner(dls, small(), method)

def test_an_empty_queue_has_no_purity():
    m = QueueModel(nn.Identity(), nn.Identity()); m.add_queue(4, 2)
    assert math.isnan(m.purity(torch.zeros(3, dtype=torch.long)))

def test_purity_by_loops():
    m = QueueModel(nn.Identity(), nn.Identity()); m.add_queue(32, 4)
    m.enqueue(torch.randn(20,4), torch.arange(20)%12); y = torch.randint(0, 3, (12,))
    own,rows,same = m.queue_ids[:20].tolist(),m.queue[:20].double(),[]
    for i,a in zip(own, rows):
        near = sorted([j for j in range(20) if own[j]!=i], key=lambda j: -float(a@rows[j]))[:3]
        same += [int(y[own[j]]==y[i]) for j in near]
    assert close(m.purity(y, k=3), sum(same)/len(same), 1e-6) and close(m.purity(y, k=3, bs=3), m.purity(y, k=3), 1e-6)

@pytest.mark.parametrize('name', small_methods)
def test_nothing_is_lost_by_saving(dls, tmp_path, name):
    "Saved and loaded, queue, target and centre included, the next losses are the same to the bit"
    set_seed(3)
    def learner(): return ssl_learner(dls, small(side_for(name)), small_methods[name](), path=tmp_path)
    a = quietly(learner()); a.save('half_way')
    b = learner(); b.create_opt(); b.load('half_way')
    assert next_losses(a)==next_losses(b)

# MoCo v2

def test_mocov2_explains_its_loss_with_its_queue(dls):
    l = ssl_learner(dls, small(), MoCoV2(K=128)); z,b = torch.randn(2,5,128); p = unit(l.model.projector(z))
    logits = torch.cat([(p*unit(b)).sum(1, keepdim=True), p@l.model.queue.double().T], 1)/.2
    assert close(l.ssl.saliency()(z, b), -logits.log_softmax(1)[:,0].sum(), 1e-4)

def test_pictures_take_a_part_of_a_long_queue(dls):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); l = ssl_learner(dls, small(), MoCoV2(K=2000))
    assert saliency_for_pictures(l.ssl.saliency(), None).negatives.equal(l.model.queue[:1024])

@pytest.mark.parametrize('method', [MoCoV2, Contrast])
def test_gradients_of_the_saliency_are_each_images_own(dls, method):
    "It is a sum over images: what stands beside an image in the batch changes nothing"
    l = ssl_learner(dls, small(), method()); l.yb = (torch.arange(4),)
    z,key = torch.randn(4,128,requires_grad=True),torch.randn(4,128)
    g = torch.autograd.grad(l.ssl.saliency()(z, key), z)[0]
    z2 = torch.cat([z[:1].detach(), torch.randn(3,128)]).requires_grad_()
    assert close(g[0], torch.autograd.grad(l.ssl.saliency()(z2, key), z2)[0][0])

def test_same_image_is_no_negative(dls):
    "With every index the same, no negative is left"
    learn = ssl_learner(dls, small(), MoCoV2(mask_same_image=True))
    learn.yb = (torch.zeros(4, dtype=torch.long),); learn.model.queue_ids.zero_()
    assert close(learn.ssl.loss(torch.randn(4,128), torch.randn(4,128)), 0., 1e-6)

def test_queue_moves_with_each_batch_under_gradient_accumulation(dls):
    "And the key encoder only with a step"
    class Count(Callback):
        n = 0
        def after_step(self): self.n += 1
    learn = quietly(ssl_learner(dls, small(), MoCoV2(K=192), cbs=[GradientAccumulation(128), Count()]))
    assert (learn.count.n, learn.model.ptr.item())==(2, 256%192)

def test_queue_shorter_than_a_batch_keeps_the_last_keys():
    m = MoCoModel(small(), MLPHead(128,128,16), 16, 8)
    m.enqueue(torch.randn(20,16), torch.arange(20))
    assert sorted(m.queue_ids.tolist())==list(range(12,20))

def test_queue_before_any_key_has_come():
    "It holds random unit vectors; keys without an index are nobody's, and no gradient stays with them"
    m = MoCoModel(small(), MLPHead(128,128,16), 16, 8)
    assert close(m.queue.norm(dim=1), torch.ones(8))
    m.queue_ids.zero_(); m.enqueue(torch.randn(3,16, requires_grad=True)*2)
    assert (m.queue_ids.tolist(), m.queue.requires_grad)==([-1]*3+[0]*5, False)

def test_mocov2_in_bfloat16():
    m = MoCoModel(small(), MLPHead(128,128,16), 16, 8)
    with torch.autocast('cpu', torch.bfloat16): out = m(*torch.rand(2,4,3,32,32))
    assert info_nce(*out, m.queue).isfinite()

def test_one_epoch_fills_the_queue_with_each_image_once(dls):
    m = quietly(ssl_learner(dls, small(), MoCoV2()), 2).model
    assert m.ptr.item()==2*256%256
    assert set(m.queue_ids.tolist())==set(range(256))
    assert close(m.queue.norm(dim=1), torch.ones(256))

def test_length_of_the_queue(dls):
    def data(n, bs): return SimpleNamespace(train_ds=range(n), train=SimpleNamespace(bs=bs))
    built = [len(MoCoV2(dim=2).build(small(), d).queue) for d in (data(200_000, 1), dls, data(100, 64))]
    assert built==[65536, 256, 64]

def own_key_share(K, n, epochs=400):
    "How often one of the last `K` images is the next one, in epochs of `n` images in random order"
    g = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(n, generator=g) for _ in range(epochs)]).tolist()
    return sum(o in order[i-K:i] for i,o in enumerate(order) if i>=2*n)/(len(order)-2*n)

@pytest.mark.parametrize('K,words', [(1024,'100%'), (256,'50%'), (192,'28%')])
def test_a_queue_with_keys_of_the_image_itself_is_warned_of(K, words, dls):
    "From half of the 256 images on, if somebody asks for it; the share is that of a simulation"
    with pytest.warns(UserWarning, match=f'in {words} of the cases') as w: MoCoV2(K=K).build(small(), dls)
    assert len(w)==1 and abs(own_key_share(K//8, 32)-int(words[:-1])/100)<.03
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for m in MoCoV2(K=K, mask_same_image=True), MoCoV2(K=128), MoCoV2(): m.build(small(), dls)

def test_keys_are_shuffled_by_default():
    assert {inspect.signature(o).parameters['shuffle_bn'].default for o in (MoCoV2,MoCoModel)}=={True}

# SimSiam

def test_simsiam_compares_pairs_as_it_compares_views(dls):
    l = ssl_learner(dls, small(), SimSiam(64,16)); g,h = l.model.projector.eval(),l.model.predictor.eval()
    a,b,z = torch.randn(3,5,128); out = [torch.randn(5,64) for _ in range(4)]
    def near(a, b): return -(unit(a)*unit(b)).sum(1)
    e = l.ssl.saliency()
    assert close(e(z, out[e.answer]), near(h(g(z)), out[3]).sum(), 1e-4)
    assert close(l.ssl.pair_loss(a, b), (near(h(g(a)), g(b)) + near(h(g(b)), g(a))).mean()/2, 1e-4)
    assert close(l.ssl.view_loss(out, z), (near(out[0], g(z)) + near(h(g(z)), out[2])).mean()/2, 1e-4)
    assert close(e.head(z), h(g(z)), 1e-6)
    assert close(e.key_head(z), g(z), 1e-6)

def test_heads_of_simsiam(dls):
    "Three layers, with a batch norm behind the last one too, and two with a bottleneck (SimSiam, section 3)"
    m = SimSiam(64,16).build(small(), dls)
    linear = [o for o in m.projector if isinstance(o, nn.Linear)]
    assert [(o.in_features, o.out_features) for o in linear]==[(128,64),(64,64),(64,64)]
    assert [sum(isinstance(l, nn.BatchNorm1d) for l in o) for o in (m.projector, m.predictor)]==[3,1]
    assert [isinstance(o[-1], nn.BatchNorm1d) for o in (m.projector, m.predictor)]==[True,False]
    assert [inspect.signature(SimSiam).parameters[o].default for o in ('dim','bottleneck')]==[2048,512]

# BYOL and DINO

def test_byol_pairs_give_the_target_no_gradient(dls):
    "And the network some; half precision comes out as float32"
    learn = ssl_learner(dls, small(), BYOL(hidden=64, dim=16)); z1,z2 = torch.randn(2,8,128)
    learn.ssl.pair_loss(z1, z2).backward()
    assert {p.grad is None for n,p in learn.model.named_parameters() if n.startswith('key_')}=={True}
    assert all(p.grad.abs().sum()>0 for p in learn.model.predictor.parameters())
    with torch.autocast('cpu', torch.bfloat16): loss = learn.ssl.loss(*learn.model(*torch.rand(2,8,3,32,32)))
    assert loss.dtype==torch.float32

def test_prototypes_stand_still_in_the_first_epoch(dls):
    learn = ssl_learner(dls, small(), DINO(K=32, n_local=0, hidden=64, dim=16))
    w = learn.model.prototypes.weight.detach().clone()
    quietly(learn, 1, .05); assert learn.model.prototypes.weight.equal(w)
    quietly(learn, 2, .05); assert not learn.model.prototypes.weight.equal(w)

def test_encoder_of_fixed_size_gets_small_crops_of_that_size(dls):
    "A teacher learns nothing by gradient; logits and loss are float32 under autocast"
    learn = ssl_learner(dls, 'timm/test_vit', DINO(K=32, n_local=1, hidden=64, dim=16))
    assert [v.shape[-1] for v in learn.ssl.views(torch.rand(2,3,32,32))]==[32]*3
    z1,z2 = torch.randn(2, 8, num_features(learn.model.encoder))
    learn.ssl.pair_loss(z1, z2).backward()
    assert {p.grad is None for n,p in learn.model.named_parameters() if n.startswith('key_')}=={True}
    assert learn.model.prototypes.weight.grad.abs().sum()>0
    with torch.autocast('cpu', torch.bfloat16): out = learn.model(*torch.rand(3,8,3,32,32)); loss = learn.ssl.loss(*out)
    assert (out[0].dtype, loss.dtype)==(torch.float32,)*2

# LEWEL

def lewel(**kw): return LEWEL(**(dict(hidden=32, dim=16) | kw))

@pytest.mark.parametrize('kw,words', [(dict(n_heads=3), '16 alignment maps cannot be split into 3 heads'),
    (dict(n_heads=0), 'into 0 heads'), (dict(n_heads=16), '8 channels cannot be split into 16 heads')])
def test_heads_of_lewel_that_do_not_divide(dls, kw, words):
    with pytest.raises(InputError, match=words): ssl_learner(dls, small(1), lewel(**kw))

@pytest.mark.parametrize('arch,words', [(small(), '8 channels and its features 128'),
    (Encoder(nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 8)), 8, size=32), 'no feature map'),
    ('timm/test_byobnet', 'take larger images')])
def test_lewel_needs_a_map_as_wide_as_its_features(dls, arch, words):
    with pytest.raises(InputError, match=words): ssl_learner(dls, arch, lewel())

@pytest.mark.parametrize('arch', ['resnet18', 'timm/test_vit', 'timm/test_convnext', 'densenet121'])
def test_lewel_on_networks_of_all_kinds(items, arch):
    "Features are the encoder's own, and every part that is to learn gets a gradient; batches of two are enough"
    learn = ssl_learner(ssl_dls(items, size=64, bs=2), arch, lewel()); m,x = learn.model,torch.rand(2,2,3,64,64)
    learn.ssl.loss(*m(*x)).backward()
    none = {n.split('.')[0] for n,p in m.named_parameters() if p.requires_grad and p.grad is None}
    assert not none and all(p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)
    m.eval(); m(*x)
    assert close(m.last_features, m.encoder(x[0]), 1e-5)
    last = {n:int(l.num_batches_tracked) for n,l in m.named_modules() if n in ('projector.1','key_projector.1')}
    assert set(last.values())=={2} # once for each view

def test_map_and_feature_are_of_one_pass(dls):
    "Of a network with dropout in it, too, and through a network that was compiled"
    body = nn.Sequential(nn.Conv2d(3,8,3,2), nn.Dropout(.5), nn.Conv2d(8,8,1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learn = ssl_learner(dls, Encoder(body, 8), lewel(), compile=dict(backend='eager')); m = learn.model.train()
    seen = []
    hook = m.projector.register_forward_pre_hook(lambda _, x: seen.append(x[0].unflatten(0, (4,-1))))
    m(*torch.rand(2,4,3,32,32)); hook.remove()
    assert len(seen)==2 and all(close(rows[:,0], rows[:,1:].mean(1)) for rows in seen)

def test_lewel_in_bfloat16_and_with_views_of_two_sizes(dls):
    learn = ssl_learner(dls, small(1), lewel())
    with torch.autocast('cpu', torch.bfloat16):
        loss = learn.ssl.loss(*learn.model(torch.rand(8,3,32,32), torch.rand(8,3,48,48)))
    loss.backward()
    assert loss.dtype==torch.float32 and all(p.grad.isfinite().all() for p in learn.model.projector.parameters())

@pytest.mark.parametrize('x', [torch.zeros(4,3,64,64), torch.rand(4,3,1,1).expand(4,3,64,64)])
def test_lewel_of_images_of_one_colour(items, x):
    "All the same, and each another"
    set_seed(0)
    learn = ssl_learner(ssl_dls(items, size=64, bs=4), 'timm/test_byobnet', lewel())
    loss = learn.ssl.loss(*learn.model(x, x)); loss.backward()
    assert loss.isfinite() and all(p.grad.abs().max()<1e3 for p in learn.model.parameters() if p.grad is not None)

def test_pairs_of_lewel_are_those_of_byol(dls):
    "By the loss of features alone, and without a gradient for the target"
    learn = ssl_learner(dls, small(1), lewel()); m = learn.model.eval(); z1,z2,z3 = torch.randn(3,5,8)
    def apart(p, t): return (unit(p)-unit(t)).pow(2).sum(1).mean()
    p1,p2 = [m.predictor(m.projector(z)) for z in (z1, z2)]; t1,t2 = [m.key_projector(z) for z in (z1, z2)]
    assert close(learn.ssl.pair_loss(z1, z2), apart(p1, t2) + apart(p2, t1), 1e-5)
    out = m(*torch.rand(2,5,3,32,32)); p3,t3 = m.predictor(m.projector(z3)),m.key_projector(z3)
    assert close(learn.ssl.view_loss(out, z3), apart(out[0], t3) + apart(p3, out[2]), 1e-5)
    e = learn.ssl.saliency(); assert close(e(z1, t2), -(unit(p1)*unit(t2)).sum(), 1e-4)

def test_the_table_of_lewel_has_both_halves(dls):
    recorder = quietly(ssl_learner(dls, small(1), lewel(share=0))).recorder
    values = dict(zip(recorder.metric_names[1:], recorder.values[-1]))
    assert close(values['aligned_loss'], values['ssl_loss'], 1e-6)
