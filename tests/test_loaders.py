"Loaders of clean images, with and without labels"
import pickle
import matplotlib.pyplot as plt, numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.vision.all import CrossEntropyLossFlat, Flatten, L, Learner, Module, Normalize, TensorCategory, TensorImage
from fastai.vision.all import Transform, accuracy, imagenet_stats, noop, resnet18, set_seed, vision_learner
from PIL import Image
from torch import nn
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.items import Items, label_fraction
from fgsynth.data.loaders import ImageDS, labelled_dls, ssl_dls
from conftest import root
from tiny import blue, caught, green, red, save, solid, write

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=300, n_test=150, size=64)

broken = ['truncated.jpg','empty.jpg','text.jpg']

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    "Images of several kinds, and among them three files that cannot be read"
    d = tmp_path_factory.mktemp('files')
    for i in range(6): save(d/f'{i}.png', (40*i,0,0), (36+i,40))
    save(d/'a.gif', green); save(d/'b.tif', blue); solid((*red,128), mode='RGBA').save(d/'c.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60,60,3), dtype=np.uint8)).save(d/'whole.jpg')
    (d/'truncated.jpg').write_bytes((d/'whole.jpg').read_bytes()[:2000])
    write(d/'empty.jpg', ''); write(d/'text.jpg', 'not an image')
    return L(sorted(d.iterdir()))

def order(dl): return torch.cat([i for _,i in dl]).tolist()
def by_index(dl): return {int(j):a for x,i in dl for j,a in zip(i, x.cpu())}
def clean(images): return images.float()/255
def close(a, b): return (a.cpu()-b.cpu()).abs().max()<=1e-6

def refuses(words, f):
    with pytest.raises(InputError) as e: caught(f)
    assert words in str(e.value)

# Unlabelled

def test_batch_is_images_and_indices(items):
    dls = ssl_dls(items, size=64, bs=16); x,i = dls.one_batch()
    assert type(x)==TensorImage; assert x.shape==(16,3,64,64); assert x.dtype==torch.float32
    assert type(i)==torch.Tensor; assert i.dtype==torch.int64
    assert close(x, clean(items.train[i.cpu()]))
    assert (dls.size, dls.items is items, dls.n_inp, len(dls.train), len(dls.valid))==(64, True, 1, 300//16, 0)

def test_epoch_visits_each_image_once(items):
    dls = ssl_dls(items, bs=60); o1,o2 = order(dls.train),order(dls.train)
    assert sorted(o1)==list(range(300)); assert sorted(o2)==list(range(300)); assert o1!=o2

def test_epoch_drops_what_does_not_fill_a_batch(items):
    o = order(ssl_dls(items, bs=64).train); assert (len(o), len(set(o)))==(256,256)

def test_seed_fixes_the_order_of_all_epochs(items):
    def seeded(s): set_seed(s); dls = ssl_dls(items, bs=60); return order(dls.train),order(dls.train)
    assert seeded(3)==seeded(3); assert seeded(3)!=seeded(4)

def test_empty_valid_loader_gives_no_validation_loss(items):
    class AE(Module):
        def __init__(self):
            self.net = nn.Sequential(nn.Conv2d(3,4,3,2,1), nn.ReLU(), nn.ConvTranspose2d(4,3,4,2,1))
        def forward(self, x): self.x = x; return self.net(x)
    def mean_output(p, i): return p.mean()
    ae = AE()
    learn = Learner(ssl_dls(items, bs=16), ae, loss_func=lambda p,i: F.mse_loss(p, ae.x), metrics=mean_output)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 0.01)
    losses = learn.recorder.losses
    assert len(losses)==2*(300//16); assert losses[-1] < losses[0]
    assert learn.recorder.values[-1][1] is None

def test_validation_part_is_seeded_and_sorted(items):
    dls = [ssl_dls(items, bs=10, valid_pct=0.2, seed=s) for s in (0,0,1)]
    held = [order(o.valid) for o in dls]
    assert len(held[0])==60; assert held[0]==sorted(held[0]); assert held[0]==held[1]; assert held[0]!=held[2]
    assert sorted(order(dls[0].train)+held[0])==list(range(300))

def test_parts_share_one_copy_of_the_images(items):
    dls = ssl_dls(items, bs=10, valid_pct=0.2)
    assert dls.train_ds.images.data_ptr()==dls.valid_ds.images.data_ptr()==items.train.data_ptr()

def test_files_read_both_ways_are_the_same(files):
    "In memory and by worker processes; broken files are named once: when caching, or after the first epoch"
    mix = Items('mix', files, L())
    good = [i for i,f in enumerate(mix.train) if f.name not in broken]
    memory,ws1 = caught(lambda: ssl_dls(mix, size=32, bs=1))
    disk,ws2 = caught(lambda: ssl_dls(mix, size=32, bs=1, cache=False, num_workers=2))
    (a,wa),(b,wb),(c,wc) = [caught(lambda: by_index(o.train)) for o in (memory,disk,disk)]
    assert sorted(a)==good; assert sorted(b)==good; assert sorted(c)==good
    for j in good: assert a[j].equal(b[j])
    assert [len(o) for o in (ws1,wa,ws2,wb,wc)]==[1,0,0,1,0]
    assert ws1[0].split(':')[0]==wb[0].split(':')[0]; assert all(o in wb[0] for o in broken)

def test_tensors_read_both_ways_are_the_same(items):
    a,b = [by_index(ssl_dls(items, size=48, bs=20, cache=c, num_workers=0).train) for c in (True,False)]
    assert len(a)==300; assert len(b)==300
    assert all(a[j].equal(b[j]) for j in a)
    assert list(a[0].shape)==[3,48,48]

def test_only_broken_files_end_the_epoch(files):
    bad = Items('broken', files.filter(lambda o: o.name in broken), L())
    refuses('None of the 3 images', lambda: list(ssl_dls(bad, size=32, bs=1, cache=False, num_workers=0).train))

def test_transforms_of_single_items_work(items):
    "Cutting out whole batches steps aside"
    dls = ssl_dls(items, bs=10); dls.add_tfms([Transform(noop)], 'after_item'); x,i = dls.one_batch()
    assert close(x, clean(items.train[i.cpu()]))

def test_new_loaders_from_old_ones(items):
    dls = ssl_dls(items, bs=16)
    assert len(ssl_dls(items, bs=10).new_empty().train)==0
    assert [len(o) for o in (dls.train.new(bs=50), dls.train.new(shuffle=False, drop_last=False))]==[6,19]
    assert order(dls.train.new(shuffle=False, drop_last=False))==list(range(300))

def test_pickled_data_set_is_the_same(items):
    ds = ssl_dls(items, bs=10).train_ds; again = pickle.loads(pickle.dumps(ds))
    assert type(again) is ImageDS and again[7][0].equal(ds[7][0])

def test_ssl_dls_checks_its_arguments(items, files):
    refuses('300 training images but a batch needs 512', lambda: ssl_dls(items, bs=512))
    refuses('at least 32', lambda: ssl_dls(items, size=31)); refuses('at least 32', lambda: ssl_dls(items, size=16))
    refuses('cache must be', lambda: ssl_dls(items, cache='yes'))
    refuses('below 1', lambda: ssl_dls(items, valid_pct=1.))
    refuses(f'There are {len(files)-3} training images',
            lambda: ssl_dls(Items('m', files, L()), size=32, bs=len(files)))

# Labelled

def test_labelled_batch_is_images_and_classes(items):
    dls = labelled_dls(items, bs=25, pct=0.5); x,y = dls.one_batch()
    assert type(y)==TensorCategory; assert x.shape==(25,3,64,64)
    tr = label_fraction(items, 0.5); assert dls.train_ds.y.tolist()==items.train_labels[tr].tolist()
    assert (dls.n_inp, dls.c, list(dls.vocab), len(dls.train_ds))==(1, 8, items.classes, len(tr))

def test_labelled_valid_loader_is_the_test_set(items):
    dls = labelled_dls(items, bs=25, pct=0.5)
    assert torch.cat([y for _,y in dls.valid]).tolist()==items.test_labels.tolist()
    assert close(torch.cat([x for x,_ in dls.valid]), clean(items.test))

def test_labelled_fewer_images_than_a_batch_are_one_batch(items):
    assert len(labelled_dls(items, bs=500, pct=0.1).train)==1

def test_labelled_dls_need_labels(items):
    refuses('no labels', lambda: labelled_dls(Items('u', items.train, items.test)))

# With fastai

@pytest.fixture
def colors(tmp_path):
    "Red, green and blue images, eight of each in both splits"
    for s in ('train','test'):
        for c,color in (('cat',red),('dog',green),('emu',blue)):
            for i in range(8): save(tmp_path/f'{s}/{c}/{i}.png', tuple(int(o*(0.6+0.05*i)) for o in color))
    return labelled_dls(get_dataset(tmp_path), size=32, bs=8)

def test_learner_predicts_and_shows_results(colors):
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(3,3))
    learn = Learner(colors, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit(12, 0.1)
        p,t = learn.get_preds()
        assert p.argmax(1).tolist()==t.tolist(); assert t.tolist()==colors.items.test_labels.tolist()
        assert learn.validate()[1]==1.
        learn.show_results(max_n=3, figsize=(4,2)); plt.close('all')

def test_vision_learner_trains(colors):
    learn = vision_learner(colors, resnet18, pretrained=False, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert learn.get_preds()[0].shape==(24,3)

def test_batches_are_not_normalised_until_asked_for(colors):
    assert 'Normalize' not in str(colors.after_batch)
    colors.add_tfms([Normalize.from_stats(*imagenet_stats)], 'after_batch'); assert colors.one_batch()[0].min()<0

# Real data, where it is at hand

def test_real_gtsrb_is_visited_once():
    if not (d := root/'../shared/data/gtsrb').exists(): pytest.skip('../shared/data/gtsrb is absent')
    dls = ssl_dls(get_dataset('gtsrb', d), size=48, bs=128)
    seen = order(dls.train); assert (len(seen), len(set(seen)))==(4800//128*128,)*2
