"Labels at the door: every function that takes them refuses those that count no class, in one sentence"
import sys
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from fastai.torch_core import TensorCategory
from fastcore.foundation import L
from fgsynth.core import InputError
from fgsynth.data.check import check_data
from fgsynth.data.drawing import draw_finches
from fgsynth.data.items import Items, check_labels, choose_per_class, hold_out, label_fraction, sample_items
from fgsynth.data.layouts import split_items
from fgsynth.data.loaders import labelled_dls
from fgsynth.evaluate.features import check_features, labelled_split
from fgsynth.evaluate.measures import search_scores
from fgsynth.evaluate.probe import fit_probe, probe_features, top_k
from fgsynth.evaluate.retrieval import ClassSorted, knn, neighbour_vote, retrieval
from fgsynth.evaluate.shake import shake_kinds
from fgsynth.own.label import cross_validate, fit_temperature
from fgsynth.synth.controls import ClassNoise

n,C = 12,3
y = torch.arange(n)%C
z = F.normalize(torch.randn(n, 5, generator=torch.Generator().manual_seed(0)), dim=1)
x = torch.zeros(n,3,32,32).byte()
logits = torch.eye(C)[y]
names = list('abc')
def items(y): return Items('squares', x, x, torch.arange(n)%C, y, names)
def given_late(y):
    "Items whose labels are set afterwards"
    late = items(None); late.train_labels = y; late.test_labels = y; return late
def noise(y):
    cb = ClassNoise(); cb.learn = SimpleNamespace(synth=None, dls=SimpleNamespace(items=given_late(y), device='cpu'))
    cb.before_fit()

one = torch.full((1,5), .5)
uses = dict( # those that know how many classes there are
    items_train=lambda y: Items('squares', x, x, y, None, names), items_test=items,
    split_items=lambda y: split_items('squares', L(range(n)), y, torch.arange(2), names),
    label_fraction=lambda y: label_fraction(given_late(y), .5), hold_out=lambda y: hold_out(given_late(y), .5),
    sample_items=lambda y: sample_items(given_late(y), 6, 6, 0, 'few'),
    labelled_dls=lambda y: labelled_dls(given_late(y), 32, 4),
    labelled_split=lambda y: labelled_split(given_late(y), 'test', 32), noise=noise,
    check_data=lambda y: check_data(given_late(y)),
    fit_probe=lambda y: fit_probe(z, y, C, epochs=1), top_k=lambda y: top_k(logits, y),
    probe_features=lambda y: probe_features(z, y, z, torch.arange(n)%C, n_classes=C, epochs=1),
    probe_test=lambda y: probe_features(z, torch.arange(n)%C, z, y, n_classes=C, epochs=1),
    neighbour_vote=lambda y: neighbour_vote(z, z, y, C, 3, .1),
    cross_validate=lambda y: cross_validate(z, y, C, folds=2, repeats=1),
    fit_temperature=lambda y: fit_temperature(logits, y), draw_finches=lambda y: draw_finches(y, 32))
open_uses = dict( # and those that count them
    choose_per_class=lambda y: choose_per_class(y, lambda n: 1, 0), check_features=lambda y: check_features(z, y),
    retrieval=lambda y: retrieval(z, y), gallery=lambda y: retrieval(z, torch.arange(n)%C, z, y),
    class_sorted=lambda y: ClassSorted(z, y, 'cpu'), knn_train=lambda y: knn(z, y, z, torch.arange(n)%C),
    knn_test=lambda y: knn(z, torch.arange(n)%C, z, y), probe=lambda y: fit_probe(z, y, epochs=1),
    search_scores=lambda y: search_scores(z, y, z, torch.arange(n)%C),
    shake=lambda y: shake_kinds(z, y, {}, z.std(0), z, torch.arange(n)%C),
    shake_bank=lambda y: shake_kinds(z, torch.arange(n)%C, {}, z.std(0), z, y))
all_uses = {**uses, **open_uses}

def with_one(value): return torch.cat([y[:-1].to(torch.tensor(value).dtype), torch.tensor([value])])

wrong = {'unlabelled (-1)':with_one(-1), 'a half':with_one(1.5), 'NaN':with_one(float('nan')),
         'infinity':with_one(float('inf')),
         'names':[names[i] for i in y], 'nothing':[None]*n, 'one number':7, 'one-hot':np.eye(C)[y],
         'a column':y[:,None],
         'complex':y+0j, 'a set of sets':[{1}]*n, 'ragged':[[0]]*(n-1)+[[0,1]], 'ignored (-100)':[0,-100]*(n//2)}

@pytest.mark.parametrize('what', wrong)
@pytest.mark.parametrize('use', all_uses)
def test_wrong_labels_are_one_sentence(use, what):
    if (use, what)==('draw_finches','a column'): pytest.skip('single numbers are numbers')
    with pytest.raises(InputError) as e: all_uses[use](wrong[what])
    said = str(e.value)
    assert '\n' not in said and said.endswith('.') and ('label' in said or 'species' in said), said

@pytest.mark.parametrize('use', uses)
def test_labels_beyond_the_classes_are_one_sentence(use):
    high = 16 if use=='draw_finches' else C
    with pytest.raises(InputError, match='go up to|Species are numbered'): uses[use](with_one(high))

@pytest.mark.parametrize('use', [o for o in all_uses if o not in ('choose_per_class','probe','draw_finches')])
def test_labels_that_are_too_few_are_one_sentence(use):
    with pytest.raises(InputError, match='shape|should be'): all_uses[use](y[:-1])

forms = {'list':y.tolist(), 'tuple':tuple(y.tolist()), 'L':L(y.tolist()), 'list of tensors':list(y),
         'int32':y.int(), 'uint8':y.byte(),
         'float':y.float(), 'TensorCategory':TensorCategory(y), 'array':y.numpy(), 'big-endian':y.numpy().astype('>i2'),
         'uint16':y.numpy().astype(np.uint16), 'series':pd.Series(y.tolist()),
         'float array':y.numpy().astype(np.float16)}

def plain(o):
    "A result as text, without what depends on where an object lies"
    if isinstance(o, Items): return str(o), str(o.train_labels), str(o.test_labels)
    if isinstance(o, ClassSorted): return str((o.y, o.z))
    if hasattr(o, 'train_ds'): return str((o.train_ds.y, o.valid_ds.y))
    return str(o.state_dict()) if hasattr(o, 'state_dict') else str(o)

@pytest.mark.parametrize('form', [o for o in forms if o!='float'])
@pytest.mark.parametrize('use', all_uses)
def test_any_form_of_right_labels_gives_the_same(use, form):
    if use=='draw_finches' and 'float' in form: pytest.skip('whole numbers only')
    def run(y): torch.manual_seed(0); return plain(all_uses[use](y))
    assert run(forms[form])==run(y)

def test_checked_labels_are_int64_and_plain():
    for o in [*forms.values(), y.bool(), []]:
        got = check_labels(o)
        assert type(got)==torch.Tensor and got.dtype==torch.int64 and got.tolist()==[int(i) for i in o]

def test_classes_without_names_are_called_by_their_numbers():
    assert Items('s', x, x, [0,4]*6, [5]*n).classes==list('012345')
    assert Items('s', x, x, [0,1]*6, None, range(2)).classes==['0','1']

def test_test_images_without_labels_are_no_validation():
    dls = labelled_dls(Items('s', x, x, y, None, names), 32, 4)
    assert (len(dls.train_ds), len(dls.valid_ds), dls.c)==(n, 0, C)

def test_a_check_counts_labels_where_there_are_some():
    for a,b in ((y,None), (None,y)): assert 'squares' in str(check_data(Items('squares', x, x, a, b, names)))

def test_groups_are_one_for_each_image():
    with pytest.raises(InputError, match='3 groups for 12'): hold_out(items(y), .5, groups=[1,2,3])

def test_chosen_images_are_those_of_a_loop_over_the_classes():
    "Independent of how the classes are gone through, image by image"
    def loop(labels, how_many, seed):
        g,chosen = torch.Generator().manual_seed(seed),[]
        for c in sorted(set(labels.tolist())):
            ix = [i for i,o in enumerate(labels.tolist()) if o==c]
            chosen += [ix[i] for i in torch.randperm(len(ix), generator=g)[:how_many(len(ix))]]
        return sorted(chosen)
    for seed in range(5):
        labels = torch.randint(0, 9, (100,), generator=torch.Generator().manual_seed(seed))
        assert choose_per_class(labels, lambda n: n//2, seed).tolist()==loop(labels, lambda n: n//2, seed)

def calls_of(function, f):
    "How often `f()` calls a built-in function"
    count = []
    def look(frame, event, arg): event=='c_call' and getattr(arg, '__qualname__', '')==function and count.append(1)
    sys.setprofile(look)
    try: f()
    finally: sys.setprofile(None)
    return len(count)

def test_many_classes_are_numbered_without_a_search_in_their_list(tmp_path):
    from fgsynth.data.datasets import get_dataset
    from tiny import save, write
    for c in range(30): save(tmp_path/f'folders/{c:02}/1.png'); save(tmp_path/f'table/{c:02}.png')
    write(tmp_path/'table/labels.csv', 'file,label\n'+''.join(f'{c:02}.png,{c}\n' for c in range(30)))
    for d in 'folders','table': assert calls_of('list.index', lambda: get_dataset(tmp_path/d))<5
