"""How a probe is judged: grouped folds, metrics, baselines, shuffled labels and conformal intervals."""
