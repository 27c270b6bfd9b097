"""Evaluation: tasks with their versions, generation, extraction of answers, scores, and prediction files."""
