"Near-duplicates by an encoder's features: what is hidden is found, and nothing else is said"
import pytest, torch, torch.nn.functional as F
from PIL import Image
from conftest import call
from fgsynth.core import InputError
from fgsynth.files import write_json
from fgsynth.data.check import check_data
from fgsynth.data.finches import finches
from fgsynth.data.items import Items
from fgsynth.nets.encoders import create_encoder, load_encoder, save_encoder
from fgsynth.own.near import near_duplicates, near_findings, slightly_altered

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run whose encoder has random weights"
    d = tmp_path_factory.mktemp('runs')/'run'; torch.manual_seed(0)
    save_encoder(create_encoder('timm/test_byobnet'), d/'encoder.safetensors', image_size=48)
    write_json(d/'settings.json', dict(data='finches', path=None, size=48))
    return d

@pytest.fixture(scope='module')
def birds(): return finches(150, 48, n_species=4, seed=2).images

def resized(x, side): return F.interpolate(x, side, mode='bicubic', antialias=True)

ways = dict(saved_again=slightly_altered, cut=lambda x: resized(x[:,:,1:-1,1:-1], 48), shifted=lambda x: x.roll(1, 3),
            small=lambda x: resized(resized(x, 40), 48))

@pytest.mark.parametrize('how', ways)
def test_altered_copies_are_the_nearest(run, birds, how):
    test = torch.cat([birds[100:], ways[how](birds[20:26])])
    pairs = near_duplicates(check_data(Items('x', birds[:100], test)), run, cosine=-1.)
    found = [(i,j) for _,(_,i),(_,j) in pairs[:6]]
    assert len({(50+i,20+i) for i in range(6)} & {*found})>=5, found

def test_by_default_as_near_as_most_slightly_altered_copies(run, birds):
    test = torch.cat([birds[100:], slightly_altered(birds[20:40])])
    pairs = near_duplicates(check_data(Items('x', birds[:100], test)), run)
    right = [o for o in pairs if o[1][1]>=50]
    assert all(j==i-30 for _,(_,i),(_,j) in right) and 10<=len(right) and len(pairs)-len(right)<=5
    assert [c for c,*_ in pairs]==sorted((c for c,*_ in pairs), reverse=True)

def test_cosines_are_those_about_the_mean_feature(run, birds):
    test = birds[100:110]; pairs = near_duplicates(check_data(Items('x', birds[:40], test)), run, cosine=-1.)
    with torch.no_grad(): z,q = [load_encoder(run/'encoder.safetensors').eval()(o/255) for o in (birds[:40], test)]
    mean = torch.cat([z, q]).mean(0)
    for c,(_,i),(_,j) in pairs:
        s = F.cosine_similarity(q[i]-mean, z-mean)
        assert abs(s[j]-c)<1e-4 and s.max()-s[j]<1e-4

def test_equal_pixels_are_left_to_the_check(run, birds):
    pairs = near_duplicates(check_data(Items('x', birds[:50], birds[45:60])), run, cosine=-1.)
    assert {i for _,(_,i),_ in pairs}=={*range(5, 15)}

def test_one_split_is_compared_with_itself_and_a_pair_is_named_once(run, birds):
    x = torch.cat([birds[:40], slightly_altered(birds[:2])])
    for items in Items('x', x, x[:0]), Items('x', x[:0], x):
        pairs = near_duplicates(check_data(items), run, cosine=-1.)
        assert {frozenset(i for _,i in o[1:]) for o in pairs} >= {frozenset({0,40}), frozenset({1,41})}
        assert len({frozenset(o[1:]) for o in pairs})==len(pairs)
        assert 'pairs of images' in near_findings(check_data(items), run)[0]

@pytest.mark.parametrize('n', [(0,1), (1,0), (1,1)])
def test_few_images_are_no_trouble(run, birds, n):
    near_duplicates(check_data(Items('x', birds[:n[0]], birds[5:5+n[1]])), run)

def test_command_says_it_of_files_and_leaves_unreadable_ones_out(run, birds, tmp_path, monkeypatch, capsys):
    for s,x in (('train',birds[:20]), ('test',torch.cat([birds[100:103], slightly_altered(birds[7:8])]))):
        (tmp_path/s).mkdir()
        for i,o in enumerate(x): Image.fromarray(o.permute(1,2,0).numpy()).save(tmp_path/f'{s}/{i:02}.png')
        (tmp_path/s/'000.png').write_text('no image')
    call(monkeypatch, 'fgsynth_data', 'check', tmp_path, '--near', run)
    said = capsys.readouterr().out
    assert 'test/03.png ~ train/07.png' in said and said.count('cannot be read')==2

def test_what_it_needs_is_one_sentence(run, birds, tmp_path, monkeypatch):
    check = check_data(Items('x', birds[:9], birds[9:12]))
    with pytest.raises(InputError, match='no finished run'): near_duplicates(check, tmp_path)
    bad = tmp_path/'bad'; enc = load_encoder(run/'encoder.safetensors')
    with torch.no_grad(): next(enc.parameters()).fill_(float('nan'))
    save_encoder(enc, bad/'encoder.safetensors', image_size=48); write_json(bad/'settings.json', dict(size=48))
    with pytest.raises(InputError, match='diverged'): near_duplicates(check, bad)
