"Which files are images, why one cannot be read, what is passed over, and images that are nearly black or constant"
import io, re, sys, types
import numpy as np, pytest, torch
from PIL import EpsImagePlugin, Image
from fgsynth.core import InputError
from fgsynth.data import formats
from fgsynth.data.check import check_data
from fgsynth.data.datasets import get_dataset
from fgsynth.data.folders import find_images, list_images
from fgsynth.data.formats import holds_image, image_suffixes
from fgsynth.data.images import why_unreadable
from fgsynth.data.decoded import load_images, warn_if_dark
from tiny import blue, caught, green, red, save, solid, write

def halves(size=(60,40)):
    "Red above, blue below"
    im = solid(red, size); im.paste(blue, (0, size[1]//2, *size))
    return im

def check(folder): return check_data(folder).findings()

# What is read

kinds = [('avif','AVIF',{}), ('jp2','JPEG2000',{}), ('j2k','JPEG2000',{}), ('tga','TGA',{}), ('pcx','PCX',{}),
         ('sgi','SGI',{}), ('qoi','QOI',{}), ('dib','DIB',{}), ('dds','DDS',{}), ('mpo','MPO',{}), ('webp','WEBP',{}),
         ('tiff','TIFF',{}), ('bmp','BMP',{}), ('ppm','PPM',{}), ('jfif','JPEG',{})]

@pytest.mark.parametrize('suffix,fmt,kw', kinds)
def test_what_pillow_decodes_is_read(tmp_path, suffix, fmt, kw):
    if fmt not in Image.SAVE and fmt not in Image.SAVE_ALL: pytest.skip(f'this Pillow cannot write {fmt}')
    try: halves().save(tmp_path/f'x.{suffix.upper()}', format=fmt, **kw)
    except (OSError, KeyError): pytest.skip(f'this Pillow cannot write {fmt}')
    items,said = caught(lambda: get_dataset(tmp_path))
    (x,_),also = caught(lambda: load_images(items.train, 32))
    near = [(x[0,:,y,16].int()-torch.tensor(c)).abs().max()<25 for y,c in ((4,red), (28,blue))]
    assert all(near) and not said+also

@pytest.mark.parametrize('fmt', ['png','jpeg','gif','webp','tiff','bmp','ppm'])
def test_a_file_without_an_extension_is_known_by_its_contents(tmp_path, fmt):
    halves().save(tmp_path/'IMG_0001', format=fmt); save(tmp_path/'b.png'); write(tmp_path/'README', 'Two pictures')
    items,said = caught(lambda: get_dataset(tmp_path))
    assert [f.name for f in items.train]==['IMG_0001','b.png'] and not said

@pytest.mark.parametrize('suffix', ['.eps','.ps','.pdf','.wmf','.ico','.h5','.mpg'])
def test_no_format_is_read_that_starts_a_program_or_holds_no_photo(suffix): assert suffix not in image_suffixes

def test_postscript_is_never_run_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *a, **k: pytest.fail('Ghostscript was called'))
    for name in 'a.jpg','bare','c.eps': solid().save(tmp_path/name, format='EPS')
    save(tmp_path/'z.png')
    items,(said,) = caught(lambda: get_dataset(tmp_path))
    assert [f.name for f in items.train]==['a.jpg','z.png'] and '1 .eps' in said and '(bare)' in said
    assert why_unreadable(tmp_path/'a.jpg')=='PostScript' and not holds_image(tmp_path/'bare')
    assert any('PostScript' in o for o in check(tmp_path))

def test_heic_is_read_once_pillow_heif_is_there(tmp_path, monkeypatch):
    "A plug-in with that name registers its format, as the real one does"
    for name in 'OPEN','EXTENSION': monkeypatch.setattr(Image, name, dict(getattr(Image, name)))
    monkeypatch.setattr(Image, 'ID', list(Image.ID))
    def register():
        def opened(f, name): return Image.open(io.BytesIO(f.read()[12:]))
        Image.register_open('HEIF', opened, lambda head: head[4:12]==b'ftypheic')
        Image.register_extensions('HEIF', ['.heic','.heif'])
    monkeypatch.setitem(sys.modules, 'pillow_heif', types.SimpleNamespace(register_heif_opener=register))
    source = open(formats.__file__).read(); there = {'__name__':'fgsynth.data.again', '__package__':'fgsynth.data'}
    exec(compile(source, formats.__file__, 'exec'), there)
    b = io.BytesIO(); halves().save(b, 'png'); (tmp_path/'phone').write_bytes(b'\0\0\0\x18ftypheic'+b.getvalue())
    assert '.heic' in there['image_suffixes'] and there['holds_image'](tmp_path/'phone')

# What is passed over

unread = ['a.heic','b.dcm','c.svg','d.nef','e.exr','f.jxl','g.npy','h.jpg_large','i.mp4','j.zip','bare']

@pytest.mark.parametrize('name', unread)
def test_a_file_that_may_be_an_image_is_named(tmp_path, name):
    save(tmp_path/'good.png'); (tmp_path/'sub').mkdir(); (tmp_path/'sub'/name).write_bytes(b'\1\2\3\0')
    _,(said,) = caught(lambda: get_dataset(tmp_path))
    assert said.startswith('1 file in ') and name in said and '\n' not in said
    assert said in check(tmp_path) and ('pillow-heif' in said)==(name=='a.heic')

def test_files_passed_over_are_counted_by_kind(tmp_path):
    save(tmp_path/'good.png')
    for i in range(12): (tmp_path/f'{i:02}.HEIC').touch()
    for i in range(2): (tmp_path/f'{i}.dcm').touch()
    _,(said,) = caught(lambda: find_images(tmp_path))
    assert said.startswith('14 files') and '12 .heic (00.HEIC, 01.HEIC, ...); 2 .dcm (0.dcm, 1.dcm)' in said

@pytest.mark.parametrize('name', ['labels.csv','README','LICENSE','notes.txt','meta.json',
                                  'Thumbs.db','.DS_Store','x.xml'])
def test_what_accompanies_images_is_not_named(tmp_path, name):
    save(tmp_path/'good.png'); (tmp_path/name).write_text('file,label\ngood.png,a\n')
    assert caught(lambda: get_dataset(tmp_path))[1]==[]

def test_a_cache_among_the_images_is_not_named(tmp_path):
    save(tmp_path/'good.png'); load_images([tmp_path/'good.png'], 32, cache_dir=tmp_path/'cache')
    assert caught(lambda: get_dataset(tmp_path))[1]==[]

def test_a_folder_of_nothing_else_says_what_is_there(tmp_path):
    (tmp_path/'a.heic').touch(); (tmp_path/'b.heic').touch()
    with pytest.raises(InputError, match=r'only 2 \.heic \(a\.heic, b\.heic\)'): find_images(tmp_path)

def test_a_list_alone_warns_of_nothing(tmp_path):
    save(tmp_path/'good.png'); (tmp_path/'a.heic').touch()
    assert caught(lambda: list_images(tmp_path))[1]==[]

# Why a file cannot be read

def cut(data, n): return data[:len(data)-n]

def damaged(d):
    "Files that cannot be read, and the reason for each"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90,90,3), dtype=np.uint8))
    res = {}
    def add(name, data, why): (d/name).write_bytes(data); res[name] = why
    for fmt in 'jpeg','png','tiff','bmp','gif','webp','jpeg2000':
        b = io.BytesIO(); noise.save(b, fmt)
        add(f'half.{fmt}.jpg', cut(b.getvalue(), len(b.getvalue())//2), 'cut off|damaged')
        add(f'head.{fmt}.jpg', b.getvalue()[:20], 'cut off|damaged')
    add('empty.png', b'', '^empty$'); add('text.jpg', b'a note\n', '^text$')
    add('page.png', b'<!DOCTYPE html><title>403', '^a web page$')
    add('a.tif', b'%!PS-Adobe-3.0 EPSF-3.0', '^PostScript$'); add('b.jpg', b'PK\3\4'+bytes(99), '^an archive$')
    add('c.jpg', bytes(128)+b'DICM'+bytes(99), '^DICOM$'); add('d.jpg', b'\0\0\0\x18ftypheic'+bytes(99), '^HEIC')
    add('e.jpg', b'version https://git-lfs.github.com/spec/v1\noid', 'Git LFS'); add('f.jpg', bytes(300), '^no image$')
    return res

def test_each_file_has_its_reason(tmp_path):
    for name,why in damaged(tmp_path).items():
        said = why_unreadable(tmp_path/name)
        assert said and re.search(why, said), (name, said)
        assert '\n' not in said and str(tmp_path) not in said
    save(tmp_path/'good.png'); (tmp_path/'folder.jpg').mkdir()
    assert [why_unreadable(tmp_path/o) for o in ('good.png','folder.jpg','gone.jpg')]==['','not a file','not found']

def test_a_large_image_is_told_the_limit(tmp_path, monkeypatch):
    f = save(tmp_path/'7 pixels wide.jpg', size=(140,70))
    for limit in 9_000,3_000: # Pillow itself refuses from twice the limit on
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)
        assert why_unreadable(f)==f'9,800 pixels, the limit PIL.Image.MAX_IMAGE_PIXELS is {limit:,}'

def test_a_closed_file_says_so(tmp_path, monkeypatch):
    def closed(*args, **kwargs): raise PermissionError(13, 'Permission denied')
    save(tmp_path/'a.png'); monkeypatch.setattr(Image, 'open', closed)
    assert why_unreadable(tmp_path/'a.png')=='Permission denied'

def test_reasons_are_in_the_warning_in_the_check_and_in_the_refusal(tmp_path):
    write(tmp_path/'a.jpg', ''); write(tmp_path/'b.jpg', 'a note'); write(tmp_path/'c.jpg', 'another')
    with pytest.raises(InputError, match=r'a\.jpg: empty\)'): load_images([tmp_path/'a.jpg'], 32)
    save(tmp_path/'good.png')
    _,(said,) = caught(lambda: load_images(list_images(tmp_path), 32))
    assert 'a.jpg (empty)' in said and 'b.jpg (text)' in said
    assert '3 train images cannot be read, left out: 2 text (b.jpg, c.jpg); 1 empty (a.jpg)' in check(tmp_path)

def test_nothing_of_a_damaged_image_gets_into_the_sentence_but_one_line(tmp_path, monkeypatch):
    def broken(*args, **kwargs): raise ValueError('first\nsecond')
    save(tmp_path/'a.png'); monkeypatch.setattr(Image, 'open', broken)
    assert why_unreadable(tmp_path/'a.png')=='damaged: first'

# Too dark, too constant

def ramp(bits, dtype): return (np.arange(64*64).reshape(64,64)*(2**bits-1)//(64*64-1)).astype(dtype)

@pytest.mark.parametrize('name,bits,dtype', [('a.png',12,np.uint16), ('a.tif',12,np.uint16), ('a.png',10,np.uint16),
    ('a.tif',14,np.uint16), ('a.tif',12,np.int32), ('a.png',4,np.uint8), ('a.png',1,np.uint8)])
def test_fewer_bits_than_the_file_has_room_for_are_warned_of(tmp_path, name, bits, dtype):
    for i in range(3): Image.fromarray(ramp(bits, dtype)).save(tmp_path/f'{i}{name}')
    (x,_),(said,) = caught(lambda: load_images(list_images(tmp_path), 32))
    assert said.startswith('3 of 3 ') and f'{x.max()} of 255' in said and f'0{name}' in said

@pytest.mark.parametrize('name,dtype', [('a.png',np.uint16), ('a.tif',np.uint16), ('a.tif',np.int32)])
def test_sixteen_bits_that_fill_the_file_are_not(tmp_path, name, dtype):
    Image.fromarray(ramp(16, dtype)).save(tmp_path/name)
    (x,_),said = caught(lambda: load_images(list_images(tmp_path), 32))
    assert not said and x.max()>250

def test_images_in_memory_that_were_made_bytes_without_255_are_warned_of():
    _,(said,) = caught(lambda: load_images((torch.rand(20,3,32,32)).byte(), 32))
    assert said.startswith('20 of 20 ') and 'number 0' in said

def test_a_dark_picture_among_others_is_nothing_to_warn_of(tmp_path):
    for i in range(9): save(tmp_path/f'{i}.png', green if i else (9,9,9))
    assert caught(lambda: load_images(list_images(tmp_path), 32))[1]==[]

def test_no_more_than_a_sample_is_looked_at():
    x,asked = torch.zeros(5000,3,4,4, dtype=torch.uint8),[]
    _,(said,) = caught(lambda: warn_if_dark(x, lambda i: asked.append(i) or f'image {i}'))
    assert said.startswith('256 of 256 ') and len(asked)<=256

def test_nearly_constant_images_are_found(tmp_path):
    Image.fromarray(ramp(12, np.uint16)).save(tmp_path/'deep.png'); save(tmp_path/'blank.png', (200,200,200))
    save(tmp_path/'red.png'); halves().save(tmp_path/'good.png')
    Image.fromarray(ramp(8, np.uint8)).save(tmp_path/'grey.png')
    found = check_data(tmp_path)
    assert sorted(found.images['train'][i].name for i in found.flat('train'))==['blank.png','deep.png','red.png']
    assert any(o.startswith('3 train images are nearly constant') for o in found.findings())
    assert found.table().loc['nearly constant','train']=='3'

def test_nearly_constant_images_in_memory_are_found():
    items = get_dataset('finches', n_train=30, n_test=10, size=32); items.train[7] = 99
    assert check_data(items).flat('train')==[7]
