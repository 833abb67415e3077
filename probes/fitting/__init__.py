"""How a probe is fitted: linear estimators, their solvers, sweeps over layers, and the held-out choice among them."""
