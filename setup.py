"""What is installed: four packages and the ``dualpipe`` command."""

from setuptools import find_namespace_packages, setup

TRITON = 'triton>=3.4; sys_platform == "linux"'

setup(
    name="dualpipe-trainer",
    version="0.1.0",
    description="DeepSeek-V3-style training through a bidirectional pipeline that can be simulated first",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_namespace_packages(
        include=[
            "dualpipe",
            "dualpipe.*",
            "parallel",
            "parallel.*",
            "model",
            "model.*",
            "launch",
            "launch.*",
            "configs.*",
        ]
    ),
    package_data={"dualpipe.draw": ["page.html"], "configs.clusters": ["*.yaml"], "configs.phases": ["*.yaml"]},
    install_requires=["torch>=2.10,<3", "numpy", "pyyaml", "rich", "psutil", "safetensors>=0.4", "numba>=0.60"],
    extras_require={
        "triton": [TRITON],
        "deepspeed": ["deepspeed==0.19.8"],
        "tokenizers": ["tokenizers>=0.20"],
        "parquet": ["pyarrow>=17"],
        "test": [
            "pytest",
            "hypothesis",
            "pytest-timeout",
            "pytest-xdist",
            "transformers",
            "tokenizers>=0.20",
            "pyarrow>=17",
            "deepspeed==0.19.8",
            TRITON,
        ],
        "dev": ["ruff", "mypy", "types-PyYAML", "types-psutil"],
    },
    entry_points={"console_scripts": ["dualpipe=launch.cli:main"]},
)
