"""Run a notebook's tests on the module that it exports: `as_module.py NOTEBOOK`.
`nbdev_test` runs what the cells say, so the module's file is not looked at. Here every exported cell becomes an import from the module, beside its own imports:
what measures coverage, or changes a line to see whether a test notices, then sees the file that users import."""
import ast, sys
from pathlib import Path
import nbdev.test

root = Path(__file__).resolve().parent.parent

def bound(source):
    "Names that the code binds, and its imports"
    body = ast.parse(source).body
    targets = [t for o in body if isinstance(o, (ast.Assign,ast.AnnAssign)) for t in (o.targets if isinstance(o, ast.Assign) else [o.target])]
    names = [o.name for o in body if isinstance(o, (ast.FunctionDef,ast.ClassDef))] + [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return list(dict.fromkeys(names)), [ast.unparse(o) for o in body if isinstance(o, (ast.Import,ast.ImportFrom))]

class FromModule(nbdev.test.NBProcessor):
    "A notebook whose exported cells are imports"
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        cells = [c for c in self.nb.cells if c.cell_type=='code']
        exp = next((c.directives_['default_exp'][0] for c in cells if 'default_exp' in c.directives_), None)
        for c in cells:
            if not (exp and {'export','exporti','exports'} & c.directives_.keys()): continue
            names,imports = bound(c.source)
            c.source = '\n'.join(imports + [f"from fgsynth.{exp} import {', '.join(names)}"]*bool(names))

def passes(notebook, **kw):
    "Do its tests pass on the module?"
    nbdev.test.NBProcessor = FromModule
    return nbdev.test.test_nb(Path(notebook).resolve(), skip_flags=nbdev.test.get_config().tst_flags.split(), basepath=root, **kw)[0]

if __name__=='__main__': sys.exit(not passes(sys.argv[1]))
