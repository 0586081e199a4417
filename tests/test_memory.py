"What is not looked at is not decoded, and what does not fit into memory is taken block by block"
import pytest, torch
from torch import Tensor
from PIL import Image
from fgsynth.core import InputError
from fgsynth.data import decoded as decoded_module
from fgsynth.data.datasets import get_dataset
from fgsynth.data.finches import finches
from fgsynth.data.layouts import folder_items
from fgsynth.data.items import Items
from fgsynth.data.loaders import ssl_dls
from fgsynth.evaluate.attention import attention_on_parts
from fgsynth.evaluate.features import features
from fgsynth.evaluate.measures import evaluate
from fgsynth.evaluate.probe import linear_probe
from fgsynth.methods.learner import ssl_learner
from fgsynth.nets.encoders import create_encoder
from fgsynth.runs.measure import evaluate_run
from fgsynth.runs.report import example_images
from fgsynth.runs.train import train
from fgsynth.show.pictures import find_neighbours
from fgsynth.synth.callbacks import synth_pairs
from fgsynth.synth.decoding import AutoEncoder

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder with 40 training and 60 test images of two classes"
    top = tmp_path_factory.mktemp('photos')
    for i,b in enumerate(finches(100, size=32, n_species=2, seed=0)):
        file = top/('train' if i<40 else 'test')/f'{i%2}/{i:03}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(b.image.permute(1,2,0).numpy()).save(file)
    return top

@pytest.fixture
def items(photos): return folder_items(photos)

@pytest.fixture
def decoded(monkeypatch):
    "The files that have been decoded, one by one"
    seen,decode = [],decoded_module.decode_image
    def note(path, size):
        seen.append(path)
        return decode(path, size)
    monkeypatch.setattr(decoded_module, 'decode_image', note)
    return seen

@pytest.fixture(scope='module')
def encoder():
    torch.manual_seed(0)
    return create_encoder('timm/test_byobnet').eval()

def test_examples_alone_are_decoded(items, decoded):
    "Those that stood there when all were"
    x = example_images(items, 32, 'cpu')
    assert len(decoded)==24 and '_kept' not in vars(items)
    every = items.load('test', 32)[0]
    assert x.equal(every[torch.linspace(0, 59, 24).long()].float()/255)

@pytest.mark.parametrize('n', [0, 3, 60])
def test_examples_without_enough_test_images(n, photos, items):
    "Of none the training images are shown, of a few all, and a plain list will do"
    some = Items('some', items.train, list(items.test)[:n])
    assert len(example_images(some, 32, 'cpu'))==(min(n, 24) or 24)

def test_unreadable_examples_are_left_out_and_do_not_end_a_run(items, tmp_path):
    files = []
    for i,f in enumerate(items.test):
        files.append(tmp_path/f'{i:02}.png')
        files[-1].write_bytes(b'no image' if i in (0,59) else f.read_bytes())
    with pytest.warns(UserWarning, match='2 of 24'): x = example_images(Items('two', files, files), 32, 'cpu')
    assert len(x)==22
    for i in torch.linspace(0, 59, 24).long().tolist(): files[i].write_bytes(b'no image')
    with pytest.warns(UserWarning, match='24 of 60'): x = example_images(Items('all', files, files), 32, 'cpu')
    assert len(x)==24

def test_a_run_decodes_no_more_test_images_than_it_shows(photos, decoded, tmp_path, undrawn):
    learn = train(preset='smoke', data=str(photos), bs=8, out=tmp_path/'run')
    test = [f for f in decoded if 'test' in f.parts]
    assert len(test)==24 and 'test' not in str(learn.dls.items.__dict__.get('_kept', {}).keys())

def test_a_measurement_decodes_into_the_runs_cache(photos, decoded, tmp_path, monkeypatch, undrawn):
    "Once for all measurements"
    monkeypatch.chdir(tmp_path)
    train(preset='smoke', data=str(photos), bs=8, synth='none', cache_dir='cache', out='run')
    decoded.clear()
    for _ in range(2):
        evaluate_run('run')
        assert len(decoded)==100 # training looked at whole pictures

def test_attention_decodes_what_it_looks_at(items, encoder, decoded):
    masks = torch.ones(60, 32, 32, dtype=torch.uint8)
    masked = Items('masked', items.train, items.test, items.train_labels, items.test_labels, items.classes,
                   test_masks=masks)
    assert attention_on_parts(encoder, masked, 32, n=5)['area']==100
    assert len(decoded)==5

class Mapped(Tensor):
    "Images in a file, of which at most 20 may be copied at once"
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        res = super().__torch_function__(func, types, args, kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if isinstance(res, Tensor) and res.ndim==4 and len(res)>20 and first is not None:
            assert res.data_ptr()==first.data_ptr(), f'{func} copies {len(res)} images'
        return res

class Large(Items):
    "Items whose images are `Mapped`"
    def load(self, *args, **kw):
        x,*rest = Items.load(self, *args, **kw)
        return x.as_subclass(Mapped), *rest

measures = dict(
    evaluate=lambda f,items: evaluate(f, items, 32, bs=20, epochs=3),
    augmented=lambda f,items: evaluate(f, items, 32, bs=20, augment=True, epochs=1, pcts=(1.,.5)),
    probe=lambda f,items: linear_probe(f, items, .5, size=32, epochs=3),
    neighbours=lambda f,items: find_neighbours(f, items, 32, n=2, k=3)[3])

@pytest.mark.parametrize('name', measures)
def test_measures_copy_no_more_than_a_block(name, items, encoder, monkeypatch):
    "And are what they are on images in memory"
    for module in 'features','probe': # blocks of 20, where nobody says how large they are
        monkeypatch.setattr(f'fgsynth.evaluate.{module}.features', small_blocks)
    monkeypatch.setattr('fgsynth.show.pictures.features', small_blocks)
    if name=='augmented': monkeypatch.setattr('fgsynth.evaluate.measures.fit_probe', small_batches)
    large = Large(**{k:getattr(items, k) for k in Items.__dataclass_fields__})
    got,want = measures[name](encoder, large),measures[name](encoder, items)
    if isinstance(got, Tensor): assert got.equal(want)
    else: assert got==want

def small_blocks(*args, **kw): return features(*args, **{**kw, 'bs':20})

def small_batches(*args, **kw):
    from fgsynth.evaluate.probe import fit_probe
    return fit_probe(*args, **{**kw, 'bs':20})

def test_features_of_some_rows(items, encoder):
    x,_ = items.load('test', 32)
    rows = torch.tensor([50,3,4,17])
    torch.testing.assert_close(features(encoder, x, rows=rows, bs=3), features(encoder, x)[rows], rtol=1e-4, atol=1e-5)

def test_a_block_of_unreadable_files_is_left_out(items, encoder, tmp_path):
    files = [tmp_path/f'{i}.png' for i in range(8)]
    for i,f in enumerate(files): f.write_bytes(b'no image' if 2<=i<6 else items.test[i].read_bytes())
    with pytest.warns(UserWarning): z = features(encoder, files, bs=2, size=32)
    assert len(z)==4
    with pytest.warns(UserWarning), pytest.raises(InputError, match='none that can be read'):
        features(encoder, files[2:6], bs=2, size=32)

def pretrained(limit, monkeypatch):
    "Passes of the encoder in two epochs of the decoder, with a limit to the features, and what a checkpoint holds"
    monkeypatch.setattr(AutoEncoder, 'most_bytes', limit)
    items = get_dataset('finches', n_train=32, n_test=8, size=32)
    learn = ssl_learner(ssl_dls(items, size=32, bs=8), 'timm/test_byobnet', cbs=synth_pairs(decoder_width=4))
    seen = []
    learn.model.encoder.register_forward_hook(lambda *o: seen.append(1))
    with learn.no_bar(), learn.no_logging(): pre = learn.pretrain_decoder(2)
    return len(seen), pre.model.get_extra_state()

@pytest.mark.parametrize('limit,passes', [(32*256*4, 4), (32*256*4-1, 8)])
def test_features_of_a_pretraining_have_a_limit(limit, passes, monkeypatch):
    "Up to it each image is encoded once, and beyond it in each epoch, and checkpoints hold none of them"
    n,state = pretrained(limit, monkeypatch)
    assert n==passes and (state['zs'] is None)==(passes==8)
    kept = sum(t.numel()*t.element_size() for t in (state['zs'],) if t is not None)
    assert kept<=limit

def test_the_limit_is_two_gigabytes():
    assert AutoEncoder.most_bytes==2e9
