"""Unlearning: methods that make a model lose facts."""
