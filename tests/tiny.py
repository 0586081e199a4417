"Small images, tables and warnings, which several test files need"
import io, tarfile, warnings, zipfile
from PIL import Image

red,green,blue,white = (255,0,0),(0,255,0),(0,0,255),(255,255,255)

def solid(color=red, size=(40,40), mode='RGB'): return Image.new(mode, size, color)

def save(file, color=red, size=(40,40), **kwargs):
    "One image of one colour; returns its path"
    file.parent.mkdir(parents=True, exist_ok=True); solid(color, size).save(file, **kwargs)
    return file

def write(file, text):
    "A text file, with the folders above it"
    file.parent.mkdir(parents=True, exist_ok=True); file.write_text(text)
    return file

def caught(f):
    "The result of `f()`, and what fgsynth warned of"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always'); res = f()
    return res,[str(w.message) for w in ws if w.category is UserWarning]

def n_per_class(labels, n): return [int((labels==i).sum()) for i in range(n)]

def packed(members, how='.tgz'):
    "An archive of these members as bytes: names and texts, where '->NAME' is a link and 'device' a device"
    b = io.BytesIO()
    if how=='.zip':
        with zipfile.ZipFile(b, 'w') as z:
            for m,text in members.items(): z.writestr(m, text)
        return b.getvalue()
    with tarfile.open(fileobj=b, mode='w:gz') as t:
        for m,text in members.items():
            i = tarfile.TarInfo(m)
            if text.startswith('->'): i.type,i.linkname = tarfile.SYMTYPE,text[2:]
            elif text=='device': i.type = tarfile.CHRTYPE
            else: i.size = len(text)
            t.addfile(i, io.BytesIO(text.encode()) if i.isfile() else None)
    return b.getvalue()
