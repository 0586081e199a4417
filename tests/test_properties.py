"""What must hold for every input: hypothesis looks for one for which it does not

Tensors come from three kinds of numbers: random ones, small whole numbers (many ties), and random ones over twenty
orders of magnitude."""
import numpy as np, torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from torch import nn
from fgsynth.evaluate.retrieval import knn, nearest, retrieval
from fgsynth.nets.losses import distill, info_nce, neg_cosine, nt_xent
from fgsynth.nets.heads import MLPHead
from fgsynth.synth.perturb import FeatureBank, MODES, NORMS, cam_scores, low_variance
from fgsynth.synth.perturb import min_max, noise_std, normalize, perturb
from fgsynth.methods.mocov2 import MoCoModel
from fgsynth.methods.base import SSLModel, feat_std

settings.register_profile('always the same', derandomize=True, deadline=None, max_examples=60)
settings.load_profile('always the same')

n,d,seed,kind = st.integers(1, 12), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from(['random','ties','wide'])

def numbers(shape, seed, kind='random'):
    g = torch.Generator().manual_seed(seed); x = torch.randn(shape, generator=g)
    if kind=='ties': return x.mul(1.5).round()
    return x*10**torch.empty(shape[:1]+(1,)*(len(shape)-1)).uniform_(-10, 10, generator=g) if kind=='wide' else x

def unit(x): return F.normalize(x.double(), dim=-1)
def close(a, b, tol=1e-5):
    a,b = torch.as_tensor(a).double(),torch.as_tensor(b).double()
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)

# losses

@given(n, d, n, seed, st.sampled_from([.07,.2,1.]), kind)
def test_info_nce(b, m, k, seed, t, kind):
    q,key,queue = numbers((b,m), seed, kind), numbers((b,m), seed+1, kind), unit(numbers((k,m), seed+2)).float()
    got = info_nce(q, key, queue, t, reduction='none')
    u,v = unit(q),unit(key)
    want = torch.logsumexp(torch.cat([(u*v).sum(1, keepdim=True), u@queue.double().T], 1)/t, 1) - (u*v).sum(1)/t
    close(got, want, 1e-4)
    assert (got>=0).all()
    other = info_nce(q*3.7, key*.2, queue[torch.randperm(k)], t, reduction='none')
    close(got, other, 1e-4) # lengths and the order of the queue do not matter
    mask = torch.rand(b, k)<.5
    assert (info_nce(q, key, queue, t, mask, 'none')<=got+1e-5).all() # fewer negatives, less loss
    close(info_nce(q, key, queue, t, reduction='sum'), got.sum(), 1e-4)

@given(st.integers(2, 12), d, seed, st.sampled_from([.07,.2,1.]), kind)
def test_nt_xent(b, m, seed, t, kind):
    x,y = numbers((b,m), seed, kind), numbers((b,m), seed+1, kind)
    got = nt_xent(x, y, t, 'none')
    e = unit(torch.cat([x,y])); want = []
    for i in range(2*b):
        s = (e[i]@e.T)/t
        want.append(torch.logsumexp(torch.cat([s[:i],s[i+1:]]), 0) - s[(i+b)%(2*b)])
    close(got, torch.stack(want), 1e-4)
    perm = torch.randperm(b)
    close(nt_xent(y, x, t), got.mean(), 1e-4); close(nt_xent(x[perm], y[perm], t), got.mean(), 1e-4)

@given(n, d, seed, kind)
def test_neg_cosine_and_distill(b, m, seed, kind):
    p,z = numbers((b,m), seed, kind).requires_grad_(), numbers((b,m), seed+1, kind).requires_grad_()
    l = neg_cosine(p, z, 'none')
    close(l, -(unit(p)*unit(z)).sum(1), 1e-4); assert (l.abs()<=1+1e-5).all()
    l.sum().backward(); assert z.grad is None and p.grad.isfinite().all()
    q,k = numbers((b,m), seed), numbers((b,m), seed+1)
    least = distill(k*.1/.04, k, reduction='none') # of a student that agrees: the teacher's entropy
    kl = distill(q, k, reduction='none') - least
    assert (kl>=-1e-4).all()

# perturb

@given(n, d, seed, kind)
def test_min_max(b, m, seed, kind):
    x = numbers((b,m), seed, kind); s = min_max(x)
    assert (s>=0).all() and (s<=1).all() and s.isfinite().all()
    close(s, min_max(s), 1e-5)
    lo,hi = x.double().amin(1, keepdim=True), x.double().amax(1, keepdim=True)
    close(s, torch.where(hi>lo, (x-lo)/(hi-lo), 0.), 1e-5)

@given(n, d, seed, kind, st.sampled_from(NORMS))
def test_normalize_keeps_the_order(b, m, seed, kind, how):
    x = numbers((b,m), seed, kind).relu(); s = normalize(x, how)
    assert (s>=0).all() and (s<=1).all() and s.isfinite().all()
    i = x.argsort(1); s_sorted = s.gather(1, i)
    assert (s_sorted.diff(dim=1)>=-1e-6).all()
    if how!='batch': assert torch.equal(normalize(x[:1], how), s[:1]) # an image is scaled by itself alone

@given(n, d, seed, st.sampled_from(['-loss','loss','abs']))
def test_cam_scores(b, m, seed, target):
    "Gradient times feature of a loss with a gradient that is known, row by row"
    z,w = numbers((b,m), seed).requires_grad_(), numbers((m,m), seed+1)
    s = cam_scores(((z@w)**2).sum(), z, target)
    g = 2*(z.detach().double()@w.double()@w.double().T)*z.detach().double()
    close(s, g.abs() if target=='abs' else (-g if target=='-loss' else g).clamp(min=0), 1e-3)
    alone = z.detach()[:1].clone().requires_grad_()
    close(cam_scores(((alone@w)**2).sum(), alone, target), s[:1], 1e-3)

@given(st.integers(1, 20), d, st.lists(st.integers(1, 30), max_size=6), seed, kind)
def test_bank_holds_the_newest(size, m, batches, seed, kind):
    bank,seen,ids = FeatureBank(size, m), torch.empty(0, m), []
    for i,b in enumerate(batches):
        z = numbers((b,m), seed+i, kind); new = torch.arange(len(ids), len(ids)+b)
        bank.add(z, new); seen = torch.cat([seen, z])[-size:]; ids += new.tolist()
    have = bank.ids>=0
    assert sorted(bank.ids[have].tolist())==ids[-size:] and len(bank)==len(seen)
    if not len(seen): assert not bank.std().any(); return
    row = {j:i for i,j in enumerate(ids[-size:])}
    mine = seen[[row[j] for j in bank.ids[have].tolist()]]
    close(bank.feats[have], unit(mine))
    torch.testing.assert_close(bank.norms[have], mine.norm(dim=1), rtol=1e-5, atol=0)
    close(bank.std(), unit(mine).numpy().std(0), 1e-4)
    assert bool(bank.ready())==(len(batches)>=2)

@given(st.integers(200, 400), st.integers(2, 9), seed, st.sampled_from(MODES), st.floats(0, 5), st.floats(0, 5))
def test_noise_has_the_size_that_is_said(b, m, seed, mode, sc, sv):
    g = torch.Generator().manual_seed(seed)
    s_hat,v = torch.rand(m, generator=g).expand(b, m), torch.rand(m, generator=g)
    mask,v_hat,z = low_variance(v, v.median()),min_max(v),numbers((b,m), seed+1)
    p = perturb(z, s_hat, v_hat, mask, sigma_cam=sc, sigma_var=sv, mode=mode, unit=.5, generator=g)
    std = noise_std(s_hat, v_hat, mask, .5*sc, .5*sv, mode)[0]
    close(p.z - z, p.noise, 1e-4)
    assert ((p.noise.pow(2).mean(0).sqrt() - std).abs() <= 6*std/(2*b)**.5 + 1e-6).all() # six standard errors
    assert not p.n_var[:,~mask].any() and not p.noise[:,std==0].any()
    total = {k:noise_std(s_hat, v_hat, mask, sc, sv, k).pow(2).mean() for k in ('both','random')}
    close(total['both'], total['random'], 1e-4) # the control spends the same energy

# models

@given(st.integers(1, 20), d, st.lists(st.integers(1, 30), max_size=6), seed)
def test_queue_holds_the_newest(K, m, batches, seed):
    model = MoCoModel(nn.Linear(2, 2), MLPHead(2, 2, m), m, K); start,all_ids = model.queue.clone(),[]
    keys = torch.empty(0, m)
    for i,b in enumerate(batches):
        k = numbers((b,m), seed+i); new = torch.arange(len(all_ids), len(all_ids)+b)
        model.enqueue(k, new); all_ids += new.tolist(); keys = torch.cat([keys, unit(k).float()])
    have = model.queue_ids>=0
    assert sorted(model.queue_ids[have].tolist())==all_ids[-K:] and int(model.ptr)==len(all_ids)%K
    if have.any(): close(model.queue[have], keys[model.queue_ids[have]])
    assert torch.equal(model.queue[~have], start[~have])

@given(st.floats(0, 1), st.integers(1, 5), seed)
def test_slow_copies_follow(m, steps, seed):
    torch.manual_seed(seed)
    model = SSLModel(nn.Linear(3, 2), nn.Linear(2, 2)); model.slow_copies('encoder','projector')
    want = model.encoder.weight.detach().double().clone()
    for _ in range(steps):
        nn.init.normal_(model.encoder.weight); model.follow(m)
        want = m*want + (1-m)*model.encoder.weight.detach().double()
    close(model.key_encoder.weight, want)

@given(st.integers(2, 20), d, seed)
def test_feat_std_sees_collapse(b, m, seed):
    z = numbers((b,m), seed)
    close(feat_std(z), unit(z).numpy().std(0).mean()*m**.5, 1e-4)
    assert feat_std(z[:1].expand(b, m))<1e-3

# evaluate

def by_hand(z, y, g=None, gy=None):
    "Rank-1, rank-5 and mAP the slow way; ties are decided against the right image"
    z = unit(z); own = g is None; g,gy = (z,y) if own else (unit(g),gy)
    res = []
    for i in range(len(z)):
        s = (z[i]@g.T).float()
        def place(j): return -round(float(s[j])*2**22), int(gy[j]==y[i])
        order = sorted((j for j in range(len(g)) if not (own and i==j)), key=place)
        hit = np.array([int(gy[j]==y[i]) for j in order])
        if hit.sum(): res.append((hit[0], hit[:5].any(), (hit*hit.cumsum()/np.arange(1, len(hit)+1)).sum()/hit.sum()))
    return 100*np.mean(res, 0) if res else None

@given(st.integers(2, 25), d, st.integers(1, 4), seed, kind, st.booleans(), st.sampled_from([None, 1, 7]))
def test_retrieval(b, m, c, seed, kind, own, bs):
    z,y = numbers((b,m), seed, kind), torch.randint(c, (b,), generator=torch.Generator().manual_seed(seed))
    assume(kind!='wide' or z.norm(dim=1).min()>0)
    gen = torch.Generator().manual_seed(seed+1)
    other = () if own else (numbers((17,m), seed+1, kind), torch.randint(c, (17,), generator=gen))
    want = by_hand(z, y, *other)
    assume(want is not None)
    got = retrieval(z, y, *other, bs=bs)
    assert 0<=got['rank1']<=got['rank5']<=100 and got['queries']+got['skipped']==b
    if m==1 or kind!='ties': # else equal cosines are told apart by rounding
        close([got['rank1'],got['rank5'],got['map']], want, 1e-3)
    perm = torch.randperm(b)
    if own and m>1 and kind=='random': # the order of the images does not matter
        close(retrieval(z[perm], y[perm])['map'], got['map'], 1e-6)

@given(st.integers(2, 20), st.integers(2, 9), st.integers(1, 12), seed)
def test_nearest_and_knn(b, m, k, seed):
    z,g = numbers((b,m), seed), numbers((15,m), seed+1)
    s,i = nearest(z, g, k)
    close(s, (unit(z)@unit(g).T).topk(min(k, 15), 1).values, 1e-4)
    close((unit(z)[:,None]*unit(g)[i]).sum(2), s, 1e-4)
    y = torch.arange(15)%3
    assert knn(g, y, g, y, k=1)==100 # each is its own nearest neighbour
