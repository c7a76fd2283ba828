"""What bench_training.py compares with: a plain JAX update that materialises logits, and TRL's GKD trainer."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxopd.models import linear
from jaxopd.train.batch import Sequences
from jaxopd.train.step import Frozen, response_states


@partial(jax.jit, static_argnames=("graph", "teacher_graph", "transform"), donate_argnames=("params", "opt_state"))
def plain_update(
    graph: nnx.GraphDef,
    params: nnx.State,
    opt_state: Any,
    teacher_graph: nnx.GraphDef,
    teacher_state: nnx.State,
    sequences: Sequences,
    responses: Int[Array, "b S"],
    transform: optax.GradientTransformation,
) -> tuple[nnx.State, Any, Float[Array, ""]]:
    """Makes one update on the mean reverse KL of both models' [b, S, V] logits, as one would write it first."""

    def log_probabilities(graph: nnx.GraphDef, state: nnx.State) -> Float[Array, "b S V"]:
        model = nnx.merge(graph, state)
        hidden = response_states(model, sequences, responses.shape[1])
        return jax.nn.log_softmax(linear(hidden, model.head(), jnp.dtype("float32")))

    log_q = log_probabilities(teacher_graph, teacher_state)
    weights = (responses >= 0) / jnp.sum(responses >= 0)

    def loss(params: nnx.State) -> Float[Array, ""]:
        log_p = log_probabilities(graph, params)
        return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))

    value, gradients = jax.value_and_grad(loss)(params)
    updates, opt_state = transform.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


class PlainLoop:
    """Repeats `plain_update` on one batch."""

    def __init__(self, student: Frozen, teacher: Frozen, sequences: Sequences, responses: Array, transform: Any):
        self.graph, self.params = student[0], jax.tree.map(jnp.copy, student[1])
        self.opt_state = transform.init(self.params)
        self.rest = (*teacher, sequences, responses, transform)

    def __call__(self) -> Float[Array, ""]:
        self.params, self.opt_state, loss = plain_update(self.graph, self.params, self.opt_state, *self.rest)
        return loss

    @property
    def temporaries(self) -> float:
        """Gigabytes that the compiled update holds beside its arguments."""
        lowered = plain_update.lower(self.graph, self.params, self.opt_state, *self.rest)
        return lowered.compile().memory_analysis().temp_size_in_bytes / 1e9


def gkd_steps(
    student: Path, teacher: Path, questions: Sequence[str], *, rows: int, steps: int, new: int, rate: float, out: Path
) -> Callable[[], None]:
    """TRL's GKD on the same models: on-policy (lmbda 1), reverse KL (beta 1), `rows` prompts a step, float32.

    Raises ImportError where torch or TRL are missing.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as JAX uses
    tokenizer = AutoTokenizer.from_pretrained(student)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (student, teacher)]
    for model in models:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    answered = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "answer zero"}] for text in questions
    ]
    config = GKDConfig(
        output_dir=str(out),
        per_device_train_batch_size=rows,
        max_steps=steps,
        lmbda=1.0,
        beta=1.0,
        temperature=1.0,
        max_new_tokens=new,
        max_length=512,
        learning_rate=rate,
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=jax.default_backend() == "cpu",
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"messages": answered})
    trainer = GKDTrainer(models[0], models[1], config, train_dataset=data, processing_class=tokenizer)
    return lambda: trainer.train() and None
