"""Calls that run foreign bytes as code, decode without a limit, or speak where a library must be silent."""

from __future__ import annotations

import ast

import pytest
from house import Module, calls, keyword, module_of, modules

CODE = "bytes could run code"
ALWAYS = {
    **dict.fromkeys(("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads"), CODE),
    **dict.fromkeys(("dill.load", "dill.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open"), CODE),
    **dict.fromkeys(("yaml.load", "yaml.full_load", "yaml.unsafe_load"), f"{CODE}: use yaml.safe_load"),
    **dict.fromkeys(("torch.jit.load", "eval", "exec"), CODE),
    **dict.fromkeys(("os.system", "os.popen"), "runs a shell"),
    "torch.export.load": "falls back to weights_only=False",
    "shutil.unpack_archive": "an archive is read as a stream of regular members",
}
BY_END = {
    "extractall": "an archive is read as a stream of regular members",
    "load_checkpoint": "Opacus loads it with weights_only=False",
    "TorchCheckpoint.get_model": "weights_only=False inside",
}
NUMPY_LOADS = ("numpy.load", "np.load")


def faults(module: Module) -> list[str]:
    """Every banned call of a module, with the reason."""
    return [
        f"{module.where}:{call.lineno} {name}: {why}"
        for name, call in calls(module)
        if (why := fault(module, name, call))
    ]


def fault(module: Module, name: str, call: ast.Call) -> str:
    """Why a call is banned; empty when it is not."""
    if name in ALWAYS:
        return ALWAYS[name]
    for end, why in BY_END.items():
        if name == end or name.endswith("." + end):
            return why
    if name == "torch.load" and keyword(call, "weights_only") is not True:
        return "weights_only=True is missing"
    if name in NUMPY_LOADS and keyword(call, "allow_pickle") not in (None, False):
        return "allow_pickle runs code"
    if name in ("PIL.Image.open", "Image.open") and keyword(call, "formats") is None:
        return "formats= is missing: Pillow would try every decoder it has"
    if keyword(call, "shell") not in (None, False):
        return "runs a shell"
    if name in ("print", "pprint.pprint") and module.floor not in ("cli", "jobs"):
        return "a library is silent: return it, or log it"
    if name.startswith(("numpy.random.", "np.random.")) and ("privacy" in module.name or module.floor == "federation"):
        return "noise for privacy comes from the system's generator"
    return ""


def test_no_banned_call() -> None:
    assert [line for module in modules() for line in faults(module)] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b)",
        "from pickle import loads as read\nread(b)",
        "import torch\ntorch.load(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import yaml\nyaml.load(f, Loader=L)",
        "archive.extractall('x')",
        "from PIL import Image\nImage.open(f)",
        "import PIL.Image\nPIL.Image.open(f)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "engine.load_checkpoint(p)",
        "print('x')",
    ],
)
def test_the_rule_sees_a_banned_call(source: str) -> None:
    assert faults(module_of(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f)",
        "from PIL import Image\nImage.open(f, formats=('PNG',))",
        "import subprocess\nsubprocess.run(['ls'])",
        "import yaml\nyaml.safe_load(f)",
    ],
)
def test_the_rule_lets_the_safe_form_pass(source: str) -> None:
    assert not faults(module_of(source))


def test_noise_for_privacy_is_not_numpys() -> None:
    source = "import numpy as np\nnp.random.normal()"
    assert faults(module_of(source, "eagleray.learn.privacy.noise"))
    assert not faults(module_of(source, "eagleray.learn.training"))
