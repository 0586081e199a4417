"What the tests of the repository's habits share: its notebooks, cells and modules"
import ast, configparser, json, re, shutil
from functools import cache
import pytest
from conftest import root

nbs_dir = root/'nbs'
nbs = sorted(o for o in nbs_dir.rglob('*.ipynb') if not any(p[0] in '._' for p in o.relative_to(nbs_dir).parts))
ids = [o.relative_to(nbs_dir).as_posix() for o in nbs]
cfg = configparser.ConfigParser(delimiters=['='])
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
scripts = [o.split('=')[0] for o in cfg['console_scripts'].split()]
each_nb = pytest.mark.parametrize('nb', nbs, ids=ids)
modules = sorted(o for o in (root/'fgsynth').rglob('*.py') if '__pycache__' not in o.parts)

def cells(nb): return json.loads(nb.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])

def directives(cell):
    "What stands behind `#|`, by name"
    found = re.findall(r'^#\s*\|\s*(\S.*?)\s*$', source(cell), flags=re.M)
    return dict(o.split(':', 1) if ':' in o else (o,'') for o in found)

def is_exported(cell): return any(o.split()[0] in ('export','exports','exporti') for o in directives(cell))

def hidden(cell):
    "Does the reader of a page not see this cell?"
    return cell['cell_type']=='code' and any(
        o.split()[0] in ('hide','default_exp','export','exports','exporti') for o in directives(cell))

def only_imports(cell): return all(isinstance(o, (ast.Import,ast.ImportFrom)) for o in ast.parse(source(cell)).body)

def pictured(cell): return any(k.startswith('image/') for o in cell.get('outputs',[]) for k in o.get('data',{}))

@cache
def module_of(nb):
    "The module that a notebook exports, such as 'data.items'"
    for c in cells(nb):
        if c['cell_type']=='code' and (found := re.match(r'#\| default_exp (\S+)', source(c))): return found[1]

def copy_repository(dst, *more):
    "A copy of what is under version control, without the environment and what was built"
    dst.mkdir()
    for o in ('settings.ini','setup.py','pyproject.toml','MANIFEST.in','LICENSE','README.md','CONTRIBUTING.md', *more):
        if (root/o).exists(): shutil.copy(root/o, dst/o)
    skip = shutil.ignore_patterns('.*', '_docs', '_proc', '__pycache__')
    for o in ('fgsynth','nbs'): shutil.copytree(root/o, dst/o, ignore=skip)
    shutil.rmtree(dst/'nbs/tutorials/runs', ignore_errors=True)
