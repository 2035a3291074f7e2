"""Which versions of the packages beneath us are known to work."""

from importlib import metadata

from moe_accel.errors import DependencyError

SUPPORTED = {"torch": (">=2.11",), "transformers": (">=5.17", "<6"), "accelerate": (">=1.15", "<2")}


def check_versions() -> None:
    """Compare what is installed with what is supported.

    Raises:
        DependencyError: listing every package that is too old or too new, and the command that mends it.
    """
    from packaging.specifiers import SpecifierSet

    wrong = {}
    for package, limits in SUPPORTED.items():
        installed = metadata.version(package)
        if not SpecifierSet(",".join(limits)).contains(installed, prereleases=True):
            wrong[package] = f"{package} {installed} is installed, {package}{','.join(limits)} is needed"
    if wrong:
        wanted = " ".join(f"'{package}{','.join(SUPPORTED[package])}'" for package in wrong)
        raise DependencyError("moe-accel: " + "; ".join(wrong.values()), f"pip install {wanted}")
