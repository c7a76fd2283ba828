"""jaxopd measures and trains on-policy distillation of language models: per token, per question, per teacher."""

import os

# transformers serves tokenizers here; without torch it would say at each start that it has no models.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from jaxopd.alignment import alignment
from jaxopd.diagnose import DiagnoseConfig, diagnose
from jaxopd.errors import InputError
from jaxopd.gradients import FORMS, logit_gradient
from jaxopd.models import load_model, load_tokenizer, logits, save_model
from jaxopd.rollouts import Engine, Requests, Rollouts, Sampling, rollout
from jaxopd.tasks import grade
from jaxopd.tree import success_estimates

__all__ = [
    "FORMS",
    "DiagnoseConfig",
    "Engine",
    "InputError",
    "Requests",
    "Rollouts",
    "Sampling",
    "alignment",
    "diagnose",
    "grade",
    "load_model",
    "load_tokenizer",
    "logit_gradient",
    "logits",
    "rollout",
    "save_model",
    "success_estimates",
]
