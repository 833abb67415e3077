"""How a probe is judged: grouped folds, metrics, baselines, permutation nulls and conformal intervals."""
