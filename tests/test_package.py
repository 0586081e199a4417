"The package: its wheel, its commands, and what importing it asks for"
import ast, json, os, re, subprocess, sys, sysconfig, zipfile
from pathlib import Path
import pytest, yaml
from fgsynth.core import InputError
from fgsynth.show import app
from repo import cfg, copy_repository, modules, root, scripts

def test_constraints_pin_torch():
    "The developers' environment is pinned, users get ranges"
    pins = dict(re.findall(r'^(\w+)==(\S+)$', (root/'constraints.txt').read_text(), flags=re.M))
    assert {'torch','torchvision'} <= set(pins)
    assert not any('==' in o for o in cfg['requirements'].split())

def test_versions_of_python_agree(wheel):
    "settings.ini, the wheel's classifiers and its oldest Python, pyproject.toml, the Makefile and the workflows"
    versions = cfg['python_versions'].split()
    minor = [int(o.removeprefix('3.')) for o in versions]
    assert minor==list(range(10, max(minor)+1)) and '3.13' in versions and cfg['min_python']==versions[0]
    z = zipfile.ZipFile(wheel)
    about = z.read(next(o for o in z.namelist() if o.endswith('METADATA'))).decode()
    assert re.findall(r'^Classifier: Programming Language :: Python :: (3\.\d+)$', about, re.M)==versions
    oldest = f'>={versions[0]}'
    assert re.findall(r'^Requires-Python: (.*)$', about, re.M)==[oldest]
    assert f'requires-python="{oldest}"' in (root/'pyproject.toml').read_text(encoding='utf-8')
    make = (root/'Makefile').read_text(encoding='utf-8')
    assert set(re.findall(r'Python (?:>= )?(3\.\d+)', make))=={versions[0]} and f'v >= (3,{minor[0]})' in make
    jobs = yaml.safe_load((root/'.github/workflows/test.yml').read_text(encoding='utf-8'))['jobs']
    assert jobs['test']['strategy']['matrix']['python']==versions
    used = re.findall(r'python-version: "(.*)"', '\n'.join(o.read_text() for o in root.glob('.github/workflows/*.yml')))
    assert used and set(used)<={*versions, '${{ matrix.python }}'}

def test_the_workflow_runs_fast_tests_on_each_system_that_the_wheel_names(wheel):
    z = zipfile.ZipFile(wheel)
    about = z.read(next(o for o in z.namelist() if o.endswith('METADATA'))).decode()
    jobs = yaml.safe_load((root/'.github/workflows/test.yml').read_text(encoding='utf-8'))['jobs']
    runners = [jobs['test']['runs-on'], *[o['os'] for o in jobs['systems']['strategy']['matrix']['include']]]
    assert sorted(o.split('-')[0] for o in runners)==['macos','ubuntu','windows']
    assert set(re.findall(r'^Classifier: Operating System :: (.*)$', about, re.M))=={
        'POSIX :: Linux', 'MacOS', 'Microsoft :: Windows'}
    assert '-m "not slow"' in ' '.join(o.get('run', '') for o in jobs['systems']['steps'])

def test_version_agrees():
    "settings.ini and the package name the same version"
    assert f'__version__ = "{cfg["version"]}"' in (root/'fgsynth'/'__init__.py').read_text()

@pytest.mark.parametrize('script', scripts)
def test_help(forked, script):
    "Every command answers --help, in words"
    exe = Path(sys.executable).parent/script
    assert exe.exists(), f'{script} is not installed: run `make install`'
    said = forked(exe, '--help')
    assert said.returncode==0 and 'usage' in said.stdout.lower() and len(said.stdout) > 100

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The package as users get it"
    top = tmp_path_factory.mktemp('wheel'); copy_repository(top/'src')
    how = ['-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', top/'whl', top/'src']
    subprocess.run([sys.executable, *how], check=True, capture_output=True)
    return next((top/'whl').glob('*.whl'))

def test_wheel_holds_every_wing(wheel):
    "Modules, presets, licence and commands"
    z = zipfile.ZipFile(wheel); names = z.namelist()
    presets = [*(root/"fgsynth/presets").glob("*.toml"), *(root/"fgsynth/example").iterdir()]
    assert {o.relative_to(root).as_posix() for o in [*modules, *presets]} <= set(names) and presets
    assert any(o.endswith('LICENSE') for o in names)
    assert not [o for o in names if not o.startswith('fgsynth')]
    entry = z.read(next(o for o in names if o.endswith('entry_points.txt'))).decode()
    assert all(o in entry for o in scripts)

@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """What a fresh process says that has the wheel beside nothing but what it requires: what it asked of the network
    and which tools it loaded when it imported everything, where the package lies, how many steps it trained"""
    top = tmp_path_factory.mktemp('installed'); env = top/'env'
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', env], check=True)
    exe = env/('Scripts' if sys.platform=='win32' else 'bin')/'python'
    where = subprocess.run([exe, '-c', "import sysconfig; print(sysconfig.get_path('purelib'))"],
                           check=True, capture_output=True, text=True).stdout.strip()
    required = sysconfig.get_path('purelib') # a line in a .pth file adds the packages there, and no development install
    Path(where, 'requirements.pth').write_text(f'{required}\n')
    subprocess.run([sys.executable, '-m', 'pip', '--python', exe, 'install', '-q', '--no-deps', wheel], check=True)
    code = """import json, socket, sys
asked = []
def no(*args, **kwargs): asked.append(repr(args)); raise OSError('no network')
socket.socket.connect = socket.getaddrinfo = socket.create_connection = no
import fastai.vision.all, fgsynth.all, fgsynth.runs.table
tools = [o for o in ('nbdev','execnb','pytest') if o in sys.modules]
by_import = list(asked)
from fastai.vision.all import *
from fgsynth.all import *
from fgsynth.runs.presets import read_preset
arch = read_preset('smoke').values['arch']
items = get_dataset('finches', n_train=64, n_test=8, size=32)
learn = ssl_learner(ssl_dls(items, size=32, bs=32), arch, MoCoV2(), cbs=synth_pairs())
learn.fit(1, .01)
said = dict(asked=by_import, tools=tools, file=fgsynth.__file__, steps=len(learn.recorder.losses))
print(json.dumps(said))"""
    env_vars = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
    out = subprocess.run([exe, '-W', 'ignore', '-c', code], cwd=top, env=env_vars, capture_output=True, text=True)
    assert out.returncode==0, out.stderr[-3000:]
    return env, json.loads(out.stdout.splitlines()[-1])

def test_imports_without_nbdev(installed):
    "The library itself does not need nbdev"
    assert installed[1]['tools']==[]

def test_import_needs_no_network(installed):
    "Whoever imports the package asks nobody anything"
    assert installed[1]['asked']==[]

def test_wheel_trains_in_an_empty_environment(installed):
    "Installed beside nothing but what it requires, it trains two steps with a preset's settings"
    env,said = installed
    assert said['file'].startswith(str(env)) and said['steps']==2

def test_together_counts_tests_and_notebooks(tmp_path):
    "What `make test` runs: the first tool's dots, the second one's list, and one closing line whatever happened"
    def say(text, code=0):
        f = tmp_path/f'{len(list(tmp_path.iterdir()))}.py'
        f.write_text(f'import sys; print({text!r}); sys.exit({code})', encoding='utf-8')
        return f'{sys.executable} {f.as_posix()}'
    good,bad = say('..\n3 passed, 0 failed'),say('.F\n3 passed, 2 failed', 1)
    notebooks = say('Success.\n00_core.ipynb: 3 secs\nindex.ipynb: 12 secs')
    broken,crashed = say('====\n\t00_core.ipynb\n\tindex.ipynb', 1),say('', 3)
    for one,two,closing,code in ((good, notebooks, '5 passed, 0 failed', 0), (bad, notebooks, '5 passed, 2 failed', 1),
                                 (good, broken, '3 passed, 2 failed', 1), (good, crashed, '3 passed, 1 failed', 1)):
        r = subprocess.run([sys.executable, root/'tools/together.py', one, two], capture_output=True, text=True)
        assert (r.stdout.splitlines()[-1], r.returncode)==(closing, code), r.stdout

def test_survivors_have_reasons():
    "Of each change to a module that no test noticed it is said why, and of no other"
    folder = root/'results/mutants'
    reasons = json.loads((folder/'reasons.json').read_text(encoding='utf-8'))
    for f in folder.glob('*.json'):
        if f.stem=='reasons': continue
        survived = {k for k,v in json.loads(f.read_text(encoding='utf-8')).items() if v==''}
        assert survived==set(reasons.get(f.stem, {})), f.stem

def test_no_code_from_strings_and_no_shell():
    "Nothing in the modules runs text as code, or as a command of a shell"
    for f in modules:
        for o in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if not isinstance(o, ast.Call): continue
            where,name = (f.name, o.lineno),getattr(o.func, 'id', getattr(o.func, 'attr', ''))
            assert not (isinstance(o.func, ast.Name) and name in ('eval','exec','compile','__import__')), where
            assert not (isinstance(o.func, ast.Attribute) and name in ('system','popen')), where
            assert not any(k.arg=='shell' for k in o.keywords), where
            assert not any(k.arg=='weights_only' and k.value.value is not True for k in o.keywords), where

@pytest.mark.parametrize('gone', [['voila'], ['ipykernel'], ['voila','ipykernel']])
def test_the_app_says_what_it_lacks_and_its_extra_brings_it(gone, monkeypatch):
    "Voilà does not bring a kernel, without which its page stays empty"
    monkeypatch.setattr(app, 'find_spec', lambda name: None if name in gone else True)
    with pytest.raises(InputError, match=' and '.join(gone) + r": pip install 'fgsynth\[app\]'"):
        app.explore_in_browser()
    assert set(gone) <= set(re.findall(r'([\w-]+)>=', cfg['app_requirements']))
