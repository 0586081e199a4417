"The paper's mathematics against loops and other libraries, and its edges: constant vectors, tiny numbers, empty banks"
import inspect, pickle
import numpy as np, pytest, torch
import torch.nn.functional as F
from copy import deepcopy
from fastcore.imports import equals
from fastcore.test import is_close
from scipy.stats import rankdata
from torch import nn
from fgsynth.core import InputError
from fgsynth.nets.losses import info_nce, neg_cosine
from fgsynth.synth.perturb import FeatureBank, MODES, NORMS, Synthesis, cam_noise, cam_scores, low_variance, min_max
from fgsynth.synth.perturb import noise_std, normalize, perturb, random_noise, var_noise

@pytest.fixture(autouse=True)
def seeded(): torch.manual_seed(0)

# scores from 0 to 1

def test_min_max_agrees_with_a_loop():
    x = torch.randn(7, 33)
    rows = [[float(v) for v in r] for r in x]
    assert is_close(min_max(x), torch.tensor([[(v-min(r))/(max(r)-min(r)) for v in r] for r in rows]), 1e-6)

def test_min_max_keeps_float64_and_widens_float16():
    x = torch.randn(7, 33)
    assert equals(min_max(x.double()).dtype, torch.float64)
    assert is_close(min_max(x.half()), min_max(x.half().float()), 1e-6)

@pytest.mark.parametrize('value', [0., 1., -3., 1e-45, 65504.])
def test_min_max_of_constant_rows_is_zero(value): assert equals(min_max(torch.full((2,5), value)), torch.zeros(2,5))

def test_min_max_of_one_dimension_is_zero(): assert equals(min_max(torch.randn(3,1)), torch.zeros(3,1))

def test_min_max_keeps_the_smallest_differences():
    assert equals(min_max(torch.tensor([0.,1e-44])), torch.tensor([0.,1.]))
    assert equals(min_max(torch.tensor([0.,6e-8], dtype=torch.float16)), torch.tensor([0.,1.]))

@pytest.fixture
def scores(): return F.relu(torch.randn(6, 101))

def test_ranks_are_those_of_scipy(scores):
    want = (rankdata(scores.double().numpy(), axis=1)-1)/100
    assert is_close(normalize(scores, 'rank'), torch.tensor(want).float(), 1e-6)

def test_quantiles_are_those_of_numpy(scores):
    x = scores.double().numpy()
    lo,hi = np.quantile(x, [.05,.95], axis=1)[...,None]
    assert is_close(normalize(scores, 'quantile'), min_max(torch.tensor(x.clip(lo, hi)).float()), 1e-5)

def test_the_batch_scales_and_the_logarithm_by_hand():
    s = torch.tensor([[0.,0.,1.,9.], [2.,1.,3.,4.]])
    assert is_close(normalize(s, 'batch'), s/9, 1e-6)
    assert is_close(normalize(s, 'rank'), torch.tensor([[1/6,1/6,2/3,1.], [1/3,0.,2/3,1.]]), 1e-6)
    assert is_close(normalize(s, 'log')[0], torch.tensor([0., 0., np.log(1.4)/np.log(4.6), 1.]).float(), 1e-6)

@pytest.mark.parametrize('how', NORMS)
def test_every_normalisation_keeps_order_shape_and_type(how, scores):
    n = normalize(scores, how)
    assert equals((n.shape, n.dtype, n.max().item()), (scores.shape, torch.float32, 1.))
    assert n.min().item() >= 0
    assert ((n[:,:,None]-n[:,None])*(scores[:,:,None]-scores[:,None]) >= 0).all()
    assert equals(normalize(torch.zeros(2,7), how), torch.zeros(2,7))
    assert equals(normalize(scores.double(), how).dtype, torch.float64)
    assert normalize(torch.full((2,5), 1e-44), how).isfinite().all()

def test_a_misspelt_normalisation_is_named(scores):
    with pytest.raises(InputError, match="did you mean 'rank'?"): normalize(scores, 'ranks')

# Grad-CAM

class Explained:
    "A head, features of five images, and their InfoNCE loss"
    def __init__(self):
        self.head = nn.Linear(64, 16, bias=False)
        self.z = torch.rand(5, 64, requires_grad=True)
        self.keys,self.queue = torch.randn(5,16), F.normalize(torch.randn(200,16))
    def loss(self, reduction='sum'): return info_nce(self.head(self.z), self.keys, self.queue, reduction=reduction)

@pytest.fixture
def explained(): return Explained()

def test_scores_are_detached(explained): assert equals(cam_scores(explained.loss(), explained.z).requires_grad, False)

def test_scores_of_a_loss_per_image_are_an_error(explained):
    with pytest.raises(InputError, match='sum it over the batch'): cam_scores(explained.loss('none'), explained.z)

def test_an_unknown_target_is_named(explained):
    with pytest.raises(InputError, match='Grad-CAM target'): cam_scores(explained.loss(), explained.z, 'minus')

def test_scores_leave_parameter_gradients_as_they_are(explained):
    def gradient(with_scores):
        explained.head.zero_grad()
        loss = explained.loss()
        if with_scores: cam_scores(loss, explained.z)
        loss.backward()
        return explained.head.weight.grad.clone()
    assert equals(gradient(True), gradient(False))

def test_scores_of_bfloat16_features_are_float32(explained):
    z = explained.z.detach().bfloat16().requires_grad_()
    s = cam_scores(neg_cosine(explained.head.bfloat16()(z), explained.keys, 'sum'), z)
    assert equals((s.dtype, s.shape, s.isfinite().all().item()), (torch.float32, (5,64), True))

# the bank

@pytest.mark.parametrize('sizes', [(30,), (30,30,30,30), (7,100,3), (250,), (40,170)])
def test_bank_knows_the_newest_however_they_come(sizes):
    "Partly filled, batches that do not divide M, a batch larger than M, a round trip through the state dict"
    bank,seen = FeatureBank(100, 64),[]
    for n in sizes:
        seen.append(torch.rand(n, 64)*3)
        bank.add(seen[-1])
    last = torch.cat(seen)[-100:]
    assert equals(len(bank), len(last))
    assert is_close(bank.std(), F.normalize(last.double(), dim=1).std(0, correction=0).float(), 1e-6)
    assert is_close(bank.feats[:len(bank)].norm(dim=1), torch.ones(len(bank)), 1e-6)
    assert equals(bank.ready().item(), len(sizes)>1)
    again,new = FeatureBank(100, 64),torch.rand(9, 64)
    again.load_state_dict(bank.state_dict())
    assert equals(bank.add(new).std(), again.add(new).std())

def test_bank_knows_whose_features_they_are():
    bank = FeatureBank(5, 2).add(torch.rand(3, 2, requires_grad=True), torch.tensor([7,8,9]))
    assert equals(bank.ids.tolist(), [7,8,9,-1,-1])
    assert equals(bank.add(torch.rand(3,2)).ids.tolist(), [-1,8,9,-1,-1])
    assert equals(bank.add(torch.rand(8,2), torch.arange(8)).ids.sort().values.tolist(), [3,4,5,6,7])
    assert equals(any(o.requires_grad for o in bank.buffers()), False)

def test_bank_replaces_the_oldest_first():
    bank = FeatureBank(100, 2)
    for i in range(4): bank.add(F.normalize(torch.tensor([[1.,i]]).expand(30,2)))
    assert equals([(bank.feats[:,1]/bank.feats[:,0]).round().eq(i).sum().item() for i in range(4)], [10,30,30,30])

def test_bank_of_halves_and_of_zeros():
    assert equals(FeatureBank(10,4).add(torch.rand(3,4).half()).std().dtype, torch.float32)
    assert equals(FeatureBank(10,4).add(torch.zeros(3,4)).std(), torch.zeros(4)) # vectors of length 0 stay finite

def test_bank_can_be_copied_and_pickled():
    bank = FeatureBank(10, 4).add(torch.rand(3,4), torch.arange(3))
    for other in deepcopy(bank), pickle.loads(pickle.dumps(bank)):
        assert equals((len(other), other.unit().item()), (3, bank.unit().item()))

def test_bank_reads_states_of_version_001():
    "There `gain` was registered by the callback, after the others: it is found by its name"
    bank = FeatureBank(4, 2).add(torch.tensor([[3.,4.], [0.,2.]]), torch.tensor([5,6]))
    old = {n:bank.state_dict()[n].clone() for n in ('feats','norms','ids','count','batches')}
    old['gain'] = torch.tensor(1.5)
    again = FeatureBank(4, 2)
    assert equals(str(again.load_state_dict(old)), '<All keys matched successfully>')
    assert equals((len(again), again.gain.item(), again.ids.tolist()), (2, 1.5, [5,6,-1,-1]))
    assert equals(again.std(), bank.std())

# noise

@pytest.fixture
def variances():
    v = torch.rand(50)
    return min_max(v), low_variance(v, .4)

def test_var_noise_for_one_and_for_no_dimension(variances):
    v_hat,mask = variances
    assert equals(var_noise(v_hat, mask, 2.).shape, (50,))
    assert equals(var_noise(v_hat, torch.zeros(50, dtype=bool), 2., n=3), torch.zeros(3,50))

def test_random_noise_takes_one_strength_per_image():
    assert is_close(random_noise(torch.zeros(2,40000), torch.tensor([[1.],[5.]])).std(1), torch.tensor([1.,5.]), .1)

def test_sigma_only_scales_a_fixed_draw():
    s_hat = min_max(torch.rand(3, 50))
    def draw(sigma): return cam_noise(s_hat, sigma, torch.Generator().manual_seed(1))
    assert equals(draw(1.)*2, draw(2.))

@pytest.fixture
def shaken(variances):
    "A function that shakes the same features with the same random numbers"
    z,s_hat = torch.rand(40, 50),min_max(torch.rand(1,50)**2).expand(40,50)
    def draw(mode='both', **kw):
        settings = dict(sigma_cam=3., sigma_var=3., generator=torch.Generator().manual_seed(0)) | kw
        return perturb(z, s_hat, *variances, mode=mode, **settings)
    draw.z,draw.s_hat = z,s_hat
    return draw

def test_unit_scales_all_noise(shaken): assert is_close(shaken(unit=.5).noise, shaken().noise*.5, 1e-5)

def test_without_sigma_nothing_moves(shaken): assert equals(shaken(sigma_cam=0., sigma_var=0.).z, shaken.z)

def test_a_misspelt_mode_is_named(shaken):
    with pytest.raises(InputError, match="did you mean 'both'?"): shaken('bath')

def test_random_noise_spends_each_images_own_energy(variances):
    s_hat = min_max(torch.rand(3,50)**torch.tensor([[1.],[2.],[9.]]))
    random,both = [noise_std(s_hat, *variances, 3., 2., m).double().pow(2) for m in ('random','both')]
    for i in range(3): assert is_close(random[i], torch.full((50,), both[i].sum()/50), 1e-5)
    assert random[:,0].std() > .1

def test_half_features_stay_half(shaken, variances):
    one = perturb(shaken.z[:1].half(), shaken.s_hat[:1], *variances, sigma_cam=3., sigma_var=3.)
    assert equals((one.z.shape, one.z.dtype, one.noise.dtype), ((1,50), torch.float16, torch.float32))

def test_the_strength_of_noise_has_no_default_but_that_of_training():
    required = [n for n,p in inspect.signature(perturb).parameters.items() if p.default is p.empty]
    assert equals(required, ['z','s_hat','v_hat','mask','sigma_cam','sigma_var'])
    with pytest.raises(TypeError): perturb(torch.rand(2,3), torch.rand(2,3), torch.rand(3), torch.ones(3)>0)

# what a synthesis holds

def test_a_synthesis_holds_nothing_at_first():
    assert equals(repr(Synthesis()), 'Synthesis: nothing yet')
    assert equals(Synthesis().z_pert, None)
    assert equals(set(vars(Synthesis()).values()), {None})
