"What an encoder has learned, as numbers: each measure against a slow or independent way to the same result"
import inspect, math, warnings
from unittest import mock
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback # which brings `no_bar`
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import set_seed
from fastcore.test import test_close as check_close, test_eq as check_eq
from PIL import Image
from torch import nn
from torchvision.transforms import RandomResizedCrop
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.finches import finches
from fgsynth.data.items import Items, label_fraction
from fgsynth.data.loaders import ssl_dls
from fgsynth.evaluate.features import check_features, features, labelled_split, split_features
from fgsynth.nets.networks import encoder_device
from fgsynth.evaluate.classifier import classifier_learner
from fgsynth.evaluate.measures import evaluate
from fgsynth.evaluate.probe import Probe, fit_probe, fresh_crops, linear_probe, probe_features, probe_lr, top_k
from fgsynth.evaluate.retrieval import knn, nearest, neighbour_vote, retrieval
from fgsynth.nets.encoders import create_encoder

def defaults(f, *names): return [inspect.signature(f).parameters[n].default for n in names]

@pytest.fixture(scope='module')
def birds(): return finches(n=600, size=32, n_species=4, seed=0)

@pytest.fixture(scope='module')
def images(birds): return birds.images

@pytest.fixture(scope='module')
def labels(birds): return birds.labels.long()

@pytest.fixture(scope='module')
def encoder():
    set_seed(0)
    return create_encoder('timm/test_byobnet')

@pytest.fixture(scope='module')
def z(encoder, images): return features(encoder, images)

@pytest.fixture(scope='module')
def few(images): return images[:40]

@pytest.fixture(scope='module')
def small(few, labels, birds): return Items('few', few[:20], few[20:], labels[:20], labels[20:40], birds.species)

@pytest.fixture(scope='module')
def items(images, labels, birds):
    return Items('finches', images[:120], images[120:220], labels[:120], labels[120:220], birds.species)

@pytest.fixture(scope='module')
def clouds():
    "Four clouds of points in ten dimensions, far apart"
    set_seed(0)
    y = torch.arange(4).repeat(50)
    return 4*torch.eye(4)[y] @ torch.randn(4, 10) + 0.3*torch.randn(200, 10), y

@pytest.fixture(scope='module')
def casts(images):
    "Finches in four colour casts, which an untrained encoder tells apart"
    c = torch.arange(400)%4
    gain = torch.tensor([[1,1,1], [1,.65,.65], [.65,1,.65], [.65,.65,1]])[c][:,:,None,None]
    x = (images[:400]*gain).to(torch.uint8)
    return Items('casts', x[:200], x[200:], c[:200], c[200:], ['none','red','green','blue'])

def write_images(folder, images):
    paths = [folder/f'{i}.png' for i in range(len(images))]
    for p,a in zip(paths, images): Image.fromarray(a.permute(1,2,0).numpy()).save(p)
    return paths

# features

def test_features_do_not_depend_on_the_form_of_the_images(encoder, few, z, tmp_path):
    check_close(features(encoder, few, bs=7), z[:40], eps=1e-4)
    check_close(features(encoder, few.float()/255), z[:40], eps=1e-4)
    loader = torch.utils.data.DataLoader([(x.float()/255, 0) for x in few], batch_size=16)
    check_close(features(encoder, loader), z[:40], eps=1e-4)
    check_close(features(encoder, (b for b in few.split(16))), z[:40], eps=1e-4)     # whatever gives batches
    check_close(features(encoder, write_images(tmp_path, few[:5]), size=32), z[:5], eps=1e-4)

def test_features_leave_the_encoder_as_it_was(encoder, few):
    before = {k:v.clone() for k,v in encoder.state_dict().items()}
    modes = [m.training for m in encoder.modules()]
    features(encoder, few, size=40)
    check_eq([m.training for m in encoder.modules()], modes)
    assert encoder.training
    assert all(torch.equal(v, before[k]) for k,v in encoder.state_dict().items())
    assert not features(encoder, few).requires_grad

def test_features_move_the_encoder_only_when_asked(few):
    class Told(nn.Flatten):
        def to(self, device): told.append(device)
    told = []
    features(Told(), few); check_eq(told, [])
    features(Told(), few, device='cpu'); check_eq(told, ['cpu'])
    check_eq(encoder_device(Told()), torch.device('cpu'))

def test_features_say_what_is_missing(encoder, few, tmp_path):
    with pytest.raises(InputError, match='size'): features(encoder, write_images(tmp_path, few[:2]))
    with pytest.raises(InputError, match='no images'): features(encoder, [])
    loader = torch.utils.data.DataLoader(few, batch_size=16)
    with pytest.raises(InputError, match='cannot be shared out'): features(encoder, loader, distributed=True)

def ordered(few, **kw): return torch.utils.data.DataLoader([(x.float()/255, 0) for x in few], **{'batch_size':16, **kw})

class Backwards(torch.utils.data.Sampler):
    def __init__(self, n): self.n = n
    def __iter__(self): return iter(reversed(range(self.n)))
    def __len__(self): return self.n

def batches(ix, bs): return [ix[i:i+bs] for i in range(0, len(ix), bs)]

mixed = dict(
    shuffles=dict(shuffle=True), drops=dict(drop_last=True), backwards=dict(sampler=Backwards(40)),
    some=dict(sampler=torch.utils.data.SubsetRandomSampler(range(10))),
    twice=dict(sampler=torch.utils.data.WeightedRandomSampler([1.]*40, 40)),
    batches=dict(batch_size=1, batch_sampler=batches([*range(39,-1,-1)], 8)))

@pytest.mark.parametrize('kw', mixed.values(), ids=mixed)
def test_features_of_a_loader_out_of_order_are_refused(encoder, few, kw):
    with pytest.raises(InputError, match='whose features are whose'): features(encoder, ordered(few, **kw))

def test_features_of_a_loader_in_order(encoder, few, z):
    own = dict(batch_size=1, batch_sampler=batches([*range(40)], 7))
    for kw in {}, dict(batch_size=8, drop_last=True), own, dict(batch_size=40, num_workers=0):
        check_close(features(encoder, ordered(few, **kw)), z[:40], eps=1e-4)

def test_features_of_fastais_loaders(encoder, small, z, tmp_path):
    dls = ssl_dls(small, size=32, bs=16)
    with pytest.raises(InputError, match='whose features are whose'): features(encoder, dls.train)
    with pytest.raises(InputError, match='whose features are whose'): features(encoder, dls.train.new(shuffle=False))
    check_close(features(encoder, dls.train.new(shuffle=False, drop_last=False)), z[:len(small.train)], eps=1e-4)

def test_features_of_a_loader_that_cannot_read_a_file_are_refused(encoder, few, tmp_path):
    paths = write_images(tmp_path, few[:9]); paths[4].write_bytes(b'no picture')
    loader = ssl_dls(Items('files', paths, []), size=32, bs=4, cache=False, num_workers=0).train
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(InputError, match='hands out 8 of its 9 images'):
            features(encoder, loader.new(shuffle=False, drop_last=False))

def test_defaults_of_features_and_retrieval():
    check_eq(defaults(retrieval, 'distributed','bs'), [False, None])
    check_eq(defaults(features, 'distributed','bs'), [False, 256])

def test_split_without_an_unreadable_file(few, tmp_path):
    "A file that cannot be read is left out, and the labels stay with their images"
    paths = write_images(tmp_path, few[:6])
    paths[3].write_bytes(b'not an image')
    broken = Items('broken', paths, paths, torch.arange(6), torch.arange(6), list('abcdef'))
    with pytest.warns(UserWarning): x,y,good = labelled_split(broken, 'train', 32)
    check_eq(y.tolist(), [0,1,2,4,5]); check_eq(good.tolist(), y.tolist()); check_eq(x, few[y])
    items = Items('kept', paths[:3], [], torch.arange(3), None, list('abc'))
    assert labelled_split(items, 'train', 32)[0] is labelled_split(items, 'train', 32)[0] # decoded once

def test_split_at_a_size(few, labels, birds):
    wide = Items('wide', few[:,:,:30], few[:,:,:30], labels[:40], labels[:40], birds.species)
    check_eq(labelled_split(wide, 'train', None)[0].shape, (40,3,32,32))
    check_eq(labelled_split(wide, 'test', 40)[0].shape, (40,3,40,40))
    with pytest.raises(InputError, match='need a size'):
        labelled_split(Items('files', ['a.png'], [], torch.zeros(1), None, ['a']), 'train', None)

def test_features_of_a_split(encoder, small, labels, z):
    got,y = split_features(encoder, small, 'test')
    check_close(got, z[20:40], eps=1e-4); check_eq(y, labels[20:40])

def test_features_with_ragged_labels_are_refused(z, labels):
    with pytest.raises(InputError, match='should be'): check_features(z[0], labels)
    with pytest.raises(InputError, match='split is empty'): check_features(z[:0], labels[:0])

# linear probe

def by_torch(z, y, z_test, schedule, epochs=10, bs=64, seed=3):
    "The same training by PyTorch's own loss, optimizer and schedules, in float64, from batches in the same order"
    mu = z.double().mean(0); var = torch.linalg.svdvals(z.double()-mu)**2/len(z)
    def unit(o): return (o.double()-mu)/max(4*var[0], var.sum())**.5
    x,gen = unit(z),torch.Generator().manual_seed(seed)
    w,b = (torch.zeros(*s, dtype=torch.float64, requires_grad=True) for s in ((z.shape[1],4), (4,)))
    opt = torch.optim.SGD([w,b], 30., momentum=.9)
    s = torch.optim.lr_scheduler
    if schedule=='cosine': sched = s.CosineAnnealingLR(opt, epochs)
    else: sched = s.MultiStepLR(opt, [epochs*6//10, epochs*8//10])
    for _ in range(epochs):
        for i in torch.randperm(len(z), generator=gen).tensor_split(-(-len(z)//bs)):
            opt.zero_grad(); F.cross_entropy(x[i]@w + b*.5, y[i]).backward(); opt.step()
        sched.step()
    return (unit(z_test)@w + b*.5).detach().float()

@pytest.mark.parametrize('n,schedule', [(130,'cosine'), (130,'step'), (8,'cosine')]) # 8: fewer images than dimensions
def test_probe_trains_as_pytorch_would(clouds, n, schedule):
    z,y = clouds
    got = fit_probe(z[:n], y[:n], 4, epochs=10, bs=64, schedule=schedule, seed=3)(z).detach()
    check_close(got, by_torch(z[:n], y[:n], z, schedule), 2e-3)

def test_probe_does_not_mind_the_scale(clouds):
    z,y = clouds
    a,b = fit_probe(z, y, epochs=20),fit_probe(z*64, y, epochs=20)
    check_close(a(z).detach(), b(z*64).detach(), eps=1e-3)
    check_close(Probe(z*1e-3, 4).scale*1e3, Probe(z, 4).scale, 1e-5)

def test_probe_defaults_are_those_of_the_paper():
    "Appendix B.3; crops as torchvision's, which MoCo's main_lincls.py takes"
    check_eq(defaults(fit_probe, 'epochs','lr','momentum','bs','schedule','seed'), [100, 30., .9, 128, 'cosine', 0])
    check_eq(defaults(probe_lr, 'lr','schedule'), [30., 'cosine'])
    check_eq(defaults(top_k, 'k'), [1]); check_eq(defaults(probe_features, 'top5'), [False])
    check_eq(defaults(linear_probe, 'scale','ratio'), defaults(RandomResizedCrop, 'scale','ratio'))
    check_eq(defaults(fresh_crops, 'scale','ratio'), defaults(RandomResizedCrop, 'scale','ratio'))
    check_eq(defaults(linear_probe, 'pct','seed','epochs','lr','schedule','bs','augment','flip','top5','distributed'),
             [1., 0, 100, 30., 'cosine', 128, False, .5, False, False])

def test_probe_has_as_many_classes_as_labels_or_as_asked_for(clouds):
    z,y = clouds
    check_eq(fit_probe(z, y, epochs=1).bias.shape, (4,)); check_eq(fit_probe(z, y, 9, epochs=1).bias.shape, (9,))
    with mock.patch('fgsynth.evaluate.probe.fit_probe', wraps=fit_probe) as fit:
        for kw in {}, dict(n_classes=20): check_eq(probe_features(z, y, z[:4], torch.tensor([0,1,2,9]), **kw), 75.)
    check_eq([o.kwargs['n_classes'] for o in fit.call_args_list], [10,20])
    check_eq(probe_features(z, y, z, y, n_classes=20), 100.)

@pytest.mark.parametrize('kw', [dict(epochs=0), dict(bs=0)])
def test_probe_refuses_to_train_on_nothing(clouds, kw):
    with pytest.raises(InputError, match='at least 1'): fit_probe(*clouds, **kw)

def test_probe_with_single_images_stays_finite(clouds):
    assert fit_probe(*clouds, epochs=1, bs=1).weight.isfinite().all()

def test_probe_names_what_is_wrong_with_features(clouds):
    z,y = clouds
    wrong = (z[0],y,z,y,'training features have the shape'), (z,y,z,y[1:],'test features have the shape'), \
            (z[:0],y[:0],z,y,'no training features')
    for z_,y_,zt,yt,said in wrong:
        with pytest.raises(InputError, match=said): probe_features(z_, y_, zt, yt)
    with pytest.raises(InputError, match='not finite'): probe_features(torch.full_like(z, float('nan')), y, z, y)
    with pytest.raises(InputError, match='schedule'): probe_features(z, y, z, y, schedule='cosin')

def test_top_1_and_top_5(clouds):
    z,y = clouds
    check_eq(probe_features(z, y, z, y, top5=True), (100.,100.))
    y9 = torch.randint(0, 9, (200,)); out = fit_probe(z, y9, epochs=2)(z)
    by_hand = [100*(out.argsort(1)[:,-k:]==y9[:,None]).any(1).double().mean().item() for k in (1,5)]
    check_eq(probe_features(z, y9, z, y9, epochs=2, top5=True), by_hand)

def test_fresh_features_are_drawn_without_gradients(clouds):
    z,y = clouds; modes = []
    def draw(i): modes.append(torch.is_grad_enabled()); return z[i]
    fit_probe(z, y, epochs=1, draw=draw)
    check_eq(set(modes), {False})

def test_a_collapsed_encoder_tells_nothing():
    assert probe_features(torch.ones(20,3), torch.arange(20)%2, torch.ones(10,3), torch.arange(10)%2)==50.
    assert fit_probe(torch.ones(20,3), torch.arange(20)%2)(torch.ones(1,3)).isfinite().all()

def test_linear_probe_is_the_probe_on_features(encoder, casts):
    i = label_fraction(casts, 0.2, 1)
    z,z_test = features(encoder, casts.train),features(encoder, casts.test)
    check_eq(linear_probe(encoder, casts, 0.2, seed=1),
             probe_features(z[i], casts.train_labels[i], z_test, casts.test_labels, seed=1))
    short = linear_probe(encoder, casts, 0.2, seed=1, epochs=2)
    check_eq(linear_probe(encoder, casts, 0.2, seed=1, top5=True, epochs=2), (short, 100.))

def test_linear_probe_leaves_generator_and_encoder_alone(encoder, images, labels, birds):
    torch.manual_seed(4); a = torch.rand(1)
    torch.manual_seed(4)
    items = Items('few', images[:40], images[40:60], labels[:40], labels[40:60], birds.species)
    linear_probe(encoder, items, augment=True, epochs=1)
    check_eq(torch.rand(1), a)
    assert encoder.training

def test_linear_probe_says_what_is_missing(encoder, few, labels):
    with pytest.raises(InputError, match='no labels'): linear_probe(encoder, Items('x', few, few, None, None, []))
    with pytest.raises(InputError, match='no test images'):
        linear_probe(encoder, Items('x', few, few[:0], labels[:40], labels[:0], []))

class Crops(nn.Module):
    "An encoder that keeps what it is shown"
    def __init__(self): super().__init__(); self.seen = []
    def forward(self, x): self.seen.append(x); return x.flatten(1)

def test_fresh_crops_are_crops_and_mirrored_as_asked(few):
    ramp = (torch.arange(40.).expand(8,3,40,40)*6).to(torch.uint8)
    enc = Crops()
    with fresh_crops(enc, ramp, 0, 0., 3) as draw: check_eq(draw(torch.arange(8)).shape, (8,3*40*40))
    check_eq([len(o) for o in enc.seen], [3,3,2])
    seen = torch.cat(enc.seen)
    assert (seen.diff(dim=-1)>-1e-4).all()                                                   # never mirrored
    assert (seen[...,-1]-seen[...,0]).unique().numel()>4                                     # each its own crop
    with fresh_crops(enc, ramp, 0, 1., 8) as draw: draw(torch.arange(8))
    assert (enc.seen[-1].diff(dim=-1)<1e-4).all()                                            # always mirrored
    with fresh_crops(enc, few, 0, 0., 8, (1,1), (1,1)) as draw:                              # nothing else
        check_close(draw(torch.arange(8)), few[:8].flatten(1)/255, 1e-5)

# retrieval

def unit(a): return a/np.linalg.norm(a)

def loop_retrieval(z, y, g=None, gy=None):
    "The definition, one query and one gallery image at a time"
    z = z.double().numpy(); own = g is None
    g,gy = (z,y) if own else (g.double().numpy(),gy)
    r1,r5,aps = [],[],[]
    for i in range(len(z)):
        js = [j for j in range(len(g)) if not (own and i==j)]
        s = {j: round(float(unit(z[i])@unit(g[j])), 9) for j in js}
        js.sort(key=lambda j: (-s[j], int(gy[j]==y[i])))                 # wrong ones first
        right = [int(gy[j]==y[i]) for j in js]
        if not sum(right): continue
        found,prec = 0,[]
        for place,hit in enumerate(right, 1):
            if hit: found += 1; prec.append(found/place)
        r1.append(right[0]); r5.append(max(right[:5])); aps.append(sum(prec)/len(prec))
    return [100*np.mean(o) for o in (r1,r5,aps)], len(aps)

def three(r): return [r[k] for k in ('rank1','rank5','map')]

@pytest.fixture(scope='module')
def with_ties():
    "Random features with ties and a singleton among them"
    set_seed(0)
    z,y = torch.randn(60, 5), torch.randint(0, 9, (60,)); y[0] = 50
    z[20:26] = z[10:16]; z[30] = z[31] = z[32]
    return z,y

@pytest.mark.parametrize('bs', [None, 1, 7, 60])
def test_retrieval_follows_the_definition(with_ties, bs):
    ref,n = loop_retrieval(*with_ties)
    r = retrieval(*with_ties, bs=bs)
    check_close(three(r), ref, eps=1e-6); check_eq(r['queries'], n)

def test_retrieval_does_not_mind_the_order_of_images(with_ties):
    z,y = with_ties; perm = torch.randperm(60)
    check_close(retrieval(z[perm], y[perm])['map'], loop_retrieval(z, y)[0][2], eps=1e-9)

def test_retrieval_in_another_gallery(with_ties):
    z,y = with_ties
    ref,n = loop_retrieval(z[:20], y[:20], z[20:], y[20:])
    r = retrieval(z[:20], y[:20], z[20:], y[20:])
    check_close(three(r), ref, eps=1e-6); check_eq((r['queries'], r['skipped']), (n, 20-n))

@pytest.fixture(scope='module')
def six():
    angle = torch.tensor([0.,10,25,45,70,100])*math.pi/180
    return torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([0,1,0,0,1,2])

def test_retrieval_skips_a_block_without_any_right_image(six):
    z,y = six
    check_eq(retrieval(z[:2], torch.tensor([0,1]), z[2:], torch.ones(4), bs=1),
             dict(rank1=100., rank5=100., map=100., queries=1, skipped=1))

def test_retrieval_does_not_mind_lengths_or_gradients(six):
    z,y = six
    check_eq(retrieval(z*1e-4, y)['map'], retrieval(z*1e4, y)['map'])
    check_eq(retrieval(z.clone().requires_grad_(), y), retrieval(z, y))

def test_retrieval_says_what_is_wrong(six):
    z,y = six; bad = z.clone()
    for i,said in (2,'1 of the 6'), (4,'2 of the 6'):
        bad[i,1] = float('nan')
        with pytest.raises(InputError, match=said): retrieval(bad, y)
    with pytest.raises(InputError, match='gallery'): retrieval(z, y, bad, y)
    with pytest.raises(InputError, match='at least two'): retrieval(z, torch.arange(6))
    with pytest.raises(InputError, match='shape'): retrieval(z, y[:3])
    with pytest.raises(InputError, match='gallery_y'): retrieval(z, y, z)

def test_equal_similarities_are_equal_whatever_the_order_of_a_sum():
    "Of 40 rearrangements of one vector at 60 degrees the right one stands last"
    set_seed(0)
    u,v = torch.ones(16, dtype=torch.float64)/4,torch.randn(16, dtype=torch.float64); v -= v.mean()
    w = u/2 + 3**.5/2*v/v.norm()
    turned = torch.stack([w[torch.randperm(16)] for _ in range(40)])
    assert (F.normalize(turned.float(), dim=1)@u.float()).unique().numel()>1
    for i in range(40):
        check_close(retrieval(u[None], torch.ones(1), turned, torch.arange(40)==i)['map'], 100/40, 1e-9)

# neighbours

def test_nearest_against_one_query_at_a_time(z):
    cos,near = nearest(z, k=3)
    for a,c,i in zip(z, cos, near):
        d = F.cosine_similarity(a[None].double(), z.double()); d[(z==a).all(1)] = -9
        check_close(c, d.sort(descending=True).values[:3].float(), 1e-5); check_close(d[i].float(), c, 1e-5)
    for a,b in zip(nearest(z[:9], k=3, bs=4), nearest(z[:9], k=3)): check_close(a, b, 1e-6)

@pytest.mark.parametrize('k', [0, 3])
def test_nearest_wants_no_more_than_there_are(z, k):
    with pytest.raises(InputError, match='among 2 images: choose k from 1 to 2.'): nearest(z[:3], k=k)

def test_nearest_without_a_gallery(z):
    check_eq(nearest(z[:3], k=2)[1][0].sort().values.tolist(), [1,2])
    check_eq(nearest(z)[1].shape, (600,5))
    assert not nearest(z[:9].clone().requires_grad_(), k=1)[0].requires_grad

def loop_knn(z, y, z_test, y_test, k, T):
    hit = 0
    for q,t in zip(z_test.double().numpy(), y_test.tolist()):
        s = sorted(((float(unit(q)@unit(g)), int(c)) for g,c in zip(z.double().numpy(), y)), reverse=True)[:k]
        votes = {}
        for a,c in s: votes[c] = votes.get(c, 0.)+math.exp(a/T)
        hit += max(votes, key=votes.get)==t
    return 100*hit/len(y_test)

@pytest.fixture(scope='module')
def scattered():
    set_seed(1)
    return torch.randn(90, 4), torch.arange(90)%3, torch.randn(30, 4), torch.randint(0, 3, (30,))

@pytest.mark.parametrize('k', [1, 5, 20, 500])
def test_knn_against_a_loop(scattered, k):
    check_close(knn(*scattered, k=k, bs=7), loop_knn(*scattered, k, 0.07), eps=1e-9)

def test_knn_says_what_is_wrong(scattered):
    for kw in dict(k=0), dict(temperature=0):
        with pytest.raises(InputError, match='not defined'): knn(*scattered, **kw)
    z,y,z_test,y_test = scattered
    with pytest.raises(InputError, match='test features are not finite'): knn(z, y, z_test*float('inf'), y_test)

def test_knn_defaults_and_classes_on_one_side(scattered):
    check_eq(defaults(knn, 'k','temperature'), [20, .07])
    z,y,z_test,y_test = scattered
    check_eq(knn(z, y*0+5, z_test, y_test*0+7), 0.)

def test_the_nearest_neighbour_has_one_vote(scattered):
    z,y,z_test,_ = scattered
    v = neighbour_vote(F.normalize(z_test, dim=1), F.normalize(z, dim=1), y, 3, 1, .07)
    check_eq((v.sum(1), v.max(1).values), (torch.ones(30), torch.ones(30)))

# all at once, and the learner

@pytest.fixture(scope='module')
def small_res(encoder, small):
    with mock.patch('fgsynth.evaluate.measures.fit_probe', wraps=fit_probe) as fit:
        res = evaluate(encoder, small, pcts=(0.25,0.5))
    return res,fit

def test_evaluate_names_its_measures_and_says_how_far_it_is(encoder, items):
    said = []
    res = evaluate(encoder, items, progress=said.append)
    check_eq(list(res), 'top1_100 top1_50 top1_20 rank1 rank5 map rank1_gallery map_gallery knn'.split())
    check_eq(said, ['features of 120 training and 100 test images',
                    *(f'linear probe, {p} % of the labels: {res[f"top1_{p}"]:.1f}' for p in (100,50,20)),
                    f"retrieval: rank-1 {res['rank1']:.1f}, rank-5 {res['rank5']:.1f}, mAP {res['map']:.1f}"])

def test_evaluate_gives_what_the_single_functions_give(encoder, items, z, labels):
    res = evaluate(encoder, items)
    check_eq(res['top1_20'], linear_probe(encoder, items, 0.2))
    check_close(res['rank1_gallery'], retrieval(z[120:220], labels[120:220], z[:120], labels[:120])['rank1'], eps=1e-3)
    check_close(res['map'], retrieval(z[120:220], labels[120:220])['map'], eps=1e-3)

def test_evaluate_defaults():
    check_eq(defaults(evaluate, 'pcts','seed','augment','flip','distributed'), [(1.,.5,.2), 0, False, .5, False])

def test_evaluate_through_a_decoder_that_loses_nothing(encoder, items):
    class Echo(nn.Module):
        "Knows which image comes next"
        def __init__(self): super().__init__(); self.at,self.p = 0,nn.Parameter(torch.zeros(1))
        def forward(self, z): self.at += len(z); return items.test[self.at-len(z):self.at].float()/255
    res = evaluate(encoder, items, decoder=Echo(), bs=64)
    check_eq(res['decoded_top1'], res['top1_100'])

def test_evaluate_by_the_full_protocol(encoder, small):
    full = evaluate(encoder, small, pcts=(0.5,), augment=True, epochs=2, flip=0)
    check_eq(full['top1_50'], linear_probe(encoder, small, 0.5, augment=True, epochs=2, flip=0))

def test_evaluate_counts_the_classes_of_both_splits(small_res, labels):
    res,fit = small_res
    check_eq([o.args[2] for o in fit.call_args_list], [int(labels[:40].max())+1]*2)
    check_eq(list(res)[:2], ['top1_25','top1_50'])

class WithEncoder(nn.Module):
    def __init__(self, encoder): super().__init__(); self.encoder = encoder
    def forward(self, x): return self.encoder(x)

@pytest.fixture(scope='module')
def dls(few):
    dls = DataLoaders.from_dsets([(x.float()/255, 0) for x in few], bs=8, num_workers=0, device='cpu'); dls.size = 32
    return dls

def learner(dls, model): return Learner(dls, model, loss_func=lambda p,y: p.mean())

def test_the_learner_asks_the_same(encoder, small, small_res, dls):
    learn,(res,_) = learner(dls, WithEncoder(encoder)),small_res
    check_eq(learn.linear_probe(small, pct=0.5), res['top1_50'])
    check_close(learn.retrieval(small)['map'], res['map'], eps=1e-3)
    check_close(learn.retrieval(small, gallery='train')['map'], res['map_gallery'], eps=1e-3)
    check_eq(learn.retrieval(small, split='train', bs=7)['queries'], 20)
    check_close(learn.knn(small), res['knn'], eps=1e-3)

def test_the_learner_says_what_is_wrong(encoder, small, dls):
    with pytest.raises(InputError, match='split'): learner(dls, WithEncoder(encoder)).retrieval(small, split='tset')
    with pytest.raises(InputError, match='encoder'): learner(dls, nn.Identity()).knn(small)

def test_the_learners_methods_have_defaults_and_leave_the_functions():
    check_eq(defaults(Learner.linear_probe, 'pct'), [1.])
    check_eq(defaults(Learner.retrieval, 'split','gallery'), ['test', None])
    check_eq(defaults(Learner.knn, 'k'), [20])
    assert all(callable(f) for f in (linear_probe, retrieval, knn))

# the ceiling

def test_a_classifier_trains_all_of_a_copy():
    "Frozen stages too; crops are seen in training alone, and colours stay as they are"
    items = get_dataset('finches', n_train=64, n_test=16, size=32); enc = create_encoder('timm/test_byobnet')
    for p in enc.parameters(): p.requires_grad_(False)
    learn = classifier_learner(items, enc, size=32, bs=16, flip=0.); seen = {True:[], False:[]}
    class Seen(Callback):
        def before_batch(self): seen[self.training].append(self.xb[0].clone())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01, cbs=Seen())
    moved = [not p.equal(q) for p,q in zip(enc.parameters(), learn.model[0].parameters())]
    assert all(moved) and not any(p.requires_grad for p in enc.parameters())
    clean = items.load('test', 32)[0].float()/255
    assert torch.cat(seen[False]).allclose(clean, atol=1e-6)
    assert not torch.cat(seen[True]).allclose(items.load('train', 32)[0].float()/255, atol=.01)

def test_a_classifier_needs_labels():
    nameless,enc = Items('none', torch.zeros(32,3,32,32, dtype=torch.uint8), []),create_encoder('timm/test_byobnet')
    with pytest.raises(InputError, match='no labels'): classifier_learner(nameless, enc, 32)
