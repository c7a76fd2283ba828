"""The estimator lab: forms, estimators, aggregates and allocations of tokens against exact truth."""
