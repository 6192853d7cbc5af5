"""Answering with documents: the floor beside ``editors``. It holds no reader yet, only its place on the command line."""
