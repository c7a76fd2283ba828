"""Matrix products that keep what their inputs hold: float32 accumulated and returned, whatever the platform."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def product(formula: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """Contracts two arrays by an einsum formula, in the wider of their dtypes; the result is float32."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    precision = "highest" if dtype == jnp.float32 else None  # otherwise TPUs and GPUs round float32 inputs
    return jnp.einsum(
        formula, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32
    )
