"""Look at a built site as its readers do and say what hurts.

In the text of every page: pictures without alternative text, headings that skip a level, and paths of the machine that
built it. In headless Chromium: text
that can hardly be told from its ground in light or dark, a page that scrolls sideways on a phone, and, on pages that
people read from top to bottom, code or output that does not fit its column.

  tools/pages.py FOLDER            list what hurts in a built site; exit with 1 if anything does
  tools/pages.py FOLDER --online   the same, with what the pages fetch: formulas are set
"""
import shutil, sys, tempfile
from pathlib import Path
from bs4 import BeautifulSoup

wide,phone = 1280,390 # pixels
read = 'index.html','404.html','contributing.html','tutorials/','paper/'
browsers = 'chromium','chromium-browser','google-chrome','google-chrome-stable'
chrome = next(filter(None, map(shutil.which, browsers)), None)
flags = ['--headless','--no-sandbox','--disable-gpu','--disable-background-networking']

def is_read(page): return page.startswith(read)

def pages(folder):
    "The pages of a built site, as paths in its folder"
    found = (o.relative_to(folder).as_posix() for o in Path(folder).rglob('*.html'))
    return sorted(o for o in found if not o.startswith('site_libs/'))

_asks = dict(
    sideways="""() => { const d = document.documentElement; return d.scrollWidth>d.clientWidth ?
        [`${d.scrollWidth-d.clientWidth} pixels too wide`] : [] }""",
    fits="""() => { document.querySelectorAll('details').forEach(o => o.open = true);
        const over = o => o.scrollWidth>o.clientWidth+1, longest = (a, b) => a.length>=b.length ? a : b;
        return [...document.querySelectorAll('main pre')].filter(o => o.checkVisibility() && (over(o) ||
          [...o.children].some(over))).map(o => 'too long: ' + o.textContent.split('\\n').reduce(longest)) }""",
    # The contrast of WCAG: of letters with the ground under them, where that is one colour
    legible="""least => { const rgba = s => (s.match(/[\\d.]+/g) || [0,0,0,0]).map(Number);
        const lum = c => { const [r,g,b] = c.map(v => (v /= 255) <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4);
          return .2126*r + .7152*g + .0722*b };
        const on = (c, under) => { const a = c[3] ?? 1; return [0,1,2].map(i => a*c[i] + (1-a)*under[i]) };
        const ground = o => { const s = o && getComputedStyle(o); if (!o) return [255,255,255];
          if (s.backgroundImage!='none') return null;
          const c = rgba(s.backgroundColor); if (c[3]===undefined) return c;
          const under = ground(o.parentElement); return under && on(c, under) };
        const seen = {}, walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walk.nextNode()) { const t = walk.currentNode.textContent.trim(), o = walk.currentNode.parentElement;
          if (!t || !o.checkVisibility({opacityProperty:true, visibilityProperty:true}) ||
            o.closest('script,style,svg,mjx-container')) continue;
          const under = ground(o); if (!under) continue;
          const a = lum(on(rgba(getComputedStyle(o).color), under)), b = lum(under);
          const k = (Math.max(a, b)+.05)/(Math.min(a, b)+.05);
          if (k<least) seen[o.tagName+o.className] ??= `contrast ${k.toFixed(1)}: ${t.slice(0, 60)}` }
        return Object.values(seen) }""")

def in_text(folder):
    "What hurts in the text of the pages of a built site, as sentences that begin with the page"
    here = [f'{o}/' for o in (Path.home(), tempfile.gettempdir(), sys.prefix)]
    for name in pages(folder):
        main = BeautifulSoup((Path(folder)/name).read_bytes(), 'html.parser').main
        yield from (f'{name}: a path of this machine: {o}' for o in here if o in main.get_text())
        for o in main.find_all('img'):
            if o.get('aria-hidden')!='true' and not o.get('alt', '').strip():
                yield f"{name}: no alternative text: {o['src'][:80]}"
        heads = main.find_all([f'h{i}' for i in range(1, 7)])
        for before,o in zip(heads, heads[1:]):
            if int(o.name[1])>int(before.name[1])+1: yield f'{name}: {o.name} skips a level: {o.get_text(strip=True)}'

def on_screen(folder, only=None, ask=('sideways','legible','fits'), online=False, contrast=3):
    "What hurts where a browser shows them (`only`: those pages)"
    from playwright.sync_api import sync_playwright
    folder = Path(folder).resolve()
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chrome, args=flags)
        def page(width, dark=False):
            res = browser.new_page(viewport=dict(width=width, height=900), color_scheme='dark' if dark else 'light')
            if not online: res.route('http*://**', lambda r: r.abort())
            return res
        screen,small,dark = page(wide),page(phone),page(wide, dark=True)
        for name in pages(folder) if only is None else only:
            def hurts(k, at, *args):
                if k not in ask: return []
                if at.url!=(folder/name).as_uri():
                    at.goto((folder/name).as_uri())
                    if online: at.evaluate('window.MathJax?.startup?.promise')
                return [f'{name}: {o}' for o in at.evaluate(_asks[k], *args)]
            yield from hurts('sideways', small)
            for at in screen,dark: yield from hurts('legible', at, contrast)
            if is_read(name): yield from hurts('fits', screen)
        browser.close()

def main():
    folder,*more = sys.argv[1:]
    if chrome is None: sys.exit('there is no Chromium or Chrome here')
    found = [*in_text(folder), *on_screen(folder, online='--online' in more)]
    print('\n'.join(found) or f'{len(pages(folder))} pages: nothing that hurts')
    return 1 if found else 0

if __name__=='__main__': sys.exit(main())
