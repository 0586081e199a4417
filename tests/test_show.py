"Pictures and the explorer: what they draw is what the networks say"
import io
from copy import copy, deepcopy
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, PIL.Image, pytest, torch, torch.nn.functional as F
from fastai.torch_core import set_seed
from fastcore.test import test_eq as check_eq
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.evaluate.features import features
from fgsynth.methods.learner import ssl_learner
from fgsynth.methods.mocov2 import MoCoV2
from fgsynth.show.explore import Explorer
from fgsynth.show.pictures import find_neighbours, history, show_health, show_retrieval
from fgsynth.synth.callbacks import synth_pairs

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=128, n_test=64, size=48)

@pytest.fixture(scope='module')
def dls(items): return ssl_dls(items, size=48, bs=32)

@pytest.fixture(scope='module')
def learn(dls):
    set_seed(0)
    learn = ssl_learner(dls, 'timm/test_byobnet', MoCoV2(momentum=.99),
                        cbs=synth_pairs(decoder_width=16, decoder_grid=12))
    with learn.no_bar(), learn.no_logging():
        learn.pretrain_decoder(2)
        learn.fit_one_cycle(2, slice(.001, .03))
    return learn

@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')

# pictures

def test_neighbours_are_the_most_similar_images(learn, items):
    encoder = learn.model.encoder
    x,found,right,cos = find_neighbours(encoder, items, 48, n=4, k=3, gallery='train')
    check_eq([tuple(o.shape) for o in (x,found,right,cos)], [(4,3,48,48),(4,3,3,48,48),(4,3),(4,3)])
    z,g = features(encoder, (x*255).byte()),features(encoder, items.train)
    best = F.cosine_similarity(z[:,None].double(), g[None].double(), dim=-1).argsort(descending=True)[:,:3]
    check_eq(found, items.train[best].float()/255)
    q = [(items.test==(o*255).round().byte()).flatten(1).all(1).nonzero()[0,0].item() for o in x]
    check_eq(right, items.test_labels[q][:,None]==items.train_labels[best])

def test_retrieval_has_a_picture_for_each_image(learn, items):
    x,found,_,_ = find_neighbours(learn.model.encoder, items, 48, n=4, k=3)
    check_eq(len(show_retrieval(x, found).axes[0].images), 16)

def test_without_labels_nobody_knows_what_is_right(learn, items):
    bare = copy(items); bare.test_labels = None
    check_eq(find_neighbours(learn.model.encoder, bare, 48, n=2)[2], None)

def test_history_has_every_column_of_every_epoch(learn):
    h = history(learn)
    check_eq([len(v) for v in h.values()], [2]*len(h))
    check_eq(list(h), ['train_loss','ssl_loss','feat_std','rec_loss','pair_loss','pair_diff'])

def test_health_of_two_runs_with_different_columns(learn):
    h = history(learn)
    check_eq(len(show_health(h, {k:v for k,v in h.items() if 'pair' not in k}, labels=['a','b']).axes), 6)

def test_no_variance_without_a_memory(dls):
    with pytest.raises(InputError, match='no memory of features'): ssl_learner(dls, 'resnet18').show_variance()

def test_the_learners_pictures_return_nothing(learn, items):
    "A notebook would show a figure that is returned a second time"
    drawn = [learn.show_pairs(items.test[:2]), learn.show_attention(items.test[:2]), learn.show_variance(),
             learn.show_noise(items.test[:2]), learn.show_retrieval(items, n=2, k=2), learn.show_health()]
    check_eq(drawn, [None]*6); check_eq(len(plt.get_fignums()), 6)

# the explorer's widget

@pytest.fixture
def ex(learn, items):
    ex = learn.explore(items.test[:12]); ex.widget()
    return ex

def rows(ex):
    "The picture that the widget shows now, cut into its five rows"
    a = np.array(PIL.Image.open(io.BytesIO(ex.image.value)).convert('RGB'))
    return np.split(a[:,96:], 5)

def same(a, b): return [np.array_equal(*o) for o in zip(a, b)]

def test_a_slider_moves_the_perturbed_rows_alone(ex):
    before = rows(ex)
    ex.controls.sigma_cam.value = 8.
    for name,b,a in zip(ex.rows, before, rows(ex)): check_eq((b!=a).any(), name in ('perturbed','difference'))
    ex.controls.sigma_cam.value = ex.syn.defaults['sigma_cam']
    check_eq(same(rows(ex), before), [True]*5)                             # back to where it was

def test_another_draw_and_reset(ex):
    before = rows(ex)
    ex.buttons.redraw.click()
    assert (rows(ex)[2]!=before[2]).any() and (rows(ex)[1]==before[1]).all()
    ex.buttons.reset.click()
    check_eq(same(rows(ex), before), [True]*5)

def test_without_noise_there_is_no_difference(ex):
    ex.controls.sigma_cam.value = 0.; ex.controls.sigma_var.value = 0.
    d = rows(ex)[3]
    assert d[(d<255).all(-1)].max() <= 5                                   # inferno's 0 is nearly black
    assert 'cosine' in ex.text.value and '1.00' in ex.text.value

def test_other_images_with_another_mode(ex):
    before = rows(ex)
    ex.controls.mode.value = 'low_var'; ex.controls.first.value = 3
    assert (rows(ex)[0]!=before[0]).any()

def test_an_exception_is_shown_and_not_lost(ex):
    decoder = ex.syn.decoder.forward
    ex.syn.decoder.forward = lambda z: 1/0
    ex.controls.sigma_cam.value = 1.
    assert 'ZeroDivisionError' in ex.error.value
    ex.syn.decoder.forward = decoder
    ex.controls.sigma_cam.value = 2.
    check_eq(ex.error.value, '')

# its page and its files

def test_the_page_holds_everything(ex, tmp_path):
    t = ex.to_html(tmp_path/'a/x.html', sigmas=(0,3), modes=('both',)).read_text()
    assert t.startswith('<!doctype html>') and 'http' not in t.replace('http-equiv','') and t.count('alt="')==3
    assert 10_000 < len(t) < 3_000_000

def test_two_explorers_in_one_page_have_different_names(ex, items):
    a = ex.to_html(sigmas=(0,3), modes=('both',), fragment=True)
    ex.first = 6
    b = ex.to_html(sigmas=(0,3), modes=('both',), fragment=True)
    assert not a.startswith('<!doctype') and a.split('"')[1]!=b.split('"')[1]

def test_what_stands_in_a_title_is_no_html(ex):
    assert '<h2>&lt;b&gt; $n</h2>' in ex.to_html(sigmas=(0,), modes=('both',), title='<b> $n')

def test_a_run_folder_can_be_explored(ex, tmp_path):
    ex.syn.save(tmp_path/'synth.safetensors'); torch.save(ex.images[:4], tmp_path/'examples.pt')
    here = Explorer(ex.syn, images=ex.images[:4])
    assert np.array_equal(Explorer.from_run(tmp_path).picture()[0], here.picture()[0])
    torch.save(Path(tmp_path), tmp_path/'examples.pt')                     # a file that holds more than images
    with pytest.raises(InputError, match='is refused'): Explorer.from_run(tmp_path)
    (tmp_path/'examples.pt').unlink()
    with pytest.raises(InputError, match='kept no examples'): Explorer.from_run(tmp_path)
    with pytest.raises(InputError, match='no run folder'): Explorer.from_run(tmp_path/'none')
    (tmp_path/'synth.safetensors').unlink()
    with pytest.raises(InputError, match='synth.safetensors'): Explorer.from_run(tmp_path)

def test_an_explorer_of_plain_networks(ex, items):
    plain = Explorer(ex.syn.encoder, ex.syn.decoder, items.test[:6])
    check_eq(plain.picture()[0].shape, (5*50, 6*50, 3))
    net = deepcopy(ex.syn.encoder).train()
    Explorer(net, ex.syn.decoder, items.test[:70])
    assert net.training                                                    # the caller's network stays as it is
    big = F.interpolate(items.test[:6].float(), 96).byte()
    check_eq(Explorer(net, ex.syn.decoder, big).syn.v.shape, (net.num_features,))

def test_an_explorer_without_images_or_decoder(ex, items):
    with pytest.raises(InputError, match='no images'): Explorer(ex.syn)
    with pytest.raises(InputError, match='no images'): Explorer(ex.syn, images=items.test[:0])
    with pytest.raises(InputError, match='needs a decoder'): Explorer(ex.syn.encoder, images=items.test[:2])
