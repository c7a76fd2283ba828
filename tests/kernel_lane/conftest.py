"""Points XLA to the pip-installed CUDA compiler before JAX starts, and stands in for the hardware that is not here."""

import os
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

# The GPU interpreter runs every warpgroup of a cluster in a thread of XLA's pool, which holds as many as there are
# devices or cores; with fewer they wait for each other for ever.
DEVICES = 16
CUDA = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no TPU whose metadata could be asked for


def pytest_configure(config: pytest.Config) -> None:
    """Sets what XLA reads when it starts, unless this folder is only collected beside the other tests."""
    if config.option.markexpr == "kernel_lane":
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={CUDA}" if CUDA.exists() else flags


@pytest.fixture(scope="session")
def devices() -> Callable:
    """A function from "h200" or a TPU topology such as "v5e:2x2" and a number to so many such devices."""
    from jax.experimental import topologies

    def described(name: str, count: int) -> list:
        if name == "h200":
            target = (Path(__file__).parent / "h200.txtpb").read_text()
            topology = {"platform": "cuda", "topology_name": "", "topology": f"1x1x{count}", "target_config": target}
        else:
            topology = {"platform": "tpu", "topology_name": name}
        return topologies.get_topology_desc(**topology).devices[:count]

    return described


@pytest.fixture(scope="session")
def device(devices) -> Callable:
    """A function from a name, as above, to a sharding on one such device."""
    import jax

    def sharding_on(name: str) -> jax.sharding.Sharding:
        return jax.sharding.NamedSharding(jax.sharding.Mesh(devices(name, 1), "x"), jax.sharding.PartitionSpec())

    return sharding_on


@pytest.fixture
def kernel_figures(tmp_path, monkeypatch) -> Callable:
    """A function giving, for each Mosaic GPU kernel compiled since, what the compiler says of it."""
    for name, value in {"TO": str(tmp_path), "PTXAS": "1", "SASS": "1"}.items():
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{name}", value)

    def figures() -> list[dict[str, int]]:
        kernels = []
        for ptxas in sorted(tmp_path.glob("*.ptxas")):
            name = ptxas.name.removesuffix(".ptxas")
            log, sass = ptxas.read_text(), next(tmp_path.glob(f"{name}*.sass*")).read_text()
            launch = next(tmp_path.glob(f"{name}*after_layout*")).read_text()
            kernels.append(
                {
                    "registers": int(re.search(r"Used (\d+) registers", log)[1]),
                    "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log.split("Function")[-1])),
                    "shared_memory": int(re.search(r"dynamic_shared_memory_size %c(\d+)", launch)[1]),
                    "HGMMA": len(re.findall(r"\bHGMMA", sass)),
                    "HMMA": len(re.findall(r"\bHMMA", sass)),
                }
            )
        return kernels

    return figures
