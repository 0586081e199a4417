"Where an encoder looks, and what shaking its features does to the class"
import warnings
from copy import copy
from functools import cache
import pytest, torch, torch.nn.functional as F
from fastai.torch_core import set_seed
from fastcore.test import test_close as check_close, test_eq as check_eq
from torch import nn, tensor
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.evaluate.attention import attention_maps, attention_on, attention_on_parts
from fgsynth.evaluate.shake import match_distance, shake_kinds, shake_test
from fgsynth.methods.learner import ssl_learner
from fgsynth.methods.mocov2 import MoCoV2
from fgsynth.nets.encoders import create_encoder
from fgsynth.nets.maps import as_map, spatial_layer
from fgsynth.synth.callbacks import synth_pairs

@pytest.fixture(scope='module')
def items(): return get_dataset('finches', n_train=64, n_test=64, size=48)

@pytest.fixture(scope='module')
def x(items): return items.test[:3].float()/255

@pytest.fixture(scope='module')
def learn(items):
    set_seed(0)
    return ssl_learner(ssl_dls(items, size=48, bs=32), 'timm/test_byobnet')

def test_attention_leaves_the_learner_as_it_was(learn, x):
    before = {k:v.clone() for k,v in learn.model.state_dict().items() if torch.is_tensor(v)}
    learn.model.train(); learn.model.zero_grad()
    m = learn.attention_maps(x)
    check_eq((m.shape, m.min()>=0, m.max()<=1), ((3,48,48), True, True))
    assert learn.model.training
    assert all(p.grad is None for p in learn.model.parameters())
    for k,v in learn.model.state_dict().items():
        if torch.is_tensor(v): check_eq(v, before[k])

def test_the_learner_looks_through_its_projector(learn, x):
    net = learn.model
    check_eq(learn.attention_maps(x), attention_maps(net.encoder, x, net.projector))
    assert (learn.attention_maps(x)!=attention_maps(net.encoder, x)).any()

def test_layer_of_a_convolutional_network(): check_eq(spatial_layer(create_encoder('resnet18'), 224)[1], 7)

made = cache(create_encoder) # the same for all who ask for it

@pytest.fixture(scope='module')
def vit(): return made('vit_tiny_patch16_224', size=64)

def test_layer_of_a_transformer(vit): check_eq(spatial_layer(vit, 64)[1:], (4,1))

@pytest.mark.parametrize('layer', [None, 'body.blocks.5.norm1', 'body.patch_embed.proj'])
def test_maps_of_a_transformer(vit, layer):
    check_eq(attention_maps(vit, torch.rand(2,3,64,64), layer=layer).shape, (2,64,64))

def share_in_place(encoder, size, layer, layout):
    "How much of what a change of one quarter of an image does to a map lies in that quarter of the map, for all four"
    g,seen,half = torch.Generator().manual_seed(1),[],size//2
    x = torch.rand(1, 3, size, size, generator=g).repeat(5, 1, 1, 1)
    for k,(i,j) in enumerate([(0,0), (0,1), (1,0), (1,1)], 1):
        x[k,:,i*half:(i+1)*half,j*half:(j+1)*half] = torch.rand(3, half, half, generator=g)
    hook = encoder.get_submodule(layer).register_forward_hook(lambda m,i,o: seen.append(as_map(o, layout)))
    with torch.no_grad(): encoder.eval()(x)
    hook.remove()
    change = (seen[0][1:]-seen[0][:1]).double().pow(2).sum(1)
    finer = F.interpolate(change[:,None], 2*change.shape[-1])[:,0]          # so that halves are whole cells
    quarters = finer.unflatten(1, (2,-1)).unflatten(3, (2,-1)).sum((2,4))
    return (quarters.flatten(1)/quarters.sum((1,2))[:,None]).diag()

transformers = dict(vit_b_16=('encoder_layer_11.ln_1',64,4,1), swin_t=('features.3.1.norm1',64,8,'last'),
    swin_tiny_patch4_window7_224=('layers.1.blocks.1.norm1',64,8,'last'), gcvit_xxtiny=('',64,8,None),
    hiera_tiny_224=('blocks.11.norm1',96,3,0), mixer_s32_224=('blocks.7.norm1',96,3,0),
    tnt_s_patch16_224=('blocks.11.norm_out',48,3,1), vit_small_patch14_reg4_dinov2=('blocks.11.norm1',42,3,5))

@pytest.mark.parametrize('arch', transformers)
def test_maps_of_transformers_and_mixers_show_places(arch):
    layer,size,side,layout = transformers[arch]
    e = made(arch, size=size)
    name,*found = spatial_layer(e, size)
    assert name.endswith(layer), name
    check_eq(found, [side, layout])
    check_eq(attention_maps(e, torch.rand(3, 3, size, size)).shape, (3, size, size))
    assert share_in_place(e, size, name, layout).min()>.3                  # a quarter by chance

@pytest.mark.parametrize('arch,layer', [('swin_t','body.features.1.0.attn.qkv'), ('vit_tiny_patch16_224','body.norm.x'),
                                        ('swin_tiny_patch4_window7_224','body.layers.0.blocks.0.attn.softmax')])
def test_a_layer_that_is_no_map_is_refused(arch, layer):
    with pytest.raises(InputError, match='not known to be a map'):
        attention_maps(made(arch, size=64), torch.rand(2,3,64,64), layer=layer)

class Attended(nn.Module):
    "A network whose attention matrix, between its 16 places, is finer than its map of 4 by 4 places"
    class TalkingAttention(nn.Module):
        def __init__(self): super().__init__(); self.talk = nn.Conv2d(2, 2, 1)
        def forward(self, x):
            t = x.flatten(2)
            matrix = self.talk((t.transpose(1, 2)@t)[:,None].repeat(1, 2, 1, 1)).softmax(-1).mean(1)
            return x + (t@matrix).view_as(x)
    def __init__(self): super().__init__(); self.stem,self.attn = nn.Conv2d(3, 8, 8, 8),self.TalkingAttention()
    def forward(self, x): return self.attn(self.stem(x)).mean((2,3))

def test_an_attention_matrix_is_no_map():
    check_eq(spatial_layer(Attended(), 32)[1:], (4, None))
    check_eq(attention_maps(Attended(), torch.rand(2,3,32,32)).shape, (2,32,32))

def test_a_network_without_maps_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3*48*48, 4))
    with pytest.raises(InputError, match='no feature map'): spatial_layer(flat, 48)

def test_attention_in_numbers(items):
    m = items.test_masks>0
    even = attention_on(torch.ones(m.shape), m)
    check_close(even['share'], attention_on(m, m)['area'], 1e-9)           # the share is the area

def test_the_area_grows_with_the_tolerance():
    mask = torch.zeros(1,9,9); mask[0,4,4] = 1
    check_close(attention_on(mask, mask, 1)['area'], 100*9/81, 1e-9)

def test_attention_on_nothing_is_refused(items, learn):
    m,one = items.test_masks>0,torch.ones(1,9,9)
    with pytest.raises(InputError, match='shape'): attention_on(one, m)
    with pytest.raises(InputError, match='No mask'): attention_on(one, one*0)
    bare = copy(items); bare.test_masks = None
    with pytest.raises(InputError, match='no masks'): learn.attention_on_parts(bare)

def test_attention_on_parts_of_a_learner(learn, items):
    net = learn.model
    check_eq(learn.attention_on_parts(items, n=8), attention_on_parts(net.encoder, items, 48, n=8, head=net.projector))

# shake

@pytest.fixture(scope='module')
def shaken():
    set_seed(0)
    items = get_dataset('finches', n_train=200, n_test=64, size=32)
    learn = ssl_learner(ssl_dls(items, size=32, bs=32), 'timm/test_byobnet', MoCoV2(momentum=.99),
                        cbs=synth_pairs('random', decoder_width=8))
    return shake_test(learn, items, pretrain_epochs=3, head_epochs=1, head_lr=.001, distances=(.001,), n=64)

def test_shaking_compares_at_equal_distance(shaken):
    check_eq(len(shaken), 12)
    assert (shaken.measured[1:]/.001-1).abs().max()<.02, shaken.measured

def test_only_what_was_shaken_has_a_share_on_the_parts(shaken):
    check_eq(shaken.on_parts[1:].notna().all(), True)
    check_eq(shaken.on_parts[:1].isna().all(), True)

def test_each_kind_of_noise_has_the_same_size():
    torch.manual_seed(0)
    y,scores = tensor([0,0,1,1,2,2]),{'abs':torch.rand(6,10)}
    kinds = shake_kinds(torch.rand(6,10), y, scores, torch.rand(10), torch.rand(30,10), torch.arange(30)%3)
    check_eq(len(kinds), 7)
    for n in kinds.values(): check_close(n.pow(2).mean(), tensor(1.), 1e-4)

def test_distance_of_an_unlinear_decoder_is_met():
    torch.manual_seed(0); W,z,e = torch.randn(48,8),torch.randn(300,8),torch.randn(300,8)
    def decoder(z): return (z@W.T).view(-1,3,4,4).sigmoid()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        a = match_distance(decoder, z, e, .03)
    check_close((decoder(z+a*e)-decoder(z)).pow(2).mean().item(), .03, 1e-3)
