"""Networks that both libraries offer by name, small ones of many families: each is made, tried, saved, read back, cut
into stages and looked through, or refused in one sentence. `FGSYNTH_ALL_NAMES=1` tries every name, for hours"""
import os
import pytest, timm, torch, torchvision
from fastcore.test import test_eq as check_eq
from fgsynth.core import InputError
from fgsynth.evaluate.attention import attention_maps
from fgsynth.nets.encoders import create_encoder, load_encoder, save_encoder, stages

at_64 = '''
    resnet18 mobilenet_v2 mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0 regnet_y_400mf
    densenet121 googlenet squeezenet1_1 swin_t lite0 timm/test_byobnet timm/test_convnext timm/test_efficientnet
    timm/test_efficientnet_evos timm/test_efficientnet_gn timm/test_mambaout timm/test_nfnet timm/test_resnet
    timm/test_vit cait_xxs24_224 coat_lite_tiny convit_tiny convnext_atto cs3darknet_focus_s
    deit_tiny_distilled_patch16_224 edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0
    efficientvit_m0 fasternet_t0 fastvit_t8 gcvit_xxtiny ghostnet_050 halonet26t hardcorenas_a hgnetv2_b0
    inception_next_atto lcnet_035 levit_128s mixer_s32_224 mobilevit_xxs pvt_v2_b0 repghostnet_050 repvit_m1
    resmlp_12_224 shvit_s1 starnet_s050 swiftformer_xs vit_tiny_r_s16_p8_224 vit_tiny_patch16_224
    xcit_nano_12_p16_224
    '''.split()
at_other_sizes = dict(crossvit_tiny_240=96, pit_ti_224=96, tnt_s_patch16_224=48, poolformer_s12=48, inception_v3=96,
                      vit_small_patch14_reg4_dinov2=42, **{'timm/test_coatnet':128, 'timm/test_vit_relpos':48})
names = {**dict.fromkeys(at_64, 64), **at_other_sizes}
if os.environ.get('FGSYNTH_ALL_NAMES'):
    torchvisions,timms = torchvision.models.list_models(module=torchvision.models),timm.list_models()
    names = {**dict.fromkeys([*torchvisions, *(f'timm/{o}' for o in timms)], 224), **names}

refused = {'squeezenet1_1','efficientformer_l1','halonet26t','crossvit_tiny_240'}
without_maps = {'levit_128s','resmlp_12_224'} # their deeper layers are tokens that no layer norm gives away
elsewhere = {'swin_t','gcvit_xxtiny','mixer_s32_224','tnt_s_patch16_224'} # whose maps test_attention.py asks for
looked_through = without_maps | elsewhere | {o for o in names if o.startswith('timm/test_')} | {
    'coat_lite_tiny','efficientformerv2_s0','mobilevit_xxs'}

def same_features(e, size, file):
    "Does it come back from its file as it was?"
    x,back = torch.rand(2, 3, size, size),load_encoder(file)
    with torch.no_grad(): return back(x).equal(e.eval()(x))

@pytest.mark.parametrize('name,size', names.items(), ids=names)
def test_a_name_works_or_is_refused_in_one_sentence(name, size, tmp_path):
    torch.manual_seed(0)
    try: e = create_encoder(name, size=size)                             # which tries it
    except InputError as ex:
        assert '\n' not in str(ex) and (name in refused or size==224)
        return
    assert name not in refused
    check_eq(sorted(id(p) for s in stages(e) for p in s), sorted(map(id, e.parameters())))
    file = save_encoder(e, tmp_path/'e.safetensors')
    assert file.is_file()
    if name not in looked_through: return
    assert same_features(e, size, file)
    if name in elsewhere: return
    if name in without_maps:
        with pytest.raises(InputError, match='no feature map'): attention_maps(e, torch.rand(2, 3, size, size))
    else: check_eq(attention_maps(e, torch.rand(2, 3, size, size)).shape, (2, size, size))

def test_many_names_are_tried(): assert len(names)>=60, len(names)
