"""Shared by all stages: one epoch of supervised training, distillation, evaluation, optimisers, batch norms."""
