"Paths in the settings of a run mean the same from every folder, and what has moved is said"
import json, os, re, shutil
import pytest, torch
from fastcore.docments import docments
from PIL import Image
from figures import without_figures
from fgsynth.core import InputError
from fgsynth.data.finches import finches
from fgsynth.files import write_json
from fgsynth.nets.encoders import create_encoder, load_encoder, save_encoder
from fgsynth.own.index import ImageIndex, write_index
from fgsynth.own.search import build_index
from fgsynth.runs import measure
from fgsynth.runs.measure import evaluate_run
from fgsynth.runs.presets import Settings, origins
from fgsynth.runs.report import images_of_run
from fgsynth.runs.rows import row_key
from fgsynth.runs.train import run_to_resume, train

def draw(folder, seed, n=40):
    "A folder with two classes of images"
    for i,b in enumerate(finches(n, size=32, n_species=2, seed=seed)):
        file = folder/f'{i%2}/{i:02}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(b.image.permute(1,2,0).numpy()).save(file)

pytestmark = pytest.mark.usefixtures('undrawn')
small = dict(synth='none', preset='my.toml', weights='start.safetensors', cache_dir='cache', out='run')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A run whose paths were all given as relative ones, in `home`; `away` has other images under the same name"
    top = tmp_path_factory.mktemp('places')
    home,away = top/'home',top/'away'
    draw(home/'photos', 0); draw(away/'photos', 1, 30)
    (home/'my.toml').write_text('base = "smoke"\nbs = 8  # of mine')
    save_encoder(create_encoder('timm/test_byobnet'), home/'start.safetensors')
    before = os.getcwd()
    os.chdir(home)
    try:
        with without_figures(): train(data='photos', **small)
    finally: os.chdir(before)
    return home,away

@pytest.fixture
def places(made, tmp_path, monkeypatch):
    "Copies of both, to be spoilt, with the paths of the run as if it had been made there; we are in `away`"
    home,away = tmp_path/'home',tmp_path/'away'
    for a,b in zip(made, (home,away)): shutil.copytree(a, b)
    settings = (home/'run/settings.json').read_text()
    (home/'run/settings.json').write_text(settings.replace(str(made[0]), str(home)))
    monkeypatch.chdir(away)
    return home,away

def caches(folder): return len(list(folder.glob('*.u8')))

def noted(run): return json.loads((run/'settings.json').read_text())

def note(run, **changes): write_json(run/'settings.json', noted(run) | changes)

def test_every_setting_that_is_a_path_is_kept_as_an_absolute_one(made, monkeypatch):
    home,_ = made
    paths = [k for k,v in docments(Settings).items() if v and re.search(r'\b(folder|file|lies)\b', v, re.I)]
    assert paths==['data','path','cache_dir','preset','weights']
    monkeypatch.chdir(home)
    s = Settings(data='photos', path='.', cache_dir='../c', preset='my.toml', weights='~/w.pth').located()
    for k in paths: assert os.path.isabs(getattr(s, k)), k
    assert (s.data, s.path, s.cache_dir)==(str(home/'photos'), str(home), str(home.parent/'c'))
    assert '~' not in s.weights and {k:noted(home/'run')[k] for k in paths if k!='path'}==dict(
        data=str(home/'photos'), cache_dir=str(home/'cache'), preset=str(home/'my.toml'),
        weights=str(home/'start.safetensors'))

@pytest.mark.parametrize('name', ['gtsrb','Finches','nothing/here','cpu'])
def test_a_name_stays_a_name(name, tmp_path, monkeypatch):
    "Even where a folder is called the same"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'gtsrb').mkdir()
    s = Settings(data=name, preset='cpu').located()
    assert (s.data, s.preset)==(name, 'cpu')
    assert Settings(data='./gtsrb').located().data==str(tmp_path/'gtsrb')

def test_a_run_is_measured_and_searched_from_another_folder(places, monkeypatch):
    "With its own images and its own cache, though another folder of that name is here"
    home,away = places
    seen,get,before = [],measure.run_items,caches(home/'cache')
    def note_items(*args):
        seen.append(get(*args))
        return seen[-1]
    monkeypatch.setattr(measure, 'run_items', note_items)
    evaluate_run(str(home/'run'))
    assert all(f.is_relative_to(home) for f in seen[0].train) and len(seen[0].train)+len(seen[0].test)==40
    assert caches(home/'cache')==before+2 and not (away/'cache').exists()
    assert build_index(home/'run').root==home/'photos'

def test_the_origin_of_a_setting_is_found_from_another_folder(places):
    assert 'of mine' in origins(noted(places[0]/'run'))['bs']

def test_another_cache_may_be_given(places):
    home,away = places
    evaluate_run(str(home/'run'), cache_dir='here')
    assert caches(away/'here')==2

@pytest.mark.parametrize('f', [evaluate_run, build_index])
def test_images_that_have_moved_are_said(f, places):
    home,_ = places
    (home/'photos').rename(home/'pictures')
    with pytest.raises(InputError, match=rf"'{home}/photos', or no longer: say with --data"): f(str(home/'run'))
    f(str(home/'run'), data=str(home/'pictures'))

def test_a_data_set_that_has_moved_is_said(tmp_path):
    with pytest.raises(InputError, match="--path"): images_of_run(dict(data='gtsrb', path=str(tmp_path/'old')))
    assert images_of_run(dict(data='gtsrb', path=str(tmp_path/'old')), tmp_path)==('gtsrb', tmp_path)
    assert images_of_run(dict(data='finches', path=None))==('finches', None)

def test_a_relative_path_of_an_earlier_version_is_doubted(places, monkeypatch):
    "And does not cost the index that is there"
    home,away = places
    index = build_index(home/'run')
    note(home/'run', data='photos')
    for f in evaluate_run,build_index:
        with pytest.warns(UserWarning, match=f"taken for '{away}/photos'"):
            if f is evaluate_run: evaluate_run(str(home/'run'))
            else:
                with pytest.raises(InputError, match='--data'): build_index(home/'run')
    assert ImageIndex(home/'run/index').key==index.key
    assert build_index(home/'run', data='photos').root==away/'photos'
    monkeypatch.chdir(home)
    with pytest.warns(UserWarning, match='taken for'): images_of_run(noted(home/'run'))
    monkeypatch.chdir(home.parent)
    with pytest.raises(InputError, match='--data'): images_of_run(noted(home/'run'))

def again(**kw): return train(**{**small, 'resume':True, **kw})

@pytest.mark.parametrize('old', ['absolute','relative'])
@pytest.mark.parametrize('moved', [False,True])
def test_a_run_goes_on_from_another_folder_or_after_a_move(old, moved, places, monkeypatch, capsys):
    home,away = places
    if moved: home,_ = home.rename(home.parent/'home2'),shutil.rmtree(away/'photos')
    here = {k:home/v for k,v in small.items() if k in ('preset','weights','cache_dir','out')}
    settings = noted(home/'run'); settings.pop('seconds')
    if old=='relative': settings |= dict(data='photos', weights='start.safetensors')
    write_json(home/'run/settings.json', settings)
    if not moved: monkeypatch.chdir(home)
    learn = again(data=home/'photos', **{k:str(v) for k,v in here.items()})
    said = capsys.readouterr().out
    assert 'Going on with the training after its end' in said and 'seconds' in noted(home/'run')
    assert ('has moved to' in said)==(moved and old=='absolute')
    assert noted(home/'run')['data']==str(home/'photos')

def test_a_run_does_not_go_on_with_other_images_of_the_same_name(places):
    home,_ = places
    settings = noted(home/'run')
    for k,other in dict(data='away/photos', weights='away/start.safetensors').items():
        with pytest.raises(InputError, match=f'{k} ..*photos|{k} ..*start'):
            run_to_resume(home/'run', {**{o:settings[o] for o in ('data','weights','lr')}, k:str(home.parent/other)})

def test_a_shared_encoder_does_not_say_where_things_lay(made):
    home,_ = made
    info = load_encoder(home/'run/encoder.safetensors').info
    assert str(home) not in json.dumps(info) and info['bs']==8

def test_rows_of_a_table_tell_folders_apart(made, monkeypatch):
    keys = []
    for folder in made:
        monkeypatch.chdir(folder)
        keys.append(row_key(Settings(data='photos'))['data'])
    assert keys==[str(o/'photos') for o in made] and row_key(Settings(data='gtsrb'))['data']=='gtsrb'

def test_an_index_is_found_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_index('index', 'photos', [([['a.png',0,0]], torch.ones(1, 4)/2, torch.ones(1))])
    monkeypatch.chdir('/')
    assert ImageIndex(tmp_path/'index').path(0)==tmp_path/'photos/a.png'
