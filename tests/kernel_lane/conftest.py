"""Points XLA to the pip-installed CUDA compiler, before JAX starts."""

import os
import sysconfig
from pathlib import Path

CUDA = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
if CUDA.exists():
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_cuda_data_dir={CUDA}"
