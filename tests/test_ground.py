"What every module stands on: the user's error, files of tensors, complete files, locks, commands"
import os, sys, warnings
import pytest, torch
from fastcore.script import anno_parser
from safetensors import safe_open
from fgsynth.cli import parse_given, run_command
from fgsynth.core import InputError, check_name
from fgsynth.distrib import close_group, draw_apart, fastai_distributed, own_rows
from fgsynth.files import load_tensors, locked, read_json, replacing, save_tensors, write_csv, write_json

# core

def test_an_input_error_is_a_value_error_with_its_sentence():
    assert issubclass(InputError, ValueError)
    assert str(InputError('A sentence.'))==InputError('A sentence.').msg=='A sentence.'

@pytest.mark.parametrize('name,hint', [('simsaim', "There is no method 'simsaim': did you mean 'simsiam'?"),
                                       ('xyz', "choose one of 'mocov2', 'simsiam'.")])
def test_an_unknown_name_comes_with_a_hint(name, hint):
    with pytest.raises(InputError) as e: check_name(name, ['mocov2','simsiam'], 'method')
    assert hint in str(e.value)

def test_a_long_list_of_names_is_cut_after_twelve():
    with pytest.raises(InputError) as e: check_name('xyz', [f'name{i}' for i in range(13)])
    assert "'name11', ..." in str(e.value) and 'name12' not in str(e.value)

# files

def test_a_pickled_network_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path/'net.pt')
    with pytest.raises(InputError, match='torch.nn.modules.linear.Linear'): load_tensors(tmp_path/'net.pt')

@pytest.mark.parametrize('share', [0, .5])
def test_a_damaged_file_of_tensors_is_said_to_be_damaged(tmp_path, share):
    f = tmp_path/'weights.pt'
    torch.save(torch.ones(99), f)
    f.write_bytes(f.read_bytes()[:int(f.stat().st_size*share)])
    with pytest.raises(InputError, match='damaged'): load_tensors(f)

def test_a_text_is_no_file_of_tensors(tmp_path):
    (tmp_path/'weights.pt').write_bytes(b'no tensors')
    with pytest.raises(InputError, match='damaged'): load_tensors(tmp_path/'weights.pt')

def test_saved_tensors_have_the_permissions_of_other_files(tmp_path):
    save_tensors({'w':torch.ones(2)}, tmp_path/'a.safetensors', {})
    (tmp_path/'plain').touch()
    assert (tmp_path/'a.safetensors').stat().st_mode==(tmp_path/'plain').stat().st_mode

def test_saved_tensors_need_not_be_contiguous(tmp_path):
    turned = torch.arange(6.).view(2, 3).T
    save_tensors({'w':turned}, tmp_path/'a.safetensors', dict(arch='x'))
    with safe_open(tmp_path/'a.safetensors', 'pt') as f:
        assert f.get_tensor('w').equal(turned) and f.metadata()==dict(arch='x')

def test_tensors_that_cannot_be_written_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match='choose another folder'):
        save_tensors({'w':torch.ones(2)}, tmp_path/'none/a.safetensors', {})

def test_a_locked_folder_that_cannot_be_written_to_is_one_sentence(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(InputError, match='cannot be written to'), locked(tmp_path/'file'): pass

def test_a_lock_names_the_process_that_holds_it(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match=str(os.getpid())), locked(tmp_path): pass

def test_replacing_makes_a_file_that_was_not_there(tmp_path):
    with replacing(tmp_path/'a') as f: f.write(b'new')
    assert (tmp_path/'a').read_bytes()==b'new' and len(list(tmp_path.iterdir()))==1

def test_damaged_json_is_one_sentence(tmp_path):
    write_json(tmp_path/'s.json', dict(size=64))
    assert read_json(tmp_path/'s.json')==dict(size=64)
    (tmp_path/'s.json').write_text('{"size":')
    with pytest.raises(InputError, match='damaged'): read_json(tmp_path/'s.json')

def test_a_table_has_a_column_for_each_key(tmp_path):
    write_csv(tmp_path/'t.csv', [dict(a=1), dict(b='ü', a=2)])
    assert (tmp_path/'t.csv').read_text(encoding='utf-8').split()==['a,b', '1,', '2,ü']

# distrib, in one process

def test_one_process_has_nobody_to_wait_for_and_keeps_its_random_numbers():
    torch.manual_seed(3)
    close_group(); draw_apart()
    assert torch.initial_seed()==3

@pytest.mark.parametrize('n,processes', [(10, 3), (2, 3), (0, 2), (7, 7)])
def test_own_rows_cover_all_rows_once_and_evenly(monkeypatch, n, processes):
    monkeypatch.setattr('fgsynth.distrib.world', lambda: processes)
    rows = []
    for i in range(processes):
        monkeypatch.setattr('fgsynth.distrib.rank', lambda: i)
        rows.append(list(range(n))[own_rows(n)])
    assert sum(rows, [])==list(range(n)) and max(map(len, rows))-min(map(len, rows))<=1

def test_without_accelerate_several_processes_are_one_sentence(monkeypatch):
    monkeypatch.setattr('fgsynth.distrib.find_spec', lambda name: None)
    with pytest.raises(InputError, match='accelerate'): fastai_distributed()

# cli

def draw(
    bird:str, # Which bird
    size:int=64, # Side in pixels
):
    "Draw one bird"
    if size<32: raise InputError('The size is too small.')
    for words,kind in (('One image is odd.', UserWarning), ('old', FutureWarning), ('strange', RuntimeWarning)):
        warnings.warn(words, kind)
    print(bird, size)

@pytest.fixture
def command(monkeypatch):
    "Run `draw` as a command"
    def _f(*args):
        monkeypatch.setattr(sys, 'argv', ['draw', *args])
        with warnings.catch_warnings():
            warnings.simplefilter('always')
            run_command(draw, 'draw', anno_parser(draw, 'draw'))
    return _f

def test_only_what_was_given_is_passed_even_where_it_is_the_default(monkeypatch):
    for args,want in ((['Pinta'], dict(bird='Pinta')), (['Pinta','--size','64'], dict(bird='Pinta', size=64))):
        monkeypatch.setattr(sys, 'argv', ['draw', *args])
        assert parse_given(anno_parser(draw, 'draw'))==want

def test_a_command_calls_its_function(command, capsys):
    with pytest.warns(UserWarning, match='One image is odd'), pytest.warns(RuntimeWarning):
        command('Wolf', '--size', '48')
    assert capsys.readouterr().out=='Wolf 48\n'

def test_an_input_error_ends_a_command_with_one_sentence(command):
    with pytest.raises(SystemExit) as e: command('Wolf', '--size', '8')
    assert e.value.code=='draw: The size is too small.'                      # which Python prints, and ends with 1

def test_warnings_of_a_command_are_sentences(command, monkeypatch):
    shown = []
    def show(w): shown.append(warnings.formatwarning(w.message, w.category, w.filename, w.lineno))
    monkeypatch.setattr(warnings, '_showwarnmsg_impl', show)
    plain = warnings.formatwarning
    command('Wolf')
    assert shown[0]=='draw: One image is odd.\n'
    assert len(shown)==2 and 'RuntimeWarning: strange' in shown[1]
    assert warnings.formatwarning is plain

def test_other_errors_are_not_hidden(monkeypatch):
    def broken(): "Fails"; raise KeyError('a bug')
    monkeypatch.setattr(sys, 'argv', ['broken'])
    with pytest.raises(KeyError): run_command(broken, 'broken', anno_parser(broken, 'broken'))
