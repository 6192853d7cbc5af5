"""Atlas: a small world with complete ground truth, the forms it is asked in, and the models that know it."""
