"An own folder from the shell: train without labels, search, label the rest; and what was wrong, in one sentence"
import csv, json, re
import pytest
from PIL import Image
from conftest import call
from fgsynth import own
from fgsynth.data.finches import finches

small = '--size 32 --bs 16 --epochs 1 --synth none --arch timm/test_byobnet'.split()

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder of unlabelled images at all depths, half of them on white, and what the names say about that"
    top = tmp_path_factory.mktemp('photos')
    for i,b in enumerate(finches(60, 40, n_species=2, seed=3)):
        d = top.joinpath(*['Ordner ü','b c','d'][:i%4]); d.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray(b.image.permute(1,2,0).numpy())
        if i%2: im = Image.blend(im, Image.new('RGB', im.size, 'white'), .6)
        im.save(d/f'{i:02}.{"jpg" if i%3 else "png"}')
    (top/'Ordner ü/cut.jpg').write_bytes((top/'Ordner ü/01.jpg').read_bytes()[:200])
    return top

@pytest.fixture(scope='module')
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'photos'
    with pytest.MonkeyPatch.context() as m, pytest.warns(UserWarning, match=r'cut\.jpg'): call(m, 'fgsynth_train', '--data', photos, *small, '--out', out)
    return out

def kind(f): return 'white' if int(re.search(r'(\d+)\.\w+$', f)[1])%2 else 'plain'

def test_search(trained, photos, monkeypatch, capsys):
    query = photos/'Ordner ü/01.jpg'
    with pytest.warns(UserWarning, match=r'1 of 61 .*cut\.jpg'): call(monkeypatch, 'fgsynth_search', trained, query, '--k', 5)
    said = capsys.readouterr().out.splitlines()
    found = [l.split('  ')[-1] for l in said if re.match(r' +\d+ ', l)]
    assert len(found)==5 and 'Ordner ü/01.jpg' not in found and all((photos/f).is_file() for f in found)
    scores = [float(l.split()[1]) for l in said if re.match(r' +\d+ ', l)]
    assert scores==sorted(scores, reverse=True)
    assert sum(kind(f)=='white' for f in found)>=4                    # even an untrained encoder tells white from plain
    with Image.open(trained/'search.png') as im: assert im.width>400
    index = next((trained/'index').glob('*.f16'))
    call(monkeypatch, 'fgsynth_search', trained, query, '--k', 5)
    assert [p for p in (trained/'index').glob('*.f16')]==[index]        # used again

def test_label(trained, photos, tmp_path, monkeypatch, capsys):
    files = sorted(f.relative_to(photos).as_posix() for f in photos.rglob('*.*g') if f.name!='cut.jpg')
    (tmp_path/'labels.csv').write_text('file;label\n'+'\n'.join(f'{f};{kind(f)}' for f in files[::3]), encoding='utf-8')
    for classifier in own.classifiers:
        call(monkeypatch, 'fgsynth_label', trained, tmp_path/'labels.csv', '--classifier', classifier, '--out', tmp_path/'p.csv')
        said = capsys.readouterr().out
        assert re.search(r'Accuracy \d+\.\d % .* standard deviation \d+\.\d over 20 parts', said)
        with open(tmp_path/'p.csv', encoding='utf-8') as f: rows = list(csv.DictReader(f))
        assert {r['file'] for r in rows}==set(files)-set(files[::3])
        assert sum(kind(r['file'])==r['label'] for r in rows) > .9*len(rows)
        assert all(.5<=float(r['confidence'])<=1 for r in rows)         # two classes: the better one has at least a half

def test_one_sentence(trained, photos, tmp_path, monkeypatch):
    (tmp_path/'one.csv').write_text('file,label\n01.jpg,white\n'); (tmp_path/'bare').mkdir()
    (tmp_path/'settings.json').write_text(json.dumps(dict(data='finches', path=None, size=32))); (tmp_path/'encoder.safetensors').write_bytes((trained/'encoder.safetensors').read_bytes())
    query = photos/'Ordner ü/01.jpg'
    for command,args,words in [('fgsynth_search', (trained, tmp_path/'none.jpg'), 'cannot be read'), ('fgsynth_search', (tmp_path/'bare', query), 'no finished run'), ('fgsynth_search', (tmp_path, query), 'not here as files'),
            ('fgsynth_search', (trained, query, '--k', 0), '--k 1'), ('fgsynth_search', (trained, query, '--data', tmp_path/'x'), 'does not exist'), ('fgsynth_label', (trained, tmp_path/'none.csv'), 'cannot be read'),
            ('fgsynth_label', (trained, tmp_path/'one.csv'), 'two classes'), ('fgsynth_label', (trained, tmp_path/'one.csv', '--classifier', 'svm'), 'There is no classifier'), ('fgsynth_data', ('check', 'gtrsb'), "did you mean 'gtsrb")]:
        with pytest.raises(SystemExit) as e: call(monkeypatch, command, *args)
        said = str(e.value.code)
        assert words in said and said.startswith(f'{command}: ') and '\n' not in said, (args, said)
