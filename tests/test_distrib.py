"Several processes compute what one does; what torchrun or accelerate began can be taken up by one process, and back"
import json, os, re, subprocess, sys, time
from pathlib import Path
import pytest, torch
from conftest import root, save_photos
from repo import cells, nbs_dir, source
from fgsynth.methods.learner import methods
from safetensors.torch import load_file

pytest.importorskip('accelerate')
here,exe = root/'tests',Path(sys.executable).parent
env = os.environ | {'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore', 'MPLBACKEND':'agg', 'CUDA_VISIBLE_DEVICES':''}

def finished(r, ok=True):
    if ok: assert r.returncode==0, r.stdout[-2000:] + r.stderr[-5000:]
    return r

@pytest.fixture
def launch(forked):
    "Run a script in so many processes"
    return lambda n, *args, ok=True, cwd=None: finished(forked(*args, n=n, cwd=cwd, figures=False), ok)

def launch_afresh(n, *args):
    "Run a script in so many fresh processes by the command of accelerate, which has torchrun start them"
    how = ['-m','accelerate.commands.accelerate_cli','launch','--multi_gpu','--num_processes',n,'--num_machines',1,
           '--mixed_precision','no','--dynamo_backend','no','--main_process_port',0] # as many without a GPU, too
    command = [str(o) for o in (sys.executable, *how, *args)]
    how = dict(env=env, text=True, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
    return finished(subprocess.run(command, **how))

def by_ranks(forked, what, n, folder):
    "What a function of ranks.py has written in so many processes"
    finished(forked(here/'ranks.py', what, folder/f'{what}{n}.pt', n=n))
    return torch.load(folder/f'{what}{n}.pt')

@pytest.fixture(scope='module')
def alone(forked, tmp_path_factory):
    folder = tmp_path_factory.mktemp('alone')
    return {what:by_ranks(forked, what, 1, folder) for what in ('alike','measures')}

@pytest.mark.parametrize('n', [2, 3])
def test_like_one_process(forked, alone, n, tmp_path):
    "Three steps of six methods with pairs: weights, queue and loss terms are those of one process on all images"
    got,one = by_ranks(forked, 'alike', n, tmp_path),alone['alike']
    assert got.keys()==one.keys() and len(got)>90
    for k in one: # a decoder with an Adam of its own makes much of small differences
        atol = 1e-5 if 'defaults.decoder' in k else 1e-6
        torch.testing.assert_close(got[k].double(), one[k].double(), rtol=1e-5, atol=atol, msg=lambda m: f'{k}: {m}')

@pytest.mark.parametrize('n', [2, 3])
def test_measures_of_shares(forked, alone, n, tmp_path):
    "Images and queries shared out: every measure is that of one process"
    got,one = by_ranks(forked, 'measures', n, tmp_path),alone['measures']
    assert got.keys()==one.keys() and one['files'].shape[0]==22
    for k in one: torch.testing.assert_close(got[k], one[k], rtol=1e-6, atol=1e-6, msg=lambda m: f'{k}: {m}')

def test_every_method(launch, n=3):
    "Random views, noise, batch norm, uneven data: memory and weights are the same everywhere, random numbers are not"
    said = launch(n, here/'ranks.py', 'everything').stdout
    names = [l.split()[0] for l in said.splitlines() if '{' in l]
    assert names==sorted([*methods, 'mocov2']), said # MoCo v2 with batch norm and without

def test_collectives_get_nothing_but_through_the_door(launch, tmp_path):
    "Where the copy that travels is another tensor, as on NCCL, trainings and measures are what they are"
    launch(2, here/'ranks.py', 'door', tmp_path/'measures2.pt')

def test_what_one_process_does_alone_leaves_nobody_waiting(launch, tmp_path):
    said = launch(2, here/'ranks.py', 'alone', tmp_path).stdout
    assert '0 InputError' in said and '1 ZeroDivisionError' in said

small = '--size 32 --bs 8 --pretrain_epochs 1 --decoder_width 8 --arch timm/test_byobnet'.split()

@pytest.fixture(scope='module')
def photos(tmp_path_factory): return save_photos(tmp_path_factory.mktemp('photos'), 50)

def by_class(photos, sets):
    "The photos again, in folders of two splits and two classes"
    for i,f in enumerate(sorted(photos.glob('*.png'))):
        to = sets/('test' if i%5==0 else 'train')/f'{i%2}'/f.name
        to.parent.mkdir(parents=True, exist_ok=True); to.symlink_to(f)
    return sets

def training(photos, out, *args): return exe/'fgsynth_train', '--data', photos, *small, '--out', out, *args

@pytest.mark.parametrize('by', ['torchrun','accelerate'])
def test_command(by, launch, photos, tmp_path):
    "One run, written once: in processes of torchrun's agent, which forks them, and of accelerate's command"
    command = training(photos, tmp_path/'run', '--epochs', 1)
    said = (launch if by=='torchrun' else launch_afresh)(2, *command).stdout
    s = json.loads((tmp_path/'run/settings.json').read_text())
    assert said.count('Wrote')==1 and s['images']==50 and 'seconds' in s and (tmp_path/'run/report.html').exists()
    state = torch.load(sorted((tmp_path/'run/checkpoints').glob('*.pt'))[-1], weights_only=True)
    assert int(state['model']['bank.count'])==3*2*4 and state['world']==2 # steps, processes, half of a batch
    r = launch(2, *command, ok=False)
    assert r.returncode and 'already holds another run' in r.stderr

def test_script_of_the_tutorial(launch, photos, tmp_path):
    "What the page about many GPUs starts in two processes trains, and measures once"
    page = next(o for o in map(source, cells(nbs_dir/'tutorials/many_gpus.ipynb')) if 'write_text(' in o)
    script = re.search(r"(?s)write_text\('''(.*?)'''\)", page)[1]
    (tmp_path/'train.py').write_text(script.replace('birds', 'sets'))
    by_class(photos, tmp_path/'sets')
    found = json.loads(launch(2, tmp_path/'train.py', cwd=tmp_path).stdout.splitlines()[-1])
    assert found['queries']==10 and 0<found['map']<=100

def dying(folder, when):
    "A script die.py that is fgsynth_train, and ends in the middle"
    (folder/'die.py').write_text("import os, signal; from fastai.basics import *\n"
        "from fgsynth.runs import train as training\n"
        "f = training.fit_run\n"
        f"class Die(Callback):\n    order = 99\n    def after_batch(self):\n        {when}\n"
        "training.fit_run = lambda l,s,cbs=None: f(l, s, L(cbs)+L(Die()))\ntraining.fgsynth_train()")

@pytest.mark.parametrize('first,then', [(2,1), (1,2)])
def test_resume_with_another_number(launch, first, then, photos, tmp_path):
    "A run that was killed in the middle of an epoch is taken up by more processes or fewer"
    out = tmp_path/'run'
    dying(tmp_path, 'if self.train_iter==3: raise SystemExit(3)')
    args = ['--data', photos, *small, '--epochs', 2, '--out', out, '--save_every', 1]
    def bs(n): return '--bs', 16//n                                          # as many images in all
    assert launch(first, tmp_path/'die.py', *args, *bs(first), ok=False).returncode
    assert 'seconds' not in json.loads((out/'settings.json').read_text())
    r = launch(then, exe/'fgsynth_train', *args, *bs(first), '--resume', ok=False)
    assert r.returncode and f'bs of all processes (16 there, {16*then//first} here)' in r.stderr
    said = launch(then, exe/'fgsynth_train', *args, *bs(then), '--resume').stdout
    assert 'Going on with the training' in said and 'seconds' in json.loads((out/'settings.json').read_text())
    assert all(v.isfinite().all() for v in load_file(out/'encoder.safetensors').values() if v.is_floating_point())

def test_a_process_that_dies(launch, photos, tmp_path):
    "The others do not wait for it, and a minute later all is over"
    died = tmp_path/'died'
    dying(tmp_path, "if self.train_iter==2 and rank_distrib()==1: "
                    f"Path({str(died)!r}).touch(); os.kill(os.getpid(), signal.SIGKILL)")
    r = launch(3, tmp_path/'die.py', '--data', photos, *small, '--epochs', 200, '--out', tmp_path/'run', ok=False)
    assert r.returncode and time.time()-died.stat().st_mtime<60

@pytest.mark.parametrize('which', [0, 1])
def test_a_process_with_an_error_of_its_own(launch, which, photos, tmp_path):
    "The others do not wait for it; with a message for its user"
    died = tmp_path/'died'
    dying(tmp_path, f"if self.train_iter==2 and rank_distrib()=={which}: "
                    f"Path({str(died)!r}).touch(); raise training.InputError('too bad')")
    r = launch(2, tmp_path/'die.py', '--data', photos, *small, '--epochs', 200, '--out', tmp_path/'run', ok=False)
    assert r.returncode and 'fgsynth_train: too bad' in r.stderr and time.time()-died.stat().st_mtime<60

def test_a_process_that_dies_at_the_end(launch, photos, tmp_path):
    "All files of a training and of its measurement are written by then"
    (tmp_path/'late.py').write_text("import os, sys, time; from fastai.torch_core import rank_distrib\n"
        "from fgsynth.runs import measure, train as training; from fgsynth.runs.report import write_report\n"
        "def late(*a): time.sleep(3); return write_report(*a)\n"
        "training.write_report = measure.write_report = late; command = sys.argv.pop(1)\n"
        "getattr(training if command=='fgsynth_train' else measure, command)()\n"
        "if rank_distrib(): os._exit(3)")
    sets,out = by_class(photos, tmp_path/'sets'),tmp_path/'run'
    r = launch(2, tmp_path/'late.py', 'fgsynth_train', '--data', sets, *small, '--epochs', 1, '--out', out, ok=False)
    assert r.returncode and 'exitcode' in r.stderr and 'seconds' in json.loads((out/'settings.json').read_text())
    r = launch(2, tmp_path/'late.py', 'fgsynth_eval', out, ok=False)
    assert r.returncode and 'exitcode' in r.stderr and 'linear probe' in (out/'report.html').read_text().lower()
    assert len((out/'metrics.csv').read_text().splitlines())==3 # a heading, the run and its start, written once

def test_share_smaller_than_a_batch(launch, photos, tmp_path):
    "Refused before anything is computed, in each process"
    r = launch(2, *training(photos, tmp_path/'run', '--bs', 32), ok=False)
    assert r.returncode and 'There are 50 training images but a batch needs 32 in each of 2 processes' in r.stderr
