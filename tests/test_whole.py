"Whole pictures: every view is cut out of a picture of any shape that is larger than the view"
import copy, math, pickle
from functools import partial
import numpy as np, pytest, torch
import torchvision.transforms.functional as TF
from fastai.vision.all import L, TensorImage
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, RandomResizedCrop, Resize
from fgsynth.core import InputError
from fgsynth.data.crops import crop, cut_images, kept_side, random_box, squish_box
from fgsynth.data.decoded import load_images
from fgsynth.data.images import decode_image, decode_whole
from fgsynth.data.datasets import get_dataset
from fgsynth.data.items import Items, hold_out, sample_items
from fgsynth.data.loaders import labelled_dls, ssl_dls
from fgsynth.data.views import Views, ViewSet
from fgsynth.evaluate.features import labelled_split
from fgsynth.evaluate.probe import fresh_crops
from fgsynth.methods.learner import ssl_learner
from fgsynth.runs.presets import Settings
from tiny import caught, green, red, solid

t = torch.tensor
shapes = dict(wide=(300,90), tall=(70,200), square=(128,128), odd=(131,97), banner=(400,50))

def smooth(size, seed):
    "Coloured clouds, (width, height)"
    noise = np.random.default_rng(seed).integers(0, 255, (5,5,3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.BICUBIC)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('shapes')
    for i,(name,size) in enumerate(shapes.items()): smooth(size, i).save(d/f'{name}.png')
    lying = Image.Exif(); lying[0x0112] = 6                # upright it is 60 wide and 140 high
    smooth((140,60), 9).save(d/'turned.png', exif=lying)
    return d

@pytest.fixture(scope='module')
def items(folder): return Items('shapes', L(sorted(folder.iterdir())), L())

def upright(file):
    "The picture as Pillow shows it, (1, 3, H, W) in [0, 1]"
    im = Image.open(file)
    if file.stem=='turned': im = im.transpose(Image.ROTATE_270)
    return TF.to_tensor(im)[None]

def loaders(items, tmp_path, **kw):
    "In memory, from a cache, and decoded by worker processes"
    kept = Items('kept', items.train, items.test, cache_dir=tmp_path)
    return [ssl_dls(items, 32, 6, **kw), ssl_dls(kept, 32, 6, **kw), ssl_dls(kept, 32, 6, **kw),
            *(ssl_dls(items, 32, 6, cache=False, num_workers=n, **kw) for n in (0,2))]

@pytest.mark.parametrize('keep', [2, 4])
def test_views_are_torchvisions_crops_of_the_files(items, tmp_path, keep):
    for dls in loaders(items, tmp_path, keep=keep):
        x,ix = dls.one_batch()
        assert (x.shape, x.whole.shape) == ((6,3,32,32), (6,3,32*keep,32*keep))
        for clean,whole,aspect,i in zip(x, x.whole, x.aspect, ix):
            picture = upright(items.train[int(i)]); h,w = picture.shape[2:]
            assert float(aspect)==pytest.approx(w/h)
            box = [w//4, h//5, w//2, h//2]                 # in the picture, in whole pixels
            scale = 32*keep/h                              # the picture is thought of as 32*keep pixels high
            ours = crop(whole[None]/255., squish_box([t([v*scale]) for v in box], aspect[None]), 32)
            theirs = TF.resized_crop(picture, box[1], box[0], box[3], box[2], [32,32], antialias=True)
            assert (ours-theirs).abs().mean()<.01 and (ours-theirs).abs().max()<.1
            assert (clean-TF.center_crop(TF.resize(picture, 32, antialias=True), 32)[0]).abs().mean()<.03

@pytest.mark.parametrize('keep', [1, 2])
def test_clean_images_may_be_the_whole_picture(items, tmp_path, keep):
    squished = Items('squished', items.train, items.test, resize='squish')
    def whole(i): return TF.resize(upright(squished.train[int(i)]), [32,32], antialias=True)[0]
    kept = Items('kept', items.train, items.test, cache_dir=tmp_path, resize='squish')
    for dls in (ssl_dls(squished, 32, 6, keep=keep), *(ssl_dls(kept, 32, 6, keep=keep) for _ in range(2)),
                *(ssl_dls(squished, 32, 6, cache=False, num_workers=n, keep=keep) for n in (0,2))):
        x,ix = dls.one_batch()
        assert max((clean-whole(i)).abs().mean() for clean,i in zip(x, ix))<.03
    x,good = squished.load('train', 32)
    assert max((clean/255.-whole(i)).abs().mean() for clean,i in zip(x, good))<.03
    wide = torch.randint(256, (4,3,40,80), dtype=torch.uint8)
    x,_ = Items('memory', wide, wide[:0], resize='squish').load('train', 20)
    assert (x/255.-TF.resize(wide/255., [20,20], antialias=True)).abs().mean()<.03

def test_parts_of_a_data_set_are_resized_as_the_whole():
    x,y = torch.zeros(8, 3, 32, 64, dtype=torch.uint8),t([0,1]*4)
    items = Items('wide', x, x, y, y, resize='squish')
    assert {hold_out(items).resize, sample_items(items, 4, 4, 0, 'some').resize}=={'squish'}

def test_a_way_to_resize_that_there_is_not(items):
    wrong = partial(pytest.raises, InputError, match="way to resize 'squash'.*squish")
    with wrong(): Items('x', items.train, items.test, resize='squash')
    with wrong(): load_images(items.train, 32, resize='squash')
    with pytest.raises(InputError, match='way to resize'): Settings(resize='stretch').check()

def test_evaluation_is_resize_and_centre_crop_of_the_file(folder):
    "torchvision rounds odd sides, which shifts its crop by up to half a pixel"
    for i,size in enumerate([(96,64), (64,160), (128,128)]): smooth(size, i).save(folder.parent/f'even{i}.png')
    theirs = lambda im: CenterCrop(32)(Resize(32, InterpolationMode.BICUBIC)(im))
    for files,most in ((folder.parent.glob('even*.png'), 1), ([folder/f'{o}.png' for o in shapes], 5)):
        for file in files:
            ours = decode_image(file, 32)
            assert (ours.float()-TF.pil_to_tensor(theirs(Image.open(file))).float()).abs().mean()<most, file

def test_each_picture_of_a_batch_has_boxes_of_its_own_shape():
    "Quantiles of area and ratio against 2,000 draws of torchvision for every shape"
    n,q,scale,big = 20_000, t([.1,.25,.5,.75,.9]).double(), (.2,1.), 20   # torchvision rounds to whole pixels
    sizes = [(100,300), (100,40), (100,800)]
    widths = t([float(w) for _,w in sizes]).repeat_interleave(n)
    x0,y0,w,h = [o.view(len(sizes), n).double() for o in random_box(n*len(sizes), 100, widths, scale)]
    for i,(height,width) in enumerate(sizes):
        image = torch.empty(1, 1, 1).expand(1, height*big, width*big)
        draws = t([RandomResizedCrop.get_params(image, list(scale), [3/4,4/3]) for _ in range(2000)]).double()/big
        for ours,theirs in ((w[i]*h[i], draws[:,2]*draws[:,3]), (w[i]/h[i], draws[:,3]/draws[:,2])):
            far = theirs.max()-theirs.min()
            assert (torch.quantile(ours, q)-torch.quantile(theirs, q)).abs().max() < .06*far+.01*theirs.mean()
        assert (x0[i]>=0).all() and (x0[i]+w[i]<=width+1e-2).all() and (y0[i]+h[i]<=height+1e-3).all()

def test_detail_survives_until_the_crop(tmp_path):
    "Stripes of two pixels in a picture of 128: a crop of 32 pixels shows them only if the picture was kept"
    stripes = np.zeros((128,128,3), dtype=np.uint8); stripes[:,::4] = stripes[:,1::4] = 255
    Image.fromarray(stripes).save(tmp_path/'stripes.png')
    items = Items('stripes', L([tmp_path/'stripes.png']*2), L())
    close = Views(32, n=1, scale=(1/16,1/16), ratio=(1.,1.), flip=0, p_jitter=0, p_grey=0, p_blur=0)
    crops = {k:close(ssl_dls(items, 32, 2, keep=k).one_batch()[0])[0] for k in (1,2,4)}
    contrast = {k:float(o[...,4:-4].std(-1).mean()) for k,o in crops.items()}
    assert contrast[1]<.05 and contrast[4]>.2 and contrast[1]<contrast[2]<contrast[4]

def test_sides_of_a_wide_picture_are_seen(tmp_path):
    "Red sides, green middle: red is in no crop of the centre square"
    im = solid(red, (300,100)); im.paste(solid(green, (100,100)), (100,0)); im.save(tmp_path/'a.png')
    items = Items('sides', L([tmp_path/'a.png']*64), L())
    plain = dict(p_jitter=0, p_grey=0, p_blur=0)
    for keep,seen in ((1,False), (2,True)):
        x,_ = ssl_dls(items, 32, 64, keep=keep).one_batch()
        assert (Views(32, **plain)(x)[0][:,0].amax((1,2))>.9).any()==seen
        assert (x[:,0]<.2).float().mean()>.9               # the clean image is the green middle

def test_keep_1_is_the_centre_square_and_nothing_else(items, tmp_path):
    for dls in loaders(items, tmp_path, keep=1):
        x,ix = dls.one_batch()
        assert type(x) is TensorImage
        for a,i in zip(x, ix): assert a.equal(TensorImage(decode_image(items.train[int(i)], 32).float().div_(255)))

def test_what_is_not_larger_is_taken_as_it_is():
    x = torch.randint(256, (40,3,32,32), dtype=torch.uint8)
    same = Items('same', x, x[:0])
    torch.manual_seed(0); a = ssl_dls(same, 32, 8, keep=1)
    torch.manual_seed(0); b = ssl_dls(same, 32, 8, keep=3)
    assert a.train_ds.side is b.train_ds.side is None and b.train_ds.images.data_ptr()==x.data_ptr()
    assert [kept_side(x, 31, 2), kept_side(x[...,:20], 64, 2)] == [62, 128]

@pytest.mark.parametrize('keep', [0, .5, 9, math.nan])
def test_a_keep_that_cannot_be_meant_is_one_sentence(items, keep):
    with pytest.raises(InputError, match=r'keep is .*: give a number from 1'): ssl_dls(items, 32, 2, keep=keep)

# Images that remember

@pytest.fixture
def x():
    whole = torch.arange(6, dtype=torch.uint8)[:,None,None,None].expand(6,3,64,64)*40
    return cut_images(whole, torch.linspace(.5, 3, 6), 32)

def remembers(x):
    grey = (x[:,0,16,16].as_subclass(torch.Tensor)*255).round().byte()
    return x.whole is not None and x.whole[:,0,0,0].equal(grey)

@pytest.mark.parametrize('take', [
    lambda x: x[:3], lambda x: x[[4,1]], lambda x: x[t([5,0,2])], lambda x: x[t([True,False]*3)], lambda x: x[::2],
    lambda x: x[-2:], lambda x: x[1:][t([2,0])], lambda x: x.clone(), lambda x: x.detach(), lambda x: x.to('cpu'),
    lambda x: x.cpu(), lambda x: x.to(torch.float64), lambda x: x.contiguous(memory_format=torch.channels_last),
    copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_images_taken_out_keep_their_own_pictures(x, take):
    got = take(x)
    assert remembers(got) and len(got.aspect)==len(got)
    assert len(Views(32)(got)[0])==len(got)

@pytest.mark.parametrize('compute', [
    lambda x: x*1, lambda x: x.flip(0), lambda x: torch.cat([x,x]), lambda x: x[:,:,:8], lambda x: x[0],
    lambda x: x[:2,:], lambda x: x.roll(1,0), lambda x: torch.index_select(x, 0, t([1])), lambda x: x.mul(.5),
    lambda x: x.split(2)[1], lambda x: next(iter(x)), lambda x: x.unsqueeze(0)])
def test_results_of_computations_forget(x, compute): assert getattr(compute(x), 'whole', None) is None

def test_views_of_several_kinds_and_types(x):
    big,small = ViewSet(Views(48, 1), Views(32, 1))(x)
    assert (big.shape, small.shape) == ((6,3,48,48), (6,3,32,32))
    assert type(big) is torch.Tensor and Views(32)(x.to(torch.float16))[0].dtype==torch.float16

def test_a_seed_brings_the_views_back(x):
    torch.manual_seed(1); a = Views(32)(x)
    torch.manual_seed(1); assert all(p.equal(q) for p,q in zip(a, Views(32)(x)))

# Training and evaluation

def test_methods_train_on_them_and_third_views_come_from_the_pictures(items):
    learn = ssl_learner(ssl_dls(items, 32, 3), 'timm/test_byobnet', pretrained=False)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.ssl.clean.whole is not None and learn.ssl.clean.shape==(3,3,32,32)
    assert learn.ssl.view(learn.ssl.clean).shape==(3,3,32,32)

def test_labelled_batches_and_the_probes_crops_see_the_sides(tmp_path):
    im = solid(red, (300,100)); im.paste(solid(green, (100,100)), (100,0))
    for folder in 'train/a','train/b','test/a','test/b':
        (tmp_path/folder).mkdir(parents=True)
        for i in range(4): im.save(tmp_path/folder/f'{i}.png')
    items = get_dataset(tmp_path)
    x,y = labelled_dls(items, 32, 8, keep=2).one_batch()
    assert x.whole.shape==(8,3,64,64) and y.shape==(8,)
    encoder = lambda x: x[:,0].flatten(1)                  # how red each pixel is
    class Red(torch.nn.Module): forward = staticmethod(encoder)
    for keep,seen in ((1,False), (2,True)):
        images,*_ = labelled_split(items, 'train', 32, keep)
        with fresh_crops(Red(), images, 0, 0., 8) as draw:
            assert (torch.cat([draw(torch.arange(8)) for _ in range(8)]).amax(1)>.9).any()==seen

def test_unreadable_files_do_not_shift_the_pictures(folder, tmp_path):
    (tmp_path/'b.png').write_text('no image')
    files = L(sorted(folder.iterdir())); files = L(files[0], tmp_path/'b.png', *files[1:])
    dls,_ = caught(lambda: ssl_dls(Items('mixed', files, L()), 32, 6, keep=2))
    x,ix = dls.one_batch()
    for whole,aspect,i in zip(x.whole, x.aspect, ix):
        pixels,ratio = decode_whole(files[int(i)], 64)
        assert whole.equal(pixels) and float(aspect)==pytest.approx(ratio)
