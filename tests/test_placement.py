"Each process of several has a GPU of its own, and nothing is exchanged but through one door; on stubbed devices"
import re
from types import SimpleNamespace
import pytest, torch
from conftest import root
from fgsynth import distrib
from fgsynth.core import InputError
from fgsynth.data import loaders
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import labelled_dls, ssl_dls
from fgsynth.methods.learner import methods, ssl_learner
from training import arch_for
from fgsynth.runs import measure, train as training
from fgsynth.synth.callbacks import synth_pairs

@pytest.fixture
def gpus(monkeypatch):
    "A machine with four GPUs, as far as PyTorch and fastai are asked; which one is the current one"
    now = SimpleNamespace(device=0)
    monkeypatch.setattr(distrib, 'default_device', lambda: torch.device('cuda', now.device))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda i: setattr(now, 'device', i))
    monkeypatch.setenv('WORLD_SIZE', '4')
    return now

@pytest.mark.parametrize('number', range(4))
def test_each_process_takes_the_gpu_of_its_number(number, gpus, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', str(number))
    assert distrib.own_device()==torch.device('cuda', number) and gpus.device==number

def test_of_several_machines_the_number_on_the_machine_counts(gpus, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '8'); monkeypatch.setenv('RANK', '6'); monkeypatch.setenv('LOCAL_RANK', '2')
    assert distrib.own_device().index==2

def test_more_processes_than_gpus_are_one_sentence(gpus, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '4')
    with pytest.raises(InputError, match='Process 5 on this machine has no GPU, as there are 4'): distrib.own_device()

def test_one_process_stays_on_the_gpu_that_its_user_chose(gpus, monkeypatch):
    gpus.device = 3
    monkeypatch.delenv('WORLD_SIZE')
    assert distrib.own_device().index==3 and gpus.device==3

def test_without_a_gpu_nothing_is_set(monkeypatch):
    monkeypatch.setattr(distrib, 'default_device', lambda: torch.device('cpu'))
    monkeypatch.setenv('WORLD_SIZE', '4'); monkeypatch.setenv('LOCAL_RANK', '3')
    assert distrib.own_device()==torch.device('cpu')

@pytest.mark.parametrize('name', methods)
def test_loaders_and_models_are_made_on_the_own_device(name, monkeypatch):
    "All of a model, whatever the method keeps; the device is one that holds no data"
    monkeypatch.setattr(loaders, 'own_device', lambda: torch.device('meta'))
    items = get_dataset('finches', n_train=32, n_test=8, size=32)
    assert labelled_dls(items, size=32, bs=8).device.type=='meta'
    learn = ssl_learner(ssl_dls(items, size=32, bs=8), arch_for(name), name, cbs=synth_pairs(decoder_width=8))
    named = [*learn.model.named_parameters(), *learn.model.named_buffers()]
    assert not [k for k,t in named if t.device.type!='meta'] and len(named)>50

class Stop(Exception): pass

def test_a_training_takes_its_device_before_it_makes_anything(monkeypatch, tmp_path):
    done = []
    def step(name): return lambda *a,**kw: done.append(name)
    for name in 'own_device','run_items','run_facts': monkeypatch.setattr(training, name, step(name))
    def stop(*a): raise Stop
    for dry_run,name in (True,'estimate'),(False,'make_learner'):
        monkeypatch.setattr(training, name, stop)
        with pytest.raises(Stop): training.train(out=tmp_path/'run', dry_run=dry_run)
    assert done[0]==done[2]=='own_device'

def test_a_measurement_joins_on_its_own_device(monkeypatch):
    monkeypatch.setattr(distrib, 'own_device', lambda: torch.device('cuda', 2))
    monkeypatch.setattr(distrib, 'num_distrib', lambda: 4)
    asked = {}
    def state(**kw):
        asked.update(kw)
        return SimpleNamespace(device=torch.device('cuda', 2))
    monkeypatch.setattr(distrib, 'fastai_distributed', lambda: None)
    monkeypatch.setattr(distrib, 'import_module', lambda name: SimpleNamespace(PartialState=state))
    assert distrib.join_processes().index==2 and asked==dict(cpu=False)
    assert measure.join_processes is distrib.join_processes

@pytest.mark.parametrize('backend,moves', [('nccl',True), ('gloo',False)])
def test_a_backend_of_gpus_gets_tensors_on_gpus(backend, moves, monkeypatch):
    monkeypatch.setattr(distrib.dist, 'get_backend', lambda: backend)
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda x: x.to('meta'))
    x = torch.ones(2)
    assert (distrib.on_wire(x).device.type=='meta')==moves
    assert distrib.on_wire(y := torch.ones(2, device='meta')) is y

def test_nothing_else_exchanges_tensors():
    "Only `distrib` calls PyTorch's collectives"
    calls = re.compile(r'torch\.distributed|\bdist\.|all_reduce|all_gather|distrib_barrier')
    files = sorted(f for f in (root/'fgsynth').rglob('*.py') if f.stem!='_modidx')
    users = [f.name for f in files if calls.search(f.read_text())]
    assert users==['distrib.py']
