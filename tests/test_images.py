"Image files: every kind of contents, many at once, and the cache of decoded ones"
import os, time, warnings
from concurrent.futures import ThreadPoolExecutor
import numpy as np, pytest, torch
from PIL import Image
from fgsynth.core import InputError
from fgsynth.data import decoded as room
from fgsynth.data.images import decode_image, map_threads, name_some, to_rgb
from fgsynth.data.decoded import load_images

red,green,blue,white = (255,0,0),(0,255,0),(0,0,255),(255,255,255)

def solid(colour, mode='RGB', size=(40,40)): return Image.new(mode, size, colour)
def pixel(t, y, x): return tuple(t[:,y,x].tolist())
def near(a, b, tol=3): return max(abs(x-y) for x,y in zip(a, b))<=tol

def saved(im, file, **kwargs):
    im.save(file, **kwargs)
    return file

def halves(file):
    "A pixel on the left and one on the right of an image decoded at 40 pixels"
    t = decode_image(file, 40)
    return [pixel(t,5,5), pixel(t,5,35)]

# What is in a file

def test_transparent_pixels_are_white_and_half_transparent_ones_are_pale(tmp_path):
    im = solid((*red,0), 'RGBA'); im.paste((*red,128), (0,20,40,40))
    t = decode_image(saved(im, tmp_path/'a.png'), 40)
    assert pixel(t,5,5)==white and pixel(t,35,5)==(255,127,127)

def test_a_palette_may_name_a_transparent_colour(tmp_path):
    p = Image.new('P', (40,40), 0); p.putpalette([*red, *green]+[0]*(3*254)); p.paste(1, (20,0,40,40))
    assert halves(saved(p, tmp_path/'a.png', transparency=0))==[white, green]
    assert halves(saved(p, tmp_path/'a.gif'))==[red, green]

def test_a_plain_png_may_name_a_transparent_colour(tmp_path):
    im = solid(red); im.paste(blue, (0,0,20,40))
    assert halves(saved(im, tmp_path/'a.png', transparency=red))==[blue, white]

def test_grey_may_be_transparent(tmp_path):
    im = solid((90,255), 'LA'); im.paste((90,0), (0,0,20,40))
    assert halves(saved(im, tmp_path/'a.png'))==[white, (90,)*3]

@pytest.mark.parametrize('name', ['g16.png', 'i32.tif', 'f32.tif'])
def test_grey_of_16_and_32_bits_is_brought_to_8(tmp_path, name):
    a = np.zeros((40,40), np.uint16); a[:,10:30] = 32896; a[:,30:] = 65535   # 128*257
    a = dict(g16=a, i32=a.astype(np.int32), f32=(a/65535).astype(np.float32))[name[:3]]
    t = decode_image(saved(Image.fromarray(a), tmp_path/name), 40)
    assert [pixel(t,5,5)[0], pixel(t,5,20), pixel(t,5,35)[0]]==[0, (128,)*3, 255]

def test_floats_beyond_255_are_stretched_and_gaps_are_black():
    a = np.array([[-100., 0., 300., np.nan]], dtype=np.float32)
    assert [to_rgb(Image.fromarray(a)).getpixel((x,0))[0] for x in range(4)]==[0, 64, 255, 0]

def test_grey_of_1_and_8_bits(tmp_path):
    assert near(pixel(decode_image(saved(solid(77, 'L'), tmp_path/'a.jpg'), 32), 3, 3), (77,)*3)
    assert pixel(decode_image(saved(solid(1, '1'), tmp_path/'a.png'), 32), 3, 3)==white

def test_cmyk_without_cyan_and_black_is_red(tmp_path):
    im = solid((0,255,255,0), 'CMYK')
    assert pixel(decode_image(saved(im, tmp_path/'a.tif'), 32), 9, 9)==red
    assert near(pixel(decode_image(saved(im, tmp_path/'a.jpg', quality=95), 32), 9, 9), red) # off by its compression

def test_one_pixel_becomes_a_uniform_square(tmp_path):
    t = decode_image(saved(solid((10,20,30), size=(1,1)), tmp_path/'a.png'), 32)
    assert t.equal(torch.tensor([10,20,30], dtype=torch.uint8)[:,None,None].expand(3,32,32))

def test_a_large_jpeg_keeps_its_halves_where_they_were(tmp_path):
    im = solid(red, size=(1200,900)); im.paste(blue, (0,450,1200,900))
    t = decode_image(saved(im, tmp_path/'a.jpg', quality=95), 48)
    assert near(pixel(t,10,24), red) and near(pixel(t,40,24), blue)

def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(FileNotFoundError): decode_image(tmp_path, 32)

# Many files

@pytest.fixture
def files(tmp_path):
    "Three good images, one of them large, and a broken one"
    folder = tmp_path/'files'; folder.mkdir()
    for i,c in enumerate((red, green)): saved(solid(c), folder/f'{i}.png')
    saved(solid(blue, size=(1200,900)), folder/'large.jpg')
    (folder/'text.jpg').write_text('not an image')
    return sorted(folder.iterdir())

@pytest.mark.parametrize('limit,bad', [(None, ['text.jpg']), (1_000_000, ['large.jpg','text.jpg'])])
def test_one_warning_names_all_unreadable_files(files, monkeypatch, limit, bad):
    if limit: monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', limit)          # large.jpg has 1,080,000
    with pytest.warns(UserWarning) as said: x,good = load_images(files, 32, num_workers=1, progress=False)
    words = str(said[0].message)
    assert len(said)==1 and words.startswith(f'{len(bad)} of 4 ') and all(o in words for o in bad)
    assert [files[i].name for i in good]==[f.name for f in files if f.name not in bad] and len(x)==len(good)

def test_no_readable_image_at_all_is_one_sentence(files):
    with pytest.raises(InputError, match='None of the 2 images can be read'): load_images(files[-1:]*2, 32)

def test_no_images_are_one_sentence():
    with pytest.raises(InputError, match='no images'): load_images([], 32)

def test_tensors_are_cut_and_resized():
    x = torch.randint(0, 255, (4,3,40,60)).byte()
    y,good = load_images(x, 40)
    assert y.equal(x[...,10:50]) and good.tolist()==[0,1,2,3]
    y,_ = load_images(x, 64)
    assert y.shape==(4,3,64,64) and y.dtype==torch.uint8

def test_resizing_keeps_a_uniform_image_and_the_right_size_is_not_copied():
    flat = torch.full((2,3,50,50), 200, dtype=torch.uint8)
    assert load_images(flat, 32)[0].unique().tolist()==[200]
    assert load_images(flat, 50)[0].data_ptr()==flat.data_ptr()

def test_threads_keep_the_order_and_hide_warnings():
    def f(i):
        warnings.warn('of one file')
        return -i
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert map_threads(f, range(50), num_workers=4, progress=True)==[-i for i in range(50)]

def test_an_interruption_drops_what_has_not_begun():
    begun = []
    def f(i):
        begun.append(i)
        if i==1: raise KeyboardInterrupt
        time.sleep(.005)
    with pytest.raises(KeyboardInterrupt): map_threads(f, range(10_000), num_workers=2, progress=False)
    assert len(begun)<10_000

def test_names_are_on_one_line():
    assert name_some(['a','b\n','c','d'])=="a, 'b\\n', c, ..." and name_some(['a'])=='a'

# The cache

@pytest.fixture
def one(tmp_path): return saved(solid('red'), tmp_path/'one.png')

@pytest.fixture
def box(tmp_path):
    folder = tmp_path/'box'; folder.mkdir()
    return folder

def test_another_picture_under_the_same_name_is_decoded_again(one, box):
    first = load_images([one], 32, cache_dir=box)[0].clone()
    solid('blue').save(one); os.utime(one, (1,1))
    assert not load_images([one], 32, cache_dir=box)[0].equal(first)

def test_a_change_of_the_images_stays_in_this_process(one, box):
    load_images([one], 32, cache_dir=box)[0].zero_()
    assert load_images([one], 32, cache_dir=box)[0].any()

def test_a_cache_that_is_too_short_is_decoded_again(one, box):
    want = load_images([one], 32, cache_dir=box)[0].clone()
    file = next(box.glob('*.u8')); file.write_bytes(file.read_bytes()[:100])
    assert load_images([one], 32, cache_dir=box)[0].equal(want)

def test_of_two_that_want_the_same_one_decodes(one, box, monkeypatch):
    opened,pil_open = [],Image.open
    def slowly(f, **kwargs): opened.append(f); time.sleep(.3); return pil_open(f, **kwargs)
    monkeypatch.setattr(Image, 'open', slowly)
    with ThreadPoolExecutor(2) as pool: a,b = pool.map(lambda _: load_images([one], 56, cache_dir=box)[0], range(2))
    assert a.equal(b) and len(opened)==1

@pytest.mark.skipif(not hasattr(os, 'posix_fallocate'), reason='the disk is asked in another way')
def test_a_full_disk_is_one_sentence(one, box, monkeypatch):
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full)
    with pytest.raises(InputError, match='No space left'): load_images([one], 48, cache_dir=box)
    assert not list(box.iterdir())

def test_an_interruption_leaves_nothing_half_written(one, box, monkeypatch):
    def interrupted(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(Image, 'open', interrupted)
    with pytest.raises(KeyboardInterrupt): load_images([one], 48, cache_dir=box, progress=True)
    assert not list(box.iterdir())

def test_broken_files_leave_nothing_half_written(tmp_path, box):
    (tmp_path/'text.jpg').write_text('no image')
    with pytest.raises(InputError, match='can be read'): load_images([tmp_path/'text.jpg'], 48, cache_dir=box)
    assert not list(box.iterdir())

def test_a_cache_that_is_no_folder_is_one_sentence(one):
    with pytest.raises(InputError, match='cache_dir'): load_images([one], 48, cache_dir=one)

def test_where_there_are_no_locks_each_decodes_for_itself(one, box, monkeypatch):
    def no_locks(self): raise NotImplementedError
    monkeypatch.setattr(room.FileLock, 'acquire', no_locks)
    assert len(load_images([one], 48, cache_dir=box)[0])==1
