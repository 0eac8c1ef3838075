"""Package definition of open-r1-capo; every pin carries its reason.

`make install` builds `.venv` from this file and rebuilds it when this file is newer.
"""

import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

# Moving libraries are pinned exactly where this project reads or overrides their internals,
# and to a compatible range elsewhere.
INSTALL_REQUIRES = [
    "torch==2.13.0",  # the build that vllm 0.31 is compiled against; CPU and CUDA alike
    "transformers==5.17.0",  # newest release that vllm 0.31 accepts; Trainer's step order is relied upon
    "trl==1.16.0",  # CAPOTrainer overrides private methods of GRPOTrainer: the exact version matters
    "accelerate==1.15.0",  # the release that trl 1.16 was tested with
    "datasets>=5.2,<6",  # trl 1.16 needs the 5.x features API
    "hydra-core==1.3.8",  # unpinned, pip drifts to a 1.4 release candidate
    "omegaconf>=2.3.1,<2.4",  # hydra 1.3's companion
    "math-verify==0.9.0",  # a reward's verdicts change between releases: exact
    "latex2sympy2_extended[antlr4_9_3]==1.11.0",  # math-verify 0.9's parser; antlr 4.9.3 is hydra's own
    "wandb>=0.31,<1",  # offline mode without an account
    "matplotlib>=3.10,<4",  # the figures
    "scipy>=1.15,<2",  # their statistics
    "gguf>=0.19,<1",  # transformers reads the policy `smollm2` of a package with it
    "psutil>=6,<8",  # free memory, by which `fit_machine` chooses its micro-batch; accelerate needs it too
    "requests>=2.32,<3",  # trl's vLLM server client imports it without declaring it
]

EXTRAS = {
    # vllm 0.31 is the newest that trl 1.16 supports; deepspeed 0.19.8 ran ZeRO-2 and ZeRO-3 with it
    "gpu": ["vllm==0.31.0", "deepspeed==0.19.8"],
    # its pins (latex2sympy2_extended 1.0.6) clash with math-verify 0.9: `make eval` gives it its own environment
    # lighteval does not bound litellm, whose later releases fail on repeated requests (undeclared imports)
    "eval": ["lighteval[litellm]==0.13.0", "litellm>=1.80,<1.81", "xxhash<4"],
    "lora": ["peft>=0.21,<1"],
    # problems with their own verifiers; its other packages are small and leave every pin above as it is
    "gym": ["reasoning-gym==0.1.25"],
    "dev": [
        "pytest>=9,<10",
        "peft>=0.21,<1",  # the KL budget under LoRA
        "pytorch-optimizer>=4.1,<5",  # rivals of the KL budget: optimizers that need no rate
        "ruff==0.17.5",  # formatting changes between releases: exact
        "triton==3.7.1; platform_system == 'Linux'",  # torch 2.13's own; its interpreter runs the GPU kernels' tests
    ],
}

# The CPU's inner loops in plain C; where there is no compiler torch does the same, five times slower.
NATIVE = Extension(
    "open_r1_capo.capo.engines._native",
    ["src/open_r1_capo/capo/engines/native.c"],
    extra_compile_args=["-O3", "-fopenmp-simd", "-fno-math-errno"],  # vector roots; exact otherwise
    libraries=["m"],
    optional=True,
)


class BuildWithRecipes(build_py):
    """Put the recipes into the package, where an installation without the repository finds them."""

    def run(self):
        """Build, and copy the recipes."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("recipes", Path(self.build_lib) / "open_r1_capo" / "recipes", dirs_exist_ok=True)


setup(
    name="open-r1-capo",
    version="0.1.0",
    description="Curvature-Aware Policy Optimization (arXiv 2510.00819) for reasoning LLMs, on TRL's GRPOTrainer.",
    license="Apache-2.0",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"open_r1_capo.report": ["*.html", "*.css", "*.js"], "open_r1_capo.settings": ["*.json"]},
    ext_modules=[NATIVE],
    cmdclass={"build_py": BuildWithRecipes},
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
)
