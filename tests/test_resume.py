"What is left after a training was killed, at any moment: all of it"
import os, subprocess, sys
import pytest, torch
from conftest import call, root
from fgsynth import run, ssl
from fgsynth.data.datasets import get_dataset
from fgsynth.files import locked
from fgsynth.runs.resume import read_checkpoint
from safetensors.torch import load_file
import killed

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "The run that was never interrupted, and the one that was killed 20 times"
    top = tmp_path_factory.mktemp('killed')
    r = subprocess.run([sys.executable, '-W', 'ignore', root/'tests/killed.py', top], env=os.environ | {'OMP_NUM_THREADS':'1', 'MPLBACKEND':'agg'},
                       text=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert r.returncode==0, r.stdout + r.stderr
    return top/'whole', top/'killed', r.stdout

def equal(a, b, at=''):
    "Numbers, text and tensors of two nested states are the same, bit for bit"
    assert type(a)==type(b), at
    if isinstance(a, torch.Tensor): assert a.dtype==b.dtype and a.equal(b), at
    elif isinstance(a, dict):
        assert a.keys()==b.keys(), at
        for k in a: equal(a[k], b[k], f'{at}.{k}')
    elif isinstance(a, (list,tuple)):
        assert len(a)==len(b), at
        for i,(x,y) in enumerate(zip(a, b)): equal(x, y, f'{at}[{i}]')
    else: assert a==b, (at, a, b)

def test_killed_20_times_equals_never(folders):
    whole,dead,_ = folders
    equal(load_file(whole/'encoder.safetensors'), load_file(dead/'encoder.safetensors'))
    assert (whole/'history.csv').read_bytes()==(dead/'history.csv').read_bytes()
    a,b = [read_checkpoint(o/'checkpoints') for o in (whole,dead)]
    assert {'encoder.body.stem.conv.weight','queue','bank.feats','decoder.spread.weight','decoder_opt._extra_state'} <= set(a['model'])
    assert any(k.startswith('key_encoder.') for k in a['model']) and a['opt']['state'][0]['grad_avg'].abs().sum()>0
    for k in 'model opt grads metrics shuffle random train_iter settings phase done'.split(): equal(a[k], b[k], k)
    for k in 'losses','lrs','iters','values': equal(a['cbs']['recorder 0'][k], b['cbs']['recorder 0'][k], k)
    assert len(a['cbs']['recorder 0']['values'])==killed.settings['epochs']

def test_deaths_were_of_every_kind(folders):
    "20 deaths, in both phases, in the middle of an epoch and of a file, and nothing but whole checkpoints left"
    _,dead,said = folders
    log = dead.with_suffix('.log').read_text()
    assert len(said.splitlines())==20 and all(f'{k}: checkpoints' in said for k in killed.kinds)
    assert 'Going on with the decoder at epoch' in log and 'Going on with the training at epoch' in log
    assert sorted(int(f.stem) for f in (dead/'checkpoints').iterdir())==[killed.newest(dead)-1, killed.newest(dead)]

small = '--size 32 --bs 16 --epochs 2 --pretrain_epochs 1 --decoder_width 8 --arch timm/test_byobnet --synth none'.split()

@pytest.fixture
def flock(monkeypatch):
    items = get_dataset('finches', n_train=48, n_test=16, size=32)
    monkeypatch.setattr(run, '_items', lambda *args: items)

@pytest.fixture
def stopped(flock, tmp_path, monkeypatch):
    "A run that died when it wanted to write its results"
    def die(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(run, 'save_encoder', die)
        with pytest.raises(KeyboardInterrupt): call(m, 'fgsynth_train', *small, '--save_every', 2, '--out', tmp_path/'run')
    assert not (tmp_path/'run/encoder.safetensors').exists()
    return tmp_path/'run'

def refuses(monkeypatch, words, *args):
    with pytest.raises(SystemExit) as e: call(monkeypatch, 'fgsynth_train', *small, *args)
    said = str(e.value.code)
    assert words in said and said.startswith('fgsynth_train: ') and '\n' not in said, said

def test_starts_where_nothing_is_and_leaves_what_is_complete(flock, tmp_path, monkeypatch, capsys):
    out = tmp_path/'new'
    call(monkeypatch, 'fgsynth_train', *small, '--out', out, '--resume')
    def times(): return {f:f.stat().st_mtime_ns for f in out.rglob('*') if f.name!='.lock'}
    before = times()
    call(monkeypatch, 'fgsynth_train', *small, '--out', out, '--resume')
    assert 'is complete' in capsys.readouterr().out and times()==before
    refuses(monkeypatch, 'lr (0.03 there, 0.01 here)', '--out', out, '--resume', '--lr', .01)

def test_refuses_other_settings(stopped, monkeypatch):
    refuses(monkeypatch, 'seed (0 there, 1 here)', '--out', stopped, '--resume', '--seed', 1)
    refuses(monkeypatch, '--resume to go on', '--out', stopped)
    refuses(monkeypatch, '--overwrite or --resume', '--out', stopped, '--resume', '--overwrite')
    refuses(monkeypatch, "every 'often'", '--out', stopped, '--resume', '--save_every', 'often')
    with pytest.raises(SystemExit) as e: call(monkeypatch, 'fgsynth_eval', stopped)
    assert 'no finished run' in str(e.value)

def test_goes_on_from_the_checkpoint_before_a_damaged_one(stopped, tmp_path, monkeypatch):
    newest = sorted((stopped/'checkpoints').iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match='damaged'): call(monkeypatch, 'fgsynth_train', *small, '--out', stopped, '--resume')
    call(monkeypatch, 'fgsynth_train', *small, '--out', tmp_path/'whole')
    equal(*[load_file(o/'encoder.safetensors') for o in (stopped, tmp_path/'whole')])

def test_two_at_once(stopped, monkeypatch):
    with locked(stopped):
        for how in '--resume','--overwrite': refuses(monkeypatch, f'Another process ({os.getpid()}) is writing', '--out', stopped, how)

def test_disk_full(flock, tmp_path, monkeypatch):
    "A disk that takes no more in the middle of the third checkpoint: one sentence, and the second is there to go on from"
    out,save,n = tmp_path/'run',torch.save,[0]
    def full(state, f):
        n[0] += 1
        f.write(b'x'*1000)
        if n[0]==3: raise OSError(28, 'No space left on device')
        f.seek(0); save(state, f)
    with monkeypatch.context() as m:
        m.setattr(torch, 'save', full)
        refuses(m, 'No space left on device', '--save_every', 2, '--out', out)
    assert [f.name for f in sorted((out/'checkpoints').iterdir())]==['000001.pt','000002.pt']
    call(monkeypatch, 'fgsynth_train', *small, '--out', out, '--resume')
    call(monkeypatch, 'fgsynth_train', *small, '--out', tmp_path/'whole')
    equal(*[load_file(o/'encoder.safetensors') for o in (out, tmp_path/'whole')])

def test_disk_full_at_the_end(flock, tmp_path, monkeypatch):
    "Results that cannot be written: one sentence, and the run is taken up from its last checkpoint"
    out = tmp_path/'run'
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    for name in '_write_csv','_pictures','write_report':
        with monkeypatch.context() as m:
            m.setattr(run, name, full)
            refuses(m, 'No space left on device): make room, and go on with --resume', '--out', out, '--resume')
    call(monkeypatch, 'fgsynth_train', *small, '--out', out, '--resume')
    assert (out/'report.html').is_file()

def test_settings_that_were_cut_off(stopped, tmp_path, monkeypatch):
    "Killed while settings.json was written for the first time, the run starts; a damaged one is named"
    (tmp_path/'new').mkdir(); (tmp_path/'new/settings.json.tmp').write_text('{"a')
    call(monkeypatch, 'fgsynth_train', *small, '--out', tmp_path/'new', '--resume')
    (stopped/'settings.json').write_text('{"a')
    refuses(monkeypatch, "settings.json' is damaged", '--out', stopped, '--resume')

def test_precision_that_was_measured(flock, tmp_path, monkeypatch):
    "A run that chose for itself goes on with what it chose"
    monkeypatch.setattr(ssl, 'faster_precision', lambda *a: ('bf16', 2.))
    with monkeypatch.context() as m:
        m.setattr(run, 'save_encoder', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): call(m, 'fgsynth_train', *small, '--precision', 'auto', '--out', tmp_path/'run')
    monkeypatch.setattr(ssl, 'faster_precision', lambda *a: ('fp32', 1.))
    build,seen = run.build,[]
    monkeypatch.setattr(run, 'build', lambda items, s, *a: seen.append(s.precision) or build(items, s, *a))
    call(monkeypatch, 'fgsynth_train', *small, '--precision', 'auto', '--out', tmp_path/'run', '--resume')
    assert seen==['bf16']

@pytest.mark.parametrize('name,value,words', [('bs',1,'from 2 up'), ('epochs',0,'from 1 up'), ('lr',-.03,'above 0'), ('lr','nan','above 0'), ('momentum',2,'from 0 to 1'), ('max_pairs',-3,'above 0'), ('beta',-1,'from 0 up'),
    ('lam','nan','from 0 up'), ('layer_decay',-1,'above 0'), ('head_mult',0,'above 0'), ('tau',-1,'from 0 up'), ('pretrain_epochs',-4,'from 0 up'), ('decoder_lr',-1,'above 0'), ('decoder_width',0,'from 1 up'), ('sigma_cam','inf','from 0 up')])
def test_numbers_that_cannot_be_meant(name, value, words, tmp_path, monkeypatch):
    refuses(monkeypatch, f'--{name} is {value}', '--out', tmp_path/'run', f'--{name}={value}')
    refuses(monkeypatch, words, '--out', tmp_path/'run', f'--{name}={value}')
    assert not (tmp_path/'run').exists()
