"""Answering with documents: the floor beside ``editors``. Decoding rules, readers, and verdicts on memory against documents."""
