"DiLo and CVSA: pictures repainted by masks, against plain loops; beside every method, resumed, with masks of any kind"
import math, warnings
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from fastai.vision.core import TensorImage
from scipy import stats
from torch import nn
from fgsynth.core import InputError
from fgsynth.data.crops import CutImages, cut_images
from fgsynth.data.datasets import get_dataset
from fgsynth.data.items import Items
from fgsynth.data.loaders import ssl_dls
from fgsynth.data.views import Views, mocov2_views
from fgsynth.methods.byol import byol_views
from fgsynth.methods.contrastive_crop import ContrastiveCrop, active_layer, is_active, squished
from fgsynth.methods.cvsa import CVSA, outside_loss, paste_over, swap_foregrounds
from fgsynth.methods.dilo import DiLo, Foreground, mask_bytes, masks_by, on_grey
from fgsynth.methods.learner import ssl_learner
from fgsynth.methods.simclr import SimCLR
from fgsynth.nets.encoders import create_encoder
from fgsynth.nets.maps import maps_of
from fgsynth.nets.networks import Encoder
from fgsynth.synth.callbacks import synth_pairs
from tiny import save
from training import KeepViews, arch_for, close, quietly, small_methods, unlike_after_a_stop

off = dict(scale=(1.,1.), ratio=(1.,1.), flip=0., p_jitter=0., p_grey=0., p_blur=0.)
both = pytest.mark.parametrize('recipe', [DiLo, CVSA])

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=64, n_test=8, size=48)

@pytest.fixture(scope='module')
def dls(items): return ssl_dls(items, size=32, bs=16)

def bright(x): return x.mean(1) # a saliency

def learner(dls, *cbs, method='simclr', **kwargs):
    return ssl_learner(dls, arch_for(method), small_methods[method](), cbs=list(cbs), **kwargs)

# images that carry masks, and views of them

def test_views_without_masks_are_what_they_were():
    "To the bit, and with the same random numbers afterwards; nor does a mask alone change a view"
    x = torch.rand(6,3,48,48); cut = cut_images((255*x).byte(), torch.linspace(.5, 2, 6), 32)
    for views in mocov2_views(32), byol_views(32):
        for a in x, cut:
            b = a.clone().as_subclass(CutImages)
            if isinstance(a, CutImages): b.remember(whole=a.whole, aspect=a.aspect)
            b.remember(masks=torch.rand(6,1,5,5), view_masks=[])
            c = b.clone().remember(repaint=lambda pictures, masks: (pictures, masks))
            seen = []
            for o in a, b, c:
                set_seed(1); seen.append([*views(o), torch.rand(3)])
            assert all(p.equal(q) for other in seen[1:] for p,q in zip(seen[0], other)) and len(b.view_masks)==2

def test_each_view_asks_anew_and_its_mask_is_cut_as_it_is():
    "Pictures that are painted like their masks: a view and its mask are one, whatever is cut and mirrored"
    asked = []
    def paint(pictures, masks):
        asked.append(1); m = torch.rand_like(masks)
        return nn.functional.interpolate(m, pictures.shape[-2:]).expand(-1,3,-1,-1), m
    x = torch.zeros(5,3,32,32).as_subclass(CutImages)
    x.remember(masks=torch.zeros(5,1,32,32), repaint=paint, view_masks=[])
    views = Views(32, 3, p_jitter=0, p_grey=0, p_blur=0)(x)
    assert len(asked)==len(x.view_masks)==3 and not views[0].equal(views[1])
    for v,m in zip(views, x.view_masks): assert close(v, m.expand(-1,3,-1,-1), 1e-5)

def test_masks_of_wide_pictures_are_cut_in_the_squares():
    "The right end of a picture three times as wide as high, which the centre does not show"
    whole = torch.zeros(4,3,48,48, dtype=torch.uint8); whole[...,36:] = 255
    masks = torch.zeros(4,1,16,16); masks[...,12:] = 1
    x = cut_images(whole, torch.full((4,), 3.), 32).remember(masks=masks, view_masks=[])
    for v,m in zip(Views(32, 8, p_jitter=0, p_grey=0, p_blur=0)(x), x.view_masks):
        assert (v.mean((1,2,3))-m.mean((1,2,3))).abs().max()<.06

def test_masks_travel_with_their_images():
    x = torch.rand(4,3,8,8).as_subclass(CutImages); f = lambda p, m: (p, m)
    x.remember(masks=torch.arange(4.)[:,None,None,None], repaint=f, view_masks=[])
    for y in x[[3,1]], x[[3,1]].clone(), x[[3,1]].to(torch.float16), x[[3,1]].detach():
        assert y.masks.flatten().tolist()==[3,1] and y.repaint is f and y.view_masks is None
    assert x[2].masks is None and (x*1).masks is None and x[:2,:1].repaint is None

# masks

@pytest.mark.parametrize('bad,told', [
    (lambda x: x, r'gave \(3, 3, 8, 8\) for 3'), (lambda x: x[:2,0], r'gave \(2, 8, 8\)'),
    (lambda x: x.numpy()[:,0], 'a ndarray'), (lambda x: None, 'a NoneType'), (lambda x: x[:,0].mean(), 'Tensor'),
    (lambda x: x[:,0]+1, 'from 1.*to'), (lambda x: x[:,0]-1, 'from -'), (lambda x: x[:,0]*math.nan, 'nan'),
    (lambda x: x[:,:1,:0], 'gave')])
def test_saliencies_that_cannot_be_meant(bad, told):
    with pytest.raises(InputError, match=told): masks_by(bad, torch.rand(3,3,8,8))

def test_saliencies_of_any_kind():
    x = torch.rand(3,3,8,8); want = x.mean(1)>.5
    for f in lambda x: x.mean(1)>.5, lambda x: (x.mean(1,True)>.5).double(), lambda x: TensorImage(x.mean(1)>.5).half():
        m = masks_by(f, x); assert m.dtype==torch.float32 and m.equal(want.float())

def test_masks_as_they_are_kept():
    m = torch.rand(3,12,12); m[1] = 0; m[2] = 1e-3
    kept = mask_bytes(m, 4)
    blocks = m[0].double().reshape(4,3,4,3).mean((1,3))
    assert close(kept[0].double()/255, blocks, .5/255+1e-6) and (kept[1:]==255).all()
    assert mask_bytes(m, 28).shape==(3,28,28)

@both
def test_masks_are_the_encoders(dls, recipe):
    "As it is before the first epoch, and again before the second"
    class Kept(Callback):
        order = -2
        def before_epoch(self): self.kept = {k:v.clone() for k,v in self.model.encoder.state_dict().items()}
        def before_fit(self): self.drawn = []
        def after_epoch(self): self.drawn.append(self.model.masks.clone())
    cbs = [Kept(), recipe(every=.5, threshold=.4, side=14)]
    learn = learner(dls, *cbs); assert learn.model.masks.shape==(64,14,14) and not learn.model.masks.any()
    start = create_encoder('timm/test_byobnet'); start.load_state_dict(learn.model.encoder.state_dict())
    quietly(learn, 2, .03)
    last = create_encoder('timm/test_byobnet'); last.load_state_dict(learn.kept.kept)
    x = squished(dls.items.load('train', 48, whole=True)[0], 32)
    for enc,masks in zip((start, last), learn.kept.drawn):
        want = mask_bytes(is_active(maps_of(enc, x, active_layer(enc, 32)), .4, 14), 14)
        assert masks.unique().tolist()==[0,255] and (masks!=want).float().mean()<.02
    assert not learn.kept.drawn[0].equal(learn.kept.drawn[1])

@both
def test_a_saliency_is_asked_once(dls, recipe):
    "And sees whole pictures at the size of the training; a second fit does not ask again"
    asked = []
    def saliency(x): asked.append((tuple(x.shape), type(x), x.requires_grad)); return bright(x)
    learn = learner(dls, recipe(saliency=saliency, every=.25, bs=40))
    for _ in range(2): quietly(learn, 4, .01)
    assert asked==[((40,3,32,32), torch.Tensor, False), ((24,3,32,32), torch.Tensor, False)]
    x = squished(dls.items.load('train', 48, whole=True)[0], 32)
    assert learn.model.masks.equal(mask_bytes(bright(x), 28))

@both
def test_a_bad_saliency_ends_the_training(dls, recipe):
    with pytest.raises(InputError, match='values from'): quietly(learner(dls, recipe(saliency=lambda x: 300*bright(x))))

# DiLo against an independent computation

def test_shares_and_greys():
    "How many stay, how often the mask is blurred, and that grey is uniform; the foreground is as it was"
    set_seed(0); n = 4000
    x = torch.rand(n,3,8,8); m = torch.zeros(n,1,8,8); m[...,:4] = 1
    y = on_grey(x, m, radius=20)
    kept = (y==x).flatten(1).all(1)
    assert abs(kept.float().mean()-.7)<.03
    new = y[~kept]; grey = new[...,4:].flatten(1)
    blurred = grey.std(1)>1e-4                                              # the edge reaches further
    assert abs(blurred.float().mean()-.5)<.06
    plain,shade = new[~blurred],grey[~blurred,0]
    assert close(plain[...,:4], x[~kept][~blurred][...,:4], 1e-6) and plain[...,4:].flatten(1).std(1).max()<1e-6
    assert stats.kstest(shade.numpy(), 'uniform').pvalue>1e-3 and abs(shade.var()-1/12)<.01

def test_pasted_by_loops():
    "Masks in cells, pictures in pixels: each pixel lies between the centres of four cells, in float64"
    x,m = torch.rand(4,3,12,12),torch.rand(4,1,4,4)
    set_seed(3); y = on_grey(x, m, p_keep=0, p_blur=0)
    set_seed(3); grey = torch.rand(3,4)[2].double()
    for b in range(4):
        for r in range(12):
            for c in range(12):
                (i,fy),(j,fx) = [(int(o),o-int(o)) for o in (min(max((p+.5)/3-.5, 0), 3) for p in (r, c))]
                i2,j2 = min(i+1, 3),min(j+1, 3); v = m[b,0].double()
                a = (v[i,j]*(1-fx)+v[i,j2]*fx)*(1-fy) + (v[i2,j]*(1-fx)+v[i2,j2]*fx)*fy
                assert close(y[b,:,r,c], a*x[b,:,r,c].double() + (1-a)*grey[b], 1e-5)

def test_blur_of_masks():
    "5 pixels at 224 are as many cells as their share of the side: an edge becomes a Gaussian's integral"
    m = torch.zeros(1,1,56,56); m[...,:28] = 1
    y = on_grey(torch.ones(1,3,56,56), m, p_keep=0, p_blur=1)[0,0,28].double()
    low = y.min(); edge = (y-low)/(y.max()-low)
    want = stats.norm.sf((np.arange(56)+.5-28)/(5*56/224))
    assert close(edge, want, .01)

def test_two_views_are_independent():
    "Of each image, with the whole mask on a black left half: both on grey in .09 of the cases"
    x = torch.zeros(3000,3,32,32); masks = torch.zeros(3000,1,8,8); masks[...,:4] = 1
    x = x.as_subclass(CutImages).remember(masks=masks, repaint=DiLo().paint)
    a,b = [(v[...,-1].amax((1,2))>0).float() for v in Views(32, 2, **off)(x)]
    assert all(abs(o.mean()-.3)<.03 for o in (a, b)) and abs((a*b).mean()-.09)<.02

# CVSA against plain loops

def pasted(pictures, masks, partner):
    "Triangle weights along each axis, of what lies inside the region, in float64"
    def box(m):
        r,c = np.nonzero(m>.5); n = len(m)
        return (0,0,1,1) if not len(r) else (c.min()/n, r.min()/n, (c.max()+1)/n, (r.max()+1)/n)
    def read(line, at, step, low, high): # along the first axis
        n = len(line); w = np.array([max(0, 1-abs(j+.5-at)/max(step, 1)) for j in range(n)])
        w *= [low*n<=j+.5<high*n for j in range(n)]
        return np.tensordot(w, line, 1)/w.sum()
    def move(t, own, there, background):
        (l,u,r,d),(l2,u2,r2,d2),n = own,there,len(t); out = background.copy()
        sy,sx = (d-u)/(d2-u2),(r-l)/(r2-l2)
        for i in range(n):
            for j in range(n):
                y,x = (i+.5)/n,(j+.5)/n
                if not (u2<=y<d2 and l2<=x<r2): continue
                row = read(t, n*(u+(y-u2)*sy), sy, u, d)
                out[i,j] = read(row, n*(l+(x-l2)*sx), sx, l, r)
        return out
    res = []
    for i,j in enumerate(partner.tolist()):
        own,there = [box(masks[k,0].numpy()) for k in (i, j)]
        p,q,m = [o.double().permute(1,2,0).numpy() for o in (pictures[i], pictures[j], masks[i])]
        res.append([move(p, own, there, q), move(m, own, there, np.zeros_like(m))])
    return [torch.tensor(np.stack(o)).permute(0,3,1,2) for o in zip(*res)]

def test_paste_by_loops():
    "Regions of all shapes, larger and smaller, at the rim, the whole and none"
    set_seed(0); n = 6; x,m = torch.rand(n,3,24,24),torch.zeros(n,1,8,8)
    for i,(u,d,l,r) in enumerate([(1,5,2,4), (0,8,0,8), (6,8,5,8), (3,4,0,7), (2,8,1,2)]):
        m[i,0,u:d,l:r] = .6+.4*torch.rand(d-u, r-l)
    partner = torch.tensor([3,0,1,4,5,2])
    for got,want in zip(paste_over(x, m, partner), pasted(x, m, partner)): assert close(got, want, 1e-5)

def test_a_region_of_the_same_box_is_copied():
    x,m = torch.rand(2,3,16,16),torch.zeros(2,1,8,8); m[...,2:5,3:7] = 1
    y,at = paste_over(x, m, torch.tensor([1,0])); inside = nn.functional.interpolate(m, 16)>0
    assert close(y, torch.where(inside, x, x.flip(0)), 1e-5) and close(at, m, 1e-6)

@pytest.mark.parametrize('n', [1, 2, 500])
def test_partners(n):
    "One of the others, each as often as another; half of the images keep their own background"
    set_seed(0); x = torch.arange(float(n))[:,None,None,None].expand(n,3,4,4); m = torch.zeros(n,1,4,4); m[...,0,0] = 1
    y,at = swap_foregrounds(x, m); seen = y[:,0,3,3].round().long(); changed = seen!=torch.arange(n)
    assert close(y[:,0,0,0], x[:,0,0,0], 1e-3) and at.equal(m)
    if n==1: assert not changed.any()
    if n==500:
        assert abs(changed.float().mean()-.5)<.08
        assert stats.kstest(((seen-torch.arange(n))%n)[changed].numpy()/n, 'uniform').pvalue>1e-3

def test_alignment_loss_in_float64():
    maps,masks = torch.randn(5,3,4,4),torch.rand(5,1,8,8); masks[1] = 1; masks[2] = 0; maps[3] = 2.
    total = 0.
    for a,m in zip(maps.double().sum(1), masks.double()[:,0]):
        m = m.reshape(4,2,4,2).mean((1,3))
        h = (a-a.min())/(a.max()-a.min()) if a.max()-a.min()>1e-9 else torch.ones_like(a)
        p = torch.exp(h/.4); p = p/p.sum()
        if m.max()>.5: total = total - math.log((p*m).sum())
    assert close(outside_loss(maps, masks), total/5, 1e-6)

def test_gradient_of_the_alignment_loss():
    "Towards the foreground; finite where a map is the same everywhere; none where the mask is all or nothing"
    maps = torch.randn(4,3,4,4); maps[3] = 1.; maps.requires_grad_()
    masks = torch.zeros(4,1,4,4); masks[0,0,:2] = masks[3,0,:2] = 1; masks[1] = 1
    outside_loss(maps, masks).backward(); g = maps.grad
    assert g.isfinite().all() and g[1:].abs().max()<1e-6
    assert outside_loss(maps.detach()-.1*g, masks)<outside_loss(maps.detach(), masks)

# the callbacks

@pytest.mark.parametrize('wrong', [dict(every=0), dict(threshold=1), dict(side=3), dict(side=7.5), dict(bs=0),
                                   dict(saliency='bird'), dict(p_keep=-.1), dict(p_blur=2), dict(radius=-1),
                                   dict(p_swap=1.1), dict(weight=-1), dict(temperature=0)])
def test_settings_that_cannot_be_meant(wrong):
    name, = wrong; of = CVSA if name in ('p_swap','weight','temperature') else DiLo
    with pytest.raises(InputError, match=f'{name} of {of.__name__}'): of(**wrong)

@both
@pytest.mark.parametrize('name', small_methods)
def test_beside_every_method_and_pairs(dls, name, recipe):
    learn = learner(dls, recipe(every=.5), *synth_pairs(decoder_width=8, augment='view'), method=name)
    quietly(learn, 2, .03)
    assert learn.recorder.losses[-1].isfinite() and learn.model.masks.any()
    assert learn.ssl.clean.masks is None # and so the images of pairs were not repainted
    if recipe is CVSA:
        row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
        assert 0<row['align_loss']<6 and list(row)[:3]==['train_loss','ssl_loss','feat_std']

def test_what_is_aligned(dls):
    "The loss of each step is the method's and the alignment of its views, computed again from masks and maps"
    class Again(Callback):
        order = -.5
        def before_fit(self): self.seen = []
        def after_loss(self):
            net,cvsa = self.model,self.learn.cvsa; name,_,layout = cvsa.layer
            own = torch.cat(cvsa.maps); masks = torch.cat(cvsa.view_masks); x = torch.cat(self.xb)
            kept = []; hook = net.encoder.get_submodule(name).register_forward_hook(lambda m, i, o: kept.append(o))
            with torch.no_grad(): [net.encoder(v) for v in self.xb]
            hook.remove(); assert close(torch.cat(kept), own, 1e-4) and len(own)==len(masks)==len(x)==32
            self.want = self.learn.loss + 2*outside_loss(own, masks).detach()
        def before_backward(self): self.seen.append((self.want.item(), self.learn.loss_grad.item()))
    learn = learner(dls, CVSA(weight=2.), Again(), method='simclr'); quietly(learn, 1, .01)
    got = torch.tensor(learn.again.seen); assert len(got)==4 and close(got[:,0], got[:,1], 1e-5)

def test_weight_0_only_swaps(dls):
    learn = quietly(learner(dls, CVSA(weight=0)), 1, .01)
    assert not hasattr(learn, 'alignment') and 'align_loss' not in learn.recorder.metric_names

@both
def test_views_are_repainted_in_training_alone(items, recipe):
    class Count(Callback):
        order = .1
        seen = set()
        def before_batch(self): self.seen.add((self.learn.training, self.learn.ssl.clean.masks is not None))
    dls = ssl_dls(items, size=32, bs=16, valid_pct=.25)
    learn = learner(dls, recipe(), Count()); learn.validate(); quietly(learn, 1, .01)
    assert Count.seen=={(True,True), (False,False)}

@both
def test_one_colour_and_batches_of_two(recipe):
    "Masks of nothing are masks of everything, so pictures stay as they are"
    x = torch.full((6,3,32,32), 90, dtype=torch.uint8)
    dls = ssl_dls(Items('grey', x, x[:0]), size=32, bs=2)
    flat = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(8), nn.Flatten())
    for saliency in None, lambda x: 0*x[:,0]:
        cbs = [recipe(saliency=saliency), KeepViews()]
        learn = ssl_learner(dls, Encoder(flat, 256), SimCLR(views=Views(32, 2, **off)), cbs=cbs)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore'); quietly(learn, 2, .01)
        *views,_ = learn.keep_views.seen[-1]
        assert all(close(v, torch.full((2,3,32,32), 90/255), 1e-5) for v in views) and (learn.model.masks==255).all()
        assert learn.recorder.losses[-1].isfinite()

@both
def test_whole_wide_pictures(tmp_path, recipe):
    files = [save(tmp_path/f'{i}.png', (30*i, 255-30*i, 99), (90+20*i, 60)) for i in range(8)]
    dls = ssl_dls(Items('files', files, []), size=32, bs=4, keep=2., num_workers=1)
    learn = learner(dls, recipe(saliency=bright)); quietly(learn, 2, .01)
    assert learn.recorder.losses[-1].isfinite() and (learn.model.masks.float().std((1,2))<2).all()

@both
def test_a_file_that_cannot_be_read_keeps_its_background(tmp_path, recipe):
    files = [save(tmp_path/f'{i}.png', (30*i, 255-30*i, 99), (60,40)) for i in range(6)]
    files[2].write_bytes(b'no picture')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = ssl_dls(Items('files', files, []), size=32, bs=4, cache=False, num_workers=0)
        learn = learner(dls, recipe(saliency=lambda x: .5*bright(x))); quietly(learn, 2, .01)
    assert (learn.model.masks[2]==255).all() and (learn.model.masks[3]<128).all()

def test_a_network_without_a_map(dls):
    "Is refused at once, unless somebody else gives the masks and no map is to be aligned"
    def made(*cbs):
        flat = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 8)), 8, size=32)
        return ssl_learner(dls, flat, small_methods['simclr'](), cbs=list(cbs))
    for cb in DiLo(), CVSA(), CVSA(saliency=bright):
        with pytest.raises(InputError, match='no feature map'): made(cb)
    for cb in DiLo(saliency=bright), CVSA(saliency=bright, weight=0): quietly(made(cb), 1, .01)

def test_one_at_a_time(dls):
    with pytest.raises(InputError, match='repaints'): learner(dls, DiLo(), CVSA())
    learn = learner(dls, DiLo(), ContrastiveCrop(every=.5))
    with pytest.raises(InputError, match='repaints'): learn.add_cb(CVSA())
    assert not hasattr(learn, 'cvsa'); quietly(learn, 2, .01)
    assert learn.model.boxes.any() and learn.model.masks.any()

def test_added_late_and_taken_away(dls):
    learn = quietly(learner(dls), 1, .01); learn.add_cb(CVSA()); quietly(learn, 1, .01)
    assert 'align_loss' in learn.recorder.metric_names
    learn.remove_cb(learn.cvsa); quietly(learn, 1, .01)
    assert not any(m._forward_hooks for m in learn.model.modules())

@both
def test_views_of_ones_own(dls, recipe):
    "That know nothing of masks"
    def plain(x, *n): return [x.as_subclass(torch.Tensor)]*2
    learn = ssl_learner(dls, 'timm/test_byobnet', SimCLR(views=plain), cbs=recipe())
    with pytest.raises(InputError, match='not cut by `Views`'): quietly(learn, 1, .01)

@both
def test_drawing_masks_changes_nothing_random(dls, recipe):
    learn = learner(dls, recipe())
    def numbers(): return torch.rand(2), np.random.rand()
    set_seed(3); a = numbers()
    set_seed(3); getattr(learn, recipe.__name__.lower()).draw(); b = numbers()
    assert a[0].equal(b[0]) and a[1]==b[1]

@both
@pytest.mark.parametrize('saliency', [None, bright])
@pytest.mark.parametrize('at', [2, 10])
def test_resumed_in_the_middle_of_an_epoch(items, tmp_path, recipe, saliency, at):
    "With the masks of that epoch's start, and the same weights as without the stop"
    asked = [] # in each training
    def counted(x): asked[-1] += 1; return saliency(x)
    def make():
        set_seed(0); asked.append(0)
        cb = recipe(saliency=saliency and counted, every=.25)
        return learner(ssl_dls(items, size=32, bs=16), cb, method='mocov2')
    whole,unlike = unlike_after_a_stop(make, tmp_path, at=at, n_epoch=4)
    assert not unlike and whole['masks'].any() and len(asked)==3 and not asked[-1]

@both
@pytest.mark.parametrize('n', [32, 64])
def test_other_images_begin_without_masks(dls, n, tmp_path, recipe):
    "Also as many others, of which they are drawn; a file of the former images is read, and the masks in it are not"
    learn = learner(dls, recipe(saliency=bright), path=tmp_path); quietly(learn, 1, .01); learn.save('before')
    learn.dls = ssl_dls(get_dataset('finches', n_train=n, n_test=8, size=32, seed=1), size=32, bs=16)
    assert not learn.model.masks.any()
    quietly(learn, 1, .01)
    x = squished(learn.dls.items.load('train', 32)[0], 32); want = mask_bytes(bright(x), 28)
    assert learn.model.masks.shape==(n,28,28) and close(learn.model.masks, want, 1)
    if n==64: return
    with pytest.warns(UserWarning, match='masks'): learn.load('before')
    assert learn.model.masks.shape==(n,28,28) and not learn.model.masks.any()

@both
def test_a_learner_is_saved_and_exported(dls, tmp_path, recipe):
    "Masks are saved; what is exported holds none"
    learn = quietly(learner(dls, recipe(), path=tmp_path), 1, .01); masks = learn.model.masks.clone()
    learn.save('it'); learn.export('it.pkl')
    learn.model.masks.zero_(); learn.load('it'); assert learn.model.masks.equal(masks) and masks.any()
    shipped = torch.load(tmp_path/'it.pkl', weights_only=False)
    assert not shipped.model.masks.any()

def test_base_class_draws_for_any_recipe(dls):
    "A recipe of one's own says how it paints, and no more"
    class Black(Foreground):
        def paint(self, pictures, masks): return 0*pictures, masks
    learn = ssl_learner(dls, 'timm/test_byobnet', SimCLR(views=Views(32, 2, **off)), cbs=[Black(), KeepViews()])
    quietly(learn, 1, .01)
    assert not any(v.any() for s in learn.keep_views.seen for v in s[:2])
