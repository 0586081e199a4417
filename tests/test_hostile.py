"""Odd and hostile input to the data path: for each kind what fgsynth answers, and the page that says so.
`python tests/test_hostile.py` writes the page, nbs/data/18_odd.ipynb; the tests compare it with what happens."""
import contextlib, hashlib, json, os, re, struct, tempfile, warnings, zipfile, zlib
from pathlib import Path
from unittest.mock import patch
import numpy as np, pytest
from PIL import EpsImagePlugin, Image
from fgsynth.core import InputError
from fgsynth.data.check import check_data
from fgsynth.data.datasets import Archive, DOWNLOADS, get_dataset
from fgsynth.data.decoded import load_images
from fgsynth.data.loaders import ssl_dls
from tiny import blue, caught, green, packed, red, save, solid, white, write

page = Path(__file__).resolve().parent.parent/'nbs/data/18_odd.ipynb'
kinds = {}

def kind(section, name):
    "Enter a function under a name; it makes the input, checks what can be checked and returns what happened"
    def _f(f): kinds[name] = section,f; return f
    return _f

# Tools

def cls(d, *names, n=2):
    "Class folders with `n` images each"
    for k,c in enumerate(names):
        for i in range(n): picture(d/c/f'{i}.png', (60*k,20*i,9))
    return d

def picture(file, color):
    "White beside a colour"
    im = solid(white); im.paste(color, (20,0,40,40)); file.parent.mkdir(parents=True, exist_ok=True); im.save(file)

def among(d, f, *colors):
    "What becomes of the file `f` among two good images; `colors`: of its top left and bottom right corner"
    save(d/'good 1.png', green); save(d/'good 2.jpg', blue)
    items,w1 = caught(lambda: get_dataset(d))
    (x,good),w2 = caught(lambda: load_images(items.train, 32))
    names = [items.train[i].name for i in good.tolist()]
    assert {'good 1.png','good 2.jpg'} <= set(names)
    for o,c in (('good 1.png',green), ('good 2.jpg',blue)): assert near(x[names.index(o)][:,16,16], c)
    assert '\n' not in ''.join(w2)
    if f not in items.train and not w1: assert not w2; return 'ignored: not taken for an image'
    if f not in items.train: assert len(w1)==1 and f.name in w1[0]; return 'left out, and named in a warning'
    if f.name not in names:
        assert len(w2)==1 and f.name[-20:] in w2[0] and f'1 of {len(items.train)} ' in w2[0]
        return 'left out, and named in one warning'
    assert not w1+w2
    y = x[names.index(f.name)]
    for c,p in zip(colors, (y[:,2,2], y[:,-3,-3])): assert near(p, c), (p, c)
    return 'read'

def near(p, c, tol=4): return max(abs(int(a)-b) for a,b in zip(p, c))<=tol

@contextlib.contextmanager
def without_rights(d):
    "Inside, the process has no more rights in the folder `d` than any user, even when it runs as root"
    root = hasattr(os, 'geteuid') and os.geteuid()==0
    if root: os.seteuid(65534)
    try:
        try: os.listdir(d)
        except OSError: pytest.skip('the folder for temporary files is closed to other users')
        yield
    finally:
        if root: os.seteuid(0)

def bomb(f, side=100_000):
    "A PNG of a few bytes that claims to have `side` x `side` pixels"
    def chunk(t, b): return struct.pack('>I', len(b)) + t + b + struct.pack('>I', zlib.crc32(t+b))
    head,pixels = struct.pack('>IIBBBBB', side, side, 8, 0, 0, 0, 0),zlib.compress(bytes(1000))
    f.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', pixels) + chunk(b'IEND', b''))
    return f

# One file

S = 'One file among good ones'

@kind(S, 'JPEG cut off in the middle')
def _(d):
    f = d/'cut.jpg'; Image.fromarray(np.random.default_rng(0).integers(0, 255, (60,60,3), np.uint8)).save(f)
    f.write_bytes(f.read_bytes()[:2000])
    return among(d, f)

@kind(S, 'file of 0 bytes')
def _(d): (d/'zero.png').touch(); return among(d, d/'zero.png')

@kind(S, 'text named .jpg')
def _(d): (d/'text.jpg').write_text('not an image'); return among(d, d/'text.jpg')

@kind(S, 'web page named .png (a download that failed)')
def _(d): (d/'page.png').write_text('<!doctype html><title>403</title>'); return among(d, d/'page.png')

@kind(S, 'PNG of 1 kB that claims 10 billion pixels')
def _(d):
    assert bomb(d/'bomb.png').stat().st_size<1000
    return among(d, d/'bomb.png')

@kind(S, "image just above Pillow's limit of pixels")
def _(d):
    with patch.object(Image, 'MAX_IMAGE_PIXELS', 60*60-1): return among(d, save(d/'large.png', size=(60,60)))

@kind(S, '1 x 1 pixel')
def _(d): return among(d, save(d/'dot.png', (9,8,7), (1,1)), (9,8,7), (9,8,7))

@kind(S, '1 pixel wide, 10,000 high')
def _(d): return among(d, save(d/'line.png', (9,8,7), (1,10_000)), (9,8,7), (9,8,7))

@kind(S, '10,000 pixels wide, 1 high')
def _(d): return among(d, save(d/'line.png', (9,8,7), (10_000,1)), (9,8,7), (9,8,7))

@kind(S, 'greyscale of 16 bits')
def _(d):
    a = np.zeros((40,40), np.uint16); a[20:] = 65535
    Image.fromarray(a).save(d/'grey.png'); return among(d, d/'grey.png', (0,)*3, white)

@kind(S, 'palette with a transparent colour')
def _(d):
    p = Image.new('P', (40,40), 0); p.putpalette([*red, *green]+[0]*762); p.paste(1, (0,20,40,40))
    p.save(d/'pal.png', transparency=0)
    return among(d, d/'pal.png', white, green) + ', on white'

@kind(S, 'transparent pixels')
def _(d):
    im = solid((*red,0), mode='RGBA'); im.paste((*red,255), (0,20,40,40)); im.save(d/'alpha.png')
    return among(d, d/'alpha.png', white, red) + ', on white'

@kind(S, 'CMYK')
def _(d): solid((0,255,255,0), mode='CMYK').save(d/'cmyk.jpg', quality=95); return among(d, d/'cmyk.jpg', red, red)

@kind(S, 'EXIF rotation')
def _(d):
    im = solid(red); im.paste(blue, (0,20,40,40)); e = Image.Exif(); e[0x0112] = 3; im.save(d/'turned.png', exif=e)
    return among(d, d/'turned.png', blue, red) + ', upright'

@kind(S, 'damaged EXIF block')
def _(d):
    save(d/'exif.jpg', green, exif=b'Exif\0\0MM\0*\xff\xff\xff\xff', quality=95)
    return among(d, d/'exif.jpg', green)

@kind(S, 'TIFF of floats in [0, 1]')
def _(d):
    a = np.zeros((40,40), np.float32); a[20:] = 1
    Image.fromarray(a).save(d/'float.tif'); return among(d, d/'float.tif', (0,)*3, white)

@kind(S, 'TIFF with NaN and infinity')
def _(d):
    a = np.zeros((40,40), np.float32); a[0,0],a[20:] = np.nan,np.inf
    Image.fromarray(a).save(d/'nan.tif'); return among(d, d/'nan.tif', (0,)*3)

@kind(S, 'TIFF of several pages')
def _(d):
    solid(red).save(d/'pages.tif', save_all=True, append_images=[solid(blue)])
    return among(d, d/'pages.tif', red, red) + ', the first page'

def moving(d, ext, **kw):
    f = d/f'moving.{ext}'; solid(red).save(f, save_all=True, append_images=[solid(blue)], duration=100, **kw)
    with Image.open(f) as im: assert im.n_frames==2
    return among(d, f, red, red) + ', the first frame'

@kind(S, 'animated GIF')
def _(d): return moving(d, 'gif')

@kind(S, 'animated WebP')
def _(d): return moving(d, 'webp', lossless=True)

@kind(S, 'animated PNG')
def _(d): return moving(d, 'png')

@kind(S, 'PNG named .jpg')
def _(d): save(d/'x.png').rename(d/'wrong.jpg'); return among(d, d/'wrong.jpg', red, red)

@kind(S, 'extension in capitals')
def _(d): save(d/'X.PNG'); return among(d, d/'X.PNG', red, red)

@kind(S, 'image without an extension')
def _(d): save(d/'x.png').rename(d/'bare'); return among(d, d/'bare', red)

@kind(S, 'something else without an extension')
def _(d): (d/'bare').write_bytes(bytes(99)); return among(d, d/'bare')

@kind(S, 'HEIC, DICOM and the like')
def _(d):
    (d/'phone.heic').write_bytes(b'\0\0\0\x18ftypheic'); save(d/'good.png'); get_dataset(d)
    return 'left out'

@kind(S, 'AVIF and JPEG 2000')
def _(d):
    for ext in 'avif','jp2':
        try: solid().save(d/f'x.{ext}')
        except (KeyError, OSError): pytest.skip('this Pillow cannot write it')
        said = among(d, d/f'x.{ext}', red, red)
    return said + ', where Pillow has the library'

@kind(S, 'grey of 12 bits in a file of 16')
def _(d):
    Image.fromarray(np.linspace(0, 4095, 1600).reshape(40,40).astype(np.uint16)).save(d/'deep.png')
    load_images(get_dataset(d).train, 32)
    return 'nearly black'

@kind(S, 'JPEG with other data after its end')
def _(d):
    f = save(d/'tail.jpg', quality=95); f.write_bytes(f.read_bytes()+b'PK\x03\x04'*99)
    return among(d, f, red, red)

@kind(S, 'PostScript named .jpg, which Pillow would hand to Ghostscript')
def _(d):
    f = d/'program.jpg'; solid().save(f, format='EPS')
    with patch.object(EpsImagePlugin, 'Ghostscript') as gs: said = among(d, f)
    assert not gs.called
    return said

@kind(S, 'named pipe called .jpg, which never ends')
def _(d):
    if not hasattr(os, 'mkfifo'): pytest.skip('no pipes on this system')
    os.mkfifo(d/'pipe.jpg'); assert check_data(d).of('train', 'broken')==[d/'pipe.jpg']
    return among(d, d/'pipe.jpg')

@kind(S, 'file that disappears after it was listed')
def _(d):
    save(d/'a.png'); save(d/'b.png'); items = get_dataset(d); (d/'a.png').unlink()
    (_,good),ws = caught(lambda: load_images(items.train, 32))
    assert good.tolist()==[1] and 'a.png' in ws[0]
    return 'left out, and named in one warning'

@kind(S, 'only files that cannot be read')
def _(d):
    for i in range(3): (d/f'{i}.jpg').write_text('no image')
    load_images(get_dataset(d).train, 32)

# Names

S = 'Names'

@kind(S, 'spaces, quotes, $ and ; in a file name')
def _(d): return among(d, save(d/"""a "b" 'c' $HOME; rm.png"""), red)

@kind(S, 'line break in the name of a broken file')
def _(d):
    (d/'two\nlines.png').touch(); save(d/'a.png')
    _,ws = caught(lambda: load_images(get_dataset(d).train, 32))
    assert '\n' not in ws[0]; return ws[0]

@kind(S, 'letters that are not Latin')
def _(d): return among(d, save(d/'鳥 птица ü.png'), red)

@kind(S, 'name that is no UTF-8')
def _(d):
    try: save(d/'x.png').rename(os.fsdecode(os.fsencode(d)+b'/\xff.png'))
    except OSError: pytest.skip('this file system takes only UTF-8')
    load_images(get_dataset(d).train, 32, cache_dir=d/'cache')
    return among(d, Path(os.fsdecode(os.fsencode(d)+b'/\xff.png')), red)

@kind(S, 'name of 255 bytes')
def _(d): return among(d, save(d/('x'*251+'.png')), red)

@kind(S, 'hidden file (.x.png)')
def _(d): return among(d, save(d/'.x.png'))

@kind(S, '.DS_Store, Thumbs.db, desktop.ini')
def _(d):
    for f in ('.DS_Store','Thumbs.db','desktop.ini'): (d/f).write_bytes(b'\0'*99)
    said = {among(d, d/f) for f in ('.DS_Store','Thumbs.db','desktop.ini')}
    assert len(said)==1; return said.pop()

@kind(S, '._x.jpg and __MACOSX, which macOS packs into archives')
def _(d):
    (d/'__MACOSX').mkdir(); (d/'__MACOSX/x.jpg').write_bytes(b'\0'*99); (d/'._x.jpg').write_bytes(b'\0'*99)
    assert len(get_dataset(cls(d/'c', 'a', 'b')).classes)==2
    for o in (d/'c').rglob('*.png'): o.unlink()
    return among(d, d/'._x.jpg')

@kind(S, 'name of a data set in capitals')
def _(d): assert len(get_dataset('FINCHES', n_train=3, n_test=2, size=32).train)==3; return 'understood'

@kind(S, 'name of a data set with a typing error')
def _(d): get_dataset('cub20')

@kind(S, 'name of a data set without its folder')
def _(d): get_dataset('gtsrb')

# Folders

S = 'Folders'

@kind(S, 'links that lead in a circle')
def _(d):
    cls(d, 'a', 'b'); (d/'a/loop').symlink_to(d, target_is_directory=True); (d/'self').symlink_to(d/'self')
    items,ws = caught(lambda: get_dataset(d)); fs = [os.path.realpath(f) for f in [*items.train,*items.test]]
    assert len(fs)==len(set(fs))==4 and not ws
    return 'each image is taken once'

@kind(S, 'link to nothing')
def _(d): (d/'gone.png').symlink_to(d/'nothing.png'); return among(d, d/'gone.png')

@kind(S, 'link to an image elsewhere')
def _(d):
    (d/'in').mkdir(); (d/'in/link.png').symlink_to(save(d/'else/x.png'))
    return among(d/'in', d/'in/link.png', red, red)

@kind(S, 'folder that may not be read')
def _(d):
    cls(d, 'a', 'b'); (d/'b').chmod(0)
    try:
        with without_rights(d): assert len(get_dataset(d).train)==2
    finally: (d/'b').chmod(0o755)
    return 'left out'

@kind(S, 'file that may not be read')
def _(d):
    save(d/'closed.png').chmod(0); d.chmod(0o777)
    with without_rights(d): return among(d, d/'closed.png')

@kind(S, 'class folder without an image')
def _(d):
    cls(d, 'a', 'b'); (d/'c').mkdir()
    assert get_dataset(d).classes==['a','b']; return 'the other classes are used'

@kind(S, 'one image beside the class folders')
def _(d): cls(d, 'a', 'b', n=9); save(d/'stray.png'); assert not get_dataset(d).labelled; return 'no labels'

@kind(S, 'class in test that train lacks')
def _(d): cls(d/'train', 'a', 'b'); cls(d/'test', 'a', 'c'); assert get_dataset(d).classes==['a','b','c']; return 'used'

@kind(S, 'archive in the folder')
def _(d):
    with zipfile.ZipFile(d/'more.zip', 'w') as z: z.writestr('x.png', b'')
    return among(d, d/'more.zip')

@kind(S, 'archive and nothing else')
def _(d): zipfile.ZipFile(d/'photos.zip', 'w').close(); get_dataset(d)

@kind(S, 'empty folder')
def _(d): get_dataset(d)

@kind(S, 'folder that does not exist')
def _(d): get_dataset(d/'photso')

@kind(S, 'file in place of a folder')
def _(d): get_dataset(save(d/'x.png'))

@kind(S, 'folder whose name ends in .jpg')
def _(d): save(d/'a.jpg/1.png'); items = get_dataset(d); assert len(items.train)==1; return 'a folder like any other'

@kind(S, '60 folders in one another')
def _(d): f = save(d.joinpath(*['x']*60)/'deep.png'); return among(d, f, red)

@kind(S, 'the same image twice, under two labels')
def _(d):
    cls(d, 'a', 'b', n=12); (d/'b/copy.png').write_bytes((d/'a/3.png').read_bytes())
    return '; '.join(check_data(d).findings())

@kind(S, 'the same image in train and test')
def _(d):
    cls(d/'train', 'a', 'b', n=12); picture(d/'test/a/x.png', (0,60,9)); picture(d/'test/b/y.png', (7,7,7))
    return '; '.join(check_data(d).findings())

# Labels

S = 'Labels'

def table(d, *rows, header='file,label'):
    for i in range(4): save(d/f'{i}.png', (i,i,i))
    (d/'labels.csv').write_text('\n'.join([header, *rows])); return d

full = [f'{i}.png,{"ab"[i%2]}' for i in range(4)]

@kind(S, 'class folders and labels.csv')
def _(d): cls(d, 'a', 'b'); (d/'labels.csv').write_text('file,label\na/0.png,b\n'); get_dataset(d)

@kind(S, 'labels.csv that leaves images out')
def _(d): assert not get_dataset(table(d, *full[:3])).labelled; return 'no labels'

@kind(S, 'labels.csv with a file that is not there')
def _(d): assert get_dataset(table(d, *full, 'gone.png,a')).labelled; return 'the others are used'

@kind(S, 'labels.csv with a path that leaves the folder')
def _(d):
    save(d/'secret.png'); items = get_dataset(table(d/'in', *full, '../secret.png,a'))
    assert all(f.parent==d/'in' for f in [*items.train,*items.test]); return 'the file is not read'

@kind(S, 'labels.csv with two labels for one file')
def _(d): get_dataset(table(d, *full, '3.png,a'))

@kind(S, 'labels.csv with an unknown split')
def _(d): get_dataset(table(d, '0.png,a,vali', header='file,label,split'))

@kind(S, 'labels.csv with other columns')
def _(d): get_dataset(table(d, *full, header='name,class'))

@kind(S, 'labels.csv that is not UTF-8')
def _(d): (table(d)/'labels.csv').write_bytes('file,label\n0.png,Bär'.encode('latin1')); get_dataset(d)

@kind(S, 'labels.csv from a spreadsheet: semicolons, byte order mark, \\ between folders')
def _(d):
    for i in range(4): save(d/f'x/y/{i}.png')
    lines = ['file;label', *[f'x\\y\\{i}.png;{"ab"[i%2]}' for i in range(4)]]
    (d/'labels.csv').write_text('\r\n'.join(lines), encoding='utf-8-sig')
    items,ws = caught(lambda: get_dataset(d)); assert items.classes==['a','b'] and not ws; return 'read'

@kind(S, 'ground truth of GTSRB with a class that does not exist')
def _(d):
    save(d/'GTSRB/Training/00000/00000_00000.ppm'); save(d/'GTSRB/Final_Test/Images/00000.ppm')
    write(d/'GT-final_test.csv', 'Filename;ClassId\n00000.ppm;43\n')
    get_dataset('gtsrb', d)

@kind(S, 'ground truth of CUB-200-2011 that is missing')
def _(d): save(d/'CUB_200_2011/images/001.A/1.jpg'); get_dataset('cub200', d)

@kind(S, 'images of a data set missing, its lists complete')
def _(d):
    save(d/'images/001.A/1.jpg'); save(d/'images/001.A/3.jpg')
    write(d/'images.txt', '1 001.A/1.jpg\n2 002.B/2.jpg\n3 001.A/3.jpg\n')
    write(d/'train_test_split.txt', '1 1\n2 0\n3 0\n')
    assert len(get_dataset('cub200', d).train)==1; return 'used'

@kind(S, '.mat file of Stanford Cars that is no .mat file')
def _(d): (d/'cars_annos.mat').write_text('x'); get_dataset('cars', d)

# Too few, and no room

S = 'Few images, and nowhere to write'

def loader(d, n, bs):
    for i in range(n): save(d/f'{i}.png')
    return ssl_dls(get_dataset(d), size=32, bs=bs)

@kind(S, 'one image in all, batches of 1')
def _(d): assert len(loader(d, 1, 1).train)==1; return 'one batch'

@kind(S, '2 images in all, batches of 2')
def _(d): dl = loader(d, 2, 2); assert sorted(dl.one_batch()[1].tolist())==[0,1]; return 'one batch'

@kind(S, 'batch larger than the data set')
def _(d): loader(d, 2, 128)

@kind(S, 'batch larger than what is left without broken files')
def _(d):
    (d/'x.png').touch(); loader(d, 3, 4)

@kind(S, 'batch of 0 images')
def _(d): loader(d, 2, 0)

@kind(S, 'image size of 8 pixels')
def _(d): ssl_dls(get_dataset(save(d/'a.png').parent), size=8, bs=1)

@kind(S, 'cache folder that cannot be written')
def _(d):
    save(d/'a.png')
    with without_rights(d): load_images([d/'a.png'], 32, cache_dir=d/'cache')

@kind(S, 'output folder that cannot be written')
def _(d):
    from fgsynth.runs.report import open_run
    with without_rights(d): open_run(d/'run')

@kind(S, 'disk full while a checkpoint is written')
def _(d):
    from fgsynth.runs.resume import read_checkpoint, write_checkpoint
    write_checkpoint(d, dict(i=1))
    def full(state, f): f.write(b'x'); raise OSError(28, 'No space left on device')
    try:
        with patch('torch.save', full): write_checkpoint(d, dict(i=2))
    finally: assert read_checkpoint(d)==dict(i=1) and [o.name for o in d.iterdir()]==['000001.pt']

@kind(S, 'two runs into one folder at once')
def _(d):
    from fgsynth.files import locked
    with locked(d):
        (d/'.lock.pid').write_text('1234')
        with locked(d): pass

# Downloads

S = 'Downloads'

def fetch(d, members, trusted=True, name='cub200', broken=False):
    "Download an archive of these members in place of the published one; `trusted`: its SHA-256 is the published one"
    archive = b'\x1f\x8b and no more' if broken else packed(members, '.zip' if name=='gtsrb' else '.tgz')
    sha = hashlib.sha256(archive).hexdigest()
    known = [Archive(o.folder, o.url, sha if trusted else o.sha256) for o in DOWNLOADS.get(name, [])]
    def transfer(url, file, *args, **kwargs): Path(file).write_bytes(archive)
    net = dict(_urlretrieve=transfer, _get_redirect_url=lambda url, **kwargs: url)
    with patch.dict(DOWNLOADS, {name:known} if known else {}), patch.multiple('torchvision.datasets.utils', **net):
        try: return get_dataset(name, d/'to', download=True)
        finally: assert all((d/'to') in f.parents for f in d.rglob('evil*')), 'written outside of the folder'

birds = {'CUB_200_2011/images.txt':'1 001.A/a.jpg\n2 002.B/b.jpg\n',
         'CUB_200_2011/train_test_split.txt':'1 1\n2 0\n',
         'CUB_200_2011/images/001.A/a.jpg':'', 'CUB_200_2011/images/002.B/b.jpg':''}

@kind(S, 'wrong checksum')
def _(d): fetch(d, birds, trusted=False)

@kind(S, 'archive that is none')
def _(d): fetch(d, {}, broken=True)

@kind(S, 'tar file with ../ in a name')
def _(d): fetch(d, {**birds, '../evil.txt':'x'})

@kind(S, 'tar file with an absolute path')
def _(d):
    items = fetch(d, {**birds, str(d/'evil.txt'):'x'})
    assert len(items.train)==1; return 'unpacked inside of the folder'

@kind(S, 'tar file with a link that leads out')
def _(d): fetch(d, {'CUB_200_2011':'->..', 'CUB_200_2011/evil.txt':'x'})

@kind(S, 'tar file with a device')
def _(d): fetch(d, {**birds, 'evil':'device'})

@kind(S, 'zip file with ../ in a name')
def _(d):
    signs = {'GTSRB/Training/00000/00000_00000.ppm':'', 'GTSRB/Final_Test/Images/00000.ppm':'',
             'GT-final_test.csv':'Filename;ClassId\n00000.ppm;1\n'}
    items = fetch(d, {**signs, '../evil.txt':'x', str(d/'evil2.txt'):'x'}, name='gtsrb')
    assert len(items.train)==1; return 'unpacked inside of the folder'

@kind(S, 'data set that no program can fetch')
def _(d): fetch(d, {}, name='isic2017')

# The page

def observe(name):
    "What happens with one kind of input, in words"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d).resolve(); d.chmod(0o755)
        with warnings.catch_warnings(record=True) as ws:
            warnings.simplefilter('always')
            try: said = kinds[name][1](d)
            except InputError as e: said = f'refused: “{e}”'
        assert said, f'{name}: no answer'
        notes = [str(w.message) for w in ws if w.category is UserWarning and not said.startswith('read')]
        said = '; '.join([said, *[f'warning: “{o}”' for o in notes]])
        assert '\n' not in said
        said = re.sub(r'failed \((\w+): .*?\): try', r'failed (\1: ...): try', said)  # the rest is Python's own text
        return said.replace(str(d), 'FOLDER').replace(d.name, 'FOLDER').replace('|', r'\|')

def render(answers):
    "Tables in Markdown, one for each section"
    res = []
    for s in dict.fromkeys(s for s,_ in kinds.values()):
        rows = [f'| {k} | {answers[k]} |' for k in kinds if kinds[k][0]==s]
        res += [f'## {s}', '', '| what | answer |', '|---|---|', *rows, '']
    return '\n'.join(res).rstrip()

TABLES = 2 # the cell of the page that holds them

def written():
    "The tables as they stand on the page"
    return ''.join(json.loads(page.read_text(encoding='utf-8'))['cells'][TABLES]['source'])

@pytest.mark.parametrize('name', kinds)
def test_kind(name):
    "What happens is what the page says"
    assert f'| {name} | {observe(name)} |' in written().splitlines()

def test_page_is_complete():
    "The page has a row for each kind, and no other"
    rows = [l for l in written().splitlines() if l.startswith('| ') and l!='| what | answer |']
    assert [l.split(' | ')[0][2:] for l in rows] == list(kinds)

if __name__=='__main__':
    nb = json.loads(page.read_text(encoding='utf-8'))
    nb['cells'][TABLES]['source'] = render({k:observe(k) for k in kinds}).splitlines(True)
    page.write_text(json.dumps(nb, indent=1, ensure_ascii=False)+'\n', encoding='utf-8')
    print(f'{page}: {len(kinds)} kinds')
