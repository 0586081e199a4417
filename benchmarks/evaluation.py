"""What does evaluation cost? Retrieval against the bare matrix product and a plain sort, the probe against the plain loop, features against the forward pass"""
import resource, tracemalloc
from fastcore.script import call_parse
from fastai.vision.all import *
from fgsynth.all import *
from fgsynth.evaluate.probe import fit_probe
from common import alternate, now, rows_of, save

def _product(z, n=256):
    "The similarities alone, block by block"
    z = F.normalize(z, dim=1)
    for q in z.split(n): q@z.T

def _naive(z, y, n=256):
    "Sort every row of similarities with its indices, then look at all places"
    z = F.normalize(z, dim=1); tot = 0.; rank = torch.arange(1, len(z))
    for i in torch.arange(len(z)).split(n):
        s = z[i]@z.T; s[torch.arange(len(i)), i] = -9
        hit = (y[s.argsort(1, descending=True)[:,:-1]]==y[i][:,None]).float()
        tot += ((hit*hit.cumsum(1)/rank).sum(1)/hit.sum(1)).sum().item()
    return 100*tot/len(z)

def _torchmetrics(z, y):
    from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate
    z = F.normalize(z, dim=1); ap = 0.                                       # torchmetrics takes scores of 0 and less for absent: hence 2 + cosine
    for i,q in enumerate(z):
        s = 2 + z@q; keep = torch.arange(len(z))!=i
        ap += retrieval_average_precision(s[keep], (y==y[i])[keep]).item()
    return 100*ap/len(z)

def _plain_probe(z, y, c, epochs, lr=30., bs=256):
    "`nn.Linear`, `CrossEntropyLoss` and SGD as they come, on the same scaled features"
    z = fit_probe(z, y, c, epochs=1).norm(z)
    lin = nn.Linear(z.shape[1], c); opt = torch.optim.SGD(lin.parameters(), lr, momentum=.9); sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs)
    for _ in range(epochs):
        for i in torch.randperm(len(z)).split(bs):
            opt.zero_grad(); F.cross_entropy(lin(z[i]), y[i]).backward(); opt.step()
        sched.step()
    return lin

@call_parse
def main(
    n:int=100_000, # Images of the large retrieval
    d:int=512, # Features
    rounds:int=1, # Turns of the large retrieval
):
    gen = torch.Generator().manual_seed(0)
    def blobs(n, d, c, noise=3.): y = torch.arange(n)%c; return torch.randn(c, d, generator=gen)[y] + noise*torch.randn(n, d, generator=gen), y
    z,y = blobs(n, d, 200)
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    before = peak()
    times = alternate({'matrix product':lambda: _product(z), 'retrieval':lambda: retrieval(z, y)}, rounds, warm=0)
    save('retrieval_large', f'Retrieval, {n:,} x {d}', rows_of(times, 'matrix product'), gigabytes_before=before, gigabytes_peak=peak(), gigabytes_features=4*n*d/2**30)
    z,y = blobs(5000, d, 50)
    found = {}
    def keep(k, f): return lambda: found.__setitem__(k, f())
    times = alternate({'matrix product':lambda: _product(z), 'retrieval':keep('retrieval', lambda: retrieval(z, y)['map']), 'plain sort':keep('plain sort', lambda: _naive(z, y)),
                       'torchmetrics':keep('torchmetrics', lambda: _torchmetrics(z, y))}, 3)
    save('retrieval', f'Retrieval, 5,000 x {d}', [dict(r, map=found.get(r['name'], '')) for r in rows_of(times, 'matrix product')])
    z,y = blobs(8000, 2048, 100, 12.); c = 100
    acc = {}
    def probe(): p = fit_probe(z[:6000], y[:6000], c); acc['fit_probe'] = 100*(p(z[6000:]).argmax(1)==y[6000:]).float().mean().item()
    def plain(): lin = _plain_probe(z[:6000], y[:6000], c, 100); acc['plain loop'] = 100*(lin(fit_probe(z[:6000], y[:6000], c, epochs=1).norm(z[6000:])).argmax(1)==y[6000:]).float().mean().item()
    save('probe', 'Linear probe, 6,000 x 2,048, 100 epochs', [dict(r, top1=acc[r['name']]) for r in rows_of(alternate({'fit_probe':probe, 'plain loop':plain}, 3), 'plain loop')])
    enc,x = create_encoder('resnet18').eval().to(memory_format=torch.channels_last),torch.randint(256, (1024,3,64,64), dtype=torch.uint8, generator=gen)
    f = (x[:256].float()/255).contiguous(memory_format=torch.channels_last)
    def forward():
        with torch.no_grad():
            for _ in range(4): enc(f)
    save('features', 'Features of 1,024 images, resnet18, 64 pixels', rows_of(alternate({'forward pass':forward, 'features':lambda: features(enc, x)}, 5), 'forward pass'))
