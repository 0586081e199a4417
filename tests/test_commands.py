"What commands accept is known without PyTorch, and is what their functions say"
import os, subprocess, sys
import pytest
from conftest import root
from fgsynth.commands import find_place_for_run, known_commands, make_parser, parser_of, run_command_of
import commands as tool

names = sorted(known_commands()['commands'])

def test_the_file_says_what_the_functions_say():
    assert (root/'fgsynth/commands.json').read_text(encoding='utf-8')==tool.described(), 'run "make export"'

@pytest.mark.parametrize('name', sorted(tool.functions))
def test_the_light_parser_accepts_what_the_functions_own_does(name):
    "Option by option: spelling, type, default and the number of values"
    theirs = tool.anno_parser(tool.functions[name], prog=name)
    ours = make_parser(name, known_commands()['commands'][name])
    def options(parser):
        return {o.dest:(o.option_strings, o.default, o.nargs, getattr(o.type, '__name__', None) or 'str')
                for o in parser._actions if o.dest not in ('help','pdb','xtra')}
    want = options(theirs)
    if name in tool.optional: # given without its name, or not at all
        _,default,_,kind = want[tool.optional[name]]
        want[tool.optional[name]] = [],default,'?',kind
    if name in tool.many: # several words
        flags,default,*_ = want[tool.many[name]]
        want[tool.many[name]] = flags,default,'+','str'
    assert options(ours)==want

def test_no_parser_of_fastcores_when_a_command_runs():
    "fastcore 2 spells options with hyphens, fastcore 1 as the functions do; ours are written down"
    for file in (root/'fgsynth').rglob('*.py'):
        for line in file.read_text(encoding='utf-8').splitlines():
            assert 'fastcore.script' not in line or line=='from fastcore.script import store_true', file

def test_commands_within_a_command():
    parse = parser_of('fgsynth_data', known_commands()['commands']['fgsynth_data']).parse_args
    assert vars(parse(['check','my/photos','--small','20'])) | dict(completion=None)==dict(
        what='check', name='my/photos', path=None, small=20, near=None, completion=None)
    assert parse(['list']).what=='list'

@pytest.fixture(scope='module')
def light(tmp_path_factory):
    "Run a command in a process that must not import anything heavy: exit code, output, errors"
    code = """import atexit, sys
atexit.register(lambda: print({'torch','fastai','numpy'} & set(sys.modules) or 'light'))
from fgsynth.commands import *
import fgsynth.commands as c
sys.argv = sys.argv[1:]
getattr(c, sys.argv[0])()"""
    def run(*args, cwd=None):
        env = dict(os.environ, PYTHONPATH=str(root), COLUMNS='200')
        r = subprocess.run([sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True, env=env,
                           cwd=cwd or tmp_path_factory.mktemp('light'), encoding='utf-8')
        assert r.stdout.splitlines()[-1]=='light', r.stdout + r.stderr
        return r.returncode,r.stdout,r.stderr
    return run

def test_the_browser_is_not_kept_waiting():
    "`fgsynth_explore` begins to serve before anything heavy is imported, which the page does by itself"
    code = "import sys, fgsynth.show.app; sys.exit('torch' in sys.modules)"
    assert not subprocess.run([sys.executable, '-c', code]).returncode

@pytest.mark.parametrize('name', names)
def test_help_is_light_and_names_every_option(light, name):
    rc,out,_ = light(name, '--help')
    assert rc==0
    for o in known_commands()['commands'][name]['options']:
        for word in o.get('flags') or o.get('commands') or [o['dest']]: assert word in out, word

@pytest.mark.parametrize('args,rc,says', [
    (['fgsynth_train','--epocs','3'], 2, 'there is no option --epocs, did you mean --epochs?'),
    (['fgsynth_train','--epocs=3'], 2, 'did you mean --epochs?'),
    (['fgsynth_train','--quux'], 2, 'there is no option --quux.'),
    (['fgsynth_train','photos'], 2, "'photos' is one argument too many"),
    (['fgsynth_train','--epochs','x'], 2, "invalid int value: 'x'"),
    (['fgsynth_train','--epochs'], 2, 'expected one argument'),
    (['fgsynth_train','--data','no/photos'], 1, 'does not exist'),
    (['fgsynth_train','--data','finch'], 1, "did you mean 'finches'?"),
    (['fgsynth_table','headline','--data','no/photos'], 1, 'does not exist'),
    (['fgsynth_eval','runs/none'], 1, 'no finished run'),
    (['fgsynth_search','runs/none','a.png'], 1, 'no finished run'),
    (['fgsynth_label','runs/none','labels.csv'], 1, 'no finished run'),
    (['fgsynth_train','--completion','fish'], 2, 'invalid choice'),
    (['fgsynth_data','chekc','photos'], 2, 'invalid choice'),
    (['fgsynth_data','check','no/photos'], 1, 'does not exist'),
    (['fgsynth_data'], 2, 'required')])
def test_mistakes_are_one_light_sentence(light, args, rc, says):
    code,_,err = light(*args)
    assert (code, err.count('\n'))==(rc, 1) and says in err and err.startswith(args[0]), err

def test_a_place_that_is_taken_is_said_at_once(light, tmp_path):
    run = tmp_path/'runs'/'last'; run.mkdir(parents=True)
    (run/'settings.json').write_text('{}')
    for name in 'fgsynth_train','fgsynth_demo':
        code,_,err = light(name, '--out', 'runs/last', cwd=tmp_path)
        assert code==1 and '--overwrite' in err, err
    assert [find_place_for_run(run, **how)==run for how in (dict(overwrite=True), dict(resume=True))]==[True]*2
    assert not find_place_for_run(tmp_path/'new').exists()

@pytest.mark.parametrize('shell,word', [('bash','complete'), ('zsh','compdef')])
def test_completions(monkeypatch, capsys, shell, word):
    pytest.importorskip('shtab')
    for name in names:
        asked = [f'--completion={shell}'] if shell=='zsh' else ['--completion', shell]
        monkeypatch.setattr(sys, 'argv', [name, *asked])
        with pytest.raises(SystemExit) as e: run_command_of(name, 'none')
        assert not e.value.code
        said = capsys.readouterr().out
        assert word in said and name in said

def test_completions_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'shtab', None)
    monkeypatch.setattr(sys, 'argv', ['fgsynth_train', '--completion', 'zsh'])
    with pytest.raises(SystemExit, match=r'fgsynth\[completion\]'): run_command_of('fgsynth_train', 'none')

def test_a_terminal_hears_that_something_is_happening(monkeypatch, capsys):
    "and the line is gone when the command begins; a log hears nothing"
    import fgsynth.runs.train as room
    monkeypatch.setattr(room, 'fgsynth_train', lambda: print('begun'))
    monkeypatch.setattr(sys, 'argv', ['fgsynth_train', '--dry_run', '--out', 'runs/nowhere'])
    run_command_of('fgsynth_train', 'runs.train')
    assert capsys.readouterr()==('begun\n', '')
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True, raising=False)
    run_command_of('fgsynth_train', 'runs.train')
    out,err = capsys.readouterr()
    assert out=='begun\n' and 'fgsynth_train is starting' in err and err.endswith('\r\033[K')
