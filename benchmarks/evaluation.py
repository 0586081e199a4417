"""What does evaluation cost? Retrieval against the bare matrix product and a plain sort, the probe against the plain
loop, features against the forward pass"""
import resource, tracemalloc
from fastcore.script import call_parse
from fastai.vision.all import *
from fgsynth.all import *
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
    z = F.normalize(z, dim=1); ap = 0.
    for i,q in enumerate(z):
        s = 2 + z@q # scores of 0 and less would be taken for absent
        keep = torch.arange(len(z))!=i
        ap += retrieval_average_precision(s[keep], (y==y[i])[keep]).item()
    return 100*ap/len(z)

def _plain_probe(z, y, c, epochs, lr=30., bs=256):
    "`nn.Linear`, `CrossEntropyLoss` and SGD as they come, on the same scaled features"
    z = fit_probe(z, y, c, epochs=1).norm(z)
    lin = nn.Linear(z.shape[1], c)
    opt = torch.optim.SGD(lin.parameters(), lr, momentum=.9)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, epochs)
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
    def blobs(n, d, c, noise=3.):
        y = torch.arange(n)%c
        return torch.randn(c, d, generator=gen)[y] + noise*torch.randn(n, d, generator=gen), y
    z,y = blobs(n, d, 200)
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    before = peak()
    times = alternate({'matrix product':lambda: _product(z), 'retrieval':lambda: retrieval(z, y)}, rounds, warm=0)
    save('retrieval_large', f'Retrieval, {n:,} x {d}', rows_of(times, 'matrix product'), gigabytes_before=before,
         gigabytes_peak=peak(), gigabytes_features=4*n*d/2**30)
    z,y = blobs(5000, d, 50)
    found = {}
    def keep(k, f): return lambda: found.__setitem__(k, f())
    ways = {'retrieval':lambda: retrieval(z, y)['map'], 'plain sort':lambda: _naive(z, y),
            'torchmetrics':lambda: _torchmetrics(z, y)}
    times = alternate({'matrix product':lambda: _product(z), **{k:keep(k, f) for k,f in ways.items()}}, 3)
    rows = [dict(r, map=found.get(r['name'], '')) for r in rows_of(times, 'matrix product')]
    save('retrieval', f'Retrieval, 5,000 x {d}', rows)
    z,y = blobs(8000, 2048, 100, 12.); c = 100
    acc = {}
    (z,zt),(y,yt) = (o.split([6000, 2000]) for o in (z, y))
    def right(logits): return 100*(logits.argmax(1)==yt).float().mean().item()
    def probe(): acc['fit_probe'] = right(fit_probe(z, y, c)(zt))
    def plain(): acc['plain loop'] = right(_plain_probe(z, y, c, 100)(fit_probe(z, y, c, epochs=1).norm(zt)))
    times = alternate({'fit_probe':probe, 'plain loop':plain}, 3)
    rows = [dict(r, top1=acc[r['name']]) for r in rows_of(times, 'plain loop')]
    save('probe', 'Linear probe, 6,000 x 2,048, 100 epochs', rows)
    enc = create_encoder('resnet18').eval().to(memory_format=torch.channels_last)
    x = torch.randint(256, (1024,3,64,64), dtype=torch.uint8, generator=gen)
    f = (x[:256].float()/255).contiguous(memory_format=torch.channels_last)
    def forward():
        with torch.no_grad():
            for _ in range(4): enc(f)
    times = alternate({'forward pass':forward, 'features':lambda: features(enc, x)}, 5)
    save('features', 'Features of 1,024 images, resnet18, 64 pixels', rows_of(times, 'forward pass'))
