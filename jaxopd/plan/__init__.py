"""What a diagnosis or a training run will hold and take, from config.json files and a hardware description alone."""

from jaxopd.plan.diagnosis import DiagnosisWork, plan_diagnosis
from jaxopd.plan.hardware import HARDWARE, Hardware, ImaginedMesh, find_hardware
from jaxopd.plan.roofline import Stage
from jaxopd.plan.training import TrainingWork, plan_training_run

__all__ = [
    "HARDWARE",
    "DiagnosisWork",
    "Hardware",
    "ImaginedMesh",
    "Stage",
    "TrainingWork",
    "find_hardware",
    "plan_diagnosis",
    "plan_training_run",
]
