"""Tests with other packages than the pinned ones.

nox                      all of it
nox -s adapters -- -x    the adapters at both ends of their frameworks, with options for pytest
nox -s oracle            the curvature against curvlinops
"""

import nox

nox.options.default_venv_backend = "venv"

OLDEST = (
    "lightning==2.5.0.post0",
    "pytorch-lightning==2.5.0.post0",
    "transformers==5.12.0",
    "accelerate==1.10.0",
)
NEWEST = (
    "lightning!=2.6.2,!=2.6.3",  # withdrawn
    "pytorch-lightning!=2.6.2,!=2.6.3",
    "transformers",
    "accelerate",
)
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "scikit-learn", "tensorboard")
TESTS = (
    "tests/integrations/lightning_trainer",
    "tests/integrations/test_transformers.py",
    "tests/modes/test_lightning.py",
    "tests/modes/test_transformers.py",
    "tests/modes/test_accelerate.py",
)


@nox.session
@nox.parametrize("frameworks", [OLDEST, NEWEST], ids=["oldest", "newest"])
def adapters(session: nox.Session, frameworks: tuple[str, ...]) -> None:
    """The adapters of Lightning and transformers."""
    session.install("--constraint", "constraints.txt", "torch", "numpy", *TOOLS)
    session.install(*frameworks)
    session.install("--no-deps", "--editable", ".")
    session.run("python", "-m", "pip", "list")
    # Old releases warn of what newer Pythons and PyTorch have deprecated since.
    session.run("python", "-m", "pytest", "-W", "default", *TESTS, *session.posargs)


@nox.session
def oracle(session: nox.Session) -> None:
    """The eigenvalues against curvlinops.

    In an environment of its own: curvlinops brings a torchvision along, and where that does not fit
    the PyTorch that is there, transformers does not import any more.
    """
    session.install("--constraint", "constraints.txt", "torch", "numpy", "scipy", *TOOLS)
    session.install("--no-deps", "--editable", ".")
    needed = ("backpack-for-pytorch", "einops", "einconv", "opt-einsum", "linear-operator", "tqdm")
    session.install("--no-deps", "curvlinops-for-pytorch==3.0.1", "jaxtyping", "mpmath", *needed)
    tests = "tests/numerics/test_lanczos_networks.py"
    session.run("python", "-m", "pytest", tests, *session.posargs)
