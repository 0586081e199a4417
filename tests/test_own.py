"An own folder of images: its index, the search in it and labels for the rest; and what was wrong, in one sentence"
import csv, json, re, shutil, warnings
import pandas as pd
import pytest, torch, torch.nn.functional as F
from fastcore.test import test_close, test_eq
from PIL import Image
from conftest import call
from figures import without_figures
from fgsynth.core import InputError
from fgsynth.files import write_json
from fgsynth.data.decoded import load_images
from fgsynth.data.finches import finches
from fgsynth.evaluate.features import features
from fgsynth.evaluate.probe import fit_probe
from fgsynth.nets.encoders import create_encoder, load_encoder, save_encoder
from fgsynth.own import index as index_module, search as search_module
from fgsynth.own.index import ImageIndex, write_index
from fgsynth.own.label import classifiers, label_run
from fgsynth.own.search import build_index, search_run

test_close.__test__ = test_eq.__test__ = False # pytest would take them for tests

# ---- the commands, on a run that was trained

small = '--size 32 --bs 16 --epochs 1 --synth none --arch timm/test_byobnet'.split()

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of unlabelled images at all depths, half of them on white, and what the names say about that"
    top = tmp_path_factory.mktemp('photos')
    for i,b in enumerate(finches(60, 40, n_species=2, seed=3)):
        d = top.joinpath(*['Ordner ü','b c','d'][:i%4])
        d.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray(b.image.permute(1,2,0).numpy())
        if i%2: im = Image.blend(im, Image.new('RGB', im.size, 'white'), .6)
        im.save(d/f'{i:02}.{"jpg" if i%3 else "png"}')
    (top/'Ordner ü/cut.jpg').write_bytes((top/'Ordner ü/01.jpg').read_bytes()[:200])
    return top

@pytest.fixture(scope='module')
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'photos'
    with pytest.MonkeyPatch.context() as m, without_figures(), pytest.warns(UserWarning, match=r'cut\.jpg'):
        call(m, 'fgsynth_train', '--data', photos, *small, '--out', out)
    return out

@pytest.fixture
def wide(tmp_path, monkeypatch):
    "Wide images whose left and right thirds tell them apart, and a run that was trained on the whole of them"
    top = tmp_path/'wide'
    for i in range(40):
        im = Image.new('RGB', (120,40), (3*i,90,90))
        im.paste(('red','blue')[i%2], (0,0,40,40)); im.paste(('red','blue')[i%2], (80,0,120,40))
        for split in ('train','test'):
            f = top/split/('red','blue')[i%2]/f'{i}.png'
            f.parent.mkdir(parents=True, exist_ok=True); im.save(f)
    with without_figures(): call(monkeypatch, 'fgsynth_train', '--data', top, *small, '--resize', 'squish',
                                 '--out', tmp_path/'run')
    return top,tmp_path/'run'

def test_what_was_trained_on_whole_pictures_is_used_on_whole_pictures(wide, monkeypatch, capsys):
    top,run = wide
    assert json.loads((run/'settings.json').read_text(encoding='utf-8'))['resize']=='squish'
    index = build_index(run, top/'test')
    assert len(index.names)==40
    encoder = load_encoder(run/'encoder.safetensors')
    x,_ = load_images([index.path(i) for i in range(40)], 32, resize='squish')
    test_close(F.normalize(torch.as_tensor(index.z[:]).float()), F.normalize(features(encoder, x)), 5e-3)
    capsys.readouterr()
    with without_figures(): call(monkeypatch, 'fgsynth_eval', run)
    with open(run/'metrics.csv', encoding='utf-8') as f: row = next(csv.DictReader(f))
    assert float(row['top1_100'])==100.                               # which nothing in the centre could say

def kind(f): return 'white' if int(re.search(r'(\d+)\.\w+$', f)[1])%2 else 'plain'

def test_search(trained, photos, monkeypatch, capsys):
    query = photos/'Ordner ü/01.jpg'
    with pytest.warns(UserWarning, match=r'1 of 61 .*cut\.jpg'):
        call(monkeypatch, 'fgsynth_search', trained, query, '--k', 5)
    said = capsys.readouterr().out.splitlines()
    found = [l.split('  ')[-1] for l in said if re.match(r' +\d+ ', l)]
    assert len(found)==5 and 'Ordner ü/01.jpg' not in found and all((photos/f).is_file() for f in found)
    scores = [float(l.split()[1]) for l in said if re.match(r' +\d+ ', l)]
    assert scores==sorted(scores, reverse=True)
    assert sum(kind(f)=='white' for f in found)>=4                    # even an untrained encoder tells white from plain
    with Image.open(trained/'search.png') as im: assert im.width>400
    index = next((trained/'index').glob('*.f16'))
    call(monkeypatch, 'fgsynth_search', trained, query, '--k', 5)
    assert [p for p in (trained/'index').glob('*.f16')]==[index]      # used again

def test_label(trained, photos, tmp_path, monkeypatch, capsys):
    files = sorted(f.relative_to(photos).as_posix() for f in photos.rglob('*.*g') if f.name!='cut.jpg')
    lines = ['file;label', *[f'{f};{kind(f)}' for f in files[::3]]]
    (tmp_path/'labels.csv').write_text('\n'.join(lines), encoding='utf-8')
    for classifier in classifiers:
        call(monkeypatch, 'fgsynth_label', trained, tmp_path/'labels.csv', '--classifier', classifier,
             '--out', tmp_path/'p.csv')
        said = capsys.readouterr().out
        assert re.search(r'Accuracy \d+\.\d % .* standard deviation \d+\.\d over 20 parts', said)
        with open(tmp_path/'p.csv', encoding='utf-8') as f: rows = list(csv.DictReader(f))
        assert {r['file'] for r in rows}==set(files)-set(files[::3])
        assert sum(kind(r['file'])==r['label'] for r in rows) > .9*len(rows)
        assert all(.5<=float(r['confidence'])<=1 for r in rows)       # two classes: the better one has at least a half

def test_one_sentence(trained, photos, tmp_path, monkeypatch):
    (tmp_path/'one.csv').write_text('file,label\n01.jpg,white\n')
    (tmp_path/'bare').mkdir()
    write_json(tmp_path/'settings.json', dict(data='finches', path=None, size=32))
    shutil.copy(trained/'encoder.safetensors', tmp_path)
    query = photos/'Ordner ü/01.jpg'
    for command,args,words in [
            ('fgsynth_search', (trained, tmp_path/'none.jpg'), 'cannot be read'),
            ('fgsynth_search', (tmp_path/'bare', query), 'no finished run'),
            ('fgsynth_search', (tmp_path, query), 'not here as files'),
            ('fgsynth_search', (trained, query, '--k', 0), '--k 1'),
            ('fgsynth_search', (trained, query, '--data', tmp_path/'x'), 'does not exist'),
            ('fgsynth_label', (trained, tmp_path/'none.csv'), 'cannot be read'),
            ('fgsynth_label', (trained, tmp_path/'one.csv'), 'two classes'),
            ('fgsynth_label', (trained, tmp_path/'one.csv', '--classifier', 'svm'), 'There is no classifier'),
            ('fgsynth_data', ('check', 'gtrsb'), "did you mean 'gtsrb")]:
        with pytest.raises(SystemExit) as e: call(monkeypatch, command, *args)
        said = str(e.value.code)
        assert words in said and said.startswith(f'{command}: ') and '\n' not in said, (args, said)

# ---- the functions, on finches under three lamps, with an encoder of random weights

lamps = dict(bulb=(230.,160,90), moon=(150,165,190), sun=(210,195,150))

@pytest.fixture(scope='module')
def lit(tmp_path_factory):
    "A folder of finches under lamps, a run whose encoder has random weights, and the lamp of each image"
    top = tmp_path_factory.mktemp('lit')
    photos,run,lamp = top/'photos',top/'run',{}
    torch.manual_seed(0)
    for i,b in enumerate(finches(240, size=48, n_species=3, seed=1)):
        name = f'20{i%4}/camera {i%5}/{i:03}.png'
        lamp[name] = list(lamps)[i%3]
        light = (torch.tensor(lamps[lamp[name]]) + 18*torch.randn(3)).clamp(0, 255)
        (photos/name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((b.image.permute(1,2,0) + light)/2).byte().numpy()).save(photos/name)
    torch.manual_seed(0)
    save_encoder(create_encoder('timm/test_byobnet'), run/'encoder.safetensors', image_size=48)
    settings(run, str(photos))
    build_index(run)
    return photos,run,lamp

def settings(run, data): write_json(run/'settings.json', dict(data=data, path=None, size=48))

@pytest.fixture
def own_copy(lit, tmp_path):
    "The same folder and run, to be spoilt"
    photos,run,lamp = tmp_path/'photos',tmp_path/'run',lit[2]
    for a,b in zip(lit, (photos,run)): shutil.copytree(a, b)
    settings(run, str(photos))
    return photos,run,lamp

@pytest.fixture
def encoded(monkeypatch):
    "How many images the encoder has seen, as a list of numbers"
    n = []
    def count(enc, x, **kw):
        n.append(len(x))
        return features(enc, x, **kw)
    monkeypatch.setattr(search_module, 'features', count)
    return n

def test_only_what_is_new_is_encoded(own_copy, encoded):
    photos,run,_ = own_copy
    index = build_index(run)
    assert sum(encoded)==0
    shutil.copy(index.path(3), photos/'new.png')
    index.path(5).unlink()
    Image.new('RGB', (48,48), 'red').save(index.path(7))
    more = build_index(run)
    assert (sum(encoded), len(more))==(2, 240)

def test_an_unreadable_image_is_told_once(own_copy, encoded):
    photos,run,_ = own_copy
    (photos/'broken.jpg').write_text('no image')
    with pytest.warns(UserWarning, match=r'1 of 241 .*broken\.jpg'): build_index(run)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(build_index(run))==240
    assert sum(encoded)==0

def test_another_encoder_makes_another_index(own_copy, encoded):
    _,run,_ = own_copy
    save_encoder(create_encoder('timm/test_byobnet'), run/'encoder.safetensors', image_size=48)
    index = build_index(run)
    assert sum(encoded)==240
    assert len(list(index.folder.iterdir()))==3

@pytest.mark.parametrize('damage', [lambda f: f.write_bytes(b''), lambda f: f.unlink()])
def test_a_damaged_index_is_made_again(own_copy, encoded, damage):
    _,run,_ = own_copy
    damage(run/'index/index.json')
    assert (len(build_index(run)), sum(encoded))==(240, 240)

def test_the_folder_under_another_name_costs_nothing(own_copy, encoded, tmp_path):
    photos,run,lamp = own_copy
    (tmp_path/'link').symlink_to(photos, target_is_directory=True)
    index = build_index(run)
    same = build_index(run, tmp_path/'link')
    test_eq((sum(encoded), same.names), (0, index.names))
    test_eq(same.root, tmp_path/'link')
    table = write_labels(tmp_path, [f'{photos/o},{lamp[o]}' for o in index.names[:60]])
    test_eq(label_run(run, table, data=tmp_path/'link', out=tmp_path/'p.csv')['labelled'], 60)

def test_what_an_index_needs_is_one_sentence(own_copy, tmp_path):
    photos,run,_ = own_copy
    for kw,words in [(dict(run=tmp_path), 'no finished run'),
                     (dict(data=tmp_path/'none'), 'does not exist'),
                     (dict(data='finches'), 'are not files'),
                     (dict(folder=next(photos.rglob('*.png'))), '--index')]:
        with pytest.raises(InputError, match=words): build_index(**{**dict(run=run), **kw})
    settings(run, 'moved')
    with pytest.raises(InputError, match="'moved'"): build_index(run)

def test_a_search_needs_a_neighbour(lit):
    with pytest.raises(InputError, match='k=1'): build_index(lit[1]).search(torch.zeros(1,256), 0)

# ---- clusters

@pytest.fixture
def clustered(tmp_path):
    "An index of 20,000 vectors in groups, and 200 queries"
    pytest.importorskip('faiss')
    g = torch.Generator().manual_seed(1)
    groups = torch.randn(300, 64, generator=g)
    def like_some(n): return groups[torch.randint(300, (n,), generator=g)] + .7*torch.randn(n, 64, generator=g)
    z = like_some(20_000)
    files = [[f'{i}.png',0,0] for i in range(len(z))]
    write_index(tmp_path/'big', '.', [(files, F.normalize(z, dim=1), z.norm(dim=1))])
    return ImageIndex(tmp_path/'big'),like_some(200)

def test_many_images_are_searched_in_clusters(clustered, monkeypatch):
    big,q = clustered
    exact,near = big.search(q, 10, exact=True)[1],big.search(q, 10, exact=False)[1]
    test_eq(big.search(q, 10)[1], exact)
    monkeypatch.setattr(ImageIndex, 'many', 10_000)
    test_eq(big.search(q, 10)[1], near)
    test_eq(big.search(q, 10, exact=True)[1], exact)

def test_clusters_are_made_once(clustered):
    big,q = clustered
    big.search(q, 1, exact=False)
    before = (big.folder/f'{big.key}.faiss').stat().st_mtime_ns
    ImageIndex(big.folder).search(q, 1, exact=False)
    assert (big.folder/f'{big.key}.faiss').stat().st_mtime_ns==before

def test_clusters_that_cannot_be_written_are_searched_all_the_same(clustered):
    big,q = clustered
    found = big.search(q, 1, exact=False)[1]
    file = big.folder/f'{big.key}.faiss'
    file.unlink()
    (big.folder/f'{file.name}.new').mkdir()
    with pytest.warns(UserWarning, match='cannot be written'): again = ImageIndex(big.folder).search(q, 1, exact=False)
    assert torch.equal(again[1], found)

def test_without_faiss_the_search_is_exact(clustered, monkeypatch):
    big,q = clustered
    exact = big.search(q, 10, exact=True)[1]
    monkeypatch.setattr(index_module, 'find_spec', lambda name: None)
    monkeypatch.setattr(ImageIndex, 'many', 1)
    test_eq(big.search(q, 10)[1], exact)
    with pytest.raises(InputError, match=r'fgsynth\[faiss\]'): big.search(q, exact=False)

def test_clusters_give_all_of_a_few_images(lit):
    pytest.importorskip('faiss')
    index = build_index(lit[1])
    found = index.search(index.features(slice(0,3)), 240, exact=False)[1][0]
    test_eq(sorted(found.tolist())[-3:], [237,238,239])

# ---- search by example

def test_a_search_finds_all_others_at_most(own_copy, tmp_path):
    photos,run,lamp = own_copy
    query,*others = sorted(photos.rglob('*.png'))
    for f in others[9:]: f.unlink()
    assert len(search_run(run, query, 500, out=tmp_path/'s.png'))==9

def test_what_a_search_needs_is_one_sentence(lit, tmp_path):
    photos,run,lamp = lit
    query = photos/next(iter(lamp))
    (tmp_path/'broken.jpg').write_text('no image')
    for kw,words in [(dict(query=tmp_path/'broken.jpg'), 'cannot be read'), (dict(query='none.png'), 'none.png'),
                     (dict(k=0), '--k 1'), (dict(out=f'{query}/x.png'), '--out')]:
        with pytest.raises(InputError, match=words): search_run(run, **{**dict(query=query), **kw})

# ---- labels for the rest

def write_labels(folder, lines):
    (folder/'l.csv').write_text('\n'.join(['file,label', *lines]))
    return folder/'l.csv'

@pytest.fixture
def told(lit, tmp_path):
    "What `label_run` makes of the lines of a table"
    return lambda lines,**kw: label_run(lit[1], write_labels(tmp_path, lines), **{**dict(out=tmp_path/'p.csv'), **kw})

@pytest.fixture
def lines(lit): return [f'{o},{lit[2][o]}' for o in sorted(lit[2])[:60]]

def test_neighbours_vote_better_than_chance(told, lines):
    assert told(lines, classifier='knn')['accuracy']>50

def test_a_good_table_gives_no_warning(told, lines):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        test_eq(told(lines)['labelled'], 60)

def test_names_may_be_bare_or_whole(told, lines, lit):
    photos,res = lit[0],told(lines)
    bare = told([o.rpartition('/')[2] for o in lines])
    test_eq(bare['labelled'], 60)
    test_eq(bare['accuracy'], res['accuracy'])
    test_eq(told([f'{photos.resolve()/o}' for o in lines])['labelled'], 60)

def test_names_may_be_composed_in_another_way(own_copy, lines):
    "Files as macOS writes them, a table as everybody else does, and a class in both"
    photos,run,_ = own_copy
    first,second = [o.rpartition(',')[0] for o in lines[:2]]
    for o,name in (first,'Mu\u0308cke.png'), (second,'Wespe.png'): (photos/o).rename(photos/name)
    other = ['M\u00fccke.png,Bu\u0308ffel', 'Wespe.png,B\u00fcffel', *lines[2:]]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert label_run(run, write_labels(photos.parent, other))['labelled']==60
    said = pd.read_csv(run/'predictions.csv').label
    assert 'Bu\u0308ffel' not in set(said)

def test_a_picture_among_the_images_is_refused(own_copy, lit):
    photos,run,lamp = own_copy
    query = photos/next(iter(lamp))
    for out in photos/'found.png', query, photos/'new/found.png':
        with pytest.raises(InputError, match='would lie among'): search_run(run, query, 3, out=out)
    shutil.copytree(run, photos/'runs/a')
    before = len(build_index(run))
    search_run(photos/'runs/a', query, 3, data=photos)                # into the run, which is no data
    assert len(build_index(run))==before

def test_a_lost_file_and_a_single_image_are_told(told, lines, lit, capsys):
    with pytest.warns(UserWarning) as ws: told([*lines, 'none.png,x', f'{sorted(lit[2])[70]},rare'])
    assert len(ws)==2
    assert 'none.png' in str(ws[0].message) and 'rare' in str(ws[1].message) and 'rare' in capsys.readouterr().out

def test_nothing_may_be_left_to_label(told, lit, capsys):
    told([f'{o},{"ab"[i%2]}' for i,o in enumerate(sorted(lit[2]))])
    assert 'already' in capsys.readouterr().out

def test_what_labels_need_is_one_sentence(told, lines, lit, tmp_path):
    a,b = [o.rpartition(',')[0] for o in lines[:2]]
    for bad,words,kw in [([f'{o.rpartition(",")[0]},a' for o in lines], 'two classes', {}),
                         (['x.png,a','y.png,b'], 'two classes', {}),
                         (lines, 'There is no classifier', dict(classifier='svm')),
                         (lines, '--folds', dict(folds=1)),
                         ([f'{a},a', f'{b},b'], 'No class has two', {}),
                         ([f'{a},a', f'{a.rpartition("/")[2]},b', *lines[1:]], 'two things', {})]:
        with pytest.raises(InputError, match=words), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            told(bad, **kw)
    with pytest.raises(InputError, match='cannot be read'): label_run(lit[1], tmp_path/'nolabels.csv')

def test_the_table_may_lie_among_the_images(own_copy, lines):
    photos,run,_ = own_copy
    test_eq(label_run(run, write_labels(photos, lines))['labelled'], 60)

def test_predictions_are_those_of_the_probe(told, lines, lit, tmp_path):
    "Label and confidence are the softmax of the probe's scores at the temperature"
    _,run,lamp = lit
    res,rows = told(lines),pd.read_csv(tmp_path/'p.csv')
    index = build_index(run)
    known = [o.rpartition(',')[0] for o in lines]
    classes = sorted({lamp[o] for o in known})
    y = torch.tensor([classes.index(lamp[o]) for o in known])
    probe = fit_probe(index.features(torch.tensor([index.names.index(o) for o in known])), y, 3)
    with torch.no_grad(): scores = probe(index.features([index.names.index(rows.file[9])]))
    p = (scores/res['temperature']).softmax(1)[0]
    test_eq(rows.label[9], classes[p.argmax()])
    test_close(rows.confidence[9], p.max().item(), 2e-3)
