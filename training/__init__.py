"""What all stages share: one epoch of supervised training, distillation, evaluation, optimisers, batch norms."""
