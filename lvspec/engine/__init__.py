"""Many sequences, each in its place: what goes in, when an iteration runs, what comes out."""
