"The drawn finches: what they promise, what they refuse, and their cache"
import numpy as np, pytest, torch
from fgsynth.core import InputError
from fgsynth.data import finches as room
from fgsynth.data.brush import Canvas, Uniform, ellipse, grid
from fgsynth.data.drawing import SPECIES, check_drawing, draw_finches
from fgsynth.data.finches import finches

@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    "A folder for the cache, so that the user's own is left alone"
    folder = tmp_path_factory.mktemp('cache')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('FGSYNTH_CACHE', str(folder))
        yield folder
    room._load_or_draw.cache_clear()

@pytest.fixture(scope='module')
def fs(cache): return finches(100, size=32)

def fresh(*args, **kwargs):
    "Images that do not come from memory"
    room._load_or_draw.cache_clear()
    return finches(*args, **kwargs).images

# brush

def test_random_numbers_of_a_row_do_not_depend_on_other_rows():
    a,b = Uniform(3, [5]),Uniform(3, range(40))
    for _ in range(4): assert a(-1, 2).flatten()[0]==b(-1, 2).flatten()[5]

def test_another_seed_gives_other_random_numbers():
    assert not Uniform(3, range(9))().equal(Uniform(4, range(9))())

def test_a_circle_is_an_ellipse():
    x,y = grid(16)
    r = torch.full((1,1,1), .2)
    torch.testing.assert_close(ellipse(x, y, r, r), (x*x+y*y).sqrt()-.2, atol=1e-4, rtol=0)

def test_a_mark_that_is_not_there_belongs_to_the_part_all_the_same():
    canvas = Canvas(torch.zeros(2,3,4,4), torch.ones(2,1,1))
    cover,one = torch.ones(2,4,4),torch.ones(2,3,1,1)
    canvas.mark(cover, torch.tensor([1.,0.])[:,None,None], one, cover, 3)
    assert canvas.image[0].eq(1).all() and canvas.image[1].eq(0).all() and canvas.parts.eq(3).all()

# drawing

def test_drawing_leaves_random_state_and_threads_alone():
    torch.manual_seed(7); np.random.seed(7)
    want,n_threads = (torch.rand(3),np.random.rand(3)),torch.get_num_threads()
    torch.manual_seed(7); np.random.seed(7)
    fresh(10, size=32, seed=9)
    draw_finches([1,2], 32)
    assert torch.rand(3).equal(want[0]) and (np.random.rand(3)==want[1]).all()
    assert torch.get_num_threads()==n_threads

def test_the_data_set_is_what_is_drawn(fs):
    images,masks = draw_finches(fs.labels.tolist(), 32)                      # neither cache is involved
    assert images.equal(fs.images) and masks.equal(fs.masks)

def test_a_bird_does_not_depend_on_its_neighbours_or_on_threads():
    a,b = draw_finches([3], 32, seed=1, index=[37]),draw_finches([3]*40, 32, seed=1)
    assert a[0][0].equal(b[0][37]) and a[1][0].equal(b[1][37])
    n = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert draw_finches([3]*40, 32, seed=1)[0].equal(b[0])
    finally: torch.set_num_threads(n)

@pytest.mark.parametrize('args', [([16],), ([],), ([-1],), ([0],16), ([0,1],64,0,[1]), ([0],64,0,[-1])])
def test_what_cannot_be_drawn_is_refused(args):
    with pytest.raises(InputError): draw_finches(*args)

def test_species_differ_in_two_parts_and_have_two_marks():
    for i,a in enumerate(SPECIES):
        assert a.crown+a.throat+(a.wing>0)+a.tip==2
        for b in SPECIES[:i]: assert sum(x!=y for x,y in zip(a[1:], b[1:]))>=2

# finches

@pytest.mark.parametrize('given,words', [
    (dict(size=31), 'size=31'),
    (dict(n_species=17), '2 to 16'),
    (dict(n_species=1), 'n_species=1'),
    (dict(n=0), 'n=0'),
    (dict(seed=-1), 'seed=-1: give a whole number of 0 or more'),
    (dict(seed=2**63), 'seed='),
    (dict(size='big'), "size='big'"),
    (dict(n=2.5), 'n=2.5'),
    (dict(size=None), 'size=None'),
    (dict(n=float('inf')), 'n=inf'),
])
def test_wrong_numbers_are_named_in_the_sentence(given, words):
    with pytest.raises(InputError) as e: finches(**{'n':8, **given})
    assert words in str(e.value)

def test_whole_numbers_of_any_type_are_taken():
    got = check_drawing(np.int64(8), 32., torch.tensor(2), True)
    assert got==(8, 32, 2, 1) and all(type(o) is int for o in got)

def test_indexing_is_that_of_a_sequence(fs):
    assert fs[-1].image.equal(fs.images[99]) and fs[torch.tensor(2)].label==fs.labels[2].item()
    assert fs[10:20:2].labels.equal(fs.labels[10:20:2]) and fs[[5,3]].images.equal(fs.images[[5,3]])
    assert fs[fs.labels==2].labels.unique().tolist()==[2]
    assert len(list(fs[:3]))==3

@pytest.mark.parametrize('i', [100, -101])
def test_an_index_beyond_the_end_is_an_index_error(fs, i):
    with pytest.raises(IndexError): fs[i]

def test_the_drawing_code_has_the_version_that_caches_are_named_after():
    assert room._cache_file(10, 32, 8, 0).name=='finches-v1-n10-s32-k8-seed0.pt'

# cache

@pytest.fixture
def kept(cache):
    "Ten finches, and the file that keeps them"
    images,file = fresh(10, size=32),room._cache_file(10, 32, 8, 0)
    assert file.exists() and file.parent==cache
    return images,file

def test_kept_finches_are_read_back(kept, monkeypatch):
    monkeypatch.setattr(room, 'draw_finches', None)
    assert fresh(10, size=32).equal(kept[0])

def test_a_cut_file_is_drawn_again_and_repaired(kept):
    images,file = kept
    file.write_bytes(file.read_bytes()[:1000])
    assert fresh(10, size=32).equal(images)
    assert room._read_cache(file, 10, 32, room._shuffled_labels(10, 8, 0))[0].equal(images)

def test_another_file_under_that_name_is_drawn_again(kept):
    images,file = kept
    torch.save(dict(images=images), file)
    assert fresh(10, size=32).equal(images)
    assert not list(file.parent.glob('*.tmp'))

def test_a_folder_that_cannot_be_written_is_done_without(kept, monkeypatch):
    images,file = kept
    monkeypatch.setenv('FGSYNTH_CACHE', str(file/'below_a_file'))
    assert fresh(10, size=32).equal(images)

def test_a_home_folder_is_not_needed(kept, monkeypatch):
    def no_home(): raise RuntimeError('no home')
    monkeypatch.delenv('FGSYNTH_CACHE'); monkeypatch.setattr(room.Path, 'home', no_home)
    assert fresh(10, size=32).equal(kept[0])

def test_a_disk_that_is_full_leaves_nothing_behind(kept, monkeypatch):
    images,file = kept
    file.unlink()
    def full(*args): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    assert fresh(10, size=32).equal(images)
    assert not file.exists() and not list(file.parent.glob(f'{file.name}*'))
