"""Random views: against torchvision, PIL and loops in float64, and the distributions they are drawn from"""
import fastcore.test as ft, inspect, math
from itertools import permutations
import numpy as np, pytest, torch
import torchvision.transforms.functional as TF
from fastai.vision.core import TensorImage
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from fgsynth.core import InputError
from fgsynth.data.finches import finches
from fgsynth.data.views import (ViewParams, Views, ViewSet, colour_matrix, crop, mocov2_views, random_box, recolour,
                                simsiam_views, whole_views)

t = torch.tensor
off = dict(scale=(1.,1.), ratio=(1.,1.), flip=0., p_jitter=0., p_grey=0., p_blur=0.)

@pytest.fixture(scope='module')
def ims(): return finches(n=4, size=64, seed=1).images.float()/255

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

# Crop and blur

@pytest.mark.parametrize('size', [32, 64])
def test_crop_is_torchvisions(size):
    "Whole-number boxes of images that are not square: enlarged, made smaller (6 times in one direction), mirrored"
    x = torch.rand(6, 3, 200, 150)
    x0,y0 = t([0,10,31,7,0,60]), t([0,3,77,0,100,9])
    w,h = t([150,20,33,140,150,64]), t([200,30,100,200,16,64])
    flip = t([False,True,False,True,True,False])
    ours = crop(x, (x0,y0,w,h), size, flip)
    for k in range(6):
        box = [o[k].item() for o in (y0,x0,h,w)]
        ref = TF.resized_crop(x[k], *box, [size,size], InterpolationMode.BILINEAR, antialias=True)
        if flip[k]: ref = TF.hflip(ref)
        ft.test_close(ours[k], ref, eps=1e-5)

def blur_by_loops(image, sigma, radius=24):
    "Separable Gaussian in float64, edges reflected"
    kernel = np.exp(-0.5*(np.arange(-radius, radius+1)/sigma)**2); kernel /= kernel.sum()
    for axis in (0,1):
        padded = np.pad(image, [(radius,radius) if i==axis else (0,0) for i in (0,1)], mode='reflect')
        shifted = (np.take(padded, np.arange(q, q+image.shape[axis]), axis=axis) for q in range(2*radius+1))
        image = sum(k*a for k,a in zip(kernel, shifted))
    return image

def test_blur_is_a_convolution_in_float64():
    x,sigma,zero = torch.rand(4, 3, 48, 48), t([0.3, 0.9, 2., 3.5]), torch.zeros(4)
    ours = crop(x, (zero, zero, zero+48, zero+48), 48, sigma=sigma)
    for k in range(4):
        ft.test_close(ours[k,0].numpy(), blur_by_loops(x[k,0].double().numpy(), sigma[k].item()), eps=1e-5)
        ft.test_close(ours[k], TF.gaussian_blur(x[k], 49, sigma[k].item()), eps=1e-5)

# Colours

@pytest.mark.parametrize('order', permutations('bksu'), ids=''.join)
def test_colours_all_at_once_are_one_after_another(order):
    "In any of the 24 orders, by explicit steps in float64"
    yiq = t([[0.299,0.587,0.114], [0.595716,-0.274453,-0.321263], [0.211456,-0.522591,0.311135]], dtype=torch.float64)
    def luma(a): return (a*yiq[0].view(3,1,1)).sum(0, keepdim=True)
    def turned(a, u):
        c,s = math.cos(2*math.pi*u), math.sin(2*math.pi*u)
        y,i,q = torch.einsum('kc,chw->khw', yiq, a)
        return torch.einsum('ck,khw->chw', yiq.inverse(), torch.stack([y, c*i+s*q, c*q-s*i]))
    steps = dict(b=lambda a: 0.7*a, k=lambda a: 1.3*a-0.3*luma(a).mean(), s=lambda a: 1.4*a-0.4*luma(a),
                 u=lambda a: turned(a, 0.08))
    x = 0.3 + 0.4*torch.rand(1, 3, 20, 30)
    ours = recolour(x, colour_matrix(x.mean((2,3)), t([0.7]), t([1.3]), t([1.4]), t([0.08])))[0]
    a = x[0].double()
    for step in order: a = steps[step](a)
    ft.test_close(a, ours, eps=1e-5)

# Parameters

def from_uniform(u):
    "Kolmogorov's distance of a sample from the uniform distribution on [0, 1]"
    u = u.sort().values.double(); n = len(u); i = torch.arange(n)
    return max((u-i/n).max(), ((i+1)/n-u).max()).item()

def surprising(n):
    "The distance that one sample of `n` in a thousand exceeds"
    return 1.95/n**.5

def test_boxes_are_uniform_where_all_fit():
    "With areas up to half of a square image: area, log-ratio and place are uniform, and area and ratio independent"
    x0,y0,w,h = random_box(20_000, 64, 64, scale=(0.2,0.5))
    area,log_ratio = (w*h/64**2-0.2)/0.3, (torch.log(w/h)-math.log(3/4))/(2*math.log(4/3))
    for u in (area, log_ratio, x0/(64-w), y0/(64-h)): assert from_uniform(u)<surprising(20_000)
    assert abs(np.corrcoef(area, log_ratio)[0,1])<0.03

@pytest.mark.parametrize('height,width,scale', [(640,640,(0.2,1.)), (500,1500,(0.5,1.))])
def test_boxes_are_torchvisions(height, width, scale):
    "Quantiles of area and ratio against 4,000 of its draws (standard error below 0.01), also where few boxes fit"
    image = torch.empty(1, height, width)
    draws = [RandomResizedCrop.get_params(image, list(scale), [3/4,4/3]) for _ in range(4000)]
    *_,their_h,their_w = t(draws).double().T
    _,_,w,h = random_box(20_000, height, width, scale)
    q = t([.05,.25,.5,.75,.95]).double()
    pixels = height*width
    ft.test_close(torch.quantile((w*h/pixels).double(), q), torch.quantile(their_h*their_w/pixels, q), eps=0.03)
    ft.test_close(torch.quantile((w/h).double(), q), torch.quantile(their_w/their_h, q), eps=0.03)
    assert (w<=width).all() and (h<=height).all()

def within(drawn, p):
    "Is the share of True within four standard errors of `p`?"
    return abs(drawn.float().mean().item()-p) < 4*(p*(1-p)/len(drawn))**.5

def test_draw_has_the_distributions_of_the_recipe():
    p = Views(64).draw(20_000, 64, 64)
    jittered = p.bright!=1
    assert within(p.flip, 0.5) and within(jittered, 0.8) and within(p.sat==0, 0.2) and within(p.sigma>0, 0.5)
    for factor,strength,centre in ((p.bright,.4,1), (p.contrast,.4,1), (p.hue,.1,0)):
        u = (factor[jittered]-(centre-strength))/(2*strength)
        assert from_uniform(u)<surprising(len(u))
    coloured = jittered & (p.sat>0)
    assert from_uniform((p.sat[coloured]-.6)/.8)<surprising(coloured.sum().item())
    sigma = p.sigma[p.sigma>0]*224/64
    assert from_uniform((sigma-.1)/1.9)<surprising(len(sigma))
    assert (p.hue[~jittered]==0).all() and (p.contrast[~jittered]==1).all()

def test_solarisation_is_drawn_after_all_others():
    p = Views(64, p_solar=.2).draw(20_000, 64, 64)
    torch.manual_seed(0)
    assert all(a.equal(b) for a,b in zip(p[:-1], Views(64).draw(20_000, 64, 64)[:-1]))
    assert within(p.solar, .2)

# Views

def test_view_is_torchvisions_with_the_same_parameters(ims):
    "Crop, mirror, blur and three colour operations, on images of low contrast so that nothing is clamped"
    torch.manual_seed(5)
    x,views = 0.35+0.3*ims, Views(48, n=1, jitter=(0.2,0.2,0.2,0.), blur=(0.,2.), blur_ref=None)
    p = views.draw(4, 64, 64)
    p = p._replace(**{f: getattr(p, f).round() for f in ('x0','y0','w','h')}, sigma=t([0.,.5,1.,2.]))
    ours = views.render(x, p)
    for i in range(4):
        one = ViewParams(*[None if f is None else f[i].item() for f in p])
        a = TF.resized_crop(x[i], *map(int, (one.y0, one.x0, one.h, one.w)), [48,48], antialias=True)
        if one.flip: a = TF.hflip(a)
        if one.sigma: a = TF.gaussian_blur(a, 17, one.sigma)
        a = TF.adjust_contrast(TF.adjust_brightness(a, one.bright), one.contrast)
        ft.test_close(ours[i], TF.adjust_saturation(a, one.sat), eps=1e-3)

def test_strength_zero_changes_nothing(ims):
    kw = {**off, 'p_jitter':1., 'p_blur':1., 'jitter':(0,0,0,0), 'blur':(0,0)}
    ft.test_close(Views(64, n=1, **kw)(ims)[0], ims, eps=1e-5)

@pytest.mark.parametrize('kw', [dict(scale=(0.2,1.)), dict(flip=0.5), dict(p_jitter=1.), dict(p_grey=0.5),
                                dict(p_blur=1., blur=(0.,4.))], ids=str)
def test_each_operation_varies_within_the_batch(ims, kw):
    out = Views(64, n=1, **{**off, **kw})(ims[:1].expand(8,-1,-1,-1))[0]
    assert out.flatten(1).std(0).max()>0.02

def test_types_in_and_out(ims):
    "Half precision in and out, float32 in between; autocast does not reach inside; uint8 and TensorImage work"
    views = Views(48)
    def seeded(x): torch.manual_seed(2); return views(x)[0]
    ref = seeded(ims)
    for dtype,eps in ((torch.float16,2e-3), (torch.bfloat16,2e-2)):
        out = seeded(ims.to(dtype))
        ft.test_eq(out.dtype, dtype)
        ft.test_close(out.float(), ref, eps=eps)
    with torch.autocast('cpu', dtype=torch.bfloat16): ft.test_eq(seeded(ims), ref)
    ft.test_eq(seeded(TensorImage(ims)), ref)
    ft.test_eq(type(seeded(TensorImage(ims))), torch.Tensor)
    ft.test_close(seeded((ims*255).round().to(torch.uint8)), ref, eps=5e-3)

@pytest.mark.parametrize('shape', [(1,3,64,64), (1,3,37,90), (3,3,300,120)], ids=str)
def test_any_batch_and_any_shape(shape):
    out = Views(48)(torch.rand(shape))
    ft.test_eq([o.shape for o in out], [(shape[0],3,48,48)]*2)
    assert all(o.is_contiguous() and o.isfinite().all() for o in out)

def test_no_value_is_read(ims):
    "Fake tensors have shapes but no values: where a value is read, there is an error"
    views = ViewSet(Views(48), Views(32, 1, p_solar=.5))
    views(ims)                                                     # the colour projections are kept, and must be real
    with FakeTensorMode(allow_non_fake_inputs=True):
        out = views(torch.rand(4, 3, 64, 64))
        ft.test_eq(out[1].shape, (4,3,48,48))
        with pytest.raises(DataDependentOutputException): out[0].sum().item()

# Arguments

@pytest.mark.parametrize('bad,word', [
    (dict(size=31), 'too small'), (dict(size=64.5), 'whole number'), (dict(size=64, n=0), '`n`'),
    (dict(size=64, scale=(0.5,0.2)), 'lower first'), (dict(size=64, scale=(0.,1.)), '`scale`'),
    (dict(size=64, scale=(0.2,1.2)), '`scale`'), (dict(size=64, ratio=(0.,1.)), '`ratio`'),
    (dict(size=64, flip=1.5), '`flip`'), (dict(size=64, p_blur=-.1), '`p_blur`'),
    (dict(size=64, p_solar=2), '`p_solar`'),
    (dict(size=64, jitter=(.4,.4,.4)), 'four strengths'), (dict(size=64, jitter=0.4), 'four strengths'),
    (dict(size=64, jitter=(.4,.4,.4,.6)), 'four strengths'), (dict(size=64, blur=(2.,.1)), '`blur`'),
    (dict(size=64, blur=3), 'the lower and the upper end'), (dict(size=64, blur=(1.,100.)), '`blur`')], ids=str)
def test_bad_arguments_are_one_sentence(bad, word):
    with pytest.raises(InputError, match=word): Views(**bad)

def test_a_single_image_is_no_batch():
    with pytest.raises(InputError, match='batch of shape'): Views(48)(torch.rand(3,64,64))

def test_recipes_are_the_papers():
    "MoCo v2 (main_moco.py, --aug-plus), SimSiam (appendix A)"
    v = mocov2_views(64)
    ft.test_eq((v.scale, v.ratio, v.flip, v.jitter, v.p_jitter, v.p_grey, v.blur, v.p_blur),
       ((.2,1.), (3/4,4/3), .5, (.4,.4,.4,.1), .8, .2, (.1,2.), .5))
    ft.test_eq((v.size, v.n, v.p_solar, v.blur_ref), (64, 2, 0., 224))
    ft.test_eq(mocov2_views(64, n=3, flip=0., ratio=(1.,1.)).flip, 0.)
    ft.test_eq((whole_views(64).scale, whole_views(64).flip), ((1.,1.), 0.))

@pytest.mark.parametrize('recipe', [mocov2_views, simsiam_views])
def test_recipes_say_what_they_take(recipe):
    ft.test_eq(list(inspect.signature(recipe).parameters), list(inspect.signature(Views).parameters))
