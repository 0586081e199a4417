"""Write README.md and CONTRIBUTING.md from nbs/index.ipynb and nbs/contributing.ipynb, as GitHub markdown.

nbdev's own processors treat the cells, so directives mean what they mean on the documentation's pages. Unlike
`nbdev_readme` it needs no Quarto, executes nothing, and gives the same bytes every time. Pictures in the saved
outputs become `nbs/images/readme_1.png` and so on.

  tools/readme.py            write the files
  tools/readme.py --check    write nothing; exit with 1 if a file differs from its notebook
"""
import base64, os, posixpath, re, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
pages = {'README.md': 'index.ipynb', 'CONTRIBUTING.md': 'contributing.ipynb'}

def procs():
    "nbdev's processors for documentation pages, without those that execute code or write Quarto's own markup"
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.processors import strip_ansi, hide_line, filter_stream_, rm_header_dash, rm_export, clean_magics, hide_
    return [FrontmatterProc, strip_ansi, hide_line, filter_stream_, rm_header_dash, rm_export, clean_magics, hide_]

def text(o): return o if isinstance(o, str) else ''.join(o)

def is_false(cell, key): return 'false' in [str(o).lower() for o in cell.directives_.get(f'{key}:', [])]

def alt(cell): return ' '.join(cell.directives_.get('fig-alt:', [])).strip('"')

def fence(s, lang=''):
    "`s` as a code block whose fence is longer than any that it contains"
    ticks = '`'*max([3] + [len(o)+1 for o in re.findall('`{3,}', s)])
    return f'{ticks}{lang}\n{s}\n{ticks}'

def link(target, nb_dir):
    "A link as seen from the notebook's folder, made relative to the repository's top"
    if re.match(r'[a-z]+:|#|/', target): return target
    path,sharp,frag = target.partition('#')
    return posixpath.normpath(posixpath.join(nb_dir, path)) + sharp + frag

def markdown(src, nb_dir, lookup):
    "A markdown cell: names in backticks become links, relative links are seen from the top, Quarto's fences go"
    res,fenced = [],False
    for l in lookup.linkify(src).splitlines():
        if l.startswith('```'): fenced = not fenced
        elif not fenced:
            if l.startswith(':::'): continue
            l = re.sub(r'(\]\()([^)\s]+)', lambda m: m[1]+link(m[2], nb_dir), l)
            l = re.sub(r'((?:src|href)=")([^"]+)', lambda m: m[1]+link(m[2], nb_dir), l)
            l = re.sub(r'(!\[[^\]]*\]\([^)]*\))\{[^}]*\}', r'\1', l)
        res.append(l.rstrip() if not l.endswith('  ') else l)
    return '\n'.join(res).strip()

def html(s):
    "Saved HTML as far as GitHub shows it: tables and pictures stay; styles, progress bars and scripts go"
    if '<script' in s: return ''
    s = re.sub(r'(?s)<!--.*?-->|<style\b.*?</style>', '', s)
    s = re.sub(r'(?s)<(div|p)\b[^>]*>\s*<progress.*?</\1>', '', s)
    if not re.search(r'<(table|img|svg)\b', s): return ''
    return '\n'.join(l.strip() for l in s.splitlines() if l.strip())

def output(out, add_image, alt=''):
    "One saved output of a code cell, with `alt` in place of a picture for who cannot see it"
    if out.output_type=='stream':
        s = text(out.text).rstrip()
        return fence(s) if s and out.get('name')!='stderr' else ''
    if out.output_type=='error': return fence(text(out.get('evalue','')))
    data = out.get('data', {})
    page,md,plain = [text(data.get(f'text/{o}', '')).strip() for o in ('html','markdown','plain')]
    if html(page): return html(page)
    for kind,ext in (('png','png'),('jpeg','jpg')):
        if f'image/{kind}' in data: return f"![{alt}]({add_image(base64.b64decode(text(data[f'image/{kind}'])), ext)})"
    if 'image/svg+xml' in data: return f"![{alt}]({add_image(text(data['image/svg+xml']).encode(), 'svg')})"
    if page and (md.startswith('```html') or not plain or plain.startswith('<IPython')): return '' # a progress bar
    return md or (fence(plain) if plain else '')

def render(name, nb_path, images='nbs/images'):
    "The markdown of the notebook at `nb_path` for file `name`, and its pictures as a dict of path to bytes"
    from nbdev.doclinks import NbdevLookup
    from nbdev.process import NBProcessor
    nb_path = Path(nb_path)
    nb = NBProcessor(nb_path, procs(), process=True).nb
    lookup,pics,res = NbdevLookup(incl_libs='fgsynth'),{},[]
    def add_image(b, ext):
        path = f'{images}/{Path(name).stem.lower()}_{len(pics)+1}.{ext}'
        pics[path] = b
        return path
    fm = nb.frontmatter_
    source = pages.get(name, nb_path.name)
    note = f'<!-- Written from nbs/{source} by tools/readme.py: edit the notebook, then run `make readme` -->'
    res += [f"# {fm['title']}", note]
    if 'description' in fm: res.append(f"> {fm['description']}")
    for cell in nb.cells:
        src = text(cell.source).strip()
        if cell.cell_type=='markdown': res.append(markdown(src, 'nbs', lookup))
        if cell.cell_type!='code' or is_false(cell, 'include'): continue
        src = '\n'.join(l for l in src.splitlines() if not re.match(r'\s*#\s*\|', l)).strip()
        if src and not is_false(cell, 'echo'): res.append(fence(src, 'python'))
        if not is_false(cell, 'output'): res += [output(o, add_image, alt(cell)) for o in cell.get('outputs', [])]
    return '\n\n'.join(o for o in res if o) + '\n', pics

def differences(top=root):
    "The files that differ from what their notebooks give, as a dict of path to wanted bytes (None: not wanted)"
    res = {}
    for name,nb in pages.items():
        if not (top/'nbs'/nb).exists(): continue
        md,pics = render(name, top/'nbs'/nb)
        want = {name: md.encode()} | pics
        for o in (top/'nbs'/'images').glob(f'{Path(name).stem.lower()}_*.*'):
            want.setdefault(o.relative_to(top).as_posix(), None)
        for path,b in want.items():
            p = top/path
            if (p.read_bytes() if p.exists() else None) != b: res[path] = b
    return res

def main():
    os.chdir(root)
    diffs = differences()
    for path,b in diffs.items():
        if '--check' in sys.argv[1:]: print(f'{path} differs from its notebook: run `make readme`')
        elif b is None: (root/path).unlink()
        else:
            (root/path).parent.mkdir(parents=True, exist_ok=True)
            (root/path).write_bytes(b)
            print(f'wrote {path}')
    return 1 if diffs and '--check' in sys.argv[1:] else 0

if __name__=='__main__': sys.exit(main())
