"What is said about a data set, by `check_data` and by the command fgsynth_data"
import io, shutil, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from conftest import call
from fgsynth.data.check import check_data
from fgsynth.data.datasets import data_sets, get_dataset
from fgsynth.data.finches import finches
from tiny import red, save, solid, write

def picture(bird): return Image.fromarray(bird.image.permute(1,2,0).numpy())

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder in which everything is wrong that can be wrong"
    d = tmp_path_factory.mktemp('bad')
    def square(file, c, size=(40,50)):
        im = solid((c,c//2,0), size); im.paste('white', (0,0,20,20))
        (d/file).parent.mkdir(parents=True, exist_ok=True); im.save(d/file)
    for i in range(12): square(f'train/cat/{i}.png', i); square(f'train/dog/{i}.png', 100+i, (60,30))
    for i in range(4): square(f'test/cat/{i}.png', 50+i); square(f'test/dog/{i}.png', 150+i)
    write(d/'train/cat/broken.jpg', 'no image')
    shutil.copy(d/'train/cat/0.png', d/'train/cat/again.png')   # twice
    shutil.copy(d/'train/cat/1.png', d/'train/dog/also.png')    # two labels
    shutil.copy(d/'train/dog/2.png', d/'test/dog/leak.png')     # in both splits
    return d

@pytest.fixture(scope='module')
def check(folder): return check_data(folder, small=14)

@pytest.fixture
def flat(folder, tmp_path):
    "Twelve cats without a label and without fault"
    shutil.copytree(folder/'train/cat', tmp_path/'flat', ignore=shutil.ignore_patterns('broken*', 'again*'))
    return tmp_path/'flat'

def names(check, groups): return [[Path(check.images[s][i]).name for s,i in g] for g in groups]

def test_equal_images_are_found(check):
    assert names(check, check.leaks)==[['2.png','leak.png']]
    assert names(check, check.contradictions)==[['1.png','also.png']]
    assert (check.repeats('train'), check.repeats('test'))==(2,0)

def test_broken_files_and_small_classes_are_found(check):
    assert [f.name for f in check.of('train', 'broken')]==['broken.jpg']; assert check.of('test', 'broken')==[]
    assert check.small_classes==[('dog',13)]

def test_table_counts(check):
    t = check.table()
    assert t.loc['images'].tolist()==['27','9']; assert t.loc['readable'].tolist()==['26','9']
    assert t.loc['width: smallest / median / largest'].tolist()==['40 / 40 / 60','40 / 40 / 60']
    assert t.loc['kinds'].tolist()==['PNG RGB']*2
    assert t.loc['images that the other split has too'].tolist()==['1','1']

def test_each_fault_is_one_finding(check): assert len(check.findings())==5

def test_nothing_is_found_where_nothing_is_wrong(flat):
    check = check_data(flat)
    assert str(check).endswith('Nothing to complain about.')
    assert (check.contradictions, check.small_classes, check.table().loc['classes','train'])==([], [], '-')

def test_images_in_memory_are_compared(folder):
    items = get_dataset('finches', n_train=60, n_test=20, size=32)
    items.test[3] = items.train[7]; check = check_data(items)
    assert check.leaks==[[('train',7),('test',3)]]
    assert len(check.contradictions)==int(items.train_labels[7]!=items.test_labels[3])

def as_exif(im, f): # lying on its side, with a flag that says so
    turned = Image.Exif(); turned[0x0112] = 6
    im.rotate(90, expand=True).save(f.with_suffix('.png'), exif=turned)
    return f.with_suffix('.png')

def as_text(im, f):
    info = PngInfo(); info.add_text('Comment', 'another one')
    im.save(f.with_suffix('.png'), pnginfo=info, compress_level=1)
    return f.with_suffix('.png')

def as_format(suffix, mode='RGB', **kw):
    def save(im, f): im.convert(mode).save(f.with_suffix(suffix), **kw); return f.with_suffix(suffix)
    return save

def as_jpeg(im, f): # the coefficients of a.jpg and a comment
    im.save(f.parent.parent/'train/a.jpg'); data = (f.parent.parent/'train/a.jpg').read_bytes()
    f.with_suffix('.jpg').write_bytes(data[:2] + b'\xff\xfe\0\x06seen' + data[2:])
    return f.with_suffix('.jpg')

copies = dict(comment=as_text, orientation=as_exif, jpeg=as_jpeg, bmp=as_format('.bmp'), tiff=as_format('.tif'),
              ppm=as_format('.ppm'), webp=as_format('.webp', lossless=True), alpha=as_format('.png', 'RGBA'))

@pytest.mark.parametrize('how', copies)
def test_the_same_pixels_are_found_whatever_else_is_in_the_file(tmp_path, how):
    birds = [picture(b) for b in finches(6, 40, n_species=2, seed=5)]
    for i,im in enumerate(birds):
        d = tmp_path/('train' if i<3 else 'test'); d.mkdir(exist_ok=True); im.save(d/f'{i}.png')
    copy = copies[how](birds[0], tmp_path/'test/copy')
    check = check_data(tmp_path)
    assert names(check, check.leaks)==[['a.jpg' if how=='jpeg' else '0.png', copy.name]]

def test_other_pixels_are_not_the_same(tmp_path):
    "One pixel, the last bit of 16, or another shape of the same bytes"
    a = np.arange(1600, dtype=np.uint16).reshape(40, 40)*40
    pairs = {'pixel':(a.astype(np.uint8), np.where(np.arange(1600).reshape(40, 40)==77, 9, a.astype(np.uint8))),
             'bit':(a, a^1), 'shape':(a.astype(np.uint8), a.astype(np.uint8).reshape(20, 80))}
    for k,(b,c) in pairs.items():
        for f,o in (('b',b), ('c',c)):
            (tmp_path/k).mkdir(exist_ok=True); Image.fromarray(o.astype(b.dtype)).save(tmp_path/f'{k}/{f}.png')
        assert check_data(tmp_path/k).same==[], k

def test_many_equal_images_are_gone_through_once(flat):
    "Groups are not looked for among groups"
    check,compared = check_data(flat),[]
    class Group(list):
        def __eq__(self, other): compared.append(1); return list.__eq__(self, other)
    check.same = [Group([('train',i), ('train',i+1)]) for i in range(0, 10, 2)] + [Group([('train',10), ('test',0)])]
    check.images['test'] = check.images['train'][:1]
    assert '5 images found more than once in one split' in ' '.join(check.findings()) and compared==[]

def test_odd_names_are_spelt_out(tmp_path):
    for s,n in (('train','a'), ('test','b')):
        try: save(tmp_path/s/f'{n}\udce4.png', red)
        except OSError: pytest.skip('this file system takes only names in UTF-8')
    for i in range(3): save(tmp_path/f'train/{i}.png', (0,i,i))
    str(check_data(tmp_path)).encode('utf-8')

def test_a_report_on_a_terminal_without_the_letters(tmp_path, monkeypatch):
    for c in '猫','犬':
        for i in range(3): save(tmp_path/f'photos/{c}/{i}.png', (ord(c)%255,i,9))
    with monkeypatch.context() as m:
        m.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding='cp1252', errors='strict'))
        call(m, 'fgsynth_data', 'check', tmp_path/'photos')
        sys.stdout.flush(); said = sys.stdout.buffer.getvalue()
    assert b'\\u732b' in said

def test_split_without_images_is_counted():
    items = get_dataset('finches', n_train=60, n_test=20, size=32)
    items.train = items.train[:0]; items.train_labels = items.train_labels[:0]
    assert check_data(items).table().loc['images'].tolist()==['0','20']

def test_file_that_disappeared_is_found(flat):
    items = get_dataset(flat); items.train[0].unlink()
    assert '1 train image not found' in str(check_data(items))

def test_command_check_prints_the_report(flat, monkeypatch, capsys):
    call(monkeypatch, 'fgsynth_data', 'check', flat)
    assert capsys.readouterr().out==f'{check_data(flat)}\n'

def test_command_list_names_all_data_sets(monkeypatch, capsys):
    call(monkeypatch, 'fgsynth_data', 'list')
    lines = capsys.readouterr().out.splitlines()
    assert [l.split()[0] for l in lines]==list(data_sets)
    assert '5,994 / 5,794' in next(l for l in lines if l.startswith('cub200'))

@pytest.mark.parametrize('args,words', [
    (('check','gtrsb'), "did you mean 'gtsrb"), (('check','gtsrb','{}'), 'GTSRB/Training'),
    (('download','cars','{}/c'), 'jessicali9530'), (('check','{}/none'), 'does not exist')])
def test_command_says_in_one_sentence_what_is_wrong(flat, monkeypatch, args, words):
    with pytest.raises(SystemExit, match=words): call(monkeypatch, 'fgsynth_data', *[o.format(flat) for o in args])
