"What is decoded: features, or the map of an earlier layer, and what is shaken of it"
import math
from functools import partial
import pytest, torch
import torch.nn.functional as F
from torch import nn
from fastcore.imports import equals
from fastcore.test import is_close
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import set_seed
from conftest import call, save_photos
from training import silent
from fgsynth.core import InputError
from fgsynth.data.datasets import get_dataset
from fgsynth.data.loaders import ssl_dls
from fgsynth.evaluate.features import features
from fgsynth.evaluate.measures import evaluate
from fgsynth.evaluate.probe import fit_probe, top_k
from fgsynth.evaluate.shake import shake_test
from fgsynth.methods.byol import BYOL
from fgsynth.methods.dino import DINO
from fgsynth.methods.learner import ssl_learner
from fgsynth.methods.mocov2 import MoCoV2
from fgsynth.methods.simclr import SimCLR
from fgsynth.methods.simsiam import SimSiam
from fgsynth.nets.codes import Coder, channel_means, with_means
from fgsynth.nets.encoders import create_encoder
from fgsynth.nets.networks import Encoder
from fgsynth.show.explore import Explorer
from fgsynth.synth.controls import ClassNoise
from fgsynth.synth.callbacks import DecoderCallback, SynthPairCallback, synth_pairs
from fgsynth.synth.decoding import AutoEncoder
from fgsynth.synth.perturb import cam_scores
from fgsynth.synth.synthesizer import Synthesizer

layer = 'body.2'

def small(c=8):
    "Its layer `body.2` gives c maps of 8 x 8 places for images of 32 pixels"
    front = nn.Conv2d(3,c,3,2,1), nn.ReLU(inplace=True), nn.Conv2d(c,c,3,2,1)
    return Encoder(nn.Sequential(*front, nn.ReLU(inplace=True), nn.Conv2d(c,32,3,2,1), nn.ReLU(),
                                 nn.AdaptiveAvgPool2d(1), nn.Flatten()), 32)

pairs = partial(synth_pairs, decoder_width=4, decoder_layer=layer)

@pytest.fixture(scope='module')
def items():
    set_seed(0)
    return get_dataset('finches', n_train=96, n_test=40, size=32)

@pytest.fixture
def dls(items):
    set_seed(0)
    return ssl_dls(items, size=32, bs=32)

def make(dls, cbs, method=None, encoder=None, **kw):
    set_seed(0)
    return silent(ssl_learner(dls, encoder or small(), method or MoCoV2(K=64), cbs=cbs, **kw))

class At(Callback):
    "Look at a learner at some moment of its first step, and end it"
    order = 90
    def __init__(self, moment, look): setattr(self, moment, lambda: self.leave(look))
    def leave(self, look):
        look(self.learn)
        raise CancelFitException()

# what a code is

def test_the_map_is_what_the_layer_gives_and_the_rest_is_not_computed():
    torch.manual_seed(0)
    enc,x,late = small(),torch.rand(3,3,32,32),[]
    enc.body[4].register_forward_hook(lambda *o: late.append(1))
    assert is_close(Coder(enc, layer)(x), enc.body[:3]((x-enc.mean)/enc.std), 1e-6) and not late
    assert equals(Coder(enc)(x), enc(x))
    assert not any(m._forward_hooks for m in enc.modules() if m is not enc.body[4])

def test_an_error_on_the_way_leaves_no_hook_behind():
    enc = small()
    with pytest.raises(RuntimeError): Coder(enc, layer)(torch.rand(1,5,32,32))
    assert not any(m._forward_hooks for m in enc.modules()) and torch.is_grad_enabled()

@pytest.mark.parametrize('grad', [False, True])
def test_where_the_gradient_of_the_features_goes(grad):
    enc,x = small(),torch.rand(3,3,32,32)
    with torch.no_grad(): code,z = Coder(enc, layer).with_features(x, grad)
    z.sum().backward(inputs=[code, *enc.parameters()] if grad else [code])
    assert code.grad.any() and (enc.body[0].weight.grad is not None)==grad
    assert is_close(z, enc(x), 1e-6)

@pytest.mark.parametrize('name,stage', [('resnet18','body.layer2'), ('convnext_tiny','body.features.2'),
                                        ('timm/test_byobnet','body.stages.1'), ('lite0','body.blocks.2')])
def test_layers_of_real_networks(name, stage):
    torch.manual_seed(0)
    enc,x = create_encoder(name, size=64).eval(),torch.rand(2,3,64,64)
    code,z = Coder(enc, stage).with_features(x)
    assert code.shape[2]==code.shape[3]>1 and is_close(z, enc(x), 1e-4)
    assert torch.autograd.grad(z.sum(), code)[0].any()

@pytest.mark.parametrize('name,says', [('body.20', "has no layer 'body.20'"), ('body.6', 'not a map'),
                                       ('body.7', r'gives \(2, 32\)')])
def test_a_layer_that_cannot_be_decoded_is_one_sentence(dls, name, says):
    with pytest.raises(InputError, match=says) as e: Coder(small(), name)(torch.rand(2,3,32,32))
    assert '\n' not in str(e.value)
    with pytest.raises(InputError): make(dls, synth_pairs(decoder_layer=name))

def test_a_layer_that_is_not_used_is_one_sentence():
    enc = small(); enc.spare = nn.Conv2d(3,3,1)
    with pytest.raises(InputError, match='does not use'): Coder(enc, 'spare')(torch.rand(2,3,32,32))

@pytest.mark.parametrize('shape', [(5,7), (5,7,3,3)])
def test_means_and_back(shape):
    code,z = torch.randn(shape, dtype=torch.float64),torch.randn(5,7, dtype=torch.float64)
    assert is_close(channel_means(code), code.reshape(5,7,-1).mean(-1), 1e-12)
    new = with_means(code, z)
    assert is_close(channel_means(new), z, 1e-12)
    if len(shape)==4: assert is_close((new-code).flatten(2).std(-1), torch.zeros(5,7, dtype=torch.float64), 1e-12)

# scores

def test_scores_are_what_a_louder_channel_would_do_to_the_loss():
    "Gradient times map, summed over the places, is the loss's derivative by a factor on the channel (float64)"
    torch.manual_seed(0)
    enc,x,key = small().double(),torch.rand(4,3,32,32, dtype=torch.float64),torch.randn(4,32, dtype=torch.float64)
    def loss(z): return F.cosine_similarity(z, key).sum()
    code,z = Coder(enc, layer).with_features(x)
    got = [cam_scores(loss(z), code, target) for target in ('-loss','loss')]
    def with_factor(k, i, by):
        def louder(m, inp, out): out = out.clone(); out[i,k] *= by; return out
        with enc.body[2].register_forward_hook(louder), torch.no_grad(): return loss(enc(x))
    for i,k in (0,0), (1,3), (2,5), (3,7):
        slope = ((with_factor(k, i, 1+1e-5)-with_factor(k, i, 1-1e-5))/2e-5).item()
        assert is_close(got[1][i,k]-got[0][i,k], slope, 1e-4*max(1, abs(slope)))

# training

@pytest.mark.parametrize('method', [MoCoV2(K=64), SimSiam(), SimCLR(), BYOL(), DINO(K=64)],
                         ids=lambda m: type(m).__name__)
def test_a_step_of_every_method(dls, method):
    learn = make(dls, pairs(), method)
    learn.fit(1, .01)
    s = learn.synth
    assert s.code.shape==(16,8,8,8) and s.rec.shape==s.pert.shape==(16,3,32,32)
    assert [getattr(s, n).shape for n in ('z','s_hat','n_cam','n_var','noise','z_pert')] == [(16,8)]*6
    assert s.features is None and not any(o.requires_grad for o in (s.code, s.z, s.s_hat, s.rec, s.pert))
    assert is_close(s.z, s.code.mean((2,3)), 1e-5) and s.s_hat.std()>0
    assert (learn.model.bank.d, len(learn.model.bank))==(8, 48) # half of each batch
    assert all(math.isfinite(v) for v in learn.recorder.values[-1])

def test_the_pair_by_hand(dls):
    kept = {}
    learn = make(dls, [*pairs(update='frozen'), At('after_loss', lambda learn: kept.update(s=learn.synth))])
    learn.fit(1, .01)
    s,decoder = kept['s'],learn.model.decoder
    with torch.no_grad(): pert = decoder(s.code + (s.n_cam + s.n_var)[:,:,None,None])
    assert is_close(s.rec, decoder(s.code), 1e-5) and is_close(s.pert, pert, 1e-4)
    assert is_close(s.pair[1], (s.x + pert - s.rec).clamp(0,1), 1e-4) and (s.pert-s.rec).abs().max()>1e-3

def gradients(dls, *cbs):
    "Of three layers of the encoder and of the decoder in the first step, with the method's own loss silenced"
    found = []
    def look(learn):
        net = learn.model
        found.extend([*(net.encoder.body[i].weight.grad for i in (0,2,4)), net.decoder.steps[0][1].weight.grad])
    class Silent(MoCoV2):
        def loss(self, q, k): return super().loss(q, k)*0.
    make(dls, [*cbs, At('after_backward', look)], Silent(K=64)).fit(1)
    return [g is not None and bool(g.any()) for g in found]

def test_the_reconstruction_error_reaches_what_lies_before_the_layer_and_only_with_beta(dls):
    callback = partial(DecoderCallback, decoder_layer=layer, decoder_width=4)
    assert gradients(dls, callback(beta=1.))==[True, True, False, True]
    assert gradients(dls, callback(beta=0.))==[False, False, False, True]
    assert gradients(dls, *pairs(beta=1., lam=0., update='joint'))==[True, True, False, True]
    assert gradients(dls, *pairs(lam=0., update='frozen'))==[False]*4

def test_weights_are_those_without_pairs_where_pairs_count_nothing(dls):
    "Scores, decoder and noise leave the encoder, its statistics and its random numbers alone"
    def trained(cbs):
        set_seed(0); dls.train.rng.seed(0)
        learn = make(dls, cbs, encoder=create_encoder('timm/test_byobnet'))
        set_seed(0); learn.fit(1, .01)
        return learn.model.encoder.state_dict()
    plain,with_pairs = trained([]),trained(pairs(decoder_layer='body.stages.1', lam=0., update='frozen'))
    for k,v in plain.items(): assert is_close(v.float(), with_pairs[k].float(), 1e-6), k

def test_within_the_class(dls):
    learn = make(dls, [DecoderCallback(decoder_layer=layer, decoder_width=4), ClassNoise(), SynthPairCallback()])
    learn.fit(1, .01)
    assert learn.synth.noise.any() and learn.synth.pert.shape==(16,3,32,32)

def test_another_layer_begins_with_another_decoder_and_memory(dls):
    learn = make(dls, pairs())
    learn.fit(1, .01)
    decoder = learn.model.decoder
    learn.remove_cbs([learn.decoder, learn.perturb, learn.synth_pair])
    learn.add_cbs(synth_pairs(decoder_width=4))
    assert learn.model.decoder is not decoder and learn.model.bank.d==32
    learn.fit(1, .01)
    assert learn.synth.code.shape==(16,32)

def test_features_of_a_view_have_no_map():
    with pytest.raises(InputError, match='not the map'): pairs(features='view', update='frozen')

def test_pretraining_keeps_codes_as_far_as_they_fit(dls, monkeypatch):
    learn = make(dls, pairs())
    auto = AutoEncoder(learn.model, 96)
    assert learn.model.decoder.code_size==8*8*8 and auto.keeps(8*8*8)
    monkeypatch.setattr(AutoEncoder, 'most_bytes', 4*96*8*8*8-1)
    assert not auto.keeps(8*8*8)
    losses = {}
    for most in 1e9, 0:
        monkeypatch.setattr(AutoEncoder, 'most_bytes', most)
        dls.train.rng.seed(0)
        learn = make(dls, pairs())
        set_seed(0); losses[most] = learn.pretrain_decoder(2).recorder.losses
    assert is_close(torch.stack(losses[0]), torch.stack(losses[1e9]), 1e-5)
    assert losses[0][-1]<losses[0][0]

@pytest.mark.parametrize('size', [48, 50])
def test_sides_that_do_not_come_out_even(size):
    items = get_dataset('finches', n_train=32, n_test=8, size=size)
    learn = make(ssl_dls(items, size=size, bs=16), pairs())
    learn.fit(1, .01)
    assert learn.synth.rec.shape==(8,3,size,size)

def test_bfloat16(dls):
    learn = make(dls, pairs()).to_bf16()
    learn.fit(1, .01)
    assert learn.synth.s_hat.dtype==torch.float32 and learn.synth.s_hat.isfinite().all()

# afterwards

@pytest.fixture(scope='module')
def trained(items):
    set_seed(0)
    learn = make(ssl_dls(items, size=32, bs=32), pairs())
    learn.pretrain_decoder(1)
    learn.fit(1, .01)
    return learn

def test_pictures_shake_as_training_does(trained, items):
    x = items.test[:6].float()/255
    syn = trained.synthesizer()
    s = syn(x)
    with torch.no_grad(): want = trained.model.decoder.eval()(s.code + s.noise[:,:,None,None])
    assert is_close(s.pert, want, 1e-5) and s.z_rec.shape==(6,32) and s.z.shape==(6,8)
    ex = Explorer.from_learner(trained, items.test[:6])
    assert ex.picture(sigma_cam=0., sigma_var=0.)[1].pert.equal(ex.picture()[1].rec)

def test_a_synthesizer_of_a_layer_comes_back_from_its_file(dls, items, tmp_path):
    learn = make(dls, pairs(decoder_layer='body.stages.1'), encoder=create_encoder('timm/test_byobnet', size=32))
    learn.fit(1, .01)
    x = items.test[:4].float()/255
    syn = learn.synthesizer()
    back = Synthesizer.load(syn.save(tmp_path/'s.safetensors'))
    assert back.decoder.layer=='body.stages.1' and is_close(back(x).pert, syn(x).pert, 1e-6)

def test_a_bank_of_codes_is_not_taken_for_features(dls, items):
    "SimCLR's negatives in pictures are features of other images, and the bank has another number of channels"
    learn = make(dls, pairs(), SimCLR())
    learn.fit(1, .01)
    assert learn.model.bank.d==8 and len(learn.model.bank) and learn.model.encoder.num_features==32
    s = learn.synthesizer()
    assert s.saliency.kind=='neg_cosine' and s(items.test[:4].float()/255).pert.shape==(4,3,32,32)

def test_what_is_left_after_decoding_by_hand(trained, items):
    enc,dec = trained.model.encoder,trained.model.decoder
    got = evaluate(enc, items, 32, pcts=(1.,), decoder=dec, epochs=20)['decoded_top1']
    z,x = features(enc, items.train),items.test.float()/255
    with torch.no_grad(): drawn = dec.eval()(enc.eval().body[:3]((x-enc.mean)/enc.std))
    probe = fit_probe(z, items.labels('train'), len(items.classes), seed=0, epochs=20)
    assert got==pytest.approx(top_k(probe(features(enc, drawn)), items.labels('test')), abs=2.6) # one image of 40

def test_the_shake_test_asks_for_features(dls, items):
    with pytest.raises(InputError, match='without decoder_layer'):
        shake_test(make(dls, pairs('random')), items, 1, 1, .01)

def test_a_command_takes_the_layer(tmp_path, monkeypatch, undrawn):
    photos = save_photos(tmp_path, 40)
    args = '--arch timm/test_byobnet --size 32 --bs 16 --pretrain_epochs 1 --decoder_width 8'.split()
    call(monkeypatch, 'fgsynth_train', '--data', photos, *args, '--decoder_layer', 'body.stages.1', '--epochs', 1,
         '--out', tmp_path/'run')
    assert Synthesizer.load(tmp_path/'run/synth.safetensors').decoder.layer=='body.stages.1'
    with pytest.raises(SystemExit, match="has no layer 'body.stage.1'"):
        call(monkeypatch, 'fgsynth_train', '--data', photos, *args, '--decoder_layer', 'body.stage.1', '--epochs', 1,
             '--out', tmp_path/'bad')
    assert not (tmp_path/'bad').exists()
