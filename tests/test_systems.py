"What Windows and macOS do otherwise: stubborn files, locks, drives, encodings, worker processes that spawn"
import ast, multiprocessing, os, sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
import pytest, torch
from PIL import Image
from conftest import call
from fastai.data.load import _FakeLoader
from fgsynth.core import InputError
from fgsynth.data.check import check_data
from fgsynth.data.finches import finches
from fgsynth.data.decoded import load_images
from fgsynth.data.items import Items
from fgsynth.data.loaders import labelled_dls, ssl_dls
from fgsynth.files import common_folder, locked, name_from, save_tensors, write_json
from fgsynth.own.index import ImageIndex, write_index
from fgsynth.own.label import _match
from fgsynth.runs.checkpoints import read_checkpoint, write_checkpoint
from fgsynth.runs.report import open_run
from fgsynth.runs.train import _peak_memory
from repo import modules, root
from safetensors import safe_open
from tiny import save, write
from windows import like_windows

@pytest.fixture
def windows():
    "Files as stubborn as those of Windows, which has them itself"
    if sys.platform=='win32': yield
    elif not Path('/proc/self/maps').exists(): pytest.skip('only Linux says which files are mapped')
    else:
        with like_windows(): yield

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder with one sub-folder for each class, with a name that not every encoding has"
    top = tmp_path_factory.mktemp('photos')
    for i,b in enumerate(finches(40, 40, n_species=2, seed=3)):
        d = top/f'Spötter {b.species}'; d.mkdir(exist_ok=True)
        Image.fromarray(b.image.permute(1,2,0).numpy()).save(d/f'{i} ü.png')
    return top

# Files

def test_the_files_are_stubborn(windows, tmp_path):
    "Of those who use a file, each keeps others from it in its own way"
    for name in 'mapped','open','new': (tmp_path/name).write_bytes(b'1234')
    held = torch.from_file(str(tmp_path/'mapped'), size=4, dtype=torch.uint8)
    with pytest.raises(OSError): os.replace(tmp_path/'new', tmp_path/'mapped')
    with pytest.raises(OSError): (tmp_path/'mapped').write_bytes(b'')
    with pytest.raises(OSError): (tmp_path/'mapped').unlink()
    del held
    with open(tmp_path/'open'), pytest.raises(OSError): os.replace(tmp_path/'new', tmp_path/'open')
    with locked(tmp_path), pytest.raises(OSError): (tmp_path/'.lock').read_text(encoding='utf-8')
    (tmp_path/'mapped').unlink(); os.replace(tmp_path/'new', tmp_path/'open')

def test_a_lock_names_its_holder_though_nobody_can_read_it(windows, tmp_path):
    here = f'Another process .{os.getpid()}. is'
    with locked(tmp_path), pytest.raises(InputError, match=here), locked(tmp_path): pass
    assert not (tmp_path/'.lock.pid').exists()

def test_a_holder_without_a_name_is_unknown(tmp_path):
    with locked(tmp_path):
        (tmp_path/'.lock.pid').unlink()
        with pytest.raises(InputError, match='Another process .unknown. is'), locked(tmp_path): pass

@pytest.mark.parametrize('times,lets_go', [(3, True), (99, False)])
def test_a_file_that_somebody_reads_is_replaced_when_he_lets_go(times, lets_go, tmp_path, monkeypatch):
    "On Windows; elsewhere a refusal is a matter of rights, and waiting is no use"
    refused,slept,replace = [],[],os.replace
    def busy(a, b):
        if len(refused)<times: refused.append(b); raise PermissionError(13, 'used by another process')
        replace(a, b)
    monkeypatch.setattr('fgsynth.files.sys.platform', 'win32')
    monkeypatch.setattr('fgsynth.files.time.sleep', slept.append)
    monkeypatch.setattr(os, 'replace', busy)
    def renew(): write_json(tmp_path/'s.json', dict(size=64))
    if lets_go: renew()
    else:
        with pytest.raises(PermissionError): renew()
    assert (tmp_path/'s.json').exists()==lets_go and len(slept)==(3 if lets_go else 19)
    monkeypatch.setattr('fgsynth.files.sys.platform', 'linux'); refused.clear(); slept.clear()
    with pytest.raises(PermissionError): renew()
    assert not slept and [o.suffix for o in tmp_path.iterdir()]==['.json']*lets_go

def test_an_encoder_that_is_overwritten_stays_whole_for_who_has_mapped_it(tmp_path):
    f = tmp_path/'a.safetensors'
    save_tensors({'w':torch.ones(5000)}, f, {})
    with safe_open(f, 'pt') as opened: w = opened.get_tensor('w')
    try: save_tensors({'w':torch.zeros(2)}, f, {})
    except InputError as e: assert 'cannot be written' in str(e)             # Windows refuses
    assert w.eq(1).all() and [o.name for o in tmp_path.iterdir()]==['a.safetensors']

def test_decoded_images_are_kept(windows, photos, tmp_path):
    files = sorted(photos.rglob('*.png'))
    kept = load_images(files, 32, cache_dir=tmp_path)[0]
    assert kept.equal(load_images(files, 32)[0]) and load_images(files, 32, cache_dir=tmp_path)[0].equal(kept)
    assert sorted(o.suffix for o in tmp_path.iterdir())==['.npy','.u8']

@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError])
def test_decoding_that_is_stopped_leaves_nothing(windows, photos, tmp_path, monkeypatch, error):
    def stop(file, size): raise error
    monkeypatch.setattr('fgsynth.data.decoded.map_threads', lambda f, xs, *args: stop(f, xs))
    with pytest.raises(error): load_images(sorted(photos.rglob('*.png')), 32, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())

def test_images_of_which_none_can_be_read_leave_nothing(windows, tmp_path):
    bad = [write(tmp_path/f'photos/{i}.png', 'x') for i in range(3)]
    with pytest.raises(InputError, match='None of the 3'): load_images(bad, 32, cache_dir=tmp_path/'kept')
    assert not list((tmp_path/'kept').iterdir())

def block(z):
    "Features as `write_index` takes them"
    return [[f'{i}.png',0,0] for i in range(len(z))], torch.nn.functional.normalize(z, dim=1), z.norm(dim=1)

def test_an_index_in_use_makes_room_for_another_one(windows, tmp_path):
    "Of the same content or of another; what cannot be deleted now is deleted later"
    one,two = torch.rand(300, 8),torch.rand(200, 8)
    write_index(tmp_path, 'photos', [block(one)])
    used = ImageIndex(tmp_path)
    for z in one,two:
        write_index(tmp_path, 'photos', [block(z)])
        assert torch.allclose(ImageIndex(tmp_path).features(slice(None)), z, atol=1e-2)
    assert torch.allclose(used.features(slice(None)), one, atol=1e-2)
    del used
    write_index(tmp_path, 'photos', [block(two)])
    assert sorted(o.suffix for o in tmp_path.iterdir())==['.f16','.f32','.json']

def test_an_old_checkpoint_that_somebody_reads_is_deleted_later(windows, tmp_path):
    for i in range(2): write_checkpoint(tmp_path, dict(i=i))
    def names(): return sorted(int(o.stem) for o in tmp_path.iterdir())
    with open(tmp_path/'000001.pt', 'rb'): write_checkpoint(tmp_path, dict(i=2))
    assert names()==[1,2,3] and read_checkpoint(tmp_path)['i']==2
    write_checkpoint(tmp_path, dict(i=3))
    assert names()==[3,4]

def test_a_run_that_cannot_be_deleted_is_one_sentence(windows, tmp_path):
    (tmp_path/'run').mkdir(); write_json(tmp_path/'run/settings.json', {})
    (tmp_path/'run/encoder.safetensors').write_bytes(b'1234')
    held = torch.from_file(str(tmp_path/'run/encoder.safetensors'), size=4, dtype=torch.uint8)
    with pytest.raises(InputError, match='cannot be deleted .*close what uses it'):
        open_run(tmp_path/'run', overwrite=True)
    del held
    assert [o.name for o in open_run(tmp_path/'run', overwrite=True).iterdir() if o.name!='.lock']==[]

def test_a_run_and_what_follows_it(windows, photos, tmp_path, monkeypatch, capsys, undrawn):
    "Trained, resumed, measured, searched twice, labelled, exported and replaced"
    run,query = tmp_path/'run',sorted(photos.rglob('*.png'))[0]
    small = '--size 32 --bs 16 --epochs 1 --synth none --arch timm/test_byobnet'.split()
    train = ['fgsynth_train','--data',photos,*small,'--out',run,'--cache_dir',tmp_path/'kept','--save_every',1]
    table = write(tmp_path/'labels.csv', '')
    rows = [f'{f.relative_to(photos).as_posix()},{f.parent.name}' for f in sorted(photos.rglob('*.png'))[::3]]
    table.write_text('\n'.join(['file,label', *rows]), encoding='utf-8')
    for command in (train, [*train,'--resume'], ['fgsynth_eval',run], ['fgsynth_search',run,query],
                    ['fgsynth_search',run,query], ['fgsynth_label',run,table], ['fgsynth_export',run],
                    [*train,'--overwrite']): call(monkeypatch, *command)
    said = capsys.readouterr().out
    assert all(o in said for o in ('is complete','linear probe','search.png','predictions.csv','encoder.pth'))
    assert (run/'report.html').is_file() and not (run/'search.png').exists()

# Names

def test_files_on_another_drive_keep_their_whole_names(tmp_path, monkeypatch):
    relpath,commonpath = os.path.relpath,os.path.commonpath
    def drive(f): return 'other' in Path(f).parts
    def far(file, start=os.curdir):
        if drive(file)!=drive(start): raise ValueError('path is on mount C:, start on mount D:')
        return relpath(file, start)
    def together(paths):
        if len({drive(p) for p in paths})>1: raise ValueError("Paths don't have the same drive")
        return commonpath(paths)
    monkeypatch.setattr(os.path, 'relpath', far); monkeypatch.setattr(os.path, 'commonpath', together)
    here,there = save(tmp_path/'photos/a/1.png'),save(tmp_path/'other/a/1.png')
    assert name_from(tmp_path/'photos', here)=='a/1.png' and name_from(tmp_path/'photos', there)==there.as_posix()
    assert common_folder([here, there])=='' and common_folder([here])==str(here.parent)
    write_index(tmp_path/'index', tmp_path/'photos', [([['a/1.png',0,0]], torch.ones(1,1), torch.ones(1))])
    pos,lost = _match({str(here):('x',1), str(there):('x',2)}, ImageIndex(tmp_path/'index'))
    assert pos=={0:'x'} and lost==[str(there)]
    said = str(check_data(Items('two', [here], [there])))
    assert there.as_posix() in said

def test_images_with_relative_and_absolute_names_are_checked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one,two = save(Path('photos/1.png')),save(tmp_path/'photos/2.png')
    assert str(check_data(Items('two', [one], [two]))).endswith('1.png = 2.png')

# Calls and encodings

def calls(f):
    "The calls in a file, with the dotted names of what is called"
    for o in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
        if isinstance(o, ast.Call): yield ast.unparse(o.func).split('.'),o

def is_text(name, call):
    "Does this call read or write text?"
    if name[-1] in ('read_text','write_text'): return True
    method = len(name)==2 and name[1]=='open' and name[0] not in ('Image','os','webbrowser')
    if name!=['open'] and not method: return False
    mode = [a.value for a in call.args if isinstance(a, ast.Constant) and set(str(a.value))<=set('rwaxbt+')]
    return 'b' not in ''.join(map(str, mode))

@pytest.mark.parametrize('folder', ['fgsynth','tools','benchmarks'])
def test_text_has_its_encoding(folder):
    "Without one, Python takes that of the system until 3.15"
    missing = [f'{f.name}:{c.lineno}' for f in (root/folder).rglob('*.py') for name,c in calls(f)
               if is_text(name, c) and not any(k.arg in ('encoding',None) for k in c.keywords)]
    assert not missing, missing

posix = {'os':'fork getuid geteuid killpg setsid mkfifo sched_getaffinity sysconf statvfs chown getloadavg'.split(),
         'signal':'SIGKILL SIGALRM alarm SIGHUP pause setitimer'.split(), 'time':['tzset']}

def test_the_modules_call_what_every_system_has():
    "And import nothing that only some have, at least not at their top"
    for f in modules:
        tree = ast.parse(f.read_text(encoding='utf-8'))
        for o in ast.walk(tree):
            if isinstance(o, ast.Attribute) and isinstance(o.value, ast.Name):
                assert o.attr not in posix.get(o.value.id, ()), (f.name, o.lineno)
        for o in tree.body:
            names = {a.name for a in o.names} if isinstance(o, ast.Import) else {getattr(o, 'module', None)}
            assert not names & {'fcntl','pwd','grp','termios','tty','resource','psutil','msvcrt'}, (f.name, names)

def test_memory_is_unknown_where_nothing_tells_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'resource', None)
    assert torch.cuda.is_available() or _peak_memory()=='unknown'

# Worker processes

def loaders(photos):
    "Loaders that decode on demand, of every kind that we make, by name"
    files = sorted(photos.rglob('*.png'))
    items = Items('photos', files[:30], files[30:], torch.arange(30)%2, torch.arange(10)%2, ['a','b'])
    how = dict(size=32, bs=10, num_workers=2)
    plain,split = ssl_dls(items, cache=False, **how),ssl_dls(items, cache=False, valid_pct=.3, **how)
    labelled = labelled_dls(items, cache=False, **how)
    return dict(train=plain.train, part=split.train, valid=split.valid, labelled=labelled.train, test=labelled.valid,
                evaluation=labelled.valid.new(shuffle=False))

def test_a_worker_that_starts_afresh_can_be_given_every_loader(photos):
    for name,dl in loaders(photos).items(): assert len(ForkingPickler.dumps(dl.fake_l))<1_000_000, name

def test_workers_that_spawn_decode_what_one_process_does(photos, tmp_path, monkeypatch):
    "And tell it which files they could not read"
    files = [*sorted(photos.rglob('*.png'))[:7], write(tmp_path/'bad.png', 'x')]
    items = Items('photos', files, [])
    def spawning(self): return multiprocessing.get_context('spawn') if self.num_workers else None
    monkeypatch.setattr(_FakeLoader, 'multiprocessing_context', property(spawning))
    def decoded(n):
        dl = ssl_dls(items, size=32, bs=4, cache=False, num_workers=n, device='cpu').train
        with pytest.warns(UserWarning, match=r'1 of 8 .*bad\.png'):
            return torch.cat([b[0] for b in dl.new(shuffle=False, drop_last=False)])
    alone,spawned = decoded(0),decoded(1)
    assert len(alone)==7 and torch.equal(alone, spawned)
