"Progress where somebody looks on, one line an epoch in a log, and Ctrl-C"
import io, os, signal, subprocess, sys
from argparse import ArgumentParser
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
import pytest, torch
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop
from conftest import call, save_photos
from fgsynth.all import *
from fgsynth.cli import as_sentences, if_interrupted, is_interactive, run_command, with_bar, without_foreign_bars
from fgsynth.data.images import map_threads
from fgsynth.runs import rows as rows_room, train as train_room

class Terminal(io.StringIO):
    def isatty(self): return True

def printed(f, out=None):
    "What `f()` writes to standard output: a file, or a terminal"
    with redirect_stdout(out or io.StringIO()) as s: f()
    return s.getvalue()

@pytest.fixture(scope='module')
def dls(): return ssl_dls(get_dataset('finches', n_train=64, n_test=8, size=32), size=32, bs=16, valid_pct=.25)

def new(dls, **kw): return ssl_learner(dls, 'timm/test_byobnet', MoCoV2(), **kw)

# Bars

@pytest.mark.parametrize('go', [lambda: list(with_bar(range(3), 3, True)), lambda: map_threads(str, range(2001)),
                                lambda: map_threads(str, range(3), progress=True)])
def test_bars_are_drawn_for_those_who_look_on(go):
    assert printed(go)=='' and '\r' in printed(go, Terminal())

def test_without_a_terminal_is_where_no_bar_can_be(monkeypatch):
    def tell(): print(is_interactive())
    assert printed(tell)=='False\n' and printed(tell, Terminal())=='True\n'
    monkeypatch.setattr(sys, 'stdout', None); assert not is_interactive() # as under pythonw

def test_bars_of_other_libraries_stay_out_of_a_log():
    def tells(): print('50 %\r', file=sys.stderr)
    def f():
        with without_foreign_bars(): tells()
    with redirect_stderr(io.StringIO()) as err: printed(f); assert err.getvalue()==''
    with redirect_stderr(io.StringIO()) as err: printed(f, Terminal()); assert err.getvalue()=='50 %\r\n'

def test_an_index_of_many_images_draws_no_bar_in_a_log(tmp_path, monkeypatch):
    from fgsynth.own import search
    monkeypatch.setattr(search, '_encode', lambda encoder, files, bs: (torch.ones(len(files), 2), range(len(files))))
    stats = {str(i):(str(i),1,2) for i in range(2100)}
    assert printed(lambda: list(search._new_blocks(None, stats, 8, None)))==''

# One line an epoch

def epochs(text):
    lines = text.splitlines()
    assert '\r' not in text and all(o.startswith('epoch ') for o in lines), text
    return len(lines)

def test_a_fit_writes_one_line_an_epoch(dls):
    text = printed(lambda: new(dls).fit(3, .01))
    assert epochs(text)==3
    first = dict(o.split(' ', 1) for o in text.splitlines()[0].split(', '))
    assert first['epoch']=='0' and ':' in first['time'] and all(float(first[f'{o}_loss'])>0 for o in ('train','valid'))

def test_the_line_has_what_the_table_has(dls):
    learn = new(dls); text = printed(lambda: learn.fit(1, .01))
    names,values = learn.recorder.metric_names,learn.recorder.log
    want = [f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k,v in zip(names, values) if v is not None]
    assert text.strip().split(', ')==want

def test_a_decoder_writes_one_line_an_epoch(dls):
    learn = new(dls, cbs=synth_pairs(decoder_width=4))
    assert epochs(printed(lambda: learn.pretrain_decoder(2)))==2

def test_a_terminal_keeps_bars_and_table(dls):
    text = printed(lambda: new(dls).fit(1, .01), Terminal())
    assert '\r' in text and 'train_loss' in text and 'epoch 0' not in text

def test_who_wants_silence_gets_it(dls):
    def silent():
        learn = new(dls)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
        learn.remove_cb(learn.progress); learn.logger = noop; learn.fit(1, .01)
    assert printed(silent)==''

def test_fastais_own_uses_of_the_bars_work_in_a_log(dls):
    from fastai.callback.progress import ShowGraphCallback
    learn = new(dls)
    def uses():
        learn.fit(1, .01, cbs=ShowGraphCallback()); learn.validate()
        with learn.no_mbar(): learn.fit(1, .01)
    assert epochs(printed(uses))==2
    assert isinstance(learn.progress, ProgressCallback) and learn.logger is print

@pytest.fixture(scope='module')
def photos(tmp_path_factory): return save_photos(tmp_path_factory.mktemp('photos'), 40)

def smoke(photos): return '--preset','smoke','--data',photos,'--bs','16'

def test_the_command_logs_without_carriage_returns(photos, tmp_path, monkeypatch, capfd):
    call(monkeypatch, 'fgsynth_train', *smoke(photos), '--epochs', 2, '--out', tmp_path/'run')
    out,err = capfd.readouterr()
    assert '\r' not in out+err
    lines = [o for o in out.splitlines() if o.startswith('epoch ') and 'train_loss' in o]
    assert len(lines)==3, out # one of the decoder

# Ctrl-C

def interrupted(f, monkeypatch, capsys, prog='fgsynth_x'):
    "What a command says when `f`, which it calls, is interrupted"
    monkeypatch.setattr(sys, 'argv', [prog])
    with pytest.raises(SystemExit) as e: run_command(f, prog, ArgumentParser())
    out,err = capsys.readouterr()
    assert e.value.code==130 and err.count('\n')==1 and err.startswith(f'{prog}: interrupted')
    return err.strip()

def stop(*args, **kwargs): raise KeyboardInterrupt

def test_ctrl_c_is_one_sentence(monkeypatch, capsys):
    def f(): "Stops"; stop()
    assert interrupted(f, monkeypatch, capsys)=='fgsynth_x: interrupted.'
    def g():
        "Stops, and can go on"
        with if_interrupted('it goes on with --more'): stop()
    assert interrupted(g, monkeypatch, capsys)=='fgsynth_x: interrupted; it goes on with --more.'

def test_of_several_processes_one_says_it(monkeypatch, capsys):
    monkeypatch.setenv('RANK', '1')
    with pytest.raises(SystemExit) as e, as_sentences('fgsynth_x'): stop()
    assert e.value.code==130 and capsys.readouterr().err==''

@pytest.mark.parametrize('where,has', [('fit_run', True), ('_pretrain', True), ('make_learner', False),
                                       ('run_items', False)])
def test_a_training_names_resume_once_there_is_something_to_resume(where, has, dls, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_room, 'run_items', lambda *args: dls.items)
    monkeypatch.setattr(train_room, where, stop)
    with pytest.raises(SystemExit) as e:
        call(monkeypatch, 'fgsynth_train', '--preset', 'smoke', '--out', tmp_path/'run')
    err = capsys.readouterr().err
    assert e.value.code==130 and ('--resume' in err)==has==(tmp_path/'run').exists() and err.count('\n')==1

def test_a_table_goes_on_with_the_same_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows_room, 'measure_run', stop)
    with pytest.raises(SystemExit) as e:
        call(monkeypatch, 'fgsynth_table', 'tau', '--data', 'finches', '--preset', 'smoke', '--seeds', 1,
             '--out', tmp_path/'runs.csv')
    assert e.value.code==130 and 'the same command goes on' in capsys.readouterr().err

@pytest.mark.parametrize('room,name,args', [('data.check','get_dataset',('fgsynth_data','check','{}')),
    ('data.check','get_dataset',('fgsynth_data','download','cub200','{}')),
    ('runs.measure','read_run',('fgsynth_eval','{}')),
    ('runs.demo','get_dataset',('fgsynth_demo','--small','--out','{}/demo')),
    ('own.search','read_run',('fgsynth_search','{}','x.png')), ('own.hub','export_encoder',('fgsynth_export','{}')),
    ('own.label','read_exchange',('fgsynth_label','{}','x.csv'))])
def test_every_command_ends_in_one_sentence(room, name, args, tmp_path, monkeypatch, capsys):
    "Whatever it does first is interrupted"
    for o in 'settings.json','encoder.safetensors': (tmp_path/o).touch() # as if there was a run
    monkeypatch.setattr(f'fgsynth.{room}.{name}', stop)
    with pytest.raises(SystemExit) as e: call(monkeypatch, *[o.format(tmp_path) for o in args])
    err = capsys.readouterr().err
    assert e.value.code==130 and err.startswith(f'{args[0]}: interrupted') and err.count('\n')==1

def test_a_download_that_is_interrupted_leaves_no_half_file(tmp_path, monkeypatch):
    "Or the next one would take it for the whole"
    import torchvision.datasets.utils as utils
    def half(url, filename, **kw): Path(filename).write_bytes(b'half'); raise KeyboardInterrupt
    monkeypatch.setattr(utils, '_urlretrieve', half)
    monkeypatch.setattr(utils, '_get_redirect_url', lambda url, **kw: url)
    with pytest.raises(KeyboardInterrupt): get_dataset('cub200', tmp_path/'to', download=True)
    assert not [f for f in (tmp_path/'to').rglob('*') if f.is_file()]

@pytest.mark.skipif(os.name=='nt', reason='Windows has other signals')
def test_ctrl_c_in_a_shell(photos, tmp_path):
    "A real signal during a real training: one sentence, 130, and no traceback; then it goes on"
    args = [Path(sys.executable).parent/'fgsynth_train', *smoke(photos), '--epochs', '500', '--out', tmp_path/'run']
    def heed(): signal.signal(signal.SIGINT, signal.SIG_DFL) # which a job in the background ignores
    with subprocess.Popen(args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=heed) as p:
        try:
            for line in p.stdout:
                if 'Training' in line: break
            p.send_signal(signal.SIGINT)
            _,err = p.communicate(timeout=120)
        finally: p.kill()
    assert p.returncode==130 and 'Traceback' not in err and '--resume' in err.splitlines()[-1], err

def test_a_decoder_without_validation_images_trains_without_a_warning(recwarn, capsys):
    items = get_dataset('finches', n_train=16, n_test=8, size=32)
    learn = ssl_learner(ssl_dls(items, size=32, bs=8), 'timm/test_byobnet', cbs=synth_pairs(decoder_width=8))
    learn.pretrain_decoder(1)
    assert not len(learn.dls.valid) and not [w for w in recwarn if w.category is UserWarning]
    assert capsys.readouterr().out.count('epoch 0')==1
