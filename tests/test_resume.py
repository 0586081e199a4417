"What is left after a training was killed, at any moment: all of it"
import os, warnings
from pathlib import Path
from contextlib import suppress
import pytest, torch
from conftest import call, root
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.torch_core import set_seed
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.files import locked
from fgsynth.methods import learner as making_learners
from fgsynth.methods.learner import ssl_learner
from fgsynth.methods.mocov2 import MoCoV2
from fgsynth.methods.simsiam import SimSiam
from fgsynth.nets.networks import Encoder
from fgsynth.runs import measure, train as training # measure is loaded before its `run_items` is replaced
from fgsynth.runs.checkpoints import read_checkpoint, to_plain, write_checkpoint
from fgsynth.runs.resume import CheckpointCallback
from fgsynth.synth.callbacks import synth_pairs
from safetensors.torch import load_file
import killed

@pytest.fixture(scope='module')
def folders(forked, tmp_path_factory):
    "The run that was never interrupted, and the one that was killed 20 times"
    top = tmp_path_factory.mktemp('killed')
    r = forked(root/'tests/killed.py', top, figures=False)
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
    kept = {'encoder.body.stem.conv.weight','queue','bank.feats','decoder.expand.weight','decoder_opt._extra_state'}
    assert kept <= set(a['model'])
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

small = '--size 32 --bs 16 --epochs 2 --pretrain_epochs 1 --decoder_width 8 --synth none'.split()
small += ['--arch', 'timm/test_byobnet']

@pytest.fixture
def flock(monkeypatch, undrawn):
    items = get_dataset('finches', n_train=48, n_test=16, size=32)
    monkeypatch.setattr(training, 'run_items', lambda *args: items)

@pytest.fixture
def stopped(flock, tmp_path, monkeypatch):
    "A run that died when it wanted to write its results"
    def die(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(training, 'save_encoder', die)
        with pytest.raises(SystemExit, match='130'):
            call(m, 'fgsynth_train', *small, '--save_every', 2, '--out', tmp_path/'run')
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
    with pytest.warns(UserWarning, match='damaged'):
        call(monkeypatch, 'fgsynth_train', *small, '--out', stopped, '--resume')
    call(monkeypatch, 'fgsynth_train', *small, '--out', tmp_path/'whole')
    equal(*[load_file(o/'encoder.safetensors') for o in (stopped, tmp_path/'whole')])

def test_two_at_once(stopped, monkeypatch):
    with locked(stopped):
        for how in '--resume','--overwrite':
            refuses(monkeypatch, f'Another process ({os.getpid()}) is writing', '--out', stopped, how)

def test_disk_full(flock, tmp_path, monkeypatch):
    "A disk that is full in the middle of the third checkpoint: one sentence, and the second is there to go on from"
    out,save,n = tmp_path/'run',torch.save,[0]
    def full(state, f):
        if isinstance(f, Path): return save(state, f) # the trial beforehand
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
    for name in 'write_csv','save_pictures','write_report':
        with monkeypatch.context() as m:
            m.setattr(training, name, full)
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
    monkeypatch.setattr(making_learners, 'faster_precision', lambda *a: ('bf16', 2.))
    with monkeypatch.context() as m:
        m.setattr(training, 'save_encoder', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit, match='130'):
            call(m, 'fgsynth_train', *small, '--precision', 'auto', '--out', tmp_path/'run')
    monkeypatch.setattr(making_learners, 'faster_precision', lambda *a: ('fp32', 1.))
    make_learner,seen = training.make_learner,[]
    def note(items, s, *a): return seen.append(s.precision) or make_learner(items, s, *a)
    monkeypatch.setattr(training, 'make_learner', note)
    call(monkeypatch, 'fgsynth_train', *small, '--precision', 'auto', '--out', tmp_path/'run', '--resume')
    assert seen==['bf16']

@pytest.mark.parametrize('name,value,words', [
    ('bs',1,'from 2 up'), ('epochs',0,'from 1 up'), ('lr',-.03,'above 0'), ('lr','nan','above 0'),
    ('momentum',2,'from 0 to 1'),
    ('max_pairs',-3,'above 0'), ('beta',-1,'from 0 up'), ('lam','nan','from 0 up'), ('layer_decay',-1,'above 0'),
    ('head_mult',0,'above 0'), ('tau',-1,'from 0 up'), ('pretrain_epochs',-4,'from 0 up'), ('decoder_lr',-1,'above 0'),
    ('decoder_width',0,'from 1 up'), ('sigma_cam','inf','from 0 up')])
def test_numbers_that_cannot_be_meant(name, value, words, tmp_path, monkeypatch):
    refuses(monkeypatch, f'--{name} is {value}', '--out', tmp_path/'run', f'--{name}={value}')
    refuses(monkeypatch, words, '--out', tmp_path/'run', f'--{name}={value}')
    assert not (tmp_path/'run').exists()

# Checkpoints

def names(folder): return [f.name for f in sorted(folder.iterdir())]

def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    for i in range(2): write_checkpoint(tmp_path, dict(i=i))
    torch.save(dict(i=4, x=tmp_path), tmp_path/'000002.pt') # a path is no tensor; reading it would call a function
    with pytest.warns(UserWarning, match='is refused'): assert read_checkpoint(tmp_path)['i']==0

def test_no_checkpoint_that_can_be_read(tmp_path):
    (tmp_path/'000001.pt').write_bytes(b''); (tmp_path/'000002.pt').write_bytes(b'x')
    with warnings.catch_warnings(), pytest.raises(InputError, match='None of the checkpoints'):
        warnings.simplefilter('ignore')
        read_checkpoint(tmp_path)

def test_files_of_somebody_else_stay(tmp_path):
    for f in '1.pt','2.pt','2024-best.pt': (tmp_path/f).write_bytes(b'not ours')
    for i in 4,5,6: write_checkpoint(tmp_path, dict(i=i))
    assert names(tmp_path)==['000002.pt','000003.pt','1.pt','2.pt','2024-best.pt'] and read_checkpoint(tmp_path)['i']==6

def test_memory_takes_scalars_only():
    with pytest.raises(TypeError): to_plain(torch.zeros(3), scalars_only=True)

# The callback

class Pull(Callback):
    "Pulls the plug"
    def __init__(self, at): self.at = at
    def before_batch(self):
        if self.training and self.train_iter==self.at: raise KeyboardInterrupt

def encoder():
    nn = torch.nn
    layers = nn.Conv2d(3,8,3,2),nn.BatchNorm2d(8),nn.ReLU(),nn.AdaptiveAvgPool2d(3),nn.Flatten()
    return Encoder(nn.Sequential(*layers), 72)

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=64, n_test=8, size=32)

def new(items, arch=None, method=None, valid_pct=0., path=None):
    set_seed(0)
    dls = ssl_dls(items, size=32, bs=8, **(dict(valid_pct=valid_pct) if valid_pct else {}))
    return ssl_learner(dls, arch or encoder(), method or MoCoV2(), cbs=synth_pairs(decoder_width=4), path=path)

def fit(learn, *cbs, n=3, lr=.03):
    with suppress(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, lr, cbs=list(cbs))
    return learn

def assert_same(a, b):
    "Weights, buffers, losses and training table"
    states = [{k:v for k,v in l.model.state_dict().items() if isinstance(v, torch.Tensor)} for l in (a,b)]
    equal(*states)
    assert [list(v) for v in a.recorder.values]==[list(v) for v in b.recorder.values]
    assert list(a.recorder.losses)==list(b.recorder.losses)

@pytest.fixture(scope='module')
def resumed(items, tmp_path_factory):
    "A fit that was left alone, one that was interrupted and resumed, and the folder of the latter"
    folder = tmp_path_factory.mktemp('fits')/'run'
    whole = fit(new(items))
    fit(new(items), Pull(13), CheckpointCallback(folder, every=2))
    return whole, fit(new(items), CheckpointCallback(folder, resume=True)), folder

def test_checkpoints_at_steps_and_at_the_end(resumed):
    whole,again,folder = resumed
    assert_same(whole, again)
    assert names(folder)==['000007.pt','000008.pt'] # at steps 2, 4, ... 12; at step 16, and at the end
    state = read_checkpoint(folder)
    assert (state['done'], state['phase'])==(True, 'fit')

def test_a_fit_that_is_over_stays_as_it_was(resumed, items):
    "And what follows meets the random states of its end"
    whole,_,folder = resumed
    before = (folder/'000008.pt').read_bytes()
    over = fit(new(items), CheckpointCallback(folder, resume=True))
    then,order = torch.rand(3),over.dls.train.get_idxs()
    assert_same(whole, over)
    fresh = fit(new(items))
    assert torch.rand(3).equal(then) and fresh.dls.train.get_idxs()==order
    assert (folder/'000008.pt').read_bytes()==before

def test_it_starts_where_nothing_is(resumed, items, tmp_path):
    assert_same(resumed[0], fit(new(items), CheckpointCallback(tmp_path/'new', resume=True)))

def test_it_goes_on_only_with_the_same_fit(resumed, items):
    folder = resumed[2]
    def other(n, **kw): return fit(new(items), CheckpointCallback(folder, resume=True, **kw), n=n)
    with pytest.raises(InputError, match=r'epochs of the fit \(3 there, 5 here\)'): other(5)
    with pytest.raises(InputError, match=r'lr \(None there, 1 here\)'): other(3, settings=dict(lr=1))
    larger = new(items, 'timm/test_byobnet')
    with pytest.raises(InputError, match='another model or optimizer'):
        fit(larger, CheckpointCallback(folder, resume=True))

def test_another_phase_starts_anew(items, tmp_path):
    fit(new(items), CheckpointCallback(tmp_path), n=1)
    learn = fit(new(items), CheckpointCallback(tmp_path, resume=True, phase='another'), n=1)
    assert read_checkpoint(tmp_path)['phase']=='another' and len(learn.recorder.losses)==8

def with_old_names(state):
    "As version 0.0.1 wrote it: the decoder's first layer was called `spread`"
    def rename(d): return {k.replace('decoder.expand.', 'decoder.spread.'):v for k,v in d.items()}
    assert any('decoder.expand.' in k for k in state['model']) and any('decoder.expand.' in k for k in state['grads'])
    return {**state, 'model':rename(state['model']), 'grads':rename(state['grads'])}

def test_checkpoints_of_version_0_0_1_are_read(items, tmp_path):
    "Between two batches whose gradients are gathered, so that gradients count, too"
    def accumulate(): return GradientAccumulation(16)
    whole = fit(new(items), accumulate())
    fit(new(items), accumulate(), Pull(13), CheckpointCallback(tmp_path, every=1))
    state = read_checkpoint(tmp_path)
    assert state['grads']['decoder.expand.weight'].abs().sum()>0
    write_checkpoint(tmp_path, with_old_names(state))
    assert 'decoder.spread.weight' in read_checkpoint(tmp_path)['model']
    assert_same(whole, fit(new(items), accumulate(), CheckpointCallback(tmp_path, resume=True)))

def test_neighbours_with_a_memory_of_their_own(items, tmp_path):
    "Gradients that were gathered but not yet used, early stopping, the best model so far"
    def go(*cbs):
        learn = new(items, method=SimSiam(64,16), valid_pct=.25, path=tmp_path)
        more = [GradientAccumulation(16), EarlyStoppingCallback('valid_loss', min_delta=10, patience=2),
                SaveModelCallback('valid_loss', with_opt=True)]
        with suppress(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.fit(5, 0.03, cbs=[*more, *cbs])
        return learn
    whole = go()
    def checkpoints(): return CheckpointCallback(tmp_path/'many', every=1, resume=True)
    for at in 1,6,13: go(Pull(at), checkpoints())
    again = go(checkpoints())
    assert len(whole.recorder.values)==3                                    # stopped early
    assert [list(v) for v in whole.recorder.values]==[list(v) for v in again.recorder.values]
    assert all(p.equal(q) for p,q in zip(whole.model.parameters(), again.model.parameters()))

def test_it_leaves_validate_and_lr_find_and_the_next_fit_alone(items, tmp_path):
    learn = ssl_learner(ssl_dls(items, size=32, bs=8, valid_pct=.25), encoder(), SimSiam(64,16), path=tmp_path,
                        cbs=CheckpointCallback(tmp_path/'stay', resume=True))
    with learn.no_bar(), learn.no_logging():
        learn.validate(); learn.lr_find(num_it=10, show_plot=False)
        assert not (tmp_path/'stay').exists()
        learn.fit(1, .01); learn.validate()
    assert names(tmp_path/'stay')==['000001.pt']

def test_a_state_that_is_not_finite_is_not_kept(items, tmp_path):
    "What is left is the one before, from which the fit goes on"
    class Break(Callback):
        def before_batch(self):
            if self.training and self.train_iter==5: self.learn.model.queue[0] = float('nan')
    def go(*cbs):
        set_seed(0)
        learn = ssl_learner(ssl_dls(items, size=32, bs=8, valid_pct=.25), encoder(), cbs=list(cbs))
        with learn.no_bar(), learn.no_logging(): learn.fit(2, .01)
        return learn
    with pytest.raises(Exception, match='queue was not finite at step 5'):
        go(CheckpointCallback(tmp_path, every=2), Break())
    state = read_checkpoint(tmp_path)
    assert state['train_iter']==4 and state['model']['queue'].isfinite().all()
    assert list(go(CheckpointCallback(tmp_path, resume=True)).recorder.losses)==list(go().recorder.losses)

def test_a_loader_of_pytorch(tmp_path):
    "Which shuffles by the global random state"
    nn,loader = torch.nn,torch.utils.data.DataLoader
    pairs = list(zip(torch.randn(64, 5), torch.randn(64, 1)))
    def go(*cbs):
        set_seed(0)
        dls = DataLoaders(*[loader(pairs, batch_size=8, shuffle=True) for _ in range(2)])
        learn = Learner(dls, nn.Sequential(nn.Linear(5,1), nn.Dropout(.3)), MSELossFlat(), cbs=list(cbs))
        with suppress(KeyboardInterrupt), learn.no_bar(), learn.no_logging(): learn.fit(3, .1)
        return learn
    a = go()
    go(Pull(11), CheckpointCallback(tmp_path, every=3))
    b = go(CheckpointCallback(tmp_path, resume=True))
    assert a.model[0].weight.equal(b.model[0].weight)
    assert list(a.recorder.values[-1])==list(b.recorder.values[-1])
