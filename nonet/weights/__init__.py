"""Weights: read from a checkpoint, each rank only its own, and held in slots."""
