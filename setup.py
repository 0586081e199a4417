from configparser import ConfigParser
from pathlib import Path
import re, shlex, setuptools

# note: all settings are in settings.ini; edit there, not here
config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

cfg_keys = 'version description keywords author author_email'.split()
expected = cfg_keys + 'lib_name user branch license status min_python python_versions audience language'.split()
for o in expected: assert o in cfg, f'missing expected setting: {o}'
setup_cfg = {o:cfg[o] for o in cfg_keys}

licenses = {'apache2': ('Apache-2.0', 'OSI Approved :: Apache Software License')}
statuses = ['1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta', '5 - Production/Stable', '6 - Mature',
            '7 - Inactive']

lic = licenses[cfg['license'].lower()]
project_urls = {'Documentation': cfg['doc_host'] + cfg.get('doc_baseurl', ''), 'Source': cfg['git_url']}

# PyPI shows the README outside the repository, so its relative links and pictures get absolute addresses there
readme = Path('README.md')
readme = readme.read_text(encoding='utf-8') if readme.exists() else cfg['description']
raw = cfg['git_url'].replace('github.com', 'raw.githubusercontent.com') + '/' + cfg['branch']
blob = f"{cfg['git_url']}/blob/{cfg['branch']}"
readme = re.sub(r'(!\[[^\]]*\]\()(?![a-z]+:|[#/])', rf'\g<1>{raw}/', readme)
readme = re.sub(r'((?<!!)\[[^\]]*\]\()(?![a-z]+:|[#/])', rf'\g<1>{blob}/', readme)

names = 'dev lite onnx faiss distrib completion app hub tensorboard'.split()
def extra(name): return cfg.get(f'{name}_requirements', '').split()
extras = {o: extra(o) for o in names}

setuptools.setup(
    name = cfg['lib_name'],
    license = lic[0],
    license_files = ['LICENSE'],
    classifiers = [
        'Development Status :: ' + statuses[int(cfg['status'])-1],
        'Intended Audience :: ' + cfg['audience'].title(),
        'Natural Language :: ' + cfg['language'].title(),
        'License :: ' + lic[1],
        *['Programming Language :: Python :: '+o for o in cfg['python_versions'].split()],
        *['Operating System :: '+o for o in ('POSIX :: Linux', 'MacOS', 'Microsoft :: Windows')],
    ],
    url = cfg['git_url'],
    project_urls = project_urls,
    packages = setuptools.find_packages(include=[cfg['lib_name']+'*']),
    include_package_data = True,
    package_data = {cfg['lib_name']: ['presets/*.toml', 'example/*', 'commands.json']},
    install_requires = shlex.split(cfg.get('requirements', '')),
    # developers test them all but wandb, which is large and is imported by timm wherever it is installed
    extras_require = extras | {'dev': sum(extras.values(), []), 'wandb': extra('wandb')},
    python_requires = '>=' + cfg['min_python'],
    long_description = readme,
    long_description_content_type = 'text/markdown',
    zip_safe = False,
    entry_points = {
        'console_scripts': shlex.split(cfg.get('console_scripts', '')),
        'nbdev': [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]
    },
    **setup_cfg)
