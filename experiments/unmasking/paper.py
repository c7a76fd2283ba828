"""Numbers printed in paper A (arXiv 2605.10889), to stand beside measured ones.

Keys: size of the student ("0.6B", "1.7B") and benchmark ("BoolQ", "MMLU"); teachers by what they are: (kind, source) of
`jaxopd.tasks.contexts` for the student with a context, ("external", 0) to 2 for the other models, smallest first.
"""

SETTINGS = (("0.6B", "BoolQ"), ("0.6B", "MMLU"), ("1.7B", "BoolQ"), ("1.7B", "MMLU"))
TEACHERS = (
    ("1C", "student"),
    ("1C", "large"),
    ("Sum1C", "student"),
    ("Sum1C1W", "student"),
    ("1C1W", "student"),
    ("external", 2),
    ("external", 1),
    ("external", 0),
)


def _by_setting(*rows: tuple) -> dict:
    """Turns one row a teacher, one entry a setting, into {setting: {teacher: entry}}."""
    return {
        setting: {teacher: row[column] for teacher, row in zip(TEACHERS, rows, strict=True)}
        for column, setting in enumerate(SETTINGS)
    }


# Table 1: mean cosine, half width of the 95 % interval.
RANKING = _by_setting(
    ((0.047, 0.021), (0.040, 0.028), (0.028, 0.024), (0.010, 0.024)),
    ((0.047, 0.022), (0.052, 0.025), (0.020, 0.034), (0.021, 0.030)),
    ((0.041, 0.025), (0.047, 0.032), (0.050, 0.030), (0.036, 0.025)),
    ((0.016, 0.025), (0.037, 0.031), (0.008, 0.029), (0.034, 0.033)),
    ((0.019, 0.018), (0.027, 0.037), (0.002, 0.027), (0.009, 0.022)),
    ((0.016, 0.021), (0.015, 0.032), (0.036, 0.035), (0.017, 0.035)),
    ((0.018, 0.022), (0.011, 0.032), (0.053, 0.028), (0.014, 0.037)),
    ((0.018, 0.024), (0.000, 0.026), (0.040, 0.024), (0.017, 0.041)),
)

# Table 2: threshold -> (mean signal, half width, share of tokens kept).
SELECTIVE = {
    ("0.6B", "BoolQ"): {None: (0.007, 0.001, 1.0), 0.0: (0.070, 0.002, 0.516), 0.3: (0.076, 0.002, 0.466)},
    ("1.7B", "BoolQ"): {None: (0.006, 0.001, 1.0), 0.0: (0.093, 0.003, 0.516), 0.3: (0.096, 0.003, 0.497)},
    ("0.6B", "MMLU"): {None: (0.005, 0.001, 1.0), 0.0: (0.057, 0.002, 0.517), 0.3: (0.062, 0.002, 0.461)},
    ("1.7B", "MMLU"): {None: (0.006, 0.001, 1.0), 0.0: (0.077, 0.003, 0.512), 0.3: (0.081, 0.003, 0.479)},
}

# Table 3, BoolQ: (share of positive nodes, cosine weighted by success range) for 0.6B, then for 1.7B.
ALTERNATIVES = dict(
    zip(
        TEACHERS,
        (
            ((0.526, 0.120), (0.515, 0.046)),
            ((0.528, 0.108), (0.512, 0.039)),
            ((0.522, 0.114), (0.527, 0.088)),
            ((0.509, 0.065), (0.505, 0.038)),
            ((0.511, 0.043), (0.501, 0.017)),
            ((0.512, 0.060), (0.518, 0.053)),
            ((0.511, 0.062), (0.530, 0.072)),
            ((0.512, 0.053), (0.520, 0.060)),
        ),
        strict=True,
    )
)

# Table 4: statistic -> (correct paths, incorrect paths).
OUTCOMES = {
    ("0.6B", "BoolQ"): {"mean": (0.011, 0.044), "sr_weighted": (0.046, 0.110), "advantage": (0.002, 0.008)},
    ("1.7B", "BoolQ"): {"mean": (0.001, 0.058), "sr_weighted": (0.010, 0.093), "advantage": (-0.002, 0.011)},
    ("0.6B", "MMLU"): {"mean": (0.009, 0.048), "sr_weighted": (0.021, 0.118), "advantage": (0.002, 0.005)},
    ("1.7B", "MMLU"): {"mean": (0.012, 0.028), "sr_weighted": (0.034, 0.098), "advantage": (0.001, 0.010)},
}

# Table 5, top: Spearman's rho over all teachers.
CORRELATIONS = {
    ("0.6B", "BoolQ"): {"depth": 0.042, "reverse_kl": 0.029, "js": 0.030, "l2": 0.031, "cosine": -0.029},
    ("0.6B", "MMLU"): {"depth": 0.035, "reverse_kl": 0.028, "js": 0.028, "l2": 0.034, "cosine": -0.026},
    ("1.7B", "BoolQ"): {"depth": -0.007, "reverse_kl": 0.009, "js": 0.006, "l2": 0.006, "cosine": -0.003},
    ("1.7B", "MMLU"): {"depth": 0.010, "reverse_kl": 0.030, "js": 0.022, "l2": 0.023, "cosine": -0.020},
}

# Table 6, BoolQ: mean cosine on (correct, incorrect) paths for 0.6B, then for 1.7B.
PER_TEACHER = dict(
    zip(
        TEACHERS,
        (
            ((0.047, 0.047), (-0.006, 0.062)),
            ((0.030, 0.063), (-0.027, 0.067)),
            ((0.023, 0.059), (0.021, 0.079)),
            ((-0.005, 0.037), (-0.026, 0.042)),
            ((0.010, 0.029), (-0.013, 0.017)),
            ((-0.006, 0.037), (0.017, 0.055)),
            ((-0.012, 0.048), (0.026, 0.080)),
            ((0.001, 0.035), (0.020, 0.060)),
        ),
        strict=True,
    )
)

# Table 8: accuracy in per cent per context, settings in the order of SETTINGS.
SCREENING = {
    "Baseline": (78.5, 63.8, 88.9, 85.2),
    "Self-1C": (98.5, 98.6, 98.3, 99.7),
    "Self-1C1W": (77.6, 68.2, 87.7, 94.0),
    "Self-3C": (99.3, 99.4, 99.3, 99.8),
    "Self-Sum-1C": (97.4, 96.4, 98.2, 99.3),
    "Self-Sum-1C1W": (92.5, 91.5, 94.5, 98.2),
    "Self-1C-large": (98.4, 98.8, 98.7, 99.7),
}
