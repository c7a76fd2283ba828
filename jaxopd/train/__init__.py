"""Training by on-policy distillation: objectives, metrics, the loop and its recipes."""
