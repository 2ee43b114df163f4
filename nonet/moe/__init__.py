"""The Mixture-of-Experts layer: pick experts, move tokens to them, compute, bring the results back."""
