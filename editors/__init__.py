"""Methods that turn a request into a patch."""
