"""The audit: attacks that any edited or unlearned model must stand, with controls that say what a leak is worth.

An attack gets a model (patched or not), the facts that should be gone, and controls: a model that never saw the facts, and
facts that no model saw. What counts is the lift: what the attack brings out, minus what it brings out of the stronger control.
"""
