"""The toy suite: six small models of the Qwen3 architecture that ship with jaxopd, their corpus and training."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"  # one Hugging Face folder a role: S, M, T1, T2, T3, X
