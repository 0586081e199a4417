"Crops centred where the encoder sees something: boxes and centres by loops, beside every method, resumed"
import itertools, warnings
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from scipy import stats
from torch import nn
from fgsynth.core import InputError
from fgsynth.data.crops import CutImages, centre_in, random_box
from fgsynth.data.datasets import get_dataset
from fgsynth.data.items import Items
from fgsynth.data.loaders import ssl_dls
from fgsynth.data.views import Views
from fgsynth.methods.contrastive_crop import ContrastiveCrop, active_boxes, active_layer, locate
from fgsynth.methods.learner import ssl_learner
from fgsynth.nets.encoders import create_encoder
from fgsynth.nets.maps import as_map
from fgsynth.nets.networks import Encoder
from fgsynth.synth.callbacks import synth_pairs
from tiny import save
from training import arch_for, close, quietly, small_methods, unlike_after_a_stop

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=64, n_test=8, size=48)

@pytest.fixture(scope='module')
def dls(items): return ssl_dls(items, size=32, bs=16)

class Bright(nn.Module):
    "Sees how bright an image is"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        nn.init.constant_(self.conv.weight, 1.); nn.init.zeros_(self.conv.bias)
    def forward(self, x): return self.conv(nn.functional.adaptive_avg_pool2d(x, 8)).mean((2,3))

# boxes

def boxes_by_loops(maps, threshold, size):
    "Each pixel lies between the centres of four cells, in float64"
    out = []
    for m in maps.double().numpy():
        heat = m.sum(0); side = len(heat)
        heat = (heat-heat.min())/max(heat.max()-heat.min(), 1e-12)
        on = []
        for r,c in itertools.product(range(size), repeat=2):
            y,x = [min(max((o+.5)*side/size-.5, 0), side-1) for o in (r, c)]
            i,j = int(y),int(x); i2,j2 = min(i+1, side-1),min(j+1, side-1); fy,fx = y-i,x-j
            v = (heat[i,j]*(1-fx)+heat[i,j2]*fx)*(1-fy) + (heat[i2,j]*(1-fx)+heat[i2,j2]*fx)*fy
            if v>threshold: on.append((r, c))
        rows,cols = zip(*on) if on else ((0, size-1), (0, size-1))
        out.append([min(cols)/size, min(rows)/size, (max(cols)+1)/size, (max(rows)+1)/size])
    return torch.tensor(out)

@pytest.mark.parametrize('threshold', [.1, .35, .6])
def test_boxes_by_loops(threshold):
    maps = torch.randn(6, 5, 7, 7)
    assert close(active_boxes(maps, threshold, 28), boxes_by_loops(maps, threshold, 28), 1e-6)

def test_where_nothing_stands_out_the_box_is_the_image():
    "Nor does rounding: layer norms sum to zero over their channels, but for the last digit"
    assert active_boxes(torch.full((2,3,4,4), 5.), .1, 32).tolist()==[[0,0,1,1]]*2
    m = nn.functional.layer_norm(torch.randn(4,8,8,16), (16,)).permute(0,3,1,2)
    assert m.sum(1).std()>0 and active_boxes(m, .4, 32).tolist()==[[0,0,1,1]]*4

@pytest.mark.parametrize('arch,size', [('resnet18', 64), ('timm/test_vit', 64), ('lite0', 64)])
def test_maps_of_networks_of_all_kinds(arch, size):
    enc = create_encoder(arch, size=size); x = torch.rand(3,3,size,size)
    boxes = locate(enc, x, size, .4)
    name,_,layout = active_layer(enc, size); seen = []
    assert not isinstance(enc.get_submodule(name), nn.LayerNorm)
    hook = enc.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(as_map(o, layout)))
    with torch.no_grad(): enc.eval()(x)
    hook.remove()
    assert close(boxes, active_boxes(seen[0], .4, size)) and (boxes[:,2:]>boxes[:,:2]).all()
    assert close(boxes, locate(enc, x+1e-6*torch.rand_like(x), size, .4), 2/size) # and no rounding

def test_a_network_without_a_map_is_refused(items):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 8))
    with pytest.raises(InputError, match='no feature map'): locate(flat, torch.rand(2,3,32,32), 32)
    dls = ssl_dls(items, size=32, bs=16)
    with pytest.raises(InputError, match='no feature map'): # at once, and not after a fifth of the training
        ssl_learner(dls, Encoder(flat, 8, size=32), small_methods['simclr'](), cbs=ContrastiveCrop())

def test_pictures_are_looked_at_whole():
    "A wide picture that is bright at its right end, which the centre square does not show"
    whole = torch.zeros(1,3,48,48, dtype=torch.uint8); whole[...,40:] = 255
    x = torch.zeros(1,3,32,32).as_subclass(CutImages).remember(whole=whole, aspect=torch.tensor([2.]))
    left,top,right,lower = locate(Bright(), x, 32, .3, ('conv', 8, None))[0].tolist()
    assert left>.7 and (top, right, lower)==(0, 1, 1)

# centres

@pytest.mark.parametrize('beta', [.1, .6, 1., 3.])
def test_centres_are_distributed_as_beta(beta):
    "Boxes so small that none has to be moved back, against scipy's distribution"
    set_seed(0); n = 4000; region = torch.tensor([.3,.2,.6,.9]).expand(n, 4)
    box = random_box(n, 100, 200, scale=(1e-4,2e-4))
    x0,y0,w,h = centre_in(box, 100, 200, region, beta)
    for u in ((x0+w/2)/200-.3)/.3, ((y0+h/2)/100-.2)/.7:
        u = u.double().numpy().clip(1e-9, 1-1e-9)
        assert stats.kstest(u, stats.beta(beta, beta).cdf).pvalue>1e-3 or beta<.5 # whose ends are rounded
        assert abs(u.mean()-.5)<.03 and abs(u.var()-1/(4*(2*beta+1)))<.01
    assert w.equal(box[2]) and h.equal(box[3])

@pytest.mark.parametrize('beta', [.1, .6])
def test_large_crops_are_not_pressed_against_the_rim(beta):
    "Starts are drawn between the first and the last that fit: by loops over the boxes, with the same random numbers"
    n = 2000; region = torch.tensor([.2,.1,.8,1.]).expand(n, 4); box = random_box(n, 100, 150, scale=(.2,1.))
    set_seed(5); x0,y0,w,h = centre_in(box, 100, 150, region, beta)
    set_seed(5); u = torch.distributions.Beta(torch.full((n,), beta), torch.full((n,), beta)).sample((2,))
    for i in range(0, n, 50):
        for got,size,length,low,high,v in ((x0, w, 150, .2, .8, u[0]), (y0, h, 100, .1, 1., u[1])):
            first,last = [min(max(o*length-size[i].item()/2, 0), length-size[i].item()) for o in (low, high)]
            assert abs(got[i].item()-(first+(last-first)*v[i].item()))<1e-3
    if beta==.6: assert ((x0<1e-3) | (x0+w>150-1e-3)).float().mean()<.2

def test_crops_stay_inside_pictures_of_all_shapes():
    n = 500; w = torch.rand(n)*300+50; region = torch.rand(n,4).view(n,2,2).sort(1).values.flatten(1)
    x0,y0,bw,bh = centre_in(random_box(n, 100, w), 100, w, region)
    assert (x0>=0).all() and (y0>=0).all() and (x0+bw<=w+1e-3).all() and (y0+bh<=100+1e-3).all()

def test_views_follow_the_region_of_each_image():
    "Of an image whose left half is black, crops centred on the right are brighter; without a region nothing changes"
    x = torch.zeros(64,3,32,32); x[...,16:] = 1
    plain = Views(32, 1, scale=(.05,.1), flip=0, p_jitter=0, p_grey=0, p_blur=0)
    def mean(region):
        there = x.as_subclass(CutImages).remember(region=torch.tensor(region).expand(64, 4), beta=torch.full((64,), .6))
        return plain(there)[0].mean()
    assert mean([.75,0.,1.,1.])>.95 and mean([0.,0.,.25,1.])<.05
    set_seed(1); a, = plain(x)
    set_seed(1); b, = plain(x.clone())
    assert a.equal(b)

# the callback

@pytest.mark.parametrize('wrong', [dict(every=0), dict(every=1), dict(threshold=1), dict(threshold=-.1),
                                   dict(beta=0), dict(bs=0)])
def test_settings_that_cannot_be_meant(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))): ContrastiveCrop(**wrong)

@pytest.mark.parametrize('name', small_methods)
def test_beside_every_method_and_pairs(dls, name):
    "Boxes are drawn before the second epoch, by the encoder as it is then"
    class Kept(Callback):
        def before_epoch(self):
            if self.epoch==1: self.encoder = {k:v.clone() for k,v in self.model.encoder.state_dict().items()}
    cbs = [Kept(), ContrastiveCrop(every=.5, threshold=.5), *synth_pairs(decoder_width=8)]
    learn = ssl_learner(dls, arch_for(name), small_methods[name](), cbs=cbs)
    assert not learn.model.boxes.any() # none are drawn, so crops are the method's own
    quietly(learn, 2, .03)
    enc = create_encoder(arch_for(name), size=32)
    assert not enc.load_state_dict(learn.kept.encoder, strict=False).missing_keys # a mask's head may be left over
    x = dls.items.load('train', 48, whole=True)[0].float()/255
    want = locate(enc, nn.functional.interpolate(x, 32, mode='bilinear', antialias=True), 32, .5)
    assert close(learn.model.boxes, want, 1/32+1e-6) and learn.model.boxes.std()>0
    assert learn.recorder.losses[-1].isfinite()

def test_drawing_boxes_changes_nothing_random(dls):
    learn = ssl_learner(dls, 'timm/test_byobnet', small_methods['simclr'](), cbs=ContrastiveCrop())
    def numbers(): return torch.rand(2), np.random.rand()
    set_seed(3); a = numbers()
    set_seed(3); learn.contrastive_crop.draw_boxes(); b = numbers()
    assert a[0].equal(b[0]) and a[1]==b[1]

def test_resumed_in_the_middle_of_an_epoch(items, tmp_path):
    "With the boxes of that epoch's start, and the same weights as without the stop"
    def make():
        set_seed(0)
        crops = ContrastiveCrop(every=.25, threshold=.5)
        return ssl_learner(ssl_dls(items, size=32, bs=16), 'timm/test_byobnet', small_methods['mocov2'](), cbs=crops)
    whole,unlike = unlike_after_a_stop(make, tmp_path, at=10, n_epoch=4)
    assert not unlike and whole['boxes'].std()>0

def test_a_file_that_cannot_be_read_keeps_the_whole_picture(tmp_path):
    files = [save(tmp_path/f'{i}.png', (30*i, 255-30*i, 99), (60,40)) for i in range(6)]
    files[2].write_bytes(b'no picture')
    items = Items('files', files, [])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = ssl_dls(items, size=32, bs=4, cache=False, num_workers=0)
        learn = ssl_learner(dls, 'timm/test_byobnet', small_methods['simclr'](), cbs=ContrastiveCrop(every=.5))
        quietly(learn, 2, .01)
    assert learn.model.boxes[2].tolist()==[0,0,1,1] and learn.model.boxes.shape==(6,4)

@pytest.mark.parametrize('n', [32, 64])
def test_other_images_begin_without_boxes(dls, n, tmp_path):
    "Also as many others; a file of the former images is read, and the boxes in it are not"
    crops = ContrastiveCrop(every=.5)
    learn = ssl_learner(dls, 'timm/test_byobnet', small_methods['simclr'](), cbs=crops, path=tmp_path)
    quietly(learn, 2, .01); learn.save('before')
    learn.dls = ssl_dls(get_dataset('finches', n_train=n, n_test=8, size=32, seed=1), size=32, bs=16)
    assert not learn.model.boxes.any()
    quietly(learn, 1, .01)
    assert learn.model.boxes.shape==(n,4) and not learn.model.boxes.any()
    if n==64: return
    with pytest.warns(UserWarning, match='boxes'): learn.load('before')
    assert learn.model.boxes.shape==(n,4) and not learn.model.boxes.any()
