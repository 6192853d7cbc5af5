"""What a change damages besides what it was for: each measure a pure function, and a runner over a model and a patch."""
