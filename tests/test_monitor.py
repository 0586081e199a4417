"Monitor: what it says, and that nobody notices that it looks"
import math, numpy as np, pytest, torch
from fastai.basics import Callback, F, set_seed
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fgsynth.core import InputError
from fgsynth.data.items import Items
from fgsynth.data.loaders import ssl_dls
from fgsynth.evaluate.features import features
from fgsynth.evaluate.monitor import Monitor, agreement, effective_rank, purity
from fgsynth.methods.learner import ssl_learner
from fgsynth.runs.resume import CheckpointCallback
from training import small_methods

@pytest.fixture(scope='module')
def items():
    "Two classes, dark and bright, of objects that were photographed twice"
    g = torch.Generator().manual_seed(0)
    y = torch.arange(120)//2%2
    x = torch.randint(0, 100, (120,3,32,32), generator=g) + 100*y[:,None,None,None]
    return Items('lamps', x.byte(), x[:0].byte(), y, y[:0], ['dark','bright'], train_groups=[i//2 for i in range(120)])

def learner(items, cbs=None, method='simclr', **kw):
    set_seed(1)
    return ssl_learner(ssl_dls(items, size=32, bs=40), 'timm/test_byobnet', small_methods[method](), cbs=cbs, **kw)

def fit(learn, epochs=2, **kw):
    set_seed(2); learn.dls.train.rng.seed(2)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, .02, **kw)
    return learn

ALL = 'knn','probe','map','agreement','rank','purity'

def test_numbers_are_those_of_brute_force(items):
    learn = learner(items)
    m = Monitor(items, measures=ALL, n=60)
    fit(learn, 1, cbs=m)
    z = features(learn.model.encoder, m.images).double()
    z = z/z.norm(dim=1, keepdim=True)
    (i,y),(j,y_test) = m.searched,m.asked
    vote = []
    for q in j.tolist():
        s = z[i]@z[q]
        near = s.argsort(descending=True)[:20]
        weights = [sum(math.exp(s[k]/.07) for k in near.tolist() if y[k]==c) for c in (0,1)]
        vote.append(int(np.argmax(weights)))
    assert m.last['knn']==pytest.approx(100*np.mean([v==t for v,t in zip(vote, y_test.tolist())]))
    s = np.linalg.svd(features(learn.model.encoder, m.images).double().numpy(), compute_uv=False)
    p = s/s.sum(); p = p[p>0]
    assert m.last['rank']==pytest.approx(np.exp(-(p*np.log(p)).sum()), rel=1e-6)
    same = []
    for a in range(len(z)):
        others = [b for b in range(len(z)) if b!=a]
        if m.groups.count(m.groups[a])>1: same.append(m.groups[max(others, key=lambda b: z[a]@z[b])]==m.groups[a])
    assert m.last['purity']==pytest.approx(100*np.mean(same))

def test_agreement_by_sets():
    g = torch.Generator().manual_seed(0)
    a,b = torch.randn(30, 8, generator=g),torch.randn(30, 8, generator=g)
    def near(z, i): return set((F.normalize(z, dim=1)@F.normalize(z, dim=1)[i]).argsort(descending=True)[1:6].tolist())
    assert agreement(a, b)==pytest.approx(100*np.mean([len(near(a, i) & near(b, i))/5 for i in range(30)]))

def test_the_same_object_is_never_searched_and_asked_for(items):
    m = Monitor(items, n=80)
    fit(learner(items), 1, cbs=m)
    objects = [{m.groups[i] for i in o.tolist()} for o,_ in (m.searched, m.asked)]
    assert objects[0] and objects[1] and not objects[0] & objects[1]

@pytest.mark.parametrize('method', ['simclr','mocov2'])
def test_training_does_not_notice(items, method):
    "Same weights, same order, same views, to the bit"
    alone,seen = [fit(learner(items, method=method), cbs=cbs) for cbs in (None, Monitor(items, measures=ALL))]
    for a,b in zip(alone.model.state_dict().values(), seen.model.state_dict().values()): assert a.equal(b)
    assert alone.recorder.losses==seen.recorder.losses

def rows(learn, **kw):
    "What is logged"
    said = []
    set_seed(2)
    learn.logger = lambda o: said.append(list(o))
    with learn.no_bar(): learn.fit(**kw)
    return said

def test_the_first_row_is_the_start(items):
    learn = learner(items)
    m = Monitor(items, every=2, measures=['rank'])
    first,*epochs = rows(learn, n_epoch=4, lr=.02, cbs=m)
    at = list(learn.recorder.metric_names).index('rank')
    assert first[0]=='start' and first[at]==m.start['rank'] and first[1]==''
    assert [math.isnan(o[at]) for o in epochs]==[True,False,True,False] and epochs[-1][at]==m.last['rank']
    start = effective_rank(features(learner(items).model.encoder, m.images))
    assert m.start['rank']==pytest.approx(start, rel=1e-6)
    again = rows(learn, n_epoch=1, lr=.02, cbs=m)
    assert again[0][at]==m.start['rank'] and len(again)==2, 'of a second fit, too'

def test_trackers_go_by_it(items, tmp_path):
    learn = learner(items, path=tmp_path)
    cbs = [Monitor(items, measures=['knn','rank'], every=2), SaveModelCallback(monitor='knn', fname='best'),
           EarlyStoppingCallback(monitor='rank', min_delta=1e3, patience=2)]
    fit(learn, 6, cbs=cbs)
    assert (tmp_path/'models/best.pth').exists() and len(learn.recorder.values)<6

class Stop(Callback):
    def after_batch(self):
        if self.train_iter==4: raise KeyboardInterrupt

def test_resumed_it_still_knows_the_start(items, tmp_path):
    whole,broken,resumed = [Monitor(items, measures=['knn','agreement']) for _ in range(3)]
    one = fit(learner(items), 3, cbs=[whole, CheckpointCallback(tmp_path/'whole', every=1)])
    with pytest.raises(KeyboardInterrupt):
        fit(learner(items), 3, cbs=[broken, CheckpointCallback(tmp_path/'cut', every=1), Stop()])
    two = fit(learner(items), 3, cbs=[resumed, CheckpointCallback(tmp_path/'cut', every=1, resume=True)])
    assert resumed.start==whole.start==broken.start and resumed.last==whole.last
    at = list(one.recorder.metric_names).index('knn')-1
    assert [o[at] for o in two.recorder.values]==[o[at] for o in one.recorder.values]
    for a,b in zip(one.model.parameters(), two.model.parameters()): assert a.equal(b)

def test_what_cannot_be_measured_is_said_at_once(items):
    bare = Items('bare', items.train, items.test)
    assert Monitor(bare).measures==['agreement','rank'] and Monitor(items).measures==['knn']
    for kw,words in [(dict(items=bare, measures=['map']), "'bare' has no labels for its training images, and 'map'"),
                     (dict(items=bare, measures=['purity']), 'which images show the same object'),
                     (dict(items=items, measures=['kn']), 'knn'), (dict(items=items, every=0), 'from 1 up')]:
        with pytest.raises(InputError, match=words): Monitor(**kw)
    alone = Items('alone', items.train, items.test, torch.arange(120), None)
    with pytest.raises(InputError, match='larger n'): fit(learner(alone), 1, cbs=Monitor(alone))
    with pytest.raises(InputError, match='no purity'): purity(torch.eye(3), 'abc')

def test_without_labels_and_without_a_split(items):
    m = Monitor(Items('bare', items.train, items.test))
    fit(learner(items), 1, cbs=m)
    assert 0<=m.last['agreement']<=100 and 1<=m.last['rank']<=100 and 'at the start' in m.verdict()

def test_the_verdict():
    m = Monitor(Items('x', torch.zeros(9,3,32,32).byte(), []), measures=['rank'])
    assert m.verdict()==''
    m.images,m.start = range(9),dict(rank=4.)
    m.last = dict(rank=3.)
    assert m.verdict().startswith('Training has made the features worse') and '4.0' in m.verdict()
    m.last = dict(rank=5.)
    assert 'worse' not in m.verdict() and '5.0 now' in m.verdict()
