"""Where the shared-trunk attention kernel wins: each implementation that runs here, over slots and trunk lengths.

    python experiments/bench_trunk_attention.py            # about a minute on an H200; experiments/results/
    python experiments/bench_trunk_attention.py --smoke    # seconds

One layer of Qwen3-0.6B (16 query heads, 8 key-value heads of 128) in bfloat16; slots end uniformly in the second half
of the trunk. The ratios say where `chosen_implementation` should put its bounds LEAST_TRUNK and LEAST_SLOTS.
Floor: the larger of 4 H h (attended positions) FLOP and one read of the trunk.
"""

import jax
import jax.numpy as jnp
import numpy as np
from benchmarking import Measurement, Result, arguments, interleaved, machine_floor, with_floor, write
from jaxopd_kernels import TRUNK_IMPLEMENTATIONS, choice, trunk_attention

H, K, HEAD_DIM = 16, 8, 128
LAYERS = 28  # run one after the other, so that a launch is not most of what is timed
ON_ACCELERATOR = [(slots, trunk) for slots in (8, 32, 128, 256) for trunk in (256, 2_048, 30_208)]
ON_CPU = [(8, 256), (32, 512), (32, 2_048)]


def available() -> list[str]:
    """Names the implementations that run on this device, the reference first."""
    device = choice.device_of(choice.local_kind())
    return [name for name in TRUNK_IMPLEMENTATIONS if name == "xla" or (device and name == device.kernel)]


def layers(implementation: str):
    """Chains LAYERS calls, each fed by the one before."""

    @jax.jit
    def run(q, k, v, end):
        def layer(_, q):
            return trunk_attention(q, k, v, end, implementation=implementation)[0].astype(q.dtype)

        return jax.lax.fori_loop(0, LAYERS, layer, q)

    return run


def measure(slots: int, trunk: int, floor, repeats: int) -> list[Measurement]:
    rng = np.random.default_rng(0)
    shapes = [(slots, H, HEAD_DIM), (K, trunk, HEAD_DIM), (K, trunk, HEAD_DIM)]
    q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
    end = jnp.asarray(rng.integers(trunk // 2, trunk + 1, slots), jnp.int32)
    runs = {name: layers(name) for name in available()}
    contestants = {name: (lambda run=run: run(q, k, v, end)) for name, run in runs.items()}
    case = f"{slots} slots, trunk {trunk:,}, {LAYERS} layers"
    rows = interleaved(contestants, case=case, repeats=repeats, reference="xla", work=LAYERS, unit="layers")
    flops = LAYERS * 4 * H * HEAD_DIM * float(end.sum())
    least = floor.at_least(flops=flops, read=LAYERS * (k.nbytes + v.nbytes))
    return [with_floor(row, least, slots=slots, trunk=trunk) for row in rows]


def main() -> None:
    args = arguments(__doc__).parse_args()
    shapes = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    shapes, repeats = ([(4, 64)], 2) if args.smoke else (shapes, 10)
    floor = machine_floor(smoke=args.smoke)
    rows = [row for slots, trunk in shapes for row in measure(slots, trunk, floor, repeats)]
    write(Result("bench_trunk_attention", floor, rows, {"smoke": args.smoke, "repeats": repeats}), args.folder)


if __name__ == "__main__":
    main()
