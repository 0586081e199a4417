"The repository's habits: what must hold for every notebook, page, module and command"
import ast, configparser, importlib.util, json, re, shutil, subprocess, sys
from pathlib import Path
import pytest, yaml
from conftest import root

nbs_dir = root/'nbs'
nbs = sorted(o for o in nbs_dir.rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(nbs_dir).parts))
ids = [o.relative_to(nbs_dir).as_posix() for o in nbs]
cfg = configparser.ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
scripts = [o.split('=')[0] for o in cfg['console_scripts'].split()]
each_nb = pytest.mark.parametrize('nb', nbs, ids=ids)

def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])

# Notebooks

@each_nb
def test_first_cell(nb):
    "A title and a one-line description, and nothing else: nbdev drops whatever follows them in the same cell"
    c = cells(nb)[0]
    assert c['cell_type']=='markdown'
    assert re.fullmatch(r'# \S[^\n]*\n\n> \S[^\n]*', source(c).rstrip('\n')), source(c)

@each_nb
def test_saved_outputs_are_small(nb):
    "Less than 1 MB in one notebook, so that the repository stays small"
    n = len(json.dumps([c.get('outputs',[]) for c in cells(nb)]))
    assert n < 1_000_000, f'{n/1e6:.1f} MB of saved outputs'
    assert 'widgets' not in json.loads(nb.read_text(encoding='utf-8'))['metadata'], 'the state of widgets was saved, which no page shows'

@each_nb
def test_no_errors_saved(nb):
    "No notebook was saved half run"
    bad = [source(c)[:80] for c in cells(nb) for o in c.get('outputs',[]) if o['output_type']=='error']
    assert not bad, bad

@each_nb
def test_cell_ids_differ(nb):
    "The modules name the cells that they came from"
    found = [c['id'] for c in cells(nb)]
    assert len(set(found))==len(found)

def _hidden(cell): return cell['cell_type']=='code' and {o.split()[0] for o in directives(cell)} & {'hide','export','exports','exporti','default_exp'}

def _shown(nb):
    "Code cells that a reader sees, and which of them end in an expression whose value would show"
    for c in cells(nb):
        if c['cell_type']!='code' or _hidden(c): continue
        d = directives(c)
        try: last = (ast.parse(source(c)).body or [None])[-1]
        except SyntaxError: last = None # a magic
        value = isinstance(last, ast.Expr) and not source(c).rstrip().endswith(';')
        if value and isinstance(last.value, ast.Call): value = not re.match(r'test_|expect_|\w+_close$', ast.unparse(last.value.func)) # they return nothing
        yield c, d, value

@each_nb
def test_outputs_are_saved(nb):
    "What a page should show was there when it was saved"
    bad = [source(c)[-80:] for c,d,value in _shown(nb) if value and not c.get('outputs') and d.get('output','').strip()!='false']
    assert not bad, 'run the notebook from top to bottom:\n' + '\n---\n'.join(bad)

@each_nb
def test_alt_texts(nb):
    "Every picture says in words what it shows: in a cell by `#| fig-alt:`, in prose by ![words](...)"
    bad = [source(c)[:80] for c,d,_ in _shown(nb) if any(k.startswith('image/') for o in c.get('outputs',[]) for k in o.get('data',{}))
           and len(d.get('fig-alt','').strip(' "'))<10]
    text = [m for c in cells(nb) if c['cell_type']=='markdown' for m in re.findall(r'!\[\s*\]\([^)]*\)', source(c))]
    made = [m for c,_,_ in _shown(nb) for o in c.get('outputs',[]) for m in re.findall(r'<img\b(?![^>]*\balt="[^"]+")[^>]*>', ''.join(o.get('data',{}).get('text/html','')))]
    assert not bad + text + made, bad + text + made

@each_nb
def test_picture_comes_early(nb):
    "A picture is among the first six cells that a reader sees"
    def pictured(c):
        if c['cell_type']=='markdown': return re.search(r'!\[[^\]]*\]\(', source(c))
        return any(k.startswith('image/') for o in c.get('outputs',[]) for k in o.get('data',{}))
    assert any(pictured(c) for c in [c for c in cells(nb) if not _hidden(c)][:6])

@pytest.mark.parametrize('nb', [o for o in nbs if o!=nbs_dir/'index.ipynb'], ids=[o for o in ids if o!='index.ipynb'])
def test_says_what_is_next(nb):
    "The last words of a page lead to another"
    last = [source(c) for c in cells(nb) if c['cell_type']=='markdown'][-1]
    assert re.search(r'\bNext: [^\n]*\]\([^)]+\)', last), last[-200:]

def directives(cell): return dict(o.split(':',1) if ':' in o else (o,'') for o in re.findall(r'^#\s*\|\s*(\S.*?)\s*$', source(cell), flags=re.M))

@each_nb
def test_imports_stand_alone(nb):
    "For the documentation nbdev runs every cell that holds an import, and only those and exported ones: other code in them would fail"
    bad = []
    for c in cells(nb):
        d = directives(c) if c['cell_type']=='code' else {}
        if c['cell_type']!='code' or any(o.split()[0] in ('export','exports','exporti') for o in d) or d.get('eval','').strip()=='false': continue
        try: body = ast.parse(source(c)).body
        except SyntaxError: continue # a magic
        if any(isinstance(o, (ast.Import,ast.ImportFrom)) for b in body for o in ast.walk(b)) and not all(
            isinstance(b, (ast.Import,ast.ImportFrom,ast.FunctionDef,ast.ClassDef)) for b in body): bad.append(source(c)[:200])
    assert not bad, 'give the imports a cell of their own:\n' + '\n---\n'.join(bad)

def test_no_machine_paths():
    "Nothing that is published names a folder of the machine on which it was written"
    own = re.compile(r'(?<![\w.~-])/(work|root|home|Users|tmp/bash)/[\w.-]')
    files = nbs + [*(root/'fgsynth').rglob('*.py'), *root.glob('*.md'), *nbs_dir.rglob('*.yml'), *root.glob('*.yml')]
    bad = [f'{o.relative_to(root)}: {m[0]}' for o in files for m in own.finditer(_without_pictures(o))]
    assert not bad, bad

def _without_pictures(p):
    return re.sub(r'[A-Za-z0-9+/=]{400,}', '', p.read_text(encoding='utf-8'))

def test_constraints_pin_torch():
    "The developers' environment is pinned, users get ranges"
    pins = dict(re.findall(r'^(\w+)==(\S+)$', (root/'constraints.txt').read_text(), flags=re.M))
    assert {'torch','torchvision'} <= set(pins)
    assert not any('==' in o for o in cfg['requirements'].split())

# Written files

def test_readme_and_contributing_agree():
    "README.md and CONTRIBUTING.md, and the pictures in them, are what their notebooks give"
    import readme
    for name,nb in readme.pages.items(): assert (root/name).exists() and (nbs_dir/nb).exists(), name
    assert not list(readme.differences()), 'run `make readme`'

def test_readme_links():
    "Every relative link and picture of README.md and CONTRIBUTING.md exists"
    for name in ('README.md','CONTRIBUTING.md'):
        text = re.sub(r'(?s)```.*?```', '', (root/name).read_text(encoding='utf-8'))
        targets = re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'(?:src|href)="([^"]+)"', text)
        missing = [o for o in targets if not re.match(r'[a-z]+:|#', o) and not (root/o.split('#')[0]).exists()]
        assert not missing, f'{name}: {missing}'

@pytest.mark.parametrize('name', ['_quarto.yml', 'nbs/_quarto.yml', 'nbs/sidebar.yml',
                                  '.github/workflows/test.yaml', '.github/workflows/docs.yaml'])
def test_yaml(name): assert isinstance(yaml.safe_load((root/name).read_text()), dict)

# Package

def test_imports_without_nbdev(py):
    "The library itself does not need nbdev"
    py(sys.executable, '-c', "import fgsynth.all, sys; bad = [o for o in ('nbdev','execnb','pytest') if o in sys.modules]; assert not bad, bad")

def test_version_agrees():
    "settings.ini and the package name the same version"
    assert f'__version__ = "{cfg["version"]}"' in (root/'fgsynth'/'__init__.py').read_text()

@pytest.mark.parametrize('script', scripts)
def test_help(py, script):
    "Every command answers --help, in words"
    exe = Path(sys.executable).parent/script
    assert exe.exists(), f'{script} is not installed: run `make install`'
    out = py(exe, '--help').stdout
    assert 'usage' in out.lower() and len(out) > 100

def test_wheel(py, tmp_path):
    "The wheel holds the modules, the licence and the commands"
    src = tmp_path/'src'
    _copy(src)
    py(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path/'whl', src)
    import zipfile
    z = zipfile.ZipFile(next((tmp_path/'whl').glob('*.whl')))
    names = z.namelist()
    assert {o.relative_to(root).as_posix() for o in (root/'fgsynth').rglob('*.py')} <= set(names)
    assert any(o.endswith('LICENSE') for o in names)
    assert not [o for o in names if not o.startswith('fgsynth')]
    entry = z.read(next(o for o in names if o.endswith('entry_points.txt'))).decode()
    assert all(o in entry for o in scripts)

def _copy(dst, *more):
    "A copy of what is under version control, without the environment and what was built"
    dst.mkdir()
    for o in ('settings.ini','setup.py','pyproject.toml','MANIFEST.in','LICENSE','README.md','CONTRIBUTING.md', *more):
        if (root/o).exists(): shutil.copy(root/o, dst/o)
    skip = shutil.ignore_patterns('.*', '_docs', '_proc', '__pycache__', 'runs', 'models')
    for o in ('fgsynth','nbs'): shutil.copytree(root/o, dst/o, ignore=skip)

# Documentation

def listed(o):
    "The pages named in a sidebar"
    if isinstance(o, str): return [o]
    if isinstance(o, list): return [p for q in o for p in listed(q)]
    return listed(o.get('contents', [])) + ([o['href']] if 'href' in o else [])

def test_sidebar():
    "The sidebar lists every page once, and every page that it lists exists"
    pages = listed(yaml.safe_load((nbs_dir/'sidebar.yml').read_text())['website']['sidebar']['contents'])
    assert sorted(pages)==sorted(ids)

def test_navbar():
    "So do the links in the bar at the top"
    bar = yaml.safe_load((root/'_quarto.yml').read_text())['website']['navbar']
    hrefs = [o['href'] for side in ('left','right') for o in bar.get(side,[])]
    assert not [o for o in hrefs if not o.startswith('http') and o not in ids]

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "What nbdev hands to Quarto, made from a copy of the repository"
    top = tmp_path_factory.mktemp('site')/'top'
    _copy(top, '_quarto.yml')
    code = 'from nbdev.serve import proc_nbs; proc_nbs(n_workers=2)' # what nbdev_proc_nbs does, without installing Quarto
    r = subprocess.run([sys.executable, '-c', code], cwd=top, text=True, capture_output=True)
    why = re.search(r'(?s)Error in notebook.*?(?="""|\n\n)', r.stderr)
    assert r.returncode==0, why[0] if why else r.stderr[-4000:]
    return top/'_proc'

def test_proc_nbs(site):
    "nbdev turns every notebook into a page with a title"
    done = {o.relative_to(site).as_posix() for o in site.rglob('*.ipynb')}
    assert done==set(ids)
    for o in ids:
        c = cells(site/o)[0]
        assert c['cell_type']=='raw' and 'title:' in source(c), o

def test_links(site):
    "No page links to a page, picture or notebook that does not exist"
    if not importlib.util.find_spec('smalldocs'): pytest.skip('smalldocs, which checks the links, needs Python 3.11')
    r = subprocess.run([Path(sys.executable).parent/'smalldocs', 'check', str(site)], text=True, capture_output=True)
    problems = [l for l in r.stdout.splitlines() if l.strip() and 'output-file' not in l]
    assert not problems, '\n'.join(problems)
    assert 'page(s)' in r.stderr, r.stderr

def test_links_to_symbols(site):
    "Names in backticks lead to entries that their pages show"
    shown = set()
    for o in site.rglob('*.ipynb'):
        page = re.search(r'output-file: (\S+)', source(cells(o)[0]))
        if page: shown |= {f'{page[1]}#{m.lower()}' for c in cells(o) if c['cell_type']=='code' for m in re.findall(r'^show_doc\(([\w.]+)', source(c), re.M)}
    base = f"{cfg['doc_host']}{cfg['doc_baseurl']}/"
    found = {m for o in site.rglob('*.ipynb') for c in cells(o) for m in re.findall(re.escape(base)+r'(\w+\.html#[\w.]+)', source(c))}
    assert len(found)>50
    assert not found-shown, f'no show_doc for {sorted(found-shown)}'

def test_survivors_have_reasons():
    "Of each change to a module that no test noticed it is said why, and of no other"
    folder = root/'results/mutants'
    reasons = json.loads((folder/'reasons.json').read_text(encoding='utf-8'))
    for f in folder.glob('*.json'):
        if f.stem=='reasons': continue
        survived = {k for k,v in json.loads(f.read_text(encoding='utf-8')).items() if v==''}
        assert survived==set(reasons.get(f.stem, {})), f.stem

def test_import_needs_no_network():
    "Whoever imports the package asks nobody anything"
    code = """import socket
asked = []
def no(*args, **kwargs): asked.append(args); raise OSError('no network')
socket.socket.connect = socket.getaddrinfo = socket.create_connection = no
import fastai.vision.all, fgsynth.all, fgsynth.table
assert not asked, asked"""
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert r.returncode==0, r.stderr

def test_no_code_from_strings_and_no_shell():
    "Nothing in the modules runs text as code, or as a command of a shell"
    for f in (root/'fgsynth').glob('*.py'):
        for o in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if not isinstance(o, ast.Call): continue
            assert not (isinstance(o.func, ast.Name) and o.func.id in ('eval','exec','compile','__import__')), (f.name, o.lineno)
            assert not (isinstance(o.func, ast.Attribute) and o.func.attr in ('system','popen')), (f.name, o.lineno)
            assert not any(k.arg=='shell' for k in o.keywords), (f.name, o.lineno)
            assert not any(k.arg=='weights_only' and k.value.value is not True for k in o.keywords), (f.name, o.lineno)
