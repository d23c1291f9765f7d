"""Pretraining: recipe, model assembly, train loop, stages, tracking, evaluation, generation and the command line."""
