"""How fast is vocabulary-scale scoring, and its backward pass, against the matrix products it cannot do without?

Every implementation of pair_statistics and head_statistics that this device can run, the losses of jaxopd_kernels with
their gradients, autodiff of the materialised loss, the bare matrix products, and torch and Liger where installed: all
in turns, so read the ratios. The reference of each case is the bare matrix product; the floor counts its operations at
the best rate measured here, and the bytes of heads and hidden states.

    python experiments/bench_scoring.py [--smoke] [--seconds 170]

What a contestant finds at some rows is compared with float64 from the same bfloat16 inputs.

About 3 minutes on an H200 (T 4,096 and 32,768) and on 2 CPU cores (T 128 and 256); V = 151,936 on both; bfloat16.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the device

import jax
import jax.numpy as jnp
import numpy as np
from benchmarking import (
    NOT_STARTED,
    MachineFloor,
    Measurement,
    Result,
    arguments,
    interleaved,
    machine_floor,
    over,
    with_floor,
    write,
)
from jaxopd_kernels import (
    IMPLEMENTATIONS,
    divergence_loss,
    head_statistics,
    pair_statistics,
    weighted_divergence_loss,
)

V, K, TOP_K = 151_936, 32, 64
ACCELERATOR = {"hopper": "gpu", "tpu": "tpu"}  # implementations that need one; the rest run everywhere
CHECKED_ROWS = 8  # spread over all T, compared with float64


class Case(NamedTuple):
    """An op at T rows of a student of width D[0] and, if there is one, a teacher of width D[1]."""

    op: str
    T: int
    D: tuple[int, ...]
    V: int

    @property
    def name(self) -> str:
        return f"{self.op} T={self.T:,} D={'+'.join(map(str, self.D))}"

    @property
    def passes(self) -> tuple[int, ...]:
        """Matrix products with each head: the student's loss needs logits, and gradients of hidden states and head."""
        return (3, 1) if self.op == "loss" else (1,) * len(self.D)

    @property
    def flops(self) -> float:
        return sum(2 * self.T * self.V * D * n for D, n in zip(self.D, self.passes))

    @property
    def bytes_read(self) -> float:
        return sum(2 * (self.T + self.V) * D for D in self.D)

    @property
    def fits_materialized(self) -> bool:
        """Whether some eight float32 arrays [T, V] a model do."""
        return 8 * len(self.D) * 4 * self.T * self.V < _memory()


def cases(smoke: bool) -> list[Case]:
    """The shapes of this device."""
    if smoke:
        return [Case("pair", 16, (64, 128), 2048), Case("head", 16, (64,), 2048), Case("loss", 16, (64, 128), 2048)]
    if jax.default_backend() == "cpu":
        return [Case("pair", 128, (1024, 2048), V), Case("head", 128, (1024,), V), Case("loss", 256, (1024, 2048), V)]
    small, large = 4096, 32768
    return [
        Case("pair", large, (1024, 4096), V),
        Case("loss", small, (1024, 4096), V),
        Case("head", large, (1024,), V),
        Case("head", large, (4096,), V),
        Case("pair", small, (1024, 2048), V),
        Case("loss", large, (1024, 2048), V),
        Case("pair", large, (1024, 2048), V),
    ]


def _memory() -> float:
    statistics = jax.devices()[0].memory_stats()
    return statistics["bytes_limit"] if statistics else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Compiled:
    """A jitted call on its arrays, compiled when first run, so that what cannot compile fails in its own turn."""

    def __init__(self, function: Callable[..., Any], *arrays: jax.Array):
        self.function, self.arrays, self.executable = jax.jit(function), arrays, None

    def __call__(self) -> Any:
        if self.executable is None:
            self.executable = self.function.lower(*self.arrays).compile()
        return self.executable(*self.arrays)

    @property
    def temporaries(self) -> float:
        analysis = self.executable.memory_analysis()
        return analysis.temp_size_in_bytes / 1e9 if analysis else float("nan")


class Data(NamedTuple):
    """Random inputs: zeros would draw less power and run faster."""

    models: tuple[jax.Array, ...]  # hidden_s [T, Ds], head_s [V, Ds], and the teacher's if there is one
    ids: jax.Array  # [T, K]
    weights: jax.Array  # [T]


def random_data(case: Case) -> Data:
    keys = jax.random.split(jax.random.key(0), 2 * len(case.D) + 1)
    models = []
    for i, D in enumerate(case.D):
        models.append(jax.random.normal(keys[2 * i], (case.T, D), jnp.bfloat16))
        models.append(jax.random.normal(keys[2 * i + 1], (case.V, D), jnp.bfloat16) * jnp.bfloat16(2 / D**0.5))
    ids = jax.random.randint(keys[-1], (case.T, K), 0, case.V)
    return Data(tuple(models), ids, jnp.full((case.T,), 1 / case.T))


def bare_products(case: Case, data: Data) -> Compiled:
    """The case's matrix products and nothing else; results in the dtype that is faster here, float32 on a CPU."""
    out = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    product = partial(jnp.einsum, preferred_element_type=out)

    def logits(*models: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(product("td,vd->tv", hidden, head) for hidden, head in zip(models[::2], models[1::2]))

    def with_gradients(*models: jax.Array) -> tuple[jax.Array, ...]:
        z = logits(*models)
        z_s = z[0].astype(jnp.bfloat16)
        return *z, product("tv,vd->td", z_s, models[1]), product("tv,td->vd", z_s, models[0])

    return Compiled(with_gradients if case.op == "loss" else logits, *data.models)


def scoring(case: Case, data: Data) -> dict[str, Callable[[], Any]]:
    """Every implementation of pair_statistics or head_statistics that this device can run, whole and at its least."""
    least: tuple[str, dict[str, Any]]
    if case.op == "pair":
        op, whole, least = pair_statistics, {}, ("without second pass", {"second_pass": False})
    else:
        op, whole, least = head_statistics, {"k": TOP_K}, ("without top k", {"k": 0})
    contestants: dict[str, Callable[[], Any]] = {}
    for name in IMPLEMENTATIONS:
        if ACCELERATOR.get(name, jax.default_backend()) != jax.default_backend():
            continue
        if name == "xla_materialized" and not case.fits_materialized:
            continue

        def call(*arrays: jax.Array, options: dict[str, Any]) -> Any:
            return op(*arrays[:-1], ids=arrays[-1], **options)

        for title, options in ((name, whole), (f"{name}, {least[0]}", least[1])):
            function = partial(call, options={**options, "implementation": name})
            contestants[title] = Compiled(function, *data.models, data.ids)
    return contestants


def losses(case: Case, data: Data) -> dict[str, Callable[[], Any]]:
    """The weighted reverse KL and its gradients in the student's hidden states and head."""

    def two_passes(*arrays: jax.Array) -> jax.Array:
        return jnp.vdot(divergence_loss(*arrays[:-1]), arrays[-1])

    def one_pass(*arrays: jax.Array) -> jax.Array:
        return weighted_divergence_loss(*arrays)[0]

    def materialized(*arrays: jax.Array) -> jax.Array:
        product = partial(jnp.einsum, "td,vd->tv", preferred_element_type=jnp.float32)
        log_p, log_q = (jax.nn.log_softmax(product(*arrays[i : i + 2])) for i in (0, 2))
        return jnp.vdot(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), arrays[-1])

    functions = {"weighted_divergence_loss": one_pass, "divergence_loss": two_passes}
    if case.fits_materialized:
        functions["autodiff, materialized"] = materialized
    gradients = {name: jax.value_and_grad(function, (0, 1)) for name, function in functions.items()}
    return {name: Compiled(function, *data.models, data.weights) for name, function in gradients.items()}


def torch_peers(case: Case, data: Data) -> dict[str, Callable[[], Any]]:
    """Torch and Liger on the same arrays, where they are installed."""
    if not importlib.util.find_spec("torch"):
        return {}
    import scoring_peers as peers

    on_cpu = jax.default_backend() == "cpu"
    if not on_cpu and not peers.torch.cuda.is_available():
        return {}
    models = peers.TorchModels(data.models, data.ids, data.weights, rows=128 if on_cpu else 1024)
    if case.op == "pair":
        return {"torch": peers.pair_statistics(models), "torch, KL only": peers.pair_kl(models)}
    if case.op == "head":
        return {"torch": peers.head_statistics(models, TOP_K)}
    found = {"torch": peers.reverse_kl_gradients(models)}
    if not on_cpu and importlib.util.find_spec("liger_kernel"):
        found["Liger fused JSD"] = peers.liger_gradients(models)
    return found


def exact_log_probabilities(case: Case, data: Data, rows: np.ndarray) -> list[np.ndarray]:
    """Log P and, where there is a teacher, log Q at `rows` [rows, V] in float64."""

    def log_softmax(hidden: jax.Array, head: jax.Array) -> np.ndarray:
        x = np.asarray(hidden[rows], np.float64)
        blocks = [x @ np.asarray(head[start : start + 16384], np.float64).T for start in range(0, case.V, 16384)]
        z = np.concatenate(blocks, axis=-1)
        z -= z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    return [log_softmax(*model) for model in zip(data.models[::2], data.models[1::2])]


def errors(found: Any, rows: np.ndarray, log_p: np.ndarray, log_q: np.ndarray | None = None) -> dict[str, float]:
    """Largest absolute errors at `rows`: of the statistics that a contestant found, and of its top k."""

    def at_rows(name: str) -> np.ndarray:
        return np.array(getattr(found, name)[rows].tolist())

    def largest(*differences: np.ndarray) -> float:
        return float(np.max(np.abs(differences)))  # NaN where one is

    p = np.exp(log_p)
    if log_q is None:
        exact = {"entropy": -(p * log_p).sum(-1)}
    else:
        q = np.exp(log_q)
        exact = {
            "entropy_student": -(p * log_p).sum(-1),
            "entropy_teacher": -(q * log_q).sum(-1),
            "reverse_kl": (p * (log_p - log_q)).sum(-1),
            "forward_kl": (q * (log_q - log_p)).sum(-1),
            "l2": np.linalg.norm(p - q, axis=-1),
        }
    figures = {"error": largest(*(at_rows(name) - exact[name] for name in exact if hasattr(found, name)))}
    if hasattr(found, "top_ids") and (k := found.top_ids.shape[-1]):
        chosen = np.take_along_axis(log_p, at_rows("top_ids"), -1)
        best = np.sort(log_p)[:, -k:]  # compared by value: near-ties may fall either way
        figures["top_k_error"] = largest(at_rows("top_log_p") - chosen, np.sort(chosen) - best)
    return figures


def measured(case: Case, repeats: int, limit: float) -> list[Measurement]:
    """Runs one case: all contestants, with temporaries in GB and the errors of what they find."""
    data = random_data(case)
    ours = losses(case, data) if case.op == "loss" else scoring(case, data)
    contestants = {"bare matrix products": bare_products(case, data), **ours, **torch_peers(case, data)}
    rows = interleaved(contestants, case=case.name, repeats=repeats, work=case.T, unit="rows", limit=limit)
    checked = np.linspace(0, case.T - 1, CHECKED_ROWS).astype(int)
    exact = None if case.op == "loss" else exact_log_probabilities(case, data, checked)
    finished = []
    for row in rows:
        contestant, extra = contestants[row.name], {}
        if row.seconds is not None and isinstance(contestant, Compiled):
            extra["temporaries_GB"] = contestant.temporaries
        if row.seconds is not None and exact is not None and row.name != "bare matrix products":
            extra |= errors(contestant(), checked, *exact)
        finished.append(replace(row, extra=extra))
    return finished


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=170, help="start no further contestant after this long")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each case")
    flags = parser.parse_args()
    todo = cases(flags.smoke)
    settings = {"smoke": flags.smoke, "V": todo[0].V, "dtype": "bfloat16", "ids per row": K, "top k": TOP_K}
    found: dict[Case, list[Measurement]] = {}

    def save(floor: MachineFloor, *, table: bool) -> None:
        floors = {case: floor.at_least(flops=case.flops, read=case.bytes_read) for case in found}
        rows = [with_floor(row, floors[case]) for case in found for row in found[case]]
        write(Result("bench_scoring", floor, rows, settings), flags.folder, table=table)

    floor = machine_floor(smoke=flags.smoke)
    for case in todo:
        if over(flags.seconds):
            found[case] = [Measurement(case.name, "all", note=NOT_STARTED)]
        else:
            found[case] = measured(case, 2 if flags.smoke else flags.repeats, flags.seconds)
        save(floor, table=False)
    save(floor.or_faster(machine_floor(smoke=flags.smoke)), table=True)


if __name__ == "__main__":
    main()
